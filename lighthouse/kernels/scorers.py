"""Norm scores of the pyramid's first level, in one pass over queries and keys.

Specification: ``lighthouse.scorers.norm_scores``, then one level of ``lighthouse.pyramid.pool_scores``. The scores of
level 0 itself are never needed: all of its candidates are selected.

The same pass fills the inverse map with −1, into which ``lighthouse.kernels.selection`` writes slots: a launch less.
"""

import triton
import triton.language as tl
from torch import Tensor

from lighthouse.kernels.common import accumulator, empty, launch, padded, with_contiguous_rows
from lighthouse.pyramid import accumulation_dtype

#: The fewest rows of a block.
FEWEST_ROWS = 64


@triton.jit
def _squared_norms(x, rows, columns, stride_n, mask, ACC: tl.constexpr):
    values = tl.load(x + rows.to(tl.int64)[:, None] * stride_n + columns[None, :], mask=mask, other=0.0)
    values = values.to(ACC)  # [BLOCK_N, BLOCK_D]
    return tl.sum(values * values, axis=1)


@triton.jit
def _norm_scores_kernel(
    query, key, query_score, key_score, inverse_map,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_n,
    seq_len, blocks, groups, head_dim, num_entries,
    REPEATS: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    bg = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = bg // groups, bg % groups
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < seq_len)[:, None] & (columns < head_dim)[None, :]

    head = query + b * query_stride_b + g * REPEATS * query_stride_h
    highest = _squared_norms(head, rows, columns, query_stride_n, mask, ACC)
    for _ in tl.static_range(1, REPEATS):
        head += query_stride_h
        squared = _squared_norms(head, rows, columns, query_stride_n, mask, ACC)
        highest = tl.maximum(highest, squared, propagate_nan=tl.PropagateNan.ALL)
    key_squared = _squared_norms(key + b * key_stride_b + g * key_stride_h, rows, columns, key_stride_n, mask, ACC)

    windows = block * (BLOCK_N // FACTOR) + tl.arange(0, BLOCK_N // FACTOR)
    inside = windows < seq_len // FACTOR
    at = bg * (seq_len // FACTOR) + windows
    highest = tl.max(tl.reshape(highest, (BLOCK_N // FACTOR, FACTOR)), axis=1)
    key_squared = tl.max(tl.reshape(key_squared, (BLOCK_N // FACTOR, FACTOR)), axis=1)
    tl.store(query_score + at, tl.sqrt(highest), mask=inside)
    tl.store(key_score + at, tl.sqrt(key_squared), mask=inside)
    # The pyramid has fewer than twice as many entries as the sequence.
    entries = block * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N)
    tl.store(inverse_map + bg * num_entries + entries, entries * 0 - 1, mask=entries < num_entries)


def norm_scores(query: Tensor, key: Tensor, pooling_factor: int, inverse_map: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] and [B, G, N, D] to the query and key scores of level 1, twice [B, G, N/p], float32 or float64.

    Args:
        inverse_map: [B, G, E] int32, contiguous; filled with −1.
    """
    query, key = with_contiguous_rows(query), with_contiguous_rows(key)
    batch, heads, seq_len, head_dim = query.shape
    groups = key.shape[1]
    dtype = accumulation_dtype(key.dtype)
    query_score, key_score = (empty(key, batch, groups, seq_len // pooling_factor, dtype=dtype) for _ in range(2))
    block_n = max(FEWEST_ROWS, pooling_factor)
    blocks = -(-seq_len // block_n)
    launch(
        _norm_scores_kernel, blocks * batch * groups,
        (query, key, query_score, key_score, inverse_map),
        (*query.stride()[:3], *key.stride()[:3], seq_len, blocks, groups, head_dim, inverse_map.shape[-1]),
        REPEATS=heads // groups, FACTOR=pooling_factor,
        BLOCK_N=block_n, BLOCK_D=padded(head_dim), ACC=accumulator(query.dtype),
    )  # fmt: skip
    return query_score, key_score
