"""How rows move: two kernels for gather, scatter and their backwards.

Specification: the functions of the same names in ``lighthouse.gather_scatter``.

``_pool_kernel``, for ``gather`` and ``scatter_backward``, reduces windows of the sequence to the rows of the selected
entries. ``_spread_kernel``, for ``scatter`` and ``gather_backward``, gives every position of the sequence the rows of
the entries in whose windows it lies. Both treat one tensor, or query, key and value in one launch.

The flag ``WRITTEN`` says which window of an entry is meant: the one that it writes to, with weight 1, or the one that
it covers, with weight 1/p^ℓ.

Either kernel passes over the sequence once and writes each output row once.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.kernels.common import accumulator, empty, launch, log2, padded, with_contiguous_rows
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
def _of_three(lane, heads, groups, first, second, third):
    """Of three values the one for the ``lane``-th head of query, key and value, which stand one after the other."""
    return tl.where(lane < heads, first, tl.where(lane < heads + groups, second, third))


@triton.jit
def _pool_kernel(
    rows, rows_2, rows_3, inverse_map, out, out_2, out_3, coarse,
    stride_b, stride_h, stride_n, stride_b_2, stride_h_2, stride_n_2, stride_b_3, stride_h_3, stride_n_3, num_rows,
    base_length, base_offset, blocks, heads, groups, head_dim, selected, num_entries,
    THREE: tl.constexpr, STEPS: tl.constexpr, FIRST_PASS: tl.constexpr, STORE_COARSE: tl.constexpr,
    WRITTEN: tl.constexpr, FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``THREE``: three tensors, of ``heads``, ``groups`` and ``groups`` heads; otherwise one, of ``heads``."""
    block = tl.program_id(0) % blocks
    program = (tl.program_id(0) // blocks).to(tl.int64)
    lanes = heads
    if THREE:
        lanes = heads + 2 * groups
    b, lane = program // lanes, program % lanes
    h, group = lane, lane // (heads // groups)
    in_out = b * heads + lane
    if THREE:
        h = _of_three(lane, heads, groups, lane, lane - heads, lane - heads - groups)
        group = tl.where(lane < heads, group, h)
        in_out = _of_three(lane, heads, groups, in_out, b * groups + h, b * groups + h)
        rows = _of_three(lane, heads, groups, rows, rows_2, rows_3)
        out = _of_three(lane, heads, groups, out, out_2, out_3)
        stride_b = _of_three(lane, heads, groups, stride_b, stride_b_2, stride_b_3)
        stride_h = _of_three(lane, heads, groups, stride_h, stride_h_2, stride_h_3)
        stride_n = _of_three(lane, heads, groups, stride_n, stride_n_2, stride_n_3)
    inverse_map += (b * groups + group) * num_entries + base_offset
    out += in_out * selected * head_dim
    window = block * BLOCK_WINDOWS + tl.arange(0, BLOCK_WINDOWS)
    pooled = _pool_window(
        rows + b * stride_b + h * stride_h, inverse_map, out, window, num_rows, stride_n, base_length, head_dim,
        STEPS, FIRST_PASS, WRITTEN, FACTOR, LOG_FACTOR, BLOCK_D, ACC,
    )  # fmt: skip
    if STORE_COARSE:
        columns = tl.arange(0, BLOCK_D)
        coarse += program * blocks * BLOCK_WINDOWS * head_dim
        at = coarse + window.to(tl.int64)[:, None] * head_dim + columns[None, :]
        tl.store(at, pooled, mask=(columns < head_dim)[None, :])


class _Pass(NamedTuple):
    """What one launch of ``_pool_kernel`` is given beside tensors and their strides."""

    programs: int
    reached: int
    """Rows of each head that it leaves to the next pass."""
    numbers: tuple[int, ...]
    constants: dict[str, Any]


@cache
def _passes(
    seq_len: int, sequences: int, lanes: int, heads: int, groups: int, head_dim: int, selected: int,
    dtype: torch.dtype, num_levels: int, pooling_factor: int, written: bool,
) -> list[_Pass]:  # fmt: skip
    """The launches that pool ``lanes`` heads of each of ``sequences`` sequences: they depend on nothing but sizes."""
    lengths = level_lengths(seq_len, num_levels, pooling_factor)
    offsets = level_offsets(seq_len, num_levels, pooling_factor)
    log_factor, block_d = log2(pooling_factor), padded(head_dim)
    num_rows, level, passes = seq_len, 0, []
    while level < num_levels - 1:
        # A pass climbs as many levels as fit into a program; the next one starts from the level it reached.
        first_pass = level == 0
        steps = min(num_levels - 1 - level, max(1, log2(LONGEST_WINDOW) // log_factor))
        more = level + steps < num_levels - 1
        span = pooling_factor**steps
        windows = max(BLOCK_SIZE // block_d, FEWEST_ROWS // span)
        # The first pass over written windows reads from one row before the sequence on.
        blocks = -(-(num_rows + int(written and first_pass)) // (windows * span))
        numbers = (
            num_rows, lengths[level], offsets[level], blocks, heads, groups, head_dim, selected, offsets[-1]
        )  # fmt: skip
        constants = {
            "THREE": lanes > heads, "STEPS": steps, "FIRST_PASS": first_pass, "STORE_COARSE": more,
            "WRITTEN": written, "FACTOR": pooling_factor, "LOG_FACTOR": log_factor,
            "BLOCK_WINDOWS": windows, "BLOCK_D": block_d, "ACC": accumulator(dtype),
        }  # fmt: skip
        passes.append(_Pass(blocks * sequences * lanes, blocks * windows, numbers, constants))
        num_rows, level = blocks * windows, level + steps
    return passes


def pool(
    tensors: tuple[Tensor, ...], inverse_map: Tensor, selected: int, num_levels: int, pooling_factor: int,
    *, written: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """[B, H, N, D] to [B, H, S, D], contiguous: of one tensor, or of query, key and value in one launch."""
    sources, inverse_map = tuple(map(with_contiguous_rows, tensors)), inverse_map.contiguous()
    batch, heads, seq_len, head_dim = sources[0].shape
    lanes = sum(x.shape[1] for x in sources)
    outs = tuple(empty_short(x, selected) for x in sources)
    for programs, reached, numbers, constants in _passes(
        seq_len, batch, lanes, heads, inverse_map.shape[1], head_dim, selected, sources[0].dtype,
        num_levels, pooling_factor, written,
    ):  # fmt: skip
        coarse, more = outs[0], constants["STORE_COARSE"]  # the last pass does not write it
        if more:
            coarse = empty(outs[0], batch, lanes, reached, head_dim, dtype=accumulation_dtype(outs[0].dtype))
        launch(
            _pool_kernel, programs,
            (*_three(sources), inverse_map, *_three(outs), coarse),
            (*(stride for x in _three(sources) for stride in x.stride()[:3]), *numbers),
            **constants,
        )  # fmt: skip
        if more:
            sources = coarse.split([x.shape[1] for x in sources], dim=1)
    return outs


def _three(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What is not there is not read: the first takes its place."""
    return tensors if len(tensors) == 3 else tensors * 3


def empty_short(rows: Tensor, selected: int) -> Tensor:
    batch, heads, _, head_dim = rows.shape
    return empty(rows, batch, heads, selected, head_dim)


@triton.jit
def _spread_kernel(
    rows, rows_2, rows_3, inverse_map, halo, added, added_2, added_3, out, out_2, out_3,
    stride_b, stride_h, stride_s, stride_b_2, stride_h_2, stride_s_2, stride_b_3, stride_h_3, stride_s_3,
    added_stride_b, added_stride_h, added_stride_n, added_stride_b_2, added_stride_h_2, added_stride_n_2,
    added_stride_b_3, added_stride_h_3, added_stride_n_3,
    seq_len, blocks, heads, groups, head_dim, num_entries,
    THREE: tl.constexpr, NUM_LEVELS: tl.constexpr, WRITTEN: tl.constexpr,
    HAS_HALO: tl.constexpr, HAS_ADDED: tl.constexpr,
    LOG_FACTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``THREE``: as in ``_pool_kernel``, without halo. ``added``: with ``WRITTEN`` only where the level-0 entry is not
    selected."""
    shift: tl.constexpr = 1 if WRITTEN else 0
    block = tl.program_id(0) % blocks
    program = (tl.program_id(0) // blocks).to(tl.int64)
    lanes = heads
    if THREE:
        lanes = heads + 2 * groups
    b, lane = program // lanes, program % lanes
    h, group, out_heads = lane, lane // (heads // groups), heads
    if THREE:
        h = _of_three(lane, heads, groups, lane, lane - heads, lane - heads - groups)
        group = tl.where(lane < heads, group, h)
        out_heads = _of_three(lane, heads, groups, heads, groups, groups)
        rows = _of_three(lane, heads, groups, rows, rows_2, rows_3)
        out = _of_three(lane, heads, groups, out, out_2, out_3)
        stride_b = _of_three(lane, heads, groups, stride_b, stride_b_2, stride_b_3)
        stride_h = _of_three(lane, heads, groups, stride_h, stride_h_2, stride_h_3)
        stride_s = _of_three(lane, heads, groups, stride_s, stride_s_2, stride_s_3)
        added = _of_three(lane, heads, groups, added, added_2, added_3)
        added_stride_b = _of_three(lane, heads, groups, added_stride_b, added_stride_b_2, added_stride_b_3)
        added_stride_h = _of_three(lane, heads, groups, added_stride_h, added_stride_h_2, added_stride_h_3)
        added_stride_n = _of_three(lane, heads, groups, added_stride_n, added_stride_n_2, added_stride_n_3)
    inverse_map += (b * groups + group) * num_entries
    rows += b * stride_b + h * stride_h
    halo += program * (NUM_LEVELS - 1) * head_dim
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
        if HAS_ADDED and level == 0:
            at = added + b * added_stride_b + h * added_stride_h + position.to(tl.int64)[:, None] * added_stride_n
            here = inside
            if WRITTEN:
                here = inside & (slots < 0)
            taken += tl.load(at + columns[None, :], mask=here[:, None] & in_row, other=0.0).to(ACC)
        if not WRITTEN:
            taken = taken / (1 << (LOG_FACTOR * level))
        if HAS_HALO and level > 0:
            # The entry before this chunk's first writes to the first p^ℓ − 1 positions.
            halo_row = tl.load(halo + (level - 1) * head_dim + columns, mask=columns < head_dim, other=0.0).to(ACC)
            taken += tl.where((inside & (index < 0))[:, None], halo_row[None, :], 0.0)
        total += taken
        inverse_map += seq_len >> (LOG_FACTOR * level)
    # Stored as [B, N, H, D].
    out += (b * seq_len * out_heads + h) * head_dim
    at = out + position.to(tl.int64)[:, None] * (out_heads * head_dim) + columns[None, :]
    tl.store(at, total, mask=inside[:, None] & in_row)


def spread(
    tensors: tuple[Tensor, ...],
    inverse_map: Tensor,
    seq_len: int,
    num_levels: int,
    pooling_factor: int,
    *,
    written: bool,
    halo: Tensor | None = None,
    added: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """[B, H, S, D] to [B, H, N, D], stored as [B, N, H, D], which is how attention modules go on: of one tensor, or of
    query, key and value in one launch. ``added``: for each of them rows [B, H, N, D], as in ``_spread_kernel``."""
    sources, inverse_map = tuple(map(with_contiguous_rows, tensors)), inverse_map.contiguous()
    batch, heads, _, head_dim = sources[0].shape
    outs = tuple(empty_long(x, seq_len) for x in sources)
    # Tensors that are not there are not read: any other takes their place.
    halo_rows = sources[0] if halo is None else halo.contiguous()
    added_rows = sources if added is None else tuple(map(with_contiguous_rows, added))
    block_d = padded(head_dim)
    block_n = 4 * BLOCK_SIZE // block_d
    blocks = -(-seq_len // block_n)
    launch(
        _spread_kernel, blocks * batch * sum(x.shape[1] for x in sources),
        (*_three(sources), inverse_map, halo_rows, *_three(added_rows), *_three(outs)),
        (
            *(stride for x in (*_three(sources), *_three(added_rows)) for stride in x.stride()[:3]),
            seq_len, blocks, heads, inverse_map.shape[1], head_dim, inverse_map.shape[2],
        ),
        THREE=len(sources) == 3, NUM_LEVELS=num_levels, WRITTEN=written,
        HAS_HALO=halo is not None, HAS_ADDED=added is not None,
        LOG_FACTOR=log2(pooling_factor), BLOCK_N=block_n, BLOCK_D=block_d, ACC=accumulator(outs[0].dtype),
    )  # fmt: skip
    return outs


def empty_long(rows: Tensor, seq_len: int) -> Tensor:
    batch, heads, _, head_dim = rows.shape
    return empty(rows, batch, seq_len, heads, head_dim).transpose(1, 2)
