"""The training data loader: batches from the streams of ``streams``, and the data position as a checkpoint holds it.

A checkpoint holds, whoever saved it, these keys, each a string of JSON:

    dataloader.streams      ``Header``
    dataloader.stream_0 …   where stream 0 goes on, or ``null`` where it has not begun: ``[epoch, file, record, token]``
                            and what else ``Place`` or ``MixedPlace`` has, as far as it is not 0

Each rank writes those of its own streams and reads those of its own. Nothing is exchanged between ranks.

Older versions saved ``dataloader.dp_rank_0 …``: one reader per rank, with documents of its own. Such a run goes on as
it was, with as many ranks, and saves the same keys again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.experiments.lighthouse.data.documents import Documents, Place
from torchtitan.experiments.lighthouse.data.streams import AnyPlace, Batch, StreamDataset
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.tools.logging import logger

HEADER = "streams"


@dataclass(frozen=True)
class Header:
    """What a data position says beside the places of its streams."""

    streams: int
    """V"""
    next_stream: int
    """The one that gives the next sequence."""
    tokens_seen: int
    """By all ranks, from the start of the run."""
    tokens_per_step: int
    ranks: int
    """Data-parallel ranks that read so far: the next run starts as many where nobody says otherwise."""
    order: str = ""
    """Settings on which the meaning of a place depends, as ``Documents.order``"""

    def as_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value != ""})

    @classmethod
    def from_json(cls, text: str) -> Header:
        saved = json.loads(text)
        numbers = {name: int(saved[name]) for name in cls.__dataclass_fields__ if name != "order"}
        return cls(**numbers, order=saved.get("order", ""))


def stream_key(stream: int) -> str:
    return f"stream_{stream}"


def streams_in(keys: Collection[str]) -> int:
    """V of a data position with these keys; 0 for one of an older version, or none."""
    return sum(re.fullmatch(r"stream_\d+", key) is not None for key in keys)


def ranks_in(keys: Collection[str]) -> int:
    """Ranks that an older version saved a data position of; 0 for one of today's, or none."""
    return sum(re.fullmatch(r"dp_rank_\d+", key) is not None for key in keys)


def nearest_divisors(number: int, to: int) -> list[int]:
    """The largest divisor of ``number`` that is not above ``to``, and the smallest that is not below it."""
    below = next(n for n in range(min(to, number), 0, -1) if number % n == 0)
    above = next((n for n in range(to, number + 1) if number % n == 0), below)
    return sorted({below, above})


def batches_of(dataset: StreamDataset, workers: dict[str, Any]) -> Iterable[Batch]:
    """Read by so many data workers as the settings of a section's [dataloader] say."""
    settings = {name: value for name, value in workers.items() if value is not None}
    if not settings.get("num_workers"):
        for name in ("persistent_workers", "prefetch_factor"):
            settings.pop(name, None)
    # Without a generator of its own the loader would draw from the process's.
    return DataLoader(dataset, batch_size=None, collate_fn=_unchanged, generator=torch.Generator(), **settings)


