"""Gather, scatter and their backward operators.

Specification: the functions of the same names in ``lighthouse.gather_scatter``.

Two kernels serve the four operators. ``_pool_kernel``, for ``gather`` and ``scatter_backward``, reduces windows of the
sequence to the rows of the selected entries. ``_spread_kernel``, for ``scatter`` and ``gather_backward``, gives every
position of the sequence the rows of the entries in whose windows it lies. The flag ``WRITTEN`` says which window of an
entry is meant: the one that it writes to, with weight 1, or the one that it covers, with weight 1/p^ℓ.

Either kernel passes over the sequence once and writes each output row once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.gather_scatter import halo_backward, where_missing
from lighthouse.kernels.common import accumulator, log2, padded, with_contiguous_rows
from lighthouse.pyramid import accumulation_dtype, level_lengths, level_offsets

#: Elements of a block of rows: 16 bytes of bfloat16 for each of 128 threads.
BLOCK_SIZE = 1024

#: The longest window that one program reduces, and the fewest rows that it reads.
LONGEST_WINDOW = 64
FEWEST_ROWS = 64


@triton.jit
def _slots_of(
    inverse_map, window, base_length,
    STEP: tl.constexpr, WRITTEN: tl.constexpr, LOG_FACTOR: tl.constexpr,
):  # fmt: skip
    """The slots of the entries of ``window``, ``STEP`` levels above the base; −1 where there is none."""
    offset = 0
    for finer in tl.static_range(STEP):
        offset += base_length >> (LOG_FACTOR * finer)
    index = window
    if WRITTEN:
        index = window - 1
    exists = (index >= 0) & (index < base_length >> (LOG_FACTOR * STEP))
    return tl.load(inverse_map + offset + index, mask=exists, other=-1)


@triton.jit
def _store_rows(values, out, slots, head_dim, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    at = out + slots.to(tl.int64)[:, None] * head_dim + columns[None, :]
    tl.store(at, values, mask=(slots >= 0)[:, None] & (columns < head_dim)[None, :])


@triton.jit
def _sum_base_rows(
    rows, inverse_map, out, window, num_rows, stride_n, base_length, head_dim,
    FIRST_PASS: tl.constexpr, WRITTEN: tl.constexpr, CHILD: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum the base rows ``CHILD`` … p − 1 of the windows, [W, BLOCK_D]. In the first pass they are rows of level 0:
    store those that are selected.

    By recursion, so that all of them are loaded before the first is stored: a warp issues in order.
    """
    row = window * FACTOR + CHILD
    columns = tl.arange(0, BLOCK_D)
    source = row
    if WRITTEN and FIRST_PASS:
        source = row - 1  # the window that an entry writes to begins one row before a multiple of p^ℓ
    inside = (source >= 0) & (source < num_rows)
    values = tl.load(
        rows + source.to(tl.int64)[:, None] * stride_n + columns[None, :],
        mask=inside[:, None] & (columns < head_dim)[None, :],
        other=0.0,
    ).to(ACC)  # [W, BLOCK_D]
    total = values
    if FIRST_PASS:
        slots = _slots_of(inverse_map, row, base_length, 0, WRITTEN, 0)
    if CHILD + 1 < FACTOR:
        total += _sum_base_rows(
            rows, inverse_map, out, window, num_rows, stride_n, base_length, head_dim,
            FIRST_PASS, WRITTEN, CHILD + 1, FACTOR, BLOCK_D, ACC,
        )  # fmt: skip
    if FIRST_PASS:
        _store_rows(values, out, slots, head_dim, BLOCK_D)
    return total


