"""Inputs of blocks that wait in host memory for their backward (``activation_checkpoint.offload_layers``).

With activation checkpointing each block keeps its input, N rows, until the backward computes the block again. Here the
inputs of the first blocks, which wait longest, are copied to pinned host memory on a stream of their own while the
block computes, and come back while the backward of the next block computes. Torch's ``save_on_cpu`` waits for each
copy, hence the hooks of our own; its allocator of pinned memory keeps the buffers from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig

SETTING = "activation_checkpoint.offload_layers"

#: The modes in which a block keeps little more than its input.
MODES = ("full", "selective")


def check_offload(config: MergedConfig, n_layers: int) -> None:
    """Whether the setting fits the mode and the model.

    Raises:
        Refused: naming the value, the rule and the nearest valid value.
    """
    section = config.activation_checkpoint
    layers, mode = section.offload_layers, section.mode
    if layers and mode not in MODES:
        raise Refused(
            f"{SETTING}={layers}: must be 0 with activation_checkpoint.mode={mode!r}, because only 'full' and "
            "'selective' keep the inputs of layers and little else; nearest valid value: 0, or "
            "activation_checkpoint.mode='full'"
        )
    if layers >= n_layers:
        raise Refused(
            f"{SETTING}={layers}: must be at most {n_layers - 1}, because the model has {n_layers} layers and the "
            f"backward begins with the last one; nearest valid value: {n_layers - 1}"
        )


def check_host_memory(config: MergedConfig, dim: int, ranks_here: int, available: int | None = None) -> None:
    """Whether the inputs fit into the memory of this host.

    Args:
        dim: width of the model.
        ranks_here: how many processes of the run are on this host.
        available: bytes; by default those that are free here.

    Raises:
        Refused: with the number of layers that fit.
    """
    layers = config.activation_checkpoint.offload_layers
    free = available_memory() if available is None else available
    if not layers or free is None:
        return
    training, parallelism = config.training, config.parallelism
    ranks = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    rows = training.local_batch_size * training.seq_len // ranks
    layer = ranks_here * host_bytes(rows * dim * TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize)
    if layers * layer > free:
        processes = "" if ranks_here == 1 else f" for {ranks_here} processes"
        raise Refused(
            f"{SETTING}={layers}: needs {layers * layer / 2**30:.1f} GiB of host memory, {layer / 2**30:.2f} GiB a "
            f"layer{processes}, and {free / 2**30:.1f} GiB are free; nearest valid value: {free // layer}"
        )


def host_bytes(size: int) -> int:
    """What one buffer takes: torch's allocator of pinned memory rounds up to a power of two."""
    return 1 << max(0, size - 1).bit_length()


def available_memory() -> int | None:
    """Bytes of host memory that are free, within the limit of this process's control group; None if nothing says so."""
    found = []
    lines = _read("/proc/meminfo").splitlines()
    found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        stat = dict(line.split(maxsplit=1) for line in _read("/sys/fs/cgroup/memory.stat").splitlines())
        # What was read from files and not used lately counts as used, but makes room.
        found.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return min(found, default=None)


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def offload_inputs(blocks: Sequence[nn.Module], layers: int) -> None:
    """Let the inputs of the first ``layers`` of these blocks wait in host memory, in every forward with gradients.

    Args:
        blocks: of the model, in the order in which they run; each with its input [B, N, dim] as first argument. They
            may be checkpointed, compiled and sharded: this is called after all that.
    """
    copies = _Copies()
    for index, block in enumerate(blocks[: layers + 1]):
        block.register_forward_pre_hook(partial(copies.before_block, index, index < layers))
        block.register_forward_hook(copies.after_block, always_call=True)


class _Copies:
    """The copies of one model, in both directions, on one stream."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        #: The input whose copy to the host is under way: it may not be freed before that has ended.
        self._leaving: tuple[Tensor, torch.cuda.Event | None] | None = None
        #: That of the block before the one that runs, and of this one. Weak: the graph alone keeps them, until the
        #: backward of their block.
        self._before: Callable[[], _HostInput | None] = _none
        self._newest: Callable[[], _HostInput | None] = _none
        self._hooks: saved_tensors_hooks | None = None

    def before_block(self, index: int, offload: bool, block: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: start the copy of the block's input, and replace the input wherever it is saved."""
        if not torch.is_grad_enabled():
            return
        self.settle()
        self._before, self._newest = self._newest if index else _none, _none
        if offload:
            hidden = args[0]
            waiting = _HostInput(hidden, self)
            self._newest = weakref.ref(waiting)
            self._hooks = saved_tensors_hooks(partial(_pack, waiting, hidden.data_ptr(), hidden.numel()), _unpack)
            self._hooks.__enter__()

    def after_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> None:
        """A forward hook; without an output if the block has failed."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
        if output is not None and output.requires_grad:
            # The gradient of the output comes just before the block's backward, which covers the copy.
            output.register_hook(partial(_fetch, self._before))

    def leave(self, hidden: Tensor, host: Tensor) -> None:
        self._leaving = hidden, self.start(hidden, host)

    def settle(self) -> None:
        """What is computed from now on may use the memory of the input that was leaving."""
        if self._leaving is not None:
            wait_for(self._leaving[1])
            self._leaving = None

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Copy after all that has been launched so far; the event is when it is done, None for now."""
        device = source.device if source.is_cuda else target.device
        if device.type == "cpu":
            target.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


class _HostInput:
    """One block's input, in host memory. Its buffer is free again when this is."""

    def __init__(self, hidden: Tensor, copies: _Copies) -> None:
        self._copies, self._device = copies, hidden.device
        self._host = torch.empty_like(hidden, device="cpu", pin_memory=hidden.is_cuda, requires_grad=False)
        self._back: tuple[Tensor, torch.cuda.Event | None] | None = None
        copies.leave(hidden.detach(), self._host)

    def fetch(self) -> None:
        """Start its way back."""
        if self._back is None:
            self._copies.settle()
            back = torch.empty_like(self._host, device=self._device, pin_memory=False)
            self._back = back, self._copies.start(self._host, back)

    def take(self) -> Tensor:
        """The input on its device, for what is launched from now on. It is not kept here."""
        self.fetch()
        assert self._back is not None
        (back, arrived), self._back = self._back, None
        wait_for(arrived)
        return back


def wait_for(event: torch.cuda.Event | None) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def _pack(waiting: _HostInput, address: int, numel: int, tensor: Tensor) -> Any:
    # The same rows, perhaps as another tensor. Everything else that the block saves stays where it is.
    same = type(tensor) is Tensor and tensor.data_ptr() == address and tensor.numel() == numel
    return (waiting, tensor.shape) if same and tensor.is_contiguous() else tensor


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    waiting, shape = packed
    rows: Tensor = waiting.take().view(shape)
    return rows


def _fetch(reference: Callable[[], _HostInput | None], gradient: Tensor) -> None:
    waiting = reference()
    if waiting is not None:
        waiting.fetch()


def _none() -> None:
    return None
