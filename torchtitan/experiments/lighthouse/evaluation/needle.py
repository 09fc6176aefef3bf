"""Needle in a haystack: prompts, scoring and results; ``eval_niah`` is the command and says what is measured."""

from __future__ import annotations

import csv
import json
import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.experiments.lighthouse import hugging_face
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer
from torchtitan.experiments.lighthouse.runs import checkpoints
from torchtitan.experiments.lighthouse.runs.settings import load_model, read_settings

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 98304)
DEPTHS = (0, 15, 30, 50, 70, 85, 100)
TRIALS = 10
QUESTION = " The passkey is "
FILLER = string.ascii_letters + string.digits

#: Text to token ids, without begin or end of text.
Encode = Callable[[str], list[int]]
#: Tokens [B, N] int64 to the logits of the last position, [B, V].
LastLogits = Callable[[Tensor], Tensor]


@dataclass
class Subject:
    """A model on disk whose weights are not loaded yet."""

    path: Path
    output: Path
    """The default folder for results"""
    max_context: int | None
    """The longest context in tokens; None is no limit"""
    limit: str
    """The setting that says so"""
    encode: Encode
    begin: list[int]
    """The begin-of-text token, if the tokenizer has one: every training document starts with it"""
    load: Callable[[torch.device], LastLogits]


def open_subject(path: Path, verify: checkpoints.Verify = "digest") -> Subject:
    """The model at ``path``.

    Raises:
        Refused: if there is no model, or transformers is needed and missing.
    """
    return open_hugging_face(path) if checkpoints.is_hugging_face(path) else open_run(path, verify)


def open_run(path: Path, verify: checkpoints.Verify) -> Subject:
    checkpoint = checkpoints.find_checkpoint(path, verify)
    settings = read_settings(checkpoint)
    try:
        tokenizer = build_tokenizer(settings)
    except FileNotFoundError as error:
        raise Refused(error) from error

    def load(device: torch.device) -> LastLogits:
        return partial(last_logits, load_model(checkpoint, settings, dense=True, device=str(device)))

    return Subject(
        path=checkpoint,
        output=checkpoints.dump_folder_of(checkpoint) / f"niah-{path.name}"
        if checkpoints.is_checkpoint(path)
        else path / "niah",
        max_context=settings.training.seq_len,
        limit="training.seq_len",
        # The inner tokenizer: the outer one cannot leave out a begin-of-text token that tokenizer.json adds.
        encode=lambda text: tokenizer.tokenizer.encode(text, add_special_tokens=False).ids,
        begin=[] if tokenizer.bos_id is None else [tokenizer.bos_id],
        load=load,
    )


def open_hugging_face(path: Path) -> Subject:
    max_context = hugging_face.context_of(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def load(device: torch.device) -> LastLogits:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        # transformers wraps Module.to, and the wrapper's type takes `device` for its self.
        model = model.to(device).eval()  # type: ignore[arg-type]
        return lambda tokens: model(tokens, logits_to_keep=1, use_cache=False).logits[:, -1]

    return Subject(
        path=path.resolve(),
        output=path / "niah",
        max_context=max_context,
        limit="max_position_embeddings",
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        begin=[] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id],
        load=load,
    )


def last_logits(model: LighthouseTransformer, tokens: Tensor) -> Tensor:
    """``model(tokens)[:, -1]``, tokens [B, N] to [B, V], without the logits of the other positions."""
    return model.output(model.norm(model.hidden_states(tokens)[:, -1]))


@dataclass
class Haystack:
    """The parts of a prompt, as tokens."""

    encode: Encode
    begin: list[int]
    needles: list[list[int]]
    """The sentence, once per digit"""
    question: list[int]
    digits: list[int]
    """The tokens among which the answer is"""

    @classmethod
    def of(cls, encode: Encode, begin: list[int]) -> Haystack:
        """Raises Refused for a tokenizer without a token of its own for every digit."""
        needles = [encode(f"{QUESTION}{digit}. ") for digit in range(TRIALS)]
        answered = [encode(f"{QUESTION}{digit}") for digit in range(TRIALS)]
        question, digits = answered[0][:-1], [tokens[-1] for tokens in answered]
        for digit, (needle, tokens) in enumerate(zip(needles, answered, strict=True)):
            if needle[: len(tokens)] != [*question, digits[digit]] or digits.count(digits[digit]) > 1:
                raise Refused(
                    f"the tokenizer has no single token for the {digit} in {QUESTION + str(digit) + '. '!r}: it makes "
                    f"{needle} of it; the test compares ten tokens, one per digit"
                )
        return cls(encode, begin, needles, question, digits)

    @property
    def min_context(self) -> int:
        return len(self.begin) + max(map(len, self.needles)) + len(self.question)

    def prompt(self, context: int, depth: int, digit: int, seed: int) -> list[int]:
        """``context`` tokens with ``digit`` hidden at ``depth`` per cent."""
        rng = random.Random(f"{seed} {context} {depth} {digit}")
        needle = self.needles[digit]
        length = context - len(self.begin) - len(needle) - len(self.question)
        filler: list[int] = []
        while len(filler) < length:  # a token is one character or more
            filler += self.encode("".join(rng.choices(FILLER, k=2 * (length - len(filler)))))
        before = round(length * depth / 100)
        return [*self.begin, *filler[:before], *needle, *filler[before:length], *self.question]


@dataclass
class Cell:
    context: int
    depth: int
    correct: int
    trials: int = TRIALS

    @property
    def accuracy(self) -> float:
        return self.correct / self.trials

    def record(self) -> dict[str, int | float]:
        return asdict(self) | {"accuracy": self.accuracy}


