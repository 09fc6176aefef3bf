"""The next stage's contract: what must equal the stage before, what the command sets, what may change, what is refused.

Stages form a chain of any length. Each has its own attention, layers and context. Weights, optimizer, schedule, data
position and tokens per step are those of the stage before. The command (``resume_dense``) checks it before it launches
anything, and the trainer again before it builds anything.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import tomli_w
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig, without_none
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    CONFIG_FILE,
    complete_checkpoints_in,
    config_file_of,
    dump_folder_of,
    find_checkpoint,
    read_metadata,
    step_of,
)
from torchtitan.experiments.lighthouse.runs.records import stage_number
from torchtitan.experiments.lighthouse.runs.settings import build_model, model_arguments

Attention = Literal["dense", "lighthouse"]

#: Settings that must equal those of the stage before, by what they decide. Shapes and tokenizer files are compared by
#: content besides.
MUST_EQUAL = {
    "architecture": ("model.name", "model.flavor"),
    "dataset": ("training.dataset", "training.dataset_path"),
}

#: Settings that the next stage rests on: the command sets them, and no override may change them. Others may change.
SET_BY_COMMAND = (
    *("job.dump_folder", "training.steps", "lighthouse.enable", "lighthouse.stage", "lighthouse.stage1_checkpoint"),
    *("checkpoint.enable", "checkpoint.initial_load_path", "checkpoint.initial_load_model_only"),
)

#: What the checkpoint must hold beside the weights.
FULL_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")

#: How long other nodes wait for the one that writes the stage's settings; shared file systems show files late.
PATIENCE_SECONDS = 120


@dataclass
class StageBefore:
    """A run, and the checkpoint of it that the next stage starts from."""

    config: dict[str, Any]
    checkpoint: Path
    metadata: Metadata

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def number(self) -> int:
        """1 for a run from scratch."""
        return _number_of(self.config)

    @property
    def name(self) -> str:
        return f"Stage {self.number}"

    @property
    def next_name(self) -> str:
        return f"Stage {self.number + 1}"

    @property
    def settings_file(self) -> str:
        """The file in the next stage's folder that the command writes."""
        return f"stage{self.number + 1}.toml"

    @property
    def data_parallel_size(self) -> int:
        return sum(key.startswith("dataloader.dp_rank_") for key in self.metadata.state_dict_metadata)

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * model_parallel_size(self.config)

    @property
    def tokens_per_step(self) -> int:
        return tokens_per_step(self.config, self.data_parallel_size)


def find_stage_before(path: Path) -> StageBefore:
    """The run and checkpoint at ``path``, a dump folder (its newest complete checkpoint) or one checkpoint folder.

    Raises:
        Refused: if there is none, or it is not a complete full checkpoint of this trainer.
    """
    config_file = config_file_of(path)
    config = json.loads(config_file.read_text())
    if "lighthouse" not in config:
        raise Refused(f"{config_file} has no [lighthouse] section, so this is no run of this trainer")
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    keys = metadata.state_dict_metadata
    missing = [part for part in FULL_STATE if not any(key.startswith(f"{part}.") for key in keys)]
    before = StageBefore(config, checkpoint, metadata)
    if missing:
        raise Refused(
            f"{checkpoint} is a model-only checkpoint: it lacks {', '.join(missing)}. {before.next_name} needs the "
            f"full state; train {before.name} with checkpoint.last_save_model_only=false, or name an earlier "
            "checkpoint of the run"
        )
    return before


def default_folder(before: StageBefore, attention: Attention, seq_len: int | None) -> Path:
    """Beside the run, its name and what is new: ``RUN_dense``, or ``RUN_lighthouse_98304`` for another context."""
    context = f"_{seq_len}" if seq_len not in (None, before.config["training"]["seq_len"]) else ""
    return Path(f"{dump_folder_of(before.checkpoint)}_{attention}{context}")


