"""Do logits depend on later tokens? ``check_causality`` is the command and says what is measured."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.evaluation.positions import CHUNK_LOGITS
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer

from lighthouse import LighthouseConfig

#: Sums in a layer that follow one another: queries and keys, their products, the mean of the values, the attention's
#: output, and two of the feed-forward network.
SUMS_PER_LAYER = 6


@dataclass(frozen=True)
class Spot:
    """A position t after which every token is replaced."""

    t: int
    where: str
    """Why this one, in words"""


@dataclass(frozen=True)
class Finding:
    """What the replacements after one t did to the logits up to t."""

    t: int
    where: str
    largest: float
    """How far a logit moved, at most, over all replacements"""
    moved: int
    """How many positions had a logit that moved, at most"""

    def verdict(self, rounding: float) -> str:
        if self.largest == 0:
            return "exact"
        return "rounding" if self.largest <= rounding else "NOT CAUSAL"


@dataclass(frozen=True)
class Result:
    findings: list[Finding]
    tries: int
    repeat: float
    """How far a logit moved when the same text was computed again"""
    rounding: float
    """How far rounding alone may move a logit"""

    @property
    def largest(self) -> float:
        return max(finding.largest for finding in self.findings)

    @property
    def leaks(self) -> list[Finding]:
        """Where logits moved by more than rounding."""
        return [finding for finding in self.findings if finding.largest > self.rounding]


def choose_spots(seq_len: int, count: int, config: LighthouseConfig, seed: int) -> list[Spot]:
    """Up to ``count`` different positions, ascending: drawn from the whole sequence, and beside borders.

    A border is the first position of a tile or of a coarsest window. Positions one before it, on it and one after it
    are chosen.
    """
    draw = random.Random(seed)
    drawn = draw.sample(range(seq_len - 1), min(count, seq_len - 1))
    # First, so that a small count holds one: one before a tile's border even the published selection is causal.
    kinds = [[Spot(t, "drawn") for t in drawn]]
    # At least 1: a dense run's settings need not fit its length.
    tile, window = max(1, seq_len // config.num_tiles), config.pooling_factor ** (config.num_levels - 1)
    of_tiles = range(tile, seq_len, tile)
    of_windows = [border for border in range(window, seq_len, window) if border % tile]
    for name, borders in (("tile", of_tiles), ("coarsest window", of_windows)):
        chosen = draw.sample(borders, min(count, len(borders)))
        for offset, word in ((-1, "before"), (0, "on"), (1, "after")):
            kinds.append([Spot(border + offset, f"{word} the border of a {name}") for border in chosen])
    spots: dict[int, Spot] = {}
    for turn in zip_longest(*kinds):  # one of each kind, then the next of each
        for spot in turn:
            # After the last position there is nothing to replace.
            if spot is not None and spot.t < seq_len - 1 and len(spots) < count:
                spots.setdefault(spot.t, spot)
    return [spots[t] for t in sorted(spots)]


def random_texts(vocab_size: int, seq_len: int, count: int, seed: int) -> list[Tensor]:
    """``count`` sequences of random tokens, each [1, N] int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (1, seq_len), generator=generator) for _ in range(count)]


@torch.inference_mode()
def check(
    model: LighthouseTransformer,
    text: Tensor,
    others: Sequence[Tensor],
    spots: Iterable[Spot],
    found: Callable[[Finding, float], None] = lambda finding, rounding: None,
) -> Result:
    """Replace every token of ``text`` after each spot by those of each of ``others``; look at the logits up to it.

    Every forward pass has the shape of the first one, and so the same kernels in the same order: a row that does not
    depend on what was replaced is equal to the bit, except where a kernel's own rounding depends on its neighbours.

    Args:
        text: [1, N] int64, on the model's device; the others too.
        found: called with each finding as soon as it is there, and how far rounding alone may move a logit.

    Raises:
        Refused: if the logits are not finite, or differ by more than rounding when nothing was replaced.
    """
    before = _hidden_states(model, text)
    rounding = rounding_of(model, before)
    repeat, _ = largest_move(model, before, _hidden_states(model, text))
    if repeat > rounding:
        raise Refused(
            f"the same text twice moves logits by {repeat:.2g}, and rounding may move them by {rounding:.2g}: this "
            "device does not repeat itself, so nothing can be told"
        )
    findings = []
    for spot in spots:
        largest, moved = 0.0, 0
        for other in others:
            after = _hidden_states(model, replace_after(spot.t, text, other, model.output.weight.shape[0]))
            up_to = slice(spot.t + 1)
            here, positions = largest_move(model, before[:, up_to], after[:, up_to])
            largest, moved = max(largest, here), max(moved, positions)
        findings.append(Finding(spot.t, spot.where, largest, moved))
        found(findings[-1], rounding)
    return Result(findings, len(others), repeat, rounding)


