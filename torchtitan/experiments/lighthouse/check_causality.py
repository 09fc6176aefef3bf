#!/usr/bin/env python
"""Does a run's model look ahead? Replaces every token after t and reports by how much the logits up to t move.

    python scripts/check_causality.py outputs/530m_stage1
    python scripts/check_causality.py outputs/530m_stage1/checkpoint/step-10000 --dense
    python scripts/check_causality.py outputs/530m_stage1 --text --positions 40 --output causality.json

takes a run's dump folder (its newest checkpoint) or one checkpoint/step-N, and checks the attention that it trained
with; with --dense, dense attention in every layer. The positions t are drawn from the sequence, and lie one before, on
and one after borders of tiles and of coarsest windows. The tokens are random, or, with --text, the run's held-out text
as evaluate reads it.

The model computes in float32 on every device, so that rounding is far below what one selected entry more or less does
to the logits. (On a GPU, training's attention kernels are others, and in bfloat16. The kernels that select are the
same.) There are positions · tries + 2 passes: on one H100, with 530M parameters at 98,304 tokens, 3.5 seconds each
through Lighthouse and 14 dense. --seq-len takes fewer tokens.

Prints a table, row by row as they come, and one line of conclusion. Exit status: 0 if no logit moves by more than
rounding, 1 if one does, 2 if it could not be checked as asked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torchtitan.experiments.lighthouse.job_config import MergedConfig


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("check_causality"):
        causal = check_and_write(options)
    if not causal:
        sys.exit(1)


def check_and_write(options: argparse.Namespace) -> bool:
    """Check as asked, print the table and write the file; whether no logit moved by more than rounding.

    Raises:
        Refused: if it cannot be done as asked.
    """
    import json
    from dataclasses import asdict, replace
    from datetime import UTC, datetime

    import torch
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import causality, positions
    from torchtitan.experiments.lighthouse.evaluation.ranks import available_device
    from torchtitan.experiments.lighthouse.runs import checkpoints
    from torchtitan.experiments.lighthouse.runs.settings import read_settings
    from torchtitan.experiments.lighthouse.seams.attention import take_float32

    for name, least in (("positions", 1), ("tries", 1), ("seq_len", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise Refused(f"--{name.replace('_', '-')} {value}: must be at least {least}; nearest valid value: {least}")
    checkpoint = checkpoints.find_checkpoint(options.model, options.verify)
    settings = read_settings(checkpoint)
    if options.seq_len is not None:
        settings.training = replace(settings.training, seq_len=options.seq_len)
    seq_len = settings.training.seq_len

    device = available_device()
    model = positions.load(checkpoint, settings, dense=options.dense, device=device)
    take_float32(model)
    lighthouse = model.model_args.lighthouse
    attention = causality.attention_of(lighthouse)
    if options.text:
        tokens_of, texts = read_texts(checkpoint, settings, 1 + options.tries)
    else:
        tokens_of = f"random tokens, seed {options.seed}"
        texts = causality.random_texts(model.output.weight.shape[0], seq_len, 1 + options.tries, options.seed)
    # Dense attention too is checked at the borders that the run's settings have.
    spots = causality.choose_spots(seq_len, options.positions, settings.lighthouse.attention_config(), options.seed)
    text, *others = (tokens.to(device) for tokens in texts)
    print(f"{checkpoint}, {attention}, {seq_len:,} tokens: {tokens_of}\n{causality.TABLE_HEAD}", flush=True)
    result = causality.check(
        model,
        text,
        others,
        spots,
        lambda found, rounding: print(causality.table_row(found, rounding, attention), flush=True),
    )
    print(causality.conclusion(result))
    if options.output is not None:
        report = {
            "model": str(checkpoint),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "attention": attention,
            "lighthouse": None if lighthouse is None else asdict(lighthouse),
            "causal": not result.leaks,
            "exact": result.largest == 0,
            "largest": result.largest,
            "rounding": result.rounding,
            "repeat": result.repeat,
            "settings": {"seq_len": seq_len, "tokens": tokens_of, "tries": options.tries, "seed": options.seed},
            "positions": [
                asdict(finding) | {"verdict": finding.verdict(result.rounding)} for finding in result.findings
            ],
            "device": device.type,
            "precision": "float32",
            "torch": torch.__version__,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(options.output)
    return not result.leaks


def read_texts(checkpoint: Path, settings: MergedConfig, count: int) -> tuple[str, list[Tensor]]:
    """What the run's held-out text is called, and its first ``count`` sequences, each [1, N] int64.

    Raises:
        Refused: if it is missing, at fault or too short.
    """
    from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import positions

    dataset, path = positions.held_out_data(checkpoint, None, None)
    try:
        tokenizer = build_tokenizer(settings)
    except FileNotFoundError as error:
        raise Refused(error) from error
    texts = [inputs for inputs, _ in positions.read_sequences(settings, tokenizer, dataset, path, count)]
    if len(texts) < count:
        raise Refused(
            f"--text: {dataset} holds {len(texts):,} sequences of {settings.training.seq_len:,} tokens, and needed are "
            f"{count:,}, one and another one for each of --tries; take fewer tries, or a smaller --seq-len"
        )
    return dataset, texts


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's dump folder or one of its checkpoint/step-N")
    parser.add_argument(
        "--dense", action="store_true", help="dense in every layer (default: with Lighthouse where the run used it)"
    )
    parser.add_argument("--seq-len", type=int, help="tokens per sequence (default: the run's training.seq_len)")
    parser.add_argument("--positions", type=int, default=14, help="how many t (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=2, help="replacements for each t (default: %(default)s)")
    parser.add_argument("--text", action="store_true", help="the run's held-out text (default: random tokens)")
    parser.add_argument("--seed", type=int, default=0, help="of positions and random tokens (default: %(default)s)")
    parser.add_argument(
        "--verify",
        choices=("digest", "size", "off"),
        default="digest",
        help="what is compared with the checkpoint's manifest: contents, sizes, or nothing (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write everything to this JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
