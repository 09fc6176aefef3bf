"""The two ways in which rows move between the sequence and the selected entries, in plain torch.

Each is the other's transpose and so its backward, and neither needs atomics: with the selection's inverse
map both are gathers. Sums accumulate in float32 (float64 for float64 inputs) and are rounded once.
``lighthouse.kernels.rows`` holds the Triton twins.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lighthouse.pyramid import accumulation_dtype, level_lengths, level_offsets, pool_levels


def pool_rows(
    rows: Tensor, entry: Tensor, place: Tensor, num_levels: int, factor: int, shift: int, mean: bool
) -> Tensor:
    """Reduce every selected entry's window of ``rows`` to one row; differentiable, by ``spread_rows``.

    Args:
        rows: [B, H, N, D].
        entry: [B, G, S] int32, numbers of the selected entries; each group serves its H/G heads.
        place: [B, G, E] int32, the inverse map.
        shift: 0 takes entry (ℓ, i) from window i: the positions it covers; 1 from the positions t with t + 1 in window
            i + 1: those from its last covered one on, clipped at N.
        mean: divide by the window's length.

    Returns:
        [B, H, S, D] in the dtype of ``rows``.
    """
    return _PoolRows.apply(rows, entry, place, (num_levels, factor, shift, mean))


def spread_rows(
    rows: Tensor,
    entry: Tensor,
    place: Tensor,
    seq_len: int,
    num_levels: int,
    factor: int,
    shift: int,
    mean: bool,
    halo: Tensor | None = None,
) -> Tensor:
    """Add up, for every position, the rows of the selected entries that have it in their window.

    Differentiable, by ``pool_rows``.

    Args:
        rows: [B, H, S, D] in sequence order.
        entry, place, shift, mean: as in ``pool_rows``.
        halo: [B, H, L − 1, D], with shift 1 only: the rows of the entries before each level's first, from level 1 on,
            which belong to another chunk of the sequence; level ℓ's has the first p^ℓ − 1 positions in its window.

    Returns:
        [B, H, N, D] in the dtype of ``rows``.
    """
    return _SpreadRows.apply(rows, entry, place, seq_len, (num_levels, factor, shift, mean), halo)


def halo_gradient(grad: Tensor, num_levels: int, factor: int) -> Tensor:
    """The gradient of ``spread_rows`` in its halo: from [B, H, N, D] to [B, H, L − 1, D]."""
    wide = accumulation_dtype(grad.dtype)
    sums = [grad[:, :, : factor**level - 1].sum(dim=2, dtype=wide) for level in range(1, num_levels)]
    return torch.stack(sums, dim=2).to(grad.dtype)


#: num_levels, factor, shift, mean.
How = tuple[int, int, int, bool]


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, entry: Tensor, place: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(place)
        ctx.seq_len, ctx.how = rows.shape[2], how
        return _pool(rows, entry, how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grad, *ctx.saved_tensors, ctx.seq_len, ctx.how), None, None, None


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, entry: Tensor, place: Tensor, seq_len: int, how: How, halo: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(entry)
        ctx.how, ctx.has_halo = how, halo is not None
        return _spread(rows, place, seq_len, how, halo)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        halo_grad = halo_gradient(grad, *ctx.how[:2]) if ctx.has_halo else None
        return _pool(grad, *ctx.saved_tensors, ctx.how), None, None, None, None, halo_grad


def _pool(rows: Tensor, entry: Tensor, how: How) -> Tensor:
    num_levels, factor, shift, mean = how
    lengths = level_lengths(rows.shape[2], num_levels, factor)
    if shift:
        # Shift down by a row and fill up to whole windows past the end; every level's window 0 is then of no use.
        rows = F.pad(rows, (0, 0, 1, factor ** (num_levels - 1) - 1))
    levels = pool_levels(rows, num_levels, factor, "mean" if mean else "sum")
    pyramid = [level[:, :, shift : n + shift].to(rows.dtype) for level, n in zip(levels, lengths, strict=True)]
    return _take(torch.cat(pyramid, dim=2), entry)


def _spread(rows: Tensor, place: Tensor, seq_len: int, how: How, halo: Tensor | None = None) -> Tensor:
    num_levels, factor, shift, mean = how
    position = torch.arange(seq_len, device=rows.device)
    total = None
    for level, offset in enumerate(level_offsets(seq_len, num_levels, factor)[:-1]):
        # The one entry of this level whose window holds the position, if there is one and it is selected.
        index = (position + shift) // factor**level - shift
        source = place[..., offset + index.clamp(min=0)].where(index >= 0, -1)
        taken = _take_or_zero(rows, source)
        if mean:
            taken = taken / factor**level
        if halo is not None and level:
            taken = taken + halo[:, :, level - 1, None].to(taken.dtype).where((index < 0)[:, None], 0.0)
        total = taken if total is None else total + taken
    # Not a bare cast: torch 2.11 compiles a result that is a no-op ``to`` into a gradient of zero.
    return total if total.dtype == rows.dtype else total.to(rows.dtype)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, H, n, D] at index [B, G, S], each group's index serving its H/G heads: [B, H, S, D]."""
    grouped = rows.unflatten(1, (index.shape[1], -1))
    where = index.long()[:, :, None, :, None].expand(-1, -1, grouped.shape[2], -1, rows.shape[-1])
    return grouped.gather(3, where).flatten(1, 2)


def _take_or_zero(rows: Tensor, index: Tensor) -> Tensor:
    """As ``_take`` in the accumulation dtype, with a row of zeros where the index is −1."""
    taken = _take(rows, index.clamp(min=0)).to(accumulation_dtype(rows.dtype))
    present = (index >= 0).repeat_interleave(rows.shape[1] // index.shape[1], dim=1)[..., None]
    return taken.where(present, 0.0)
