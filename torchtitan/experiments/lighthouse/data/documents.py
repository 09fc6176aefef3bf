"""The documents of one dataset, in their order, from any place on; which of them count, and how they are shuffled.

Everything here follows from the files, the settings and a place. Nothing depends on ranks, data workers, or on where a
run has stopped, and a place is a few numbers, whatever is kept in memory.

- **Which count.** A bad record is no document. Neither is one that is shorter than ``Choice.min_chars``, or one on the
  other side of ``Choice.held_out_share``: a document is held out where a hash of its text says so.
- **Shuffling.** Without a buffer the order is that of the files; in each epoch after the first the files have another
  order. With a buffer of S documents the files have an order of their own in every epoch, and every S documents of an
  epoch that follow each other are a block, whose order is drawn by its place and the seed. For each document that a
  block gives, one of the next block is read: S are in memory at any time. A place in a block is that of its first
  document and a count. To go on there, the block is read again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torchtitan.experiments.lighthouse.data.records import BadRecord, Skipping, one_of_all
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.tools.logging import logger
from xxhash import xxh3_64_intdigest


class Place(NamedTuple):
    """Where a stream goes on: at a token of a document, the document by epoch, file and record, all counted from 0.

    Files are counted in the epoch's order, and records that are passed over too.
    """

    epoch: int
    file: int
    record: int
    token: int = 0
    skipped: int = 0
    """Bad records before it in its epoch"""
    short: int = 0
    """Documents that were too short before it in its epoch"""
    turn: int = 0
    """In a block that begins at this document: how many of the block come before"""

    @property
    def document(self) -> Place:
        """Its beginning."""
        return self._replace(token=0)

    def as_json(self) -> list[Any]:
        """What is not there is 0. Older versions know the first five."""
        numbers = list(self)
        while len(numbers) > 4 and not numbers[-1]:
            numbers.pop()
        return numbers


class Documents(Protocol):
    """Documents in an order that can be read from any place; places are in the same order."""

    @property
    def name(self) -> str:
        """Of the dataset, for messages."""

    @property
    def order(self) -> str:
        """What a place means depends on it; empty where it is the files alone."""

    def read_from(self, start: Any) -> Iterator[tuple[Any, str]]:
        """Every document from a place on, or from the first, for None; with its place."""

    def place(self, saved: list[Any]) -> Any:
        """From what ``as_json`` of a place has given."""

    def changed(self, place: Any) -> DataError:
        """For a place at which there is not what there was."""


@dataclass(frozen=True)
class Choice:
    """Which documents count."""

    held_out_share: float = 0
    held_out: bool = False
    """Whether the held-out ones are those that are read, and not the others"""
    min_chars: int = 0

    def takes(self, text: str) -> bool:
        """Whether it is on the right side of the held-out share; its content alone decides."""
        if not self.held_out_share:
            return not self.held_out
        return (chance(text) < self.held_out_share) == self.held_out

    def __str__(self) -> str:
        parts = [f"of at least {self.min_chars:,} characters"] if self.min_chars else []
        if self.held_out_share:
            parts.append(f"that is {'' if self.held_out else 'not '}held out (a share of {self.held_out_share:g})")
        return "".join(f" {part}" for part in [" and".join(parts)] if part)


@dataclass(frozen=True)
class Shuffling:
    buffer: int = 0
    """Documents of a block; 0: in the order of the files"""
    seed: int = 0


def chance(text: str) -> float:
    """A number from 0 to below 1 that is the text's own."""
    return xxh3_64_intdigest(text.encode()) / 2**64


def draw(*key: object) -> int:
    """A number below 2^64 that is the key's own, on every machine and in every version."""
    return xxh3_64_intdigest(repr(key).encode())


def is_text(document: str) -> bool:
    """Whether a document has more than white space."""
    return bool(document) and not document.isspace()


class Drops:
    """Counts documents that are too short, and logs them: the first one, and whenever their number has a digit more."""

    def __init__(self, name: str, min_chars: int, logs: bool = True) -> None:
        self._name, self._min_chars, self._logs, self._logged = name, min_chars, logs, 0

    def drop(self, short: int) -> int:
        """
        Args:
            short: those before this one in the same pass.

        Returns:
            Their number, with this one.
        """
        short += 1
        if self._logs and short > self._logged and one_of_all():
            # Counts that were logged come again where files are read again.
            self._logged = short
            if short == 1 or len(str(short)) > len(str(short - 1)):
                what = f"{short:,} document(s) of fewer than {self._min_chars:,} characters"
                logger.info(f"Dataset {self._name}: dropped {what} so far")
        return short


