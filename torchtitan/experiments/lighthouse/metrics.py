"""``metrics.jsonl`` in the dump folder, one line per logged step, and how far a run has come, on the console.

Both beside upstream's figures on the console, in TensorBoard and in W&B.
"""

import json
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.runs.checkpoints import first_stage_of, where_now
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, name_of, number_of, read_metrics, stage_of
from torchtitan.experiments.lighthouse.seams.metrics import logs_here, print_colours_to_terminals_only, step_line
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger

WANDB_ID_FILE = "wandb_id"

#: The time left is what the steps since so many logged ones ago have taken, validation and checkpoints included.
RECENT_LINES = 10

#: Upstream's metric names, and ours in the file.
_TRAIN_FIELDS = {
    "loss_metrics/global_avg_loss": "loss",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "n_tokens_seen": "tokens_seen",
    "throughput(tps)": "tokens_per_second",
    "mfu(%)": "mfu_percent",
    "memory/max_active(GiB)": "memory_active_gib",
    "memory/max_reserved(GiB)": "memory_gib",
    "dense": "dense",
    "dense_steps": "dense_steps",
    "bad_records": "bad_records",
    "short_documents": "short_documents",
    "gradient_share": "gradient_share",
}
_VALIDATION_FIELDS = {
    "validation_metrics/loss": "validation_loss",
    "validation_metrics/bits_per_byte": "bits_per_byte",
    "validation_metrics/throughput(tps)": "tokens_per_second",
    "validation_metrics/memory/max_reserved(GiB)": "memory_gib",
}


