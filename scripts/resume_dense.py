#!/usr/bin/env python
"""Stage 2: resume a Stage 1 checkpoint with dense attention in every layer.

    python scripts/resume_dense.py outputs/530m_stage1

takes the newest checkpoint of that run (or the one you name, outputs/530m_stage1/checkpoint/step-10000) and goes on
with the same weights, optimizer state, data position and learning-rate schedule, to the end of the schedule or to
--total-steps, in a dump folder of its own, so that Stage 1's files are never touched. Run the same command again after
an interruption and Stage 2 continues. Everything is checked before anything is launched. Settings after "--" change
Stage 2 only:

    python scripts/resume_dense.py RUN -- --activation_checkpoint.mode full
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torchtitan.experiments.lighthouse  # noqa: F401  registers the model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.experiments.lighthouse.checkpoints import (
    checkpoints_in,
    complete_checkpoints_in,
    dump_folder_of,
    is_checkpoint,
    is_complete,
    step_of,
)
from torchtitan.experiments.lighthouse.job_config import split_overrides, without_none
from torchtitan.protocols.train_spec import get_train_spec

CONFIG_FILE = "stage2.toml"


class Refused(Exception):
    """Stage 2 would not be a continuation of Stage 1."""


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


def main(arguments: list[str] | None = None) -> None:
    options, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        stage1 = find_stage1(options.stage1)
        folder = options.dump_folder or Path(f"{dump_folder_of(stage1.checkpoint)}_dense")
        newest = check_stage2_folder(folder, stage1)
        config = stage2_config(stage1, folder, options.total_steps)
        launcher, world_size = torchrun(options.torchrun, stage1)
        toml = tomli_w.dumps(without_none(config))
        changes = [*_explicit_none(config), *overrides]
        merged = merge(toml, changes)
        check_continuation(stage1, config, merged, world_size)
    except Refused as refusal:
        raise SystemExit(f"resume_dense: {refusal}") from refusal

    if newest is not None and newest >= merged.training.steps:
        print(f"Stage 2 in {folder} is complete: {newest:,} of {merged.training.steps:,} steps.")
        return
    start = f"step {newest:,} of Stage 2" if newest is not None else f"{stage1.checkpoint} (step {stage1.step:,})"
    print(f"Stage 2 from {start} to step {merged.training.steps:,}, dense, in {folder}, {world_size} process(es)")
    for name, before, after in _differences(stage1.config, asdict(merged)):
        print(f"  {name}: {before!r} -> {after!r}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(toml)
    settings = ["--job.config_file", str(folder / CONFIG_FILE), *changes]
    command = [*launcher, "-m", "torchtitan.experiments.lighthouse.train", *settings]
    print(shlex.join(command), flush=True)
    if not options.dry_run:
        if newest is None:
            _set_unfinished_aside(folder / merged.checkpoint.folder)
        os.execv(command[0], command)


def find_stage1(path: Path) -> Stage1:
    """The run and checkpoint at ``path``, a dump folder or one checkpoint folder.

    Raises:
        Refused: if there is none, or it is not a complete full checkpoint of a run with Lighthouse.
    """
    if not path.is_dir():
        raise Refused(f"{path}: no such folder; give a Stage 1 dump folder or one of its checkpoint/step-N folders")
    named = is_checkpoint(path)
    config_file = (dump_folder_of(path) if named else path) / "config.json"
    if not config_file.is_file():
        raise Refused(f"{config_file} is missing: {path} is neither a run's dump folder nor a checkpoint of one")
    config = json.loads(config_file.read_text())
    if not config.get("lighthouse", {}).get("enable"):
        raise Refused(f"{config_file}: lighthouse.enable is not true, so this is no Stage 1 run")
    checkpoint = path if named else _newest(path / config["checkpoint"]["folder"])
    return Stage1(config, checkpoint.resolve(), read_complete(checkpoint))


def read_complete(checkpoint: Path) -> Metadata:
    """The checkpoint's table of contents, after a look at every file that it names.

    Raises:
        Refused: if the checkpoint is unfinished, cut short, or holds the model alone.
    """
    if not is_complete(checkpoint):
        folder = checkpoint.parent
        complete = [path.name for path in complete_checkpoints_in(folder)]
        raise Refused(
            f"{checkpoint} is incomplete (it has no .metadata: the save did not finish); "
            f"complete ones in {folder}: {', '.join(complete) or 'none'}"
        )
    metadata = FileSystemReader(checkpoint).read_metadata()
    for info in metadata.storage_data.values():
        file = checkpoint / info.relative_path
        needed, found = info.offset + info.length, file.stat().st_size if file.is_file() else 0
        if found < needed:
            raise Refused(f"{checkpoint} is incomplete: {file.name} has {found:,} bytes of at least {needed:,}")
    keys = metadata.state_dict_metadata
    missing = [
        part
        for part in ("optimizer", "lr_scheduler", "dataloader", "train_state")
        if not any(key.startswith(f"{part}.") for key in keys)
    ]
    if missing:
        raise Refused(
            f"{checkpoint} is a model-only checkpoint: it lacks {', '.join(missing)}. Stage 2 needs the full state; "
            "train Stage 1 with checkpoint.last_save_model_only=false, or name an earlier checkpoint of the run"
        )
    return metadata


def check_stage2_folder(folder: Path, stage1: Stage1) -> int | None:
    """The step of the newest complete Stage 2 checkpoint in ``folder``, or None where Stage 2 is yet to start.

    Raises:
        Refused: if the folder is Stage 1's, or holds another run.
    """
    if folder.resolve() == dump_folder_of(stage1.checkpoint):
        raise Refused(f"--dump-folder {folder} is Stage 1's own: Stage 2 needs another, so that Stage 1 stays whole")
    others = [path for path in folder.glob("*") if path.name != CONFIG_FILE]
    if not others:
        return None
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    origin = config.get("lighthouse", {}).get("stage1_checkpoint", "")
    if not origin or Path(origin).resolve() != stage1.checkpoint:
        what = f"Stage 2 of {origin}" if origin else "a run or files that are not of this Stage 2"
        raise Refused(f"{folder} already holds {what}; choose another --dump-folder for Stage 2 of {stage1.checkpoint}")
    complete = complete_checkpoints_in(folder / config["checkpoint"]["folder"])
    return step_of(complete[-1]) if complete else None


def stage2_config(stage1: Stage1, folder: Path, total_steps: int | None) -> dict[str, Any]:
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
    config["job"] |= {"dump_folder": str(folder), "config_file": None, "save_config_file": "config.json"}
    config["checkpoint"] |= {
        "enable": True,
        "load_only": False,
        "load_step": -1,
        "initial_load_path": str(stage1.checkpoint),
        "initial_load_model_only": False,
        "initial_load_in_hf": False,
    }
    return config


def merge(toml: str, changes: list[str]) -> JobConfig:
    """The settings as the trainer will see them. Stage 2's folder stays as it is until they have been checked."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / CONFIG_FILE
        file.write_text(toml)
        return ConfigManager().parse_args(["--job.config_file", str(file), *changes])


