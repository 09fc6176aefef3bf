"""Upstream's trainer with the moments named at which ours checks, logs and refuses: 0.2.2 has no hooks for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torchtitan.train as upstream
from torch import Tensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.seams.console import DETAIL
from torchtitan.experiments.lighthouse.seams.cuda_graph import CUDARecorder, GraphedForwardBackward, Recorder
from torchtitan.experiments.lighthouse.seams.optimizer import apply_settings, settings_of
from torchtitan.experiments.lighthouse.seams.parallelism import gather_gradients_without_the_host
from torchtitan.tools.logging import logger

Batch = tuple[dict[str, Tensor], Tensor]


class HostTensor(Tensor):
    """A batch, or what is computed from it on the host, that goes to the device without waiting for the device.

    Upstream's ``.to(device)`` waits until all that was launched has run. Each step would begin with an empty queue,
    and a step of short layers would never fill it again. Upstream has no setting for it, but calls ``to`` on what the
    batches hold: as long as it keeps the subclass, ``to`` is this one.
    """

    def to(self, device: torch.device) -> Tensor:  # type: ignore[override]
        tensor = self.as_subclass(Tensor)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class HookedTrainer(upstream.Trainer):
    """Upstream's trainer, which calls the methods below; each does nothing here.

    On one device it computes in FSDP's mixed precision instead of autocast's (``seams.parallelism``).
    """

    job_config: MergedConfig

    #: Whether training was asked to stop, and has stopped, before ``training.steps``; the same on all ranks.
    stopped_early = False

    #: What of the optimizer is not as in the loaded checkpoint: setting, value there, value from now on.
    changed_settings: list[tuple[str, Any, Any]]

    #: What records the steps of ``training.cuda_graph``.
    recorder: type[Recorder] = CUDARecorder
    _graphed: GraphedForwardBackward | None = None

    #: Of this step, before clipping; a scalar on the device.
    gradient_norm: Tensor

    def check_before_build(self) -> None:
        """Before anything is built: the settings are there, no process group and no device yet."""

    def checkpoint_manager(self) -> Callable[..., CheckpointManager]:
        """What the run's checkpoint manager is made with."""
        return CheckpointManager

    def check_loaded(self) -> None:
        """Once, after a checkpoint was loaded or none was found, before the first batch."""

    def log_start(self) -> None:
        """After ``check_loaded``."""

    def log_end(self) -> None:
        """After the last step, also where it was done already, with what it saves and validates."""

    def kind_of_step(self) -> Hashable:
        """Steps of one kind do the same; ``training.cuda_graph`` records each kind."""
        return None

    def around_step(self) -> AbstractContextManager[None]:
        """Entered before the first micro-batch of ``step``, left after its update; validation is outside."""
        return nullcontext()

    def end_step(self) -> None:
        """After ``around_step``, before the step's checkpoint, if one is due, is written."""

    def check_before_optimizer_step(self) -> None:
        """Gradients are there and clipped; ``step_losses`` holds the losses of the step's micro-batches, and
        ``gradient_norm`` the norm of all gradients before they were clipped, a scalar on the device."""

    def check_before_save(self) -> None:
        """Before every checkpoint is written."""

    def __init__(self, job_config: MergedConfig) -> None:
        self.job_config = job_config
        self.step_losses: list[Tensor] = []
        self.check_before_build()
        with _checkpoints_by(self.checkpoint_manager()):
            super().__init__(job_config)
        self._optimizer_settings = settings_of(self.optimizers)
        self.optimizers.register_step_pre_hook(lambda *_: self.check_before_optimizer_step())
        if job_config.training.cuda_graph:
            (model,) = self.model_parts
            gather_gradients_without_the_host()
            self._graphed = GraphedForwardBackward(
                super().forward_backward_step,
                model,
                self.recorder(model),
                accumulates=self.gradient_accumulation_steps > 1,
            )
        if self.parallel_dims.world_size == 1:
            # Upstream has just added autocast, and said so.
            logger.info("One device: mixed precision is handled by fully_shard after all, as on several", extra=DETAIL)
            self.maybe_enable_amp = nullcontext()
            if job_config.validation.enable:
                self.validator.maybe_enable_amp = self.maybe_enable_amp

    def train(self) -> None:
        super().train()
        self.log_end()

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        with self.around_step(), _gradient_norm_kept_by(self):
            super().train_step(data_iterator)
        self.end_step()

    def should_continue_training(self) -> bool:
        return super().should_continue_training() and not self.stopped_early

    def forward_backward_step(self, **kwargs: Any) -> Tensor:
        if self._graphed is None:
            loss = super().forward_backward_step(**kwargs)
        else:
            loss = self._graphed(self.kind_of_step(), kwargs)
        self.step_losses.append(loss.detach())
        return loss

    def state_dict(self) -> dict[str, Any]:
        # Asked for before every save, and only then.
        self.check_before_save()
        return super().state_dict()

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        # Upstream asks for the batches right after it has loaded a checkpoint, or has not.
        self.changed_settings = apply_settings(self._optimizer_settings, self.optimizers, self.lr_schedulers)
        self.check_loaded()
        self.log_start()
        return on_host(super().batch_generator(data_iterable))


@contextmanager
def _checkpoints_by(manager: Callable[..., CheckpointManager]) -> Iterator[None]:
    """Upstream's constructor takes the class from its module's names."""
    names = vars(upstream)
    names["CheckpointManager"] = manager
    try:
        yield
    finally:
        names["CheckpointManager"] = CheckpointManager


def on_host(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches as ``HostTensor``."""
    for inputs, labels in batches:
        yield {name: tensor.as_subclass(HostTensor) for name, tensor in inputs.items()}, labels.as_subclass(HostTensor)


@contextmanager
def _gradient_norm_kept_by(trainer: HookedTrainer) -> Iterator[None]:
    """Meanwhile, the norm that upstream computes in order to clip is kept, too: it hands it to no hook.

    To compute it once more would cost the host milliseconds in every step, and an exchange where there are other ranks.
    """
    clip = dist_utils.clip_grad_norm_

    def clip_and_keep(*args: Any, **kwargs: Any) -> Tensor:
        trainer.gradient_norm = clip(*args, **kwargs)
        return trainer.gradient_norm

    dist_utils.clip_grad_norm_ = clip_and_keep
    try:
        yield
    finally:
        dist_utils.clip_grad_norm_ = clip


def tokens_seen_by_all(trainer: upstream.Trainer) -> int:
    """Tokens that all ranks have read; ranks that share a sequence have each counted it."""
    tokens = torch.tensor(trainer.ntokens_seen, dtype=torch.int64, device=trainer.device)
    dims: ParallelDims = trainer.parallel_dims
    return int(dist_utils.dist_sum(tokens, dims.get_mesh("batch")) if dims.dp_enabled else tokens)
