#!/usr/bin/env python
"""Tokens per second of the data loader: does reading and tokenizing keep up with a GPU?

    python benchmarks/bench_loader.py --data FOLDER --bpe 128000
    python benchmarks/bench_loader.py --data FOLDER --tokenizer DATA/tokenizer --workers 0 1 2 4

Builds the loader that a run on the dataset ``local`` would have, for the byte tokenizer and those that are asked for,
with each number of data workers (``training.dataloader.num_workers``; 0: in the process that drives the GPU), and reads
batches of one sequence. Workers share out a rank's streams of documents, of which it has as many as sequences in a
step. Rates are medians, and with workers, which hand batches out in bursts, means; the first batches do not count.
``--bpe`` first trains a byte-level BPE of that size on the data. Needs no GPU. Writes loader.csv and loader.md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import tokenizers
import torch
import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the datasets
from torchtitan.experiments.lighthouse.data.documents import FileDocuments
from torchtitan.experiments.lighthouse.data.files import Asked
from torchtitan.experiments.lighthouse.data.sources import find
from torchtitan.experiments.lighthouse.data.text_datasets import build_dataloader
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer
from torchtitan.experiments.lighthouse.errors import exit_on_refusal
from torchtitan.experiments.lighthouse.seams.settings import CheckedConfigManager

REPOSITORY = Path(__file__).resolve().parents[1]

#: Characters that a BPE is trained on.
TRAINED_ON = 50_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder, as the dataset 'local' reads it")
    parser.add_argument("--column", default="text", help="that the text is in (default: %(default)s)")
    parser.add_argument("--split", default="", help="as training.dataset_split")
    parser.add_argument("--tokenizer", type=Path, nargs="*", default=[], help="folders of more tokenizers")
    parser.add_argument("--bpe", type=int, help="tokens of a BPE that is trained on the data, in OUTPUT/bpe")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--seq-len", type=int, default=98304, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=32, help="of a step on this rank, one for each stream of "
                        "documents; workers share them out (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batches", type=int, default=12, help="to measure (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_loader"))
    options = parser.parse_args()
    with exit_on_refusal("bench_loader"):
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    folders = [Path(BYTE_TOKENIZER_PATH), *options.tokenizer]
    if options.bpe:
        folders.append(train_bpe(options, options.output / "bpe"))
    rows = []
    for folder, workers in itertools.product(folders, options.workers):
        rate, size, per_token = measure(options, folder, workers)
        name = "bytes" if folder == Path(BYTE_TOKENIZER_PATH) else folder.name
        rows.append([name, size, workers, round(rate), round(per_token, 2)])
        print(f"{name}, {size:,} tokens, {workers} workers: {rate:,.0f} tokens/s", flush=True)
    titles = ["tokenizer", "size", "data workers", "tokens/s", "bytes/token"]
    with (options.output / "loader.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([titles, *rows])
    lines = [f"| {' | '.join(titles)} |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {size:,} | {workers} | {rate:,} | {bytes_} |" for name, size, workers, rate, bytes_ in rows]
    about = f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}, tokenizers {tokenizers.__version__}."
    about += f" {options.sequences} sequences of {options.seq_len:,} tokens in a step; {options.batches} batches."
    (options.output / "loader.md").write_text("\n".join([about, "", *lines, ""]), encoding="utf-8")
    print(options.output / "loader.md")


def documents(options: argparse.Namespace) -> FileDocuments:
    source = find(Asked("local", str(options.data), options.split, column=options.column))
    assert source is not None  # ``local`` is ours
    return source.documents(endless=False)


def train_bpe(options: argparse.Namespace, folder: Path) -> Path:
    """A tokenizer as Llama 3's: byte-level BPE, which splits text by the same pattern."""
    if not (folder / "tokenizer_config.json").exists():
        print(f"training a BPE of {options.bpe:,} tokens", flush=True)
        trained = tokenizers.Tokenizer(tokenizers.models.BPE())
        pattern = tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        )
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Split(pattern, "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
        )
        ends = ["<|begin_of_text|>", "<|end_of_text|>"]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=options.bpe, special_tokens=ends, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        read, texts = 0, []
        for _, text in documents(options).read_from(None):
            texts.append(text)
            if (read := read + len(text)) > TRAINED_ON:
                break
        trained.train_from_iterator(texts, trainer)
        folder.mkdir(parents=True, exist_ok=True)
        trained.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ends[0], "eos_token": ends[1]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return folder


def measure(options: argparse.Namespace, folder: Path, workers: int) -> tuple[float, int, float]:
    """Tokens per second, the tokenizer's size, and bytes of text per token."""
    words = ["--job.config_file", str(REPOSITORY / "train_configs/530m_stage1.toml"), "--training.dataset=local"]
    words += [f"--training.dataset_path={options.data}", f"--training.dataset_split={options.split}"]
    words += [f"--training.text_column={options.column}", f"--training.dataloader.num_workers={workers}"]
    words += [f"--training.seq_len={options.seq_len}", "--training.local_batch_size=1"]
    words += [
        f"--training.global_batch_size={options.sequences}",
        f"--model.hf_assets_path={folder}",
        "--lighthouse.no-enable",
    ]
    settings = CheckedConfigManager().parse_args(words)
    tokenizer = build_tokenizer(settings)
    text = next(text for _, text in documents(options).read_from(None))[:100_000]
    per_token = len(text.encode()) / len(tokenizer.encode(text))
    batches = iter(build_dataloader(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=settings))
    # A worker's first batches wait for it to start, and it has some ready when they are asked for.
    for _ in range(1 + 3 * workers):
        next(batches)
    seconds = []
    for _ in range(options.batches):
        began = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - began)
    # Workers hand out batches in bursts: their rate is that of all of them.
    typical = statistics.median(seconds) if workers == 0 else statistics.fmean(seconds)
    return options.seq_len / typical, tokenizer.get_vocab_size(), per_token


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
