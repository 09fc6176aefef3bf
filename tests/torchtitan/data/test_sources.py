"""Datasets from settings alone: folders, repositories in the Hub's layout, and readers of one's own."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from torchtitan.experiments.lighthouse.data import files, sources
from torchtitan.experiments.lighthouse.data.checks import check_data
from torchtitan.experiments.lighthouse.data.documents import chance
from torchtitan.experiments.lighthouse.data.files import Asked
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.hf_datasets.text_datasets import DATASETS

from helpers.loaders import N, Ranks, config_for, write


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(DATASETS)
    sources.register_datasets()
    yield
    DATASETS.clear()
    DATASETS.update(before)


def lines(texts: list[str], column: str) -> bytes:
    return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "books"
    (root / "deep/er").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "a.jsonl").write_bytes(lines(["one", "two"], "content"))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines(["three"], "content")))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "content": ["four", "five"]}), root / "deep/c.parquet")
    (root / "deep/er/d.txt").write_bytes("\ufeffsix\nis ëverything\n\n".encode())
    (root / "README.md").write_text("no data")
    (root / ".git/x.txt").write_text("hidden")
    return root


def documents(**asked: str) -> list[str]:
    found = sources.find(Asked(**asked))
    assert found is not None
    return [text if isinstance(text, str) else str(text) for file in found.files for text in found.read(file)]


def test_a_folder_of_any_kinds_of_files_at_any_depth(folder: Path) -> None:
    whole = ["one", "two", "three", "four", "five", "six\nis ëverything\n\n"]
    assert documents(dataset="local", path=str(folder), column="content") == whole
    config = config_for(folder, N, 1, 2, dataset="local", text_column="content")
    check_data(config)
    tokens = Ranks(folder, 2, 2, dataset="local", text_column="content", seq_len=14).step()
    assert tokens[0][:5] == (256, *b"one", 257) and tokens[1][:5] == (256, *b"two", 257)


def test_a_text_file_that_is_no_utf8_is_a_bad_record(folder: Path) -> None:
    (folder / "e.txt").write_bytes(b"caf\xe9")
    assert "e.txt: record 1 is no UTF-8" in documents(dataset="local", path=str(folder), column="content")[-1]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["a.txt", "b/c.txt"], "", ["a.txt", "b/c.txt"]),
        (["a.txt", "b/c.txt"], "train", ["a.txt", "b/c.txt"]),
        (["constraint.txt", "b.txt"], "train", ["b.txt", "constraint.txt"]),
        (["x-train-0.txt", "b.txt", "validation/c.txt"], "train", ["x-train-0.txt"]),
        (["a.txt", "b.txt", "validation/c.txt"], "train", ["a.txt", "b.txt"]),
        (["a.txt", "b.txt", "validation/c.txt"], "validation", ["validation/c.txt"]),
        (["validation-0.txt"], "", ["validation-0.txt"]),
        (["2024/a.txt", "2025/a.txt"], "2025", ["2025/a.txt"]),
    ],
)
def test_the_files_of_a_split_have_its_name_as_a_word(tmp_path: Path, names, split, chosen) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(dataset="local", path=str(tmp_path), split=split) == chosen


def test_files_for_validation_are_never_trained_on_by_mistake(tmp_path: Path) -> None:
    for name in ("a.txt", "validation.txt"):
        (tmp_path / name).write_text(name)
    message = r"training\.dataset_split='': .* has files for validation too \(validation\.txt\): .* value: 'train'"
    with pytest.raises(DataError, match=message):
        documents(dataset="local", path=str(tmp_path))
    with pytest.raises(DataError, match=r"dataset_split='test': none of the 2 data files .*; nearest valid value: ''"):
        documents(dataset="local", path=str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dataset": "local"}, r"training\.dataset_path='': dataset 'local' reads a local folder"),
        ({"dataset": "local", "path": "/absent"}, r"'/absent' is not a folder"),
        ({"dataset": "nothing"}, r"training\.dataset='nothing': must be one of .*hub, local, "),
        ({"dataset": "c4_local", "column": "content"}, r"text_column='content': .* unlike 'local', 'hub'; .*'text'$"),
        ({"dataset": "stdlib", "split": "train"}, r"dataset_split='train': dataset 'stdlib' has no use"),
        ({"dataset": "local", "config": "en"}, r"dataset_config='en': dataset 'local' has no use for it, unlike 'hub'"),
        ({"dataset": "hub", "path": "c4"}, r"dataset_path='c4': .* no id like 'allenai/c4'; .*: 'owner/name'"),
        ({"dataset": "hub", "path": "/data/c4"}, r"or training\.dataset='local' for a folder"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_refused(asked, message) -> None:
    with pytest.raises(Refused, match=message):
        sources.find(Asked(**asked))


def test_a_column_that_is_not_there_is_named_before_the_run(folder: Path) -> None:
    for column, nearest in (("text", "content"), ("contents", "content"), ("ids", "id")):
        config = config_for(folder, N, 1, 2, dataset="local", text_column=column)
        with pytest.raises(DataError, match=rf"text_column='{column}': .*a\.jsonl has no such column; .* '{nearest}'$"):
            check_data(config)


# The Hub


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository as the Hub has it: what is where is said in its README."""
    root = tmp_path / "repository"
    for name in ("en/train-0.jsonl", "en/train-1.jsonl", "en/test-0.jsonl", "de/train-0.jsonl", "sheet/train.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(lines([name], "content"))
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train*\n{more}"
        for name, more in (("en", "  - split: test\n    path: en/test*\n"), ("de", ""), ("sheet", ""))
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return root


def test_a_repository_says_which_files_a_configuration_and_a_split_have(repository: Path) -> None:
    def listed(**asked: str) -> list[str]:
        found = files.list_repository(Asked("hub", "owner/name", **asked), str(repository))
        return [Path(file).relative_to(repository).as_posix() for file in found]

    assert listed(config="en") == listed(config="en", split="train") == ["en/train-0.jsonl", "en/train-1.jsonl"]
    assert listed(config="en", split="test") == ["en/test-0.jsonl"]
    assert listed(config="de") == ["de/train-0.jsonl"]
    refused = r"training\.dataset_config='': must be one of 'en', 'de', 'sheet'; nearest valid value: 'en'"
    with pytest.raises(DataError, match=refused):
        listed()
    with pytest.raises(DataError, match=r"dataset_config='fr': must be one of 'en', 'de', 'sheet'"):
        listed(config="fr")
    with pytest.raises(DataError, match=r"dataset_split='test': must be one of 'train'; nearest valid value: 'train'"):
        listed(config="de", split="test")
    with pytest.raises(DataError, match=r"train\.csv cannot be read; supported are .*\.parquet, .*docs/data\.md"):
        listed(config="sheet")


def test_a_dataset_on_the_hub_is_read_in_streams_by_its_id_and_revision(repository: Path, monkeypatch) -> None:
    asked_for = []

    def listed(asked: Asked, name: str, revision: str | None) -> list[str]:
        asked_for.append((name, revision))
        return listing(asked, str(repository))

    listing = files.list_repository
    monkeypatch.setattr(files, "list_repository", listed)
    settings = {"dataset": "hub", "dataset_path": "owner/name@v1", "dataset_config": "en", "text_column": "content"}
    whole = Ranks(repository, 1, 2, **settings)
    assert whole.steps(4) == Ranks(repository, 2, 2, **settings).steps(4)
    assert asked_for[0] == ("owner/name", "v1")
    check_data(config_for(repository, N, 1, 2, **settings))


# A reader of one's own


def test_a_dataset_of_ones_own_has_all_of_it(tmp_path: Path) -> None:
    """Streams, shuffling, held-out documents, mixtures, exact resume."""
    other = write(tmp_path / "other", [["from elsewhere"] * 5])

    def listed(path: str, split: str) -> list[str]:
        return [f"{path}/{split}/{shard}" for shard in range(3)]

    def read(shard: str) -> Iterator[str]:
        return (f"{shard}: {number}\ud800" for number in range(4))

    sources.register_dataset("Mine", listed, read, path="db")
    texts = documents(dataset="mine", split="a")
    assert len(texts) == 12 and texts[:2] == ["db/a/0: 0?", "db/a/0: 1?"]
    tables = [{"dataset": "mine", "dataset_split": "a"}, {"dataset_path": str(other)}]
    for settings in (
        {"dataset": "mine", "dataset_path": None, "shuffle_buffer": 5, "held_out_share": 0.2},
        {"dataset": "mixture", "mixture": tables},
    ):
        one, two = Ranks(tmp_path, 1, 4, **settings), Ranks(tmp_path, 2, 4, **settings)
        for _ in range(9):
            assert one.step() == two.step()
        assert Ranks(tmp_path, 4, 4, state=two.state, **settings).steps(3) == one.steps(3)


def test_a_dataset_in_upstreams_way_cannot_be_divided() -> None:
    mixed = {"dataset": "mixture", "mixture": [{"dataset": "c4_test"}]}
    for settings in ({"held_out_share": 0.1}, {"shuffle_buffer": 3}, mixed):
        setting = "mixture" if "mixture" in settings else next(iter(settings))
        message = rf"training\.{setting}: dataset 'c4_test' .*upstream's way, .*nearest valid value: one of c4, .*local"
        with pytest.raises(Refused, match=message):
            Ranks(Path(), 1, 1, **{"dataset": "c4_test"} | settings)


# Held-out documents, before the run


def held_out_config(path: Path, share: float | None, **training):
    config = config_for(path, N, 1, 2, held_out_share=share, **training)
    config.validation.enable, config.validation.dataset = True, "held_out"
    return config


def test_that_something_is_held_out_is_known_before_the_run(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(40)]
    corpus = write(tmp_path / "corpus", [texts[:20], texts[20:]])
    check_data(held_out_config(corpus, 0.2))
    least = min(map(chance, texts))
    with pytest.raises(DataError, match=r"held_out_share=0\.0001: none .* few; nearest valid value: 0\.\d+,") as told:
        check_data(held_out_config(corpus, 0.0001))
    nearest = float(str(told.value).split("nearest valid value: ")[1].split(",")[0])
    assert least < nearest < 2 * least + 1e-3
    check_data(held_out_config(corpus, nearest))
    with pytest.raises(Refused, match=r"held_out_share=0 holds nothing out; nearest valid value: .*=0\.01"):
        check_data(held_out_config(corpus, 0.0))
    with pytest.raises(Refused, match=r"validation\.dataset='held_out': dataset 'c4_test' .*cannot be divided"):
        check_data(held_out_config(corpus, None, dataset="c4_test"))
    with pytest.raises(Refused, match=r"training\.dataset='held_out': must be what is trained on; .*'local'"):
        check_data(config_for(corpus, N, 1, 2, dataset="held_out"))


def test_no_text_is_left_where_all_is_too_short(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", [["short", "also"]])
    with pytest.raises(DataError, match=r"no document with text of at least 9 characters"):
        next(islice(Ranks(corpus, 1, 1, min_document_chars=9).batches[0], 1))
