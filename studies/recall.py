#!/usr/bin/env python
"""Recall at a distance: passages of a text that come again later in the same sequence.

    python studies/recall.py CHECKPOINT --text validation.jsonl.gz --sequences 36 --output score.json

A fifth of every piece are quotes: 192 bytes of its text, from a word's beginning on, told once before. The distance is
log-uniform from 256 tokens to the whole sequence: 102 quotes in 98,304. Each passage is quoted once, so the text that
it was taken from is the only place to look. The first 32 bytes of a quote say which passage it is. On the other 160,
a model that looks back is nearly certain, and one that does not does as well as when it was told.

*Recall* is the share of the loss that is saved there: 1 - (loss when quoted) / (loss when told). 0: none, 1: all.

Quotes of text cost nothing when they are told, and every byte of them teaches to look back. Facts to be learned by
heart did not do: " Code qwerty: 4821.", one per 800 bytes, was not recalled by the 32M model after 960 steps, not even
from 1,000 bytes back, nor were two control codes and four letters, one per 300, by the debug model after 400.

Every piece has exactly the bytes that one sequence holds beside the tokens for begin and end of text, so the trainer
packs each into one sequence, and the byte tokenizer's token i + 1 is the piece's byte i.

The command scores a checkpoint with dense attention: one forward per piece, teacher forced. From it come the loss by
position, that of the text outside quotes, and recall by distance.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

QUOTE, KEY = 192, 32
"""Bytes of a quote, and those at its beginning that say which passage it is"""
SHARE = 0.2
NEAREST = 256

#: Distances are reported between these, in tokens, as far as a sequence reaches.
DISTANCES = (0, 1024, 4096, 16384, 32768, 65536, 98304)
#: What must be remembered from further back than this is what a long context is for.
FAR = 16384


class Quote(NamedTuple):
    """Where a passage of a piece is told and where it is quoted: their first bytes."""

    told: int
    quoted: int

    @property
    def distance(self) -> int:
        return self.quoted - self.told


def quotes_in(length: int, share: float = SHARE) -> int:
    """How many quotes a piece of ``length`` bytes holds."""
    return max(1, int(length * share) // QUOTE)


def text_in(length: int, share: float = SHARE) -> int:
    """Bytes of text in a piece of ``length`` bytes; the rest are quotes."""
    return length - quotes_in(length, share) * QUOTE


def plant(text: bytes, length: int, seed: str, share: float = SHARE) -> tuple[str, list[Quote]]:
    """A piece of exactly ``length`` bytes: ``text`` with quotes of it, drawn from ``seed`` alone.

    Args:
        text: UTF-8, at most ``text_in(length, share)`` bytes; spaces fill up what is missing.
        length: at least 1,000.
        share: of the piece that are quotes, less than a half. Above a third, passages are quoted again where none is
            left.
    """
    rng, size = random.Random(seed), text_in(length, share)
    text = text.ljust(size)
    if len(text) > size:
        raise ValueError(f"text of {len(text)} bytes: must be at most {size} for a piece of {length}")
    last = length - QUOTE
    wanted = []  # places and distances
    for _ in range(quotes_in(length, share)):
        distance = round(math.exp(rng.uniform(math.log(NEAREST), math.log(last))))
        wanted.append((rng.randint(distance, last), distance))
    wanted.sort()
    cuts = [0]
    for number, (place, _) in enumerate(wanted):
        # Those before it have moved it by their own length.
        cuts.append(_between_words(text, min(max(place - number * QUOTE, cuts[-1], NEAREST), len(text))))
    piece = bytearray(length)
    is_free = bytearray(length)  # text that is not quoted yet
    for number, (start, end) in enumerate(pairwise([*cuts, len(text)])):
        at = slice(start + number * QUOTE, end + number * QUOTE)
        piece[at], is_free[at] = text[start:end], b"\1" * (end - start)
    quotes = []
    for number, (cut, (_, distance)) in enumerate(zip(cuts[1:], wanted, strict=True)):
        quoted = cut + number * QUOTE
        told = _passage(piece, is_free, quoted, distance)
        piece[quoted : quoted + QUOTE] = piece[told : told + QUOTE]
        is_free[told : told + QUOTE] = bytes(QUOTE)
        quotes.append(Quote(told, quoted))
    return piece.decode(), quotes


def _passage(piece: bytearray, is_free: bytearray, quoted: int, distance: int) -> int:
    """The free passage before ``quoted`` whose distance is nearest to the wanted one."""

    def can_be(start: int) -> bool:
        # From a space to the beginning of a character.
        return piece[start] == 0x20 and piece[start + QUOTE] & 0xC0 != 0x80 and 0 not in is_free[start : start + QUOTE]

    aim, latest = quoted - distance, quoted - QUOTE
    for step in range(quoted):
        for start in (aim + step, aim - step):
            if 0 <= start <= latest and can_be(start):
                return start
    # Text without spaces, or used up: what can be quoted whole, quoted already or not.
    return next(at for at in range(latest, -1, -1) if piece[at] & 0xC0 != 0x80 != piece[at + QUOTE] & 0xC0)


def _between_words(text: bytes, at: int) -> int:
    """The next space from ``at`` on, or, where none is near, the next beginning of a character."""
    space = text.find(b" ", at, at + 64)
    if space >= 0:
        return space
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def outside_quotes(length: int, quotes: Iterable[Quote]) -> list[bool]:
    """Of every byte, whether it belongs to no quote."""
    outside = [True] * length
    for quote in quotes:
        outside[quote.quoted : quote.quoted + QUOTE] = [False] * QUOTE
    return outside


def prepare(folders: Sequence[Path], output: Path, seq_len: int, count: int, held_out: int) -> None:
    """Write the text of ``count`` training pieces and of ``held_out`` others, without quotes: it travels like this.

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


