"""Levels and local window as one softmax: ``combine = "softmax"`` (docs/method.md, section 10.6).

A position has parts: of each level the selected entry that writes to it, and its local window. Each part is the result
of an attention, a row with the log-sum-exp of the scores that it is normalised by. As one softmax over all their keys,
they are a mean of the rows, weighted by the softmax of their log-sum-exps.

This needs an attention that returns log-sum-exps, and their gradient. On a GPU that is cuDNN and Flash
(``lighthouse.parts``) in bfloat16 and float16. In float32, and for a sequence that is split over ranks, it is PyTorch's
FlexAttention (``lighthouse.flex``), and on other devices plain PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lighthouse import flex, gather_scatter, parts
from lighthouse.backend import load_kernels
from lighthouse.config import LighthouseConfig, ResolvedBackend
from lighthouse.gather_scatter import entries_over, take_or_zero
from lighthouse.parts import Part, attend_plainly, attend_plainly_from_chunks
from lighthouse.selection import Selection

#: What FlexAttention's kernels take; everything else is plain PyTorch, which keeps the scores.
FLEX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLEX_LEAST_HEAD_DIM = 16

#: Queries, keys and values of an attention.
Rows = tuple[Tensor, Tensor, Tensor]
NONE = (None, None)


def attend_and_merge(
    short: Rows,
    local: Rows | None,
    selection: Selection,
    seq_len: int,
    config: LighthouseConfig,
    backend: ResolvedBackend,
) -> Tensor:
    """Attend to the short sequence and to the local window, and give each position the merge of its parts.

    Args:
        short: the gathered rows, [B, H, S, D] and twice [B, G, S, D], in the order of the selection.
        local: query [B, H, N, D], key and value [B, G, N, D], if ``config.local_window`` is not 0.
        seq_len: N.

    Returns:
        [B, H, N, D] in the dtype of the queries, differentiable once; 0 where a position has no part, which
        ``config.cover_start`` and a local window both rule out.
    """
    if backend == "triton" and parts.takes(short[0]):
        shape = (config.num_levels, config.pooling_factor)
        merged: Tensor = _AttendAndMerge.apply(
            *short, *(local or 3 * (None,)), selection.entry, selection.inverse_map, seq_len, shape, config.local_window
        )
        return merged
    return _compiled_if_fused(_attend_and_merge, short[0])(
        short,
        local,
        (selection.level, selection.entry, selection.inverse_map),
        (seq_len, config.num_levels, config.pooling_factor),
        config.local_window,
        backend == "triton",
        flex.attend if _is_fused(short[0]) else attend_plainly,
    )


def attend_locally(
    query: Tensor, key: Tensor, value: Tensor, window: int, *, before: Sequence[Tensor], starts_every: int
) -> tuple[Tensor, Tensor]:
    """``lighthouse.local_window.attend_locally`` in the chunks of a sequence, with its log-sum-exps.

    Returns:
        [B, H, N, D] in the dtype of ``query``, and [B, H, N] float32 (float64 for float64 inputs).
    """
    twin = flex.attend if _is_fused(query) else attend_plainly
    return _compiled_if_fused(twin, query)(query, key, value, window, before, starts_every)


def attend_from_chunks(query: Tensor, key: Tensor, value: Tensor, held: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Causal attention over a whole sequence, for the queries of some of its equal chunks.

    Args:
        query: [B, H, C·M, D], C chunks one after the other.
        key, value: [B, G, N, D], those of the whole sequence.
        held: the numbers of the C chunks, ascending.

    Returns:
        [B, H, C·M, D] in the dtype of ``query``, and [B, H, C·M] float32 (float64 for float64 inputs).
    """
    twin = flex.attend_from_chunks if _is_fused(query) else attend_plainly_from_chunks
    return _compiled_if_fused(twin, query)(query, key, value, held)


def merge(
    short: Part,
    near: Part | None,
    halo: Part,
    selection: Selection,
    seq_len: int,
    config: LighthouseConfig,
    backend: ResolvedBackend,
) -> Tensor:
    """The merge of the parts in each chunk of a sequence.

    Args:
        short: the rows of the selected entries, [B, H, S, D], and their log-sum-exps, [B, H, S].
        near: those of the local window, [B, H, N, D] and [B, H, N].
        halo: what the chunks before hand over (``lighthouse.context_parallel``), [B, H, L − 1, D] and [B, H, L − 1], in
            the dtype of the log-sum-exps; −∞ among these where there is nothing.

    Returns:
        [B, H, N, D] in the dtype of the rows, differentiable once.
    """
    return _compiled_if_fused(_merge, short[0])(
        short,
        near,
        halo,
        (selection.level, selection.entry, selection.inverse_map),
        (seq_len, config.num_levels, config.pooling_factor),
        backend == "triton",
    )


