#!/usr/bin/env python
"""With which layers does a model look back? They are the ones to keep dense when it goes on through Lighthouse.

    python scripts/look_back.py outputs/short
    python scripts/look_back.py outputs/short --window 1024 --sequences 16
    python scripts/look_back.py outputs/short/checkpoint/step-4000 --dataset c4_local_validation --dataset-path DATA

takes a run's dump folder (its newest checkpoint) or one checkpoint/step-N, with dense attention, and limits one layer
after the other to the last --window tokens. Where that makes the held-out loss rise by --least or more, the layer looks
back. Then all the others are limited at once, to see whether they can do without. A model mostly looks back with few
of its layers, and forgets how to when just these run through Lighthouse.

One device, layers + 2 passes for each sequence; bfloat16 autocast on a GPU, float32 on a CPU. Prints a table and the
setting that follows from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("look_back"):
        find_and_write(options)


def find_and_write(options: argparse.Namespace) -> None:
    """Look as asked, print the table, and write the file.

    Raises:
        Refused: if it cannot be done as asked.
    """
    import json
    from dataclasses import asdict
    from datetime import UTC, datetime

    import torch
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import look_back, positions
    from torchtitan.experiments.lighthouse.evaluation.ranks import available_device
    from torchtitan.experiments.lighthouse.evaluation.subjects import open_run
    from torchtitan.experiments.lighthouse.runs import checkpoints

    from lighthouse.config import WINDOW_STEP

    for name in ("sequences", "seq_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise Refused(f"--{name.replace('_', '-')} {value}: must be positive; nearest valid value: 1")
    if options.window < 1 or options.window % WINDOW_STEP:
        nearest = max(1, round(options.window / WINDOW_STEP)) * WINDOW_STEP
        raise Refused(
            f"--window {options.window}: must be a positive multiple of {WINDOW_STEP}; nearest valid value: {nearest}"
        )
    if not options.least > 0:
        raise Refused(f"--least {options.least}: must be positive; the default is 0.01")
    checkpoint = checkpoints.find_checkpoint(options.model, options.verify)
    subject = open_run(checkpoint, checkpoint, False, options.seq_len, [])
    settings, seq_len = subject.settings, subject.settings.training.seq_len
    if options.window >= seq_len:
        raise Refused(
            f"--window {options.window}: must be shorter than the sequences of {seq_len:,} tokens, or it limits nothing"
        )
    data = positions.held_out_data(checkpoint, options.dataset, options.dataset_path)
    device = available_device()
    sequences = list(positions.read_sequences(settings, subject.tokenizer, *data, options.sequences))
    if not sequences:
        raise Refused(f"--dataset {data[0]}: its text is shorter than one sequence of {seq_len:,} tokens")
    model = look_back.load(checkpoint, settings, options.window, device)

    def loss_of() -> float:
        buckets, _ = positions.by_position(model, sequences, [0, seq_len], subject.tokenizer, device)
        return positions.total(buckets).loss

    found = look_back.find(model, options.window, options.least, loss_of)
    count = len(sequences)
    print(
        f"{checkpoint}, {count:,} sequence{'s' * (count > 1)} of {seq_len:,} tokens of {data[0]}: dense "
        f"{found.dense:.4f} nats per token;\none layer limited to its last {found.window:,} tokens:\n\n"
        f"{look_back.table(found)}\n\n{look_back.conclusion(found)}"
    )
    if options.output is not None:
        report = {
            "model": str(checkpoint),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **asdict(found),
            "look_back": found.look_back,
            "layers": look_back.as_setting(found.others),
            "settings": {"dataset": data[0], "dataset_path": data[1], "sequences": count, "seq_len": seq_len},
            "device": device.type,
            "torch": torch.__version__,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(options.output)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's dump folder or one of its checkpoint/step-N")
    parser.add_argument("--window", type=int, default=128, help="tokens that a limited layer sees, a multiple of 128 "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--least", type=float, default=0.01, help="nats per token that the loss must rise by "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--dataset", help="by name (default: the run's validation set, or its training set's twin)")
    parser.add_argument("--dataset-path", help="where it lies (default: where the run found it)")
    parser.add_argument("--sequences", type=int, default=8, help="as many at most (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, help="tokens per sequence (default: the run's training.seq_len)")
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
