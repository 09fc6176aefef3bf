"""The next stage as the command ``resume_dense`` prepares it: its settings, and a folder of its own."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import tomli_w
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.experiments.lighthouse.errors import Refused, as_refusal
from torchtitan.experiments.lighthouse.job_config import MergedConfig, without_none
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    CONFIG_FILE,
    complete_checkpoints_in,
    dump_folder_of,
    saved_with,
    step_of,
)
from torchtitan.experiments.lighthouse.runs.fingerprints import STAGE_BEFORE, of_checkpoint
from torchtitan.experiments.lighthouse.runs.lock import LOCK_FILE
from torchtitan.experiments.lighthouse.runs.stages import StageBefore, attention_of, stage_number_of
from torchtitan.experiments.lighthouse.settings_rules import check_settings

Attention = Literal["dense", "lighthouse"]

#: Settings that the next stage rests on: the command sets them, and no override may change them. Others may change.
SET_BY_COMMAND = (
    *("job.dump_folder", "training.steps", "lighthouse.enable", "lighthouse.stage", "lighthouse.stage1_checkpoint"),
    *("checkpoint.enable", "checkpoint.initial_load_path", "checkpoint.initial_load_model_only"),
)

#: How long other nodes wait for the one that writes the stage's settings; shared file systems show files late.
PATIENCE_SECONDS = 120


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
    ranks: int | None = None,
) -> dict[str, Any]:
    """The settings of the stage before, up to ``total_steps`` (default: where the schedule ends), from its checkpoint.

    Args:
        attention: of the next stage. Layers, top_k and the rest of [lighthouse] are those of the stage before.
        seq_len: its context (default: as before). The batch sizes follow, so that a step has as many tokens.
        ranks: its data-parallel ranks (default: as before). The batch sizes follow too.

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
    if seq_len in (None, config["training"]["seq_len"]):
        if before.position and ranks not in (None, before.data_parallel_size):
            config["training"] |= _batches_at(before, config["training"]["seq_len"], ranks)
    else:
        config["training"] |= _batches_at(before, seq_len, ranks)
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
        # A stage that gave its data position up, or took other data, did so for itself.
        "exclude_from_loading": [],
        "allow_changed": [],
    }
    return config


def _batches_at(before: StageBefore, seq_len: int, ranks: int | None = None) -> dict[str, int]:
    """Length and batch sizes for as many tokens per step. (Where none fit, ``check_continuation`` refuses these.)"""
    training = before.config["training"]
    sequences = max(1, before.tokens_per_step // max(1, seq_len))
    per_rank = max(1, sequences // (ranks or before.data_parallel_size))
    # As many tokens at once as before: more might not fit in memory.
    at_once = max(1, training["local_batch_size"] * training["seq_len"] // max(1, seq_len))
    local = max(size for size in range(1, min(at_once, per_rank) + 1) if per_rank % size == 0)
    return {"seq_len": seq_len, "local_batch_size": local, "global_batch_size": sequences}


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
        with as_refusal():
            merged = ConfigManager().parse_args(["--job.config_file", str(file), *changes])
        check_settings(merged)
        return cast(MergedConfig, merged)  # the stage before has a [lighthouse] section, and names its module


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
    others = [path for path in folder.glob("*") if path.name not in (before.settings_file, LOCK_FILE)]
    if not others:
        return None
    config_file = folder / CONFIG_FILE
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    origin = config.get("lighthouse", {}).get("stage1_checkpoint", "")
    complete = complete_checkpoints_in(folder / config["checkpoint"]["folder"]) if origin else []
    if not origin or not _is_from(origin, complete[-1] if complete else None, before.checkpoint):
        what = (
            f"Stage {stage_number_of(config)} of {origin}" if origin else f"a run or files that are not of this {this}"
        )
        raise Refused(f"{folder} already holds {what}; choose another --dump-folder for {this} of {before.checkpoint}")
    there, wanted = ((attention_of(c), c["training"]["seq_len"]) for c in (config, asdict(settings)))
    if there != wanted:
        raise Refused(
            f"{folder} already holds {this} {there[0]} at {there[1]:,} tokens, and this one is {wanted[0]} at "
            f"{wanted[1]:,}; choose another --dump-folder"
        )
    return step_of(complete[-1]) if complete else None


def _is_from(origin: str, newest: Path | None, before: Path) -> bool:
    """Whether a stage started from the checkpoint ``before``, also where both have been moved since.

    Args:
        origin: where that was then.
        newest: the stage's own newest checkpoint. It may say what that was.
    """
    if Path(origin).resolve() == before:
        return True
    saved = (saved_with(newest) if newest is not None else None) or {}
    if known := saved.get("fingerprints", {}).get(STAGE_BEFORE):
        return bool(known == of_checkpoint(before))
    # Nothing says more than the names of the run and of the step.
    return not Path(origin).exists() and Path(origin).parts[-3:] == before.parts[-3:]


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


def _set_unfinished_aside(folder: Path) -> None:
    """Upstream would take a checkpoint folder without a complete checkpoint for a reason to start from scratch."""
    if folder.exists() and not complete_checkpoints_in(folder):
        aside = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}.unfinished-{n}")).exists())
        print(f"{folder} holds no complete checkpoint: moved to {aside}")
        folder.rename(aside)