@torch.inference_mode()
def evaluate_cell(
    model: LastLogits,
    haystack: Haystack,
    context: int,
    depth: int,
    *,
    seed: int,
    batch_tokens: int,
    device: torch.device,
) -> Cell:
    """Ten trials, as many at a time as ``batch_tokens`` tokens hold, but at least one.

    Raises:
        FloatingPointError: for logits that are NaN or infinite, whose argmax would pass for an answer.
    """
    batch, correct = max(1, batch_tokens // context), 0
    for start in range(0, TRIALS, batch):
        digits = range(start, min(start + batch, TRIALS))
        prompts = torch.tensor([haystack.prompt(context, depth, digit, seed) for digit in digits], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits = model(prompts)
        logits = logits[:, haystack.digits].float()
        if not logits.isfinite().all():
            raise FloatingPointError(f"the model's logits are not finite ({context} tokens, depth {depth} %)")
        correct += sum(answer == digit for answer, digit in zip(logits.argmax(-1).tolist(), digits, strict=True))
    return Cell(context, depth, correct)


def evaluate(
    model: LastLogits, haystack: Haystack, contexts: list[int], depths: list[int], **settings: Any
) -> list[Cell]:
    """All cells, by context and depth, on every rank: the ranks of the default group share those of a context.

    ``settings`` are those of ``evaluate_cell``.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cells: list[Cell] = []
    for context in contexts:
        start = time.monotonic()
        mine = [evaluate_cell(model, haystack, context, depth, **settings) for depth in depths[rank::ranks]]
        parts = [mine] * ranks
        if ranks > 1:
            dist.all_gather_object(parts, mine)
        row = sorted((cell for part in parts for cell in part), key=lambda cell: cell.depth)
        cells += row
        if rank == 0:
            found = "  ".join(f"{cell.depth} %: {cell.accuracy:.1f}" for cell in row)
            mean = fmean(cell.accuracy for cell in row)
            print(f"{context:>9,} tokens  {mean:.2f}   {found}   ({time.monotonic() - start:.1f} s)", flush=True)
    return cells


def choose_contexts(asked: list[int] | None, subject: Subject, shortest: int) -> list[int]:
    """The contexts asked for, or the paper's as far as the model reaches, ascending.

    Raises:
        Refused: for one that the model was not trained for, or that a prompt does not fit in.
    """
    longest = subject.max_context
    if asked is None:
        contexts = [context for context in CONTEXTS if longest is None or context <= longest]
        if not contexts:
            raise Refused(
                f"the model's trained context of {longest} tokens ({subject.limit}) is shorter than the paper's "
                f"shortest, {CONTEXTS[0]}; name shorter ones, e.g. --contexts {longest}"
            )
        return contexts
    for context in asked:
        if longest is not None and context > longest:
            raise Refused(
                f"--contexts {context}: must be at most the model's trained context, {subject.limit}={longest}; "
                f"largest valid value: {longest}"
            )
        if context < shortest:
            raise Refused(
                f"--contexts {context}: must hold the needle and the question; smallest valid value: {shortest}"
            )
    return sorted(set(asked))


def choose_depths(asked: Sequence[int]) -> list[int]:
    for depth in asked:
        if not 0 <= depth <= 100:
            raise Refused(f"--depths {depth}: must be a percentage; nearest valid value: {min(max(depth, 0), 100)}")
    return sorted(set(asked))


def write(cells: list[Cell], about: dict[str, Any], folder: Path) -> list[Path]:
    """The three files, from the results and what they are results of."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, figure = (folder / f"niah.{suffix}" for suffix in ("csv", "json", "png"))
    records = [cell.record() for cell in cells]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    data.write_text(json.dumps(about | {"cells": records}, indent=2) + "\n", encoding="utf-8")
    draw(cells, about["model"], figure)
    return [data, table, figure]


def draw(cells: list[Cell], name: str, path: Path) -> None:
    """A heat map of the accuracies, contexts across and depths down, as the needle lies in the text."""
    contexts, depths = sorted({cell.context for cell in cells}), sorted({cell.depth for cell in cells})
    size = (2.4 + 0.85 * max(4, len(contexts)), 1.7 + 0.5 * max(3, len(depths)))
    figure, axes = plt.subplots(figsize=size, dpi=150, layout="constrained")
    grid = [[0.0] * len(contexts) for _ in depths]
    for cell in cells:
        grid[depths.index(cell.depth)][contexts.index(cell.context)] = cell.accuracy
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            color = "white" if value > 0.55 else "#22313f"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(contexts)), [_short(context) for context in contexts])
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axes.set(xlabel="context (tokens)", ylabel="depth of the needle")
    # White lines between the cells, and no frame.
    axes.set_xticks([x - 0.5 for x in range(1, len(contexts))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy")
    bar.set_ticks([0, 1 / TRIALS, 0.25, 0.5, 0.75, 1], labels=["0", "chance", "0.25", "0.5", "0.75", "1"], fontsize=8)
    bar.outline.set_visible(False)
    mean = fmean(cell.accuracy for cell in cells)
    axes.set_title(f"Needle in a haystack: mean {mean:.2f}", fontsize=11, pad=20)
    name = name if len(name) <= 70 else f"…{name[-69:]}"
    axes.annotate(name, (0.5, 1), (0, 6), "axes fraction", "offset points", ha="center", fontsize=7, color="#555555")
    figure.savefig(path)
    plt.close(figure)


def _short(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context:,}"
