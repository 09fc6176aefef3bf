"""Our datasets, and the loader of validation and of older runs, which gives each rank documents of its own: packing,
resume, sharding, errors."""

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data import checks, files, pieces, sources, text_datasets
from torchtitan.experiments.lighthouse.data.checks import check_data
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.hf_datasets import text_datasets as upstream

BOS, EOS = 256, 257
SEQ_LEN, BATCH = 8, 2

Batch = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(autouse=True)
def registered() -> None:
    sources.register_datasets()


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
    bad: int = 0,
) -> ParallelAwareDataloader:
    config = JobConfig()
    config.model.hf_assets_path = BYTE_TOKENIZER_PATH
    config.training.dataset, config.training.dataset_path = dataset, str(path)
    config.training.seq_len, config.training.local_batch_size = seq_len, batch
    config.training.dataloader.num_workers = workers
    config.training.max_bad_records = bad
    return text_datasets.build_rank_dataloader(config.training, ranks, rank, build_tokenizer(config), infinite)


def take(batches: Iterable, count: int | None = None) -> list[Batch]:
    return [(inputs["input"].tolist(), labels.tolist()) for inputs, labels in islice(batches, count)]


def documents(dataset: str, path: Path | str | None = None) -> list[str]:
    config = upstream.DATASETS[dataset]
    return [config.sample_processor(sample) for sample in config.loader(str(path or config.path))]


# Where the files are


def test_registering_twice_changes_nothing_and_keeps_upstreams_datasets() -> None:
    names = set(upstream.DATASETS)
    sources.register_datasets()
    assert set(upstream.DATASETS) == names
    ours = {name + suffix for name in ("c4", "c4_local", "stdlib") for suffix in ("", "_validation")}
    assert names == ours | {"local", "hub", "mixture", "held_out", "c4_test"}


def test_c4_names_the_shards_of_the_hub() -> None:
    listed: dict[str, list[str]] = {}
    for name, path in (("c4", "allenai/c4"), ("c4_validation", "someone/c4-copy")):
        assert upstream.DATASETS[name].path == "allenai/c4"
        listed[name] = upstream.DATASETS[name].loader.files(path)
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


def test_train_within_a_word_names_no_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "constraints.jsonl", ["strained"])
    assert documents("c4_local", tmp_path) == ["a", "strained"]
    write_jsonl(tmp_path / "c4train.jsonl", ["named"])
    write_jsonl(tmp_path / "my_training-0.jsonl", ["too"])
    assert documents("c4_local", tmp_path) == ["named", "too"]


def test_stdlib_is_whole_disjoint_and_steady() -> None:
    train, validation = (upstream.DATASETS[name] for name in ("stdlib", "stdlib_validation"))
    listed = [config.loader.files(config.path) for config in (train, validation)]
    files._list_python_sources.cache_clear()
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
    assert any(documents("stdlib_validation"))  # some of its files are empty in some versions of Python


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


def test_lone_surrogates_reach_the_batches_as_question_marks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "abc\ud800def"}')
    (inputs, labels), *_ = take(loader(tmp_path), 1)
    assert inputs[0] == [BOS, *b"abc?def"] and labels[0][-1] == EOS


# Before a run starts


def config_of(path: Path | str, dataset: str = "c4_local", bad: int = 0, validation: str = "") -> JobConfig:
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = dataset, str(path)
    config.training.max_bad_records = bad
    config.validation.enable = bool(validation)
    config.validation.dataset, config.validation.dataset_path = validation, str(path)
    return config


