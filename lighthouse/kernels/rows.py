"""The two ways in which rows move, each other's transpose.

``pool_rows`` reduces windows of a long sequence into the rows of the selected entries: means of the windows that they
cover (pool and gather), or, shifted by one, sums of the positions that they write to (the backward of scatter-back).
``spread_rows`` gives every position of the long sequence the rows of the entries above it: the entries that cover it
(the backward of pool and gather), or, shifted, the entries that write to it (scatter-back).

Specification: the functions of the same names in ``lighthouse.rows``. Both read each long row once and write each
output row once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.kernels.common import accumulator, log2, padded, with_contiguous_rows
from lighthouse.pyramid import accumulation_dtype, level_lengths, level_offsets
from lighthouse.rows import halo_gradient

#: Elements of a tile: 16 bytes of bfloat16 for each of 128 threads.
TILE = 1024

#: The longest window that one program reduces, and the fewest rows that it reads.
LONGEST_WINDOW = 64
SHORTEST_BLOCK = 64


@triton.jit
def _place_of(place, window, entry_shift, base_length, STEP: tl.constexpr, LOG_FACTOR: tl.constexpr):
    """Where the entries of ``window``, ``STEP`` levels above the base, stand in the output; −1 where nowhere."""
    offset = 0
    for finer in tl.static_range(STEP):
        offset += base_length >> (LOG_FACTOR * finer)
    index = window - entry_shift
    exists = (index >= 0) & (index < base_length >> (LOG_FACTOR * STEP))
    return tl.load(place + offset + index, mask=exists, other=-1)


@triton.jit
def _store_rows(tile, out, to, head_dim, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    at = out + to.to(tl.int64)[:, None] * head_dim + columns[None, :]
    tl.store(at, tile, mask=(to >= 0)[:, None] & (columns < head_dim)[None, :])


@triton.jit
def _sum_base_rows(
    rows, place, out, window, row_shift, entry_shift, num_rows, stride_n, base_length, head_dim,
    STORE_BASE: tl.constexpr, CHILD: tl.constexpr, FACTOR: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the base rows ``CHILD`` … p − 1 of the windows, [W, BD], and store those that are selected.

    By recursion, so that all of them are loaded before the first is stored: a warp issues in order.
    """
    row = window * FACTOR + CHILD
    columns = tl.arange(0, BD)
    source = row - row_shift
    inside = (source >= 0) & (source < num_rows)
    tile = tl.load(
        rows + source.to(tl.int64)[:, None] * stride_n + columns[None, :],
        mask=inside[:, None] & (columns < head_dim)[None, :],
        other=0.0,
    ).to(ACC)  # [W, BD]
    total = tile
    if STORE_BASE:
        to = _place_of(place, row, entry_shift, base_length, 0, 0)
    if CHILD + 1 < FACTOR:
        total += _sum_base_rows(
            rows, place, out, window, row_shift, entry_shift, num_rows, stride_n, base_length, head_dim,
            STORE_BASE, CHILD + 1, FACTOR, BD, ACC,
        )  # fmt: skip
    if STORE_BASE:
        _store_rows(tile, out, to, head_dim, BD)
    return total


