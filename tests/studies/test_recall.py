import bisect
import bz2
import gzip
import json
from collections import Counter
from itertools import pairwise

import pytest
import recall
from recall import KEY, NEAREST, QUOTE, Quote, plant, score_recall, text_in

from helpers.text import words, write_documents

LENGTH = 98303


def piece(seed="0", length=LENGTH, text=None):
    return plant(words(text_in(length)) if text is None else text, length, seed)


def without_quotes(planted):
    raw, kept = planted[0].encode(), recall.outside_quotes(len(planted[0].encode()), planted[1])
    return bytes(byte for byte, outside in zip(raw, kept, strict=True) if outside)


def test_a_piece_keeps_its_length_and_its_text():
    planted = piece()
    assert len(planted[0].encode()) == LENGTH and without_quotes(planted) == words(text_in(LENGTH))
    assert len(planted[1]) == recall.quotes_in(LENGTH) == 102
    assert sum(recall.outside_quotes(LENGTH, planted[1])) == LENGTH - 102 * QUOTE


@pytest.mark.parametrize(("length", "share"), [(LENGTH, 0.2), (8191, 0.2), (2047, 0.2), (1023, 0.2), (8191, 0.3)])
def test_every_quote_is_a_passage_told_once_before_from_a_words_beginning_on(length, share):
    text, quotes = plant(words(text_in(length, share)), length, "0", share)
    raw, told = text.encode(), set()
    assert len(raw) == length and len(quotes) == recall.quotes_in(length, share) == int(share * length) // QUOTE
    outside = recall.outside_quotes(length, quotes)
    for quote in quotes:
        passage, source = raw[quote.quoted : quote.quoted + QUOTE], range(quote.told, quote.told + QUOTE)
        assert passage == raw[quote.told : quote.told + QUOTE] and passage.startswith(b" ")
        assert quote.distance >= QUOTE and all(outside[at] for at in source)
        assert told.isdisjoint(source)
        told.update(source)


def test_characters_stay_whole_and_missing_text_is_filled_up():
    """Also where there is no space for a passage to begin at."""
    text = ("één€😀".encode() * 6000)[: text_in(LENGTH) - 1000].decode(errors="ignore").encode()
    planted = plant(text, LENGTH, "0")
    assert len(planted[0].encode()) == LENGTH and without_quotes(planted).rstrip() == text
    with pytest.raises(ValueError, match="must be at most"):
        plant(b"a" * LENGTH, LENGTH, "0")


def test_text_is_cut_between_characters_and_nothing_of_it_is_lost():
    text = ("aé€😀" * 50).encode()
    parts = list(recall.cut(text, 7))
    assert b"".join(parts) == text and all(0 < len(part) <= 7 and part.decode() for part in parts)
    assert list(recall.cut(b"ab  cd  ", 4)) == [b"ab  ", b"cd  "]  # as prepare wrote it


def test_pieces_depend_on_the_seed_alone():
    assert piece("a") == piece("a") != piece("b")


def test_distances_are_log_uniform_up_to_the_whole_sequence():
    quotes = [quote for seed in range(8) for quote in piece(str(seed))[1]]
    edges = recall.distance_edges(98304)
    assert edges == [0, 1024, 4096, 16384, 32768, 65536, 98304]
    counts = Counter(bisect.bisect_right(edges, quote.distance) for quote in quotes)
    # Shares of a log-uniform distance from 256 to 98,111; five standard deviations of 816 draws are 0.075.
    expected = [0.233, 0.233, 0.233, 0.117, 0.117, 0.068]
    for bucket, share in enumerate(expected, start=1):
        assert counts[bucket] / len(quotes) == pytest.approx(share, abs=0.075)
    # Passages begin at a word and come once: that moves a distance a little.
    assert sum(quote.distance < NEAREST for quote in quotes) < 0.1 * len(quotes)


def test_quotes_do_not_pile_up():
    """Each is moved by those before it: not corrected for, the last ones would all be at the end."""
    starts = [quote.quoted for quote in piece()[1]]
    runs = "".join("1" if after - before == QUOTE else " " for before, after in pairwise(starts)).split()
    assert max(map(len, runs), default=0) <= 4
    # The place of a quote is uniform from its distance on: a quarter of them, at least, is in each half.
    assert sum(start < LENGTH // 2 for start in starts) in range(25, 78)


def test_scores_of_answers_that_are_known():
    """The predictor of byte i is position i. Certain in quotes; up to 10,000 bytes back alone; nowhere."""
    quotes, length = piece()[1], LENGTH + 1

    def scored(knows, shift=0):
        loss, hits = [2.0] * length, [False] * length
        for quote in quotes:
            if knows(quote):
                known = slice(quote.quoted + KEY + shift, quote.quoted + QUOTE + shift)
                loss[known], hits[known] = [0.5] * (QUOTE - KEY), [True] * (QUOTE - KEY)
        return score_recall([(quotes, loss, hits)] * 2, length)

    buckets, far = scored(lambda quote: True)
    assert [(one.start, one.end) for one in buckets][-2:] == [(32768, 65536), (65536, 98304)]
    assert sum(one.quotes for one in buckets) == 204 and far.quotes == sum(one.quotes for one in buckets[3:])
    assert all(one.record()["recall"] == 0.75 and one.record()["right"] == 1 for one in [*buckets, far])
    assert far.record()["loss"] == 0.5 and far.record()["told_loss"] == 2 and far.record()["told_right"] == 0
    buckets, far = scored(lambda quote: quote.distance < 4096)
    assert [one.record()["recall"] for one in buckets] == [0.75, 0.75, 0, 0, 0, 0] and far.record()["right"] == 0
    buckets, _ = scored(lambda quote: True, shift=1)  # one position off is wrong
    assert all(0.74 < one.record()["recall"] < 0.75 for one in buckets)
    assert recall.Recall(0, 1).record()["recall"] is None


def test_prepared_text_travels_without_quotes_and_is_planted_and_shuffled(tmp_path):
    books = write_documents(tmp_path / "books", train=30_000, validation=5000)
    recall.prepare([books], tmp_path / "text", 1024, 20, held_out=3)
    about = json.loads((tmp_path / "text/about.json").read_text())
    assert (about["train"], about["validation"], about["steps"], about["seq_len"]) == (20, 3, 20, 1024)
    assert len(bz2.decompress((tmp_path / "text/train.bz2").read_bytes())) == 20 * text_in(1023)
    read = {}
    for seed in (0, 1):
        recall.plant_and_shuffle(tmp_path / "text", tmp_path / f"seed{seed}", 1024, seed)
        for split in ("train", "validation"):
            lines = gzip.decompress((tmp_path / f"seed{seed}/{split}.jsonl.gz").read_bytes()).splitlines()
            read[split, seed] = [json.loads(line)["text"] for line in lines]
    assert all(len(text.encode()) == 1023 for texts in read.values() for text in texts)
    assert read["train", 0] != read["train", 1] and sorted(read["train", 0]) == sorted(read["train", 1])
    assert read["validation", 0] == read["validation", 1]
    again = list(recall.read_pieces(tmp_path / "seed0/train.jsonl.gz", 2))
    assert [text for text, _ in again] == read["train", 0][:2]
    for text, [quote] in again:
        assert isinstance(quote, Quote)
        assert text.encode()[quote.told :][:QUOTE] == text.encode()[quote.quoted :][:QUOTE]
    with pytest.raises(SystemExit, match="too little text"):
        recall.prepare([tmp_path / "text"], tmp_path / "other", 1024, 20, held_out=3)
