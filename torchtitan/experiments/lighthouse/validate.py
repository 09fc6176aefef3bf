"""Upstream's validation on a model that computes its loss itself."""

from typing import Any

from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.experiments.lighthouse.loss import Processed, with_labels


class LighthouseValidator(Validator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cp, loss_of_rank = self.parallel_dims.cp, self.loss_fn
        # Upstream divides by the tokens of one rank's part of the sequences, and adds up the ranks.
        self.loss_fn = lambda pred, labels: loss_of_rank(pred, labels) / cp

    def post_dataloading_process(self, *args: Any) -> Processed:
        return with_labels(super().post_dataloading_process(*args), self.parallel_dims)


def build_validator(**kwargs: Any) -> BaseValidator:
    return LighthouseValidator(**kwargs)
