"""Our datasets, and the loader of validation and of older runs, which gives each rank documents of its own: packing,
resume, sharding, errors and retries."""

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data import text_datasets
from torchtitan.experiments.lighthouse.data.text_datasets import DataError, StreamingError, read_documents
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer
from torchtitan.hf_datasets import text_datasets as upstream

BOS, EOS = 256, 257
SEQ_LEN, BATCH = 8, 2
REMOTE = "hf://datasets/someone/c4/en/c4-train.00000-of-01024.json.gz"

Batch = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(autouse=True)
def registered() -> None:
    text_datasets.register_datasets()


def write_jsonl(file: Path, texts: Iterable[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def numbered(file: int, count: int = 5) -> list[str]:
    """Documents that can be told apart, some shorter than a sequence and some much longer."""
    return [f"<{file}:{index}>" + "x" * (index * 17 % 41) for index in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for file in range(4):
        write_jsonl(tmp_path / "corpus" / f"train-{file}.json.gz", numbered(file))
    return tmp_path / "corpus"


def loader(
    path: Path | str,
    *,
    dataset: str = "c4_local",
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    infinite=True,
    seq_len: int = SEQ_LEN,
    batch: int = BATCH,
) -> ParallelAwareDataloader:
    config = JobConfig()
    config.model.hf_assets_path = BYTE_TOKENIZER_PATH
    config.training.dataset, config.training.dataset_path = dataset, str(path)
    config.training.seq_len, config.training.local_batch_size = seq_len, batch
    config.training.dataloader.num_workers = workers
    return text_datasets.build_rank_dataloader(config.training, ranks, rank, build_tokenizer(config), infinite)


def take(batches: Iterable, count: int | None = None) -> list[Batch]:
    return [(inputs["input"].tolist(), labels.tolist()) for inputs, labels in islice(batches, count)]


def documents(dataset: str, path: Path | str | None = None) -> list[str]:
    config = upstream.DATASETS[dataset]
    return [config.sample_processor(sample) for sample in config.loader(str(path or config.path))]


# Where the files are


def test_registering_twice_changes_nothing_and_keeps_upstreams_datasets() -> None:
    names = set(upstream.DATASETS)
    text_datasets.register_datasets()
    assert set(upstream.DATASETS) == names
    ours = {name + suffix for name in ("c4", "c4_local", "stdlib") for suffix in ("", "_validation")}
    assert names == ours | {"c4_test"}


def test_c4_names_the_shards_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: dict[str, list[str]] = {}
    for name, path in (("c4", "allenai/c4"), ("c4_validation", "someone/c4-copy")):
        monkeypatch.setattr(text_datasets, "_dataset", lambda files, name=name: listed.update({name: files}))
        assert upstream.DATASETS[name].path == "allenai/c4"
        upstream.DATASETS[name].loader(path)
    assert len(set(listed["c4"])) == 1024
    assert listed["c4"][-1] == "hf://datasets/allenai/c4/en/c4-train.01023-of-01024.json.gz"
    assert len(set(listed["c4_validation"])) == 8
    assert listed["c4_validation"][0] == ("hf://datasets/someone/c4-copy/en/c4-validation.00000-of-00008.json.gz")


@pytest.mark.parametrize("path", ["/data/c4", "./c4", "c4", "../c4", "a/b/c"])
def test_c4_sends_a_folder_to_c4_local(path: str) -> None:
    with pytest.raises(DataError, match="c4_local"):
        upstream.DATASETS["c4"].loader(path)


def test_c4s_own_layout_is_told_apart_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "en" / "c4-train.00001-of-00002.json.gz", ["second"])
    write_jsonl(tmp_path / "en" / "c4-train.00000-of-00002.json.gz", ["first"])
    write_jsonl(tmp_path / "en" / "c4-validation.00000-of-00001.json.gz", ["held out"])
    write_jsonl(tmp_path / "notes.json", ["of neither"])
    assert documents("c4_local", tmp_path) == ["first", "second"]
    assert documents("c4_local_validation", tmp_path) == ["held out"]


def test_unnamed_files_of_every_kind_are_for_training_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.json", ["json"])
    write_jsonl(tmp_path / "b.json.gz", ["json.gz"])
    write_jsonl(tmp_path / "c.jsonl", ["jsonl"])
    write_jsonl(tmp_path / "d.jsonl.gz", ["jsonl.gz"])
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["par", "quet"]}), tmp_path / "e.parquet")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._a.json").write_text("not data either")
    everything = ["json", "json.gz", "jsonl", "jsonl.gz", "par", "quet"]
    assert documents("c4_local", tmp_path) == everything
    with pytest.raises(DataError, match=r"none of them is for validation"):
        documents("c4_local_validation", tmp_path)

    # Once a file is held out it is not trained on.
    write_jsonl(tmp_path / "validation.jsonl", ["held out"])
    assert documents("c4_local", tmp_path) == everything
    assert documents("c4_local_validation", tmp_path) == ["held out"]


