#!/usr/bin/env python
"""Recall at a distance: facts planted in text, asked for again later in the same sequence.

    python studies/recall.py CHECKPOINT --text validation.jsonl.gz --sequences 36 --output score.json

A fact is a sentence " Code qwerty: 4821." Its key is six random letters, its value four random digits. It is asked for
by the same sentence later on: a model that looks back copies the value, one that cannot guesses (one in ten for a
digit, one in 10,000 for a value). Half of the facts are asked for once, half twice; the distance to the latest mention
is log-uniform from 64 tokens to the whole sequence. One fact per 800 bytes: 122 facts, 183 questions in 98,304.
The key stands right before the value so that few bytes say which fact is meant: small models learn that soon.

Every piece has exactly the bytes that one sequence holds beside the tokens for begin and end of text, so the trainer
packs each into one sequence, and the byte tokenizer's token i + 1 is the piece's byte i.

The command scores a checkpoint with dense attention: one forward per piece, teacher forced. From it come the loss by
position, that of the text outside planted sentences, and, by distance, how many values have every digit's logit highest
of all, and how many digits.
"""

from __future__ import annotations

import argparse
import bisect
import bz2
import gzip
import json
import math
import os
import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BEFORE_KEY, BEFORE_VALUE, AFTER = " Code ", ": ", "."
KEY_LETTERS, VALUE_DIGITS = 6, 4
TO_VALUE = len(BEFORE_KEY) + KEY_LETTERS + len(BEFORE_VALUE)
SENTENCE = TO_VALUE + VALUE_DIGITS + len(AFTER)
PATTERN = re.compile(
    f"{BEFORE_KEY}([a-z]{{{KEY_LETTERS}}}){BEFORE_VALUE}([0-9]{{{VALUE_DIGITS}}}){re.escape(AFTER)}".encode()
)

BYTES_PER_FACT = 800
NEAREST = 64

#: Distances are reported between these, in tokens, as far as a sequence reaches.
DISTANCES = (0, 1024, 4096, 16384, 32768, 65536, 98304)
#: What must be remembered from further back than this is what a long context is for.
FAR = 16384

#: Of every question: the chance of a value, and of one digit.
CHANCE = {"exact": 10.0**-VALUE_DIGITS, "digits": 0.1}


@dataclass(frozen=True)
class Question:
    """Where a piece asks for a value that it has told before."""

    value: int
    """The first of its bytes"""
    distance: int
    """To the latest earlier one of the same fact, in bytes"""


