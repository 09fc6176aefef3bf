"""Upstream's Llama 3 with Lighthouse around the inner attention of chosen layers.

Parameters and state dict are upstream's. Two parts are computed in another way, to the same numbers: the rotary
embedding in real arithmetic, which the compiler fuses (complex arithmetic it does not), and, where labels are given,
the loss chunk by chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torchtitan.experiments.lighthouse.loss import OutputProjection
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.seams.attention import by_kernels
from torchtitan.models.llama3 import Transformer
from torchtitan.models.llama3.model.model import Attention
from torchtitan.protocols.model import AttentionMasksType

from lighthouse import LighthouseAttention, LighthouseConfig


class LighthouseTransformer(Transformer):
    """``Transformer``, whether Lighthouse is on or off."""

    model_args: LighthouseModelArgs
    output: OutputProjection
    #: Whether a trainer enters ``dense_attention`` where ``dense_every`` asks for it. Upstream's own does not.
    trainer_runs_dense_steps = False

    def __init__(self, model_args: LighthouseModelArgs) -> None:
        super().__init__(model_args)
        for block in self.layers.values():
            block.attention = LighthouseLlamaAttention(model_args)
        for layer in model_args.lighthouse_layers:
            attention = cast(LighthouseLlamaAttention, self.layers[str(layer)].attention)
            config = cast(LighthouseConfig, model_args.lighthouse)  # where there are such layers
            inner = attention.inner_attention if config.combine == "sum" else None  # it returns no log-sum-exps
            attention.lighthouse = LighthouseAttention(config, inner)
            attention.through_lighthouse = True
        self.output = OutputProjection(model_args.dim, model_args.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        attention_masks: AttentionMasksType | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N] to logits [B, N, V] as upstream, or, with labels [B, N], to the summed loss, a scalar."""
        self._refuse_to_ignore_dense_every()
        if labels is None:
            return super().forward(tokens, attention_masks, positions)
        return self.output(self.norm(self.hidden_states(tokens, attention_masks, positions)), labels)

    def _refuse_to_ignore_dense_every(self) -> None:
        every = self.model_args.dense_every
        if every and self.training and not self.trainer_runs_dense_steps:
            raise RuntimeError(
                f"dense_every={every}: this trainer knows no dense steps; start the run with "
                "-m torchtitan.experiments.lighthouse.train, or set lighthouse.dense_every=0"
            )

    def hidden_states(
        self,
        tokens: Tensor,
        attention_masks: AttentionMasksType | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N] to the last layer's output [B, N, dim], before the norm."""
        hidden = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = layer(hidden, self.freqs_cis, attention_masks=attention_masks, positions=positions)
        return hidden


class LighthouseLlamaAttention(Attention):
    """Upstream's attention layer, and the place where Lighthouse is plugged in: ``lighthouse``, None in dense layers.

    ``inner_attention`` is upstream's module, the one that context parallelism turns into ring attention, unless the
    settings ask for the kernels of a package; ``lighthouse`` calls it. The rotary embedding is the one that ``rotate``
    computes, in every layer.

    A model that normalises its queries and keys sets ``q_norm`` and ``k_norm``, modules on [B, N, heads, head_dim]. The
    scorer ``norm`` then looks at the rows before them (docs/method.md, section 10.5).

    ``through_lighthouse`` is off in dense layers, and in a dense step in all layers. It alone decides, so that the
    compiler makes two versions, and the layers of a dense step are what the dense layers always are.
    """

    def __init__(self, model_args: LighthouseModelArgs) -> None:
        super().__init__(model_args)
        self.inner_attention = by_kernels(self.inner_attention, model_args.inner_attention)
        self.lighthouse: LighthouseAttention | None = None
        self.through_lighthouse = False
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.rope = model_args.lighthouse_rope

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: AttentionMasksType | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """[B, N, dim] to [B, N, dim]; arguments as upstream's, without masks."""
        assert attention_masks is None, "Lighthouse models are causal: upstream builds no masks for them"
        # -1: under tensor parallelism these are the rank's own heads.
        query, key, value = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        before = {}
        if self.q_norm is not None and self.k_norm is not None:
            if self.through_lighthouse and cast(LighthouseAttention, self.lighthouse).config.scorer == "norm":
                before["score_by"] = (query.transpose(1, 2), key.transpose(1, 2))
            query, key = self.q_norm(query), self.k_norm(key)
        angles = torch.view_as_real(freqs_cis)
        angles = angles[None, : x.shape[1]] if positions is None else angles[positions]
        attend: Callable[..., Tensor] = self.inner_attention
        if self.through_lighthouse:
            attend = cast(LighthouseAttention, self.lighthouse)
        if self.through_lighthouse and self.rope == "after_gather":
            attend = partial(attend, rotate=partial(rotate_at, angles))
        else:
            query, key = (rotate(rows, angles[:, :, None]) for rows in (query, key))
        heads = (rows.transpose(1, 2) for rows in (query, key, value))
        out = attend(*heads, enable_gqa=self.enable_gqa, **before)
        return self.wo(out.transpose(1, 2).flatten(2))


@contextmanager
def dense_attention(models: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile, every layer of these models, or parts of one, runs dense attention."""
    modules = (module for model in models for module in model.modules())
    attentions = (module for module in modules if isinstance(module, LighthouseLlamaAttention))
    routed = [attention for attention in attentions if attention.through_lighthouse]
    for attention in routed:
        attention.through_lighthouse = False
    try:
        yield
    finally:
        for attention in routed:
            attention.through_lighthouse = True


def rotate(rows: Tensor, angles: Tensor) -> Tensor:
    """The rotary embedding: each pair of neighbouring columns turned by its angle.

    Args:
        rows: [..., D].
        angles: [..., D/2, 2] float32, their cosines and sines; the leading dimensions broadcast.

    Returns:
        [..., D] in the dtype of ``rows``, computed in float32.
    """
    cos, sin = angles.unbind(-1)
    even, odd = rows.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(rows.dtype)


def rotate_at(angles: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """``rotate`` for rows that stand at given positions: ``lighthouse.Rotate`` once the angles are bound.

    Args:
        angles: [B or 1, N, D/2, 2].
        rows: [B, H, S, D].
        position: [B, G, S]; each group's serve its H/G heads.
    """
    batch, heads = rows.shape[:2]
    sequence = torch.arange(batch, device=rows.device)[:, None, None]
    angles = angles.expand(batch, -1, -1, -1)[sequence, position]  # [B, G, S, D/2, 2]
    return rotate(rows, angles.repeat_interleave(heads // position.shape[1], dim=1))
