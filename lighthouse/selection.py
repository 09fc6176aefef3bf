"""Stratified selection, coarse to fine, and the causal order of what it keeps (sections 3 and 4), in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.config import PARENTS_PER_TILE, LighthouseConfig
from lighthouse.pyramid import level_offsets, pool_scores
from lighthouse.scorers import SCORERS


@dataclass(frozen=True)
class Selection:
    """The S selected pyramid entries of every key/value head, in the order in which attention sees them.

    Entries are sorted by (last covered position, level), finer first, so a plain causal mask over them is exact.
    """

    level: Tensor
    """[B, G, S] int8: the level of each entry, 0 the finest."""
    index: Tensor
    """[B, G, S] int32: the place of each entry within its level."""
    entry: Tensor
    """[B, G, S] int32: the number of each entry in the pyramid (``lighthouse.pyramid``)."""
    place: Tensor
    """[B, G, E] int32, the inverse map: where each of the pyramid's E entries stands in the sequence, or −1."""

    def last_positions(self, pooling_factor: int) -> Tensor:
        """[B, G, S] int64, the last position that each entry covers: (i + 1)·p^ℓ − 1, ascending."""
        return (self.index.long() + 1) * pooling_factor ** self.level.long() - 1


def select(
    query: Tensor,
    key: Tensor,
    config: LighthouseConfig,
    *,
    value: Tensor | None = None,
    cover_every: int = 1,
) -> Selection:
    """Score the pyramid and keep its most important entries.

    Args:
        query: [B, H, N, D], any floating dtype and strides.
        key: [B, G, N, D] with G dividing H; one selection per key/value head, shared by its query heads.
        config: valid for N.
        value: [B, G, N, D], needed by the ``dilated`` and ``gla`` scorers only.
        cover_every: ``config.cover_start`` holds for every ``cover_every``-th sequence of the batch, 0 for none: chunks
            of one sequence may stand in the batch, and only the first needs it (section 7).

    Returns:
        The selection, which carries no gradient. Equal scores: the lower index wins.

    Raises:
        ValueError: for shapes that do not fit together, an invalid geometry, or a missing ``value``.
    """
    check_shapes(query, key, value)
    seq_len = query.shape[2]
    config.validate(seq_len)
    if value is None and config.scorer != "norm":
        raise ValueError(f"scorer={config.scorer!r} needs the value tensor: call select(..., value=value)")
    # Scores stay in float32 whatever precision autocast would choose.
    cover_every = cover_every if config.cover_start else 0
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if config.resolve_backend(query.device.type) == "triton":
            return _select_by_kernels(query, key, value, config, cover_every)
        scores = SCORERS[config.scorer](query, key, value, config)
        if config.delay_scores:
            scores = [_delayed(score, config) for score in scores]
        candidates = _select_candidates(*scores, config, cover_every)
        return _in_causal_order(candidates, seq_len, config)


def _select_by_kernels(
    query: Tensor, key: Tensor, value: Tensor | None, config: LighthouseConfig, cover_every: int
) -> Selection:
    num_levels, p = config.num_levels, config.pooling_factor
    if config.scorer == "norm":
        scores = kernels().norm_scores(query, key, p)
    else:
        scores = [pool_scores(score, 2, p)[1] for score in SCORERS[config.scorer](query, key, value, config)]
    if config.delay_scores:
        scores = [_delayed(score, config, pooled=1) for score in scores]
    parents = kernels().pick_parents(*scores, num_levels, p, config.num_tiles, cover_every)
    return Selection(*kernels().order_entries(parents, query.shape[2], num_levels, p))


def _delayed(score: Tensor, config: LighthouseConfig, pooled: int = 0) -> Tensor:
    """Scores of level ``pooled``, [B, G, n], moved one coarsest window later in their tile; 0, the lowest, fills up.

    Within the tile, so that a chunk of the sequence needs nothing of the one before it (section 7).
    """
    window = config.pooling_factor ** (config.num_levels - 1 - pooled)
    tiles = score.unflatten(-1, (config.num_tiles, -1))
    return F.pad(tiles[..., :-window], (window, 0)).flatten(-2)