def check_continuation(stage1: Stage1, config: dict[str, Any], merged: JobConfig, world_size: int) -> None:
    """Stage 2's ``config``, with the command line's changes ``merged`` in, must be the same model on the same data.

    Raises:
        Refused: naming what differs: architecture, tokenizer, dataset, data-parallel size, or a setting that Stage 2
            rests on.
    """
    before, after = stage1.config, asdict(merged)

    def differ(what: str, *settings: str) -> None:
        for setting in settings:
            section, name = setting.split(".")
            if before[section][name] != after[section][name]:
                raise Refused(
                    f"different {what}: {setting} is {before[section][name]!r} in Stage 1 and "
                    f"{after[section][name]!r} here; Stage 2 continues with Stage 1's"
                )

    differ("architecture", "model.name", "model.flavor")
    _check_shapes(stage1, merged)
    if _tokenizer_digest(before["model"]["hf_assets_path"]) != _tokenizer_digest(merged.model.hf_assets_path):
        differ("tokenizer", "model.hf_assets_path")
    differ("dataset", "training.dataset", "training.dataset_path")
    for section, name in (
        ("job", "dump_folder"),
        ("training", "steps"),
        ("lighthouse", "enable"),
        ("lighthouse", "stage1_checkpoint"),
        ("checkpoint", "enable"),
        ("checkpoint", "initial_load_path"),
        ("checkpoint", "initial_load_model_only"),
    ):
        if after[section][name] != config[section][name]:
            raise Refused(
                f"{section}.{name} must stay {config[section][name]!r} in Stage 2 (--dump-folder and --total-steps, "
                "before the --, choose its folder and length)"
            )

    model_parallel = _model_parallel_size(after)
    size, saved = world_size // model_parallel, stage1.data_parallel_size
    if size != saved and "dataloader" not in merged.checkpoint.exclude_from_loading:
        raise Refused(
            f"different data-parallel size: the checkpoint's data position is that of {saved} data-parallel rank(s), "
            f"and {world_size} process(es) with {model_parallel} per model replica make {size}. Start "
            f"{saved * model_parallel} process(es), or give up the data position with "
            "-- --checkpoint.exclude_from_loading dataloader"
        )


