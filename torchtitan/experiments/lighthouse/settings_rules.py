"""What every setting may be, upstream's too, checked as a whole before anything starts.

Upstream takes a TOML file's values as they come: ``enable = "false"`` is a text, and true. Numbers that make no sense
fail much later, or never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs.may_change import check_allowed


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, or ``above`` low, and the ``special`` one."""

    low: float
    high: float = math.inf
    above: bool = False
    special: int | None = None

    def contains(self, value: float) -> bool:
        if value == self.special:
            return True
        return (self.low < value or (self.low == value and not self.above)) and value <= self.high

    def nearest(self, value: float, default: Any) -> Any:
        """The nearest valid number, or the default where there is none that is nearest."""
        if self.above and not value > self.low:
            return default
        return _plain(min(max(value, self.low), self.high))

    def __str__(self) -> str:
        parts = [f"{'more than' if self.above else 'at least'} {_plain(self.low)}"]
        parts += [f"at most {_plain(self.high)}"] if self.high < math.inf else []
        return " and ".join(parts) + ("" if self.special is None else f", or {self.special}")


POSITIVE, COUNT, NOT_NEGATIVE = Range(0, above=True), Range(1), Range(0)
SHARE = Range(0, 1)

#: Every number that has a limit. A setting that may also be None is not checked when it is.
RANGES = {
    "metrics.log_freq": COUNT,
    "metrics.sample_freq": NOT_NEGATIVE,
    "profiling.profile_freq": COUNT,
    "optimizer.lr": POSITIVE,
    "optimizer.beta1": Range(0, 0.9999),
    "optimizer.beta2": Range(0, 0.9999),
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "lr_scheduler.warmup_steps": NOT_NEGATIVE,
    "lr_scheduler.total_steps": COUNT,
    "lr_scheduler.decay_ratio": SHARE,
    "lr_scheduler.min_lr_factor": SHARE,
    "training.local_batch_size": COUNT,
    "training.global_batch_size": Range(1, special=-1),
    "training.seq_len": COUNT,
    "training.max_norm": POSITIVE,
    "training.steps": COUNT,
    "training.gc_freq": COUNT,
    "training.shuffle_buffer": NOT_NEGATIVE,
    "training.data_seed": NOT_NEGATIVE,
    "training.held_out_share": Range(0, 0.5),
    "training.min_document_chars": NOT_NEGATIVE,
    "training.max_bad_records": NOT_NEGATIVE,
    "training.dataloader.num_workers": NOT_NEGATIVE,
    "training.dataloader.prefetch_factor": COUNT,
    "checkpoint.interval": COUNT,
    "checkpoint.interval_minutes": NOT_NEGATIVE,
    "checkpoint.keep_latest_k": NOT_NEGATIVE,
    "checkpoint.load_step": Range(0, special=-1),
    "activation_checkpoint.memory_budget": SHARE,
    "activation_checkpoint.offload_layers": NOT_NEGATIVE,
    "comm.init_timeout_seconds": COUNT,
    "comm.train_timeout_seconds": COUNT,
    "comm.trace_buf_size": NOT_NEGATIVE,
    "validation.local_batch_size": COUNT,
    "validation.seq_len": COUNT,
    "validation.freq": COUNT,
    "validation.steps": Range(1, special=-1),
    "validation.max_bad_records": NOT_NEGATIVE,
    "validation.dataloader.num_workers": NOT_NEGATIVE,
    "validation.dataloader.prefetch_factor": COUNT,
    "debug.seed": NOT_NEGATIVE,
}


def check_settings(config: Any) -> None:
    """Refuse settings of a wrong type or out of range, and those that contradict each other.

    Args:
        config: the merged settings, a dataclass of sections.

    Raises:
        Refused: naming the setting, its value, the rule and the nearest valid value.
    """
    known = {name for name, *_ in _settings_of(config)}
    check_allowed(getattr(config.checkpoint, "allow_changed", ()), known)  # not in upstream's own
    for name, value, kind, default in _settings_of(config):
        _check_type(name, value, kind)
        limits = RANGES.get(name)
        if limits is not None and value is not None and not limits.contains(value):
            raise Refused(f"{name}={value}: must be {limits}; nearest valid value: {limits.nearest(value, default)}")
    steps, total = config.training.steps, config.lr_scheduler.total_steps
    if total is not None and total < steps and not config.checkpoint.create_seed_checkpoint:
        raise Refused(
            f"lr_scheduler.total_steps={total}: must be at least training.steps={steps}, because the schedule covers "
            f"all stages; nearest valid value: {steps}"
        )
    compiled = config.compile.enable and "model" in config.compile.components
    if config.activation_checkpoint.mode == "memory_budget" and not compiled:
        raise Refused(
            "activation_checkpoint.mode='memory_budget': must not be without compilation (compile.enable, 'model' in "
            "compile.components), because the compiler chooses what is computed again; nearest valid value: 'selective'"
        )


def _settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, value, type and default of every setting."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, hints[field.name], field.default


def _check_type(name: str, value: Any, kind: Any) -> None:
    allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if any(_is_a(value, one) for one in allowed):
        return
    choices = [choice for one in allowed if get_origin(one) is Literal for choice in get_args(one)]
    if choices and int not in allowed:
        raise Refused(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
    words = {bool: "true or false, without quotes", int: "a whole number", float: "a number", str: "a text"}
    rule = " or ".join([*(words[one] for one in allowed if one in words), *map(repr, choices)])
    raise Refused(f"{name}={value!r}: must be {rule or kind}")


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (None, NoneType):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    return True  # lists and the like are the parser's


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
