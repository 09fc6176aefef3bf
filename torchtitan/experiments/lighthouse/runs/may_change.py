"""The table of settings: which of them may change when a run goes on, and which make it another run. Imports no torch.

It serves both ways to go on: in a run's own folder (the trainer), and in the next stage (``resume_dense``). What it
forbids, ``checkpoint.allow_changed`` allows, setting by setting. docs/reliability.md states it for users.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torchtitan.experiments.lighthouse.errors import Refused


class Rule(Enum):
    """What a change means when a run goes on."""

    FREE = auto()
    """Nothing: how the training is carried out, shown and kept, not what is trained."""
    TOLD = auto()
    """It takes effect, and a line says so: how the weights move from here on, the usual remedies among them."""
    STAGE = auto()
    """Another run. The next stage may have another value: that is what stages are for."""
    CHAIN = auto()
    """Another run, in the next stage too."""
    CONTENT = auto()
    """Another run, in the next stage too, if the files there differ (``runs.fingerprints``). The path may change."""


#: Settings and whole sections; the longest name that fits counts. [training] has no rule for the section, so that each
#: setting there is decided on.
RULES = {
    # How it is carried out. Processes share the work out, and the result is equal up to rounding.
    "job": Rule.FREE,
    "profiling": Rule.FREE,
    "metrics": Rule.FREE,
    "checkpoint": Rule.FREE,
    "validation": Rule.FREE,
    "parallelism": Rule.FREE,
    "activation_checkpoint": Rule.FREE,
    "compile": Rule.FREE,
    "comm": Rule.FREE,
    "memory_estimation": Rule.FREE,
    "fault_tolerance": Rule.FREE,
    "experimental": Rule.FREE,
    "debug": Rule.FREE,
    "training.steps": Rule.FREE,
    "training.local_batch_size": Rule.FREE,  # The tokens of a step stay, below.
    "training.max_bad_records": Rule.FREE,
    "training.dataloader": Rule.FREE,
    "training.enable_cpu_offload": Rule.FREE,
    "training.cuda_graph": Rule.FREE,  # The result is the same to the bit.
    "training.gc_freq": Rule.FREE,
    "training.gc_debug": Rule.FREE,
    "model.print_after_conversion": Rule.FREE,
    "model.tokenizer_path": Rule.FREE,  # upstream's old name: it has been copied to hf_assets_path
    "model.hf_config": Rule.FREE,  # The sizes that it gave are in [llama].
    "optimizer.implementation": Rule.FREE,
    "lighthouse.backend": Rule.FREE,
    "lighthouse.inner_attention": Rule.FREE,
    "lighthouse.stage": Rule.FREE,  # These two say where a run comes from. ``resume_dense`` sets them.
    "lighthouse.stage1_checkpoint": Rule.FREE,
    # How the weights move from here on. The limit of the gradient norm is one of them: like the learning rate it is
    # lowered to save a run, and nothing that was trained so far becomes something else.
    "optimizer": Rule.TOLD,
    "lr_scheduler": Rule.TOLD,
    "training.max_norm": Rule.TOLD,
    "training.sparse_loss_gradient": Rule.TOLD,
    "training.mixed_precision_param": Rule.TOLD,
    "training.mixed_precision_reduce": Rule.TOLD,
    # What a stage is.
    "lighthouse": Rule.STAGE,
    "llama.rope_theta": Rule.STAGE,  # The rotary embedding goes with the context, and has no weights.
    "llama.rope_factor": Rule.STAGE,
    "llama.rope_low_freq_factor": Rule.STAGE,
    "llama.rope_high_freq_factor": Rule.STAGE,
    "llama.rope_original_max_position_embeddings": Rule.STAGE,
    "training.seq_len": Rule.STAGE,
    "training.global_batch_size": Rule.STAGE,  # as tokens per step; the next stage has as many too (``runs.contract``)
    "training.dtype": Rule.STAGE,  # of the weights
    "model.converters": Rule.STAGE,
    "quantize": Rule.STAGE,
    "debug.seed": Rule.STAGE,
    # What a chain of stages is.
    "model": Rule.CHAIN,
    "llama": Rule.CHAIN,
    "training.dataset": Rule.CHAIN,
    "training.dataset_split": Rule.CHAIN,
    "training.dataset_config": Rule.CHAIN,
    "training.text_column": Rule.CHAIN,
    "training.mixture": Rule.CHAIN,  # but for the paths there, which are as dataset_path
    "training.shuffle_buffer": Rule.CHAIN,
    "training.data_seed": Rule.CHAIN,
    "training.held_out_share": Rule.CHAIN,
    "training.min_document_chars": Rule.CHAIN,
    "training.dataset_path": Rule.CONTENT,
    "model.hf_assets_path": Rule.CONTENT,
}

#: The rules that refuse a change: in a run's own folder, and in the next stage.
IN_OWN_FOLDER = frozenset({Rule.STAGE, Rule.CHAIN, Rule.CONTENT})
IN_NEXT_STAGE = frozenset({Rule.CHAIN, Rule.CONTENT})

#: Compared in another way than value by value: what they mean depends on other settings, or on files.
_NOT_BY_VALUE = {"training.global_batch_size", "lr_scheduler.total_steps"}


@dataclass(frozen=True)
class Change:
    """A setting that is not as in the checkpoint."""

    setting: str
    """Its full name"""
    words: str
    """From what to what"""

    def __str__(self) -> str:
        return f"{self.setting} {self.words}"


def rule_of(setting: str) -> Rule:
    """The rule of a setting, given by its full name. One of a section of the user's own has none, and may change."""
    name = setting
    while name and name not in RULES:
        name = name.rpartition(".")[0]
    return RULES.get(name, Rule.FREE)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of every setting."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changes(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Change]:
    """The settings whose values differ and are not free to, but for those that are compared in another way.

    Args:
        before: as they were saved. One that is not there, because an older version did not have it, had its default.
        defaults: of the settings ``now``.
    """
    saved, current, found = dict(flat(defaults)) | dict(flat(before)), dict(flat(now)), []
    # In a dense run the other settings of the section decide nothing.
    both_lighthouse = saved.get("lighthouse.enable") and current.get("lighthouse.enable")
    for name, value in current.items():
        rule = rule_of(name)
        if rule in (Rule.FREE, Rule.CONTENT) or name in _NOT_BY_VALUE:
            continue
        if name.startswith("lighthouse.") and name != "lighthouse.enable" and not both_lighthouse:
            continue
        if _compared(name, saved.get(name)) != _compared(name, value):
            found.append(Change(name, f"{saved.get(name)!r} → {value!r}"))
    # Where it has no length of its own, the schedule is as long as the run.
    was, total = (every.get("lr_scheduler.total_steps") or every["training.steps"] for every in (saved, current))
    if was != total:
        found.append(Change("lr_scheduler.total_steps", f"{was} → {total}"))
    return found


