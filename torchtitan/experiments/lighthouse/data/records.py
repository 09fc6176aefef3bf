"""From a file to the text of each record, and to what is wrong with those that have none.

A file is .json(l) or .json(l).gz with an object per line, or .parquet, with the text in a column of any name; or .txt
or .py, which is one record.
Records are numbered in their order, the bad ones too, so that a number means the same whether they are skipped or not.
Lines of white space are no records.
"""

import gzip
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow
import pyarrow.parquet
from torch.utils.data import get_worker_info
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.tools.logging import logger

# Seconds before each new try; the try after the last delay is the final one.
RETRY_DELAYS = (1, 2, 4, 8, 16)
HTTP_LIBRARIES = {"aiohttp", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3"}

#: So many bad records are logged each on a line of its own; after them, their number.
MOST_LINES = 5


class StreamingError(Refused):
    """The network kept failing while a remote file was read."""


@dataclass(frozen=True)
class BadRecord:
    """A record without a text that can be used."""

    file: str
    number: int
    """In its file, from 1"""
    reason: str
    columns: tuple[str, ...] = ()
    """Of a record that lacks the text's: those that it has, for a better message"""

    def __str__(self) -> str:
        return f"{self.file}: record {self.number} {self.reason}"


class Skipping:
    """Skips bad records up to a limit, and logs them."""

    def __init__(self, limit: int = 0, setting: str = "training.max_bad_records") -> None:
        """
        Args:
            limit: how many may be skipped in one pass over the files.
            setting: its name, for messages.
        """
        self._limit, self._setting = limit, setting
        self._logged = 0

    def skip(self, bad: BadRecord, skipped: int) -> int:
        """
        Args:
            skipped: bad records before this one in the same pass.

        Returns:
            Their number, with this one.

        Raises:
            DataError: if it is one too many.
        """
        if skipped < self._limit:
            return skipped + 1
        if not self._limit:
            raise DataError(f"{bad}. To skip bad records, set {self._setting} to the number that may be skipped")
        raise DataError(f"{bad}. It is one more than {self._setting}={self._limit} allows to skip")

    def skip_and_log(self, bad: BadRecord, skipped: int) -> int:
        """The same. All processes meet the same bad records, so one of them logs."""
        skipped = self.skip(bad, skipped)
        if one_of_all() and skipped > self._logged:
            # Counts that were logged come again where files are read again.
            self._logged = skipped
            if skipped <= MOST_LINES:
                logger.warning(f"Skipped bad record {skipped} of at most {self._limit:,}: {bad}")
            elif len(str(skipped)) > len(str(skipped - 1)):
                logger.warning(f"Skipped {skipped:,} bad records of at most {self._limit:,}, the last one: {bad}")
        return skipped


def one_of_all() -> bool:
    """Whether this process is the one that logs what all processes meet."""
    worker = get_worker_info()
    return os.environ.get("RANK", "0") == "0" and (worker is None or worker.id == 0)


def read_texts(file: str, column: str = "text") -> Iterator[str | BadRecord]:
    """The text of every record of a file (a local path or an fsspec address), in order, or what is wrong with it.

    Args:
        column: that the text is in.

    Raises:
        DataError: if the file cannot be read; names the file and the record.
        StreamingError: if the network fails on a remote file more often than `RETRY_DELAYS` allows.
    """
    for record in _read_patiently(file, column):
        yield record if isinstance(record, BadRecord) else encodable(record)


def encodable(text: str) -> str:
    """The same text; lone surrogates, which UTF-8 and so the tokenizer cannot hold, become '?'."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def read_documents(files: list[str]) -> Iterator[dict[str, Any]]:
    """``read_texts`` of all files, as samples: ``{"text": str}`` or ``{"bad": BadRecord}``."""
    for file in files:
        for record in _read_patiently(file, "text"):
            yield {"bad": record} if isinstance(record, BadRecord) else {"text": record}


def is_remote(file: str) -> bool:
    return "://" in file


def _read_patiently(file: str, column: str) -> Iterator[str | BadRecord]:
    """`_read_file`, opened anew after a network failure and wound forward to the next record."""
    done = failures = 0
    while True:
        try:
            for record in itertools.islice(_read_file(file, column), done, None):
                done, failures = done + 1, 0
                yield record
            return
        except Exception as error:
            if not _is_network_failure(file, error):
                raise
            if failures == len(RETRY_DELAYS):
                raise StreamingError(
                    f"{file}: network failure after record {done}, {failures + 1} tries without progress "
                    f"({_describe(error)}); the datasets 'local' and 'c4_local' train from a local copy"
                ) from error
            delay = RETRY_DELAYS[failures]
            failures += 1
            logger.warning(f"{file}: network failure ({_describe(error)}), trying again in {delay} s")
            time.sleep(delay)


def _read_file(file: str, column: str) -> Iterator[str | BadRecord]:
    """Each record's text or fault. What is damaged on the way to a local file's records takes the rest with it, and
    counts as one record; every other failure but the network's becomes a DataError."""
    number = 0
    try:
        with _open(file) as stream:
            for number, record in enumerate(_records(file, stream, column), start=1):
                if isinstance(record, _Unreadable):
                    yield BadRecord(file, number, record.reason)
                elif (reason := _fault_of(record, column)) is not None:
                    lacks = isinstance(record, dict) and column not in record
                    yield BadRecord(file, number, reason, tuple(record) if lacks else ())
                else:
                    yield record[column]
    except Exception as error:
        if isinstance(error, DataError) or _is_network_failure(file, error):
            raise
        if not is_remote(file) and _is_damage(file, error):
            # Of a remote file, another rank may get the whole, and the ranks would deal out different documents.
            yield BadRecord(file, number + 1, f"cannot be read, and nothing after it in this file ({_describe(error)})")
            return
        place = f"after record {number}" if number else "at its start"
        raise DataError(f"{file}: cannot be read {place} ({_describe(error)})") from error


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _fault_of(record: Any, column: str) -> str | None:
    if not isinstance(record, dict):
        return f"is no object with a string {column!r}, but {_kind_of(record)}"
    if column not in record:
        names = ", ".join(map(repr, itertools.islice(record, 10))) or "nothing"
        return f"has no {column!r} (it has {names})"
    if not isinstance(record[column], str):
        return f"has a {column!r} that is no string, but {_kind_of(record[column])}"
    return None


def _kind_of(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _open(file: str) -> BinaryIO:
    return fsspec.open(file, "rb").open() if is_remote(file) else open(file, "rb")


def _records(file: str, stream: BinaryIO, column: str) -> Iterator[Any]:
    """What a JSON reader makes of each record, or ``_Unreadable``."""
    if file.endswith(".py"):
        yield {column: stream.read().decode("utf-8", errors="replace")}
    elif file.endswith(".txt"):
        yield _whole(stream.read(), column)
    elif file.endswith(".parquet"):
        yield from _rows(file, stream, column)
    else:
        # Not `load_dataset("json")`: it fixes every column's type by the first 10 MB, fills a missing text
        # with None, and reports errors without a record number.
        lines = gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else stream
        for line in lines:
            if line.strip():
                yield _parsed(line)


def _whole(content: bytes, column: str) -> Any:
    try:
        return {column: content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return _Unreadable(f"is no UTF-8 ({_describe(error)})")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return _Unreadable(f"is no UTF-8 ({_describe(error)})")
    except (ValueError, RecursionError) as error:
        return _Unreadable(f"is no JSON ({_describe(error)})")


def _rows(file: str, stream: BinaryIO, column: str) -> Iterator[Any]:
    """Damage costs the rest of a row group. Its rows are counted, for the file says how many it has."""
    table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
    if column not in table.schema_arrow.names:
        row = dict.fromkeys(table.schema_arrow.names)
        yield from itertools.repeat(row, table.metadata.num_rows)
        return
    for group in range(table.num_row_groups):
        left = table.metadata.row_group(group).num_rows
        try:
            # A small batch: one row can be a whole book.
            for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
                for value in batch.column(0):
                    left -= 1
                    yield _row(value, column)
        except Exception as error:
            if is_remote(file) or not _is_damage(file, error):
                raise
            yield from itertools.repeat(_Unreadable(f"is in a damaged row group ({_describe(error)})"), left)


def _row(value: pyarrow.Scalar, column: str) -> Any:
    try:
        return {column: value.as_py()}
    except UnicodeDecodeError as error:
        return _Unreadable(f"is no UTF-8 ({_describe(error)})")


def _is_damage(file: str, error: Exception) -> bool:
    """Whether a file's content is at fault, which is the same for all ranks, and not a disk or the memory of one."""
    if isinstance(error, MemoryError):
        return False
    # pyarrow has no class of its own for damaged pages. The system's errors have a number.
    damaged_page = file.endswith(".parquet") and type(error) is OSError and error.errno is None
    return damaged_page or isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error, pyarrow.ArrowException))


def _is_network_failure(file: str, error: Exception) -> bool:
    """Whether opening the file again may help: not where it is local, absent, forbidden or damaged."""
    if not is_remote(file) or isinstance(error, (FileNotFoundError, PermissionError, gzip.BadGzipFile)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    # The Hub's client has changed its HTTP library before, and not all of their errors are OSErrors.
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(HTTP_LIBRARIES)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