def next_settings(
    before: StageBefore,
    folder: Path,
    total_steps: int | None,
    attention: Attention = "dense",
    seq_len: int | None = None,
) -> dict[str, Any]:
    """The settings of the stage before, up to ``total_steps`` (default: where the schedule ends), from its checkpoint.

    Args:
        attention: of the next stage. Layers, top_k and the rest of [lighthouse] are those of the stage before.
        seq_len: its context (default: as before). The batch sizes follow, so that a step has as many tokens.

    Raises:
        Refused: if there is nothing left to train, or the schedule ends before ``total_steps``.
    """
    config = copy.deepcopy(before.config)
    schedule = config["lr_scheduler"]["total_steps"] or config["training"]["steps"]
    total_steps = schedule if total_steps is None else total_steps
    if total_steps <= before.step:
        raise Refused(
            f"--total-steps {total_steps}: must be more than the checkpoint's {before.step} steps, and at most the "
            f"schedule's {schedule} (lr_scheduler.total_steps of {before.name})"
        )
    if schedule < total_steps:
        stages = "both stages" if before.number == 1 else "all stages"
        raise Refused(
            f"--total-steps {total_steps}: {before.name}'s learning-rate schedule ends at step {schedule}; the largest "
            f"valid value is {schedule}. Stage 1 should set lr_scheduler.total_steps to the steps of {stages}"
        )
    config["lr_scheduler"]["total_steps"] = schedule
    config["training"]["steps"] = total_steps
    if seq_len not in (None, config["training"]["seq_len"]):
        config["training"] |= _batches_at(before, seq_len)
    config["lighthouse"] |= {
        "enable": attention == "lighthouse",
        "stage": before.number + 1,
        "stage1_checkpoint": str(before.checkpoint),
    }
    config["job"] |= {"dump_folder": str(folder), "config_file": None, "save_config_file": CONFIG_FILE}
    config["checkpoint"] |= {
        "enable": True,
        "load_only": False,
        "load_step": -1,
        "initial_load_path": str(before.checkpoint),
        "initial_load_model_only": False,
        "initial_load_in_hf": False,
        # A stage that gave its data position up did so for itself.
        "exclude_from_loading": [],
    }
    return config


