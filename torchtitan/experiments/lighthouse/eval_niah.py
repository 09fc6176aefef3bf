#!/usr/bin/env python
"""Needle in a haystack: does a model find one digit in up to 96K tokens of noise? (arXiv 2605.06554, after Stage 2)

    python scripts/eval_niah.py outputs/530m_stage1_dense
    torchrun --nproc_per_node 8 scripts/eval_niah.py outputs/530m_stage1_dense/checkpoint/step-16000

takes a run's dump folder (its newest checkpoint), one checkpoint/step-N, or a Hugging Face folder, and runs dense
attention in every layer, whichever stage saved it. Every cell, a context and a depth, holds ten trials, one per digit.
A trial is one forward pass, right if the passkey's token has the highest logit of the ten digits at the last position:
chance is 0.10. The paper's means at 530M: 0.72 for dense, 0.65 for k=1536 with the norm scorer.

A prompt is exactly as long as its context, in tokens:

    [begin of text] filler " The passkey is 7. " filler " The passkey is "

The filler is random letters and digits without spaces, so the sentence occurs once; the depth is the percentage of the
filler before it. The parts are tokenized one by one, and the question is the sentence's own tokens up to the digit: a
tokenizer that joins the space and the digit is asked for the joined token. Each prompt depends on the seed, its
context, depth and digit alone, and a batch never spans cells: results do not depend on the number of processes.

Writes niah.json, niah.csv and niah.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("eval_niah"):
        evaluate_and_write(options)


def evaluate_and_write(options: argparse.Namespace) -> None:
    """Run the test as asked and write its files, on the first of all processes.

    Raises:
        Refused: if it cannot be run as asked.
    """
    from datetime import UTC, datetime
    from statistics import fmean

    import torch
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import needle
    from torchtitan.experiments.lighthouse.evaluation.ranks import Ranks

    subject = needle.open_subject(options.model, options.verify)
    haystack = needle.Haystack.of(subject.encode, subject.begin)
    contexts = needle.choose_contexts(options.contexts, subject, haystack.min_context)
    depths = needle.choose_depths(needle.DEPTHS if options.depths is None else options.depths)
    if options.batch_tokens is not None and options.batch_tokens < 1:
        raise Refused(f"--batch-tokens {options.batch_tokens}: must be positive; nearest valid value: 1")

    ranks = Ranks()
    try:
        device = ranks.device()
        batch_tokens = options.batch_tokens or (32768 if device.type == "cpu" else 262144)
        settings = {"seed": options.seed, "batch_tokens": batch_tokens}
        cells = needle.evaluate(subject.load(device), haystack, contexts, depths, **settings, device=device)
        if ranks.rank > 0:
            return
        mean = fmean(cell.accuracy for cell in cells)
        chance = 1 / needle.TRIALS
        about = {
            "model": str(subject.path),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "mean": mean,
            "chance": chance,
            "settings": {"contexts": contexts, "depths": depths, "trials": needle.TRIALS, **settings},
            "device": device.type,
            "precision": "float32" if device.type == "cpu" else "bfloat16 autocast",
            "torch": torch.__version__,
        }
        files = needle.write(cells, about, options.output or subject.output)
    finally:
        ranks.close()
    print(f"mean {mean:.4f}, chance {chance:.2f}: {subject.path}\n" + "\n".join(map(str, files)))


def numbers(text: str) -> list[int]:
    """4096,8192: one word, so that the model may stand before it or after it."""
    return [int(number) for number in text.split(",")]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a dump folder, a checkpoint/step-N or a Hugging Face folder")
    parser.add_argument(
        "--contexts", type=numbers, metavar="N,N,…", help="tokens (default: the paper's, 4096 to 98304, within reach)"
    )
    parser.add_argument("--depths", type=numbers, metavar="N,N,…", help="per cent (default: the paper's)")
    parser.add_argument("--seed", type=int, default=0, help="of the filler (default: 0)")
    parser.add_argument("--batch-tokens", type=int, help="tokens per batch (default: 262144 on a GPU, 32768 on a CPU)")
    parser.add_argument(
        "--verify",
        choices=("digest", "size", "off"),
        default="digest",
        help="what is compared with the checkpoint's manifest: contents, sizes, or nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the results (default: niah or niah-step-N in the run's)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
