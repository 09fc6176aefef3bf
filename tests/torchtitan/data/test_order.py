"""Shuffling, mixing, holding out and dropping: the same on any number of ranks, through every resume."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from torchtitan.experiments.lighthouse.data import documents, mixture, records, sources, text_datasets
from torchtitan.experiments.lighthouse.data.documents import Choice, FileDocuments, Shuffling, chance
from torchtitan.experiments.lighthouse.data.mixture import Mixture
from torchtitan.experiments.lighthouse.data.records import read_texts
from torchtitan.experiments.lighthouse.data.section import held_out_share, scored
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import DataError, Refused

from helpers.loaders import EOS, N, Ranks, config_for, without_ranks, write

FILES = [
    [f"<{file}.{number}>" + "x" * (7 * number % 23) for number in range(count)] for file, count in enumerate((9, 1, 14))
]
EVERYTHING = Choice()
TEXTS = [text for texts in FILES for text in texts]


@pytest.fixture(autouse=True)
def registered() -> None:
    sources.register_datasets()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus", FILES)


@pytest.fixture
def mixed(tmp_path: Path, corpus: Path) -> dict:
    """Settings of a mixture with a second dataset, whose few documents are longer."""
    longer = write(tmp_path / "longer", [["L" + "y" * 300, "M" + "y" * 150], ["N" + "y" * 450]])
    tables = [{"dataset_path": str(corpus), "weight": 1}, {"dataset_path": str(longer), "weight": 3}]
    return {"dataset": "mixture", "mixture": tables, "data_seed": 5}


def order(path: Path, shuffling: Shuffling, number: int, start=None, choice: Choice = EVERYTHING) -> list[str]:
    files = sorted(map(str, path.iterdir()))
    of_files = FileDocuments("corpus", files, read_texts, shuffling=shuffling, choice=choice)
    return [text for _, text in islice(of_files.read_from(start), number)]


# Shuffling


@pytest.mark.parametrize("buffer", [2, 4, 1000])
def test_each_epoch_has_each_document_once_in_an_order_of_its_own(corpus, buffer) -> None:
    epochs = [order(corpus, Shuffling(buffer, seed=3), 72)[24 * epoch :][:24] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, TEXTS]}) == 4
    assert order(corpus, Shuffling(buffer, seed=3), 24) == epochs[0] != order(corpus, Shuffling(buffer, seed=4), 24)


def test_the_files_are_shuffled_too_in_each_epoch(corpus) -> None:
    """Seen by blocks of one document, whose order is that of the files."""
    read = order(corpus, Shuffling(1, seed=3), 24 * 8)
    of_files = {tuple(dict.fromkeys(text[1] for text in read[24 * epoch :][:24])) for epoch in range(8)}
    assert len(of_files) > 2 and all(sorted(files) == ["0", "1", "2"] for files in of_files)


def test_a_document_stays_within_its_block_and_may_come_anywhere_there(tmp_path) -> None:
    corpus = write(tmp_path / "one", [[str(number) for number in range(400)]])
    places = [int(text) for text in order(corpus, Shuffling(20), 400)]
    assert all(number // 20 == place // 20 for number, place in enumerate(places))
    assert len({(number % 20, place % 20) for number, place in enumerate(places)}) > 200  # of 400


def test_no_more_is_read_than_the_buffer_holds(corpus, monkeypatch) -> None:
    read = 0

    def counted(file: str):
        nonlocal read
        for text in read_texts(file):
            read += 1
            yield text

    of_files = FileDocuments("corpus", sorted(map(str, corpus.iterdir())), counted, shuffling=Shuffling(5))
    for given, _ in enumerate(islice(of_files.read_from(None), 20)):
        assert read <= given + 5 + 1


# All of them, on ranks


def check_ranks_and_resume(path: Path, steps: int, **training) -> Ranks:
    """The same on one rank, two and four, with data workers; and from every position, on another number of ranks."""
    one, some, workers = (Ranks(path, ranks, 4, workers=ranks // 4, **training) for ranks in (1, 2, 4))
    taken, states = [], [one.state]
    for number in range(steps):
        taken.append(one.step())
        states.append(one.state)
        assert some.step() == taken[-1]
        assert without_ranks(some.state) == without_ranks(one.state)
        if number < 3:
            assert workers.step() == taken[-1]
            assert without_ranks(workers.state) == without_ranks(one.state)
    for step in range(0, steps - 3):
        ranks = (1, 2, 4)[step % 3]
        resumed = Ranks(path, ranks, 4, state=states[step], **training)
        assert resumed.steps(3) == taken[step : step + 3], f"step {step}"
        assert without_ranks(resumed.state) == without_ranks(states[step + 3])
    return one


@pytest.mark.parametrize("buffer", [3, 1000])
def test_a_shuffled_run_is_the_same_on_any_number_of_ranks_and_goes_on(corpus, buffer) -> None:
    last = check_ranks_and_resume(corpus, 27, shuffle_buffer=buffer, data_seed=1)
    assert json.loads(last.state["stream_0"])[0] >= 1  # in its second epoch
    assert json.loads(last.state["streams"])["order"] == f"shuffle_buffer={buffer}, data_seed=1"
    plain = Ranks(corpus, 1, 4)
    assert "order" not in json.loads(plain.state["streams"]) and plain.steps(3) != last.steps(3)


def test_a_position_does_not_grow_with_the_buffer(tmp_path) -> None:
    corpus = write(tmp_path / "many", [[f"{number}" for number in range(5_000)]])
    ranks = Ranks(corpus, 1, 4, shuffle_buffer=4_000)
    ranks.steps(5)
    assert len(json.dumps(ranks.state)) < 500


def test_a_mixture_is_the_same_on_any_number_of_ranks_and_goes_on(corpus, mixed, monkeypatch) -> None:
    monkeypatch.setattr(mixture, "TURN", 64)
    check_ranks_and_resume(corpus, 24, **mixed)
    last = check_ranks_and_resume(corpus, 24, shuffle_buffer=4, **mixed)
    assert json.loads(last.state["streams"])["order"] == "shuffle_buffer=4, data_seed=5, mixture by 0.25, 0.75"


def test_documents_left_out_change_nothing_else(corpus) -> None:
    """Held out or too short, they are passed over, and the rest is dealt as if it were all there is."""
    kept = [[text for text in texts if len(text) >= 9 and chance(text) >= 0.3] for texts in FILES]
    assert 5 < sum(map(len, kept)) < 20
    rest = Ranks(write(corpus.parent / "rest", kept), 1, 4)
    some = check_ranks_and_resume(corpus, 20, held_out_share=0.3, min_document_chars=9)
    again = Ranks(corpus, 2, 4, held_out_share=0.3, min_document_chars=9)
    assert again.steps(20) == rest.steps(20)
    short = sum(len(text) < 9 and chance(text) >= 0.3 for text in TEXTS)
    first_epoch = Ranks(corpus, 1, 1, held_out_share=0.3, min_document_chars=9, seq_len=200)
    first_epoch.step()
    assert 0 < first_epoch.loaders[0].short_documents <= short and some.loaders[0].short_documents <= short


@pytest.mark.parametrize(
    ("before", "was"),
    [({}, "that of the files"), ({"shuffle_buffer": 3}, "shuffle_buffer=3, data_seed=0"),
     ({"shuffle_buffer": 3, "data_seed": 1}, "shuffle_buffer=3, data_seed=1"),
     ({"held_out_share": 0.1}, "held_out_share=0.1"), ({"min_document_chars": 9}, "min_document_chars=9")],
)  # fmt: skip
def test_a_position_in_another_order_is_refused(corpus, before, was) -> None:
    ranks = Ranks(corpus, 1, 4, **before)
    ranks.step()
    for after in ({}, {"shuffle_buffer": 3}, {"shuffle_buffer": 4}, {"held_out_share": 0.2}, {"min_document_chars": 8}):
        if before == after:
            Ranks(corpus, 2, 4, state=ranks.state, **after)
            continue
        with pytest.raises(Refused, match=f"; nearest valid value: {was}. To give it up: --checkpoint.exclude"):
            Ranks(corpus, 2, 4, state=ranks.state, **after)


def test_a_position_in_a_mixture_by_other_weights_is_refused(corpus, mixed) -> None:
    state = Ranks(corpus, 1, 4, **mixed).state
    mixed["mixture"][0]["weight"] = 2
    with pytest.raises(
        Refused, match=r"data_seed=5, mixture by 0\.25, 0\.75, than .* data_seed=5, mixture by 0\.4, 0\.6;"
    ):
        Ranks(corpus, 2, 4, state=state, **mixed)


def test_one_bad_record_too_many_is_the_same_one_however_often_a_shuffled_run_stops(corpus) -> None:
    file = corpus / "train-2.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:5], "cut sho\n", *lines[5:9], "cut sho\n", *lines[9:]]))
    for every in (1, 3, 1000):
        state = None
        with pytest.raises(DataError, match=r"train-2\.jsonl: record 11 is no JSON .*one more than .*=1 "):
            for _ in range(40):
                ranks = Ranks(corpus, 2, 4, bad=1, shuffle_buffer=6, state=state)
                ranks.steps(every)
                state = ranks.state


# Mixtures


def test_shares_are_those_of_the_text(tmp_path) -> None:
    """Of documents whose lengths differ a thousandfold; the rarest dataset is read again and again."""
    lengths = {"a": 500, "b": 3_000, "c": 500_000}
    datasets = [FileDocuments(name, [name], lambda file: iter([file * lengths[file]] * 700)) for name in lengths]
    given: Counter[str] = Counter()
    numbers = []
    for place, text in islice(Mixture(datasets, [0.2, 0.5, 0.3], seed=9).read_from(None), 40_000):
        given[text[0]] += len(text)
        numbers.append(place.number)
    shares = {name: count / given.total() for name, count in given.items()}
    assert shares == pytest.approx({"a": 0.2, "b": 0.5, "c": 0.3}, abs=0.02)
    assert numbers == [*range(40_000)]


def test_the_seed_decides_on_the_draws(corpus, mixed, monkeypatch) -> None:
    monkeypatch.setattr(mixture, "TURN", 64)
    assert Ranks(corpus, 1, 4, **mixed).steps(9) == Ranks(corpus, 1, 4, **mixed).steps(9)
    assert Ranks(corpus, 1, 4, **mixed).steps(9) != Ranks(corpus, 1, 4, **mixed | {"data_seed": 6}).steps(9)


def test_an_end_is_that_of_all_datasets(corpus, mixed) -> None:
    """Where one is asked for: every document of each, once; also from any place on."""
    section = config_for(corpus, N, 1, 1, **mixed).training
    whole = text_datasets.documents_of(section, text_datasets.sources_of(section), endless=False)
    everything = [*whole.read_from(None)]
    texts = [text for _, text in everything]
    assert sorted(texts) == sorted([*TEXTS, "L" + "y" * 300, "M" + "y" * 150, "N" + "y" * 450])
    for number, (place, _) in enumerate(everything):
        saved = whole.place(json.loads(json.dumps(place.as_json())))
        assert [text for _, text in whole.read_from(saved)] == texts[number:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "mixture"}, r"training\.mixture=\[\]: must be a list of tables; .*\[\[training\.mixture\]\]"),
        ({"dataset": "local", "mixture": [{}]}, r"training\.dataset='local': .*nearest valid value: 'mixture'"),
        ({"mixture": [{"wieght": 1}]}, r"training\.mixture\[0\]\.wieght: no such setting; .*'weight'"),
        ({"mixture": [{}, {"weight": 0}]}, r"training\.mixture\[1\]\.weight=0: must be a number above 0; .*: 1"),
        ({"mixture": [{"dataset_path": 3}]}, r"dataset_path=3: must be a text; nearest valid value: '3'"),
        ({"mixture": [{"dataset": "mixture"}]}, r"\[0\]\.dataset='mixture': must be one dataset; .*'local'"),
        ({"mixture": [{"dataset": "locl"}]}, r"training\.mixture\[0\]\.dataset='locl': must be one of .*local"),
        ({"mixture": [{"dataset": "c4", "text_column": "a"}]}, r"\[0\]\.text_column='a': dataset 'c4' has no use"),
    ],
)
def test_a_mixture_that_is_none_is_refused(corpus, settings, message) -> None:
    with pytest.raises(Refused, match=message):
        Ranks(corpus, 1, 4, **{"dataset": "mixture"} | settings)


# Held-out documents


def test_what_is_held_out_depends_on_the_text_alone(tmp_path) -> None:
    """Neither on files nor on other documents; a larger share has the documents of a smaller one too."""
    texts = [f"document {number}" for number in range(3_000)]
    apart = write(tmp_path / "apart", [texts[:1_000], texts[1_000:]])
    backwards = write(tmp_path / "backwards", [texts[::-1]])
    held = {share: {text for text in texts if Choice(share, held_out=True).takes(text)} for share in (0.005, 0.02)}
    assert held[0.005] < held[0.02] and 30 < len(held[0.02]) < 90
    trained = {text for text in texts if Choice(0.02).takes(text)}
    assert trained | held[0.02] == set(texts) and not trained & held[0.02]
    for path in (apart, backwards):
        assert set(order(path, Shuffling(), len(trained), choice=Choice(0.02))) == trained
        assert set(order(path, Shuffling(7), len(held[0.02]), choice=Choice(0.02, held_out=True))) == held[0.02]
    # Of another version too: what was held out stays so.
    assert f"{chance('document 1'):.6f}" == "0.397413"


def validation_batches(path: Path, ranks: int, steps: int, **training):
    config = config_for(path, N, 1, -1, **training)
    config.validation.enable, config.validation.dataset = True, "held_out"
    config.validation.seq_len, config.validation.local_batch_size, config.validation.steps = N, 1, steps
    share = held_out_share(config)
    tokenizer = build_tokenizer(config)
    return share, [
        text_datasets.build_validation_dataloader(ranks, rank, tokenizer, config, steps != -1) for rank in range(ranks)
    ]


def texts_in(loaders: list) -> set[str]:
    """Of whole documents, begin and end of text with them."""
    text = ""
    for loader in loaders:
        tokens = [t for inputs, labels in loader for t in [*inputs["input"][0].tolist(), labels[0, -1].item()]]
        text += bytes(t if t < 256 else 0 for t in tokens).decode() + "\0"
    return {part for part in text.split("\0") if re.fullmatch(r"<\d+\.\d+>x*", part) and part in TEXTS}


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_scores_what_training_never_reads(corpus, mixed, ranks) -> None:
    held = {text for text in TEXTS if chance(text) < 0.4}
    share, loaders = validation_batches(corpus, ranks, 12, held_out_share=0.4, shuffle_buffer=3)
    assert share == 0.4 and texts_in(loaders) and texts_in(loaders) <= held
    _, everything = validation_batches(corpus, 1, -1, held_out_share=0.4)
    assert len(texts_in(everything)) >= len(held) - 1
    trained = Ranks(corpus, ranks, 4, held_out_share=0.4).steps(30)
    tokens = {token for step in trained for sequence in step for token in sequence}
    assert EOS in tokens
    text = bytes(t if t < 256 else 0 for step in trained for sequence in step for t in sequence).decode()
    assert not any(text_ in text for text_ in held if text_.endswith(">"))


def test_each_validation_has_the_same_batches_and_reads_the_files_once(corpus, monkeypatch) -> None:
    opened: list[str] = []
    open_file = records._open
    monkeypatch.setattr(records, "_open", lambda file: opened.append(file) or open_file(file))
    _, (loader,) = validation_batches(corpus, 1, 3, held_out_share=0.4)

    def read(number: int) -> list:
        return [(inputs["input"].tolist(), labels.tolist()) for inputs, labels in islice(loader, number)]

    first = read(2)
    whole = read(9)
    files = len(opened)
    assert len(whole) == 3 and whole[:2] == first and files
    for inputs, labels in loader:
        inputs["input"].zero_(), labels.zero_()  # as context parallelism cuts up what it is given
    assert read(9) == whole and len(opened) == files


@pytest.mark.parametrize(
    ("enable", "dataset", "share", "effective"),
    [(True, "held_out", None, 0.01), (False, "held_out", None, 0), (True, "c4_local_validation", None, 0),
     (False, "c4_validation", 0.2, 0.2), (True, "held_out", 0.0, 0), (True, "c4_validation", 0.2, 0.2)],
)  # fmt: skip
def test_what_is_held_out_by_default(enable, dataset, share, effective) -> None:
    config = config_for(Path(), N, 1, -1, held_out_share=share)
    config.validation.enable, config.validation.dataset = enable, dataset
    assert held_out_share(config) == effective


@pytest.mark.parametrize("name", ["c4", "stdlib"])
def test_a_dataset_with_a_split_for_validation_is_trained_on_as_it_always_was(name) -> None:
    config = config_for(Path(), N, 1, -1, dataset=name, dataset_path="somewhere")
    config.validation.enable, config.validation.dataset = True, "held_out"
    section = scored(config)
    assert (held_out_share(config), section.dataset, section.dataset_path) == (0, f"{name}_validation", "somewhere")
    config.training.held_out_share = 0.0  # as a run's config.json has it
    assert scored(config).dataset == f"{name}_validation"
    config.training.held_out_share = 0.1
    assert (held_out_share(config), scored(config).dataset) == (0.1, "held_out")


def test_short_documents_are_logged_once(caplog) -> None:
    caplog.set_level("INFO")
    drops = documents.Drops("a", 10)
    for short in [0, 1, 2, 0, 1, 2, *range(3, 12)]:
        assert drops.drop(short) == short + 1
    assert [record.message for record in caplog.records] == [
        f"Dataset a: dropped {number} document(s) of fewer than 10 characters so far" for number in (1, 10)
    ]
