"""Stage 2's contract: what must equal Stage 1, what Stage 2 sets, what may change, and what is refused.

The command (``resume_dense``) checks it before it launches anything, and the trainer again before it builds anything.
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
from typing import Any, cast

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
from torchtitan.experiments.lighthouse.runs.settings import build_model

SETTINGS_FILE = "stage2.toml"

#: Settings that must equal Stage 1's, by what they decide. Shapes and tokenizer files are compared by content besides.
MUST_EQUAL = {
    "architecture": ("model.name", "model.flavor"),
    "dataset": ("training.dataset", "training.dataset_path"),
}

#: Settings that Stage 2 rests on: the command sets them, and no override may change them. All others may change.
SET_BY_COMMAND = (
    *("job.dump_folder", "training.steps", "lighthouse.enable", "lighthouse.stage1_checkpoint"),
    *("checkpoint.enable", "checkpoint.initial_load_path", "checkpoint.initial_load_model_only"),
)

#: What the checkpoint must hold beside the weights.
FULL_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")

#: How long other nodes wait for the one that writes Stage 2's settings; shared file systems show files late.
PATIENCE_SECONDS = 120


@dataclass
class Stage1:
    """A Stage 1 run and the checkpoint that Stage 2 starts from."""

    config: dict[str, Any]
    checkpoint: Path
    metadata: Metadata

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def data_parallel_size(self) -> int:
        return sum(key.startswith("dataloader.dp_rank_") for key in self.metadata.state_dict_metadata)

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * model_parallel_size(self.config)


def find_stage1(path: Path) -> Stage1:
    """The run and checkpoint at ``path``, a dump folder (its newest complete checkpoint) or one checkpoint folder.

    Raises:
        Refused: if there is none, or it is not a complete full checkpoint of a run with Lighthouse.
    """
    config_file = config_file_of(path)
    config = json.loads(config_file.read_text())
    if not config.get("lighthouse", {}).get("enable"):
        raise Refused(f"{config_file}: lighthouse.enable is not true, so this is no Stage 1 run")
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    keys = metadata.state_dict_metadata
    missing = [part for part in FULL_STATE if not any(key.startswith(f"{part}.") for key in keys)]
    if missing:
        raise Refused(
            f"{checkpoint} is a model-only checkpoint: it lacks {', '.join(missing)}. Stage 2 needs the full state; "
            "train Stage 1 with checkpoint.last_save_model_only=false, or name an earlier checkpoint of the run"
        )
    return Stage1(config, checkpoint, metadata)


def stage2_settings(stage1: Stage1, folder: Path, total_steps: int | None) -> dict[str, Any]:
    """Stage 1's settings, dense, up to ``total_steps`` (default: where the schedule ends), from the checkpoint on.

    Raises:
        Refused: if there is nothing left to train, or the schedule ends before ``total_steps``.
    """
    config = copy.deepcopy(stage1.config)
    schedule = config["lr_scheduler"]["total_steps"] or config["training"]["steps"]
    total_steps = schedule if total_steps is None else total_steps
    if total_steps <= stage1.step:
        raise Refused(
            f"--total-steps {total_steps}: must be more than the checkpoint's {stage1.step} steps, and at most the "
            f"schedule's {schedule} (lr_scheduler.total_steps of Stage 1)"
        )
    if schedule < total_steps:
        raise Refused(
            f"--total-steps {total_steps}: Stage 1's learning-rate schedule ends at step {schedule}; the largest "
            f"valid value is {schedule}. Stage 1 should set lr_scheduler.total_steps to the steps of both stages"
        )
    config["lr_scheduler"]["total_steps"] = schedule
    config["training"]["steps"] = total_steps
    config["lighthouse"] |= {"enable": False, "stage1_checkpoint": str(stage1.checkpoint)}
    config["job"] |= {"dump_folder": str(folder), "config_file": None, "save_config_file": CONFIG_FILE}
    config["checkpoint"] |= {
        "enable": True,
        "load_only": False,
        "load_step": -1,
        "initial_load_path": str(stage1.checkpoint),
        "initial_load_model_only": False,
        "initial_load_in_hf": False,
    }
    return config


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
    """The settings as the trainer will see them. Stage 2's folder stays as it is until they have been checked."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / SETTINGS_FILE
        file.write_text(toml)
        merged = ConfigManager().parse_args(["--job.config_file", str(file), *changes])
        return cast(MergedConfig, merged)  # Stage 1 has a [lighthouse] section, and names the module that adds it


def check_overrides(config: dict[str, Any], merged: MergedConfig) -> None:
    """Whether ``merged``, the command line's changes in, still holds what the command has set in ``config``.

    Raises:
        Refused: naming the first setting that does not.
    """
    after = asdict(merged)
    for setting in SET_BY_COMMAND:
        section, name = setting.split(".")
        if after[section][name] != config[section][name]:
            raise Refused(
                f"{setting} must stay {config[section][name]!r} in Stage 2 (--dump-folder and --total-steps, "
                "before the --, choose its folder and length)"
            )


