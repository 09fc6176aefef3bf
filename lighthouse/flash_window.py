"""Attention over the last W positions by PyTorch's Flash attention, which takes bfloat16 and float16 on a GPU.

Specification: ``lighthouse.local_window``, which imports this module where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

#: Torch 2.11 takes grouped heads without being told, later versions want to be.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend(
    query: Tensor, key: Tensor, value: Tensor, window: int, before: Sequence[Tensor] | None, starts_every: int
) -> Tensor:
    """``lighthouse.local_window.attend_locally``. The sequences of the batch stand one after the other; the queries and
    keys of each end at the same position."""
    batch, heads, seq_len, _ = query.shape
    number = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
    query_ends = key_ends = number * seq_len
    longest = seq_len
    if before is None:
        keys, values = _packed(key), _packed(value)
    else:
        keys, values = (_with_rows_before(*pair, starts_every) for pair in zip(before, (key, value), strict=True))
        starts = -(-number // starts_every) if starts_every else 0 * number
        key_ends, longest = query_ends + window * (number - starts), seq_len + window
    grouped = GROUPED if heads != key.shape[1] else {}
    out = varlen_attn(
        _packed(query), keys, values, query_ends, key_ends, seq_len, longest, window_size=(window - 1, 0), **grouped
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, seq_len)).transpose(1, 2)


def _packed(rows: Tensor) -> Tensor:
    """[B, H, N, D] to [B·N, H, D]; a view of what attention modules hand over."""
    return rows.transpose(1, 2).flatten(0, 1)


def _with_rows_before(before: Tensor, rows: Tensor, starts_every: int) -> Tensor:
    """The packed rows, the sequences that are no start led by the rows before them."""
    parts = []
    for b, (ahead, own) in enumerate(zip(before, rows, strict=True)):
        if not starts_every or b % starts_every:
            parts.append(ahead)
        parts.append(own)
    return torch.cat(parts, dim=1).transpose(0, 1)
