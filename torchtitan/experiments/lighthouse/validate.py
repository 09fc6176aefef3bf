"""Upstream's validation on a model that computes its loss itself."""

from typing import Any

from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.experiments.lighthouse.loss import model_takes_labels


class LighthouseValidator(Validator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cp, loss_of_rank = self.parallel_dims.cp, self.loss_fn
        # Upstream divides by the tokens of one rank's part of the sequences, and adds up the ranks.
        self.loss_fn = lambda pred, labels: loss_of_rank(pred, labels) / cp

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """Upstream's, with the labels among the model's arguments."""
        inputs, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(input_dict, labels, model_parts)
        if model_takes_labels(self.parallel_dims):
            extra_kwargs["labels"] = labels
        return inputs, labels, extra_inputs, extra_kwargs


def build_validator(**kwargs: Any) -> BaseValidator:
    return LighthouseValidator(**kwargs)
