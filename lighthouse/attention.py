"""Lighthouse Attention: select, gather, attend, scatter (Peng, Ghosh, Quesnelle, arXiv 2605.06554).

The functions stand in the order in which the method runs; docs/method.md states it exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lighthouse import gather_scatter
from lighthouse.backend import load_kernels
from lighthouse.config import LighthouseConfig, ResolvedBackend
from lighthouse.inner_attention import AttentionName, InnerAttention, check_package, resolve
from lighthouse.local_window import attend_locally, turned
from lighthouse.merging import Rows, attend_and_merge
from lighthouse.selection import Selection, check_shapes, select

#: A rotary embedding: takes rows [B, H, S, D] and their positions [B, G, S], int64, and returns the rows, turned by
#: them. The positions of each group serve its H/G heads.
Rotate = Callable[[Tensor, Tensor], Tensor]


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    *,
    attention: InnerAttention | AttentionName | None = None,
    rotate: Rotate | None = None,
    score_by: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention through a selected pyramid, differentiable in query, key and value.

    Args:
        query: [B, H, N, D], any floating dtype, strides as they come.
        key, value: [B, G, N, D] with G dividing H, of the same dtype and device.
        config: valid for N (``config.validate(N)``).
        attention: the inner attention, causal, scale 1/√D, or the name of kernels (``lighthouse.inner_attention``):
            "cudnn", "flash", "flash3" or "flash4", never replaced by others. Default: "auto", ``causal_attention``.
            With ``combine="softmax"`` another one is refused: it would have to return log-sum-exps, and
            ``lighthouse.merging`` brings its own. ``selection="none"`` calls none.
        rotate: the rotary embedding, for queries and keys that come without it (docs/method.md, section 10.3). They are
            pooled first, and each entry is then turned by its last covered position. (The published method pools
            rotated rows, which averages high frequencies away.) Turning a row does not change its norm, so the
            selection is the same; the other scorers are refused.
        score_by: what the scorer ``norm`` looks at in place of query and key, in their shapes. A model that normalises
            its queries and keys hands over what they were before: after it all rows are nearly as long as each other
            (docs/method.md, section 10.5).

    Returns:
        [B, H, N, D] in the dtype of ``query``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, an invalid geometry, a backend that is
            not available, ``rotate`` or ``score_by`` with another scorer than ``norm``, ``attention`` with
            ``combine="softmax"``, or kernels that cannot run.
    """
    check_inputs(query, key, value)
    scored_query, scored_key = rows_to_score(query, key, config, score_by)
    backend = config.resolve_backend(query.device.type)
    if rotate is not None and config.scorer != "norm":
        raise ValueError(
            f"scorer={config.scorer!r} attends to rotated queries and keys: rotate needs the scorer 'norm'"
        )
    if config.selection == "none":
        config.validate(query.shape[2])
        return attend_locally(*turned(query, key, rotate), value, config.local_window)
    selection = select(scored_query, scored_key, config, value=value, backend=backend)
    return attend_selected(query, key, value, selection, config, attention=attention, rotate=rotate, backend=backend)


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    config: LighthouseConfig,
    *,
    attention: InnerAttention | AttentionName | None = None,
    rotate: Rotate | None = None,
    backend: ResolvedBackend | None = None,
) -> Tensor:
    """``lighthouse_attention`` through a selection that is already made; arguments and result as there.

    Args:
        backend: what ``config.resolve_backend`` returned, from callers that have asked it already.
    """
    attend = resolve(attention, config)
    backend = backend or config.resolve_backend(query.device.type)
    if config.local_window:
        short, (query, key, value) = gather_beside(query, key, value, selection, config, backend)
    else:
        short = gather_three(query, key, value, selection, config, backend)
    short_query, short_key, short_value = short
    if rotate is not None:
        position = selection.last_positions(config.pooling_factor)
        short_query, short_key = rotate(short_query, position), rotate(short_key, position)
    near = (*turned(query, key, rotate), value) if config.local_window else None
    if config.combine == "softmax":
        short = short_query, short_key, short_value
        return attend_and_merge(short, near, selection, query.shape[2], config, backend)
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    output = attend(short_query, short_key, short_value, **grouped)
    local = attend_locally(*near, config.local_window) if near is not None else None
    return scatter(output, selection, query.shape[2], config, backend, local=local)


def gather(rows: Tensor, selection: Selection, config: LighthouseConfig, backend: ResolvedBackend) -> Tensor:
    """Pool every selected window to its mean and put the means in causal order (docs/method.md, sections 1 and 4).

    Args:
        rows: [B, H, N, D]; the selection of each key/value head serves its H/G heads.

    Returns:
        [B, H, S, D] in the dtype of ``rows``.
    """
    twin = load_kernels().gather if backend == "triton" else gather_scatter.gather
    gathered: Tensor = twin(rows, selection.entry, selection.inverse_map, config.num_levels, config.pooling_factor)
    return gathered