def test_good_data_is_found_good(corpus: Path) -> None:
    check_data(config_of(corpus))
    check_data(config_of("", "stdlib", validation="stdlib_validation"))
    write_jsonl(corpus / "train-9.jsonl", ["", " ", "text"])
    (corpus / "train-a.jsonl").write_text("")
    write_jsonl(corpus / "validation.jsonl", ["", "\n", "text"])
    check_data(config_of(corpus, validation="c4_local_validation"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "absent"}, r"'absent' is not a folder"),
        ({"dataset": "c5"}, r"training\.dataset='c5': must be one of c4, c4_local, .*; nearest valid value: 'c4'"),
        ({"validation": "c5"}, r"validation\.dataset='c5': must be one of c4, "),
        ({"validation": "c4_local_validation"}, r"none of them is for validation"),
    ],
)
def test_data_that_is_not_there_is_refused(corpus: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_data(config_of(**{"path": str(corpus)} | settings))


@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "parquet"])
def test_a_file_whose_first_record_cannot_be_read_is_named(corpus: Path, suffix: str) -> None:
    """Not only the first file. (Later records are found bad when they are read.)"""
    file = corpus / f"train-3-pointer.{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=rf"pointer\.{suffix}: record 1 .* set training\.max_bad_records"):
        check_data(config_of(corpus))
    check_data(config_of(corpus, bad=1))
    (corpus / f"train-4.{suffix}").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=rf"train-4\.{suffix}: record 1 .* one more than training\.max_bad_records=1 "):
        check_data(config_of(corpus, bad=1))


def test_of_very_many_files_the_first_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More only until one has text."""
    monkeypatch.setattr(checks, "MOST_CHECKED", 2)
    for name, texts in {"a": [""], "b": [], "c": [" "], "d": ["text"]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    (tmp_path / "e.jsonl").write_text("no JSON\n")
    check_data(config_of(tmp_path))
    (tmp_path / "d.jsonl").unlink()
    with pytest.raises(DataError, match=r"e\.jsonl: record 1 is no JSON"):
        check_data(config_of(tmp_path))


def test_data_without_any_text_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", " \n"])
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(
        DataError, match=r"training\.dataset='c4_local': no text in any record of its 2 file\(s\), .*a\.js"
    ):
        check_data(config_of(tmp_path))


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


@pytest.mark.parametrize("workers", [0, 1])
def test_long_documents_come_in_pieces_and_change_nothing(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    whole = take(loader(corpus, workers=workers), 40)
    monkeypatch.setattr(pieces, "PIECE", 11)
    assert take(loader(corpus, workers=workers), 40) == whole
    check_resume(lambda: loader(corpus, workers=workers), range(0, 40, 1 if workers == 0 else 13))
    state = None
    for batch in whole[: 40 if workers == 0 else 3]:
        reader = loader(corpus, workers=workers)
        if state is not None:
            reader.load_state_dict(state)
        assert take(reader, 1) == [batch]
        state = reader.state_dict()


def test_a_position_in_a_long_document_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    write_jsonl(tmp_path / "a.jsonl", ["short", "long " * 20_000, "short"])
    dataset = loader(tmp_path).dataset
    for _ in islice(dataset, 300):
        assert len(pickle.dumps(dataset.state_dict())) < 8_000
    dataset = loader(tmp_path).dataset
    state = {**dataset.state_dict(), "token_buffer": [*range(200)] * 500}  # as versions without pieces saved it
    dataset.load_state_dict(state)
    assert next(iter(dataset))[0]["input"].tolist() == [*range(SEQ_LEN)]


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_records_change_nothing_else(corpus: Path, workers: int) -> None:
    """For one rank; the count goes on where the position does."""
    expected = take(loader(corpus, workers=workers), 60)
    for number in (1, 2):
        file = corpus / f"train-{number}.json.gz"
        lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
        file.write_bytes(gzip.compress(b"".join([*lines[:2], b"[]\n", *lines[2:]])))
    assert take(loader(corpus, workers=workers, bad=2), 60) == expected
    if not workers:
        check_resume(lambda: loader(corpus, bad=2), range(0, 40, 3))
        for every in (1, 1000):
            state = None
            with pytest.raises(
                DataError, match=r"train-2\.json\.gz: record 3 is no object .*training\.max_bad_records=1"
            ):
                for _ in range(60):
                    reader = loader(corpus, bad=1)
                    if state is not None:
                        reader.load_state_dict(state)
                    take(reader, every)
                    state = reader.state_dict()


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
    epochs = [list(data._get_data_iter())]
    data._data.set_epoch(1)
    epochs.append(list(data._get_data_iter()))
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
