"""A run whose number of ranks changes: compared to rounding, and the data position exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from faults.chain import Chain, Outcome, Reference, Setup, logged

#: Two runs without faults, on one and on two ranks, add up the same sequences in another order. How far they are apart
#: at a step is what rounding makes of it by then. A run that changes ranks rounds like one of them up to some step, and
#: like the other after it: it is as far from either as they are from each other, but for chance.
ROOM_FOR_CHANCE = 3


class ElasticChain(Chain):
    """
    Args:
        reference: on as many ranks as ``setup``.
        other: the same on another number.
    """

    def __init__(self, folder: Path, setup: Setup, reference: Reference, other: Reference) -> None:
        super().__init__(folder, setup, reference)
        self.other = other
        self.shares = ""

    def compare(self, outcome: Outcome, since: int) -> Outcome:
        outcome = super().compare(outcome, since)
        outcome.what += self.shares
        return outcome

    def unequal(self, ours: dict[str, Any], step: int) -> list[str]:
        theirs, others = self.reference.state(step), self.other.state(step)
        found = []
        if positions(ours) != positions(theirs):
            found.append("data position")
        apart, allowed = distance(ours, theirs), distance(others, theirs)
        if apart > ROOM_FOR_CHANCE * allowed:
            found.append(f"weights ({apart:.1e} apart, {allowed:.1e} by rounding)")
        whole, other = self.reference.losses, self.other.losses
        lines = [(at, loss) for at, (loss, _) in logged(self.folder)]
        furthest = max(abs(loss - whole[at][0]) for at, loss in lines)
        rounding = max(abs(other[at][0] - whole[at][0]) for at, _ in lines)
        if furthest > ROOM_FOR_CHANCE * rounding:
            found.append(f"losses ({furthest:.1e} apart, {rounding:.1e} by rounding)")
        self.shares = f" (weights {apart:.1e} apart, by rounding {allowed:.1e}; losses {furthest:.1e}, {rounding:.1e})"
        return found


def positions(state: dict[str, Any]) -> dict[str, Any]:
    """Where the streams go on; who read them so far may differ."""
    position = dict(state["dataloader"])
    header = json.loads(position.pop("streams"))
    return position | {name: value for name, value in header.items() if name != "ranks"}


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Root mean square over all weights of the difference."""
    weights = [key for key, value in theirs.items() if isinstance(value, torch.Tensor)]
    squares = sum(float((ours[key] - theirs[key]).double().square().sum()) for key in weights)
    return (squares / sum(theirs[key].numel() for key in weights)) ** 0.5
