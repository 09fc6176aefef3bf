"""Which layers a model looks back with; ``look_back`` is the command and says what is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torchtitan.experiments.lighthouse.evaluation import positions
from torchtitan.experiments.lighthouse.model.model import LighthouseLlamaAttention, LighthouseTransformer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchtitan.experiments.lighthouse.job_config import MergedConfig


@dataclass
class Finding:
    """Losses in nats per token."""

    window: int
    """Tokens that a limited layer sees, its own included"""
    dense: float
    limited: list[float]
    """Of each layer, the loss when that layer alone is limited"""
    least: float
    """By how much the loss must rise for a layer to look back"""
    others_limited: float = 0.0
    """The loss when all layers are limited that do not look back"""

    @property
    def look_back(self) -> list[int]:
        return [layer for layer, loss in enumerate(self.limited) if loss - self.dense >= self.least]

    @property
    def others(self) -> list[int]:
        return [layer for layer in range(len(self.limited)) if layer not in self.look_back]


def load(checkpoint: Path, settings: MergedConfig, window: int, device: torch.device) -> LighthouseTransformer:
    """The run's model, every layer of which ``limited_to_window`` can limit; dense until then.

    Args:
        settings: the run's; they become those of the model.
        window: tokens, a multiple of ``WINDOW_STEP``.
    """
    settings.lighthouse = replace(
        settings.lighthouse,
        enable=True,
        layers="0--1",
        selection="none",
        local_window=window,
        combine="sum",
        dense_every=0,
    )
    model = positions.load(checkpoint, settings, dense=False, device=device)
    for attention in attentions(model):
        attention.through_lighthouse = False
    return model


def attentions(model: LighthouseTransformer) -> list[LighthouseLlamaAttention]:
    return [cast(LighthouseLlamaAttention, cast(nn.Module, block.attention)) for block in model.layers.values()]


@contextmanager
def limited_to_window(model: LighthouseTransformer, layers: Collection[int]) -> Iterator[None]:
    """Meanwhile, these layers see their last tokens only."""
    limited = [attention for layer, attention in enumerate(attentions(model)) if layer in layers]
    for attention in limited:
        attention.through_lighthouse = True
    try:
        yield
    finally:
        for attention in limited:
            attention.through_lighthouse = False


def find(model: LighthouseTransformer, window: int, least: float, loss_of: Callable[[], float]) -> Finding:
    """Limit one layer after the other, then all that do not look back.

    Args:
        model: from ``load``, with the same window.
        loss_of: the model's held-out loss, in nats per token.
    """

    def limited(*layers: int) -> float:
        with limited_to_window(model, layers):
            return loss_of()

    found = Finding(window, limited(), [limited(layer) for layer in range(len(model.layers))], least)
    found.others_limited = limited(*found.others)
    return found


def as_setting(layers: Collection[int]) -> str:
    """0, 1, 2, 5 to ``"0-2,5"``, as in [lighthouse] layers."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][-1] + 1:
            ranges[-1].append(layer)
        else:
            ranges.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in ranges)


def table(found: Finding) -> str:
    lines = [f"{'layer':>6}  nats/token  more than dense"]
    for layer, loss in enumerate(found.limited):
        note = "  looks back" if layer in found.look_back else ""
        lines.append(f"{layer:>6}  {loss:>10.4f}  {loss - found.dense:>+15.4f}{note}")
    return "\n".join(lines)


def conclusion(found: Finding) -> str:
    """What follows for [lighthouse] layers."""
    if not found.look_back:
        return (
            f"No layer looks back further than {found.window:,} tokens for as much as {found.least} nats. All limited "
            f"together: {found.others_limited:.4f} ({found.others_limited - found.dense:+.4f})."
        )
    if not found.others:
        return f"Every layer looks back further than {found.window:,} tokens."
    several = len(found.look_back) > 1
    return (
        f"Layer{'s' if several else ''} {as_setting(found.look_back)} look{'' if several else 's'} back further than "
        f"{found.window:,} tokens. All others limited together: {found.others_limited:.4f} "
        f"({found.others_limited - found.dense:+.4f}).\n"
        f'To keep dense what looks back: [lighthouse] layers = "{as_setting(found.others)}"'
    )