def test_stdlib_is_whole_disjoint_and_steady() -> None:
    train, validation = (upstream.DATASETS[name] for name in ("stdlib", "stdlib_validation"))
    listed = [config.loader.files(config.path) for config in (train, validation)]
    text_datasets._list_python_sources.cache_clear()
    listed += [config.loader.files(config.path) for config in (train, validation)]
    assert listed[:2] == listed[2:]
    names = [set(files) for files in listed[:2]]
    assert not names[0] & names[1]
    assert 18 < len(names[0]) / len(names[1]) < 20
    relative = {Path(name).relative_to(train.path) for name in names[0] | names[1]}
    assert Path("json/decoder.py") in relative
    assert not any({"site-packages", "test", "tests", "__pycache__"} & set(name.parts) for name in relative)
    # Neighbours are from one package no more often than chance has it; in order of name it is two thirds.
    packages = [Path(name).parent for name in listed[0]]
    same = sum(left == right for left, right in pairwise(packages))
    assert same < len(packages) / 3


def test_stdlib_replaces_undecodable_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# caf\xe9\r\n")
    assert documents("stdlib_validation", tmp_path) == ["# caf\ufffd\r\n"]
    assert all(documents("stdlib_validation"))


@pytest.mark.parametrize(
    ("dataset", "prepare", "message"),
    [
        ("c4_local", None, r"set training\.dataset_path, for example .*/data/c4"),
        ("c4_local_validation", None, r"set validation\.dataset_path"),
        ("c4_local", "absent", r"'.*absent' is not a folder"),
        ("c4_local", "empty", r"no data file.*\.jsonl\.gz, \.parquet"),
        ("stdlib", "empty", r"too few \.py files \(0\)"),
        ("stdlib", "absent", r"'.*absent' is not a folder"),
    ],
)
def test_folder_problems_show_when_the_loader_is_built(
    tmp_path: Path, dataset: str, prepare: str | None, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        upstream.DATASETS[dataset].loader("" if prepare is None else str(tmp_path / prepare))


# What is in them


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


@pytest.mark.parametrize(
    ("name", "content", "message", "good"),
    [
        (
            "missing.jsonl",
            GOOD + b'{"url": "x"}\n' + GOOD,
            r"record 2 is not an object with a string 'text'",
            1,
        ),
        ("null.jsonl", GOOD + b'{"text": null}\n', r"record 2 is not", 1),
        ("number.jsonl", GOOD + GOOD + b'{"text": 3}\n', r"record 3 is not", 2),
        ("list.json", b'[{"text": "a"}, {"text": "b"}]', r"record 1 is not", 0),
        ("broken.jsonl", GOOD + b'{"text": "no end\n', r"after record 1 \(JSONDecodeError", 1),
        ("pretty.json", b'{\n  "text": "a"\n}\n', r"at its start \(JSONDecodeError", 0),
        ("latin1.jsonl", GOOD + b'{"text": "caf\xe9"}\n', r"after record 1 \(UnicodeDecodeError", 1),
        ("truncated.json.gz", PACKED[:-9], r"truncated\.json\.gz: .* \(EOFError", 3),
        ("corrupt.json.gz", PACKED[:14] + b"\xff" * 20, r"\((error|BadGzipFile|EOFError)", 0),
        (
            "pointer.json.gz",
            b"version https://git-lfs.github.com/spec/v1\n",
            r"at its start \(BadGzipFile",
            0,
        ),
        ("not.parquet", b"PAR1 but no more", r"at its start \(Arrow", 0),
    ],
)
def test_a_bad_file_is_named_with_its_record(
    tmp_path: Path, name: str, content: bytes, message: str, good: int
) -> None:
    (tmp_path / name).write_bytes(content)
    read = []
    with pytest.raises(DataError, match=message) as caught:
        for sample in upstream.DATASETS["c4_local"].loader(str(tmp_path)):
            read.append(sample)
    assert str(tmp_path / name) in str(caught.value)
    assert len(read) == good


def test_parquet_without_text_is_an_error(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: record 1 is not an object with a string 'text'"):
        documents("c4_local", tmp_path)


def test_lone_surrogates_reach_the_batches_as_question_marks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "abc\ud800def"}')
    (inputs, labels), *_ = take(loader(tmp_path), 1)
    assert inputs[0] == [BOS, *b"abc?def"] and labels[0][-1] == EOS


# Packing, sharding, resume


def test_documents_are_packed_with_bos_and_eos(corpus: Path) -> None:
    stream = [token for text in documents("c4_local", corpus) for token in (BOS, *text.encode(), EOS)]
    batches = take(loader(corpus, infinite=False))
    rows = [row for inputs, labels in batches for row in zip(inputs, labels, strict=True)]
    # Each sequence takes seq_len + 1 tokens of the stream, and upstream shares none between two of them.
    assert len(rows) == len(stream) // (SEQ_LEN + 1)
    for index, (inputs, labels) in enumerate(rows):
        expected = stream[index * (SEQ_LEN + 1) : (index + 1) * (SEQ_LEN + 1)]
        assert [*inputs, labels[-1]] == expected
        assert inputs[1:] == labels[:-1]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_documents_out(corpus: Path, ranks: int) -> None:
    # 2 and 4 ranks take whole files, 3 ranks take every third record.
    everything = Counter(documents("c4_local", corpus))
    seen: Counter[str] = Counter()
    for rank in range(ranks):
        data = loader(corpus, rank=rank, ranks=ranks).dataset._data
        mine = Counter(sample["text"] for sample in data)
        assert mine and not seen & mine
        seen += mine
    assert seen == everything


def check_resume(build, positions: Iterable[int], then: int = 6) -> None:
    positions = list(positions)
    uninterrupted = take(build(), max(positions) + then)
    for position in positions:
        first = build()
        assert take(first, position) == uninterrupted[:position]
        second = build()
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        assert take(second, then) == uninterrupted[position : position + then], f"differs after {position} batches"


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (2, 3)])
def test_resume_is_exact_everywhere_in_three_epochs(corpus: Path, rank: int, ranks: int) -> None:
    """Every position: inside documents, at the ends of files, and across the ends of epochs."""
    epoch = sum(1 for _ in loader(corpus, rank=rank, ranks=ranks, infinite=False))
    assert epoch > 5
    build = lambda: loader(corpus, rank=rank, ranks=ranks)  # noqa: E731
    check_resume(build, range(0, 3 * epoch + 2, 1 if ranks > 1 else 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_is_exact_with_workers(corpus: Path, workers: int) -> None:
    epoch = sum(1 for _ in loader(corpus, infinite=False))
    check_resume(lambda: loader(corpus, workers=workers), [1, epoch // 2, 2 * epoch + 3])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_another_context_goes_on_with_the_very_next_token(corpus: Path, workers: int) -> None:
    """Every reader, a worker or the rank itself, hands out its stream without a gap or a repeat, whatever the length
    and number of its sequences; each takes one token more than its length, the last label. Stops are inside documents
    that are longer than a batch, and beyond the end of an epoch."""
    readers = max(1, workers)
    contexts = [(4, 4), (16, 1), (2, 7), (16, 1), (8, 2)]

    def tokens(batch: Batch) -> list[int]:
        return [token for inputs, labels in zip(*batch, strict=True) for token in [*inputs, labels[-1]]]

    def build(seq_len: int, batch: int) -> ParallelAwareDataloader:
        return loader(corpus, workers=workers, seq_len=seq_len, batch=batch)

    uninterrupted: list[list[int]] = [[] for _ in range(readers)]
    for number, one in enumerate(take(build(1, 1), 600 * readers)):
        uninterrupted[number % readers] += tokens(one)
    read: list[list[int]] = [[] for _ in range(readers)]
    state, number = None, 0
    for seq_len, batch in contexts:
        stage = build(seq_len, batch)
        if state is not None:
            stage.load_state_dict(pickle.loads(state))
        for one in take(stage, 7):
            read[number % readers] += tokens(one)
            number += 1
        state = pickle.dumps(stage.state_dict())
    epoch = sum(len(text.encode()) + 2 for text in documents("c4_local", corpus))
    assert sum(map(len, read)) > epoch and all(len(stream) > 200 for stream in read)
    assert read == [whole[: len(stream)] for whole, stream in zip(uninterrupted, read, strict=True)]


def test_a_position_may_be_saved_again_before_it_is_used(corpus: Path) -> None:
    first, second, third = loader(corpus), loader(corpus), loader(corpus)
    expected = take(first, 40)[30:]
    fresh = loader(corpus)
    take(fresh, 30)
    second.load_state_dict(fresh.state_dict())
    third.load_state_dict(second.state_dict())
    assert take(third, 10) == expected


def test_a_state_stays_as_it_was_taken(corpus: Path) -> None:
    # Worker processes hand it over while they read on.
    dataset = loader(corpus).dataset
    states = [(state, repr(state)) for state in (dataset.state_dict() for _ in islice(dataset, 20))]
    assert all(repr(state) == taken for state, taken in states)


def test_epochs_hold_the_same_documents(corpus: Path) -> None:
    data = loader(corpus).dataset
    epochs = [[sample["text"] for sample in data._get_data_iter()]]
    data._data.set_epoch(1)
    epochs.append([sample["text"] for sample in data._get_data_iter()])
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_a_reader_without_documents_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "only.jsonl", numbered(0, count=3))
    with pytest.raises(DataError, match="a document for every data-parallel rank"):
        take(loader(tmp_path, rank=7, ranks=8), 1)
    assert take(loader(tmp_path, rank=2, ranks=8), 1)

    second_of_two = SimpleNamespace(id=1, num_workers=2)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: second_of_two)
    with pytest.raises(DataError, match="a file for every dataloader worker"):
        next(iter(loader(tmp_path).dataset))


def test_validation_loader_ends(corpus: Path) -> None:
    write_jsonl(corpus / "validation.jsonl", numbered(9))
    config = JobConfig()
    config.model.hf_assets_path = BYTE_TOKENIZER_PATH
    config.validation.dataset, config.validation.dataset_path = "c4_local_validation", str(corpus)
    config.validation.seq_len, config.validation.local_batch_size = SEQ_LEN, 1
    batches = take(text_datasets.build_validation_dataloader(1, 0, build_tokenizer(config), config))
    tokens = sum(len(text.encode()) + 2 for text in numbered(9))
    assert len(batches) == tokens // (SEQ_LEN + 1)


@pytest.mark.parametrize("folder", ["c4", "books"])
def test_real_text_is_packed_and_resumed(shared_dir: Path, folder: str) -> None:
    root = shared_dir / "data" / folder
    if not root.is_dir():
        pytest.skip(f"no {root}")
    validation = documents("c4_local_validation", root)
    assert validation and all(validation)
    first_train = next(iter(upstream.DATASETS["c4_local"].loader(str(root))))["text"]
    assert first_train not in validation
    check_resume(lambda: loader(root), [20], then=10)


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
    monkeypatch.setattr(text_datasets.time, "sleep", delays.append)
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
    texts = numbered(0, count=6)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    url = REMOTE.removesuffix(".gz")
    monkeypatch.setattr(text_datasets, "_open", Breaking(content, [error, error], at).open)
    monkeypatch.setattr(text_datasets.logger, "propagate", True)
    with caplog.at_level("WARNING"):
        assert [sample["text"] for sample in read_documents([url])] == texts
    assert slept == [1, 2]
    assert len(caplog.messages) == 2
    assert all(url in message and type(error).__name__ in message for message in caplog.messages)


def test_a_network_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    def refuse(file: str):
        raise ConnectionError("refused")

    monkeypatch.setattr(text_datasets, "_open", refuse)
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

    monkeypatch.setattr(text_datasets, "_open", one_more_each_time)
    assert len(list(read_documents([REMOTE.removesuffix(".gz")]))) == 20
    assert slept == [1] * 19


@pytest.mark.parametrize("error", [Http(404), Http(401), FileNotFoundError("gone"), PermissionError("gated")])
def test_what_the_hub_refuses_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, slept: list[float], error: Exception
) -> None:
    monkeypatch.setattr(text_datasets, "_open", Breaking(GOOD, [error], at=0).open)
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
    monkeypatch.setattr(text_datasets, "_open", Breaking(GOOD * 3, [OSError("disk")], at=2).open)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read after record 2 \(OSError: disk"):
        list(read_documents([file]))
    assert not slept
