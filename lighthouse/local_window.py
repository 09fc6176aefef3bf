"""Exact causal attention over the last W positions, for positions whose own row is not selected.

Source: docs/method.md, section 10.4. On a GPU it is PyTorch's Flash attention with a window
(``lighthouse.flash_window``). In other precisions and on other devices it is PyTorch's SDPA, on blocks of W queries and
the 2·W keys around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: What Flash attention takes; everything else runs in blocks.
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIMS = range(8, 257, 8)


def turned(query: Tensor, key: Tensor, rotate: Callable[[Tensor, Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Queries [B, H, N, D] and keys [B, G, N, D], each turned by its own position, if there is a rotary embedding left
    to apply (``lighthouse.Rotate``)."""
    if rotate is None:
        return query, key
    position = torch.arange(key.shape[2], device=key.device).expand(key.shape[:3])
    return rotate(query, position), rotate(key, position)


def attend_locally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    before: Sequence[Tensor] | None = None,
    starts_every: int = 1,
) -> Tensor:
    """Every position t attends to the positions t − W + 1, …, t, as far as they exist; scale 1/√D.

    Args:
        query: [B, H, N, D], any floating dtype, strides as they come.
        key, value: [B, G, N, D] with G dividing H.
        window: W ≥ 1.
        before: the last W keys and values, [B, G, W, D] each, of the chunk of the sequence before this one.
        starts_every: which sequences of the batch are the start of one, as in ``lighthouse.select``; nothing comes
            before those.

    Returns:
        [B, H, N, D] in the dtype of ``query``.
    """
    by_flash = query.is_cuda and query.dtype in FLASH_DTYPES and query.shape[-1] in FLASH_HEAD_DIMS
    if not by_flash:
        return _attend_in_blocks(query, key, value, window, before, starts_every)
    import lighthouse.flash_window  # only here: it loads much of torch that nothing else needs

    return lighthouse.flash_window.attend(query, key, value, window, before, starts_every)


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, window: int, before: Sequence[Tensor] | None, starts_every: int
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if before is None and window >= query.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    queries, keys, values, mask = in_blocks(query, key, value, window, before, starts_every)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
    return joined(out, query)


def in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    before: Sequence[Tensor] | None = None,
    starts_every: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of W queries and the 2·W keys and values around them, as sequences of the batch.

    Args:
        as ``attend_locally``.

    Returns:
        Queries [B·n, H, W, D] for n blocks, keys and values [B·n, G, 2·W, D], and who sees whom, [B·n, 1, W, 2·W] bool.
        ``joined`` puts the result together.
    """
    batch, _, seq_len, _ = query.shape
    blocks = -(-seq_len // window)
    fill = (0, 0, 0, blocks * window - seq_len)
    queries = F.pad(query, fill).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)  # [B·blocks, H, W, D]
    ahead = before or [key.new_zeros(*key.shape[:2], window, key.shape[3])] * 2
    keys, values = (
        torch.cat([first, F.pad(rows, fill)], dim=2).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for first, rows in zip(ahead, (key, value), strict=True)
    )  # [B·blocks, G, 2·W, D]
    distance = window + torch.arange(window, device=query.device)[:, None]
    distance = distance - torch.arange(2 * window, device=query.device)
    near = (distance >= 0) & (distance < window)
    # Nothing stands before the first block of a sequence's start.
    number = torch.arange(batch * blocks, device=query.device)
    sequence = number // blocks
    is_start = sequence % starts_every == 0 if starts_every else torch.zeros_like(sequence, dtype=torch.bool)
    first = (number % blocks == 0) & (is_start if before is not None else True)
    exists = ~first[:, None] | (torch.arange(2 * window, device=query.device) >= window)
    return queries, keys, values, (near & exists[:, None])[:, None]


def joined(blocks: Tensor, query: Tensor) -> Tensor:
    """Results of blocks, [B·n, H, W, …], in the order of the queries [B, H, N, D] that ``in_blocks`` was given:
    [B, H, N, …]."""
    batch, _, seq_len, _ = query.shape
    return blocks.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :seq_len]
