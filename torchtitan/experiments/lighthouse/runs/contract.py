"""What a run that goes on must have in common with what was trained before: in its own folder, and as the next stage.

``runs.may_change`` says which settings may change. Stages form a chain of any length. Each has its own attention,
layers and context. Weights, optimizer, schedule, data position and tokens per step are those of the stage before. The
command (``resume_dense``) checks it before it launches anything, and the trainer again before it builds anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.experiments.lighthouse.data.stream_loader import Header, nearest_divisors
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import Lighthouse, MergedConfig
from torchtitan.experiments.lighthouse.runs import fingerprints, may_change
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    CONFIG_FILE,
    complete_checkpoints_in,
    dump_folder_of,
    read_config,
    saved_with,
)
from torchtitan.experiments.lighthouse.runs.may_change import Change, Rule
from torchtitan.experiments.lighthouse.runs.settings import build_model, model_arguments, sizes_of_flavor
from torchtitan.experiments.lighthouse.runs.stages import (
    StageBefore,
    attention_of,
    model_parallel_size,
    sequences_per_step,
    stage_number_of,
    tokens_per_step,
)

from lighthouse.layers import parse_layers

GIVE_UP = "To give the data position up: -- --checkpoint.exclude_from_loading dataloader"

#: By kind, as ``fingerprints.of_run``; None where another process looks at them.
Fingerprints = Mapping[str, Any] | None


def to_resume(settings: MergedConfig) -> Path | None:
    """The checkpoint in the run's own folder from which it goes on, as far as names tell; None where it starts.

    Raises:
        Refused: where it would start over, because ``checkpoint.folder`` is another one than that of its checkpoints.
    """
    checkpoint = settings.checkpoint
    complete = complete_checkpoints_in(Path(settings.job.dump_folder) / checkpoint.folder)
    if not complete:
        _refuse_to_start_over(settings)
    named = [path for path in complete if path.name == f"step-{checkpoint.load_step}"]
    return next(reversed(named or complete), None)


def check_resume(checkpoint: Path, settings: MergedConfig, world_size: int, reads: Fingerprints) -> list[str]:
    """Whether a run with ``settings`` in its own folder is the one that saved ``checkpoint``.

    Args:
        reads: what it reads now.

    Returns:
        Lines that say what is not as in the checkpoint.

    Raises:
        Refused: naming what makes it another run: settings, files, and how to allow it.
    """
    saved, file = saved_with(checkpoint), dump_folder_of(checkpoint) / CONFIG_FILE
    if saved is None:
        if not file.is_file():
            return [f"{checkpoint} does not say with which settings it was trained: they are not compared"]
        # Of the last start, which nothing has replaced yet.
        saved = {"settings": read_config(file)}
    found = _changes(saved["settings"], saved.get("fingerprints", {}), settings, reads)
    found += _changed_step(saved, settings, world_size)
    why = f"{checkpoint} was trained otherwise, and this would be another run. Choose another job.dump_folder"
    allowed = settings.checkpoint.allow_changed
    done, idle = may_change.judge(found, may_change.IN_OWN_FOLDER, allowed, why, "--checkpoint.allow_changed")
    return [*map(_line, done), *map(_idle_line, idle)]


def check_continuation(before: StageBefore, settings: MergedConfig, world_size: int, reads: Fingerprints) -> list[str]:
    """A stage with ``settings`` on ``world_size`` processes must train the same model on the same data.

    Args:
        reads: what it reads now.

    Returns:
        Lines that say what was allowed to differ all the same.

    Raises:
        Refused: naming what differs (architecture, tokenizer, data, tokens per step), how many processes can go on
            from the data position, what cannot be built at this context, or that nothing at all is new.
    """
    saved, after = before.config, asdict(settings)
    allowed = settings.checkpoint.allow_changed
    found = _changes(saved, before.fingerprints, settings, reads)
    why = (
        f"{before.checkpoint} was trained otherwise, and {before.next_name} continues it. Leave it as in {before.name}"
    )
    done, _ = may_change.judge(found, may_change.IN_NEXT_STAGE, allowed, why, "-- --checkpoint.allow_changed")
    _refuse_the_same_again(before, after, found)
    size = max(1, world_size // model_parallel_size(after))
    same_size, keeps_position = size == before.data_parallel_size, True
    same_tokens = "training.global_batch_size" not in allowed
    if "dataloader" in settings.checkpoint.exclude_from_loading:
        keeps_position = False
    elif before.position is None:
        _check_readers(before, after, size)
    elif not same_size:
        _check_ranks(before.position, after, size, None if same_tokens else sequences_per_step(after, size))
    another_context = after["training"]["seq_len"] != saved["training"]["seq_len"]
    if same_tokens and (another_context or (keeps_position and not same_size)):
        _check_tokens_per_step(before, settings, size)
    elif another_context or not same_size:
        _check_local_batch(settings, size)
    try:
        check_context(settings)
    except ValueError as error:
        raise Refused(f"{before.next_name} cannot be built: {error}") from error
    _check_shapes(before, settings)
    return [_line(change) for change in done if may_change.rule_of(change.setting) in may_change.IN_NEXT_STAGE]


def _refuse_to_start_over(settings: MergedConfig) -> None:
    """A run that holds checkpoints elsewhere would train new weights without a word."""
    dump_folder, setting = Path(settings.job.dump_folder), "checkpoint.folder"
    if not settings.checkpoint.enable or setting in settings.checkpoint.allow_changed:
        return
    try:
        before = read_config(dump_folder / CONFIG_FILE)["checkpoint"]["folder"]
    except (OSError, ValueError, KeyError):
        return
    if before != settings.checkpoint.folder and (complete := complete_checkpoints_in(dump_folder / before)):
        raise Refused(
            f"{setting}={settings.checkpoint.folder!r}: no checkpoint there, and the run has saved "
            f"{before}/{complete[-1].name}: it would start over; nearest valid value: {before!r}. To do that, choose "
            f"another job.dump_folder, or allow it on purpose: --checkpoint.allow_changed {setting}"
        )


def _line(change: Change) -> str:
    return f"Not as in the checkpoint: {change}"


def _idle_line(setting: str) -> str:
    return f"checkpoint.allow_changed: {setting} need not be there: nothing has to be allowed"


def _changes(
    saved: dict[str, Any], read: Mapping[str, Any], settings: MergedConfig, reads: Fingerprints
) -> list[Change]:
    """What differs, settings and files.

    Args:
        saved: the settings of the checkpoint.
        read: the fingerprints of the checkpoint.
        reads: those of now.
    """
    now = asdict(settings)
    if "llama" not in saved:  # by an older version
        flavor = saved.get("model", {}).get("flavor", "")
        sizes = sizes_of_flavor(settings.model.name, flavor)
        saved = saved | {"llama": now["llama"] if sizes is None else asdict(sizes)}
    found = may_change.changes(saved, now, asdict(type(settings)()))
    names = {change.setting for change in found}
    if "lighthouse.layers" in names and _layers(saved, settings) == _layers(now, settings):
        found = [change for change in found if change.setting != "lighthouse.layers"]
    if reads is None:
        return found
    for kind in fingerprints.SETTINGS:
        if kind == "data" and {"training.dataset", "training.mixture"} & names:
            continue  # all of it
        setting = fingerprints.setting_of(kind, settings)
        section, name = setting.split(".")
        was, path = saved.get(section, {}).get(name) or None, now[section][name] or None
        then, here = read.get(kind), reads.get(kind)
        if then is None and was == path:
            continue  # An older version has not said what was there.
        then = then or _still_there(kind, section, name, was, settings)
        if then is None or here is None:
            if was != path:
                found.append(Change(setting, f"{was!r} → {path!r}"))
        elif what := fingerprints.difference(then, here):
            where = f"({path}) " if isinstance(path, str) else ""
            found.append(Change(setting, f"{where}is not as it was: {what}"))
    return found


def _still_there(kind: str, section: str, name: str, path: str | None, settings: MergedConfig) -> Any:
    """The fingerprint of what now lies where an older version's settings say; None if nothing does."""
    before = copy.deepcopy(settings)
    setattr(getattr(before, section), name, path)
    try:
        return fingerprints.of_kind(kind, before)
    except Refused:
        return None


