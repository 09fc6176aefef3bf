"""Lighthouse Attention: select, gather, attend, scatter back (Peng, Ghosh, Quesnelle, arXiv 2605.06554).

``lighthouse_attention`` reads like the algorithm. Below it stand the two stages that move rows, with their backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse.config import LighthouseConfig
from lighthouse.rows import pool_rows, spread_rows
from lighthouse.selection import Selection, check_shapes, kernels, select

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
    mover = RowMover.of(config, rows, rows.shape[2], shift=0, mean=True)
    return _PoolRows.apply(rows, selection.entry, selection.place, mover)


def scatter_back(rows: Tensor, selection: Selection, seq_len: int, config: LighthouseConfig) -> Tensor:
    """Hand every entry's output to the p^ℓ positions from its last covered one on, adding levels up (section 5).

    Seen from the other side: position t takes from each level the one entry ⌊(t+1)/p^ℓ⌋ − 1, if it is selected.

    Args:
        rows: [B, H, S, D], the attention's output in sequence order.

    Returns:
        [B, H, N, D] in the dtype of ``rows``.
    """
    mover = RowMover.of(config, rows, seq_len, shift=1, mean=False)
    return _SpreadRows.apply(rows, selection.entry, selection.place, mover)


@dataclass(frozen=True)
class RowMover:
    """Rows between the sequence and the selected entries, by either backend (``lighthouse.rows`` says how)."""

    backend: str
    seq_len: int
    num_levels: int
    factor: int
    shift: int
    mean: bool

    @classmethod
    def of(cls, config: LighthouseConfig, rows: Tensor, seq_len: int, *, shift: int, mean: bool) -> RowMover:
        backend = config.resolve_backend(rows.device.type)
        return cls(backend, seq_len, config.num_levels, config.pooling_factor, shift, mean)

    def pool(self, rows: Tensor, entry: Tensor, place: Tensor) -> Tensor:
        """[B, H, N, D] to [B, H, S, D]."""
        how = (self.num_levels, self.factor, self.shift, self.mean)
        if self.backend == "triton":
            return kernels().pool_rows(rows, place, entry.shape[-1], *how)
        return pool_rows(rows, entry, *how)

    def spread(self, rows: Tensor, place: Tensor) -> Tensor:
        """[B, H, S, D] to [B, H, N, D]: the transpose of ``pool``."""
        how = (self.num_levels, self.factor, self.shift, self.mean)
        move = kernels().spread_rows if self.backend == "triton" else spread_rows
        return move(rows, place, self.seq_len, *how)


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, entry: Tensor, place: Tensor, mover: RowMover) -> Tensor:
        ctx.save_for_backward(place)
        ctx.mover = mover
        return mover.pool(rows, entry, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.mover.spread(grad, *ctx.saved_tensors), None, None, None


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, entry: Tensor, place: Tensor, mover: RowMover) -> Tensor:
        ctx.save_for_backward(entry, place)
        ctx.mover = mover
        return mover.spread(rows, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.mover.pool(grad, *ctx.saved_tensors), None, None, None


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_shapes(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}: must be the same"
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}: must be a floating dtype")
