"""Attention that returns its rows with their log-sum-exps: what is merged in ``lighthouse.merging``.

Source: docs/method.md, section 10.6. The plain functions are the specification. On a GPU, in bfloat16 and float16,
it is PyTorch's cuDNN attention over all positions, and its Flash attention over a window.

Neither takes a gradient of the log-sum-exps. It goes in by another way. Let g be the gradient of a query's row o, and λ
that of its log-sum-exp. The gradient of a score is then P·(g·v − δ) with δ = g·o − λ, where P is the weight of the
score's key and v its value. The backward makes δ as g·o from the rows that it is given, and uses these for nothing
else. So ``differentiate`` is given other rows, whose product with g is the δ that is meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lighthouse.local_window import FLASH_DTYPES, in_blocks, joined
from lighthouse.pyramid import accumulation_dtype

#: Whether cuDNN and Flash are used at all. Without them a GPU has ``lighthouse.flex`` for every dtype.
BY_CUDNN = True

#: What both of them take on every GPU; everything else is ``lighthouse.flex``.
HEAD_DIMS = range(8, 129, 8)

#: Rows and their log-sum-exps.
Part = tuple[Tensor, Tensor]


def takes(query: Tensor) -> bool:
    """Whether ``attend`` and ``differentiate`` are made for such queries. On a CPU they are plain, for tests of what
    calls them."""
    fused = query.dtype in FLASH_DTYPES and query.shape[-1] in HEAD_DIMS
    return BY_CUDNN and (fused or not query.is_cuda)


def attend(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Part:
    """``attend_plainly``, where ``takes``; without a gradient of its own. The rows are contiguous, or with a window
    stored as ``stored_as(query)``."""
    if not query.is_cuda:
        out, sums = attend_plainly(query, key, value, window)
        return out if window is None else stored_as(query).copy_(out), sums
    sizes = (query.shape[2], key.shape[2])
    if window is None and _cudnn_may():
        rows = [x.contiguous() for x in (query, key, value)]
        out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*rows, None, True, 0.0, True, False)
        return out, sums[..., 0]
    rows = [_for_flash(x, window) for x in (query, key, value)]
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        *rows, None, None, *sizes, 0.0, window is None, False, **_sides(window)
    )
    return out.transpose(1, 2), sums


def differentiate(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``differentiate_plainly``, where ``takes``. The gradients are contiguous, or with a window each stored as
    ``stored_as`` its rows."""
    if not query.is_cuda:
        plain = differentiate_plainly(grad, query, key, value, out, sums, window)
        if window is None:
            return plain
        return stored_as(query).copy_(plain[0]), stored_as(key).copy_(plain[1]), stored_as(value).copy_(plain[2])
    sizes = (query.shape[2], key.shape[2])
    if window is None and _cudnn_may():
        rows = [x.contiguous() for x in (grad, query, key, value, out)]
        # A single head counts as stored in the order [B, S, H, D], and torch then wants the strides of that order.
        stats = sums[..., None] if sums.shape[1] > 1 else sums.reshape(len(sums), -1, 1, 1).transpose(1, 2)
        unused = torch.empty((), dtype=torch.int64, device=query.device)  # what dropout would need
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *rows, stats, unused, unused, None, None, None, *sizes, 0.0, True
        )
        return grads[0], grads[1], grads[2]
    rows = [_for_flash(x, window) for x in (grad, query, key, value, out)]
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)
    grads = torch.ops.aten._flash_attention_backward(
        *rows, sums, None, None, *sizes, 0.0, window is None, unused, unused, **_sides(window)
    )
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def stored_as(rows: Tensor) -> Tensor:
    """New rows in the order in memory in which Flash returns those for ``rows``."""
    return torch.empty_like(_for_flash(rows, 1)).transpose(1, 2)


def _for_flash(rows: Tensor, window: int | None) -> Tensor:
    """[B, H, M, D] to [B, M, H, D], which is how attention modules store rows of the whole length."""
    whole = window is not None and rows.stride(-1) == 1
    return (rows if whole else rows.contiguous()).transpose(1, 2)