class StreamLoader(BaseDataLoader):
    """Endless batches of one data-parallel rank, ``({"input": [B, N] int64}, labels [B, N] int64)``."""

    def __init__(
        self,
        documents: Documents,
        encode: Callable[[str], Iterable[list[int]]],
        by_rank: Callable[[], ParallelAwareDataloader],
        *,
        seq_len: int,
        batch_size: int,
        global_batch_size: int,
        rank: int,
        ranks: int,
        workers: dict[str, Any],
    ) -> None:
        """
        Args:
            by_rank: makes the loader of older versions, for a checkpoint of theirs.
            global_batch_size: sequences per step; as in upstream's setting, a negative one is what the ranks take at
                once.
            workers: the settings of [training.dataloader].
        """
        self._documents, self._encode, self._by_rank = documents, encode, by_rank
        self._seq_len, self._batch_size = seq_len, batch_size
        self._rank, self._ranks, self._workers = rank, ranks, workers
        self._batch_follows_ranks = global_batch_size < 0
        sequences = batch_size * ranks if self._batch_follows_ranks else global_batch_size
        self._tokens_per_step = sequences * seq_len
        self._streams, self._next_stream = sequences, 0
        self._places: dict[int, AnyPlace] = {}
        #: Tokens that all ranks together have been given since the run began.
        self.tokens_seen = 0
        #: Whether a data position of today's kind was loaded.
        self.resumed = False
        self._older: ParallelAwareDataloader | None = None
        self._keys_to_load: list[str] | None = None

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        if self._older is not None:
            yield from self._older
            return
        dataset = self._dataset()
        self._warn_of_idle_workers(dataset)
        for inputs, labels, places in batches_of(dataset, self._workers):
            # What workers have read ahead does not count: the position is that of the batches handed out.
            self._places |= places
            self._next_stream = (self._next_stream + len(labels) * self._ranks) % self._streams
            self.tokens_seen += labels.numel() * self._ranks
            yield {"input": inputs}, labels

    def _dataset(self) -> StreamDataset:
        return StreamDataset(
            self._documents,
            self._encode,
            seq_len=self._seq_len,
            batch_size=self._batch_size,
            rank=self._rank,
            ranks=self._ranks,
            streams=self._streams,
            next_stream=self._next_stream,
            places=dict(self._places),
        )

    def _warn_of_idle_workers(self, dataset: StreamDataset) -> None:
        workers = self._workers.get("num_workers", 0)
        needed = [dataset.streams_of_worker(worker, workers) for worker in range(workers)]
        if sum(map(len, needed)) > len(set().union(*needed)):
            logger.warning(
                f"training.dataloader.num_workers={workers}: some of them cut the same documents into tokens, because "
                f"this rank's {self._streams // self._ranks} stream(s), {self._batch_size} at a time, cannot be shared "
                "out among them"
            )

    @property
    def tokens_seen_by_rank(self) -> int:
        """This rank's share of ``tokens_seen``; those of all ranks add up to it."""
        each, rest = divmod(self.tokens_seen, self._ranks)
        return each + (self._rank < rest)

    @property
    def bad_records(self) -> int:
        """How many were skipped in this epoch so far, as this rank's streams have come."""
        return self._furthest.skipped

    @property
    def short_documents(self) -> int:
        """How many were dropped because they are too short, likewise."""
        return self._furthest.short

    @property
    def _furthest(self) -> AnyPlace:
        places: Iterable[Any] = self._places.values()
        return max(places, default=Place(0, 0, 0))

    def _own_streams(self) -> range:
        return range(self._rank, self._streams, self._ranks)

    # The data position in a checkpoint

    def prepare_to_load(self, keys: Collection[str]) -> None:
        """Take over the number of streams, or an older version's way, from a data position that is to be loaded.

        ``state_dict`` is asked before ``load_state_dict`` which keys to read. After this it names those.

        Args:
            keys: all keys of the position, without their common ``dataloader.``.

        Raises:
            Refused: where that position cannot be read on so many ranks.
        """
        if older := ranks_in(keys):
            if older != self._ranks:
                raise Refused(
                    f"{self._ranks} data-parallel rank(s): an older version saved this data position, which is that of "
                    f"{older}; nearest valid value: {older}. To give it up: "
                    "--checkpoint.exclude_from_loading dataloader"
                )
            self._older = self._by_rank()
        elif streams := streams_in(keys):
            self._take_over(streams)
            self._keys_to_load = [HEADER, *map(stream_key, self._own_streams())]

    def _take_over(self, streams: int) -> None:
        if streams % self._ranks:
            nearest = " or ".join(map(str, nearest_divisors(streams, self._ranks)))
            raise Refused(
                f"{self._ranks} data-parallel rank(s): must divide the {streams} streams of the data position; "
                f"nearest valid value: {nearest}. To give it up: --checkpoint.exclude_from_loading dataloader"
            )
        self._streams = streams

    def state_dict(self) -> dict[str, Any]:
        if self._older is not None:
            return self._older.state_dict()
        if self._keys_to_load is not None:
            return dict.fromkeys(self._keys_to_load, "")
        so_far = (self._streams, self._next_stream, self.tokens_seen, self._tokens_per_step, self._ranks)
        header = Header(*so_far, self._documents.order)
        places = {stream_key(stream): _place_as_json(self._places.get(stream)) for stream in self._own_streams()}
        return {HEADER: header.as_json(), **places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            Refused: for a position that cannot be read on so many ranks, or where their number would change the
                global batch.
        """
        if self._older is None and ranks_in(state_dict):
            self.prepare_to_load(state_dict)
        if self._older is not None:
            self._older.load_state_dict(state_dict)
            return
        if HEADER not in state_dict:  # An empty position is valid, for upstream.
            return
        self._keys_to_load = None
        header = Header.from_json(state_dict[HEADER])
        self._take_over(header.streams)
        if missing := [key for key in map(stream_key, self._own_streams()) if key not in state_dict]:
            # Upstream's own checkpoint manager does not call ``prepare_to_load``.
            raise Refused(
                f"the data position has {header.streams} streams, and {missing[0]} was not read: resume this run with "
                "-m torchtitan.experiments.lighthouse.train, or with as many sequences per step as at its start"
            )
        if header.order != (here := self._documents.order):
            was, now = header.order or "that of the files", here or "that of the files"
            raise Refused(
                f"the data position is in another order of the documents, {was}, than that of the settings, {now}; "
                f"nearest valid value: {was}. To give it up: --checkpoint.exclude_from_loading dataloader"
            )
        if self._batch_follows_ranks and header.tokens_per_step != self._tokens_per_step:
            raise Refused(
                f"training.global_batch_size=-1: a step would have {self._tokens_per_step:,} tokens on {self._ranks} "
                f"data-parallel rank(s), and it had {header.tokens_per_step:,} on {header.ranks}; nearest valid value: "
                f"{max(1, header.tokens_per_step // self._seq_len)}"
            )
        self._next_stream, self.tokens_seen = header.next_stream, header.tokens_seen
        saved = {stream: json.loads(state_dict[stream_key(stream)]) for stream in self._own_streams()}
        self._places = {stream: self._documents.place(place) for stream, place in saved.items() if place is not None}
        self.resumed = True


def _place_as_json(place: AnyPlace | None) -> str:
    return json.dumps(place if place is None else place.as_json())


def _unchanged(batch: Any) -> Any:
    return batch
