"""The registered operators: what they compute, their fakes and their gradients.

Each takes as many launches as its kernels need and no other operator of torch. Only the attentions are torch's own: as
operators, the choice among torch's kernels is no part of a graph, and checkpointing can name them. The functions with
an underscore are what runs; the operators stand below them under the name without it.
"""

from typing import Any

import torch
from torch import Tensor

from lighthouse import parts
from lighthouse.gather_scatter import halo_backward, where_missing
from lighthouse.kernels.common import empty
from lighthouse.kernels.gather_scatter import empty_long, empty_short, pool, spread
from lighthouse.kernels.merging import empty_merged, merge_rows, merge_rows_backward
from lighthouse.kernels.scorers import norm_scores
from lighthouse.kernels.selection import empty_entries, order_entries, pick_parents
from lighthouse.pyramid import accumulation_dtype, level_offsets
from lighthouse.registration import operator


def _select_by_norms(
    query: Tensor, key: Tensor, num_levels: int, pooling_factor: int, num_tiles: int, starts_every: int,
    delayed: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries [B, H, N, D] and keys [B, G, N, D], scored by their norms, to level, index, entry and inverse_map."""
    seq_len = key.shape[2]
    inverse_map = _empty_map(key, seq_len, num_levels, pooling_factor)
    scores = norm_scores(query, key, pooling_factor, inverse_map)
    parents = pick_parents(*scores, num_levels, pooling_factor, num_tiles, starts_every, delayed, causal)
    return *order_entries(parents, inverse_map, seq_len, num_levels, pooling_factor), inverse_map


def _select_by_scores(
    query_score: Tensor, key_score: Tensor, num_levels: int, pooling_factor: int, num_tiles: int, starts_every: int,
    delayed: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores of level 1, [B, G, N/p], to level, index, entry and inverse_map."""
    seq_len = key_score.shape[2] * pooling_factor
    inverse_map = _empty_map(key_score, seq_len, num_levels, pooling_factor).fill_(-1)
    parents = pick_parents(query_score, key_score, num_levels, pooling_factor, num_tiles, starts_every, delayed, causal)
    return *order_entries(parents, inverse_map, seq_len, num_levels, pooling_factor), inverse_map


def _empty_map(like: Tensor, seq_len: int, num_levels: int, pooling_factor: int) -> Tensor:
    entries = level_offsets(seq_len, num_levels, pooling_factor)[-1]
    return empty(like, *like.shape[:2], entries, dtype=torch.int32)


def _empty_selection(
    like: Tensor, seq_len: int, num_levels: int, pooling_factor: int, num_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entries = empty_entries(like, seq_len, num_levels, pooling_factor, num_tiles)
    return *entries, _empty_map(like, seq_len, num_levels, pooling_factor)


def _fake_by_norms(
    query: Tensor, key: Tensor, num_levels: int, pooling_factor: int, num_tiles: int, *_: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_selection(key, key.shape[2], num_levels, pooling_factor, num_tiles)


def _fake_by_scores(
    query_score: Tensor, key_score: Tensor, num_levels: int, pooling_factor: int, num_tiles: int, *_: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seq_len = key_score.shape[2] * pooling_factor
    return _empty_selection(key_score, seq_len, num_levels, pooling_factor, num_tiles)


select_by_norms = operator(_select_by_norms, _fake_by_norms)
select_by_scores = operator(_select_by_scores, _fake_by_scores)


def _gather(rows: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """``lighthouse.gather_scatter.gather``; the result is contiguous."""
    return pool((rows,), inverse_map, entry.shape[-1], num_levels, pooling_factor, written=False)[0]


def _fake_gather(rows: Tensor, entry: Tensor, *_: Any) -> Tensor:
    return empty_short(rows, entry.shape[-1])


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of ``gather`` and of ``gather_three``."""
    rows, *_, inverse_map, num_levels, pooling_factor = inputs
    ctx.save_for_backward(inverse_map)
    ctx.shape = rows.shape[2], num_levels, pooling_factor


def _differentiate_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_map,) = ctx.saved_tensors
    return _GATHER_BACKWARD(grad, inverse_map, *ctx.shape, None), None, None, None, None


def _gather_three(
    query: Tensor, key: Tensor, value: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int,
    pooling_factor: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``gather`` of query [B, H, N, D], key and value [B, G, N, D]."""
    short = pool((query, key, value), inverse_map, entry.shape[-1], num_levels, pooling_factor, written=False)
    return short[0], short[1], short[2]


def _fake_gather_three(
    query: Tensor, key: Tensor, value: Tensor, entry: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    selected = entry.shape[-1]
    return empty_short(query, selected), empty_short(key, selected), empty_short(value, selected)


def _differentiate_gather_three(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_map,) = ctx.saved_tensors
    return *_GATHER_THREE_BACKWARD(*grads, inverse_map, *ctx.shape, None, None, None), None, None, None, None


def _gather_backward(
    grad: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int, beside: Tensor | None
) -> Tensor:  # fmt: skip
    added = None if beside is None else (beside,)
    return spread((grad,), inverse_map, seq_len, num_levels, pooling_factor, written=False, added=added)[0]


def _fake_gather_backward(grad: Tensor, inverse_map: Tensor, seq_len: int, *_: Any) -> Tensor:
    return empty_long(grad, seq_len)


def _gather_three_backward(
    query_grad: Tensor, key_grad: Tensor, value_grad: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int,
    pooling_factor: int, query_beside: Tensor | None, key_beside: Tensor | None, value_beside: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    added = None
    if query_beside is not None and key_beside is not None and value_beside is not None:
        added = (query_beside, key_beside, value_beside)
    grads = (query_grad, key_grad, value_grad)
    long = spread(grads, inverse_map, seq_len, num_levels, pooling_factor, written=False, added=added)
    return long[0], long[1], long[2]


def _fake_gather_three_backward(
    query_grad: Tensor, key_grad: Tensor, value_grad: Tensor, inverse_map: Tensor, seq_len: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_long(query_grad, seq_len), empty_long(key_grad, seq_len), empty_long(value_grad, seq_len)


def _scatter(
    rows: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int, halo: Tensor | None,
    local: Tensor | None,
) -> Tensor:  # fmt: skip
    added = None if local is None else (local,)
    return spread((rows,), inverse_map, seq_len, num_levels, pooling_factor, written=True, halo=halo, added=added)[0]


def _fake_scatter(rows: Tensor, inverse_map: Tensor, seq_len: int, *_: Any) -> Tensor:
    return empty_long(rows, seq_len)


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, inverse_map, _, num_levels, pooling_factor, halo, local = inputs
    ctx.save_for_backward(inverse_map)
    ctx.selected, ctx.shape = rows.shape[2], (num_levels, pooling_factor)
    ctx.has_halo, ctx.has_local = halo is not None, local is not None


def _differentiate_scatter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inverse_map,) = ctx.saved_tensors
    rows_grad = _SCATTER_BACKWARD(grad, inverse_map, ctx.selected, *ctx.shape)
    halo_grad = halo_backward(grad, *ctx.shape) if ctx.has_halo else None
    local_grad = where_missing(grad, inverse_map) if ctx.has_local else None
    return rows_grad, None, None, None, None, halo_grad, local_grad


def _scatter_backward(grad: Tensor, inverse_map: Tensor, selected: int, num_levels: int, pooling_factor: int) -> Tensor:
    return pool((grad,), inverse_map, selected, num_levels, pooling_factor, written=True)[0]


def _fake_scatter_backward(grad: Tensor, inverse_map: Tensor, selected: int, *_: int) -> Tensor:
    return empty_short(grad, selected)


gather = operator(_gather, _fake_gather, setup_context=_setup_gather, backward=_differentiate_gather)
_GATHER_BACKWARD = operator(_gather_backward, _fake_gather_backward)
gather_three = operator(
    _gather_three, _fake_gather_three, setup_context=_setup_gather, backward=_differentiate_gather_three
)
_GATHER_THREE_BACKWARD = operator(_gather_three_backward, _fake_gather_three_backward)
_SCATTER = operator(_scatter, _fake_scatter, setup_context=_setup_scatter, backward=_differentiate_scatter)
_SCATTER_BACKWARD = operator(_scatter_backward, _fake_scatter_backward)


def _attend_short(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``lighthouse.parts.attend`` over all positions: [B, H, S, D] and [B, H, S]."""
    return parts.attend(query, key, value)


def _fake_attend_short(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return empty_short(query, query.shape[2]), _empty_sums(query)


def _attend_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The same over the last ``window`` positions."""
    return parts.attend(query, key, value, window)


def _fake_attend_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return parts.stored_as(query), _empty_sums(query)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``lighthouse.parts.differentiate``: of ``attend_short``, and with a window of ``attend_window``."""
    return parts.differentiate(grad, query, key, value, out, sums, window)


def _fake_attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if window is None:
        return empty(query, *query.shape), empty(key, *key.shape), empty(value, *value.shape)
    return parts.stored_as(query), parts.stored_as(key), parts.stored_as(value)


def _empty_sums(rows: Tensor) -> Tensor:
    return empty(rows, *rows.shape[:3], dtype=accumulation_dtype(rows.dtype))


def _merge(
    rows: Tensor, sums: Tensor, near: Tensor | None, near_sums: Tensor | None, inverse_map: Tensor, seq_len: int,
    num_levels: int, pooling_factor: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The merge of each position's parts, [B, H, N, D], and the log-sum-exp over all of them, [B, H, N]."""
    return merge_rows(rows, sums, near, near_sums, inverse_map, seq_len, num_levels, pooling_factor)


def _fake_merge(
    rows: Tensor, sums: Tensor, near: Tensor | None, near_sums: Tensor | None, inverse_map: Tensor, seq_len: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_merged(rows, seq_len)


def _merge_backward(
    grad: Tensor, result: Tensor, whole: Tensor, sums: Tensor, entry: Tensor, num_levels: int, pooling_factor: int
) -> tuple[Tensor, Tensor]:
    """What ``attend_backward`` takes for the short sequence as ``grad`` and as ``out``, [B, H, S, D] each."""
    return merge_rows_backward(grad, result, whole, sums, entry, num_levels, pooling_factor)


def _fake_merge_backward(
    grad: Tensor, result: Tensor, whole: Tensor, sums: Tensor, entry: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return empty_short(grad, entry.shape[-1]), empty_short(grad, entry.shape[-1])


attend_short = operator(_attend_short, _fake_attend_short)
attend_window = operator(_attend_window, _fake_attend_window)
attend_backward = operator(_attend_backward, _fake_attend_backward)
merge = operator(_merge, _fake_merge)
merge_backward = operator(_merge_backward, _fake_merge_backward)


def gather_backward(
    grad: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int, beside: Tensor | None = None
) -> Tensor:
    """``lighthouse.gather_scatter.gather_backward``; the result is stored as [B, N, H, D]."""
    long: Tensor = _GATHER_BACKWARD(grad, inverse_map, seq_len, num_levels, pooling_factor, beside)
    return long


def gather_three_backward(
    query_grad: Tensor, key_grad: Tensor, value_grad: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int,
    pooling_factor: int, beside: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``gather_backward`` of the three gradients."""
    grads, shape = (query_grad, key_grad, value_grad), (seq_len, num_levels, pooling_factor)
    long: tuple[Tensor, Tensor, Tensor] = _GATHER_THREE_BACKWARD(
        *grads, inverse_map, *shape, *(beside or (None, None, None))
    )
    return long


def scatter(
    rows: Tensor, entry: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int,
    halo: Tensor | None = None, local: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``lighthouse.gather_scatter.scatter``; the result is stored as [B, N, H, D]."""
    scattered: Tensor = _SCATTER(rows, inverse_map, seq_len, num_levels, pooling_factor, halo, local)
    return scattered


def scatter_backward(grad: Tensor, entry: Tensor, inverse_map: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """``lighthouse.gather_scatter.scatter_backward``; the result is contiguous."""
    summed: Tensor = _SCATTER_BACKWARD(grad, inverse_map, entry.shape[-1], num_levels, pooling_factor)
    return summed
