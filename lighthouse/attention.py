"""Lighthouse Attention: select, gather, attend, scatter back (Peng, Ghosh, Quesnelle, arXiv 2605.06554).

``lighthouse_attention`` reads like the algorithm. Below it stand the two stages that move rows, each with its
backward: neither needs atomics, because with the selection's inverse map both directions are gathers. Sums over
levels accumulate in float32 (float64 for float64 inputs) and are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse.config import LighthouseConfig
from lighthouse.pyramid import accumulation_dtype, level_lengths, level_offsets, pool_rows
from lighthouse.selection import Selection, check_shapes, select

#: Causal attention over [B, H, S, D] and [B, G, S, D]; called with ``enable_gqa=True`` where G < H.
InnerAttention = Callable[..., Tensor]


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    *,
    attention: InnerAttention | None = None,
) -> Tensor:
    """Causal attention through a selected pyramid, differentiable in query, key and value.

    Args:
        query: [B, H, N, D], any floating dtype, strides as they come.
        key, value: [B, G, N, D] with G dividing H, of the same dtype and device.
        config: valid for N (``config.validate(N)``).
        attention: the inner attention, causal, scale 1/√D. Default: ``causal_attention``.

    Returns:
        [B, H, N, D] in the dtype of ``query``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, an invalid geometry or a backend that is
            not available.
    """
    _check_inputs(query, key, value)
    config.resolve_backend(query.device.type)
    selection = select(query, key, config, value=value)
    return attend_selected(query, key, value, selection, config, attention=attention)


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    config: LighthouseConfig,
    *,
    attention: InnerAttention | None = None,
) -> Tensor:
    """``lighthouse_attention`` through a selection that is already made; arguments and result as there."""
    attention = attention or causal_attention
    short = [pool_and_gather(rows, selection, config) for rows in (query, key, value)]
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return scatter_back(attention(*short, **grouped), selection, query.shape[2], config)


class LighthouseAttention(nn.Module):
    """``lighthouse_attention`` as a module around an inner attention; no parameters, nothing in the state dict.

    It takes the place of an inner attention module in any transformer whose call is ``module(query, key, value)``
    on [B, heads, N, D], with or without ``enable_gqa``.
    """

    def __init__(self, config: LighthouseConfig, attention: InnerAttention | None = None) -> None:
        super().__init__()
        self.config = config
        self.attention = attention or causal_attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False) -> Tensor:
        """[B, H, N, D] and twice [B, G, N, D] to [B, H, N, D]; G < H needs ``enable_gqa``, as in torch's SDPA."""
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(
                f"{query.shape[1]} query heads and {key.shape[1]} key/value heads: grouped heads need enable_gqa=True"
            )
        return lighthouse_attention(query, key, value, self.config, attention=self.attention)

    def extra_repr(self) -> str:
        return str(self.config)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False) -> Tensor:
    """Torch's causal SDPA; on a GPU cuDNN first, then Flash (torch's own default is 1.7× slower on Hopper)."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)
    priority = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(priority, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)


def pool_and_gather(rows: Tensor, selection: Selection, config: LighthouseConfig) -> Tensor:
    """The selected windows' means, in sequence order (sections 1 and 4).

    Args:
        rows: [B, H, N, D]; each key/value head's selection serves its H/G heads.

    Returns:
        [B, H, S, D] in the dtype of ``rows``.
    """
    return _PoolAndGather.apply(rows, selection.entry, selection.place, config.num_levels, config.pooling_factor)


def scatter_back(rows: Tensor, selection: Selection, seq_len: int, config: LighthouseConfig) -> Tensor:
    """Hand every entry's output to the p^ℓ positions from its last covered one on, adding levels up (section 5).

    Args:
        rows: [B, H, S, D], the attention's output in sequence order.

    Returns:
        [B, H, N, D] in the dtype of ``rows``.
    """
    return _ScatterBack.apply(rows, selection.entry, selection.place, seq_len, config.num_levels, config.pooling_factor)


class _PoolAndGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, entry: Tensor, place: Tensor, num_levels: int, factor: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.seq_len, ctx.num_levels, ctx.factor = rows.shape[2], num_levels, factor
        pyramid = torch.cat([level.to(rows.dtype) for level in pool_rows(rows, num_levels, factor, "mean")], dim=2)
        return _take_rows(pyramid, entry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A row's gradient adds up over the selected entries that cover it, 1/p^ℓ of each (section 6): from the
        # coarsest level down, every entry passes what it has, divided by p, to its p children.
        (place,) = ctx.saved_tensors
        places = place.split(level_lengths(ctx.seq_len, ctx.num_levels, ctx.factor), dim=-1)
        total = _take_or_zero(grad, places[-1])
        for finer in reversed(places[:-1]):
            inherited = (total / ctx.factor).repeat_interleave(ctx.factor, dim=2)
            total = inherited + _take_or_zero(grad, finer)
        return total.to(grad.dtype), None, None, None, None


class _ScatterBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, entry: Tensor, place: Tensor, seq_len: int, num_levels: int, factor: int
    ) -> Tensor:
        # From the position's side: position t takes from each level the one entry ⌊(t+1)/p^ℓ⌋ − 1, if there is one
        # and it is selected.
        ctx.save_for_backward(entry)
        ctx.num_levels, ctx.factor = num_levels, factor
        offsets = level_offsets(seq_len, num_levels, factor)
        position = torch.arange(seq_len, device=rows.device)
        total = None
        for level, offset in enumerate(offsets[:-1]):
            index = (position + 1) // factor**level - 1
            source = place[..., offset + index.clamp(min=0)].where(index >= 0, -1)
            taken = _take_or_zero(rows, source)
            total = taken if total is None else total + taken
        # Not a bare cast: torch 2.11 compiles a result that is a no-op ``to`` into a gradient of zero.
        return total if total.dtype == rows.dtype else total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Entry (ℓ, i) wrote to the positions t with t + 1 in window i + 1 of level ℓ. So shift the gradient down by
        # one row, pad it with the positions past the end, sum it up a pyramid and drop every level's window 0.
        (entry,) = ctx.saved_tensors
        span = ctx.factor ** (ctx.num_levels - 1)
        shifted = F.pad(grad, (0, 0, 1, span - 1))
        sums = pool_rows(shifted, ctx.num_levels, ctx.factor, "sum")
        seq_len = grad.shape[2]
        lengths = level_lengths(seq_len, ctx.num_levels, ctx.factor)
        pyramid = torch.cat([s[:, :, 1 : n + 1] for s, n in zip(sums, lengths, strict=True)], dim=2)
        return _take_rows(pyramid, entry).to(grad.dtype), None, None, None, None, None


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, H, n, D] at index [B, G, S], each group's index serving its H/G heads: [B, H, S, D]."""
    grouped = rows.unflatten(1, (index.shape[1], -1))
    where = index.long()[:, :, None, :, None].expand(-1, -1, grouped.shape[2], -1, rows.shape[-1])
    return grouped.gather(3, where).flatten(1, 2)


def _take_or_zero(rows: Tensor, index: Tensor) -> Tensor:
    """As ``_take_rows`` in the accumulation dtype, with a row of zeros where the index is −1."""
    taken = _take_rows(rows, index.clamp(min=0)).to(accumulation_dtype(rows.dtype))
    present = (index >= 0).repeat_interleave(rows.shape[1] // index.shape[1], dim=1)[..., None]
    return taken.where(present, 0.0)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_shapes(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}: must be the same"
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}: must be a floating dtype")