def facts_in(length: int) -> int:
    """How many facts a piece of ``length`` bytes holds."""
    return max(1, length // BYTES_PER_FACT)


def sentences_in(length: int) -> int:
    """Facts told, asked for once, and every second one again."""
    facts = facts_in(length)
    return facts + facts + facts // 2


def text_in(length: int) -> int:
    """Bytes of text in a piece of ``length`` bytes; the rest are the planted sentences."""
    return length - sentences_in(length) * SENTENCE


def plant(text: bytes, length: int, seed: str) -> str:
    """A piece of exactly ``length`` bytes: ``text`` with facts and questions, drawn from ``seed`` alone.

    Args:
        text: UTF-8, at most ``text_in(length)`` bytes; spaces fill up what is missing.
    """
    rng = random.Random(seed)
    text = text.ljust(text_in(length))
    if len(text) > text_in(length):
        raise ValueError(f"text of {len(text)} bytes: must be at most {text_in(length)} for a piece of {length}")
    planned: list[tuple[int, str]] = []
    keys: set[str] = set()
    while len(keys) < facts_in(length):
        key = "".join(rng.choices(string.ascii_lowercase, k=KEY_LETTERS))
        if key in keys:
            continue
        value = "".join(rng.choices(string.digits, k=VALUE_DIGITS))
        sentence = f"{BEFORE_KEY}{key}{BEFORE_VALUE}{value}{AFTER}"
        planned += [(place, sentence) for place in _places(length, 1 + len(keys) % 2, rng)]
        keys.add(key)
    out, done = [], 0
    for number, (place, sentence) in enumerate(sorted(planned)):
        # Those before it have moved it by their own length.
        at = _between_words(text, min(max(place - number * SENTENCE, done), len(text)))
        out += [text[done:at], sentence.encode()]
        done = at
    piece = b"".join([*out, text[done:]])
    assert len(piece) == length
    return piece.decode()


def _places(length: int, questions: int, rng: random.Random) -> list[int]:
    """Where a fact is told, and where it is asked for, so many bytes apart."""
    furthest = length - SENTENCE
    while True:
        # Drawn again where they do not fit one after the other.
        steps = [round(math.exp(rng.uniform(math.log(NEAREST), math.log(furthest)))) for _ in range(questions)]
        if sum(steps) <= furthest:
            break
    places = [rng.randint(0, furthest - sum(steps))]
    for step in steps:
        places.append(places[-1] + step)
    return places


def _between_words(text: bytes, at: int) -> int:
    """The next space from ``at`` on, or, where none is near, the next beginning of a character."""
    space = text.find(b" ", at, at + 64)
    if space >= 0:
        return space
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def questions_in(piece: str) -> list[Question]:
    """All questions of a piece, read off its text."""
    told: dict[bytes, int] = {}
    found = []
    for match in PATTERN.finditer(piece.encode()):
        fact, value = match[0], match.start(2)
        if fact in told:
            found.append(Question(value, value - told[fact]))
        told[fact] = value
    return found


def planted_bytes(piece: str) -> list[bool]:
    """Of every byte, whether it belongs to a planted sentence."""
    raw = piece.encode()
    planted = [False] * len(raw)
    for match in PATTERN.finditer(raw):
        planted[match.start() : match.end()] = [True] * SENTENCE
    return planted


def prepare(folders: Sequence[Path], output: Path, seq_len: int, count: int, held_out: int) -> None:
    """Write the text of ``count`` training pieces and of ``held_out`` others, without facts: it travels like this.

    Args:
        folders: with files named *train* and *validation*; what is held out is of the first.
    """
    from recoverability import pieces

    # A piece, with the tokens for begin and end, is one sequence and its last label.
    size = text_in(seq_len - 1)
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")  # half of it would pass for all of it
    unfinished.mkdir(parents=True)
    counts = {}
    for split, where, wanted in (("train", folders, count), ("validation", folders[:1], held_out)):
        found = pieces(list(where), split, size)
        if not found:
            raise SystemExit(f"prepare: {where}: too little text (files named *{split}*: .json, .jsonl, .gz)")
        # From everywhere, but in their order, which compresses best.
        chosen = sorted(random.Random(0).sample(range(len(found)), min(wanted, len(found))))
        with bz2.open(unfinished / f"{split}.bz2", "wb") as file:
            file.writelines(found[index].encode().ljust(size) for index in chosen)
        counts[split] = len(chosen)
    about = {"seq_len": seq_len, "steps": count, "bytes_of_text_per_piece": size} | counts
    (unfinished / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    unfinished.rename(output)
    on_disk = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(f"{output}: {about}, {on_disk:.1f} MB", flush=True)
    if counts["train"] < count:
        print(f"the text will be read again after {counts['train']:,} of {count:,} steps", flush=True)


def plant_and_shuffle(prepared: Path, output: Path, seq_len: int, seed: int) -> None:
    """The prepared text with its facts, the same for every seed, in the seed's order, as the trainer reads it."""
    if output.exists():
        return
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    length = seq_len - 1
    for split in ("train", "validation"):
        text, size = bz2.decompress((prepared / f"{split}.bz2").read_bytes()), text_in(length)
        starts = range(0, len(text), size)
        texts = [plant(text[at : at + size], length, f"{split} {n}") for n, at in enumerate(starts)]
        random.Random(seed if split == "train" else 0).shuffle(texts)  # held out: the same for all
        with gzip.open(unfinished / f"{split}.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    unfinished.rename(output)


@dataclass
class Recall:
    """The questions from a distance of ``start`` to before ``end`` bytes."""

    start: int
    end: int
    asked: int = 0
    exact: int = 0
    """Values with all of their digits right"""
    digits: int = 0
    """Digits that were right, of four a value"""

    def add(self, right: Sequence[bool]) -> None:
        self.asked += 1
        self.exact += all(right)
        self.digits += sum(right)

    def record(self) -> dict[str, Any]:
        asked = self.asked
        return {
            "start": self.start,
            "end": self.end,
            "asked": asked,
            "exact": self.exact / asked if asked else None,
            "digits": self.digits / (asked * VALUE_DIGITS) if asked else None,
        }


def distance_edges(seq_len: int) -> list[int]:
    return [*(edge for edge in DISTANCES if edge < seq_len), seq_len]


def score_recall(pieces: Iterable[tuple[str, Sequence[bool]]], seq_len: int) -> tuple[list[Recall], Recall]:
    """Recall by distance, and of everything further back than ``FAR`` (half the sequence, where it is shorter).

    Args:
        pieces: each piece, and of every position of its sequence whether the next token's logit was the highest:
            position i, whose token is byte i - 1, predicts byte i.
    """
    edges = distance_edges(seq_len)
    buckets = [Recall(start, end) for start, end in pairwise(edges)]
    far = Recall(FAR if seq_len > FAR else seq_len // 2, seq_len)
    for piece, hits in pieces:
        for question in questions_in(piece):
            right = hits[question.value : question.value + VALUE_DIGITS]
            buckets[min(bisect.bisect_right(edges, question.distance) - 1, len(buckets) - 1)].add(right)
            if question.distance >= far.start:
                far.add(right)
    return buckets, far


def read_pieces(file: Path, count: int | None = None) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count or 2**60), lines, strict=False)]


def score(checkpoint: Path, file: Path, count: int) -> dict[str, Any]:
    """Loss by position and recall by distance of ``checkpoint``, dense, on the first ``count`` pieces of ``file``."""
    import torch
    from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
    from torchtitan.experiments.lighthouse.evaluation import positions
    from torchtitan.experiments.lighthouse.runs.settings import read_settings

    settings = read_settings(checkpoint)
    seq_len, tokenizer = settings.training.seq_len, build_tokenizer(settings)
    device = positions.available_device()
    model = positions.load(checkpoint, settings, dense=True, device=device)
    edges = positions.default_edges(seq_len)
    all_bytes, text_only = ([positions.Bucket(*ends) for ends in pairwise(edges)] for _ in range(2))
    far = min(FAR, seq_len // 2)
    beyond, answers, losses = positions.Bucket(far, seq_len), [], []
    for piece in read_pieces(file, count):
        tokens = torch.tensor([tokenizer.encode(piece, add_bos=True, add_eos=True)], device=device)
        assert tokens.shape[1] == seq_len + 1, f"a piece of {tokens.shape[1]:,} tokens in sequences of {seq_len:,}"
        loss, hits = positions.losses_and_hits(model, tokens[:, :-1], tokens[:, 1:])
        loss = loss[0].double().cpu()
        losses.append(loss.mean().item())
        answers.append((piece, hits[0].tolist()))
        # The last label is the end of text, which is none.
        of_text = ~torch.tensor([*planted_bytes(piece), True])
        for bucket in [*all_bytes, beyond]:
            bucket.add(loss[bucket.start : bucket.end])
        for bucket in text_only:
            part = slice(bucket.start, bucket.end)
            bucket.add(loss[part][of_text[part]])
    recall, recall_far = score_recall(answers, seq_len)
    return {
        "sequences": len(losses),
        "held_out": positions.total(all_bytes).loss,
        "held_out_text": positions.total(text_only).loss,
        "held_out_far": {"start": far, "loss": beyond.loss},
        "of_sequence": losses,
        "by_position": [
            {"start": one.start, "end": one.end, "loss": one.loss, "loss_text": text.loss}
            for one, text in zip(all_bytes, text_only, strict=True)
        ],
        "recall": [bucket.record() for bucket in recall],
        "recall_far": recall_far.record(),
        "chance": CHANCE,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's dump folder or one of its checkpoint/step-N")
    parser.add_argument("--text", type=Path, required=True, help="pieces with planted facts, .jsonl.gz")
    parser.add_argument("--sequences", type=int, default=36, help="as many at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal
    from torchtitan.experiments.lighthouse.runs.checkpoints import find_checkpoint

    with exit_on_refusal("recall"):
        result = score(find_checkpoint(options.checkpoint), options.text, options.sequences)
    write_json(options.output, result)
    print(json.dumps({key: result[key] for key in ("held_out", "recall_far", "recall")}))


if __name__ == "__main__":
    main()