def replace_after(t: int, text: Tensor, other: Tensor, vocab_size: int) -> Tensor:
    """``text`` up to t, then ``other``; where both hold the same token, the next one of the vocabulary."""
    different = torch.where(other == text, (other + 1) % vocab_size, other)
    return torch.cat([text[:, : t + 1], different[:, t + 1 :]], dim=1)


def largest_move(model: LighthouseTransformer, before: Tensor, after: Tensor) -> tuple[float, int]:
    """How far a logit moves, at most, and how many positions have one that moves.

    Only hidden states that differ are projected: the logits of equal ones are equal. And only some at a time: all
    logits of 98,304 tokens over 128,256 words would be 50 GB.

    Args:
        before, after: [1, n, dim], hidden states before the norm.
    """
    different = (before != after).any(-1)
    largest, moved = 0.0, 0
    for old, new in zip(_chunks(model, before[different]), _chunks(model, after[different]), strict=True):
        distance = (_logits(model, new) - _logits(model, old)).abs().amax(-1)
        largest, moved = max(largest, distance.max().item()), moved + int((distance > 0).sum())
    return largest, moved


def rounding_of(model: LighthouseTransformer, hidden: Tensor) -> float:
    """How far rounding alone may move a logit of these hidden states [1, N, dim].

    A sum of d products in float32 is off by about √d · 2⁻²⁴ of its size. The sums of all layers follow one another, so
    there are √(6 · layers) times that, and the size is that of the largest logit. What later tokens changed in the
    selection moved logits by 50 to 100 times as much in random weights at 530M, by thousands in a small trained run.
    """
    scale = max(_logits(model, rows).abs().max().item() for rows in _chunks(model, hidden.flatten(0, 1)))
    sums = SUMS_PER_LAYER * len(model.layers)
    return scale * math.sqrt(sums * hidden.shape[-1]) * torch.finfo(torch.float32).eps / 2


def _hidden_states(model: LighthouseTransformer, text: Tensor) -> Tensor:
    hidden = model.hidden_states(text)
    # A NaN is above no bound: it must not pass for a logit that stays.
    if not hidden.isfinite().all():
        raise Refused("the model's logits are not finite: its weights are damaged, or overflow at this length")
    return hidden


def _chunks(model: LighthouseTransformer, rows: Tensor) -> Sequence[Tensor]:
    """Rows [n, dim] in parts whose logits fit; none of no rows."""
    return rows.split(max(128, CHUNK_LOGITS // model.output.weight.shape[0])) if len(rows) else []


def _logits(model: LighthouseTransformer, rows: Tensor) -> Tensor:
    logits: Tensor = model.output(model.norm(rows))
    return logits


def attention_of(config: LighthouseConfig | None) -> str:
    """The attention in words; None is dense."""
    if config is None:
        return "dense"
    window = f", window {config.local_window}" if config.local_window else ""
    merged = "" if config.combine == "sum" else f", {config.combine}"
    return f"Lighthouse, {config.selection}{window}{merged}"


TABLE_HEAD = (
    "| attention | t | which t | largest move up to t | times rounding | positions that move | |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def table_row(found: Finding, rounding: float, attention: str) -> str:
    """One finding as a line of the Markdown table under ``TABLE_HEAD``."""
    times = found.largest / rounding
    return (
        f"| {attention} | {found.t:,} | {found.where} | {found.largest:.2g} "
        f"| {times:{',.0f' if times >= 10 else '.2g'}} | {found.moved:,} | {found.verdict(rounding)} |"
    )


def conclusion(result: Result) -> str:
    """The verdict in one line of plain English."""
    count = len(result.findings)
    rounding = f"Rounding may move them by {result.rounding:.2g}."
    if result.leaks:
        return (
            f"Not causal: at {len(result.leaks)} of {count} t, logits up to t moved when the tokens after t were "
            f"replaced, by up to {result.largest:.2g}. {rounding}"
        )
    if result.largest > 0:
        return (
            f"Causal up to rounding: at {count} of {count} t, logits up to t moved by at most {result.largest:.2g}. "
            f"{rounding}"
        )
    return (
        f"Causal, exactly: at {count} of {count} t, no logit up to t moved when the tokens after t were replaced "
        f"(tries for each t: {result.tries})."
    )
