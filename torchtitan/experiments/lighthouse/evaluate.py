#!/usr/bin/env python
"""Held-out loss of a checkpoint, by position in the sequence: what does a model make of a long context?

    python scripts/evaluate.py outputs/530m_stage1_dense
    python scripts/evaluate.py outputs/530m_stage1/checkpoint/step-10000 --as-trained --sequences 64

takes a run's dump folder (its newest checkpoint) or one checkpoint/step-N, and runs dense attention in every layer,
whichever stage saved it; with --as-trained, Lighthouse where the run trained through it (that loss is not a language
model's: the selection looks ahead). The text is the run's validation set or, where it has not validated, its training
set's held-out twin, packed as in training. Nats per token, and bits per UTF-8 byte of the text, which compare models
with different tokenizers. One process, one device; bfloat16 autocast on a GPU, float32 on a CPU.

Prints a table and writes evaluate.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("evaluate"):
        evaluate_and_write(options)


def evaluate_and_write(options: argparse.Namespace) -> None:
    """Evaluate as asked, print the table and write the file.

    Raises:
        Refused: if it cannot be done as asked.
    """
    import json
    from dataclasses import replace
    from datetime import UTC, datetime

    import torch
    from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import positions
    from torchtitan.experiments.lighthouse.runs import checkpoints
    from torchtitan.experiments.lighthouse.runs.settings import read_settings

    for name in ("sequences", "seq_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise Refused(f"--{name.replace('_', '-')} {value}: must be positive; nearest valid value: 1")
    checkpoint = checkpoints.find_checkpoint(options.model, options.verify)
    settings = read_settings(checkpoint)
    if options.seq_len is not None:
        settings.training = replace(settings.training, seq_len=options.seq_len)
    edges = positions.choose_edges(options.buckets, settings.training.seq_len)
    data = positions.held_out_data(checkpoint, options.dataset, options.dataset_path)
    try:
        tokenizer = build_tokenizer(settings)
    except FileNotFoundError as error:
        raise Refused(error) from error

    device = positions.available_device()
    model = positions.load(checkpoint, settings, dense=not options.as_trained, device=device)
    sequences = positions.read_sequences(settings, tokenizer, *data, options.sequences)
    buckets, count = positions.by_position(model, sequences, edges, tokenizer, device)
    if not count:
        length = settings.training.seq_len
        raise Refused(f"--dataset {data[0]}: its text is shorter than one sequence of {length:,} tokens")
    if count < options.sequences:
        print(f"{data[0]} holds {count:,} sequences of the {options.sequences:,} asked for")

    everything = positions.total(buckets)
    lighthouse = settings.lighthouse.enable and options.as_trained
    report = {
        "model": str(checkpoint),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "attention": "as trained, through Lighthouse" if lighthouse else "dense",
        "loss": everything.loss,
        "bits_per_byte": everything.bits_per_byte,
        "settings": {
            "dataset": data[0],
            "dataset_path": data[1],
            "sequences": count,
            "seq_len": settings.training.seq_len,
        },
        "buckets": [bucket.record() for bucket in buckets],
        "device": device.type,
        "precision": "float32" if device.type == "cpu" else "bfloat16 autocast",
        "torch": torch.__version__,
    }
    file = _folder(options, checkpoint) / "evaluate.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{checkpoint}, {report['attention']}, {count:,} sequences of {data[0]}\n{positions.table(buckets)}\n{file}")


def _folder(options: argparse.Namespace, checkpoint: Path) -> Path:
    from torchtitan.experiments.lighthouse.runs import checkpoints

    if options.output is not None:
        return options.output
    parts = ["evaluate", *(["as-trained"] if options.as_trained else [])]
    parts += [options.model.name] if checkpoints.is_checkpoint(options.model) else []
    return checkpoints.dump_folder_of(checkpoint) / "-".join(parts)


def numbers(text: str) -> list[int]:
    """8192,16384: one word, so that the model may stand before it or after it."""
    return [int(number) for number in text.split(",")]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's dump folder or one of its checkpoint/step-N")
    parser.add_argument(
        "--as-trained", action="store_true", help="with Lighthouse where the run used it (default: dense)"
    )
    parser.add_argument("--dataset", help="by name (default: the run's validation set, or its training set's twin)")
    parser.add_argument("--dataset-path", help="where it lies (default: where the run found it)")
    parser.add_argument("--sequences", type=int, default=32, help="as many at most (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, help="tokens per sequence (default: the run's training.seq_len)")
    parser.add_argument(
        "--buckets",
        type=numbers,
        metavar="N,N,…",
        help="positions at which a bucket ends and the next begins (default: the four largest powers of two within)",
    )
    parser.add_argument(
        "--verify",
        choices=("digest", "size", "off"),
        default="digest",
        help="what is compared with the checkpoint's manifest: contents, sizes, or nothing (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="folder for evaluate.json (default: evaluate… in the run's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