@dataclass(frozen=True)
class FileDocuments:
    """Those of files."""

    name: str
    """Of the dataset, for messages."""
    files: list[str]
    read: Callable[[str], Iterator[str | BadRecord]]
    """From a file, the text of each record."""
    endless: bool = True
    """Whether the first file follows the last one."""
    skipping: Skipping = field(default_factory=Skipping)
    choice: Choice = Choice()
    shuffling: Shuffling = Shuffling()

    @property
    def order(self) -> str:
        shuffling, choice = self.shuffling, self.choice
        parts = [f"shuffle_buffer={shuffling.buffer}, data_seed={shuffling.seed}"] if shuffling.buffer else []
        parts += [f"held_out_share={choice.held_out_share:g}"] if choice.held_out_share else []
        parts += [f"min_document_chars={choice.min_chars}"] if choice.min_chars else []
        return ", ".join(parts)

    def in_order(self, epoch: int) -> list[str]:
        """The files as an epoch reads them; unless shuffled, as Hugging Face `datasets` orders them, and so as older
        versions did."""
        numbers = list(range(len(self.files)))
        if self.shuffling.buffer:
            numbers.sort(key=lambda number: draw(self.shuffling.seed, epoch, number))
        elif epoch:
            np.random.default_rng(epoch).shuffle(numbers)
        return [self.files[number] for number in numbers]

    def place(self, saved: list[Any]) -> Place:
        return Place(*saved)

    def read_from(self, start: Place | None) -> Iterator[tuple[Place, str]]:
        """
        Raises:
            DataError: if an epoch has no text, or more bad records than may be skipped.
        """
        start = Place(0, 0, 0) if start is None else start
        if not self.shuffling.buffer:
            return self._in_file_order(start)
        return self._in_blocks(start)

    def _in_file_order(self, start: Place) -> Iterator[tuple[Place, str]]:
        drops = Drops(self.name, self.choice.min_chars, logs=self.endless and not self.choice.held_out)
        first_file, first_record, skipped, short = start.file, start.record, start.skipped, start.short
        for epoch in itertools.count(start.epoch):
            no_text = (first_file, first_record) == (0, 0)
            files = self.in_order(epoch)
            for file in range(first_file, len(files)):
                texts = itertools.islice(self.read(files[file]), first_record, None)
                for record, text in enumerate(texts, start=first_record):
                    if isinstance(text, BadRecord):
                        skipped = self.skipping.skip_and_log(text, skipped)
                    elif not self.choice.takes(text):
                        continue
                    elif len(text) < self.choice.min_chars:
                        short = drops.drop(short)
                    else:
                        no_text = no_text and not is_text(text)
                        yield Place(epoch, file, record, skipped=skipped, short=short), text
                first_record = 0
            if not self.endless:
                return
            if no_text:
                raise DataError(f"dataset {self.name!r} has no document with text{self.choice}")
            counts = {"bad records skipped": skipped, "documents that were too short": short}
            counted = "".join(f"; {what}: {count:,}" for what, count in counts.items() if count)
            logger.warning(f"Dataset {self.name} is being re-looped{counted}")
            first_file = skipped = short = 0

    def _in_blocks(self, start: Place) -> Iterator[tuple[Place, str]]:
        documents, size = _Ahead(self._in_file_order(start.document._replace(turn=0))), self.shuffling.buffer
        block: list[tuple[Place, str]] = []
        documents.read_into(block, size)
        turn = start.turn
        while block:
            first, following = block[0][0], list[tuple[Place, str]]()
            key = (self.shuffling.seed, first.epoch, first.file, first.record)
            texts = sorted((draw(*key, number), text) for number, (_, text) in enumerate(block))
            block.clear()
            # As long as a block gives its documents, the next one takes their place.
            for number in range(len(texts)):
                documents.read_into(following, number + 1)
                text, texts[number] = texts[number][1], (0, "")
                if number >= turn:
                    yield first._replace(turn=number), text
            documents.read_into(following, size)
            block, turn = following, 0

    def changed(self, place: Place) -> DataError:
        files = self.in_order(place.epoch)
        name = files[place.file] if place.file < len(files) else f"file {place.file + 1}"
        return DataError(
            f"dataset {self.name!r}: the data position is in record {place.record + 1:,} of {name}, and this is not "
            "what the run read there: the files have changed since"
        )


class _Ahead:
    """Documents, of which the next one can be looked at."""

    def __init__(self, documents: Iterator[tuple[Place, str]]) -> None:
        self._documents = documents
        self._next: tuple[Place, str] | None = None

    def read_into(self, block: list[tuple[Place, str]], size: int) -> None:
        """Read until the block is so large. It ends where its epoch does."""
        while len(block) < size:
            if self._next is None:
                self._next = next(self._documents, None)
            if self._next is None or (block and self._next[0].epoch != block[0][0].epoch):
                return
            block.append(self._next)
            self._next = None
