"""Lighthouse Attention: select, gather, attend, scatter back (Peng, Ghosh, Quesnelle, arXiv 2605.06554).

``lighthouse_attention`` reads like the algorithm. Below it stand the two stages that move rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lighthouse.rows
from lighthouse.config import LighthouseConfig
from lighthouse.selection import Selection, check_shapes, kernels, select

#: Causal attention over [B, H, S, D] and [B, G, S, D]; called with ``enable_gqa=True`` where G < H.
InnerAttention = Callable[..., Tensor]

#: A rotary embedding: rows [B, H, S, D], turned by their positions [B, G, S], int64; each group's serve its H/G heads.
Rotate = Callable[[Tensor, Tensor], Tensor]


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    *,
    attention: InnerAttention | None = None,
    rotate: Rotate | None = None,
) -> Tensor:
    """Causal attention through a selected pyramid, differentiable in query, key and value.

    Args:
        query: [B, H, N, D], any floating dtype, strides as they come.
        key, value: [B, G, N, D] with G dividing H, of the same dtype and device.
        config: valid for N (``config.validate(N)``).
        attention: the inner attention, causal, scale 1/√D. Default: ``causal_attention``.
        rotate: the rotary embedding, for queries and keys that come without it: pooled first, each entry is then turned
            by its last covered position. (The published method pools rotated rows, which averages high frequencies
            away.) Norms do not change by turning, so the selection is the same; the other scorers are refused.

    Returns:
        [B, H, N, D] in the dtype of ``query``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, an invalid geometry, a backend that is
            not available, or ``rotate`` with another scorer than ``norm``.
    """
    check_inputs(query, key, value)
    config.resolve_backend(query.device.type)
    if rotate is not None and config.scorer != "norm":
        raise ValueError(
            f"scorer={config.scorer!r} attends to rotated queries and keys: rotate needs the scorer 'norm'"
        )
    selection = select(query, key, config, value=value)
    return attend_selected(query, key, value, selection, config, attention=attention, rotate=rotate)


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    config: LighthouseConfig,
    *,
    attention: InnerAttention | None = None,
    rotate: Rotate | None = None,
) -> Tensor:
    """``lighthouse_attention`` through a selection that is already made; arguments and result as there."""
    attention = attention or causal_attention
    short = [pool_and_gather(rows, selection, config) for rows in (query, key, value)]
    if rotate is not None:
        position = selection.last_positions(config.pooling_factor)
        short[:2] = [rotate(rows, position) for rows in short[:2]]
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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False, rotate: Rotate | None = None
    ) -> Tensor:
        """[B, H, N, D] and twice [B, G, N, D] to [B, H, N, D]; G < H needs ``enable_gqa``, as in torch's SDPA."""
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(
                f"{query.shape[1]} query heads and {key.shape[1]} key/value heads: grouped heads need enable_gqa=True"
            )
        return self.attend(query, key, value, rotate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotate: Rotate | None) -> Tensor:
        return lighthouse_attention(query, key, value, self.config, attention=self.attention, rotate=rotate)

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
    return _movement(rows, config).pool_rows(
        rows, selection.entry, selection.place, config.num_levels, config.pooling_factor, shift=0, mean=True
    )


def scatter_back(
    rows: Tensor, selection: Selection, seq_len: int, config: LighthouseConfig, halo: Tensor | None = None
) -> Tensor:
    """Hand every entry's output to the p^ℓ positions from its last covered one on, adding levels up (section 5).

    Seen from the other side: position t takes from each level the one entry ⌊(t+1)/p^ℓ⌋ − 1, if it is selected.

    Args:
        rows: [B, H, S, D], the attention's output in sequence order.
        halo: [B, H, L − 1, D], what the chunk before this one hands over (``lighthouse.context_parallel``).

    Returns:
        [B, H, N, D] in the dtype of ``rows``.
    """
    return _movement(rows, config).spread_rows(
        rows, selection.entry, selection.place, seq_len, config.num_levels, config.pooling_factor,
        shift=1, mean=False, halo=halo,
    )  # fmt: skip


def _movement(rows: Tensor, config: LighthouseConfig) -> ModuleType:
    """The backend that moves rows: ``lighthouse.rows`` or its Triton twin, differentiable both."""
    return kernels() if config.resolve_backend(rows.device.type) == "triton" else lighthouse.rows


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors that do not fit together in shape, dtype or device."""
    check_shapes(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}: must be the same"
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}: must be a floating dtype")
