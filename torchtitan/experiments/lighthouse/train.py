"""The Lighthouse trainer: ``torchrun … -m torchtitan.experiments.lighthouse.train --job.config_file FILE.toml``.

Upstream's trainer, which also runs on CPU, stops before it saves weights that are not finite, and says where a run
comes from when it resumes. Every setting of the file can be given on the command line too (``--help`` lists them).
"""

# ruff: noqa: E402
from torchtitan.experiments.lighthouse.seams.cpu import use_cpu_without_accelerator

use_cpu_without_accelerator()

import math
import os
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the model
from torch import Tensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse import console, hugging_face, sampling
from torchtitan.experiments.lighthouse.data.checks import check_data
from torchtitan.experiments.lighthouse.data.stream_loader import StreamLoader
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer, check_ends
from torchtitan.experiments.lighthouse.errors import Refused, as_refusal
from torchtitan.experiments.lighthouse.infra.offload import check_host_memory, check_offload
from torchtitan.experiments.lighthouse.job_config import MergedConfig, check_degrees
from torchtitan.experiments.lighthouse.loss import Processed, check_sparse_gradient, with_labels
from torchtitan.experiments.lighthouse.metrics import LighthouseMetricsProcessor
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer, dense_attention
from torchtitan.experiments.lighthouse.model.sizes import VOCAB_MULTIPLE, rows_for
from torchtitan.experiments.lighthouse.runs import contract, fingerprints, lock, saving, stages
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, name_of, number_of, read_metrics, stage_of
from torchtitan.experiments.lighthouse.runs.settings import complete, model_arguments
from torchtitan.experiments.lighthouse.runs.stopping import Requests
from torchtitan.experiments.lighthouse.seams import cuda_graph
from torchtitan.experiments.lighthouse.seams import trainer as seam
from torchtitan.experiments.lighthouse.seams.settings import main
from torchtitan.experiments.lighthouse.sparse_gradient import SparseGradient
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from lighthouse.inner_attention import check_machine


