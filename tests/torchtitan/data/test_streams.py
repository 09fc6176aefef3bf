"""The order of the training tokens: the same on any number of ranks and data workers, through every resume."""

import json
import pickle
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.experiments.lighthouse.data import documents, pieces, records, sources, streams, text_datasets
from torchtitan.experiments.lighthouse.data.stream_loader import Header, StreamLoader, nearest_divisors
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from helpers.loaders import BOS, EOS, N, Ranks, Sequence, config_for, flat, without_ranks, write


@pytest.fixture(autouse=True)
def registered() -> None:
    sources.register_datasets()


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stream gets no document, the files would be read forever: the test is to fail."""
    in_order = documents.FileDocuments.in_order

    def in_some_epochs(self: documents.FileDocuments, epoch: int) -> list[str]:
        assert epoch < 1000, "a stream waits for a document that does not come"
        return in_order(self, epoch)

    monkeypatch.setattr(documents.FileDocuments, "in_order", in_some_epochs)


@pytest.fixture
def files() -> list[list[str]]:
    """23 documents, some shorter than a sequence and some much longer, in files of different sizes."""
    texts = [f"<{index}>" + "x" * (index * 17 % 41) for index in range(23)]
    return [texts[:5], texts[5:6], texts[6:18], texts[18:]]


@pytest.fixture
def corpus(tmp_path: Path, files: list[list[str]]) -> Path:
    return write(tmp_path / "corpus", files)


def endless(files: list[list[str]]) -> Iterator[str]:
    for epoch in count():
        order = np.arange(len(files))
        if epoch:
            np.random.default_rng(epoch).shuffle(order)
        for number in order:
            yield from files[number]


class Dealt:
    """What the scheme says, in its plainest form: streams as lists of tokens, cut in turn."""

    def __init__(self, files: list[list[str]], streams: int) -> None:
        self.streams: list[list[int]] = [[] for _ in range(streams)]
        for number, text in enumerate(islice(endless(files), 100 * streams)):
            self.streams[number % streams] += [BOS, *text.encode(), EOS]
        self.used = [0] * streams
        self.next = 0

    def step(self, sequences: int, seq_len: int = N) -> list[Sequence]:
        batch = []
        for _ in range(sequences):
            stream = self.streams[self.next]
            first = self.used[self.next]
            assert len(stream) >= first + seq_len + 1
            batch.append(tuple(stream[first : first + seq_len + 1]))
            self.used[self.next] += seq_len + 1
            self.next = (self.next + 1) % len(self.streams)
        return sorted(batch)


@pytest.mark.parametrize(("ranks", "batch"), [(1, 1), (1, 3), (1, 12), (2, 1), (2, 6), (3, 2), (4, 1), (6, 2), (12, 1)])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(corpus, files, ranks, batch) -> None:
    """And so is the position. Into the third epoch."""
    dealt, one = Dealt(files, 12), Ranks(corpus, 1, 12)
    some = Ranks(corpus, ranks, 12, batch=batch)
    for _ in range(14):
        assert some.step() == one.step() == dealt.step(12)
        assert without_ranks(some.state) == without_ranks(one.state)
    assert json.loads(some.state["stream_0"])[0] >= 2


@pytest.mark.parametrize(("ranks", "batch", "workers"), [(1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 3), (2, 3, 2)])
def test_data_workers_change_nothing(corpus, files, ranks, batch, workers) -> None:
    """Neither the batches nor the position, which is that of the batches handed out, not of those read ahead; also
    where the streams cannot be shared out among them."""
    dealt = Dealt(files, 6)
    some, none = Ranks(corpus, ranks, 6, batch=batch, workers=workers), Ranks(corpus, 1, 6)
    for _ in range(5):
        assert some.step() == none.step() == dealt.step(6)
        assert without_ranks(some.state) == without_ranks(none.state)
    resumed = Ranks(corpus, ranks, 6, batch=batch, workers=workers % 3 + 1, state=none.state)
    assert resumed.steps(3) == [dealt.step(6) for _ in range(3)]


def test_workers_share_the_streams_out_where_they_can(corpus) -> None:
    def shares(sequences: int, batch: int, workers: int) -> list[set[int]]:
        (loader,) = Ranks(corpus, 1, sequences, batch=batch).loaders
        dataset = loader._dataset()
        return [dataset.streams_of_worker(worker, workers) for worker in range(workers)]

    assert shares(6, 1, 2) == [{0, 2, 4}, {1, 3, 5}]
    assert shares(8, 2, 2) == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert shares(4, 4, 2) == [{0, 1, 2, 3}] * 2


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_run_goes_on_at_any_number_of_ranks(corpus, files, before, after) -> None:
    """From every position: inside documents, at their ends, across the ends of files and epochs."""
    dealt = Dealt(files, 4)
    first, expected = Ranks(corpus, before, 4), [dealt.step(4) for _ in range(45)]
    for step in range(40):
        if step % (1 if before != after else 4) == 0:
            assert Ranks(corpus, after, 4, state=first.state).steps(3) == expected[step : step + 3], f"step {step}"
        assert first.step() == expected[step]


def test_a_chain_of_contexts_and_ranks_loses_and_repeats_nothing(corpus, files) -> None:
    """The number of streams stays that of the start, whatever the number of sequences in a step."""
    dealt, state = Dealt(files, 12), None
    chain = [
        (12, 4, 4, 0),
        (6, 9, 2, 0),
        (1, 99, 1, 0),
        (4, 29, 4, 0),
        (24, 3, 3, 2),
        (12, 4, 12, 0),
        (5, 2, 1, 1),
        (1, 3, 1, 0),
    ]
    for sequences, seq_len, ranks, workers in chain:
        stage = Ranks(corpus, ranks, sequences, seq_len=seq_len, workers=workers, state=state)
        for _ in range(2):
            assert stage.step() == dealt.step(sequences, seq_len)
        state = stage.state
        assert json.loads(state["streams"])["streams"] == 12 and len(state) == 13
    assert json.loads(state["streams"])["next_stream"] == dealt.next != 0
    assert json.loads(state["streams"])["tokens_seen"] == sum(2 * s * n for s, n, _, _ in chain)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_sequence_per_step_reads_as_ever(corpus, workers) -> None:
    """As versions before the streams did, so that measured runs can be compared: one rank, in every epoch."""
    config = config_for(corpus, N, 1, -1, workers)
    tokenizer = build_tokenizer(config)
    older = text_datasets.build_rank_dataloader(config.training, 1, 0, tokenizer, True)
    assert flat(iter(text_datasets.build_dataloader(1, 0, tokenizer, config)), 150) == flat(iter(older), 150)


@pytest.mark.parametrize("folder", ["documents", "files"])
def test_one_sequence_per_rank_reads_as_ever_in_the_first_epoch(corpus, files, tmp_path, folder) -> None:
    """Where older versions dealt documents out too: the number of files is no multiple of the ranks, or each file is
    one document, as in ``stdlib``."""
    single = [[text] for texts in files for text in texts][:21]
    path = corpus if folder == "documents" else write(tmp_path / "single", single)
    config = config_for(path, N, 1, -1)
    tokenizer = build_tokenizer(config)
    for rank in range(3):
        older = text_datasets.build_rank_dataloader(config.training, 3, rank, tokenizer, False)
        expected = flat(iter(older), 1000)
        assert len(expected) > 10
        assert flat(iter(text_datasets.build_dataloader(3, rank, tokenizer, config)), len(expected)) == expected


def test_files_are_read_once_a_rank_and_not_once_a_stream(corpus, monkeypatch) -> None:
    opened: list[str] = []
    open_file = records._open
    monkeypatch.setattr(records, "_open", lambda file: opened.append(Path(file).name) or open_file(file))
    names = [f"train-{number}.jsonl" for number in range(4)]
    one = Ranks(corpus, 1, 12)
    one.steps(8)
    epochs = max(json.loads(one.state[f"stream_{number}"])[0] for number in range(12))
    assert epochs >= 1 and len(opened) <= 4 * (epochs + 1)
    assert all(sorted(opened[first : first + 4]) == names for first in range(0, len(opened) - 3, 4))
    opened.clear()
    Ranks(corpus, 2, 12, state=one.state).step()
    assert len(opened) <= 2 * 8


def test_a_rank_cuts_only_its_own_documents_into_tokens(corpus) -> None:
    ranks = Ranks(corpus, 4, 4)
    cut: list[list[str]] = [[] for _ in range(4)]
    for number, loader in enumerate(ranks.loaders):
        encode = loader._encode
        loader._encode = lambda text, number=number, encode=encode: cut[number].append(text) or encode(text)
    ranks.steps(8)
    for number, texts in enumerate(cut):
        first = [f"<{index}>" for index in range(number, 23, 4)]
        assert [text[: text.index(">") + 1] for text in texts][: len(first)] == first[: len(texts)]


@pytest.mark.parametrize("most", [0, 1, 60, 400])
def test_what_is_kept_is_bounded_and_changes_nothing(tmp_path, monkeypatch, most) -> None:
    """Documents of stream 3 are much shorter than the others', so that it reads far ahead of them."""
    texts = [f"<{index}>" + ("" if index % 4 == 3 else "x" * 60) for index in range(40)]
    corpus = write(tmp_path / "uneven", [texts[:25], texts[25:]])
    expected = Dealt([texts], 4)
    monkeypatch.setattr(streams, "MOST_TEXT_KEPT", most)
    kept: list[int] = []
    following = streams._Readers.next

    def watched(self: streams._Readers, stream: int):
        document = following(self, stream)
        kept.append(sum(reader.text_kept for reader in self._readers))
        held = [len(text) for reader in self._readers for queue in reader._kept.values() for _, text in queue]
        assert kept[-1] == sum(held) <= most
        return document

    monkeypatch.setattr(streams._Readers, "next", watched)
    ranks = Ranks(corpus, 1, 4)
    assert ranks.steps(12) == [expected.step(4) for _ in range(12)]
    assert Ranks(corpus, 2, 4, state=ranks.state).steps(3) == [expected.step(4) for _ in range(3)]
    assert len(kept) > 30


