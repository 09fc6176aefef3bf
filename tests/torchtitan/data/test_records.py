"""From files to records: bad ones are named, or skipped and counted; the network's failures are no one's fault."""

import gzip
import json
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from torchtitan.experiments.lighthouse.data import records
from torchtitan.experiments.lighthouse.data.records import BadRecord, Skipping, StreamingError, read_documents
from torchtitan.experiments.lighthouse.errors import DataError

REMOTE = "hf://datasets/someone/c4/en/c4-train.00000-of-01024.json.gz"


def test_other_columns_may_vary(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    extras = [None, "string", 3, {"nested": []}, ["list"]]
    # Longer than the 10 MB by which Hugging Face's JSON reader fixes the columns' types.
    records = [{"text": f"{index}" + " " * 3_000_000, "extra": extra} for index, extra in enumerate(extras)]
    file.write_text("\n\n".join(json.dumps(record) for record in records))
    assert [sample["text"].strip() for sample in read_documents([str(file)])] == list("01234")


GOOD = b'{"text": "good"}\n'

#: Without the time of day, which would give every test process other test names.
PACKED = gzip.compress(GOOD * 3, mtime=0)


def read(file: Path) -> list[str]:
    """The text, or what is wrong, of each record."""
    return [sample["text"] if "text" in sample else str(sample["bad"]) for sample in read_documents([str(file)])]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.jsonl", GOOD + b'{"url": "x", "id": 1}\n' + GOOD, "g2g has no 'text' \\(it has 'url', 'id'\\)"),
        ("nothing.jsonl", b"{}\n", "1 has no 'text' \\(it has nothing\\)"),
        ("null.jsonl", GOOD + b'{"text": null}\n', "g2 has a 'text' that is no string, but null"),
        ("number.jsonl", GOOD + b"\n" + GOOD + b'{"text": 3}\n', "gg3 has a 'text' that is no string, but of type int"),
        ("list.json", b'[{"text": "a"}, {"text": "b"}]', "1 is no object with a string 'text', but of type list"),
        ("cut.jsonl", GOOD + b'{"text": "no end\n' + GOOD, "g2g is no JSON \\(JSONDecodeError: .*\\)"),
        ("zeros.jsonl", GOOD + b"\0" * 99, "g2 is no (JSON|UTF-8) \\(.*Error: .*\\)"),
        ("deep.jsonl", b"[" * 99_999 + b"\n" + GOOD, "1g is no JSON \\(RecursionError: .*\\)"),
        ("latin1.jsonl", GOOD + b'{"text": "caf\xe9"}\n' + GOOD, "g2g is no UTF-8 \\(UnicodeDecodeError: .*\\)"),
        ("truncated.json.gz", PACKED[:-9], "ggg4 cannot be read, and nothing after it in this file \\(EOFError: .*\\)"),
        ("flipped.json.gz", PACKED[:10] + b"\xff" * 20, "1 cannot be read, .* \\(error: .*\\)"),
        ("member.json.gz", PACKED + b"junk", "ggg4 cannot be read, .* \\(BadGzipFile: .*\\)"),
        (
            "pointer.json.gz",
            b"version https://git-lfs.github.com/spec/v1\n",
            "1 cannot be read, .* \\(BadGzipFile: .*\\)",
        ),
        ("not.parquet", b"PAR1 but no more", "1 cannot be read, .* \\(Arrow.*\\)"),
    ],
    ids=lambda value: value if str(value).endswith(("json", "jsonl", "gz", "parquet")) else "",
)
def test_a_bad_record_is_named_and_others_are_read(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    """``expected``: g for a good record, the number of the bad one, and what is said of it."""
    (tmp_path / name).write_bytes(content)
    order, _, reason = expected.partition(" ")
    texts = read(tmp_path / name)
    assert len(texts) == len(order)
    for text, kind in zip(texts, order, strict=True):
        if kind == "g":
            assert text == "good"
        else:
            assert re.fullmatch(re.escape(f"{tmp_path / name}: record {kind} ") + reason, text)


def test_a_damaged_row_group_costs_its_own_rows_alone(tmp_path: Path) -> None:
    texts = [f"{index} {index * 7919 % 9973}" * 9 for index in range(300)]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), file, row_group_size=100, write_page_checksum=True, use_dictionary=False
    )
    assert read(file) == texts
    group = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    damaged = read(file)
    assert damaged[:100] == texts[:100] and damaged[200:] == texts[200:]
    assert all(f"a.parquet: record {n} is in a damaged row group (OSError" in damaged[n - 1] for n in range(101, 201))


def test_parquet_rows_without_a_string_are_bad(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a", "b"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1].endswith("a.parquet: record 2 has no 'text' (it has 'content')")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "b.parquet")
    first, bad, last = read(tmp_path / "b.parquet")
    assert (first, last) == ("a", "b") and bad.endswith("record 2 has a 'text' that is no string, but null")
    latin1 = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xe9a")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": latin1}), tmp_path / "c.parquet")
    bad, good = read(tmp_path / "c.parquet")
    assert good == "a" and "record 1 is no UTF-8 (UnicodeDecodeError" in bad