def check_continuation(stage1: Stage1, settings: MergedConfig, world_size: int) -> None:
    """Stage 2 with ``settings`` on ``world_size`` processes must train the same model on the same data.

    Raises:
        Refused: naming what differs: architecture, tokenizer, dataset or data-parallel size.
    """
    before, after = stage1.config, asdict(settings)

    def refuse_difference(what: str, *names: str) -> None:
        for setting in names:
            section, name = setting.split(".")
            if before[section][name] != after[section][name]:
                raise Refused(
                    f"different {what}: {setting} is {before[section][name]!r} in Stage 1 and "
                    f"{after[section][name]!r} here; Stage 2 continues with Stage 1's"
                )

    refuse_difference("architecture", *MUST_EQUAL["architecture"])
    _check_shapes(stage1, settings)
    if _tokenizer_digest(before["model"]["hf_assets_path"]) != _tokenizer_digest(settings.model.hf_assets_path):
        refuse_difference("tokenizer", "model.hf_assets_path")
    refuse_difference("dataset", *MUST_EQUAL["dataset"])

    model_parallel = model_parallel_size(after)
    size, saved = world_size // model_parallel, stage1.data_parallel_size
    if size != saved and "dataloader" not in settings.checkpoint.exclude_from_loading:
        raise Refused(
            f"different data-parallel size: the checkpoint's data position is that of {saved} data-parallel rank(s), "
            f"and {world_size} process(es) with {model_parallel} per model replica make {size}. Start "
            f"{saved * model_parallel} process(es), or give up the data position with "
            "-- --checkpoint.exclude_from_loading dataloader"
        )


def model_parallel_size(config: dict[str, Any]) -> int:
    """Processes that hold one replica of the model."""
    return math.prod(config["parallelism"][f"{kind}_parallel_degree"] for kind in ("tensor", "pipeline", "context"))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Setting, its value in Stage 1, its value in Stage 2, for all that differ outside [job]."""
    return [
        (f"{section}.{name}", before.get(section, {}).get(name), value)
        for section, values in after.items()
        for name, value in values.items()
        if section != "job" and before.get(section, {}).get(name) != value
    ]


# Stage 2's folder


def newest_step_in(folder: Path, stage1: Stage1) -> int | None:
    """The step of the newest complete Stage 2 checkpoint in ``folder``, or None where Stage 2 is yet to start.

    Raises:
        Refused: if the folder is Stage 1's, or holds another run.
    """
    if folder.resolve() == dump_folder_of(stage1.checkpoint):
        raise Refused(f"--dump-folder {folder} is Stage 1's own: Stage 2 needs another, so that Stage 1 stays whole")
    others = [path for path in folder.glob("*") if path.name != SETTINGS_FILE]
    if not others:
        return None
    config_file = folder / CONFIG_FILE
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    origin = config.get("lighthouse", {}).get("stage1_checkpoint", "")
    if not origin or Path(origin).resolve() != stage1.checkpoint:
        what = f"Stage 2 of {origin}" if origin else "a run or files that are not of this Stage 2"
        raise Refused(f"{folder} already holds {what}; choose another --dump-folder for Stage 2 of {stage1.checkpoint}")
    complete = complete_checkpoints_in(folder / config["checkpoint"]["folder"])
    return step_of(complete[-1]) if complete else None


def prepare(folder: Path, toml: str, checkpoint_folder: Path | None) -> None:
    """Write Stage 2's settings, whole or not at all.

    Args:
        checkpoint_folder: where Stage 2 has no complete checkpoint yet: whatever is in its way there is set aside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint_folder is not None:
        _set_unfinished_aside(checkpoint_folder)
    unfinished = folder / f".{SETTINGS_FILE}.{os.getpid()}"
    unfinished.write_text(toml)
    unfinished.replace(folder / SETTINGS_FILE)


def wait_until_prepared(folder: Path, toml: str) -> None:
    """Where another node prepares: wait until its settings can be read here.

    Raises:
        Refused: after ``PATIENCE_SECONDS``.
    """
    file, deadline = folder / SETTINGS_FILE, time.monotonic() + PATIENCE_SECONDS
    while not (file.is_file() and file.read_text() == toml):
        if time.monotonic() > deadline:
            raise Refused(
                f"{file} does not hold Stage 2's settings after {PATIENCE_SECONDS} s: the first node writes it; all "
                "nodes must see the folder at the same path and be given the same arguments"
            )
        time.sleep(0.2)


def refuse_unloaded(settings: MergedConfig, checkpoint_folder: str) -> None:
    """Stage 2 that starts at step 0 has loaded nothing: upstream goes on from random weights in silence.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"Stage 2 loaded no checkpoint: {checkpoint_folder} exists but holds no complete one, so "
        f"{settings.lighthouse.stage1_checkpoint} was not read and training would start from random "
        "weights. Start Stage 2 with scripts/resume_dense.py, which sets the unfinished folder aside."
    )


def _set_unfinished_aside(folder: Path) -> None:
    """Upstream would take a checkpoint folder without a complete checkpoint for a reason to start from scratch."""
    if folder.exists() and not complete_checkpoints_in(folder):
        aside = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}.unfinished-{n}")).exists())
        print(f"{folder} holds no complete checkpoint: moved to {aside}")
        folder.rename(aside)


def _check_shapes(stage1: Stage1, settings: MergedConfig) -> None:
    """The model of these settings against the tensors in the checkpoint: code and flavors may have changed since."""
    model = {name: tensor.shape for name, tensor in build_model(settings).state_dict().items()}
    saved = {
        name: entry.size
        for name, entry in stage1.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    for name in sorted(model.keys() | saved.keys()):
        if model.get(name) != saved.get(name):
            raise Refused(
                f"different architecture: {name} is {_shape(saved.get(name))} in {stage1.checkpoint} and "
                f"{_shape(model.get(name))} in {settings.model.name} {settings.model.flavor}"
            )


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(tuple(size))


def _tokenizer_digest(folder: str) -> str:
    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not files[0].is_file():
        raise Refused(f"tokenizer: {files[0]} does not exist (relative paths start at {Path.cwd()})")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