def _layers(config: dict[str, Any], settings: MergedConfig) -> Any:
    layers = config.get("lighthouse", {}).get("layers", Lighthouse.layers)
    try:
        return parse_layers(layers, model_arguments(settings).n_layers)
    except ValueError:
        return layers


def _changed_step(saved: dict[str, Any], settings: MergedConfig, world_size: int) -> list[Change]:
    """Another number of tokens in a step, whatever batch sizes and processes make it."""
    after, training = asdict(settings), saved["settings"].get("training", {})
    was = saved.get("tokens_per_step")
    if was is None:
        if training.get("global_batch_size", -1) < 0:
            return []  # Not known. The data position compares.
        was = tokens_per_step(saved["settings"], 1)
    now = tokens_per_step(after, max(1, world_size // model_parallel_size(after)))
    if now == was:
        return []
    keeps = was // settings.training.seq_len
    hint = f" (training.global_batch_size {keeps} keeps them)" if keeps * settings.training.seq_len == was else ""
    return [Change("training.global_batch_size", f"makes {was:,} tokens per step → {now:,}{hint}")]


def _refuse_the_same_again(before: StageBefore, after: dict[str, Any], found: Iterable[Change]) -> None:
    """A stage with nothing of its own, attention, layers, context or what else a stage is, is not a next one."""
    if not any(may_change.rule_of(change.setting) is Rule.STAGE for change in found):
        raise Refused(
            f"{before.next_name} would be {before.name} again, {attention_of(after)} at "
            f"{after['training']['seq_len']:,} tokens: choose another --attention or --seq-len, or, for Lighthouse, "
            "other layers or another top_k after the --. To go on with "
            f"{before.name} as it is, run its own command again"
        )


def _check_ranks(position: Header, after: dict[str, Any], size: int, sequences: int | None) -> None:
    """Each rank reads as many streams, and takes as many sequences of a step.

    Args:
        sequences: of a step, where it need not have as many tokens as before.
    """
    model_parallel = model_parallel_size(after)
    sequences = sequences or position.tokens_per_step // max(1, after["training"]["seq_len"])
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
