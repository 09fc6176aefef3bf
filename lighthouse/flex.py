"""Causal attention with its log-sum-exps by PyTorch's FlexAttention: a fused kernel on a GPU, where it is compiled.

Specification: ``lighthouse.merging``, which imports this module where it is used. Call it from compiled code only:
torch would otherwise make the matrix of all scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

#: Rows of a block of queries, and of a block of keys.
BLOCK = 128


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    before: Sequence[Tensor] | None = None,
    starts_every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Causal attention over all positions, or over the last ``window``, a multiple of 128; scale 1/√D.

    Args:
        query: [B, H, M, D] with D ≥ 16.
        key, value: [B, G, M, D] with G dividing H.
        before, starts_every: with a window, as in ``lighthouse.local_window.attend_locally``.

    Returns:
        The rows, [B, H, M, D] in the dtype of ``query``, and their log-sum-exps, [B, H, M] float32; both
        differentiable.
    """
    if before is not None and starts_every:
        return _attend_with_starts_apart((query, key, value), window, before, starts_every)
    length = query.shape[2]
    query, key, value = (_in_whole_blocks(rows) for rows in (query, key, value))
    if before is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
    out, sums = _attend_under(band(query.shape[2], window, query.device, before is not None), query, key, value)
    return out[:, :, :length], sums[:, :, :length]


def _attend_with_starts_apart(
    rows: tuple[Tensor, Tensor, Tensor], window: int | None, before: Sequence[Tensor], starts_every: int
) -> tuple[Tensor, Tensor]:
    """``attend`` where some sequences are starts: those for themselves, as nothing comes before them.

    One mask for all, another one for each sequence, would do. But on a GPU torch 2.11 attends wrongly under it: the
    rows of later sequences were off by 4 %.
    """
    query, key, value, *ahead = (x.unflatten(0, (-1, starts_every)) for x in (*rows, *before))
    starts = attend(query[:, 0], key[:, 0], value[:, 0], window)
    if starts_every == 1:
        return starts
    query, key, value, *ahead = (x[:, 1:].flatten(0, 1) for x in (query, key, value, *ahead))
    others = attend(query, key, value, window, ahead, 0)
    out, sums = (
        torch.cat([start[:, None], other.unflatten(0, (-1, starts_every - 1))], dim=1).flatten(0, 1)
        for start, other in zip(starts, others, strict=True)
    )
    return out, sums