def cut(text: bytes, size: int) -> Iterator[bytes]:
    """UTF-8 of at most ``size`` bytes at a time, characters left whole. What ``prepare`` wrote comes as it was."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        while end < len(text) and text[end] & 0xC0 == 0x80:
            end -= 1
        yield text[start:end]
        start = end


def plant_and_shuffle(prepared: Path, output: Path, seq_len: int, seed: int, share: float = SHARE) -> None:
    """The prepared text with its quotes, the same for every seed, in the seed's order, as the trainer reads it.

    Args:
        seq_len: tokens of a piece, which may be shorter than prepared for.
    """
    if output.exists():
        return
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    length = seq_len - 1
    for split in ("train", "validation"):
        texts = cut(bz2.decompress((prepared / f"{split}.bz2").read_bytes()), text_in(length, share))
        planted = [plant(text, length, f"{split} {n}", share) for n, text in enumerate(texts)]
        random.Random(seed if split == "train" else 0).shuffle(planted)  # held out: the same for all
        with gzip.open(unfinished / f"{split}.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as file:
            file.writelines(json.dumps({"text": piece, "quotes": quotes}) + "\n" for piece, quotes in planted)
    unfinished.rename(output)


@dataclass
class Recall:
    """The quotes from a distance of ``start`` to before ``end`` bytes; sums over their bytes after the key."""

    start: int
    end: int
    quotes: int = 0
    loss: float = 0.0
    told_loss: float = 0.0
    right: float = 0.0
    """Bytes whose logit was the highest"""
    told_right: float = 0.0

    def add(self, quote: Quote, losses: Sequence[float], hits: Sequence[bool]) -> None:
        self.quotes += 1
        quoted, told = (slice(at + KEY, at + QUOTE) for at in (quote.quoted, quote.told))
        self.loss += sum(losses[quoted])
        self.told_loss += sum(losses[told])
        self.right += sum(hits[quoted])
        self.told_right += sum(hits[told])

    def record(self) -> dict[str, Any]:
        """Per byte, and ``recall``."""
        count, sums = self.quotes * (QUOTE - KEY), asdict(self)
        means = {name: sums[name] / count if count else None for name in ("loss", "told_loss", "right", "told_right")}
        return sums | means | {"recall": 1 - self.loss / self.told_loss if self.told_loss else None}


def distance_edges(seq_len: int) -> list[int]:
    return [*(edge for edge in DISTANCES if edge < seq_len), seq_len]


def score_recall(
    pieces: Iterable[tuple[Sequence[Quote], Sequence[float], Sequence[bool]]], seq_len: int
) -> tuple[list[Recall], Recall]:
    """Recall by distance, and of everything further back than ``FAR`` (half the sequence, where it is shorter).

    Args:
        pieces: the quotes of each, and of every position of its sequence the loss of the next token, and whether its
            logit was the highest: position i, whose token is byte i - 1, predicts byte i.
    """
    edges = distance_edges(seq_len)
    buckets = [Recall(start, end) for start, end in pairwise(edges)]
    far = Recall(FAR if seq_len > FAR else seq_len // 2, seq_len)
    for quotes, losses, hits in pieces:
        for quote in quotes:
            buckets[min(bisect.bisect_right(edges, quote.distance) - 1, len(buckets) - 1)].add(quote, losses, hits)
            if quote.distance >= far.start:
                far.add(quote, losses, hits)
    return buckets, far


def read_pieces(file: Path, count: int | None = None) -> Iterator[tuple[str, list[Quote]]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for _, line in zip(range(count or 2**60), lines, strict=False):
            record = json.loads(line)
            yield record["text"], [Quote(*places) for places in record["quotes"]]


def score(checkpoint: Path, file: Path, count: int) -> dict[str, Any]:
    """Loss by position and recall by distance of ``checkpoint``, dense, on the first ``count`` pieces of ``file``."""
    import torch
    from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
    from torchtitan.experiments.lighthouse.evaluation import positions
    from torchtitan.experiments.lighthouse.evaluation.ranks import available_device
    from torchtitan.experiments.lighthouse.runs.settings import read_settings

    settings = read_settings(checkpoint)
    seq_len, tokenizer = settings.training.seq_len, build_tokenizer(settings)
    device = available_device()
    model = positions.load(checkpoint, settings, dense=True, device=device)
    edges = positions.default_edges(seq_len)
    all_bytes, text_only = ([positions.Bucket(*ends) for ends in pairwise(edges)] for _ in range(2))
    far = min(FAR, seq_len // 2)
    beyond, answers, losses = positions.Bucket(far, seq_len), [], []
    for piece, quotes in read_pieces(file, count):
        tokens = torch.tensor([tokenizer.encode(piece, add_bos=True, add_eos=True)], device=device)
        assert tokens.shape[1] == seq_len + 1, f"a piece of {tokens.shape[1]:,} tokens in sequences of {seq_len:,}"
        loss, hits = positions.losses_and_hits(model, tokens[:, :-1], tokens[:, 1:])
        loss = loss[0].double().cpu()
        losses.append(loss.mean().item())
        answers.append((quotes, loss.tolist(), hits[0].tolist()))
        # The last label is the end of text, which is none.
        of_text = torch.tensor([*outside_quotes(seq_len - 1, quotes), False])
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
    parser.add_argument("--text", type=Path, required=True, help="pieces with quotes, .jsonl.gz")
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
