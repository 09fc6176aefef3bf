"""The training loaders of all ranks on small folders of text."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data import text_datasets
from torchtitan.experiments.lighthouse.data.stream_loader import StreamLoader
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer

BOS, EOS = 256, 257
N = 8

#: A sequence of a step: its tokens, the last label included.
Sequence = tuple[int, ...]


def write(folder: Path, files: list[list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"train-{number}.jsonl").write_text(lines)
    return folder


def config_for(
    path: Path, seq_len: int, batch: int, sequences: int, workers: int = 0, bad: int = 0, **training: Any
) -> JobConfig:
    config = JobConfig()
    config.training.max_bad_records = bad
    config.model.hf_assets_path = BYTE_TOKENIZER_PATH
    config.training.dataset, config.training.dataset_path = "c4_local", str(path)
    config.training.seq_len, config.training.local_batch_size = seq_len, batch
    config.training.global_batch_size = sequences
    config.training.dataloader.num_workers = workers
    vars(config.training).update(training)
    return config


class Ranks:
    """The loaders of all ranks, which give global batches."""

    def __init__(
        self,
        path: Path,
        ranks: int,
        sequences: int,
        *,
        batch: int = 1,
        seq_len: int = N,
        workers: int = 0,
        bad: int = 0,
        state=None,
        **training: Any,
    ) -> None:
        config = config_for(path, seq_len, batch, sequences, workers, bad, **training)
        tokenizer = build_tokenizer(config)
        self.loaders = [text_datasets.build_dataloader(ranks, rank, tokenizer, config) for rank in range(ranks)]
        assert all(isinstance(loader, StreamLoader) for loader in self.loaders)
        for loader in self.loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        self.batches = [iter(loader) for loader in self.loaders]
        self.accumulate = sequences // (batch * ranks)

    def step(self) -> list[Sequence]:
        """The next global batch, in an order that does not tell the ranks apart."""
        sequences = []
        for batches in self.batches:
            for inputs, labels in islice(batches, self.accumulate):
                assert inputs["input"][:, 1:].tolist() == labels[:, :-1].tolist()
                sequences += [
                    (*row, last) for row, last in zip(inputs["input"].tolist(), labels[:, -1].tolist(), strict=True)
                ]
        return sorted(sequences)

    def steps(self, number: int) -> list[list[Sequence]]:
        return [self.step() for _ in range(number)]

    @property
    def state(self) -> dict[str, str]:
        """As a checkpoint holds it: what several ranks write under one key is the same."""
        merged: dict[str, str] = {}
        for loader in self.loaders:
            saved = loader.state_dict()
            assert all(merged.get(key, value) == value for key, value in saved.items())
            merged |= saved
        return merged


def without_ranks(state: dict[str, str]) -> dict[str, object]:
    return {key: json.loads(value) | {"ranks": 0} if key == "streams" else value for key, value in state.items()}


def flat(batches: Iterator, number: int) -> list[list[int]]:
    return [row for inputs, _ in islice(batches, number) for row in inputs["input"].tolist()]
