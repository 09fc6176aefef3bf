import bisect
import bz2
import gzip
import json
from collections import Counter
from itertools import pairwise

import pytest
import recall
from recall import KEY_LETTERS, PATTERN, SENTENCE, VALUE_DIGITS, plant, questions_in, score_recall, text_in

from helpers.text import words, write_documents

LENGTH = 98303


def piece(seed="0", length=LENGTH, text=None):
    return plant(words(text_in(length)) if text is None else text, length, seed)


def test_a_piece_keeps_its_length_and_its_text():
    text = words(text_in(LENGTH))
    raw = piece().encode()
    assert len(raw) == LENGTH
    assert PATTERN.sub(b"", raw) == text
    found = PATTERN.findall(raw)
    assert len(found) == recall.sentences_in(LENGTH) == 305 and len(" Code qwerty: 4821.") == SENTENCE
    assert 100 <= len(set(found)) == recall.facts_in(LENGTH) <= 150
    assert len({key for key, _ in found}) == len(set(found))  # no key has two values
    asked = Counter(Counter(found).values())
    assert asked == {2: 61, 3: 61}  # told and asked for once, or twice


@pytest.mark.parametrize("length", [100, 2047, 8191])
def test_short_pieces(length):
    assert len(piece(length=length).encode()) == length and questions_in(piece(length=length))


def test_characters_stay_whole_and_missing_text_is_filled_up():
    text = "één€😀".encode() * 6000
    raw = plant(text[: text_in(LENGTH)].decode(errors="ignore").encode(), LENGTH, "0").encode()
    assert len(raw) == LENGTH
    assert PATTERN.sub(b"", raw).decode().rstrip() == text[: text_in(LENGTH)].decode(errors="ignore")
    with pytest.raises(ValueError, match="must be at most"):
        plant(b"a" * LENGTH, LENGTH, "0")


def test_pieces_depend_on_the_seed_alone():
    assert piece("a") == piece("a") != piece("b")


def test_distances_are_log_uniform_up_to_the_whole_sequence():
    distances = [question.distance for seed in range(8) for question in questions_in(piece(str(seed)))]
    edges = recall.distance_edges(98304)
    assert edges == [0, 1024, 4096, 16384, 32768, 65536, 98304]
    counts = Counter(bisect.bisect_right(edges, distance) for distance in distances)
    assert len(distances) == 8 * 183 and min(distances) >= SENTENCE
    assert all(counts[bucket] >= 50 for bucket in range(1, 7)), counts
    assert 0.25 < counts[1] / len(distances) < 0.5  # 0.38 of a log-uniform one


def test_a_question_says_how_far_back_its_value_was_told():
    raw = piece().encode()
    for question in questions_in(raw.decode()):
        sentence = slice(question.value - KEY_LETTERS - 2, question.value + VALUE_DIGITS)
        assert raw.rfind(raw[sentence], 0, sentence.start) == sentence.start - question.distance


def test_sentences_do_not_pile_up():
    """Each is moved by those before it: not corrected for, the last ones would all be at the end."""
    starts = [match.start() for match in PATTERN.finditer(piece().encode())]
    runs = "".join("1" if after - before == SENTENCE else " " for before, after in pairwise(starts)).split()
    assert max(map(len, runs), default=0) <= 4


def test_every_planted_byte_is_known():
    planted = recall.planted_bytes(piece())
    assert sum(planted) == 305 * SENTENCE and len(planted) == LENGTH


def test_scores_of_answers_that_are_known():
    """The predictor of byte i is position i. All right; right up to 10,000 bytes back; one digit of each wrong."""
    text, length = piece(), LENGTH + 1

    def hits(of):
        answers = [False] * length
        for question in questions_in(text):
            answers[question.value : question.value + VALUE_DIGITS] = of(question)
        return answers

    buckets, far = score_recall([(text, hits(lambda question: [True] * 4))], length)
    assert [(one.start, one.end) for one in buckets][-2:] == [(32768, 65536), (65536, 98304)]
    assert sum(one.asked for one in buckets) == 183 and all(one.record()["exact"] == 1 for one in buckets)
    assert far.asked == sum(one.asked for one in buckets if one.start >= 16384)
    buckets, far = score_recall([(text, hits(lambda question: [question.distance < 4096] * 4))], length)
    assert [one.record()["exact"] for one in buckets] == [1, 1, 0, 0, 0, 0] and far.record()["digits"] == 0
    buckets, far = score_recall([(text, hits(lambda question: [True, True, False, True]))] * 2, length)
    assert far.record()["exact"] == 0 and far.record()["digits"] == 0.75
    # One position off is wrong.
    shifted = hits(lambda question: [True] * 4)
    buckets, _ = score_recall([(text, [False, *shifted[:-1]])], length)
    assert sum(one.exact for one in buckets) == 0


def test_prepared_text_travels_without_facts_and_is_planted_and_shuffled(tmp_path):
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
    assert all(len(text.encode()) == 1023 and questions_in(text) for texts in read.values() for text in texts)
    assert read["train", 0] != read["train", 1] and sorted(read["train", 0]) == sorted(read["train", 1])
    assert read["validation", 0] == read["validation", 1]
    told = {split: {fact for text in read[split, 0] for fact in PATTERN.findall(text.encode())} for split, _ in read}
    assert not told["train"] & told["validation"]
    assert recall.read_pieces(tmp_path / "seed0/train.jsonl.gz", 2) == read["train", 0][:2]
    with pytest.raises(SystemExit, match="too little text"):
        recall.prepare([tmp_path / "text"], tmp_path / "other", 1024, 20, held_out=3)