def _cudnn_may() -> bool:
    # As in torch's own attention. cuDNN's backward does not give the same bits twice; Flash's does if it is told to.
    same_bits = (
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    return torch.backends.cuda.cudnn_sdp_enabled() and not same_bits


def _sides(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    before: Sequence[Tensor] | None = None,
    starts_every: int = 1,
) -> Part:
    """Causal attention over all positions, or over the last ``window``; scale 1/√D. It keeps the scores, in float32
    (float64 for float64 inputs), whatever precision autocast would choose.

    Args:
        query: [B, H, M, D], any floating dtype.
        key, value: [B, G, M, D] with G dividing H.
        before, starts_every: with a window, as in ``lighthouse.local_window.attend_locally``.

    Returns:
        The rows, [B, H, M, D] in the dtype of ``query``, and their log-sum-exps, [B, H, M] in the dtype of the scores.
    """
    length = query.shape[2]
    if window is not None and (window < length or before is not None):
        queries, keys, values, mask = in_blocks(query, key, value, window, before, starts_every)
        out, sums = _attend_under(mask, queries, keys, values)
        return joined(out, query), joined(sums, query)
    position = torch.arange(length, device=query.device)
    return _attend_under(position[:, None] >= position, query, key, value)


def attend_plainly_from_chunks(query: Tensor, key: Tensor, value: Tensor, held: Sequence[int]) -> Part:
    """``lighthouse.merging.attend_from_chunks``, as ``attend_plainly``."""
    length = query.shape[2] // len(held)
    position = torch.cat([torch.arange(length, device=query.device) + chunk * length for chunk in held])
    return _attend_under(position[:, None] >= torch.arange(key.shape[2], device=query.device), query, key, value)


def _attend_under(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Part:
    with torch.autocast(query.device.type, enabled=False):
        wide_query, keys, values = _widened(query, key, value)
        scores = _scores_under(mask, wide_query, keys)
        sums = scores.logsumexp(-1)
        return ((scores - sums[..., None]).exp() @ values).to(query.dtype), sums


def differentiate_plainly(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``attend_plainly`` in queries, keys and values. It makes the matrix of all scores.

    Args:
        grad: [B, H, M, D], the gradient of the rows.
        query, key, value: as there.
        out: [B, H, M, D]; only its product with ``grad``, row by row, counts. That of the rows themselves is the
            gradient where no log-sum-exp has one.
        sums: [B, H, M], the log-sum-exps that the weights are divided by: those of the attention, or of a softmax that
            it is a part of. ``grad`` and ``out`` are then those of that softmax.

    Returns:
        [B, H, M, D] and twice [B, G, M, D] in the dtypes of ``query``, ``key`` and ``value``.
    """
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance < (window or len(position)))
    groups, scale = (key.shape[1], -1), 1 / math.sqrt(query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        wide_query, keys, values = _widened(query, key, value)
        wide_grad = grad.to(wide_query.dtype)
        weights = (_scores_under(mask, wide_query, keys) - sums[..., None]).exp()
        product = (wide_grad * out).sum(-1, keepdim=True)
        by_score = weights * (wide_grad @ values.transpose(-1, -2) - product) * scale
        key_grad = (by_score.transpose(-1, -2) @ wide_query).unflatten(1, groups).sum(2)
        value_grad = (weights.transpose(-1, -2) @ wide_grad).unflatten(1, groups).sum(2)
        return (by_score @ keys).to(query.dtype), key_grad.to(key.dtype), value_grad.to(value.dtype)


def _widened(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the accumulation dtype, and with as many heads of keys and values as of queries."""
    wide, per_group = accumulation_dtype(query.dtype), query.shape[1] // key.shape[1]
    keys, values = (rows.to(wide).repeat_interleave(per_group, dim=1) for rows in (key, value))
    return query.to(wide), keys, values


def _scores_under(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~mask, -math.inf)
