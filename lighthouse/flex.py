"""Causal attention with its log-sum-exps by PyTorch's FlexAttention: a fused kernel on a GPU, where it is compiled.

Specification: ``lighthouse.merging``, which imports this module where it is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

#: Rows of a block of queries, and of a block of keys.
BLOCK = 128


def attend(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention over all positions, or over the last ``window``, a multiple of 128; scale 1/√D.

    Call it from compiled code only: torch would otherwise make the matrix of all scores.

    Args:
        query: [B, H, M, D] with D ≥ 16.
        key, value: [B, G, M, D] with G dividing H.

    Returns:
        The rows, [B, H, M, D] in the dtype of ``query``, and their log-sum-exps, [B, H, M] float32; both
        differentiable.
    """
    length = query.shape[2]
    # The kernels want whole blocks. Nothing sees the rows that are added at the end.
    missing = -length % BLOCK
    if missing:
        query, key, value = (F.pad(rows, (0, 0, 0, missing)) for rows in (query, key, value))
    out, aux = flex_attention(
        query,
        key,
        value,
        block_mask=band(length + missing, window, query.device),
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out[:, :, :length], aux.lse[:, :, :length]


def band(length: int, window: int | None, device: torch.device) -> BlockMask:
    """Which keys a query sees: all up to itself, or the last ``window`` of them.

    Torch's ``create_block_mask`` would ask for every pair of positions, 9.7 GB at 98,304 tokens. But where the blocks
    are is known: a row of blocks sees the one on the diagonal in part, so the one that is ``window`` before it, and all
    between them as a whole. That is so few numbers that compiled code makes them anew in every forward pass.

    Args:
        length: a multiple of 128, as is ``window``.
    """
    number, width = length // BLOCK, (length if window is None else min(window, length)) // BLOCK
    # Both lists of blocks need the same width: torch 2.11 reads them with the strides of one.
    place = torch.arange(max(2, width), device=device, dtype=torch.int32)
    own = torch.arange(number, device=device, dtype=torch.int32)[:, None]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < width * BLOCK)

    queries = own + width  # the block of queries that sees these keys last
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=_counts(1 + (own >= width)),
        kv_indices=_places(torch.where((own >= width) & (place == 0), own - width, own)),
        full_kv_num_blocks=_counts(own.clamp(max=width - 1)),
        full_kv_indices=_places((own - width + 1).clamp(min=0) + place, number),
        q_num_blocks=_counts(1 + (queries < number)),
        q_indices=_places(torch.where((queries < number) & (place == 1), queries, own)),
        full_q_num_blocks=_counts((number - 1 - own).clamp(max=width - 1)),
        full_q_indices=_places(own + 1 + place, number),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _counts(number: Tensor) -> Tensor:
    """[n, 1] to [1, 1, n]: the same for all sequences and heads."""
    return number.to(torch.int32)[None, None, :, 0].contiguous()


def _places(blocks: Tensor, number: int | None = None) -> Tensor:
    """[n, width] to [1, 1, n, width]. Behind those that count stands any that exists."""
    return (blocks if number is None else blocks.clamp(max=number - 1))[None, None].contiguous()
