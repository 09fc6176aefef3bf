"""What makes an entry important: two scalars per position and key/value head (docs/method.md, section 2).

Every scorer has one signature, ``(query, key, value, config) -> (query_score, key_score)`` with
query [B, H, N, D], key and value [B, G, N, D] and scores [B, G, N] in float32 (float64 for float64 inputs).
None has parameters, and none is differentiated. With grouped heads the query score of a group is the maximum over its
query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.config import LighthouseConfig
from lighthouse.pyramid import accumulation_dtype

#: Rows of one block of the gated linear attention: quadratic inside a block, a matrix state between blocks.
GLA_BLOCK = 128

#: The fixed log-gate per row, logsigmoid(0) / 16. A learned gate would never receive a gradient, and its weights
#: would be keys that a dense model cannot load.
GLA_LOG_GATE = -math.log(2.0) / 16


def norm_scores(query: Tensor, key: Tensor, value: Tensor | None, config: LighthouseConfig) -> tuple[Tensor, Tensor]:
    """‖q_j‖₂ and ‖k_j‖₂ of the projections that enter attention."""
    return _group_max(_row_norms(query), key.shape[1]), _row_norms(key)


def dilated_scores(query: Tensor, key: Tensor, value: Tensor, config: LighthouseConfig) -> tuple[Tensor, Tensor]:
    """‖Attn(q, k, v)_j‖₂ and ‖Attn(k, q, v)_j‖₂, causal softmax attention among positions equal mod δ."""
    return _interleaved_scores(_softmax_attention, query, key, value, config.dilation)


def gla_scores(query: Tensor, key: Tensor, value: Tensor, config: LighthouseConfig) -> tuple[Tensor, Tensor]:
    """As ``dilated_scores``, with gated linear attention (fixed gate, scale 1/√D) in place of softmax attention."""
    return _interleaved_scores(_gated_linear_attention, query, key, value, config.dilation)


SCORERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "norm": norm_scores,
    "dilated": dilated_scores,
    "gla": gla_scores,
}


def _row_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=accumulation_dtype(rows.dtype))


def _group_max(scores: Tensor, num_groups: int) -> Tensor:
    return scores.unflatten(1, (num_groups, -1)).amax(2)  # [B, H, N] -> [B, G, N]


def _interleaved_scores(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    num_groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    query, key, value = (_split_residues(x, dilation) for x in (query, key, value))

    def scores(rows: Tensor) -> Tensor:
        norms = _row_norms(rows).unflatten(0, (-1, dilation))  # [B, δ, H, N/δ]
        return _group_max(norms.permute(0, 2, 3, 1).flatten(2), num_groups)

    return scores(attention(query, key, value)), scores(attention(key, query, value))


def _split_residues(rows: Tensor, dilation: int) -> Tensor:
    """[B, H, N, D] to [B·δ, H, N/δ, D]: the positions equal mod δ become a sequence of their own."""
    return rows.unflatten(2, (-1, dilation)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _gated_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """o_t = Σ_{s ≤ t} γ^(t−s) (q_t · k_s / √D) v_s with γ = exp(GLA_LOG_GATE), [B, H, N, D] to [B, H, N, D].

    Blocks see themselves by a masked product and all earlier blocks through a decayed sum of their states Σ k vᵀ.
    """
    length, head_dim = query.shape[-2:]
    dtype, device = accumulation_dtype(query.dtype), query.device
    padding = -length % GLA_BLOCK  # rows of zeros at the end change nothing before them
    query, key, value = (
        F.pad(x.to(dtype), (0, 0, 0, padding)).unflatten(2, (-1, GLA_BLOCK)) for x in (query, key, value)
    )  # [B, H, blocks, BLOCK, D]
    query = query / math.sqrt(head_dim)

    row = torch.arange(GLA_BLOCK, device=device, dtype=dtype)
    distance = row[:, None] - row[None, :]
    decay = torch.where(distance >= 0, (GLA_LOG_GATE * distance.clamp(min=0)).exp(), 0.0)
    within = ((query @ key.mT) * decay) @ value

    # A state is taken at its block's last row; block b reads block a < b through γ^(BLOCK·(b−a−1)) and the rest of
    # the way by the rows' own distance to the boundary.
    to_end = (GLA_LOG_GATE * (GLA_BLOCK - 1 - row)).exp()[:, None]
    from_start = (GLA_LOG_GATE * (row + 1)).exp()[:, None]
    states = (key * to_end).mT @ value  # [B, H, blocks, D, D]
    block = torch.arange(states.shape[2], device=device, dtype=dtype)
    gap = block[:, None] - block[None, :] - 1
    carry = torch.where(gap >= 0, (GLA_LOG_GATE * GLA_BLOCK * gap.clamp(min=0)).exp(), 0.0)
    before = (carry @ states.flatten(3)).unflatten(3, (head_dim, head_dim))
    across = (query * from_start) @ before
    return (within + across).flatten(2, 3)[:, :, :length]
