"""Several datasets as one: each has its share of the text, drawn by a seed, and read on from any place.

In each draw one dataset is chosen, with its weight as the probability, and may give ``TURN`` bytes of text more than
before. It gives documents as long as it may, and what the last one has too much is taken off the next draws. So the
shares are those of the text, in bytes, and not of the documents, whose lengths differ from dataset to dataset.

A draw follows from the seed and its number alone. A place holds that number, what each dataset may still give, and
where each goes on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torchtitan.experiments.lighthouse.data.documents import FileDocuments, Place, draw
from torchtitan.experiments.lighthouse.errors import DataError

#: Bytes of text for each draw: a few short documents.
TURN = 1 << 13


class MixedPlace(NamedTuple):
    """A document by its number, and what it takes to read on from it; or a token of it."""

    number: int
    """Documents of all datasets before it"""
    token: int
    dataset: int
    """That it is of"""
    draws: int
    """Made before it"""
    left: tuple[int, ...]
    """Bytes that each dataset may still give, this document not taken off"""
    places: tuple[Place | None, ...]
    """Where each dataset goes on: with this document, or one that comes later; None for one that has no more"""

    @property
    def document(self) -> MixedPlace:
        return self._replace(token=0)

    @property
    def skipped(self) -> int:
        return sum(place.skipped for place in self.places if place is not None)

    @property
    def short(self) -> int:
        return sum(place.short for place in self.places if place is not None)

    def as_json(self) -> list[Any]:
        return [*self[:-1], [place if place is None else place.as_json() for place in self.places]]


@dataclass(frozen=True)
class Mixture:
    """``Documents`` of several datasets."""

    datasets: Sequence[FileDocuments]
    weights: Sequence[float]
    """Positive; only their ratios count."""
    seed: int = 0

    @property
    def name(self) -> str:
        return " + ".join(dataset.name for dataset in self.datasets)

    @property
    def order(self) -> str:
        of_each = self.datasets[0]  # All have the same settings, but for their weights.
        seed = [] if of_each.shuffling.buffer else [f"data_seed={self.seed}"]
        shares = ", ".join(f"{weight / sum(self.weights):g}" for weight in self.weights)
        return ", ".join([*seed, *filter(None, [of_each.order]), f"mixture by {shares}"])

    def place(self, saved: list[Any]) -> MixedPlace:
        number, token, dataset, draws, left, places = saved
        of_each = tuple(place if place is None else Place(*place) for place in places)
        return MixedPlace(number, token, dataset, draws, tuple(left), of_each)

    def read_from(self, start: MixedPlace | None) -> Iterator[tuple[MixedPlace, str]]:
        """
        Raises:
            DataError: as each dataset's own.
        """
        number = 0 if start is None else start.number
        draws = 0 if start is None else start.draws
        left = [0] * len(self.datasets) if start is None else [*start.left]
        begins = [None] * len(self.datasets) if start is None else start.places
        ended = [start is not None and place is None for place in begins]
        readers = [
            iter(()) if at_end else dataset.read_from(place)
            for dataset, place, at_end in zip(self.datasets, begins, ended, strict=True)
        ]
        following = [next(reader, None) for reader in readers]
        bounds = [*accumulate(self.weights)]
        chosen = None if start is None else start.dataset
        while any(document is not None for document in following):
            if chosen is None:
                at = draw("mixture", self.seed, draws) / 2**64 * bounds[-1]
                chosen = min(bisect_right(bounds, at), len(bounds) - 1)
                draws += 1
                left[chosen] += TURN
            while left[chosen] > 0 and (document := following[chosen]) is not None:
                places = tuple(each if each is None else each[0] for each in following)
                yield MixedPlace(number, 0, chosen, draws, tuple(left), places), document[1]
                number += 1
                left[chosen] -= len(document[1].encode()) or 1
                following[chosen] = next(readers[chosen], None)
            if following[chosen] is None:
                left[chosen] = 0  # It gives nothing any more.
            chosen = None

    def changed(self, place: MixedPlace) -> DataError:
        own = place.places[place.dataset]
        assert own is not None
        return self.datasets[place.dataset].changed(own)