def _is_fused(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in FLEX_DTYPES and query.shape[-1] >= FLEX_LEAST_HEAD_DIM


def _compiled_if_fused(function: Callable[..., Any], query: Tensor) -> Callable[..., Any]:
    # FlexAttention is a fused kernel in compiled code only.
    return _compiled(function) if _is_fused(query) and not torch.compiler.is_compiling() else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Without fullgraph, torch would fall back to the matrix of all scores, for instance after too many shapes.
    return torch.compile(function, dynamic=False, fullgraph=True)


def _attend_and_merge(
    short: Rows,
    local: Rows | None,
    selection: tuple[Tensor, Tensor, Tensor],
    shape: tuple[int, int, int],
    window: int,
    by_kernels: bool,
    attend: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    near = None if local is None else attend(*local, window)
    return _merge(attend(*short), near, None, selection, shape, by_kernels)


def _merge(
    short: Part,
    near: Part | None,
    halo: Part | None,
    selection: tuple[Tensor, Tensor, Tensor],
    shape: tuple[int, int, int],
    by_kernels: bool,
) -> Tensor:
    merged: Tensor = _Merge.apply(*short, *(near or NONE), *(halo or NONE), *selection, shape, by_kernels)
    return merged


class _Merge(torch.autograd.Function):
    """The merge of a position's parts, and its gradient.

    With g the gradient of the result y, and w_i the weight of part i, that of its row o_i is w_i·g, and that of its
    log-sum-exp w_i·g·(o_i − y). An entry's are sums over the positions that it writes to. There o_i is the same row, so
    that g·o_i is summed as the product of the row and the row's gradient. What is kept is y, which the next layer keeps
    anyway, and what the two attentions keep: nothing of length N for a level.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sums: Tensor,
        near: Tensor | None,
        near_sums: Tensor | None,
        halo: Tensor | None,
        halo_sums: Tensor | None,
        level: Tensor,
        entry: Tensor,
        inverse_map: Tensor,
        shape: tuple[int, int, int],
        by_kernels: bool,
    ) -> Tensor:
        found = entries_over(inverse_map, *shape, written=True)
        weights = _weights(sums, near_sums, halo_sums, found)
        total = rows.new_zeros((), dtype=weights[0].dtype)
        for level_number, (weight, (index, slot)) in enumerate(zip(weights, found, strict=near is None)):
            taken = take_or_zero(rows, slot)
            if halo is not None and level_number:
                taken = taken + halo[:, :, level_number - 1, None].where((index < 0)[:, None], 0.0)
            total = total + weight[..., None] * taken
        if near is not None:
            total = total + weights[-1][..., None] * near
        # As attention modules go on: stored as [B, N, H, D].
        result = _as_dtype(rows.dtype, total.transpose(1, 2).contiguous().transpose(1, 2))
        ctx.save_for_backward(result, rows, sums, near, near_sums, halo, halo_sums, level, entry, inverse_map)
        ctx.shape, ctx.by_kernels = shape, by_kernels
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, rows, sums, near, near_sums, halo, halo_sums, level, entry, inverse_map = ctx.saved_tensors
        _, num_levels, pooling_factor = ctx.shape
        weights = _weights(sums, near_sums, halo_sums, entries_over(inverse_map, *ctx.shape, written=True))
        wide = weights[0].dtype
        by_result = (grad.to(wide) * result).sum(-1)  # g·y, [B, H, N]

        # Each level has weights of its own, and of each pass only its entries count.
        of_level = level.repeat_interleave(rows.shape[1] // level.shape[1], dim=1)[..., None]  # [B, H, S, 1]
        backward = load_kernels().scatter_backward if ctx.by_kernels else gather_scatter.scatter_backward
        rows_grad = torch.zeros_like(rows)
        for number, weight in enumerate(weights[:num_levels]):
            weighted = _as_dtype(rows.dtype, weight[..., None] * grad)
            pooled = backward(weighted, entry, inverse_map, num_levels, pooling_factor)
            rows_grad = torch.where(of_level == number, pooled, rows_grad)
        by_level = torch.stack([weight * by_result for weight in weights[:num_levels]], dim=-1)  # [B, H, N, L]
        pooled = gather_scatter.scatter_backward(by_level, entry, inverse_map, num_levels, pooling_factor)
        sums_grad = (rows_grad.to(wide) * rows).sum(-1) - pooled.gather(-1, of_level.long())[..., 0]

        near_grad = near_sums_grad = None
        if near is not None:
            near_grad = _as_dtype(near.dtype, weights[-1][..., None] * grad)
            near_sums_grad = (near_grad.to(wide) * near).sum(-1) - weights[-1] * by_result

        halo_grad = halo_sums_grad = None
        if halo is not None:
            # The entry of level ℓ writes to the first p^ℓ − 1 positions.
            written = [(weights[n][:, :, : pooling_factor**n - 1], pooling_factor**n - 1) for n in range(1, num_levels)]
            halo_grad = torch.stack([(w[..., None] * grad[:, :, :reach]).sum(2) for w, reach in written], dim=2)
            less = torch.stack([(w * by_result[:, :, :reach]).sum(2) for w, reach in written], dim=2)
            halo_sums_grad = (halo_grad * halo).sum(-1) - less
        return rows_grad, sums_grad, near_grad, near_sums_grad, halo_grad, halo_sums_grad, *[None] * 5


class _AttendAndMerge(torch.autograd.Function):
    """Both attentions, ``_Merge`` and the gradients of all three, by attentions whose log-sum-exps have no gradient.

    As in ``_Merge``, the row of part i has the gradient w_i·g, and its log-sum-exp w_i·g·(o_i − y). So the δ of its
    attention (``lighthouse.parts``) is w_i·g·o_i − w_i·g·(o_i − y) = w_i·g·y.

    The window's backward is given g, y in place of the row, and the log-sum-exp of the whole: its keys then have their
    weights in the whole, which are w_i times those in the window. An entry has the sums of w_i·g and of w_i·g·y over
    the positions that it writes to, and a row that is chosen so that its product with the one is the other. Neither
    needs the rows of the two attentions, which are not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        near_query: Tensor | None,
        near_key: Tensor | None,
        near_value: Tensor | None,
        entry: Tensor,
        inverse_map: Tensor,
        seq_len: int,
        shape: tuple[int, int],
        window: int,
    ) -> Tensor:
        kernels = load_kernels()
        rows, sums = kernels.attend_short(query, key, value)
        near = NONE if near_query is None else kernels.attend_window(near_query, near_key, near_value, window)
        result, whole = kernels.merge(rows, sums, *near, inverse_map, seq_len, *shape)
        ctx.save_for_backward(query, key, value, sums, near_query, near_key, near_value, result, whole, entry)
        ctx.shape, ctx.window = shape, window
        merged: Tensor = result
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sums, near_query, near_key, near_value, result, whole, entry = ctx.saved_tensors
        kernels = load_kernels()
        pooled, chosen = kernels.merge_backward(grad, result, whole, sums, entry, *ctx.shape)
        grads = kernels.attend_backward(pooled, query, key, value, chosen, sums, None)
        near_grads: tuple[Tensor | None, ...] = 3 * (None,)
        if near_query is not None:
            near = (near_query, near_key, near_value)
            near_grads = kernels.attend_backward(grad, *near, result, whole, ctx.window)
        return *grads, *near_grads, *[None] * 5


def _as_dtype(dtype: torch.dtype, rows: Tensor) -> Tensor:
    # Not a bare cast: torch 2.11 compiles a result that is a no-op ``to`` into a gradient of zero.
    return rows if rows.dtype == dtype else rows.to(dtype)


def _weights(
    sums: Tensor, near_sums: Tensor | None, halo_sums: Tensor | None, found: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """The weight of each level's row at each position, and of the window's last, [B, H, N] each; 0 for one that is not
    there. ``found`` is what ``entries_over`` returns."""
    heads = sums.shape[1]
    parts = [
        take_or_zero(sums[..., None], slot)[..., 0].masked_fill(
            (slot < 0).repeat_interleave(heads // slot.shape[1], dim=1), -math.inf
        )
        for _, slot in found
    ]
    if halo_sums is not None:
        before = [index < 0 for index, _ in found[1:]]
        parts[1:] = [halo_sums[:, :, n, None].where(before[n], part) for n, part in enumerate(parts[1:])]
    stacked = torch.stack(parts if near_sums is None else [*parts, near_sums])
    # Where there is no part at all, softmax is 0/0.
    return stacked.softmax(0).masked_fill(stacked == -math.inf, 0.0).unbind(0)
