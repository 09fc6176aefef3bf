"""Gather and scatter: how rows move from the sequence to the selected entries and back, in plain torch.

An entry (ℓ, i) has two windows of p^ℓ positions. It *covers* the first: ``gather`` takes the mean over it
(docs/method.md, section 1). It *writes to* the second, which begins at its last covered position: ``scatter`` adds the
entry's row to each of its positions (docs/method.md, section 6). The backward of each moves rows the opposite way
through the same windows (docs/method.md, section 7).

No direction needs atomics: a position lies in at most one window of each level, and the inverse map says where the
entry of that window stands. Sums accumulate in float32 (float64 for float64 inputs) and are rounded once.

``lighthouse.kernels.gather_scatter`` holds the Triton twins of the four functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lighthouse.pyramid import accumulation_dtype, level_lengths, level_offsets, pool_levels


def gather(rows: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """Pool the window that each selected entry covers to its mean.

    Args:
        rows: [B, H, N, D].
        entry: [B, G, S] int32, the numbers of the selected entries; each group serves its H/G heads.
        inverse_map: [B, G, E] int32, the slot of each of the pyramid's E entries among the S selected ones, or −1.

    Returns:
        [B, H, S, D] in the dtype of ``rows``; differentiable once.
    """
    gathered: Tensor = _Gather.apply(rows, entry, inverse_map, num_levels, pooling_factor)
    return gathered


def gather_backward(
    grad: Tensor,
    inverse_map: Tensor,
    seq_len: int,
    num_levels: int,
    pooling_factor: int,
    beside: Tensor | None = None,
) -> Tensor:
    """The gradient of ``gather`` in its rows: from [B, H, S, D] to [B, H, N, D].

    Args:
        beside: [B, H, N, D], a gradient of the same rows by another way, to be added.
    """
    return _spread(grad, inverse_map, seq_len, num_levels, pooling_factor, written=False, added=beside)


def scatter(
    rows: Tensor,
    entry: Tensor,
    inverse_map: Tensor,
    seq_len: int,
    num_levels: int,
    pooling_factor: int,
    halo: Tensor | None = None,
    local: Tensor | None = None,
) -> Tensor:
    """Add up, for every position, the rows of the selected entries that write to it.

    Args:
        rows: [B, H, S, D], in the order of the selection.
        entry, inverse_map: as in ``gather``.
        halo: [B, H, L − 1, D], the rows of the entries before each level's first, from level 1 on. They belong to the
            chunk of the sequence before this one; the entry of level ℓ writes to this chunk's first p^ℓ − 1 positions.
        local: [B, H, N, D], what a position gets in place of its level-0 entry's row where that entry is not selected
            (docs/method.md, section 10.4).

    Returns:
        [B, H, N, D] in the dtype of ``rows``; differentiable once, in ``rows``, ``halo`` and ``local``.
    """
    scattered: Tensor = _Scatter.apply(rows, entry, inverse_map, seq_len, num_levels, pooling_factor, halo, local)
    return scattered


def scatter_backward(grad: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """The gradient of ``scatter`` in its rows: from [B, H, N, D] to [B, H, S, D].

    Here ``entry`` is enough; the Triton twin reads ``inverse_map`` instead.
    """
    return _pool(grad, entry, num_levels, pooling_factor, written=True)


def halo_backward(grad: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """The gradient of ``scatter`` in its halo, in both backends: from [B, H, N, D] to [B, H, L − 1, D]."""
    wide = accumulation_dtype(grad.dtype)
    sums = [grad[:, :, : pooling_factor**level - 1].sum(dim=2, dtype=wide) for level in range(1, num_levels)]
    return torch.stack(sums, dim=2).to(grad.dtype)


def where_missing(rows: Tensor, inverse_map: Tensor) -> Tensor:
    """Rows [B, H, N, D], zeroed at positions whose level-0 entry is selected.

    So ``scatter`` takes its local rows, and this is also their gradient, in both backends.
    """
    missing = inverse_map[..., : rows.shape[2]] < 0
    return rows.where(missing.repeat_interleave(rows.shape[1] // missing.shape[1], dim=1)[..., None], 0.0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int
    ) -> Tensor:
        ctx.save_for_backward(inverse_map)
        ctx.seq_len, ctx.shape = rows.shape[2], (num_levels, pooling_factor)
        return _pool(rows, entry, num_levels, pooling_factor, written=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_map,) = ctx.saved_tensors
        return gather_backward(grad, inverse_map, ctx.seq_len, *ctx.shape), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        entry: Tensor,
        inverse_map: Tensor,
        seq_len: int,
        num_levels: int,
        pooling_factor: int,
        halo: Tensor | None,
        local: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(entry, inverse_map)
        ctx.shape, ctx.has_halo, ctx.has_local = (num_levels, pooling_factor), halo is not None, local is not None
        return _spread(rows, inverse_map, seq_len, num_levels, pooling_factor, written=True, halo=halo, added=local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        entry, inverse_map = ctx.saved_tensors
        rows_grad = scatter_backward(grad, entry, inverse_map, *ctx.shape)
        halo_grad = halo_backward(grad, *ctx.shape) if ctx.has_halo else None
        local_grad = where_missing(grad, inverse_map) if ctx.has_local else None
        return rows_grad, None, None, None, None, None, halo_grad, local_grad


def entries_over(
    inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int, *, written: bool
) -> list[tuple[Tensor, Tensor]]:
    """For each level, finest first, the one entry in whose window each position lies: its index within the level, [N],
    negative where there is none, and its slot, [B, G, N], −1 where there is none or it is not selected."""
    position = torch.arange(seq_len, device=inverse_map.device)
    shift, found = int(written), []
    for level, offset in enumerate(level_offsets(seq_len, num_levels, pooling_factor)[:-1]):
        index = (position + shift) // pooling_factor**level - shift
        found.append((index, inverse_map[..., offset + index.clamp(min=0)].where(index >= 0, -1)))
    return found


def _pool(rows: Tensor, entry: Tensor, num_levels: int, pooling_factor: int, *, written: bool) -> Tensor:
    """Reduce a window of ``rows`` for every selected entry: the mean of the window that it covers, or the sum over the
    window that it writes to (``written``)."""
    lengths = level_lengths(rows.shape[2], num_levels, pooling_factor)
    if written:
        # Entry (ℓ, i) writes to the positions t with t + 1 in window i + 1: shift by a row, fill up to whole windows
        # past the end, and leave out window 0 of every level.
        rows = F.pad(rows, (0, 0, 1, pooling_factor ** (num_levels - 1) - 1))
    first = int(written)
    levels = pool_levels(rows, num_levels, pooling_factor, "sum" if written else "mean")
    pyramid = [level[:, :, first : first + n].to(rows.dtype) for level, n in zip(levels, lengths, strict=True)]
    return _take(torch.cat(pyramid, dim=2), entry)


def _spread(
    rows: Tensor,
    inverse_map: Tensor,
    seq_len: int,
    num_levels: int,
    pooling_factor: int,
    *,
    written: bool,
    halo: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """The transpose of ``_pool``: add up, for every position, the rows of the entries in whose window it lies.

    Args:
        added: [B, H, N, D], added as well; with ``written`` only where the level-0 entry is not selected.
    """
    total: Tensor | None = None
    found = entries_over(inverse_map, seq_len, num_levels, pooling_factor, written=written)
    for level, (index, slot) in enumerate(found):
        taken = take_or_zero(rows, slot)
        if added is not None and level == 0:
            taken = taken + (where_missing(added, inverse_map) if written else added).to(taken.dtype)
        if not written:
            taken = taken / pooling_factor**level
        if halo is not None and level:
            taken = taken + halo[:, :, level - 1, None].to(taken.dtype).where((index < 0)[:, None], 0.0)
        total = taken if total is None else total + taken
    assert total is not None
    # Not a bare cast: torch 2.11 compiles a result that is a no-op ``to`` into a gradient of zero.
    return total if total.dtype == rows.dtype else total.to(rows.dtype)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, H, n, D] at index [B, G, S], where each group's index serves its H/G heads: [B, H, S, D]."""
    grouped = rows.unflatten(1, (index.shape[1], -1))
    where = index.long()[:, :, None, :, None].expand(-1, -1, grouped.shape[2], -1, rows.shape[-1])
    return grouped.gather(3, where).flatten(1, 2)


def take_or_zero(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, H, n, D] at index [B, G, N], where each group's index serves its H/G heads: [B, H, N, D] in the
    accumulation dtype, with a row of zeros where the index is −1."""
    taken = _take(rows, index.clamp(min=0)).to(accumulation_dtype(rows.dtype))
    present = (index >= 0).repeat_interleave(rows.shape[1] // index.shape[1], dim=1)[..., None]
    return taken.where(present, 0.0)
