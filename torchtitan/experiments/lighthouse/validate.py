"""Upstream's validation on a model that computes its loss itself."""

from typing import Any

from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.experiments.lighthouse.loss import model_takes_labels


class LighthouseValidator(Validator):
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
