"""What a run has written to ``metrics.jsonl``, and when a resumed run counts as recovered. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, harmonic_mean, median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.job_config import MergedConfig

METRICS_FILE = "metrics.jsonl"

#: Means over fewer dense steps than these say more about the last batch than about the model.
SOONEST_RECOVERY = 10


def stage_of(job_config: MergedConfig) -> str:
    """The label of a run: ``stage1`` (Lighthouse, from scratch), ``dense`` (dense, from scratch), or ``stageN``, a
    later stage of a chain, whatever its attention."""
    section = job_config.lighthouse
    number = stage_number(section.stage, section.stage1_checkpoint)
    return "dense" if number == 1 and not section.enable else f"stage{number}"


def stage_number(stage: int, origin: str) -> int:
    """Which stage of its chain a run is, from ``lighthouse.stage`` and ``lighthouse.stage1_checkpoint``.

    Older versions, and people who start a Stage 2 by hand, set the second alone.
    """
    return stage or (2 if origin else 1)


def number_of(label: str) -> int:
    """Of a label of ``stage_of``."""
    return 1 if label == "dense" else int(label.removeprefix("stage"))


def name_of(label: str) -> str:
    """A label of ``stage_of`` as people read it: ``Stage 2``."""
    return label if label == "dense" else f"Stage {number_of(label)}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` in step order, the later of a step logged twice; torn lines are skipped.

    Training and validation records of one step stay apart: the former have ``loss``, the latter ``validation_loss``.
    Samples of text are left out.
    """
    records: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if "sample" not in record:
                records[record["step"], "validation_loss" in record] = record
        except (ValueError, TypeError, KeyError):
            continue
    return [records[key] for key in sorted(records)]


def usual_rate(records: Iterable[Mapping[str, Any]]) -> float:
    """Tokens per second of training records: the median, so that compilation, validation and checkpoints do not count.

    Some of the steps may be dense ones (``lighthouse.dense_every``), which a median would not see. Then it is the rate
    of as many steps as there are, each at the median of its kind: of the lines with as many dense steps.
    """
    kinds: dict[int, list[float]] = {}
    for record in records:
        kinds.setdefault(record.get("dense_steps", 0), []).append(record["tokens_per_second"])
    medians = [median(rates) for rates in kinds.values()]
    return medians[0] if len(kinds) == 1 else harmonic_mean(medians, [len(rates) for rates in kinds.values()])


def mean_loss(losses: Mapping[int, float], step: int, window: int, after: int = 0) -> float:
    """The mean of the losses logged in the ``window`` steps up to ``step``, those at or before ``after`` left out.

    Args:
        losses: step to loss in nats per token.
        after: the last step of Stage 1, so that a mean of dense steps does not reach across the switch.
    """
    first = max(step - window, after)
    return fmean(loss for at, loss in losses.items() if first < at <= step)


def recovered_after(losses: Mapping[int, float], switch: int, window: int) -> int | None:
    """Dense steps after which a resumed run is back at Stage 1's last level; None while it is not.

    Both are means over ``window`` steps (``mean_loss``), none across the switch; a run has recovered at the first
    logged dense step, from the ``SOONEST_RECOVERY``-th on (or the window's length, if shorter), whose mean is not
    above the mean at the switch.

    Args:
        losses: step to loss, both stages.
        switch: Stage 1's last step.
    """
    level = mean_loss(losses, switch, window)
    soonest = switch + min(window, SOONEST_RECOVERY)
    for step in sorted(losses):
        if step >= soonest and step > switch and mean_loss(losses, step, window, after=switch) <= level:
            return step - switch
    return None
