"""Stratified selection, coarse to fine, and the causal order of what it keeps, in plain torch.

Source: docs/method.md, sections 3 and 4. ``lighthouse.kernels.selection`` holds the Triton twins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.backend import load_kernels
from lighthouse.config import PARENTS_PER_TILE, LighthouseConfig, ResolvedBackend
from lighthouse.pyramid import level_offsets, pool_scores
from lighthouse.scorers import SCORERS

#: Scores that ``_higher_before`` compares with all others at once: it bounds the memory.
_COMPARED = 256


@dataclass(frozen=True)
class Selection:
    """The S selected pyramid entries of every key/value head, in the order in which attention sees them.

    Entries are sorted by (last covered position, level), finer first, so a plain causal mask over them is exact.
    """

    level: Tensor
    """[B, G, S] int8: the level of each entry, 0 the finest."""
    index: Tensor
    """[B, G, S] int32: the index i of each entry within its level."""
    entry: Tensor
    """[B, G, S] int32: the number of each entry in the pyramid (``lighthouse.pyramid``)."""
    inverse_map: Tensor
    """[B, G, E] int32: the slot, 0 … S − 1, in which each of the pyramid's E entries stands here, or −1."""

    def last_positions(self, pooling_factor: int) -> Tensor:
        """[B, G, S] int64, the last position that each entry covers: (i + 1)·p^ℓ − 1, ascending."""
        return (self.index.long() + 1) * pooling_factor ** self.level.long() - 1


def select(
    query: Tensor,
    key: Tensor,
    config: LighthouseConfig,
    *,
    value: Tensor | None = None,
    starts_every: int = 1,
    backend: ResolvedBackend | None = None,
) -> Selection:
    """Score the pyramid and keep its most important entries.

    Args:
        query: [B, H, N, D], any floating dtype and strides.
        key: [B, G, N, D] with G dividing H; one selection per key/value head, shared by its query heads.
        config: valid for N.
        value: [B, G, N, D], needed by the ``dilated`` and ``gla`` scorers only.
        starts_every: every ``starts_every``-th sequence of the batch, the first included, is the start of a sequence;
            0: none is. The others are later chunks of one (docs/method.md, section 8), to which ``config.cover_start``
            does not apply.
        backend: what ``config.resolve_backend`` returned, from callers that have asked it already.

    Returns:
        The selection, which carries no gradient. Equal scores: the lower index wins.

    Raises:
        ValueError: for shapes that do not fit together, an invalid geometry, a missing ``value``, or a backend that is
            not available.
    """
    check_shapes(query, key, value)
    seq_len = query.shape[2]
    config.validate(seq_len)
    if config.selection == "none":
        raise ValueError("selection='none': selects nothing; lighthouse_attention attends to the local window alone")
    if value is None and config.scorer != "norm":
        raise ValueError(f"scorer={config.scorer!r} needs the value tensor: call select(..., value=value)")
    backend = backend or config.resolve_backend(query.device.type)
    starts_every = starts_every if config.cover_start else 0
    if backend == "triton" and config.scorer == "norm":  # one operator, without a gradient and deaf to autocast
        return _select_by_kernels(query, key, value, config, starts_every)
    # Scores stay in float32 whatever precision autocast would choose.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if backend == "triton":
            return _select_by_kernels(query, key, value, config, starts_every)
        query_score, key_score = SCORERS[config.scorer](query, key, value, config)
        if config.selection != "published":
            query_score, key_score = _delayed(query_score, config), _delayed(key_score, config)
        candidates = _select_candidates(query_score, key_score, config, starts_every)
        return _in_causal_order(candidates, seq_len, config)


def _select_by_kernels(
    query: Tensor, key: Tensor, value: Tensor | None, config: LighthouseConfig, starts_every: int
) -> Selection:
    kernels, p = load_kernels(), config.pooling_factor
    delayed, causal = config.selection != "published", config.selection == "causal"
    how = (config.num_levels, p, config.num_tiles, starts_every, delayed, causal)
    if config.scorer == "norm":
        return Selection(*kernels.select_by_norms(query, key, *how))
    scores = (pool_scores(score, 2, p)[1] for score in SCORERS[config.scorer](query, key, value, config))
    return Selection(*kernels.select_by_scores(*scores, *how))