def test_fewer_documents_than_streams_are_enough(tmp_path) -> None:
    corpus = write(tmp_path / "few", [["abc", "defgh"], ["i"]])
    dealt = Dealt([["abc", "defgh"], ["i"]], 8)
    ranks = Ranks(corpus, 2, 8)
    assert ranks.steps(5) == [dealt.step(8) for _ in range(5)]
    assert Ranks(corpus, 4, 8, state=ranks.state).step() == dealt.step(8)


def test_no_document_at_all_is_an_error_not_a_hang(tmp_path) -> None:
    with pytest.raises(DataError, match="'c4_local' has no document with text"):
        Ranks(write(tmp_path / "none", [[], []]), 1, 4).step()


def test_an_end_is_reached_where_one_is_asked_for(corpus, files) -> None:
    config = config_for(corpus, N, 1, 2)
    batches = flat(iter(text_datasets.build_dataloader(1, 0, build_tokenizer(config), config, infinite=False)), 1000)
    texts = [text for texts in files for text in texts]
    tokens = [sum(len(text) + 2 for text in texts[stream::2]) // (N + 1) for stream in range(2)]
    assert len(batches) == 2 * min(tokens) + (tokens[1] < tokens[0])


# Bad records


@pytest.fixture
def bad_corpus(corpus: Path) -> Path:
    """The same documents, with bad records before, among and after them: 1, 1, 2 and 0 in the four files."""
    for number, after in ((0, [0]), (1, [1]), (2, [4, 12])):
        file = corpus / f"train-{number}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        for place in reversed(after):
            lines.insert(place, '{"text": "cut sho\n')
        file.write_text("".join(lines))
    return corpus


@pytest.mark.parametrize(("ranks", "batch", "workers"), [(1, 1, 0), (2, 1, 1), (4, 1, 0), (1, 2, 2)])
def test_skipped_records_change_nothing_else(bad_corpus, files, ranks, batch, workers) -> None:
    """Into the third epoch; the position is the same on any number of ranks, and goes on at any."""
    dealt, one = Dealt(files, 4), Ranks(bad_corpus, 1, 4, bad=4)
    some = Ranks(bad_corpus, ranks, 4, batch=batch, workers=workers, bad=4)
    seen = set()
    for _ in range(40):
        assert some.step() == one.step() == dealt.step(4)
        assert without_ranks(some.state) == without_ranks(one.state)
        seen.add(max(loader.bad_records for loader in some.loaders))
    epoch, *_ = json.loads(some.state["stream_0"])
    assert epoch >= 2 and seen >= {1, 2, 3, 4}
    resumed = Ranks(bad_corpus, 4 // ranks, 4, bad=4, state=some.state)
    assert resumed.steps(20) == [dealt.step(4) for _ in range(20)]


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_one_bad_record_too_many_is_named(bad_corpus, most) -> None:
    """The same one, however often the run has stopped before it, with the files in another order each time."""
    file, number = [(0, 1), (1, 2), (2, 5), (2, 14)][most]
    for every in (1, 3, 1000):
        state = None
        with pytest.raises(DataError, match=rf"train-{file}\.jsonl: record {number} is no JSON") as caught:
            for _ in range(40):
                ranks = Ranks(bad_corpus, 2, 4, bad=most, state=state)
                ranks.steps(every)
                state = ranks.state
        assert "training.max_bad_records" in str(caught.value)


def test_a_bad_record_that_was_mended_is_a_change(bad_corpus) -> None:
    """Where some streams are before it and some behind it: which document is whose is not what it was."""
    ranks, bad = Ranks(bad_corpus, 1, 4, bad=4), [0, 2, 4]
    while True:
        ranks.step()
        places = [json.loads(ranks.state[f"stream_{number}"]) for number in range(4)]
        if min(places) < bad < max(places):
            break
    file = bad_corpus / "train-2.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert "cut sho" in lines[4]
    file.write_text("".join([*lines[:4], json.dumps({"text": "mended"}) + "\n", *lines[5:]]))
    with pytest.raises(DataError, match="files have changed"):
        Ranks(bad_corpus, 1, 4, bad=4, state=ranks.state).step()


# Documents of any length


@pytest.mark.parametrize("piece", [3, 16])
def test_long_documents_come_in_pieces_and_change_nothing(corpus, files, monkeypatch, piece) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    dealt, ranks = Dealt(files, 4), Ranks(corpus, 2, 4)
    expected = [dealt.step(4) for _ in range(33)]
    for step in range(30):
        if step % 3 == 0:
            assert Ranks(corpus, 1, 4, state=ranks.state).steps(3) == expected[step : step + 3]
        assert ranks.step() == expected[step]


def test_of_a_long_document_only_what_is_needed_is_cut_into_tokens(tmp_path, monkeypatch) -> None:
    corpus = write(tmp_path / "long", [["x" * 100_000]])
    monkeypatch.setattr(pieces, "PIECE", 1000)
    given: list[int] = []
    whole = pieces.PieceEncoder.__call__
    monkeypatch.setattr(
        pieces.PieceEncoder, "__call__", lambda self, text: (given.append(len(p)) or p for p in whole(self, text))
    )
    Ranks(corpus, 1, 1).steps(20)
    assert sum(given) <= 1001


@pytest.mark.parametrize("blank", [[""], ["", " ", "\n\t"]])
def test_documents_without_text_count_where_others_have_some(tmp_path, blank) -> None:
    """As ever: a begin and an end. Alone, they are an error when all are read."""
    files = [["abc", *blank], [*blank, "defgh"]]
    ranks, dealt = Ranks(write(tmp_path / "some", files), 2, 4), Dealt(files, 4)
    assert ranks.steps(5) == [dealt.step(4) for _ in range(5)]
    with pytest.raises(DataError, match="'c4_local' has no document with text"):
        Ranks(write(tmp_path / "none", [blank * 20, blank]), 1, 4).steps(100)


# The position in a checkpoint


def test_a_position_is_text_alone(corpus) -> None:
    ranks = Ranks(corpus, 2, 4)
    begun = ranks.state
    assert {key: value for key, value in begun.items() if key != "streams"} == dict.fromkeys(
        [f"stream_{number}" for number in range(4)], "null"
    )
    ranks.step()
    assert all(type(value) is str and json.loads(value) for value in ranks.state.values())
    header = Header.from_json(ranks.state["streams"])
    assert header == Header(streams=4, next_stream=0, tokens_seen=4 * N, tokens_per_step=4 * N, ranks=2)
    assert Ranks(corpus, 1, 4, state=begun).steps(2) == Ranks(corpus, 1, 4).steps(2)
    # A position may be saved again before it is used.
    assert without_ranks(Ranks(corpus, 4, 4, state=ranks.state).state) == without_ranks(ranks.state)


def test_a_rank_asks_for_its_own_streams_alone(corpus) -> None:
    """Of a position with another number of streams than its settings have sequences, too."""
    keys = Ranks(corpus, 1, 12).state.keys()
    loader = Ranks(corpus, 2, 4).loaders[1]
    assert loader.state_dict().keys() == {"streams", "stream_1", "stream_3"}
    loader.prepare_to_load(keys)
    assert loader.state_dict().keys() == {"streams", *(f"stream_{number}" for number in range(1, 12, 2))}


def test_upstreams_checkpoint_manager_reads_what_the_settings_name(corpus) -> None:
    """It does not say which keys there are. That is enough where the number of streams is that of the settings."""
    saved = Ranks(corpus, 2, 4)
    saved.steps(3)

    def load(sequences: int) -> StreamLoader:
        loader = Ranks(corpus, 2, sequences).loaders[1]
        loader.load_state_dict({key: saved.state[key] for key in loader.state_dict()})
        return loader

    assert flat(iter(load(4)), 3) == flat(iter(Ranks(corpus, 2, 4, state=saved.state).loaders[1]), 3)
    with pytest.raises(
        Refused, match=r"has 4 streams, and stream_3 was not read: .* -m torchtitan\.experiments\.light"
    ):
        load(2)


def test_the_tokens_of_all_ranks_add_up(corpus) -> None:
    ranks = Ranks(corpus, 2, 6)
    ranks.steps(3)
    for number in (1, 2, 3, 6):
        loaders = Ranks(corpus, number, 6, state=ranks.state).loaders
        assert sum(loader.tokens_seen_by_rank for loader in loaders) == 3 * 6 * N
    assert all(loader.resumed for loader in loaders) and not ranks.loaders[0].resumed


def test_ranks_that_do_not_divide_the_streams_are_refused(corpus) -> None:
    state = Ranks(corpus, 2, 12).state
    message = r"5 data-parallel rank\(s\): must divide the 12 streams .*; nearest valid value: 4 or 6\. To give it up"
    with pytest.raises(Refused, match=message):
        Ranks(corpus, 5, 5, state=state)
    with pytest.raises(Refused, match=r"nearest valid value: 12\."):
        Ranks(corpus, 24, 24, state=state)


@pytest.mark.parametrize(
    ("number", "to", "nearest"), [(12, 5, [4, 6]), (12, 24, [12]), (12, 3, [3]), (1, 7, [1]), (7, 2, [1, 7])]
)
def test_nearest_divisors(number, to, nearest) -> None:
    assert nearest_divisors(number, to) == nearest


def test_a_batch_that_would_follow_the_ranks_is_refused(corpus) -> None:
    """Without training.global_batch_size a step has what the ranks take at once."""
    state = Ranks(corpus, 4, 4).state
    config = config_for(corpus, N, 1, -1)
    loader = text_datasets.build_dataloader(2, 0, build_tokenizer(config), config)
    with pytest.raises(
        Refused, match=r"batch_size=-1: a step would have 16 tokens on 2 .*, and it had 32 on 4; .*: 4$"
    ):
        loader.load_state_dict(state)
    config.training.local_batch_size = 2
    text_datasets.build_dataloader(2, 0, build_tokenizer(config), config).load_state_dict(state)


def test_files_that_changed_are_named(corpus, files) -> None:
    ranks = Ranks(corpus, 1, 4)
    for _ in range(20):
        ranks.step()
        epoch, file, record, token = min(json.loads(ranks.state[f"stream_{number}"]) for number in range(4))
        if record > 1 and token > 2:
            break
    assert epoch == 0 and record > 1 and token > 2
    at = rf"in record {record + 1} of .*train-{file}\.jsonl, and this is not what .* files have changed"

    def refused(changed: list[str]) -> None:
        write(corpus, [*files[:file], changed, *files[file + 1 :]])
        with pytest.raises(DataError, match=at):
            Ranks(corpus, 1, 4, state=ranks.state).step()

    refused(files[file][:record])
    refused([*files[file][:record], "", *files[file][record + 1 :]])
    moved = {**ranks.state, "stream_1": json.dumps([epoch, file, record + 1, 0])}
    write(corpus, files)
    with pytest.raises(DataError, match="files have changed"):
        Ranks(corpus, 1, 4, state={**moved, "stream_2": moved["stream_1"]}).step()


# Older versions


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_an_older_position_goes_on_as_it_was(corpus, ranks, workers) -> None:
    """At its own size, with the very same batches; what is saved then is one of its kind again."""
    config = config_for(corpus, N, 2, -1, workers)
    tokenizer = build_tokenizer(config)
    older = [
        text_datasets.build_rank_dataloader(config.training, ranks, rank, tokenizer, True) for rank in range(ranks)
    ]
    going_on = [iter(loader) for loader in older]
    for step in range(3):
        for batches in going_on:
            flat(batches, 2 * step + 1)
        state = {key: value for loader in older for key, value in loader.state_dict().items()}
        for rank in range(ranks):
            loader = text_datasets.build_dataloader(ranks, rank, tokenizer, config)
            loader.prepare_to_load(state.keys())
            assert loader.state_dict().keys() == {f"dp_rank_{rank}", "world_size"}
            loader.load_state_dict(pickle.loads(pickle.dumps(state)))
            twin = text_datasets.build_rank_dataloader(config.training, ranks, rank, tokenizer, True)
            twin.load_state_dict(state)
            assert flat(iter(loader), 4) == flat(iter(twin), 4)
            assert loader.state_dict().keys() == {f"dp_rank_{rank}", "world_size"} and not loader.resumed
    with pytest.raises(Refused, match=rf"an older version saved .* is that of {ranks}; nearest valid value: {ranks}"):
        text_datasets.build_dataloader(4, 0, tokenizer, config).load_state_dict(state)


def test_a_dataset_of_another_kind_keeps_upstreams_order(monkeypatch) -> None:
    def loader(path: str) -> IterableDataset:
        return IterableDataset.from_generator(lambda: ({"text": "abcdefgh"} for _ in count()))

    monkeypatch.setitem(DATASETS, "theirs", DatasetConfig(path="", loader=loader, sample_processor=lambda x: x["text"]))
    config = config_for(Path(), N, 1, -1)
    config.training.dataset = "theirs"
    assert isinstance(text_datasets.build_dataloader(1, 0, build_tokenizer(config), config), ParallelAwareDataloader)
    config.training.dataset = "nobodys"
    with pytest.raises(Refused, match=r"training\.dataset='nobodys': must be one of c4, "):
        text_datasets.build_dataloader(1, 0, build_tokenizer(config), config)


def test_two_workers_that_need_the_same_streams_cut_the_same_tokens(corpus, monkeypatch) -> None:
    """Each moves them on where the other one hands them out."""
    (loader,) = Ranks(corpus, 1, 4, batch=4).loaders
    whole = [batch.inputs.tolist() for batch in islice(loader._dataset(), 6)]
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(streams, "get_worker_info", lambda info=info: info)
        assert [batch.inputs.tolist() for batch in islice(loader._dataset(), 3)] == whole[worker::2]
    assert torch.is_tensor(next(iter(loader._dataset())).labels)