@triton.jit
def _pool_window(
    rows, inverse_map, out, window, num_rows, stride_n, base_length, head_dim,
    STEP: tl.constexpr, FIRST_PASS: tl.constexpr, WRITTEN: tl.constexpr,
    FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduce the windows ``window`` [W], ``STEP`` ≥ 1 levels above the base, to [W, BLOCK_D], and store on the way all
    selected entries below and at that level. A thread holds the same columns of every row: nothing is exchanged.
    """
    slots = _slots_of(inverse_map, window, base_length, STEP, WRITTEN, LOG_FACTOR)
    if STEP == 1:
        pooled = _sum_base_rows(
            rows, inverse_map, out, window, num_rows, stride_n, base_length, head_dim,
            FIRST_PASS, WRITTEN, 0, FACTOR, BLOCK_D, ACC,
        )  # fmt: skip
    else:
        pooled = _pool_window(
            rows, inverse_map, out, window * FACTOR, num_rows, stride_n, base_length, head_dim,
            STEP - 1, FIRST_PASS, WRITTEN, FACTOR, LOG_FACTOR, BLOCK_D, ACC,
        )  # fmt: skip
        for child in tl.static_range(1, FACTOR):
            pooled += _pool_window(
                rows, inverse_map, out, window * FACTOR + child, num_rows, stride_n, base_length, head_dim,
                STEP - 1, FIRST_PASS, WRITTEN, FACTOR, LOG_FACTOR, BLOCK_D, ACC,
            )  # fmt: skip
    if not WRITTEN:
        pooled = pooled / FACTOR
    _store_rows(pooled, out, slots, head_dim, BLOCK_D)
    return pooled


@triton.jit
def _pool_kernel(
    rows, inverse_map, out, coarse,
    stride_b, stride_h, stride_n, num_rows,
    base_length, base_offset, blocks, heads, groups, head_dim, selected, num_entries,
    STEPS: tl.constexpr, FIRST_PASS: tl.constexpr, STORE_COARSE: tl.constexpr, WRITTEN: tl.constexpr,
    FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    inverse_map += (b * groups + h // (heads // groups)) * num_entries + base_offset
    out += bh * selected * head_dim
    window = block * BLOCK_WINDOWS + tl.arange(0, BLOCK_WINDOWS)
    pooled = _pool_window(
        rows + b * stride_b + h * stride_h, inverse_map, out, window, num_rows, stride_n, base_length, head_dim,
        STEPS, FIRST_PASS, WRITTEN, FACTOR, LOG_FACTOR, BLOCK_D, ACC,
    )  # fmt: skip
    if STORE_COARSE:
        columns = tl.arange(0, BLOCK_D)
        coarse += bh * blocks * BLOCK_WINDOWS * head_dim
        at = coarse + window.to(tl.int64)[:, None] * head_dim + columns[None, :]
        tl.store(at, pooled, mask=(columns < head_dim)[None, :])


def _pool(
    rows: Tensor, inverse_map: Tensor, selected: int, num_levels: int, pooling_factor: int, *, written: bool
) -> Tensor:
    """[B, H, N, D] to [B, H, S, D], contiguous."""
    rows, inverse_map = with_contiguous_rows(rows), inverse_map.contiguous()
    batch, heads, seq_len, head_dim = rows.shape
    out = _empty_short(rows, selected)
    lengths = level_lengths(seq_len, num_levels, pooling_factor)
    offsets = level_offsets(seq_len, num_levels, pooling_factor)
    log_factor, block_d = log2(pooling_factor), padded(head_dim)
    source, num_rows, level = rows, seq_len, 0
    while True:
        # A pass climbs as many levels as fit into a program; the next one starts from the level it reached.
        first_pass = level == 0
        steps = min(num_levels - 1 - level, max(1, log2(LONGEST_WINDOW) // log_factor))
        more = level + steps < num_levels - 1
        span = pooling_factor**steps
        windows = max(BLOCK_SIZE // block_d, FEWEST_ROWS // span)
        # The first pass over written windows reads from one row before the sequence on.
        blocks = triton.cdiv(num_rows + int(written and first_pass), windows * span)
        reached = blocks * windows
        coarse = out.new_empty(
            (batch, heads, reached, head_dim) if more else (0,) * 4, dtype=accumulation_dtype(rows.dtype)
        )
        _pool_kernel[(blocks * batch * heads,)](
            source, inverse_map, out, coarse,
            *source.stride()[:3], num_rows,
            lengths[level], offsets[level], blocks, heads, inverse_map.shape[1], head_dim, selected,
            inverse_map.shape[2],
            STEPS=steps, FIRST_PASS=first_pass, STORE_COARSE=more, WRITTEN=written,
            FACTOR=pooling_factor, LOG_FACTOR=log_factor,
            BLOCK_WINDOWS=windows, BLOCK_D=block_d, ACC=accumulator(rows.dtype),
        )  # fmt: skip
        if not more:
            return out
        source, num_rows, level = coarse, reached, level + steps


def _empty_short(rows: Tensor, selected: int) -> Tensor:
    batch, heads, _, head_dim = rows.shape
    return rows.new_empty(batch, heads, selected, head_dim)


@triton.jit
def _spread_kernel(
    rows, inverse_map, halo, local, out,
    stride_b, stride_h, stride_s, local_stride_b, local_stride_h, local_stride_n,
    out_stride_b, out_stride_h, out_stride_n,
    seq_len, blocks, heads, groups, head_dim, num_entries,
    NUM_LEVELS: tl.constexpr, WRITTEN: tl.constexpr, HAS_HALO: tl.constexpr, HAS_LOCAL: tl.constexpr,
    LOG_FACTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    shift: tl.constexpr = 1 if WRITTEN else 0
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    inverse_map += (b * groups + h // (heads // groups)) * num_entries
    rows += b * stride_b + h * stride_h
    halo += bh * (NUM_LEVELS - 1) * head_dim
    position = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < seq_len
    columns = tl.arange(0, BLOCK_D)
    in_row = (columns < head_dim)[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    for level in tl.static_range(NUM_LEVELS):
        index = ((position + shift) >> (LOG_FACTOR * level)) - shift
        slots = tl.load(inverse_map + index, mask=inside & (index >= 0), other=-1)
        taken = tl.load(
            rows + slots.to(tl.int64)[:, None] * stride_s + columns[None, :],
            mask=(slots >= 0)[:, None] & in_row,
            other=0.0,
        ).to(ACC)
        if HAS_LOCAL and level == 0:
            at = position.to(tl.int64)[:, None] * local_stride_n + columns[None, :]
            missing = inside & (slots < 0)
            taken += tl.load(
                local + b * local_stride_b + h * local_stride_h + at, mask=missing[:, None] & in_row, other=0.0
            ).to(ACC)
        if not WRITTEN:
            taken = taken / (1 << (LOG_FACTOR * level))
        if HAS_HALO and level > 0:
            # The entry before this chunk's first writes to the first p^ℓ − 1 positions.
            halo_row = tl.load(halo + (level - 1) * head_dim + columns, mask=columns < head_dim, other=0.0).to(ACC)
            taken += tl.where((inside & (index < 0))[:, None], halo_row[None, :], 0.0)
        total += taken
        inverse_map += seq_len >> (LOG_FACTOR * level)
    at = out + b * out_stride_b + h * out_stride_h + position.to(tl.int64)[:, None] * out_stride_n + columns[None, :]
    tl.store(at, total, mask=inside[:, None] & in_row)


def _spread(
    rows: Tensor,
    inverse_map: Tensor,
    seq_len: int,
    num_levels: int,
    pooling_factor: int,
    *,
    written: bool,
    halo: Tensor | None = None,
    local: Tensor | None = None,
) -> Tensor:
    """[B, H, S, D] to [B, H, N, D], stored as [B, N, H, D], which is how attention modules go on."""
    rows, inverse_map = with_contiguous_rows(rows), inverse_map.contiguous()
    batch, heads, _, head_dim = rows.shape
    out = _empty_long(rows, seq_len)
    # Tensors that are not there are not read: any other takes their place.
    halo_rows = rows if halo is None else halo.contiguous()
    local_rows = rows if local is None else with_contiguous_rows(local)
    block_d = padded(head_dim)
    block_n = 4 * BLOCK_SIZE // block_d
    blocks = triton.cdiv(seq_len, block_n)
    _spread_kernel[(blocks * batch * heads,)](
        rows, inverse_map, halo_rows, local_rows, out,
        *rows.stride()[:3], *local_rows.stride()[:3], *out.stride()[:3],
        seq_len, blocks, heads, inverse_map.shape[1], head_dim, inverse_map.shape[2],
        NUM_LEVELS=num_levels, WRITTEN=written, HAS_HALO=halo is not None, HAS_LOCAL=local is not None,
        LOG_FACTOR=log2(pooling_factor),
        BLOCK_N=block_n, BLOCK_D=block_d, ACC=accumulator(rows.dtype),
    )  # fmt: skip
    return out


def _empty_long(rows: Tensor, seq_len: int) -> Tensor:
    batch, heads, _, head_dim = rows.shape
    return rows.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)


@torch.library.custom_op("lighthouse::gather", mutates_args=())
def gather(rows: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """``lighthouse.gather_scatter.gather``; the result is contiguous."""
    return _pool(rows, inverse_map, entry.shape[-1], num_levels, pooling_factor, written=False)


@gather.register_fake
def _(rows: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    return _empty_short(rows, entry.shape[-1])


@torch.library.custom_op("lighthouse::gather_backward", mutates_args=())
def gather_backward(grad: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int) -> Tensor:
    """``lighthouse.gather_scatter.gather_backward``; the result is stored as [B, N, H, D]."""
    return _spread(grad, inverse_map, seq_len, num_levels, pooling_factor, written=False)


@gather_backward.register_fake
def _(grad: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int) -> Tensor:
    return _empty_long(grad, seq_len)


@torch.library.custom_op("lighthouse::scatter", mutates_args=())
def scatter(
    rows: Tensor, entry: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int,
    halo: Tensor | None = None, local: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``lighthouse.gather_scatter.scatter``; the result is stored as [B, N, H, D]."""
    return _spread(rows, inverse_map, seq_len, num_levels, pooling_factor, written=True, halo=halo, local=local)


@scatter.register_fake
def _(
    rows: Tensor, entry: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int,
    halo: Tensor | None = None, local: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _empty_long(rows, seq_len)


@torch.library.custom_op("lighthouse::scatter_backward", mutates_args=())
def scatter_backward(grad: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """``lighthouse.gather_scatter.scatter_backward``; the result is contiguous."""
    return _pool(grad, inverse_map, entry.shape[-1], num_levels, pooling_factor, written=True)


@scatter_backward.register_fake
def _(grad: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    return _empty_short(grad, entry.shape[-1])


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, _, inverse_map, *ctx.shape = inputs
    ctx.save_for_backward(inverse_map)
    ctx.seq_len = rows.shape[2]


def _differentiate_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_map,) = ctx.saved_tensors
    return gather_backward(grad, inverse_map, ctx.seq_len, *ctx.shape), None, None, None, None


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, entry, inverse_map, _, *ctx.shape, halo, local = inputs
    ctx.save_for_backward(entry, inverse_map)
    ctx.has_halo, ctx.has_local = halo is not None, local is not None


def _differentiate_scatter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entry, inverse_map = ctx.saved_tensors
    rows_grad = scatter_backward(grad, entry, inverse_map, *ctx.shape)
    halo_grad = halo_backward(grad, *ctx.shape) if ctx.has_halo else None
    local_grad = where_missing(grad, inverse_map) if ctx.has_local else None
    return rows_grad, None, None, None, None, None, halo_grad, local_grad


gather.register_autograd(_differentiate_gather, setup_context=_setup_gather)
scatter.register_autograd(_differentiate_scatter, setup_context=_setup_scatter)
