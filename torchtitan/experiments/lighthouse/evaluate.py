#!/usr/bin/env python
"""Held-out loss of a model, by position in the sequence: what does it make of a long context?

    python scripts/evaluate.py outputs/530m_stage1_dense
    python scripts/evaluate.py outputs/530m_stage1/checkpoint/step-10000 --as-trained --sequences 64
    torchrun --standalone --nproc_per_node 8 scripts/evaluate.py outputs/530m_stage1_dense --sequences 512
    python scripts/evaluate.py HF_FOLDER --dataset c4_local_validation --dataset-path DATA --seq-len 32768

takes a run's dump folder (its newest checkpoint), one checkpoint/step-N, or a Hugging Face folder, and runs dense
attention in every layer, whichever stage saved it; with --as-trained, Lighthouse where the run trained through it (that
loss is not a language model's: the selection looks ahead). The text is the run's held-out data or any dataset that the
trainer reads, packed as in training. Settings after -- say more of it, as on the trainer's command line:

    python scripts/evaluate.py RUN --dataset c4_local --dataset-path DATA -- --validation.max_bad_records 3

Nats per token, and bits per UTF-8 byte of the text, which compare models with different tokenizers. Under torchrun each
process holds the whole model and takes its share of the sequences. bfloat16 autocast on a GPU, float32 on a CPU.

Prints a table, and writes evaluate.json and loss_by_position.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.evaluation.ranks import Ranks
    from torchtitan.experiments.lighthouse.evaluation.subjects import Subject


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal
    from torchtitan.experiments.lighthouse.evaluation.ranks import Ranks

    with exit_on_refusal("evaluate"):
        ranks = Ranks()
        try:
            ranks.all_or_none(lambda: evaluate_and_write(options, ranks))
        finally:
            ranks.close()


def evaluate_and_write(options: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluate as asked; the first process prints the table and writes the files.

    Raises:
        Refused: if it cannot be done as asked.
    """
    import torch
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import picture, positions

    for name in ("sequences", "seq_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise Refused(f"--{name.replace('_', '-')} {value}: must be positive; nearest valid value: 1")
    subject, of_run = _open(options, ranks)
    settings, tokenizer, seq_len = subject.settings, subject.tokenizer, subject.settings.training.seq_len
    edges = positions.choose_edges(options.buckets, seq_len)
    if of_run is None and options.dataset is None:
        raise Refused(f"{subject.path}: a Hugging Face folder names no data; say which with --dataset, --dataset-path")
    data = positions.held_out_data(of_run or subject.path, options.dataset, options.dataset_path)

    device = ranks.device()
    model = subject.load(device)
    sequences = ranks.share(positions.read_sequences(settings, tokenizer, *data, options.sequences))
    nats_at = torch.zeros(seq_len, dtype=torch.float64)
    buckets, count = positions.by_position(model, sequences, edges, tokenizer, device, nats_at)
    count = ranks.add_up_buckets(buckets, nats_at, count)
    if not count:
        raise Refused(f"--dataset {data[0]}: its text is shorter than one sequence of {seq_len:,} tokens")
    if ranks.rank > 0:
        return
    if count < options.sequences:
        print(f"{data[0]} holds {count:,} sequences of the {options.sequences:,} asked for")

    everything, curve = positions.total(buckets), positions.curve(nats_at / count)
    report = {
        "model": str(subject.path),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "attention": subject.attention,
        "loss": everything.loss,
        "bits_per_byte": everything.bits_per_byte,
        "settings": {"dataset": data[0], "dataset_path": data[1], "sequences": count, "seq_len": seq_len},
        "buckets": [bucket.record() for bucket in buckets],
        "curve": curve,
        "device": device.type,
        "precision": "float32" if device.type == "cpu" else "bfloat16 autocast",
        "torch": torch.__version__,
    }
    folder = options.output or subject.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluate.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    title = f"{subject.path.name}, {subject.attention}: {count:,} sequences of {data[0]}"
    picture.draw(buckets, curve, title, folder / "loss_by_position.png")
    print(
        f"{subject.path}, {subject.attention}, {count:,} sequences of {data[0]}\n{positions.table(buckets)}\n"
        f"{folder / 'evaluate.json'}\n{folder / 'loss_by_position.png'}"
    )


def _open(options: argparse.Namespace, ranks: Ranks) -> tuple[Subject, Path | None]:
    """What is to be evaluated, and of a run's the checkpoint."""
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.evaluation import subjects
    from torchtitan.experiments.lighthouse.runs import checkpoints

    if checkpoints.is_hugging_face(options.model):
        if options.as_trained:
            raise Refused(
                f"--as-trained: {options.model} is a Hugging Face folder, whose attention is dense; leave it out"
            )
        return subjects.open_hugging_face(options.model, options.seq_len, options.settings), None
    # One process reads it all to check it; the others need not.
    checkpoint = ranks.by_first(lambda: checkpoints.find_checkpoint(options.model, options.verify))
    parts = ["evaluate", *(["as-trained"] if options.as_trained else [])]
    parts += [options.model.name] if checkpoints.is_checkpoint(options.model) else []
    output = checkpoints.dump_folder_of(checkpoint) / "-".join(parts)
    return subjects.open_run(checkpoint, output, options.as_trained, options.seq_len, options.settings), checkpoint


def numbers(text: str) -> list[int]:
    """8192,16384: one word, so that the model may stand before it or after it."""
    return [int(number) for number in text.split(",")]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", type=Path, help="a run's dump folder, one of its checkpoint/step-N, or a Hugging Face folder"
    )
    parser.add_argument(
        "--as-trained", action="store_true", help="with Lighthouse where the run used it (default: dense)"
    )
    parser.add_argument("--dataset", help="by name (default: the run's validation set, or its training set's twin)")
    parser.add_argument("--dataset-path", help="where it lies (default: where the run found it)")
    parser.add_argument("--sequences", type=int, default=32, help="as many at most (default: %(default)s)")
    parser.add_argument(
        "--seq-len",
        type=int,
        help="tokens per sequence (default: the run's training.seq_len, or the model's max_position_embeddings)",
    )
    parser.add_argument(
        "--buckets",
        type=numbers,
        metavar="N,N,…",
        help="positions where a bucket ends and the next begins (default: powers of two, in long contexts from 4096)",
    )
    parser.add_argument(
        "--verify",
        choices=("digest", "size", "off"),
        default="digest",
        help="what is compared with the checkpoint's manifest: contents, sizes, or nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for what is written (default: evaluate… in the run's or the model's)"
    )
    words = sys.argv[1:] if arguments is None else arguments
    own, settings = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_args(own)
    options.settings = settings
    return options


if __name__ == "__main__":
    main()