def _batches_at(before: StageBefore, seq_len: int) -> dict[str, int]:
    """Length and batch sizes for as many tokens per step. (Where none fit, ``check_continuation`` refuses these.)"""
    training = before.config["training"]
    sequences = max(1, before.tokens_per_step // max(1, seq_len))
    per_rank = max(1, sequences // before.data_parallel_size)
    # As many tokens at once as before: more might not fit in memory.
    at_once = max(1, training["local_batch_size"] * training["seq_len"] // max(1, seq_len))
    local = max(size for size in range(1, min(at_once, per_rank) + 1) if per_rank % size == 0)
    return {"seq_len": seq_len, "local_batch_size": local, "global_batch_size": sequences}


def tokens_per_step(config: dict[str, Any], data_parallel_size: int) -> int:
    return sequences_per_step(config, data_parallel_size) * int(config["training"]["seq_len"])


def sequences_per_step(config: dict[str, Any], data_parallel_size: int) -> int:
    """The global batch size; upstream reads a negative one as that without gradient accumulation."""
    training = config["training"]
    together = int(training["global_batch_size"])
    return together if together >= 0 else int(training["local_batch_size"]) * data_parallel_size


def as_toml(config: dict[str, Any]) -> str:
    return tomli_w.dumps(without_none(config))


def explicit_none(config: dict[str, Any]) -> list[str]:
    """TOML has no None: settings whose default is another value are passed on the command line."""
    defaults = asdict(JobConfig())
    return [
        word
        for section, values in config.items()
        for name, value in values.items()
        if value is None and defaults.get(section, {}).get(name) is not None
        for word in (f"--{section}.{name}", "None")
    ]


def merge(toml: str, changes: list[str]) -> MergedConfig:
    """The settings as the trainer will see them. The stage's folder stays as it is until they have been checked."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "settings.toml"
        file.write_text(toml)
        merged = ConfigManager().parse_args(["--job.config_file", str(file), *changes])
        return cast(
            MergedConfig, merged
        )  # The stage before has a [lighthouse] section, and names the module that adds it


def check_overrides(before: StageBefore, config: dict[str, Any], merged: MergedConfig) -> None:
    """Whether ``merged``, the command line's changes in, still holds what the command has set in ``config``.

    Raises:
        Refused: naming the first setting that does not.
    """
    after = asdict(merged)
    for setting in SET_BY_COMMAND:
        section, name = setting.split(".")
        if after[section][name] != config[section][name]:
            raise Refused(
                f"{setting} must stay {config[section][name]!r} in {before.next_name} (--dump-folder, --total-steps "
                "and --attention, before the --, choose its folder, length and attention)"
            )


def check_continuation(before: StageBefore, settings: MergedConfig, world_size: int) -> None:
    """A stage with ``settings`` on ``world_size`` processes must train the same model on the same data.

    Raises:
        Refused: naming what differs (architecture, tokenizer, dataset, data-parallel size, readers of the data, tokens
            per step), what cannot be built at this context, or that nothing at all is new.
    """
    saved, after = before.config, asdict(settings)

    def refuse_difference(what: str, *names: str) -> None:
        for setting in names:
            section, name = setting.split(".")
            if saved[section][name] != after[section][name]:
                raise Refused(
                    f"different {what}: {setting} is {saved[section][name]!r} in {before.name} and "
                    f"{after[section][name]!r} here; {before.next_name} continues with {before.name}'s"
                )

    refuse_difference("architecture", *MUST_EQUAL["architecture"])
    if _tokenizer_digest(saved["model"]["hf_assets_path"]) != _tokenizer_digest(settings.model.hf_assets_path):
        refuse_difference("tokenizer", "model.hf_assets_path")
    refuse_difference("dataset", *MUST_EQUAL["dataset"])
    _refuse_the_same_again(before, after)
    if "dataloader" not in settings.checkpoint.exclude_from_loading:
        _check_readers(before, after, world_size)
    if after["training"]["seq_len"] != saved["training"]["seq_len"]:
        _check_tokens_per_step(before, settings, world_size // model_parallel_size(after))
    try:
        check_context(settings)
    except ValueError as error:
        raise Refused(f"{before.next_name} cannot be built: {error}") from error
    _check_shapes(before, settings)


def _refuse_the_same_again(before: StageBefore, after: dict[str, Any]) -> None:
    """A stage whose attention, layers and context are those of the stage before is not a next one."""
    saved, now = before.config["lighthouse"], after["lighthouse"]
    # Another version may have saved fewer settings. In a dense stage they decide nothing.
    names = (saved.keys() & now.keys() if now["enable"] else {"enable"}) - {"stage", "stage1_checkpoint"}
    seq_len = after["training"]["seq_len"]
    if seq_len == before.config["training"]["seq_len"] and all(saved[name] == now[name] for name in names):
        raise Refused(
            f"{before.next_name} would be {before.name} again, {attention_of(after)} at {seq_len:,} tokens: choose "
            "another --attention or --seq-len, or, for Lighthouse, other layers or another top_k after the --. To go "
            f"on with {before.name} as it is, run its own command again"
        )


def _check_readers(before: StageBefore, after: dict[str, Any], world_size: int) -> None:
    """The data position is that of every reader: a worker process of a data-parallel rank."""
    give_up = "or give up the data position with -- --checkpoint.exclude_from_loading dataloader"
    model_parallel = model_parallel_size(after)
    size, saved = world_size // model_parallel, before.data_parallel_size
    if size != saved:
        raise Refused(
            f"different data-parallel size: the checkpoint's data position is that of {saved} data-parallel rank(s), "
            f"and {world_size} process(es) with {model_parallel} per model replica make {size}. Start "
            f"{saved * model_parallel} process(es), {give_up}"
        )
    workers, here = (config["training"]["dataloader"]["num_workers"] for config in (before.config, after))
    if workers != here:
        raise Refused(
            f"different data workers: training.dataloader.num_workers is {workers} in {before.name} and {here} here, "
            f"and the data position is that of {workers}. Leave it at {workers}, {give_up}"
        )


def _check_tokens_per_step(before: StageBefore, settings: MergedConfig, data_parallel_size: int) -> None:
    """At another context a step has as many tokens as before: the schedule counts steps, and so do comparisons."""
    training, wanted = settings.training, before.tokens_per_step
    seq_len, sequences = training.seq_len, sequences_per_step(asdict(settings), data_parallel_size)
    rule = f"{before.name} has {wanted:,} tokens per step, and {before.next_name} must have as many"
    lengths = [n for n in _divisors(wanted) if wanted // n % data_parallel_size == 0]
    if seq_len not in lengths:
        valid = [n for n in lengths if _can_train_at(settings, n)] or lengths
        nearest = f"--seq-len {min(valid, key=lambda n: abs(n - seq_len))}" if valid else "none"
        raise Refused(
            f"training.seq_len={seq_len}: {rule}, in whole sequences on each of {data_parallel_size} data-parallel "
            f"rank(s); nearest valid value: {nearest}"
        )
    if sequences * seq_len != wanted:
        raise Refused(
            f"training.seq_len={seq_len} with {sequences} sequence(s) per step: {rule}; nearest valid value: "
            f"training.global_batch_size {wanted // seq_len}, which --seq-len {seq_len} sets"
        )
    if sequences % (training.local_batch_size * data_parallel_size):
        batches = _divisors(sequences // data_parallel_size)
        raise Refused(
            f"training.local_batch_size={training.local_batch_size}: must divide the {batches[-1]} sequence(s) of a "
            f"rank and step; nearest valid value: {min(batches, key=lambda n: abs(n - training.local_batch_size))}"
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _can_train_at(settings: MergedConfig, seq_len: int) -> bool:
    at = copy.deepcopy(settings)
    at.training.seq_len = seq_len
    try:
        check_context(at)
    except ValueError:
        return False
    return True


def check_context(settings: MergedConfig) -> None:
    """Whether the model can train at this context, with these layers, on so many processes per sequence.

    Raises:
        ValueError: naming the value, the rule and the nearest valid value.
    """
    parallelism, seq_len = settings.parallelism, settings.training.seq_len
    # Upstream asserts the same, once all processes are up.
    step = 2 * parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
    if seq_len < 1 or seq_len % step:
        nearest = max(1, round(seq_len / step)) * step
        raise ValueError(
            f"training.seq_len={seq_len}: must be a multiple of {step} (2 x tensor_parallel_degree x "
            f"context_parallel_degree); nearest valid value: {nearest}"
        )
    model_arguments(settings)


def attention_of(config: dict[str, Any]) -> str:
    """In words."""
    return "through Lighthouse" if config["lighthouse"]["enable"] else "dense"


def model_parallel_size(config: dict[str, Any]) -> int:
    """Processes that hold one replica of the model."""
    return math.prod(config["parallelism"][f"{kind}_parallel_degree"] for kind in ("tensor", "pipeline", "context"))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Setting, its value before, its value in the next stage, for all that differ outside [job]."""
    return [
        (f"{section}.{name}", before.get(section, {}).get(name), value)
        for section, values in after.items()
        for name, value in values.items()
        if section != "job" and before.get(section, {}).get(name) != value
    ]


# The stage's folder


def newest_step_in(folder: Path, before: StageBefore, settings: MergedConfig) -> int | None:
    """The step of the stage's newest complete checkpoint in ``folder``, or None where the stage is yet to start.

    Raises:
        Refused: if the folder is that of the stage before, or holds another run, or this stage with another attention
            or context.
    """
    this = before.next_name
    if folder.resolve() == dump_folder_of(before.checkpoint):
        raise Refused(
            f"--dump-folder {folder} is {before.name}'s own: {this} needs another, so that {before.name} stays whole"
        )
    others = [path for path in folder.glob("*") if path.name != before.settings_file]
    if not others:
        return None
    config_file = folder / CONFIG_FILE
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    origin = config.get("lighthouse", {}).get("stage1_checkpoint", "")
    if not origin or Path(origin).resolve() != before.checkpoint:
        what = f"Stage {_number_of(config)} of {origin}" if origin else f"a run or files that are not of this {this}"
        raise Refused(f"{folder} already holds {what}; choose another --dump-folder for {this} of {before.checkpoint}")
    there, wanted = ((attention_of(c), c["training"]["seq_len"]) for c in (config, asdict(settings)))
    if there != wanted:
        raise Refused(
            f"{folder} already holds {this} {there[0]} at {there[1]:,} tokens, and this one is {wanted[0]} at "
            f"{wanted[1]:,}; choose another --dump-folder"
        )
    complete = complete_checkpoints_in(folder / config["checkpoint"]["folder"])
    return step_of(complete[-1]) if complete else None


def prepare(file: Path, toml: str, checkpoint_folder: Path | None) -> None:
    """Write the stage's settings to ``file``, whole or not at all.

    Args:
        checkpoint_folder: where the stage has no complete checkpoint yet: whatever is in its way there is set aside.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint_folder is not None:
        _set_unfinished_aside(checkpoint_folder)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(toml)
    unfinished.replace(file)


def wait_until_prepared(file: Path, toml: str) -> None:
    """Where another node prepares: wait until the stage's settings can be read here, in ``file``.

    Raises:
        Refused: after ``PATIENCE_SECONDS``.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (file.is_file() and file.read_text() == toml):
        if time.monotonic() > deadline:
            raise Refused(
                f"{file} does not hold this stage's settings after {PATIENCE_SECONDS} s: the first node writes it; all "
                "nodes must see the folder at the same path and be given the same arguments"
            )
        time.sleep(0.2)


def refuse_unloaded(settings: MergedConfig, checkpoint_folder: str) -> None:
    """A next stage that starts at step 0 has loaded nothing: upstream goes on from random weights in silence.

    Raises:
        RuntimeError: always.
    """
    stage = f"Stage {_number_of(asdict(settings))}"
    raise RuntimeError(
        f"{stage} loaded no checkpoint: {checkpoint_folder} exists but holds no complete one, so "
        f"{settings.lighthouse.stage1_checkpoint} was not read and training would start from random "
        f"weights. Start {stage} with scripts/resume_dense.py, which sets the unfinished folder aside."
    )


def _number_of(config: dict[str, Any]) -> int:
    section = config["lighthouse"]
    return stage_number(section.get("stage", 0), section.get("stage1_checkpoint", ""))


def _set_unfinished_aside(folder: Path) -> None:
    """Upstream would take a checkpoint folder without a complete checkpoint for a reason to start from scratch."""
    if folder.exists() and not complete_checkpoints_in(folder):
        aside = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}.unfinished-{n}")).exists())
        print(f"{folder} holds no complete checkpoint: moved to {aside}")
        folder.rename(aside)


def _check_shapes(before: StageBefore, settings: MergedConfig) -> None:
    """The model of these settings against the tensors in the checkpoint: code and flavors may have changed since."""
    model = {name: tensor.shape for name, tensor in build_model(settings).state_dict().items()}
    saved = {
        name: entry.size
        for name, entry in before.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    for name in sorted(model.keys() | saved.keys()):
        if model.get(name) != saved.get(name):
            raise Refused(
                f"different architecture: {name} is {_shape(saved.get(name))} in {before.checkpoint} and "
                f"{_shape(model.get(name))} in {settings.model.name} {settings.model.flavor}"
            )


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(tuple(size))


def _tokenizer_digest(folder: str) -> str:
    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not files[0].is_file():
        raise Refused(f"tokenizer: {files[0]} does not exist (relative paths start at {Path.cwd()})")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
