"""The contract between a stage and the next one: what must equal, what may change, what is refused.

Stages form a chain of any length. Each has its own attention, layers and context. Weights, optimizer, schedule, data
position and tokens per step are those of the stage before. The command (``resume_dense``) checks it before it launches
anything, and the trainer again before it builds anything.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torchtitan.experiments.lighthouse.data.stream_loader import (
    HEADER,
    Header,
    nearest_divisors,
    ranks_in,
    streams_in,
)
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    POSITION,
    Verify,
    config_file_of,
    find_checkpoint,
    position_keys,
    read_config,
    read_metadata,
    step_of,
)
from torchtitan.experiments.lighthouse.runs.records import stage_number
from torchtitan.experiments.lighthouse.runs.settings import build_model, model_arguments

#: Settings that must equal those of the stage before, by what they decide. Shapes and tokenizer files are compared by
#: content besides.
MUST_EQUAL = {
    "architecture": ("model.name", "model.flavor"),
    "dataset": ("training.dataset", "training.dataset_path"),
}

GIVE_UP = "To give the data position up: -- --checkpoint.exclude_from_loading dataloader"

#: What the checkpoint must hold beside the weights.
FULL_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")


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
    config = read_config(config_file)
    if "lighthouse" not in config:
        raise Refused(f"{config_file} has no [lighthouse] section, so this is no run of this trainer")
    checkpoint = find_checkpoint(path, verify)
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


def check_continuation(before: StageBefore, settings: MergedConfig, world_size: int) -> None:
    """A stage with ``settings`` on ``world_size`` processes must train the same model on the same data.

    Raises:
        Refused: naming what differs (architecture, tokenizer, dataset, tokens per step), how many processes can go on
            from the data position, what cannot be built at this context, or that nothing at all is new.
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
    size = max(1, world_size // model_parallel_size(after))
    same_size, keeps_position = size == before.data_parallel_size, True
    if "dataloader" in settings.checkpoint.exclude_from_loading:
        keeps_position = False
    elif before.position is None:
        _check_readers(before, after, size)
    elif not same_size:
        _check_ranks(before.position, after, size)
    if after["training"]["seq_len"] != saved["training"]["seq_len"] or (keeps_position and not same_size):
        _check_tokens_per_step(before, settings, size)
    elif not same_size:
        _check_local_batch(settings, size)
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


def _check_ranks(position: Header, after: dict[str, Any], size: int) -> None:
    """Each rank reads as many streams, and takes as many sequences of a step."""
    model_parallel = model_parallel_size(after)
    sequences = position.tokens_per_step // max(1, after["training"]["seq_len"])
    valid = math.gcd(position.streams, sequences)
    if valid % size:
        nearest = [size * model_parallel for size in nearest_divisors(valid, size)]
        raise Refused(
            f"{size * model_parallel} process(es), {model_parallel} per model replica, make {size} data-parallel "
            f"rank(s), which must divide the {position.streams} streams of the checkpoint's data position and the "
            f"{sequences} sequence(s) of a step; nearest valid value: {' or '.join(map(str, nearest))} process(es). "
            f"{GIVE_UP}"
        )


def _check_readers(before: StageBefore, after: dict[str, Any], size: int) -> None:
    """An older version's data position is that of every reader: a worker process of a data-parallel rank."""
    model_parallel, saved = model_parallel_size(after), before.data_parallel_size
    if size != saved:
        raise Refused(
            f"different data-parallel size: an older version saved the checkpoint, and its data position is that of "
            f"{saved} data-parallel rank(s); {size * model_parallel} process(es) with {model_parallel} per model "
            f"replica make {size}. Start {saved * model_parallel} process(es). {GIVE_UP}"
        )
    workers, here = (config["training"]["dataloader"]["num_workers"] for config in (before.config, after))
    if workers != here:
        raise Refused(
            f"different data workers: training.dataloader.num_workers is {workers} in {before.name} and {here} here, "
            f"and an older version saved the data position, which is that of {workers}. Leave it there. {GIVE_UP}"
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
    _check_local_batch(settings, data_parallel_size)


def _check_local_batch(settings: MergedConfig, data_parallel_size: int) -> None:
    training, sequences = settings.training, sequences_per_step(asdict(settings), data_parallel_size)
    if sequences % data_parallel_size:
        nearest = max(1, round(sequences / data_parallel_size)) * data_parallel_size
        raise Refused(
            f"training.global_batch_size={sequences}: must be a multiple of the {data_parallel_size} data-parallel "
            f"rank(s); nearest valid value: {nearest}"
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


def refuse_unloaded(settings: MergedConfig, checkpoint_folder: str) -> None:
    """A next stage that starts at step 0 has loaded nothing: upstream goes on from random weights in silence.

    Raises:
        Refused: always.
    """
    stage = f"Stage {stage_number_of(asdict(settings))}"
    raise Refused(
        f"{stage} loaded no checkpoint: {checkpoint_folder} exists but holds no complete one, so "
        f"{settings.lighthouse.stage1_checkpoint} was not read and training would start from random "
        f"weights. Start {stage} with scripts/resume_dense.py, which sets the unfinished folder aside."
    )


def stage_number_of(config: dict[str, Any]) -> int:
    section = config["lighthouse"]
    return stage_number(section.get("stage", 0), section.get("stage1_checkpoint", ""))


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
