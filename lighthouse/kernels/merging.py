"""The merge of a position's parts, and its gradient, in one pass each.

Specification: ``lighthouse.merging``. ``_merge_kernel`` gives every position the mean of its parts, weighted by the
softmax of their log-sum-exps, and the log-sum-exp of the whole.

``_merge_backward_kernel`` goes over the selected entries. For each it writes what the backward of their attention is
given (``lighthouse.parts``): the gradient of the entry's row, and in place of the row another one, from which that
backward gets the gradient of the log-sum-exp, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.kernels.common import accumulator, empty, launch, log2, padded, with_contiguous_rows
from lighthouse.kernels.gather_scatter import empty_long, empty_short
from lighthouse.pyramid import accumulation_dtype

#: Elements of a block of rows: of positions, and of what entries write to.
BLOCK_SIZE = 4096
BACKWARD_BLOCK_SIZE = 2048

#: Positions of one entry that are read at once.
ROWS = 4


@triton.jit
def _merge_kernel(
    rows, sums, near, near_sums, inverse_map, out, whole,
    stride_b, stride_h, stride_s, near_stride_b, near_stride_h, near_stride_n,
    seq_len, blocks, heads, groups, head_dim, selected, num_entries,
    HAS_NEAR: tl.constexpr, NUM_LEVELS: tl.constexpr, LOG_FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    program = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = program // heads, program % heads
    inverse_map += (b * groups + h // (heads // groups)) * num_entries
    rows += b * stride_b + h * stride_h
    sums += program * selected
    position = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < seq_len
    columns = tl.arange(0, BLOCK_D)
    in_row = (columns < head_dim)[None, :]

    # The largest log-sum-exp of each position, so that no weight overflows.
    largest = tl.full((BLOCK_N,), float("-inf"), dtype=ACC)
    if HAS_NEAR:
        largest = tl.load(near_sums + program * seq_len + position, mask=inside, other=float("-inf"))
    slots_of = inverse_map
    for level in tl.static_range(NUM_LEVELS):
        index = ((position + 1) >> (LOG_FACTOR * level)) - 1
        slots = tl.load(slots_of + index, mask=inside & (index >= 0), other=-1)
        largest = tl.maximum(largest, tl.load(sums + slots, mask=slots >= 0, other=float("-inf")))
        slots_of += seq_len >> (LOG_FACTOR * level)
    finite = tl.where(largest == float("-inf"), 0.0, largest)

    merged = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    total = tl.zeros((BLOCK_N,), dtype=ACC)
    if HAS_NEAR:
        at = near + b * near_stride_b + h * near_stride_h + position.to(tl.int64)[:, None] * near_stride_n
        taken = tl.load(at + columns[None, :], mask=inside[:, None] & in_row, other=0.0).to(ACC)
        total = tl.exp(tl.load(near_sums + program * seq_len + position, mask=inside, other=float("-inf")) - finite)
        merged = total[:, None] * taken
    for level in tl.static_range(NUM_LEVELS):
        index = ((position + 1) >> (LOG_FACTOR * level)) - 1
        slots = tl.load(inverse_map + index, mask=inside & (index >= 0), other=-1)
        taken = tl.load(
            rows + slots.to(tl.int64)[:, None] * stride_s + columns[None, :],
            mask=(slots >= 0)[:, None] & in_row,
            other=0.0,
        ).to(ACC)
        weight = tl.exp(tl.load(sums + slots, mask=slots >= 0, other=float("-inf")) - finite)
        total += weight
        merged += weight[:, None] * taken
        inverse_map += seq_len >> (LOG_FACTOR * level)
    # Without any part the sum is 0, and so is the row.
    divisor = tl.where(total > 0, total, 1.0)
    merged = merged / divisor[:, None]
    of_all = tl.where(total > 0, tl.log(divisor) + finite, float("-inf"))
    tl.store(whole + program * seq_len + position, of_all, mask=inside)
    # Stored as [B, N, H, D].
    at = out + (b * seq_len * heads + h) * head_dim + position.to(tl.int64)[:, None] * (heads * head_dim)
    tl.store(at + columns[None, :], merged, mask=inside[:, None] & in_row)


@triton.jit
def _merge_backward_kernel(
    grad, result, whole, sums, entry, pooled_grad, chosen,
    stride_b, stride_h, stride_n, result_stride_b, result_stride_h, result_stride_n,
    seq_len, blocks, heads, groups, head_dim, selected,
    NUM_LEVELS: tl.constexpr, LOG_FACTOR: tl.constexpr, ENTRIES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, LARGEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    program = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = program // heads, program % heads
    entry += (b * groups + h // (heads // groups)) * selected
    grad += b * stride_b + h * stride_h
    result += b * result_stride_b + h * result_stride_h
    whole += program * seq_len
    sums += program * selected
    columns = tl.arange(0, BLOCK_D)
    in_row = (columns < head_dim)[None, :]

    # A lane reads every ROWS-th of the positions that its entry writes to.
    lane = tl.arange(0, ENTRIES * ROWS)
    slot = block * ENTRIES + lane // ROWS
    exists = slot < selected
    number = tl.load(entry + slot, mask=exists, other=0)
    own_sums = tl.load(sums + slot, mask=exists, other=0.0)
    index, shift, offset = number, tl.zeros_like(number), 0
    for level in tl.static_range(1, NUM_LEVELS):
        offset += seq_len >> (LOG_FACTOR * (level - 1))
        index = tl.where(number >= offset, number - offset, index)
        shift = tl.where(number >= offset, LOG_FACTOR * level, shift)
    first = ((index + 1) << shift) - 1
    width = tl.where(exists, 1 << shift, 0)

    pooled = tl.zeros((ENTRIES * ROWS, BLOCK_D), dtype=ACC)
    products = tl.zeros((ENTRIES * ROWS, BLOCK_D), dtype=ACC)
    for start in range(0, tl.max(width, axis=0), ROWS):
        place = start + lane % ROWS
        position = first + place
        there = (place < width) & (position < seq_len)
        weight = tl.exp(own_sums - tl.load(whole + position, mask=there, other=float("inf")))
        row, mask = position.to(tl.int64)[:, None], there[:, None] & in_row
        weighted = weight[:, None] * tl.load(grad + row * stride_n + columns[None, :], mask=mask, other=0.0).to(ACC)
        merged = tl.load(result + row * result_stride_n + columns[None, :], mask=mask, other=0.0).to(ACC)
        pooled += weighted
        products += weighted * merged
    pooled = tl.sum(tl.reshape(pooled, (ENTRIES, ROWS, BLOCK_D)), axis=1)
    product = tl.sum(tl.reshape(products, (ENTRIES, ROWS * BLOCK_D)), axis=1)

    # The other row is chosen in the direction of the gradient. All terms of their product then have one sign, so that
    # its relative error is at most that of a single rounding. The rounded gradient is what counts: only that is handed
    # on. Division by its largest element comes first, so that no square overflows or vanishes. A gradient of zeros has
    # no such row.
    slot = block * ENTRIES + tl.arange(0, ENTRIES)
    at = (program * selected + slot)[:, None] * head_dim + columns[None, :]
    mask = (slot < selected)[:, None] & in_row
    handed_on = pooled.to(pooled_grad.dtype.element_ty)
    tl.store(pooled_grad + at, handed_on, mask=mask)
    rounded = handed_on.to(ACC)
    size = tl.max(tl.abs(rounded), axis=1)
    divisor = tl.where(size > 0, size, 1.0)
    direction = rounded / divisor[:, None]
    square = tl.sum(direction * direction, axis=1)
    factor = tl.where(size > 0, product / divisor / tl.where(size > 0, square, 1.0), 0.0)
    factor = tl.minimum(tl.maximum(factor, -LARGEST), LARGEST)
    tl.store(chosen + at, factor[:, None] * direction, mask=mask)


def merge_rows(
    rows: Tensor, sums: Tensor, near: Tensor | None, near_sums: Tensor | None, inverse_map: Tensor, seq_len: int,
    num_levels: int, pooling_factor: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows [B, H, S, D] and [B, H, N, D] to [B, H, N, D], stored as [B, N, H, D], and [B, H, N]."""
    rows, sums, inverse_map = with_contiguous_rows(rows), sums.contiguous(), inverse_map.contiguous()
    batch, heads, selected, head_dim = rows.shape
    out, whole = empty_merged(rows, seq_len)
    # Tensors that are not there are not read: any other takes their place.
    near_rows = rows if near is None else with_contiguous_rows(near)
    block_d = padded(head_dim)
    block_n = max(1, BLOCK_SIZE // block_d)
    blocks = -(-seq_len // block_n)
    launch(
        _merge_kernel, blocks * batch * heads,
        (rows, sums, near_rows, sums if near_sums is None else near_sums.contiguous(), inverse_map, out, whole),
        (
            *rows.stride()[:3], *near_rows.stride()[:3], seq_len, blocks, heads, inverse_map.shape[1], head_dim,
            selected, inverse_map.shape[2],
        ),
        HAS_NEAR=near is not None, NUM_LEVELS=num_levels, LOG_FACTOR=log2(pooling_factor),
        BLOCK_N=block_n, BLOCK_D=block_d, ACC=accumulator(rows.dtype),
    )  # fmt: skip
    return out, whole


def merge_rows_backward(
    grad: Tensor, result: Tensor, whole: Tensor, sums: Tensor, entry: Tensor, num_levels: int, pooling_factor: int
) -> tuple[Tensor, Tensor]:
    """From [B, H, N, D] to twice [B, H, S, D], contiguous."""
    grad, result, entry = with_contiguous_rows(grad), with_contiguous_rows(result), entry.contiguous()
    batch, heads, seq_len, head_dim = grad.shape
    groups, selected = entry.shape[1:]
    pooled_grad, chosen = empty_short(grad, selected), empty_short(grad, selected)
    block_d = padded(head_dim)
    entries = max(1, BACKWARD_BLOCK_SIZE // (ROWS * block_d))
    blocks = -(-selected // entries)
    launch(
        _merge_backward_kernel, blocks * batch * heads,
        (grad, result, whole.contiguous(), sums.contiguous(), entry, pooled_grad, chosen),
        (*grad.stride()[:3], *result.stride()[:3], seq_len, blocks, heads, groups, head_dim, selected),
        NUM_LEVELS=num_levels, LOG_FACTOR=log2(pooling_factor), ENTRIES=entries, ROWS=ROWS, BLOCK_D=block_d,
        LARGEST=torch.finfo(grad.dtype).max, ACC=accumulator(grad.dtype),
    )  # fmt: skip
    return pooled_grad, chosen


def empty_merged(rows: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    batch, heads = rows.shape[:2]
    sums = empty(rows, batch, heads, seq_len, dtype=accumulation_dtype(rows.dtype))
    return empty_long(rows, seq_len), sums
