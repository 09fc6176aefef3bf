"""Upstream's Llama 3 with Lighthouse around the inner attention of chosen layers."""

from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.models.llama3 import Transformer

from lighthouse import LighthouseAttention


class LighthouseTransformer(Transformer):
    """Parameters and state dict are those of ``Transformer``, whether Lighthouse is on or off."""

    def __init__(self, model_args: LighthouseModelArgs) -> None:
        super().__init__(model_args)
        for layer in model_args.lighthouse_layers:
            attention = self.layers[str(layer)].attention
            attention.inner_attention = LighthouseAttention(model_args.lighthouse, attention.inner_attention)
