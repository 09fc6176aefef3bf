"""Forward and backward of a training step as one CUDA graph: ``training.cuda_graph``.

The step of a small model is bound by the host: Python, FSDP's hooks and the launches of some thousand kernels take
longer than the kernels. A graph holds what was launched once, and the host launches it as a whole.

The first ``WARM_UP`` batches run as they would without a graph: libraries allocate, and the compiler compiles. The next
one is recorded, which computes nothing. From then on each batch is copied to where the recorded one was, and the graph
runs. The same kernels run on the same numbers, so losses and gradients are the same, to the bit. Clipping, the
optimizer and all else of the step stay outside: the learning rate is a number on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.seams.parallelism import communication_streams, reshard
from torchtitan.tools.logging import logger

#: Batches of each kind that run before one is recorded, on the stream that it is recorded on.
WARM_UP = 3

#: Upstream's method: batch, labels and number of tokens to the loss; leaves gradients in the parameters.
ForwardBackward = Callable[..., Tensor]

#: Loss and gradients.
Results = tuple[Tensor, list[Tensor | None]]


class Recorder(Protocol):
    """Runs something eagerly or records it. ``CUDARecorder``, or what a test puts in its place."""

    @staticmethod
    def why_not() -> str | None:
        """Why nothing can be recorded here, or None."""
        ...

    def __init__(self, model: nn.Module) -> None: ...

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Do it now, where it is going to be recorded."""
        ...

    def record(self, work: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Do it without computing anything.

        Returns:
            What ``work`` returned, whose numbers mean nothing yet, and what computes them there, each time anew.
        """
        ...


class CUDARecorder:
    """CUDA graphs, in memory that they share: no two of them run at the same time.

    Args:
        model: its FSDP works on streams of its own, which have to begin and end with the graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stream = torch.cuda.Stream()
        self._pool: Any = None

    @staticmethod
    def why_not() -> str | None:
        return None if torch.cuda.is_available() else "there is no CUDA device"

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        # Autograd remembers the stream of a parameter's first gradient, which must be the one that is recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device for things meanwhile: NCCL's watchdog does.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode), self._joined():
            results = work()
        self._pool = graph.pool()
        return results, graph.replay

    @contextmanager
    def _joined(self) -> Iterator[None]:
        current, others = torch.cuda.current_stream(), communication_streams(self._model)
        for stream in others:
            stream.wait_stream(current)
        yield
        for stream in others:
            current.wait_stream(stream)


@dataclass
class _Recorded:
    """Where a graph reads its batch and leaves its results, and what runs it."""

    arguments: dict[str, Any]
    loss: Tensor
    gradients: list[Tensor | None]
    run: Callable[[], None]


class GraphedForwardBackward:
    """Upstream's ``forward_backward_step`` as graphs, one for each kind of step.

    Args:
        forward_backward: the method.
        model: the whole model, on one device.
        recorder: runs and records.
        accumulates: whether a step has several batches, whose gradients are added up.
    """

    def __init__(
        self, forward_backward: ForwardBackward, model: nn.Module, recorder: Recorder, *, accumulates: bool
    ) -> None:
        self._forward_backward, self._model, self._recorder = forward_backward, model, recorder
        self._accumulates = accumulates
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._sums: list[Tensor | None] | None = None

    def __call__(self, kind: Hashable, arguments: dict[str, Any]) -> Tensor:
        """Add the gradients of a batch to those of the parameters.

        Args:
            kind: batches of one kind have the same shapes, and the model does the same with all of them.
            arguments: of ``forward_backward_step``, with all tensors on the device.

        Returns:
            The loss, a scalar that is not written again.
        """
        # A validation leaves the parameters whole. A graph runs none of FSDP's hooks, and reads the sharded ones.
        reshard(self._model)
        if kind not in self._recorded:
            self._seen[kind] += 1
            if self._seen[kind] <= WARM_UP:
                return self._recorder.run(lambda: self._forward_backward(**arguments).detach())
            self._recorded[kind] = self._record(arguments)
            logger.info("Forward and backward of such a step run as a CUDA graph from now on")
        recorded = self._recorded[kind]
        for (name, place), (_, tensor) in zip(_tensors(recorded.arguments), _tensors(arguments), strict=True):
            if place.shape != tensor.shape:
                raise ValueError(
                    f"training.cuda_graph: {name} of shape {tuple(tensor.shape)}, recorded with {tuple(place.shape)}"
                )
            place.copy_(tensor)
        recorded.run()
        self._hand_over(recorded.gradients)
        return recorded.loss.clone()

    def _record(self, arguments: dict[str, Any]) -> _Recorded:
        places = {
            name: {key: tensor.clone() for key, tensor in value.items()} if isinstance(value, dict) else value.clone()
            for name, value in arguments.items()
        }
        parameters = list(self._model.parameters())

        def work() -> tuple[Tensor, list[Tensor | None]]:
            # A dictionary of its own: upstream's method may take things out of it.
            loss = self._forward_backward(**places | {"input_dict": dict(places["input_dict"])}).detach()
            return loss, _take_gradients(parameters)

        # Without gradients there, the graph writes them, and adds to none.
        before = _take_gradients(parameters)
        try:
            (loss, gradients), run = self._recorder.record(work)
        except RuntimeError as error:
            raise RuntimeError(
                "training.cuda_graph=true: forward and backward of this model cannot be recorded as a CUDA graph; "
                f"nearest valid value: false ({error})"
            ) from error
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        return _Recorded(places, loss, gradients, run)

    def _hand_over(self, gradients: list[Tensor | None]) -> None:
        """Add these to the parameters' own, as FSDP does. The graph's next run writes over them."""
        parameters = list(self._model.parameters())
        if all(parameter.grad is None for parameter in parameters):
            if self._accumulates:
                if self._sums is None:
                    self._sums = [None if gradient is None else torch.empty_like(gradient) for gradient in gradients]
                torch._foreach_copy_(_shards(self._sums), _shards(gradients))
                gradients = self._sums
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        else:
            torch._foreach_add_(_shards(parameter.grad for parameter in parameters), _shards(gradients))


def _take_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _shards(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that there are, as this device holds them: operations on lists of ``DTensor`` take the host much longer."""
    there = (gradient for gradient in gradients if gradient is not None)
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in there]


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", tensor) for key, tensor in value.items())
        else:
            yield name, value


def check(config: MergedConfig, world_size: int, why_not: str | None) -> None:
    """Whether the steps of this run can be a graph, if they are asked to be.

    Args:
        why_not: what ``Recorder.why_not`` says.

    Raises:
        Refused: naming the setting that does not go with it, and the nearest valid value.
    """
    if not config.training.cuda_graph:
        return
    checkpointing = config.activation_checkpoint
    reads_generator = checkpointing.mode in ("selective", "full") and checkpointing.preserve_rng_state
    problems = [
        (why_not is not None, why_not),
        (world_size > 1, f"WORLD_SIZE={world_size}: must be 1, because a graph holds no exchanges between devices"),
        (config.training.enable_cpu_offload, "training.enable_cpu_offload=true keeps gradients on the host"),
        (
            config.optimizer.early_step_in_backward,
            "optimizer.early_step_in_backward=true: the graph would repeat the learning rate of the recorded step",
        ),
        (
            bool(checkpointing.offload_layers),
            f"activation_checkpoint.offload_layers={checkpointing.offload_layers} copies beside the graph's stream",
        ),
        (
            config.training.sparse_loss_gradient,
            "training.sparse_loss_gradient=true waits for the device, to know how many columns have a gradient",
        ),
        (
            bool(config.model.converters),
            f"model.converters={config.model.converters}: what they change after a step is not seen by the graph",
        ),
        (
            reads_generator,
            f"activation_checkpoint.mode={checkpointing.mode!r} reads the state of the random generator (not with "
            "activation_checkpoint.preserve_rng_state=false: nothing here is random)",
        ),
    ]
    for is_there, problem in problems:
        if is_there:
            raise Refused(f"training.cuda_graph=true: {problem}; nearest valid value: false")