def _delayed(score: Tensor, config: LighthouseConfig) -> Tensor:
    """Scores [B, G, N], moved one coarsest window later in their tile (docs/method.md, section 10.2).

    The first window of a tile gets 0, the lowest score: so a chunk of the sequence needs nothing of the one before it.
    """
    window = config.pooling_factor ** (config.num_levels - 1)
    tiles = score.unflatten(-1, (config.num_tiles, -1))
    return F.pad(tiles[..., :-window], (window, 0)).flatten(-2)


def check_shapes(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    """Refuse tensors that are not [B, H, N, D] and [B, G, N, D] with G dividing H."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"{shapes}: must be [batch, heads, seq_len, head_dim]")
    batch, heads, seq_len, head_dim = query.shape
    groups = key.shape[1]
    if key.shape != (batch, groups, seq_len, head_dim) or groups == 0 or heads % groups:
        raise ValueError(
            f"{shapes}: batch, seq_len and head_dim must agree and the {groups} key/value heads must divide "
            f"the {heads} query heads"
        )
    if value is not None and value.shape != key.shape:
        raise ValueError(f"value {tuple(value.shape)}: must have the shape of key, {tuple(key.shape)}")


def _select_candidates(
    query_score: Tensor, key_score: Tensor, config: LighthouseConfig, starts_every: int
) -> list[Tensor]:
    """Descend from the coarsest level; at every level the candidates are the children of the parents above.

    Args:
        query_score, key_score: [B, G, N].
        starts_every: as in ``select``, and 0 where ``cover_start`` is off.

    Returns:
        The selected indices of each level, finest first, each [B, G, T·C_ℓ] int64: every candidate is selected.
    """
    p, num_levels = config.pooling_factor, config.num_levels
    pick = _pick_parents_causally if config.selection == "causal" else _pick_parents
    query_levels = pool_scores(query_score, num_levels, p)
    key_levels = pool_scores(key_score, num_levels, p)

    coarsest = torch.arange(query_levels[-1].shape[-1], device=query_score.device)
    candidates = coarsest.view(config.num_tiles, -1).expand(*query_score.shape[:2], -1, -1)  # [B, G, T, C]
    selected = [candidates.flatten(2)]
    children = torch.arange(p, device=query_score.device)
    for level in range(num_levels - 1, 0, -1):
        parents = pick(query_levels[level], key_levels[level], candidates, starts_every)
        candidates = (parents[..., None] * p + children).flatten(-2)  # [B, G, T, p·m], ascending
        selected.append(candidates.flatten(2))
    return selected[::-1]


def _pick_parents(query_score: Tensor, key_score: Tensor, candidates: Tensor, starts_every: int) -> Tensor:
    """A ∪ B: of each tile's candidates the m/2 highest by query score, then of the rest the m/2 highest by key score.

    Args:
        query_score, key_score: [B, G, N/p^ℓ].
        candidates: [B, G, T, C] int64, ascending.

    Returns:
        [B, G, T, m] int64, ascending.
    """
    by_query, by_key = (_take(score, candidates) for score in (query_score, key_score))
    by_query = by_query.masked_fill(_is_start(candidates, starts_every), math.inf)
    chosen_by_query = _highest(by_query, PARENTS_PER_TILE // 2)
    by_key = by_key.scatter(-1, chosen_by_query, -math.inf)
    chosen = torch.cat([chosen_by_query, _highest(by_key, PARENTS_PER_TILE // 2)], dim=-1)
    return candidates.gather(-1, chosen.sort(dim=-1).values)


def _pick_parents_causally(query_score: Tensor, key_score: Tensor, candidates: Tensor, starts_every: int) -> Tensor:
    """The same from the past alone (docs/method.md, section 10.2): a candidate is chosen if it is among the highest of
    the candidates up to itself, in the share that is wanted of all, until there are enough; when only as many are left
    as are missing, all of them are.

    Arguments and result as for ``_pick_parents``.
    """
    half, count = PARENTS_PER_TILE // 2, candidates.shape[-1]
    by_query, by_key = (_take(score, candidates) for score in (query_score, key_score))
    is_start = _is_start(candidates, starts_every)
    place = torch.arange(count, device=candidates.device)

    high = (2 * _higher_before(by_query.masked_fill(is_start, math.inf)) + 1) * count < 2 * half * (place + 1)
    in_a = _first(high | is_start, half)
    rest_up_to = place + 1 - in_a.cumsum(-1)
    high = (2 * _higher_before(by_key.masked_fill(in_a, -math.inf)) + 1) * (count - half) < 2 * half * rest_up_to
    chosen = in_a | _first(high & ~in_a, half)
    missing = PARENTS_PER_TILE - (chosen.cumsum(-1) - chosen.long())
    chosen = chosen | (count - place <= missing)
    # Exactly m of each tile: the stable sort puts them first, in their order.
    order = (~chosen).to(torch.int8).sort(dim=-1, stable=True).indices[..., :PARENTS_PER_TILE]
    return candidates.gather(-1, order)


def _higher_before(scores: Tensor) -> Tensor:
    """How many of the scores before each one, [..., C], are at least as high."""
    higher = torch.zeros_like(scores, dtype=torch.int64)
    place = torch.arange(scores.shape[-1], device=scores.device)
    for others, first in zip(scores.split(_COMPARED, dim=-1), range(0, scores.shape[-1], _COMPARED), strict=True):
        before = place[first : first + _COMPARED] < place[:, None]
        higher += ((others[..., None, :] >= scores[..., None]) & before).sum(-1)
    return higher


def _first(chosen: Tensor, count: int) -> Tensor:
    """The first ``count`` of those that are chosen."""
    return chosen & (chosen.cumsum(-1) <= count)


def _is_start(candidates: Tensor, starts_every: int) -> Tensor:
    """Which of the candidates [B, G, T, C] are window 0 of a sequence. With ``cover_start`` it counts as the highest
    query score and is always a parent (docs/method.md, section 10.1)."""
    sequence = torch.arange(len(candidates), device=candidates.device)[:, None, None, None]
    return (candidates == 0) & (sequence % starts_every == 0) if starts_every else torch.zeros_like(candidates).bool()


def _highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest in the last dimension, the first among equals; ``topk`` leaves ties open."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _take(score: Tensor, index: Tensor) -> Tensor:
    """score [B, G, n] at index [B, G, T, C]."""
    return score.gather(-1, index.flatten(2)).view(index.shape)


def _in_causal_order(candidates: list[Tensor], seq_len: int, config: LighthouseConfig) -> Selection:
    """Sort by (last covered position, level), finer first, and invert (docs/method.md, section 4).

    A window and its ancestors may end at the same position. The finer one comes first there, so that a nested entry
    always precedes the entry that contains it.
    """
    p, num_levels = config.pooling_factor, config.num_levels
    offsets = level_offsets(seq_len, num_levels, p)
    levels = [torch.full_like(index, level) for level, index in enumerate(candidates)]
    rank = [((index + 1) * p**level - 1) * num_levels + level for level, index in enumerate(candidates)]
    entries = [index + offset for index, offset in zip(candidates, offsets[:-1], strict=True)]

    order = torch.cat(rank, dim=-1).argsort(dim=-1)
    level, index, entry = (torch.cat(x, dim=-1).gather(-1, order) for x in (levels, candidates, entries))
    slots = torch.arange(entry.shape[-1], device=entry.device, dtype=torch.int32).expand(entry.shape)
    inverse_map = torch.full((*entry.shape[:2], offsets[-1]), -1, device=entry.device, dtype=torch.int32)
    return Selection(
        level=level.to(torch.int8),
        index=index.to(torch.int32),
        entry=entry.to(torch.int32),
        inverse_map=inverse_map.scatter(-1, entry, slots),
    )
