"""The Lighthouse trainer: ``torchrun … -m torchtitan.experiments.lighthouse.train --job.config_file FILE.toml``.

Upstream's trainer, which also runs on CPU, stops before it saves weights that are not finite, and says where a run
comes from when it resumes. Every setting of the file can be given on the command line too (``--help`` lists them).
"""

# ruff: noqa: E402
from torchtitan.experiments.lighthouse.cpu import use_cpu_without_accelerator

use_cpu_without_accelerator()

import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torchtitan.train as upstream
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.experiments.lighthouse.job_config import check_degrees
from torchtitan.experiments.lighthouse.loss import Processed, with_labels
from torchtitan.experiments.lighthouse.metrics import stage_of
from torchtitan.tools.logging import logger


class _HostTensor(Tensor):
    """A batch, or what is computed from it on the host, that goes to the device without waiting for the device.

    Upstream's ``.to(device)`` waits until all that was launched has run. Each step would begin with an empty queue,
    and a step of short layers would never fill it again.
    """

    def to(self, device: torch.device) -> Tensor:
        tensor = self.as_subclass(Tensor)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class LighthouseTrainer(upstream.Trainer):
    def __init__(self, job_config: JobConfig) -> None:
        if "WORLD_SIZE" not in os.environ:
            raise RuntimeError("no WORLD_SIZE: start with torchrun --nproc_per_node GPUS -m torchtitan.experiments.…")
        check_degrees(job_config.parallelism, int(os.environ["WORLD_SIZE"]))
        self._losses: list[Tensor] = []
        self._unchecked: tuple[int, Tensor, torch.Event | None] | None = None
        super().__init__(job_config)
        self.optimizers.register_step_pre_hook(self._before_optimizer_step)
        if self.parallel_dims.world_size == 1:
            # FSDP sets the precision here too (infra/parallelize.py); upstream has just added autocast, and said so.
            logger.info("One device: mixed precision is handled by fully_shard after all, as on several")
            self.maybe_enable_amp = nullcontext()
            if job_config.validation.enable:
                self.validator.maybe_enable_amp = self.maybe_enable_amp

    def post_dataloading_process(self, *args: Any) -> Processed:
        return with_labels(super().post_dataloading_process(*args), self.parallel_dims)

    def forward_backward_step(self, **kwargs: Any) -> Tensor:
        loss = super().forward_backward_step(**kwargs)
        self._losses.append(loss.detach())
        return loss

    def _before_optimizer_step(self, *_: Any) -> None:
        """Send this step's loss and gradient norm on their way to the host, and look at those that have arrived.

        Waiting for this step's would leave the device idle until the next batch is there. So it is done only where
        upstream waits too, before a step is logged, and before anything is saved (``state_dict``).

        Upstream has clipped by now. A non-finite norm is still seen: clipping multiplies every gradient by
        max_norm/norm, which leaves NaN wherever the norm came from.
        """
        parameters = [p for part in self.model_parts for p in part.parameters()]
        norm = dist_utils.clip_grad_norm_(
            parameters, math.inf, foreach=True, pp_mesh=self.parallel_dims.get_optional_mesh("pp")
        )
        numbers = torch.stack([torch.stack(self._losses).sum(), norm]).to("cpu", non_blocking=True)
        self._losses.clear()
        arrived = None if self.device.type == "cpu" else torch.Event(self.device)
        if arrived is not None:
            arrived.record()
        previous, self._unchecked = self._unchecked, (self.step, numbers, arrived)
        self._refuse_nonfinite(previous)
        if self.metrics_processor.should_log(self.step):
            self._refuse_nonfinite(self._unchecked)

    def _refuse_nonfinite(self, unchecked: tuple[int, Tensor, torch.Event | None] | None) -> None:
        if unchecked is None:
            return
        step, numbers, arrived = unchecked
        if arrived is not None:
            arrived.synchronize()
        loss, norm = numbers.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: this rank's share of the loss {loss}, gradient norm {norm}: must be finite. Nothing was "
                f"saved after step {step - 1}. The same command resumes from the last checkpoint in "
                f"{self._checkpoint_folder()}; a lower optimizer.lr or a longer lr_scheduler.warmup_steps is the usual "
                "remedy."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trainer; asked for before every save, and so the place to refuse one."""
        self._refuse_nonfinite(self._unchecked)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        logger.info(f"Resuming after step {self.step}")

    def batch_generator(self, data_iterable: Iterable) -> Any:
        # Upstream asks for the batches right after it has loaded a checkpoint, or has not.
        self._announce_start()
        return self._without_waiting(super().batch_generator(data_iterable))

    @staticmethod
    def _without_waiting(batches: Iterable) -> Any:
        for inputs, labels in batches:
            inputs = {name: tensor.as_subclass(_HostTensor) for name, tensor in inputs.items()}
            yield inputs, labels.as_subclass(_HostTensor)

    def _announce_start(self) -> None:
        stage, config = stage_of(self.job_config), self.job_config
        n_layers = self.model_args.n_layers
        if stage == "stage1":
            layers = self.model_args.lighthouse_layers
            selected = self.model_args.lighthouse.selected_length(config.training.seq_len)
            logger.info(
                f"Lighthouse in {len(layers)} of {n_layers} layers ({config.lighthouse.layers}), "
                f"{selected:,} of {config.training.seq_len:,} rows a sequence: {self.model_args.lighthouse}"
            )
        else:
            logger.info(f"dense in all {n_layers} layers")
        if self.step == 0:
            if stage == "stage2":
                self._refuse_unloaded_stage2()
            return
        tokens = torch.tensor(self.ntokens_seen, dtype=torch.int64, device=self.device)
        if self.parallel_dims.dp_enabled:  # ranks that share a sequence have all counted it
            tokens = dist_utils.dist_sum(tokens, self.parallel_dims.get_mesh("batch"))
        scheduler = self.lr_schedulers.schedulers[0]
        saved, base, schedule = scheduler.get_last_lr()[0], scheduler.base_lrs[0], scheduler.lr_lambdas[0]
        scheduled = base * schedule(scheduler.last_epoch)
        logger.info(
            f"{stage} starts after step {self.step:,}, {int(tokens):,} tokens seen; "
            f"learning rate {saved:.4e} before (in the checkpoint), {scheduled:.4e} after (by this schedule)"
        )
        if stage == "stage2":
            logger.info(f"Stage 1 checkpoint: {config.lighthouse.stage1_checkpoint}")
        if not math.isclose(saved, scheduled, rel_tol=1e-6):
            logger.warning(
                "The learning rate jumps here: optimizer.lr or [lr_scheduler] differ from those of the checkpoint."
            )

    def _refuse_unloaded_stage2(self) -> None:
        raise RuntimeError(
            f"Stage 2 loaded no checkpoint: {self._checkpoint_folder()} exists but holds no complete one, so "
            f"{self.job_config.lighthouse.stage1_checkpoint} was not read and training would start from random "
            "weights. Start Stage 2 with scripts/resume_dense.py, which sets the unfinished folder aside."
        )

    def _checkpoint_folder(self) -> str:
        return os.path.join(self.job_config.job.dump_folder, self.job_config.checkpoint.folder)


if __name__ == "__main__":
    upstream.main(LighthouseTrainer)