class LighthouseTrainer(seam.HookedTrainer):
    #: Step, its loss and gradient norm on their way to the host, and the event at which they have arrived there.
    _unchecked: tuple[int, Tensor, torch.Event | None] | None = None

    #: What the run reads, on the first rank, and lines that say what is not as in the checkpoint that it goes on from.
    _reads: dict[str, Any] | None = None
    _not_as_before: Sequence[str] = ()
    _compared: Path | None = None

    def check_before_build(self) -> None:
        if "WORLD_SIZE" not in os.environ:
            raise Refused(
                "no WORLD_SIZE: start with torchrun --nproc_per_node GPUS -m torchtitan.experiments.lighthouse.train"
            )
        world_size = int(os.environ["WORLD_SIZE"])
        complete(self.job_config)
        logger.info(console.first_line(self.job_config, world_size, device_name()))
        with as_refusal():
            check_degrees(self.job_config.parallelism, world_size)
            cuda_graph.check(self.job_config, world_size, self.recorder.why_not())
            contract.check_context(self.job_config)
            check_sparse_gradient(self.job_config)
            kernels = self.job_config.lighthouse.inner_attention
            check_machine(kernels, torch.device(device_type), "lighthouse.inner_attention")
        model = model_arguments(self.job_config)
        check_offload(self.job_config, model.n_layers)
        check_host_memory(self.job_config, model.dim, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        check_tokenizer(self.job_config)
        sampling.check(self.job_config, build_tokenizer(self.job_config))
        check_data(self.job_config)
        if os.environ.get("RANK") == "0":
            lock.hold(Path(self.job_config.job.dump_folder))
        origin, own = self.job_config.lighthouse.stage1_checkpoint, contract.to_resume(self.job_config)
        if os.environ.get("RANK", "0") == "0" and self.job_config.checkpoint.enable:
            self._reads = fingerprints.of_run(self.job_config) | fingerprints.of_stage_before(origin, own)
        # Once a stage has a checkpoint of its own, it continues that one, and the one that it came from may be gone.
        if own is not None:
            self._compare(own)
        elif origin and Path(origin).is_dir():
            # Sizes only: contents are compared where it is loaded, each process a share of them.
            before = stages.find_stage_before(Path(origin), verify="size")
            self._not_as_before = contract.check_continuation(before, self.job_config, world_size, self._reads)
        elif self._starts_from_hugging_face():
            self._not_as_before = hugging_face.check_start(self.job_config)
        if self.job_config.checkpoint.enable and not self.job_config.checkpoint.load_only:
            saving.check_writable(Path(self._checkpoint_folder()))

    def _starts_from_hugging_face(self) -> bool:
        checkpoint = self.job_config.checkpoint
        return checkpoint.enable and checkpoint.initial_load_in_hf and self.job_config.llama.is_complete

    def checkpoint_manager(self) -> Callable[..., CheckpointManager]:
        config = self.job_config
        ranks = max(1, int(os.environ["WORLD_SIZE"]) // stages.model_parallel_size(asdict(config)))
        about = saving.about(config, self._reads or {}, stages.tokens_per_step(asdict(config), ranks))
        verify, compare = config.checkpoint.verify, self._compare
        return partial(saving.SoundCheckpoints, verify=verify, about=about, compare=compare)

    def _compare(self, checkpoint: Path) -> None:
        """Whether a checkpoint in the run's own folder is of this run; on the first rank, which says it for all."""
        if self._reads is None or checkpoint == self._compared:
            return
        world_size = int(os.environ["WORLD_SIZE"])
        self._not_as_before = contract.check_resume(checkpoint, self.job_config, world_size, self._reads)
        self._compared = checkpoint

    def kind_of_step(self) -> Hashable:
        return self.job_config.lighthouse.is_dense_step(self.step)

    def around_step(self) -> AbstractContextManager[None]:
        """Dense attention in all layers, in the steps that ``lighthouse.dense_every`` names."""
        if not self.job_config.lighthouse.is_dense_step(self.step):
            return nullcontext()
        cast(LighthouseMetricsProcessor, self.metrics_processor).dense_steps += 1
        return dense_attention(self.model_parts)

    def end_step(self) -> None:
        """Write a sample if one is due. Save where minutes have passed; save and stop where some rank was asked to."""
        self._sample()
        minutes = self.job_config.checkpoint.interval_minutes
        late = bool(minutes) and time.monotonic() - self._saved_at > 60 * minutes
        stop, save = self._requests.exchange(save=late)
        if stop and self.should_continue_training():
            logger.info(f"Asked to stop: step {self.step} is the last one for now. The same command goes on from here.")
            type(self).stopped_early = True
        cast(saving.SoundCheckpoints, self.checkpointer).due = save or self.stopped_early

    def _sample(self) -> None:
        section = self.job_config.metrics
        if not section.sample_freq or self.step % section.sample_freq:
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # What is under way is the step's.
        begin, tokenizer = time.perf_counter(), cast(HuggingFaceTokenizer, self.tokenizer)
        with self.maybe_enable_amp:
            prompt = sampling.encode(self.job_config, tokenizer)
            text = sampling.write(self.model_parts[0], tokenizer, prompt, self.device)
        seconds = time.perf_counter() - begin
        processor = cast(LighthouseMetricsProcessor, self.metrics_processor)
        processor.log_sample(section.sample_prompt, text, self.step, seconds)

    def post_dataloading_process(self, *args: Any) -> Processed:
        return with_labels(super().post_dataloading_process(*args), self.parallel_dims)

    def check_before_optimizer_step(self) -> None:
        """Send this step's loss and gradient norm on their way to the host, and check those that have arrived.

        Waiting for this step's would leave the device idle until the next batch is there. So it is done only where
        upstream waits too, when a step is logged, with its update already on the way, and before anything is saved.
        """
        numbers = torch.stack([torch.stack(self.step_losses).sum(), self.gradient_norm])
        self.step_losses.clear()
        if isinstance(self.dataloader, StreamLoader):
            processor = cast(LighthouseMetricsProcessor, self.metrics_processor)
            processor.bad_records = self.dataloader.bad_records
            processor.short_documents = self.dataloader.short_documents
        numbers = numbers.to("cpu", non_blocking=True)
        arrived = None if self.device.type == "cpu" else torch.Event(self.device)
        if arrived is not None:
            arrived.record()
        previous, self._unchecked = self._unchecked, (self.step, numbers, arrived)
        self._refuse_nonfinite(previous)

    def check_before_save(self) -> None:
        self._saved_at = time.monotonic()
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

    def check_loaded(self) -> None:
        for part in cast(list[LighthouseTransformer], self.model_parts):
            part.trainer_runs_dense_steps = True
        # Ranks may come to the end of the first step as far apart as they may start.
        comm = self.job_config.comm
        patience = max(comm.init_timeout_seconds, comm.train_timeout_seconds)
        self._requests, self._saved_at = Requests(patience), time.monotonic()
        processor = cast(LighthouseMetricsProcessor, self.metrics_processor)
        processor.before_log = lambda: self._refuse_nonfinite(self._unchecked)
        if self.job_config.training.sparse_loss_gradient:
            sparse = cast(LighthouseTransformer, self.model_parts[-1]).output.sparse
            processor.gradient_share = cast(SparseGradient, sparse).share
        if isinstance(self.dataloader, StreamLoader):
            # Upstream's count is that of one rank, and there may be another number of ranks now.
            if self.dataloader.resumed:
                self.ntokens_seen = self.dataloader.tokens_seen_by_rank
            else:
                self.dataloader.tokens_seen = seam.tokens_seen_by_all(self)
        if self.step == 0 and self.job_config.lighthouse.stage1_checkpoint:
            contract.refuse_unloaded(self.job_config, self._checkpoint_folder())

    def log_start(self) -> None:
        stage, config = stage_of(self.job_config), self.job_config
        parameters = sum(p.numel() for part in self.model_parts for p in part.parameters())
        model = cast(LighthouseModelArgs, self.model_args)
        for line in console.start_lines(config, model, parameters, self.parallel_dims):
            logger.info(line)
        if self.step == 0:
            checkpoint = config.checkpoint
            folder = checkpoint.initial_load_path or (checkpoint.initial_load_in_hf and config.model.hf_assets_path)
            weights = f"the weights of {folder}" if checkpoint.enable and folder else "new weights"
            logger.info(f"{name_of(stage).capitalize()} starts from {weights}")
            for line in self._not_as_before:
                logger.info(line)
            return
        logger.info(f"Resuming after step {self.step}")
        rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        logger.info(
            f"{stage} starts after step {self.step:,}, {seam.tokens_seen_by_all(self):,} tokens seen; learning rate "
            f"{rate:.4e}"
        )
        lines = [f"Not as in the checkpoint: {name} {before} → {now}" for name, before, now in self.changed_settings]
        # The optimizer's settings may be among both.
        for line in dict.fromkeys([*lines, *self._not_as_before]):
            logger.info(line)
        if origin := config.lighthouse.stage1_checkpoint:
            logger.info(f"Stage {number_of(stage) - 1} checkpoint: {origin}")

    def log_end(self) -> None:
        if self.step < self.job_config.training.steps:
            return
        tokens = seam.tokens_seen_by_all(self)
        path = Path(self.job_config.job.dump_folder) / METRICS_FILE
        if os.environ["RANK"] == "0":
            for line in console.completion_lines(self.job_config, read_metrics(path) if path.exists() else [], tokens):
                logger.info(line)

    def _checkpoint_folder(self) -> str:
        return os.path.join(self.job_config.job.dump_folder, self.job_config.checkpoint.folder)


def device_name() -> str:
    """Of this process's accelerator; ``CPU`` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else device_type.upper()


def check_tokenizer(config: MergedConfig) -> None:
    """Whether there is a tokenizer that divides documents, and the model has a row for each of its tokens.

    Raises:
        Refused: if not. (Upstream would fail in the first step, on a GPU by an assertion there.)
    """
    folder, rows = config.model.hf_assets_path, model_arguments(config).vocab_size
    try:
        tokenizer = build_tokenizer(config)
    except FileNotFoundError as error:
        raise Refused(f"model.hf_assets_path={folder!r}: {error}") from error
    check_ends(tokenizer, folder)
    tokens = tokenizer.get_vocab_size()
    if tokens > rows:
        raise Refused(
            f"model.hf_assets_path={folder!r}: its tokenizer has {tokens:,} tokens, but the model, "
            f"{config.model.flavor!r}, has rows for {rows:,} only; nearest valid value: llama.vocab_size={tokens} (or "
            f"{rows_for(tokens)}, a multiple of {VOCAB_MULTIPLE}: llama.vocab_size='tokenizer')"
        )


if __name__ == "__main__":
    main(LighthouseTrainer)