def torchrun(arguments: str | None, stage1: Stage1) -> tuple[list[str], int]:
    """The torchrun command and its number of processes; by default one node with as many as Stage 1 had."""
    world_size = stage1.data_parallel_size * _model_parallel_size(stage1.config)
    words = shlex.split(arguments) if arguments else ["--standalone", f"--nproc_per_node={world_size}"]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nproc_per_node", "--nproc-per-node", default="1")
    parser.add_argument("--nnodes", default="1")
    counts, _ = parser.parse_known_args(words)
    if not (counts.nproc_per_node.isdigit() and counts.nnodes.isdigit()):
        raise Refused(
            f"--torchrun {arguments!r}: --nnodes and --nproc_per_node must be plain numbers, because the data "
            "position belongs to a number of processes"
        )
    launcher = [sys.executable, "-m", "torch.distributed.run", *words]
    return launcher, int(counts.nproc_per_node) * int(counts.nnodes)


def _model_parallel_size(config: dict[str, Any]) -> int:
    """Processes that hold one replica of the model."""
    return math.prod(config["parallelism"][f"{kind}_parallel_degree"] for kind in ("tensor", "pipeline", "context"))


def _check_shapes(stage1: Stage1, merged: JobConfig) -> None:
    """The model of these settings against the tensors in the checkpoint: code and flavors may have changed since."""
    spec = get_train_spec(merged.model.name)
    model_args = copy.deepcopy(spec.model_args[merged.model.flavor])
    model_args.update_from_config(merged)
    with torch.device("meta"):
        model = {name: tensor.shape for name, tensor in spec.model_cls(model_args).state_dict().items()}
    saved = {
        name: entry.size
        for name, entry in stage1.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    for name in sorted(model.keys() | saved.keys()):
        if model.get(name) != saved.get(name):
            raise Refused(
                f"different architecture: {name} is {_shape(saved.get(name))} in {stage1.checkpoint} and "
                f"{_shape(model.get(name))} in {merged.model.name} {merged.model.flavor}"
            )


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(tuple(size))


def _tokenizer_digest(folder: str) -> str:
    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not files[0].is_file():
        raise Refused(f"tokenizer: {files[0]} does not exist (relative paths start at {Path.cwd()})")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _newest(folder: Path) -> Path:
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        raise Refused(f"{folder} holds no checkpoint: Stage 1 has not saved one yet")
    return checkpoints[-1]


def _set_unfinished_aside(folder: Path) -> None:
    """Upstream would take a checkpoint folder without a complete checkpoint for a reason to start from scratch."""
    if folder.exists():
        aside = next(path for n in range(1, 10**6) if not (path := Path(f"{folder}.unfinished-{n}")).exists())
        print(f"{folder} holds no complete checkpoint: moved to {aside}")
        folder.rename(aside)


def _explicit_none(config: dict[str, Any]) -> list[str]:
    """TOML has no None: settings whose default is another value are passed on the command line."""
    defaults = asdict(JobConfig())
    return [
        word
        for section, values in config.items()
        for name, value in values.items()
        if value is None and defaults.get(section, {}).get(name) is not None
        for word in (f"--{section}.{name}", "None")
    ]


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (f"{section}.{name}", before.get(section, {}).get(name), value)
        for section, values in after.items()
        for name, value in values.items()
        if section != "job" and before.get(section, {}).get(name) != value
    ]


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    arguments, overrides = split_overrides(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage1", type=Path, help="Stage 1's dump folder, or one of its checkpoint/step-N folders")
    parser.add_argument(
        "--total-steps", type=int, help="steps of both stages together (default: Stage 1's lr_scheduler.total_steps)"
    )
    parser.add_argument("--dump-folder", type=Path, help="Stage 2's own folder (default: Stage 1's with _dense added)")
    parser.add_argument(
        "--torchrun",
        metavar="ARGS",
        help="torchrun's arguments as one string, e.g. '--nnodes 4 --nproc_per_node 8 --rdzv_backend c10d "
        "--rdzv_endpoint HOST:PORT' (default: one node, as many processes as Stage 1 had)",
    )
    parser.add_argument("--dry-run", action="store_true", help=f"check, write {CONFIG_FILE}, print the command, stop")
    return parser.parse_args(arguments), overrides


if __name__ == "__main__":
    main()
