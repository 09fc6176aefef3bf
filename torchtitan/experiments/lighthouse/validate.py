"""Upstream's validation on our data loader, and on a model that computes its loss itself."""

from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data.text_datasets import build_validation_dataloader
from torchtitan.experiments.lighthouse.loss import Processed, with_labels


class LighthouseValidator(Validator):
    def __init__(
        self, *, job_config: JobConfig, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, **kwargs: Any
    ) -> None:
        super().__init__(
            job_config=job_config, dp_world_size=dp_world_size, dp_rank=dp_rank, tokenizer=tokenizer, **kwargs
        )
        # Upstream's validator cannot be handed a loader: it has just built one of its own, and read nothing from it.
        endless = job_config.validation.steps != -1
        self.validation_dataloader = build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, endless)
        cp, loss_of_rank = self.parallel_dims.cp, self.loss_fn
        # Upstream divides by the tokens of one rank's part of the sequences, and adds up the ranks.
        self.loss_fn = lambda pred, labels: loss_of_rank(pred, labels) / cp

    def post_dataloading_process(self, *args: Any) -> Processed:
        return with_labels(super().post_dataloading_process(*args), self.parallel_dims)


def build_validator(**kwargs: Any) -> BaseValidator:
    return LighthouseValidator(**kwargs)
