"""The stage before: a run on disk, and the checkpoint of it that the next stage starts from."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torchtitan.experiments.lighthouse.data.stream_loader import HEADER, Header, ranks_in, streams_in
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    POSITION,
    Verify,
    config_file_of,
    find_checkpoint,
    position_keys,
    read_config,
    read_metadata,
    saved_with,
    step_of,
)
from torchtitan.experiments.lighthouse.runs.records import stage_number

#: What the checkpoint must hold beside the weights.
FULL_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")


@dataclass
class StageBefore:
    """A run, and the checkpoint of it that the next stage starts from."""

    config: dict[str, Any]
    """The settings that the checkpoint was trained with."""
    checkpoint: Path
    metadata: Metadata
    fingerprints: dict[str, Any] = field(default_factory=dict)
    """Of what it had read; empty where the checkpoint does not say."""

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    @property
    def number(self) -> int:
        """1 for a run from scratch."""
        return stage_number_of(self.config)

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

    @cached_property
    def position(self) -> Header | None:
        """None for a data position that an older version saved."""
        return read_position(self.checkpoint, self.metadata)

    @property
    def data_parallel_size(self) -> int:
        return self.position.ranks if self.position else ranks_in(position_keys(self.metadata))

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * model_parallel_size(self.config)

    @property
    def tokens_per_step(self) -> int:
        if self.position:
            return self.position.tokens_per_step
        return tokens_per_step(self.config, self.data_parallel_size)


def find_stage_before(path: Path, verify: Verify = "digest") -> StageBefore:
    """The run and checkpoint at ``path``, a dump folder (its newest sound checkpoint) or one checkpoint folder.

    Raises:
        Refused: if there is none, or it is not a sound full checkpoint of this trainer.
    """
    config_file = config_file_of(path)
    if "lighthouse" not in read_config(config_file):
        raise Refused(f"{config_file} has no [lighthouse] section, so this is no run of this trainer")
    checkpoint = find_checkpoint(path, verify)
    # The run's file says what its last start was given, and the checkpoint may be of an earlier one.
    saved = saved_with(checkpoint) or {"settings": read_config(config_file)}
    metadata = read_metadata(checkpoint)
    keys = metadata.state_dict_metadata
    missing = [part for part in FULL_STATE if not any(key.startswith(f"{part}.") for key in keys)]
    before = StageBefore(saved["settings"], checkpoint, metadata, saved.get("fingerprints", {}))
    if missing:
        raise Refused(
            f"{checkpoint} is a model-only checkpoint: it lacks {', '.join(missing)}. {before.next_name} needs the "
            f"full state; train {before.name} with checkpoint.last_save_model_only=false, or name an earlier "
            "checkpoint of the run"
        )
    return before


def read_position(checkpoint: Path, metadata: Metadata) -> Header | None:
    """What the data position says of the run; None for one that an older version saved."""
    if not streams_in(position_keys(metadata)):
        return None
    where = metadata.storage_data[MetadataIndex(POSITION + HEADER)]
    with (checkpoint / where.relative_path).open("rb") as file:
        file.seek(where.offset)
        saved = file.read(where.length)
    return Header.from_json(torch.load(io.BytesIO(saved), weights_only=True))


def tokens_per_step(config: dict[str, Any], data_parallel_size: int) -> int:
    return sequences_per_step(config, data_parallel_size) * int(config["training"]["seq_len"])


def sequences_per_step(config: dict[str, Any], data_parallel_size: int) -> int:
    """The global batch size; upstream reads a negative one as that without gradient accumulation."""
    training = config["training"]
    together = int(training["global_batch_size"])
    return together if together >= 0 else int(training["local_batch_size"]) * data_parallel_size


def attention_of(config: dict[str, Any]) -> str:
    """In words."""
    return "through Lighthouse" if config["lighthouse"]["enable"] else "dense"


def model_parallel_size(config: dict[str, Any]) -> int:
    """Processes that hold one replica of the model."""
    return math.prod(config["parallelism"][f"{kind}_parallel_degree"] for kind in ("tensor", "pipeline", "context"))


def stage_number_of(config: dict[str, Any]) -> int:
    section = config["lighthouse"]
    return stage_number(section.get("stage", 0), section.get("stage1_checkpoint", ""))
