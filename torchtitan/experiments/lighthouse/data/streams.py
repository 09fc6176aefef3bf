"""The order of the training tokens, which does not depend on how many processes read them.

A run deals its documents out to V streams. V is the number of sequences in a global batch when the run starts, and
stays the same from then on, through every resume and every stage.

- **Documents.** Document number i is dealt to stream i mod V. They are counted in the order in which they are read,
  from one dataset (``documents``) or several (``mixture``), and the count goes on where the files begin anew. What is
  no document to train on (a bad record, one that is too short or held out) is passed over by all ranks, and the next
  document takes its number.
- **Tokens.** A stream is its documents end to end, each with its begin and end of text.
- **Sequences.** Sequence number n of the run is cut from stream n mod V: the next N + 1 tokens there, of which the last
  is only a label. A step takes the next B sequences, by number.
- **Ranks.** Rank r of R reads the sequences n with n mod R = r. R divides V, so these come from the streams r, r + R, …
  that no other rank needs. R divides B, so a step has as many sequences on every rank. A step's sequences are the same
  on any number of ranks. Which rank has which, and in which order they are added up, is not.
- **Context.** Another context changes N and B, never V: the streams go on with their very next tokens, in turn. With
  B < V a step takes from B of them, and the next step from the B after those.
- **Position.** For each stream, the place of the document that it is reading, and how many of its tokens are used; and
  which stream gives the next sequence. The count i is not needed: the document that a stream is reading is one of its
  own.

The ranks of one sequence (context and tensor parallelism) read the same streams. The data workers of a rank share its
batches out among them, and change nothing: each batch carries the position after it.

A rank reads each file once, from start to end, whatever the number of its streams. It cuts only its own documents into
tokens, and keeps the text of those that come before their stream needs them: documents differ in length, so one stream
uses more of them than another. What is kept grows like the square root of the number of documents. Where many short
sequences became few long ones, so that V is much larger than B, it is also what the other streams will use before it is
the first one's turn again. ``MOST_TEXT_KEPT`` bounds it: beyond it, the streams that have most text forget it and read
the files for themselves later.

All ranks read all files, because documents are dealt out and not files: R ranks read R times what one rank does, and
download it R times where the files are on the Hub.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchtitan.experiments.lighthouse.data.documents import Documents, Place
from torchtitan.experiments.lighthouse.data.mixture import MixedPlace
from torchtitan.tools.logging import logger

#: Characters of text that a process keeps for streams that do not need it yet.
MOST_TEXT_KEPT = 1 << 30

#: What documents have as places depends on their kind; in one run all are alike.
AnyPlace = Place | MixedPlace


class Batch(NamedTuple):
    inputs: Tensor
    """[B, N] int64"""
    labels: Tensor
    """[B, N] int64"""
    places: dict[int, AnyPlace]
    """Where the streams of these sequences go on after them."""


class _Reader:
    """Reads the files once for several streams, and keeps what it deals to each until that one asks for it."""

    def __init__(self, documents: Documents, streams: int, first: dict[int, Any]) -> None:
        """
        Args:
            streams: V.
            first: the streams to read for, and the first document that each of them wants, None for its very first.
        """
        self._documents, self._streams = documents, streams
        self._kept: dict[int, deque[tuple[AnyPlace, str]]] = {stream: deque() for stream in first}
        self._first = {stream: place for stream, place in first.items() if place is not None}
        if len(self._first) == len(first):
            start, self._owner = min((place, stream) for stream, place in self._first.items())
        else:
            start, self._owner = None, 0
        self._rest = documents.read_from(start)
        self.text_kept = 0

    def next(self, stream: int) -> tuple[AnyPlace, str] | None:
        """The stream's next document and its place, or None where they have come to an end."""
        kept = self._kept[stream]
        while not kept:
            if (document := next(self._rest, None)) is None:
                return None
            self._deal(*document)
        place, text = kept.popleft()
        self.text_kept -= len(text)
        return place, text

    def _deal(self, place: Any, text: str) -> None:
        owner = self._owner
        self._owner = (owner + 1) % self._streams
        if (first := self._first.get(owner)) is not None:
            if place < first:
                return
            del self._first[owner]
            if place != first:
                raise self._documents.changed(first)
        if owner in self._kept:
            self._kept[owner].append((place, text))
            self.text_kept += len(text)

    def split(self) -> tuple[list[int], _Reader]:
        """Forget what half of the streams with documents here have, those that are furthest behind.

        Returns:
            These streams, and a reader that will read the same for them again.
        """
        waiting = sorted((kept[0][0], stream) for stream, kept in self._kept.items() if kept)
        behind = {stream: place for place, stream in waiting[: -(-len(waiting) // 2)]}
        for stream in behind:
            self.text_kept -= sum(len(text) for _, text in self._kept.pop(stream))
        return list(behind), _Reader(self._documents, self._streams, dict(behind))


class _Readers:
    """The documents of several streams. One reader for all, as long as it need not keep too much."""

    def __init__(self, documents: Documents, streams: int, first: dict[int, Any]) -> None:
        reader = _Reader(documents, streams, first)
        self._readers = [reader]
        self._of = dict.fromkeys(first, reader)

    def next(self, stream: int) -> tuple[AnyPlace, str] | None:
        document = self._of[stream].next(stream)
        while sum(reader.text_kept for reader in self._readers) > MOST_TEXT_KEPT:
            behind, reader = max(self._readers, key=lambda reader: reader.text_kept).split()
            self._readers.append(reader)
            self._of |= dict.fromkeys(behind, reader)
            logger.info(f"Documents wait for {len(behind)} streams: they read the files for themselves")
        return document


class _Stream:
    """The tokens of one stream, in pieces of any length."""

    def __init__(
        self, start: AnyPlace | None, next_document: Callable[[], tuple[AnyPlace, Iterator[Tensor]] | None]
    ) -> None:
        self._start, self._next_document = start, next_document
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._pieces: Iterator[Tensor] = iter(())
        self._document: AnyPlace = Place(0, 0, 0)
        self._used = 0

    @property
    def place(self) -> AnyPlace:
        return self._document._replace(token=self._used)

    def cut(self, length: int) -> Tensor | None:
        """The next ``length`` tokens, or None where there are not so many left."""
        parts: list[Tensor] = []
        while length:
            if not len(self._tokens) and not self._read_on():
                return None
            parts.append(self._tokens[:length])
            self._tokens = self._tokens[length:]
            self._used += len(parts[-1])
            length -= len(parts[-1])
        return torch.cat(parts)

    def _read_on(self) -> bool:
        while (tokens := next(self._pieces, None)) is None:
            if (document := self._next_document()) is None:
                return False
            self._document, self._pieces = document
            # The first document is the one that was being read when the position was saved.
            self._used = self._start.token if self._start is not None else 0
            self._start = None
        self._tokens = tokens
        return True


class StreamDataset(IterableDataset[Batch]):
    """The batches of one rank, from a position on; in a data worker, that worker's share of them."""

    def __init__(
        self,
        documents: Documents,
        encode: Callable[[str], Iterable[list[int]]],
        *,
        seq_len: int,
        batch_size: int,
        rank: int,
        ranks: int,
        streams: int,
        next_stream: int = 0,
        places: Mapping[int, AnyPlace] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            encode: from a document's text to its tokens, in pieces of any length.
            seq_len: N.
            batch_size: sequences that the rank takes at once.
            streams: V.
            next_stream: the one that gives the next sequence, of all ranks.
            places: where this rank's streams go on; those that are not named begin.
        """
        self._documents, self._encode = documents, encode
        self._seq_len, self._batch_size = seq_len, batch_size
        self._ranks, self._streams = ranks, streams
        # The first of the next R sequences that is this rank's.
        self._first = next_stream + (rank - next_stream) % ranks
        self._places = places

    def _streams_of(self, batch: int) -> list[int]:
        """The stream of each sequence of the rank's batch number ``batch``, counted from 0."""
        numbers = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        return [(self._first + number * self._ranks) % self._streams for number in numbers]

    def streams_of_worker(self, worker: int, workers: int) -> set[int]:
        """The streams of every ``workers``-th batch. Where two workers need the same ones, each reads them all."""
        # After so many batches of the worker at the latest, the same streams are up again.
        turns = self._streams // self._ranks
        return {stream for turn in range(turns) for stream in self._streams_of(worker + turn * workers)}

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        needed = sorted(self.streams_of_worker(worker, workers))
        first = {s: self._places[s].document if s in self._places else None for s in needed}
        readers = _Readers(self._documents, self._streams, first)
        streams = {s: _Stream(self._places.get(s), partial(self._tokens_of_next, readers, s)) for s in needed}
        for number in itertools.count():
            # Of another worker's batch, only what moves this one's streams on.
            wanted = [stream for stream in self._streams_of(number) if stream in streams]
            sequences: list[Tensor] = []
            places: dict[int, AnyPlace] = {}
            for stream in wanted:
                if (sequence := streams[stream].cut(self._seq_len + 1)) is None:
                    break
                sequences.append(sequence)
                places[stream] = streams[stream].place
            if number % workers == worker and sequences:
                inputs = torch.stack([sequence[:-1] for sequence in sequences])
                labels = torch.stack([sequence[1:] for sequence in sequences])
                yield Batch(inputs, labels, places)
            if len(sequences) < len(wanted):
                return

    def _tokens_of_next(self, readers: _Readers, stream: int) -> tuple[AnyPlace, Iterator[Tensor]] | None:
        if (document := readers.next(stream)) is None:
            return None
        place, text = document
        saved = self._places.get(stream)
        return place, self._pieces(text, saved if saved is not None and saved.document == place else place)

    def _pieces(self, text: str, place: AnyPlace) -> Iterator[Tensor]:
        """The document's tokens from ``place`` on."""
        used = place.token
        for piece in self._encode(text):
            if used < len(piece):
                yield torch.tensor(piece[used:], dtype=torch.int64)
            used = max(0, used - len(piece))
        if used:
            raise self._documents.changed(place)