class JsonlLogger(BaseLogger):
    """Appends to ``metrics.jsonl``; a resumed run goes on in the same file.

    A line holds step, stage, loss, lr, grad_norm, tokens_seen (all ranks), tokens_per_second (per device),
    mfu_percent, memory_gib (peak reserved since the last line), memory_active_gib, time (Unix seconds) and
    wall_clock_s (seconds this run has been up, over all its starts). Validation writes lines of its own, with
    validation_loss (nats per token) and bits_per_byte. Samples of text do too, with prompt and sample. After a crash
    the steps since the last checkpoint are logged again: ``read_metrics`` keeps the later line.

    Where ``lighthouse.dense_every`` is set, a line also says whether this step, whose loss it holds, was ``dense``, and
    how many ``dense_steps`` there were since the last line: tokens_per_second is that of all steps since then, and
    mfu_percent counts the mean operations of a step. Where ``training.max_bad_records`` is set, it says how many
    ``bad_records`` were skipped in this pass over the files, and where ``training.min_document_chars`` is set, how many
    ``short_documents`` were dropped. Where ``training.sparse_loss_gradient`` is set, ``gradient_share`` is how
    much of the loss's gradient in the logits was computed since the last line, on the rank that logs.
    """

    def __init__(self, path: Path, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_metrics(path) if path.exists() else []
        self._stage = stage
        self._started = time.time() - max((record["wall_clock_s"] for record in earlier), default=0.0)
        self._file = path.open("a+", encoding="utf-8")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the last start was killed while it wrote

    def log(self, metrics: dict[str, Any], step: int) -> None:
        fields = _VALIDATION_FIELDS if "validation_metrics/loss" in metrics else _TRAIN_FIELDS
        self.write({name: metrics[key] for key, name in fields.items() if key in metrics}, step)

    def write(self, fields: dict[str, Any], step: int) -> None:
        now = time.time()
        record = {"step": step, "stage": self._stage} | fields
        record |= {"time": round(now, 3), "wall_clock_s": round(now - self._started, 3)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def wandb_environment(job_config: MergedConfig) -> dict[str, str]:
    """What upstream's W&B logger reads from the environment: a run that goes on under its own id, beside its stages.

    The id is kept in the dump folder, so that the same command continues the same run. All stages of an experiment
    share the group that Stage 1's id names.
    """
    folder = Path(job_config.job.dump_folder)
    origin = job_config.lighthouse.stage1_checkpoint
    stage1 = first_stage_of(where_now(Path(origin), folder)) if origin else folder
    if not stage1.is_dir():
        stage1 = folder  # Nothing is to be made where a run was once.
    return {
        "WANDB_PROJECT": "lighthouse",
        "WANDB_RUN_ID": _kept_id(folder),
        "WANDB_RESUME": "allow",
        "WANDB_RUN_GROUP": f"{stage1.resolve().name}-{_kept_id(stage1)}",
        "WANDB_RUN_NAME": f"{folder.resolve().name}, {stage_of(job_config)}",
        "WANDB_RUN_JOB_TYPE": stage_of(job_config),
    }


def _kept_id(folder: Path) -> str:
    """The id in ``folder``, made up where there is none yet."""
    path = folder / WANDB_ID_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


class Progress:
    """How far a run has come, in words."""

    def __init__(self, stage: str, last_step: int) -> None:
        self._stage = name_of(stage)
        self._last_step = last_step
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_LINES + 1)

    def after(self, step: int, now: float) -> str:
        """The beginning of the line of ``step``, logged at ``now`` seconds of any clock that does not jump."""
        self._recent.append((step, now))
        return f"{self.at(step)}, {self._left(step)}"

    def at(self, step: int) -> str:
        last = f"{self._last_step:,}"
        return f"{self._stage}, step {step:>{len(last)},} of {last}"

    def _left(self, step: int) -> str:
        (earlier, then), (_, now) = self._recent[0], self._recent[-1]
        if step >= self._last_step:
            return "finished"
        if step == earlier:
            return "time left not known yet"  # a first step says nothing about the others
        return f"{in_words((self._last_step - step) * (now - then) / (step - earlier))} left"


def in_words(seconds: float) -> str:
    """A duration in one or two units: ``45 s``, ``3 min``, ``2 h 05 min``, ``3 d 4 h``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"


class LighthouseMetricsProcessor(MetricsProcessor):
    #: Of the text of the validation that goes on; the validator sets it, and all ranks ask together.
    bytes_per_token: Callable[[], float] | None = None
    #: Before a step is logged; the trainer sets it. Upstream has just read the step's loss, so the device has it all.
    before_log: Callable[[], None] = staticmethod(lambda: None)
    #: How much of the loss's gradient was computed since the last call; the trainer sets it where some may be left out.
    gradient_share: Callable[[], float] | None = None
    _logs = True

    def __init__(self, job_config: MergedConfig, parallel_dims: ParallelDims, tag: str | None = None) -> None:
        logs = self._logs = logs_here(parallel_dims, job_config)
        if logs and job_config.metrics.enable_wandb:
            for name, value in wandb_environment(job_config).items():
                os.environ.setdefault(name, value)
        super().__init__(job_config, parallel_dims, tag)
        print_colours_to_terminals_only(self)
        self._progress = Progress(stage_of(job_config), job_config.training.steps)
        #: Since the last line; the trainer counts.
        self.dense_steps = 0
        #: Skipped in this pass over the files; the trainer asks the data loader.
        self.bad_records = self.short_documents = 0
        if logs:
            loggers = LoggerContainer()
            loggers.add_logger(self.logger)
            path = Path(job_config.job.dump_folder) / METRICS_FILE
            self._jsonl = JsonlLogger(path, stage_of(job_config))
            loggers.add_logger(self._jsonl)
            self.logger = loggers

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Upstream's, with tokens counted once (it adds up every rank of a sequence that is split) and the progress."""
        self.before_log()
        extra_metrics = (extra_metrics or {}) | self._stage
        if "n_tokens_seen" in extra_metrics:
            extra_metrics["n_tokens_seen"] //= self.parallel_dims.cp
        section = cast(MergedConfig, self.job_config).lighthouse
        if section.enable and section.dense_every:
            extra_metrics |= {"dense": section.is_dense_step(step), "dense_steps": self.dense_steps}
        training = cast(MergedConfig, self.job_config).training
        if training.max_bad_records:
            extra_metrics["bad_records"] = self.bad_records
        if training.min_document_chars:
            extra_metrics["short_documents"] = self.short_documents
        if self.gradient_share is not None:
            extra_metrics["gradient_share"] = self.gradient_share()
        with step_line(self._progress.after(step, time.monotonic()), self._logs):
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        self.dense_steps = 0

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Upstream's, with the stage, and the loss in bits per byte beside nats per token."""
        extra_metrics = (extra_metrics or {}) | self._stage
        beginning = f"{self._progress.at(step)}, validation"
        if self.bytes_per_token is not None:
            bits = loss / math.log(2) / self.bytes_per_token()
            extra_metrics["validation_metrics/bits_per_byte"] = bits
            beginning += f", {bits:.4f} bits per byte"
        with step_line(beginning, self._logs):
            super().log_validation(loss, step, extra_metrics)
        self.dense_steps = 0  # the next line's rate begins here

    def log_sample(self, prompt: str, text: str, step: int, seconds: float) -> None:
        """On the rank that logs; the rate of the steps leaves out the ``seconds`` that the sample took."""
        self.time_last_log += seconds
        if self._logs:
            logger.info(f"{self._progress.at(step)}, sample: {prompt + text!r}", extra={"here": True})
            self._jsonl.write({"prompt": prompt, "sample": text}, step)

    @property
    def _stage(self) -> dict[str, int]:
        """For TensorBoard, which takes numbers alone, and for W&B."""
        return {"stage": number_of(stage_of(cast(MergedConfig, self.job_config)))}


def build_metrics_processor(
    job_config: MergedConfig,
    parallel_dims: ParallelDims,
    model_args: BaseModelArgs | None = None,
    tag: str | None = None,
) -> MetricsProcessor:
    return LighthouseMetricsProcessor(job_config, parallel_dims, tag)
