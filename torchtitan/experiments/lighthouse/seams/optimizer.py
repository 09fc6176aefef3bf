"""The optimizer's settings after a checkpoint was loaded: those of this run, not those that the checkpoint holds.

Torch keeps settings in ``param_groups`` and in the scheduler's ``base_lrs``, and saves them with the state. Loading
brings the saved ones back, and upstream leaves it at that: a lower ``optimizer.lr`` would be printed, without effect.
"""

from __future__ import annotations

import math
from typing import Any, cast

from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer

#: Of a group: its name in torch, and that of the setting, or of each of its numbers.
SETTINGS = {"initial_lr": ("lr",), "betas": ("beta1", "beta2"), "eps": ("eps",), "weight_decay": ("weight_decay",)}

#: Of each optimizer, of each of its groups.
Settings = list[list[dict[str, Any]]]


def settings_of(optimizers: OptimizersContainer[Any]) -> Settings:
    """What a new optimizer was built with; to be asked before a checkpoint is loaded."""
    return [
        [{name: group[name] for name in SETTINGS if name in group} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def apply_settings(
    wanted: Settings, optimizers: OptimizersContainer[Any], schedulers: LRSchedulersContainer
) -> list[tuple[str, Any, Any]]:
    """Put the settings back that loading has replaced. What is equal is not touched, so that such a run stays exact.

    Returns:
        Setting, value in the checkpoint and value from now on, for all that differ; the learning rate among them as it
        is at this step of the schedule.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for optimizer, scheduler, groups in zip(optimizers, schedulers, wanted, strict=True):
        for number, (group, settings) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
            for name, value in settings.items():
                pairs = list(zip(SETTINGS[name], _numbers(group[name]), _numbers(value), strict=True))
                differing = {f"optimizer.{setting}": (was, now) for setting, was, now in pairs if not _equal(was, now)}
                if differing:
                    changed |= differing
                    group[name] = value
            scheduler.base_lrs[number] = group["initial_lr"]
            rate = group["initial_lr"] * cast(LambdaLR, scheduler).lr_lambdas[number](scheduler.last_epoch)
            if not _equal(group["lr"], rate):
                changed["learning rate"] = group["lr"], rate
                group["lr"] = scheduler._last_lr[number] = rate
    return [(name, before, now) for name, (before, now) in changed.items()]


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _equal(one: Any, other: Any) -> bool:
    return math.isclose(float(one), float(other), rel_tol=1e-9)