@triton.jit
def _pool_window(
    rows, place, out, window, row_shift, entry_shift, num_rows, stride_n, base_length, head_dim,
    STEP: tl.constexpr, STORE_BASE: tl.constexpr, MEAN: tl.constexpr,
    FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduce the windows ``window`` [W], ``STEP`` ≥ 1 levels above the base, to a tile [W, BD], and store on the way
    all selected entries below and at that level. A thread holds the same columns of every row: nothing is exchanged.
    """
    to = _place_of(place, window, entry_shift, base_length, STEP, LOG_FACTOR)
    if STEP == 1:
        tile = _sum_base_rows(
            rows, place, out, window, row_shift, entry_shift, num_rows, stride_n, base_length, head_dim,
            STORE_BASE, 0, FACTOR, BD, ACC,
        )  # fmt: skip
    else:
        tile = _pool_window(
            rows, place, out, window * FACTOR, row_shift, entry_shift, num_rows, stride_n, base_length, head_dim,
            STEP - 1, STORE_BASE, MEAN, FACTOR, LOG_FACTOR, BD, ACC,
        )  # fmt: skip
        for child in tl.static_range(1, FACTOR):
            tile += _pool_window(
                rows, place, out, window * FACTOR + child, row_shift, entry_shift, num_rows, stride_n, base_length,
                head_dim, STEP - 1, STORE_BASE, MEAN, FACTOR, LOG_FACTOR, BD, ACC,
            )  # fmt: skip
    if MEAN:
        tile = tile / FACTOR
    _store_rows(tile, out, to, head_dim, BD)
    return tile


@triton.jit
def _pool_kernel(
    rows, place, out, coarse,
    stride_b, stride_h, stride_n, num_rows, row_shift, entry_shift,
    base_length, base_offset, blocks, heads, groups, head_dim, selected, num_entries,
    STEPS: tl.constexpr, STORE_BASE: tl.constexpr, STORE_COARSE: tl.constexpr, MEAN: tl.constexpr,
    FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr, WINDOWS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    place += (b * groups + h // (heads // groups)) * num_entries + base_offset
    out += bh * selected * head_dim
    window = block * WINDOWS + tl.arange(0, WINDOWS)
    tile = _pool_window(
        rows + b * stride_b + h * stride_h, place, out, window, row_shift, entry_shift, num_rows, stride_n,
        base_length, head_dim, STEPS, STORE_BASE, MEAN, FACTOR, LOG_FACTOR, BD, ACC,
    )  # fmt: skip
    if STORE_COARSE:
        columns = tl.arange(0, BD)
        coarse += bh * blocks * WINDOWS * head_dim
        at = coarse + window.to(tl.int64)[:, None] * head_dim + columns[None, :]
        tl.store(at, tile, mask=(columns < head_dim)[None, :])


@torch.library.custom_op("lighthouse::pool_rows", mutates_args=())
def pool_rows(
    rows: Tensor, entry: Tensor, place: Tensor, num_levels: int, pooling_factor: int, shift: int, mean: bool
) -> Tensor:
    """``lighthouse.rows.pool_rows``; the result is contiguous."""
    selected = entry.shape[-1]
    rows, place = with_contiguous_rows(rows), place.contiguous()
    batch, heads, seq_len, head_dim = rows.shape
    out = _empty_short(rows, selected)
    lengths = level_lengths(seq_len, num_levels, pooling_factor)
    offsets = level_offsets(seq_len, num_levels, pooling_factor)
    log_factor, width = log2(pooling_factor), padded(head_dim)
    source, num_rows, row_shift, level = rows, seq_len, shift, 0
    while True:
        # A pass climbs as many levels as fit into a program; the next one starts from the level it reached.
        steps = min(num_levels - 1 - level, max(1, log2(LONGEST_WINDOW) // log_factor))
        more = level + steps < num_levels - 1
        span = pooling_factor**steps
        windows = max(TILE // width, SHORTEST_BLOCK // span)
        blocks = triton.cdiv(num_rows + row_shift, windows * span)
        reached = blocks * windows
        coarse = out.new_empty(
            (batch, heads, reached, head_dim) if more else (0,) * 4, dtype=accumulation_dtype(rows.dtype)
        )
        _pool_kernel[(blocks * batch * heads,)](
            source, place, out, coarse,
            *source.stride()[:3], num_rows, row_shift, shift,
            lengths[level], offsets[level], blocks, heads, place.shape[1], head_dim, selected, place.shape[2],
            STEPS=steps, STORE_BASE=level == 0, STORE_COARSE=more, MEAN=mean,
            FACTOR=pooling_factor, LOG_FACTOR=log_factor, WINDOWS=windows, BD=width, ACC=accumulator(rows.dtype),
        )  # fmt: skip
        if not more:
            return out
        source, num_rows, row_shift, level = coarse, reached, 0, level + steps


def _empty_short(rows: Tensor, selected: int) -> Tensor:
    batch, heads, _, head_dim = rows.shape
    return rows.new_empty(batch, heads, selected, head_dim)


@pool_rows.register_fake
def _(
    rows: Tensor, entry: Tensor, place: Tensor, num_levels: int, pooling_factor: int, shift: int, mean: bool
) -> Tensor:
    return _empty_short(rows, entry.shape[-1])


@triton.jit
def _spread_kernel(
    rows, place, halo, out,
    stride_b, stride_h, stride_s, out_stride_b, out_stride_h, out_stride_n,
    seq_len, blocks, heads, groups, head_dim, num_entries,
    NUM_LEVELS: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr, HALO: tl.constexpr, LOG_FACTOR: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    place += (b * groups + h // (heads // groups)) * num_entries
    rows += b * stride_b + h * stride_h
    halo += bh * (NUM_LEVELS - 1) * head_dim
    position = block * BN + tl.arange(0, BN)
    inside = position < seq_len
    columns = tl.arange(0, BD)
    in_row = (columns < head_dim)[None, :]

    total = tl.zeros((BN, BD), dtype=ACC)
    for level in tl.static_range(NUM_LEVELS):
        index = ((position + SHIFT) >> (LOG_FACTOR * level)) - SHIFT
        source = tl.load(place + index, mask=inside & (index >= 0), other=-1)
        tile = tl.load(
            rows + source.to(tl.int64)[:, None] * stride_s + columns[None, :],
            mask=(source >= 0)[:, None] & in_row,
            other=0.0,
        ).to(ACC)
        if MEAN:
            tile = tile / (1 << (LOG_FACTOR * level))
        if HALO and level > 0:
            # The first p^ℓ − 1 positions belong to the entry before this chunk's first.
            spill = tl.load(halo + (level - 1) * head_dim + columns, mask=columns < head_dim, other=0.0).to(ACC)
            tile += tl.where((inside & (index < 0))[:, None], spill[None, :], 0.0)
        total += tile
        place += seq_len >> (LOG_FACTOR * level)
    at = out + b * out_stride_b + h * out_stride_h + position.to(tl.int64)[:, None] * out_stride_n + columns[None, :]
    tl.store(at, total, mask=inside[:, None] & in_row)


@torch.library.custom_op("lighthouse::spread_rows", mutates_args=())
def spread_rows(
    rows: Tensor, entry: Tensor, place: Tensor, seq_len: int, num_levels: int, pooling_factor: int,
    shift: int, mean: bool, halo: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``lighthouse.rows.spread_rows``; the result is stored as [B, N, H, D], in which attention modules go on."""
    rows, place = with_contiguous_rows(rows), place.contiguous()
    batch, heads, _, head_dim = rows.shape
    out = _empty_long(rows, seq_len)
    width = padded(head_dim)
    block_rows = 4 * TILE // width
    blocks = triton.cdiv(seq_len, block_rows)
    _spread_kernel[(blocks * batch * heads,)](
        rows, place, rows if halo is None else halo.contiguous(), out, *rows.stride()[:3], *out.stride()[:3],
        seq_len, blocks, heads, place.shape[1], head_dim, place.shape[2],
        NUM_LEVELS=num_levels, SHIFT=shift, MEAN=mean, HALO=halo is not None, LOG_FACTOR=log2(pooling_factor),
        BN=block_rows, BD=width, ACC=accumulator(rows.dtype),
    )  # fmt: skip
    return out


def _empty_long(rows: Tensor, seq_len: int) -> Tensor:
    batch, heads, _, head_dim = rows.shape
    return rows.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)


@spread_rows.register_fake
def _(
    rows: Tensor, entry: Tensor, place: Tensor, seq_len: int, num_levels: int, pooling_factor: int,
    shift: int, mean: bool, halo: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _empty_long(rows, seq_len)


def _setup_pool(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rows, entry, place, *ctx.how = inputs
    ctx.save_for_backward(entry, place)
    ctx.seq_len = rows.shape[2]


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return spread_rows(grad, *ctx.saved_tensors, ctx.seq_len, *ctx.how), *[None] * 6


def _setup_spread(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, entry, place, _, *ctx.how, halo = inputs
    ctx.save_for_backward(entry, place)
    ctx.has_halo = halo is not None


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    halo_grad = halo_gradient(grad, *ctx.how[:2]) if ctx.has_halo else None
    return pool_rows(grad, *ctx.saved_tensors, *ctx.how), *[None] * 7, halo_grad


pool_rows.register_autograd(_pool_backward, setup_context=_setup_pool)
spread_rows.register_autograd(_spread_backward, setup_context=_setup_spread)
