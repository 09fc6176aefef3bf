"""Upstream's validation on our data loader, and on a model that computes its loss itself; also in bits per byte."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Validation
from torchtitan.distributed import utils as dist_utils
from torchtitan.experiments.lighthouse.data.files import HELD_OUT
from torchtitan.experiments.lighthouse.data.text_datasets import build_validation_dataloader
from torchtitan.experiments.lighthouse.data.tokenizer import utf8_bytes
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.experiments.lighthouse.loss import Processed, with_labels
from torchtitan.experiments.lighthouse.metrics import LighthouseMetricsProcessor
from torchtitan.tools.utils import device_type

Batch = tuple[dict[str, Tensor], Tensor]


class Counted:
    """The same batches; counts the labels of those that were used, and the bytes of text that they stand for."""

    def __init__(
        self, batches: Iterable[Batch], tokenizer: HuggingFaceTokenizer, on_all_ranks: Callable[[bool], bool] = bool
    ) -> None:
        """
        Args:
            on_all_ranks: whether all say yes; asked before each batch. The first rank that has none ends it for all.
        """
        self._batches, self._tokenizer, self._on_all_ranks = batches, tokenizer, on_all_ranks
        self.tokens = self.bytes = 0

    def __iter__(self) -> Iterator[Batch]:
        """
        Raises:
            DataError: if there is no batch at all.
        """
        self.tokens = self.bytes = 0
        batches = iter(self._batches)
        while self._on_all_ranks((batch := next(batches, None)) is not None) and batch is not None:
            inputs, labels = batch
            yield inputs, labels
            # Only now: upstream asks for one batch more than it uses.
            for row in labels:
                tokens = row[row != IGNORE_INDEX].tolist()
                self.tokens += len(tokens)
                self.bytes += utf8_bytes(tokens, self._tokenizer)
        if not self.tokens:
            raise DataError(
                "validation: the data is too short for one sequence of validation.seq_len on every data-parallel rank; "
                "nearest valid value of validation.steps: 1, which reads it again and again"
            )


def _with_validation(job_config: JobConfig, section: Validation) -> JobConfig:
    changed = copy.copy(job_config)
    changed.validation = section
    return changed


class LighthouseValidator(Validator):
    def __init__(
        self, *, job_config: JobConfig, dp_world_size: int, dp_rank: int, tokenizer: HuggingFaceTokenizer, **kwargs: Any
    ) -> None:
        # Upstream's validator cannot be handed a loader: it builds one of its own. That one is empty.
        of_its_own = replace(job_config.validation, dataset=HELD_OUT, dataset_path=None)
        super().__init__(
            job_config=_with_validation(job_config, of_its_own),
            dp_world_size=dp_world_size,
            dp_rank=dp_rank,
            tokenizer=tokenizer,
            **kwargs,
        )
        self.job_config = job_config
        endless = job_config.validation.steps != -1
        on_all_ranks = bool if endless else self._on_all_ranks
        loader = build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, endless)
        self.validation_dataloader: Any = Counted(loader, tokenizer, on_all_ranks)
        cp, loss_of_rank = self.parallel_dims.cp, self.loss_fn
        # Upstream divides by the tokens of one rank's part of the sequences, and adds up the ranks.
        self.loss_fn = lambda pred, labels: loss_of_rank(pred, labels) / cp

    def post_dataloading_process(self, *args: Any) -> Processed:
        return with_labels(super().post_dataloading_process(*args), self.parallel_dims)

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        # Upstream hands its metrics the loss alone.
        cast(LighthouseMetricsProcessor, self.metrics_processor).bytes_per_token = self._bytes_per_token
        super().validate(model_parts, step)

    def _bytes_per_token(self) -> float:
        """Of all ranks' text in this validation; all ranks ask together."""
        counted = self.validation_dataloader
        return self._sum(counted.bytes) / self._sum(counted.tokens)

    def _on_all_ranks(self, yes: bool) -> bool:
        return self._sum(not yes) == 0

    def _sum(self, number: int) -> float:
        """Over the data-parallel ranks, which call it together."""
        mesh = self.parallel_dims.get_mesh("batch") if self.parallel_dims.dp_enabled else None
        return dist_utils.dist_sum(torch.tensor(number, dtype=torch.int64, device=device_type), mesh)


def build_validator(**kwargs: Any) -> BaseValidator:
    return LighthouseValidator(**kwargs)