def attend_from_chunks(query: Tensor, key: Tensor, value: Tensor, held: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same over all positions, for the queries of some of the equal chunks of a sequence.

    Args:
        query: [B, H, C·M, D], C chunks one after the other.
        key, value: [B, G, N, D], those of the whole sequence.
        held: the numbers of the C chunks, ascending.

    Returns:
        [B, H, C·M, D] and [B, H, C·M].
    """
    length = query.shape[2] // len(held)
    query = _in_whole_blocks(query.unflatten(2, (len(held), length)))
    padded = query.shape[3]
    key, value = _in_whole_blocks(key), _in_whole_blocks(value)
    mask = band_from_chunks(length, held, key.shape[2], query.device)
    out, sums = _attend_under(mask, query.flatten(2, 3), key, value)
    if padded > length:
        out, sums = (rows.unflatten(2, (-1, padded))[:, :, :, :length].flatten(2, 3) for rows in (out, sums))
    return out, sums


def _in_whole_blocks(rows: Tensor) -> Tensor:
    """[…, M, D] as the kernels want it. Nothing sees the rows that are added at the end."""
    missing = -rows.shape[-2] % BLOCK
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _attend_under(mask: BlockMask, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, aux = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


def band(length: int, window: int | None, device: torch.device, follows: bool = False) -> BlockMask:
    """Which keys a query sees: all up to itself, or the last ``window`` of them.

    Torch's ``create_block_mask`` would ask for every pair of positions, 9.7 GB at 98,304 tokens. But where the blocks
    are is known: a row of blocks sees the one on the diagonal in part, so the one that is ``window`` before it, and all
    between them as a whole. That is so few numbers that compiled code makes them anew in every forward pass.

    Args:
        length: a multiple of 128, as is ``window``.
        follows: whether ``window`` keys, at most ``length``, stand before those of the queries.
    """
    number, width = length // BLOCK, (length if window is None else min(window, length)) // BLOCK
    # Both lists of blocks need the same width: torch 2.11 reads them with the strides of one.
    place = torch.arange(max(2, width), device=device, dtype=torch.int32)
    ahead = width if follows else 0
    own = torch.arange(number, device=device, dtype=torch.int32)[None, :, None]
    keys = torch.arange(ahead + number, device=device, dtype=torch.int32)[None, :, None]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + ahead * BLOCK - key
        return (distance >= 0) & (distance < width * BLOCK)

    diagonal, edge = own + ahead, own + ahead - width  # the blocks of keys that are seen in part
    first, sees_edge = (edge + 1).clamp(min=0), edge >= 0
    # The same from the side of the keys.
    on_diagonal, on_edge = keys - ahead, keys - ahead + width
    has_diagonal, has_edge = on_diagonal >= 0, on_edge < number
    first_query = (on_diagonal + 1).clamp(min=0)
    between = on_edge.clamp(max=number) - first_query
    return BlockMask(
        seq_lengths=(length, ahead * BLOCK + length),
        kv_num_blocks=_counts(1 + sees_edge.int()),
        kv_indices=_places(torch.where(sees_edge & (place == 0), edge, diagonal)),
        full_kv_num_blocks=_counts(diagonal - first),
        full_kv_indices=_places(first + place, ahead + number),
        q_num_blocks=_counts(has_diagonal.int() + has_edge),
        q_indices=_places(torch.where(has_edge & ((place == 1) | ~has_diagonal), on_edge, on_diagonal), number),
        full_q_num_blocks=_counts(between),
        full_q_indices=_places(first_query + place, number),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def band_from_chunks(length: int, held: Sequence[int], seq_len: int, device: torch.device) -> BlockMask:
    """Which keys of a sequence the queries of some of its chunks see: all up to themselves.

    Args:
        length: rows of a chunk. Those of a chunk's queries are filled up to whole blocks.
        held: the numbers of the chunks, ascending.
        seq_len: keys of the whole sequence, filled up to whole blocks.
    """
    padded, blocks = length + -length % BLOCK, seq_len // BLOCK
    # Where in the sequence each block of queries begins: anywhere, if a chunk is not a number of whole blocks.
    starts = [
        torch.arange(padded // BLOCK, device=device, dtype=torch.int32) * BLOCK + chunk * length for chunk in held
    ]
    first = torch.cat(starts)[:, None]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + held[0] * length
        for nth, chunk in enumerate(held[1:], start=1):
            position = torch.where(query >= nth * padded, query + (chunk * length - nth * padded), position)
        return position >= key

    place = torch.arange(max(len(first), blocks), device=device, dtype=torch.int32)
    # Of the blocks of keys, in their order, first those that a block of queries sees as a whole, then in part.
    whole, seen = (((first + rows) // BLOCK).clamp(max=blocks) for rows in (1, 2 * BLOCK - 1))
    # And which blocks of queries see a block of keys: all from one on, since those of later chunks come later.
    keys = place[:blocks, None]
    not_whole, not_at_all = ((up_to[:, 0] <= keys).sum(-1, keepdim=True) for up_to in (whole, seen))
    return BlockMask(
        seq_lengths=(len(held) * padded, seq_len),
        kv_num_blocks=_counts((seen - whole)[None]),
        kv_indices=_places((whole + place[:blocks])[None], blocks),
        full_kv_num_blocks=_counts(whole[None]),
        full_kv_indices=_places(place[:blocks].expand(len(first), -1)[None]),
        q_num_blocks=_counts((not_whole - not_at_all)[None]),
        q_indices=_places((not_at_all + place[: len(first)])[None], len(first)),
        full_q_num_blocks=_counts((len(first) - not_whole)[None]),
        full_q_indices=_places((not_whole + place[: len(first)])[None], len(first)),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _counts(number: Tensor) -> Tensor:
    """[B, n, 1] to [B, 1, n]: the same for all heads."""
    return number.to(torch.int32)[:, None, :, 0].contiguous()


def _places(blocks: Tensor, number: int | None = None) -> Tensor:
    """[B, n, width] to [B, 1, n, width]. Behind those that count stands any that exists."""
    blocks = blocks if number is None else blocks.clamp(min=0, max=number - 1)
    return blocks.to(torch.int32)[:, None].contiguous()