def kernels() -> ModuleType:
    """The Triton twins, imported where they are used: the plain path must run without Triton."""
    import lighthouse.kernels

    return lighthouse.kernels


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
    query_score: Tensor, key_score: Tensor, config: LighthouseConfig, cover_every: int
) -> list[Tensor]:
    """Descend from the coarsest level; at every level the candidates are the children of the parents above.

    Args:
        query_score, key_score: [B, G, N].

    Returns:
        The selected indices of each level, finest first, each [B, G, T·C_ℓ] int64: every candidate is selected.
    """
    p, num_levels = config.pooling_factor, config.num_levels
    query_levels = pool_scores(query_score, num_levels, p)
    key_levels = pool_scores(key_score, num_levels, p)

    coarsest = torch.arange(query_levels[-1].shape[-1], device=query_score.device)
    candidates = coarsest.view(config.num_tiles, -1).expand(*query_score.shape[:2], -1, -1)  # [B, G, T, C]
    selected = [candidates.flatten(2)]
    children = torch.arange(p, device=query_score.device)
    for level in range(num_levels - 1, 0, -1):
        parents = _pick_parents(query_levels[level], key_levels[level], candidates, cover_every)
        candidates = (parents[..., None] * p + children).flatten(-2)  # [B, G, T, p·m], ascending
        selected.append(candidates.flatten(2))
    return selected[::-1]


def _pick_parents(query_score: Tensor, key_score: Tensor, candidates: Tensor, cover_every: int) -> Tensor:
    """A ∪ B: of each tile's candidates the m/2 highest by query score, then of the rest the m/2 highest by key score.

    Args:
        query_score, key_score: [B, G, N/p^ℓ].
        candidates: [B, G, T, C] int64, ascending.

    Returns:
        [B, G, T, m] int64, ascending.
    """
    by_query, by_key = (_take(score, candidates) for score in (query_score, key_score))
    if cover_every:
        # Window 0, if it is here at all, is the first candidate of the first tile.
        covered = (torch.arange(len(candidates), device=candidates.device) % cover_every == 0)[:, None, None, None]
        by_query = torch.where((candidates == 0) & covered, math.inf, by_query)
    chosen_by_query = _highest(by_query, PARENTS_PER_TILE // 2)
    by_key = by_key.scatter(-1, chosen_by_query, -math.inf)
    chosen = torch.cat([chosen_by_query, _highest(by_key, PARENTS_PER_TILE // 2)], dim=-1)
    return candidates.gather(-1, chosen.sort(dim=-1).values)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest in the last dimension, the first among equals; ``topk`` leaves ties open."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _take(score: Tensor, index: Tensor) -> Tensor:
    """score [B, G, n] at index [B, G, T, C]."""
    return score.gather(-1, index.flatten(2)).view(index.shape)


def _in_causal_order(candidates: list[Tensor], seq_len: int, config: LighthouseConfig) -> Selection:
    """Sort by (last covered position, level) and invert.

    A window and its ancestors may end at the same position, then the finer comes first: a nested entry always
    precedes the entry that contains it.
    """
    p, num_levels = config.pooling_factor, config.num_levels
    offsets = level_offsets(seq_len, num_levels, p)
    levels = [torch.full_like(index, level) for level, index in enumerate(candidates)]
    rank = [((index + 1) * p**level - 1) * num_levels + level for level, index in enumerate(candidates)]
    entries = [index + offset for index, offset in zip(candidates, offsets[:-1], strict=True)]

    order = torch.cat(rank, dim=-1).argsort(dim=-1)
    level, index, entry = (torch.cat(x, dim=-1).gather(-1, order) for x in (levels, candidates, entries))
    places = torch.arange(entry.shape[-1], device=entry.device, dtype=torch.int32).expand(entry.shape)
    place = torch.full((*entry.shape[:2], offsets[-1]), -1, device=entry.device, dtype=torch.int32)
    return Selection(
        level=level.to(torch.int8),
        index=index.to(torch.int32),
        entry=entry.to(torch.int32),
        place=place.scatter(-1, entry, places),
    )