def _compared(setting: str, value: Any) -> Any:
    """What of a setting is compared by value."""
    if setting == "training.mixture":
        return [{key: what for key, what in table.items() if key != "dataset_path"} for table in value or []]
    if setting == "training.held_out_share":
        return value or 0  # Not set is the default of versions that held nothing out; others have saved a number.
    return value


def judge(
    found: Iterable[Change], refuses: Collection[Rule], allowed: Collection[str], why: str, switch: str
) -> tuple[list[Change], list[str]]:
    """Refuse the changes that are not allowed, all in one line.

    Args:
        refuses: the rules whose changes have to be allowed.
        allowed: ``checkpoint.allow_changed``.
        why: what a refusal says after the changes.
        switch: how to allow them, up to their names.

    Returns:
        All changes, where none is refused; and the names in ``allowed`` of settings that have not changed.

    Raises:
        Refused: naming every change that is not allowed.
    """
    found = list(found)
    refused = [change for change in found if rule_of(change.setting) in refuses and change.setting not in allowed]
    if refused:
        changed, names = "; ".join(map(str, refused)), ",".join(change.setting for change in refused)
        raise Refused(f"{changed}: {why}, or allow it on purpose: {switch} {names}")
    changed_names = {change.setting for change in found}
    return found, [name for name in allowed if name not in changed_names]


def check_allowed(names: Iterable[str], known: Collection[str]) -> None:
    """Whether ``checkpoint.allow_changed`` is a list of names of settings.

    Raises:
        Refused: if not, with the nearest one.
    """
    if isinstance(names, str):
        raise Refused(f"checkpoint.allow_changed={names!r}: must be a list; nearest valid value: [{names!r}]")
    for name in names:
        if name not in known:
            (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise Refused(f"checkpoint.allow_changed: {name!r} is no setting; nearest valid value: {nearest!r}")