def test_a_disk_that_cannot_be_read_is_no_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be that of one rank alone, which would then deal out other documents than the others."""
    for name in ("a.jsonl", "a.json.gz", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read at its start \(FileNotFoundError"):
            read(tmp_path / name)
    monkeypatch.setattr(records, "_open", Breaking(GOOD * 3, [OSError(5, "Input/output error")], at=2).open)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read after record 2 \(OSError: .*Input/output error"):
        read(tmp_path / "a.jsonl")


# Skipping


BAD = BadRecord("/data/a.jsonl", 7, "is no JSON")


def test_no_bad_record_is_skipped_unless_asked_for() -> None:
    with pytest.raises(DataError) as caught:
        Skipping().skip(BAD, 0)
    assert str(caught.value) == (
        "/data/a.jsonl: record 7 is no JSON. To skip bad records, set training.max_bad_records to the number that may "
        "be skipped"
    )
    with pytest.raises(DataError, match=r"record 7 .*validation\.max_bad_records=2 allows"):
        Skipping(2, "validation.max_bad_records").skip(BAD, 2)


def test_the_first_skipped_records_are_logged_and_then_their_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, however often the files are read, and by one rank."""
    monkeypatch.setattr(records.logger, "propagate", True)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        skipping = Skipping(2000)
        with caplog.at_level("WARNING"):
            for _ in range(2):
                for number in range(1001):
                    assert skipping.skip_and_log(replace(BAD, number=number + 1), number) == number + 1
    assert len(caplog.messages) == records.MOST_LINES + 3
    assert caplog.messages[1] == "Skipped bad record 2 of at most 2,000: /data/a.jsonl: record 2 is no JSON"
    assert caplog.messages[-1].startswith("Skipped 1,000 bad records of at most 2,000, the last one: /data/a.jsonl")


# The network


class Http(Exception):
    """An HTTP library's error: no OSError, and a status with its response."""

    def __init__(self, status: int | None = None) -> None:
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})() if status else None


Http.__module__ = "httpx2._exceptions"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    delays: list[float] = []
    monkeypatch.setattr(records.time, "sleep", delays.append)
    return delays


class Breaking:
    """A remote file that fails once, in the middle, at each of its first openings."""

    def __init__(self, content: bytes, errors: Iterable[Exception], at: int) -> None:
        self.content, self.errors, self.at = content, list(errors), at

    def open(self, file: str):
        lines = self.content.splitlines(keepends=True)
        error = self.errors.pop(0) if self.errors else None

        def read():
            yield from lines if error is None else lines[: self.at]
            if error is not None:
                raise error

        return nullcontext(read())


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        OSError("short read"),
        Http(),
        Http(503),
        Http(429),
    ],
)
def test_a_network_failure_loses_and_doubles_no_record(
    monkeypatch: pytest.MonkeyPatch,
    slept: list[float],
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    at: int,
) -> None:
    texts = [f"<{index}>" for index in range(6)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    url = REMOTE.removesuffix(".gz")
    monkeypatch.setattr(records, "_open", Breaking(content, [error, error], at).open)
    monkeypatch.setattr(records.logger, "propagate", True)
    with caplog.at_level("WARNING"):
        assert [sample["text"] for sample in read_documents([url])] == texts
    assert slept == [1, 2]
    assert len(caplog.messages) == 2
    assert all(url in message and type(error).__name__ in message for message in caplog.messages)


def test_a_network_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    def refuse(file: str):
        raise ConnectionError("refused")

    monkeypatch.setattr(records, "_open", refuse)
    with pytest.raises(StreamingError, match=r"network failure.*6 tries.*refused.*c4_local") as caught:
        list(read_documents([REMOTE]))
    assert REMOTE in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert slept == [1, 2, 4, 8, 16]


def test_progress_resets_the_count_of_tries(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    opened = 0

    def one_more_each_time(file: str):
        nonlocal opened
        opened += 1
        return Breaking(GOOD * 20, [ConnectionError("again")] if opened < 20 else [], at=opened).open(file)

    monkeypatch.setattr(records, "_open", one_more_each_time)
    assert len(list(read_documents([REMOTE.removesuffix(".gz")]))) == 20
    assert slept == [1] * 19


@pytest.mark.parametrize("error", [Http(404), Http(401), FileNotFoundError("gone"), PermissionError("gated")])
def test_what_the_hub_refuses_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, slept: list[float], error: Exception
) -> None:
    monkeypatch.setattr(records, "_open", Breaking(GOOD, [error], at=0).open)
    with pytest.raises(DataError, match=type(error).__name__):
        list(read_documents([REMOTE.removesuffix(".gz")]))
    assert not slept


def test_remote_files_are_opened_by_address() -> None:
    with fsspec.open("memory://c4-train.json.gz", "wb") as file:
        file.write(PACKED)
    assert list(read_documents(["memory://c4-train.json.gz"])) == [{"text": "good"}] * 3


@pytest.mark.parametrize("content", [PACKED[:-9], b"not gzip"])
def test_a_damaged_remote_file_is_not_tried_again(slept: list[float], content: bytes) -> None:
    with fsspec.open("memory://damaged.json.gz", "wb") as file:
        file.write(content)
    with pytest.raises(DataError, match=r"memory://damaged\.json\.gz: cannot be read"):
        list(read_documents(["memory://damaged.json.gz"]))
    assert not slept


def test_local_files_are_not_tried_again(monkeypatch: pytest.MonkeyPatch, slept: list[float], tmp_path: Path) -> None:
    file = str(tmp_path / "a.jsonl")
    monkeypatch.setattr(records, "_open", Breaking(GOOD * 3, [OSError("disk")], at=2).open)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read after record 2 \(OSError: disk"):
        list(read_documents([file]))
    assert not slept