def gather_three(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, config: LighthouseConfig, backend: ResolvedBackend
) -> tuple[Tensor, Tensor, Tensor]:
    """``gather`` of query [B, H, N, D], key and value [B, G, N, D]: the kernels take all three in one launch."""
    if backend == "torch":
        short_query, short_key, short_value = (gather(x, selection, config, backend) for x in (query, key, value))
        return short_query, short_key, short_value
    shape = (config.num_levels, config.pooling_factor)
    short: tuple[Tensor, Tensor, Tensor] = load_kernels().gather_three(
        query, key, value, selection.entry, selection.inverse_map, *shape
    )
    return short


def gather_beside(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, config: LighthouseConfig, backend: ResolvedBackend
) -> tuple[Rows, Rows]:
    """``gather_three``, and query, key and value again, for a local window.

    The gradients that come back through those are added where the gather's are made. Otherwise both would be written,
    and autograd would read them again to add them up.
    """
    shape = (config.num_levels, config.pooling_factor)
    out = _GatherBeside.apply(query, key, value, selection.entry, selection.inverse_map, shape, backend == "triton")
    return out[:3], out[3:]


class _GatherBeside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        entry: Tensor,
        inverse_map: Tensor,
        shape: tuple[int, int],
        by_kernels: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inverse_map)
        ctx.shape, ctx.by_kernels = (query.shape[2], *shape), by_kernels
        rows = (query, key, value)
        if by_kernels:
            short = load_kernels().gather_three(*rows, entry, inverse_map, *shape)
        else:
            short = [gather_scatter.gather(x, entry, inverse_map, *shape) for x in rows]
        return *short, *(x.view_as(x) for x in rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_map,) = ctx.saved_tensors
        seq_len, num_levels, pooling_factor = ctx.shape
        short, beside = grads[:3], grads[3:]
        if ctx.by_kernels:
            backward = load_kernels().gather_three_backward
            long = backward(*short, inverse_map, seq_len, num_levels, pooling_factor, beside)
        else:
            long = [
                gather_scatter.gather_backward(grad, inverse_map, seq_len, num_levels, pooling_factor, other)
                for grad, other in zip(short, beside, strict=True)
            ]
        return *long, None, None, None, None


def scatter(
    rows: Tensor,
    selection: Selection,
    seq_len: int,
    config: LighthouseConfig,
    backend: ResolvedBackend,
    halo: Tensor | None = None,
    local: Tensor | None = None,
) -> Tensor:
    """Write every entry's output to p^ℓ positions, from its last covered one on, and add levels up.

    Seen from the other side: position t takes from each level the one entry ⌊(t+1)/p^ℓ⌋ − 1, if it is selected
    (docs/method.md, section 6).

    Args:
        rows: [B, H, S, D], the attention's output, in the order of the selection.
        halo: [B, H, L − 1, D], what the chunk before this one hands over (``lighthouse.context_parallel``).
        local: [B, H, N, D], what a position gets in place of its level-0 entry's row if that entry is not selected.

    Returns:
        [B, H, N, D] in the dtype of ``rows``.
    """
    twin = load_kernels().scatter if backend == "triton" else gather_scatter.scatter
    scattered: Tensor = twin(
        rows, selection.entry, selection.inverse_map, seq_len, config.num_levels, config.pooling_factor, halo, local
    )
    return scattered


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors that do not fit together in shape, dtype or device."""
    check_shapes(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}: must be the same"
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}: must be a floating dtype")


def rows_to_score(
    query: Tensor, key: Tensor, config: LighthouseConfig, score_by: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Query and key as the scorer is to see them; ``score_by`` as in ``lighthouse_attention``."""
    if score_by is None:
        return query, key
    if config.scorer != "norm":
        raise ValueError(f"scorer={config.scorer!r} attends to queries and keys: score_by needs the scorer 'norm'")
    for name, rows, scored in (("query", query, score_by[0]), ("key", key, score_by[1])):
        if scored.shape != rows.shape:
            raise ValueError(
                f"score_by of the {name} is {tuple(scored.shape)}: must have its shape, {tuple(rows.shape)}"
            )
    return score_by


class LighthouseAttention(nn.Module):
    """``lighthouse_attention`` as a module around an inner attention; no parameters, nothing in the state dict.

    It takes the place of an inner attention module in any transformer whose call is ``module(query, key, value)``
    on [B, heads, N, D], with or without ``enable_gqa``.
    """

    def __init__(self, config: LighthouseConfig, attention: InnerAttention | AttentionName | None = None) -> None:
        super().__init__()
        self.config = config
        if isinstance(attention, str):
            check_package(attention)
        self.attention = resolve(attention, config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        enable_gqa: bool = False,
        rotate: Rotate | None = None,
        score_by: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, H, N, D] and twice [B, G, N, D] to [B, H, N, D]; G < H needs ``enable_gqa``, as in torch's SDPA."""
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(
                f"{query.shape[1]} query heads and {key.shape[1]} key/value heads: grouped heads need enable_gqa=True"
            )
        return self.attend(query, key, value, rotate=rotate, score_by=score_by)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        return lighthouse_attention(query, key, value, self.config, attention=self.attention, **more)

    def extra_repr(self) -> str:
        return str(self.config)
