"""Stratified selection and causal order without a sort (docs/method.md, sections 3 and 4).

Specification: ``lighthouse.selection._select_candidates`` for ``pick_parents``, which starts from the scores of level 1
and returns the parents instead of their children; ``lighthouse.selection._in_causal_order`` for ``order_entries``.

``pick_parents`` runs one program per tile. At every level it finds the 64th highest score, from the highest bits down
(scores are not negative, so their bits order as they do), and takes what is above it and the first of what equals it.
If it selects causally, it compares every candidate with all that come before it instead.
``order_entries`` computes the slot of every selected entry by itself: the number of selected entries before it. These
are counted level by level, as children of parents, by a binary search in the sorted list of parents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.config import PARENTS_PER_TILE
from lighthouse.kernels.common import empty, launch, log2, padded

_M = tl.constexpr(PARENTS_PER_TILE)
_LOG_M = tl.constexpr(log2(PARENTS_PER_TILE))
BLOCK_ENTRIES = 256


@triton.jit
def _highest(bits, COUNT: tl.constexpr, NUM_BITS: tl.constexpr):
    """Which of ``bits`` (order-preserving integers, negative where absent) are the COUNT highest; ties: the first."""
    threshold = tl.max(bits * 0, axis=0)
    one = threshold + 1
    # Two bits per round: the counts of three thresholds travel through one reduction.
    for i in range(NUM_BITS // 2):
        shift = NUM_BITS - 2 - 2 * i
        low = (bits >= (threshold | (one << shift))).to(tl.int64)
        middle = (bits >= (threshold | (one << (shift + 1)))).to(tl.int64)
        high = (bits >= (threshold | ((one + 2) << shift))).to(tl.int64)
        counts = tl.sum(low + (middle << 21) + (high << 42), axis=0)
        digit = one * 0
        for third in tl.static_range(3):
            digit += (((counts >> (21 * third)) & 0x1FFFFF) >= COUNT).to(digit.dtype)
        threshold |= digit << shift
    # NUM_BITS is odd.
    enough = tl.sum((bits >= (threshold | one)).to(tl.int32), axis=0) >= COUNT
    threshold = tl.where(enough, threshold | one, threshold)
    above = bits > threshold
    equal = bits == threshold
    missing = COUNT - tl.sum(above.to(tl.int32), axis=0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= missing))


@triton.jit
def _higher_before(
    bits, place, stored,
    NUM_CANDIDATES: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """How many of ``bits`` before each one are at least as high, int64; ``stored`` is room for all of them."""
    # All threads may still be reading what was stored before, and must then see what is stored now.
    tl.debug_barrier()
    tl.store(stored + place, bits)
    tl.debug_barrier()
    higher = place * 0
    # One by one against all: a thread keeps its own sums, and the loads of several are under way at once.
    for first in range(0, NUM_CANDIDATES, UNROLLED):
        for i in tl.static_range(UNROLLED):
            higher += ((tl.load(stored + first + i) >= bits) & (first + i < place)).to(tl.int32)
    return higher.to(tl.int64)


@triton.jit
def _first(chosen, COUNT: tl.constexpr):
    return chosen & (tl.cumsum(chosen.to(tl.int32), axis=0) <= COUNT)


@triton.jit
def _chosen_causally(
    query_bits, key_bits, is_start, place, count, stored,
    NUM_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Which of the ``count`` candidates are parents, from the past alone; bits are negative past ``count``."""
    half: tl.constexpr = _M // 2
    high = (2 * _higher_before(query_bits, place, stored, NUM_CANDIDATES, 8) + 1) * count < (place + 1) * _M
    in_a = _first((high & (query_bits >= 0)) | is_start, half)
    rest_up_to = place + 1 - tl.cumsum(in_a.to(tl.int32), axis=0)
    key_bits = tl.where(in_a, -1, key_bits)
    higher = _higher_before(key_bits, place, stored, NUM_CANDIDATES, 8)
    high = (2 * higher + 1) * (count - half) < rest_up_to * _M
    chosen = in_a | _first(high & (key_bits >= 0), half)
    taken_before = tl.cumsum(chosen.to(tl.int32), axis=0) - chosen.to(tl.int32)
    return (chosen | (count - place + taken_before <= _M)) & (place < count)


@triton.jit
def _window_max(score, index, valid, width, tile_start, coarsest_width, BITS: tl.constexpr, DELAYED: tl.constexpr):
    """The highest score of each window of ``width`` level-1 entries, as integers; −1 where not valid.

    ``DELAYED``: of the window one coarsest window earlier; the tile's first coarsest window scores 0."""
    at = index * width
    scored = valid
    if DELAYED:
        at -= coarsest_width
        scored = valid & (at >= tile_start)
    best = tl.load(score + at, mask=scored, other=0.0)
    for i in range(1, width):
        best = tl.maximum(best, tl.load(score + at + i, mask=scored, other=0.0), propagate_nan=tl.PropagateNan.ALL)
    return tl.where(valid, best.to(BITS, bitcast=True), -1)


@triton.jit
def _pick(
    query_score, key_score, index, place, count, width, tile_start, coarsest_width, parents, stored, cover_start,
    BITS: tl.constexpr, NUM_BITS: tl.constexpr, INFINITY_BITS: tl.constexpr, DELAYED: tl.constexpr,
    CAUSAL: tl.constexpr, NUM_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Store the m parents among the first ``count`` candidates ``index``, both ascending. ``cover_start``: window 0 is
    one of them."""
    valid = place < count
    query_bits = _window_max(query_score, index, valid, width, tile_start, coarsest_width, BITS, DELAYED)
    key_bits = _window_max(key_score, index, valid, width, tile_start, coarsest_width, BITS, DELAYED)
    is_start = (index == 0) & valid & cover_start
    query_bits = tl.where(is_start, tl.maximum(query_bits, INFINITY_BITS), query_bits)
    if CAUSAL:
        chosen = _chosen_causally(query_bits, key_bits, is_start, place, count, stored, NUM_CANDIDATES)
    else:
        by_query = _highest(query_bits, _M // 2, NUM_BITS)
        by_key = _highest(tl.where(by_query, -1, key_bits), _M // 2, NUM_BITS)
        chosen = by_query | by_key
    rank = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(parents + rank, index, mask=chosen)


@triton.jit
def _pick_parents_kernel(
    query_score, key_score, parents, stored, groups, tiles, per_tile, length, starts_every,
    NUM_LEVELS: tl.constexpr, FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr, COARSEST: tl.constexpr,
    BITS: tl.constexpr, NUM_BITS: tl.constexpr, INFINITY_BITS: tl.constexpr,
    DELAYED: tl.constexpr, CAUSAL: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    bg = (tl.program_id(0) // tiles).to(tl.int64)
    cover_start = (starts_every > 0) & (bg // groups % tl.maximum(starts_every, 1) == 0)
    query_score += bg * length
    key_score += bg * length
    parents += (bg * tiles + tile) * (NUM_LEVELS - 1) * _M  # a tile's lists, level 1's first
    stored += (bg * tiles + tile) * ROOM

    place = tl.arange(0, COARSEST)
    coarsest_width = 1 << (LOG_FACTOR * (NUM_LEVELS - 2))
    tile_start = tile * per_tile * coarsest_width
    _pick(
        query_score, key_score, tile * per_tile + place, place, per_tile, coarsest_width, tile_start, coarsest_width,
        parents + (NUM_LEVELS - 2) * _M, stored, cover_start, BITS, NUM_BITS, INFINITY_BITS, DELAYED, CAUSAL, COARSEST,
    )  # fmt: skip
    for step in tl.static_range(1, NUM_LEVELS - 1):
        # The list of the level above is stored by all threads and read by all.
        tl.debug_barrier()
        above = tl.load(parents + (NUM_LEVELS - 1 - step) * _M + tl.arange(0, _M))
        children = tl.reshape((above * FACTOR)[:, None] + tl.arange(0, FACTOR)[None, :], (_M * FACTOR,))
        width = 1 << (LOG_FACTOR * (NUM_LEVELS - 2 - step))
        _pick(
            query_score, key_score, children, tl.arange(0, _M * FACTOR), _M * FACTOR, width, tile_start, coarsest_width,
            parents + (NUM_LEVELS - 2 - step) * _M, stored, cover_start, BITS, NUM_BITS, INFINITY_BITS,
            DELAYED, CAUSAL, _M * FACTOR,
        )  # fmt: skip


def pick_parents(
    query_score: Tensor, key_score: Tensor, num_levels: int, pooling_factor: int, num_tiles: int, starts_every: int,
    delayed: bool, causal: bool,
) -> Tensor:  # fmt: skip
    """Scores of level 1, [B, G, N/p], to the parents of every level above 0: [B, G, T, L−1, m] int32, ascending.

    ``starts_every``: as in ``lighthouse.select``, and 0 where ``cover_start`` is off (docs/method.md, section 10.1).
    ``delayed``: score a window by an earlier one; ``causal``: compare it with earlier ones only (docs/method.md,
    section 10.2).
    """
    query_score, key_score = query_score.contiguous(), key_score.contiguous()
    batch, groups, length = query_score.shape
    parents = empty(query_score, batch, groups, num_tiles, num_levels - 1, PARENTS_PER_TILE, dtype=torch.int32)
    per_tile = length // pooling_factor ** (num_levels - 2) // num_tiles
    double = query_score.dtype == torch.float64
    coarsest = padded(per_tile)
    room = max(coarsest, PARENTS_PER_TILE * pooling_factor) if causal else 0
    programs = batch * groups * num_tiles
    stored = parents
    if causal:
        stored = empty(parents, programs * room, dtype=torch.int64 if double else torch.int32)
    launch(
        _pick_parents_kernel, programs,
        (query_score, key_score, parents, stored),
        (groups, num_tiles, per_tile, length, starts_every),
        NUM_LEVELS=num_levels, FACTOR=pooling_factor, LOG_FACTOR=log2(pooling_factor), COARSEST=coarsest,
        BITS=tl.int64 if double else tl.int32, NUM_BITS=63 if double else 31,
        INFINITY_BITS=0x7FF0000000000000 if double else 0x7F800000, DELAYED=delayed, CAUSAL=causal, ROOM=room,
        num_warps=min(32, max(8 if causal else 4, coarsest // 256)),
    )  # fmt: skip
    return parents


@triton.jit
def _count_below(list_, bound, mask):
    """How many of the m ascending numbers at ``list_`` are below ``bound``."""
    low = bound * 0
    for i in tl.static_range(_LOG_M + 1):
        ahead = low + (_M >> i)
        last = tl.load(list_ + ahead - 1, mask=mask & (ahead <= _M), other=2147483647)
        low = tl.where(last < bound, ahead, low)
    return low


@triton.jit
def _contains(list_, at, value, mask):
    return tl.load(list_ + at, mask=mask & (at < _M), other=-1) == value


@triton.jit
def _order_kernel(
    parents, level_out, index_out, entry_out, inverse_map,
    seq_len, blocks, tiles, per_tile, selected, num_entries,
    NUM_LEVELS: tl.constexpr, FACTOR: tl.constexpr, LOG_FACTOR: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    """Put the selected entries of one level and tile into their slots; ``inverse_map`` comes filled with −1."""
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks % tiles
    bg = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    level = tl.program_id(1)
    coarsest = level == NUM_LEVELS - 1
    lists = parents + (bg * tiles + tile) * (NUM_LEVELS - 1) * _M

    candidate = block * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)  # which one of its level, in this tile
    inside = candidate < tl.where(coarsest, per_tile, _M * FACTOR)
    parent = tl.load(lists + level * _M + (candidate >> LOG_FACTOR), mask=inside & (level < NUM_LEVELS - 1), other=0)
    index = tl.where(coarsest, tile * per_tile + candidate, parent * FACTOR + (candidate & (FACTOR - 1)))

    # Entries before this one in the order, level by level.
    end = (index + 1) << (LOG_FACTOR * level)
    slot = tile * (selected // tiles) + candidate
    offset = 0
    for other in tl.static_range(NUM_LEVELS):
        # At finer levels, entries that end no later; at coarser ones, those that end before.
        before = tl.where(other < level, end, end - 1) >> (LOG_FACTOR * other)
        if other == NUM_LEVELS - 1:
            count = before - tile * per_tile
        else:
            whole = before >> LOG_FACTOR
            at = _count_below(lists + other * _M, whole, inside)
            part = _contains(lists + other * _M, at, whole, inside)
            count = at * FACTOR + tl.where(part, before & (FACTOR - 1), 0)
            offset += tl.where(other < level, seq_len >> (LOG_FACTOR * other), 0)
        slot += tl.where(other == level, 0, count)

    tl.store(inverse_map + bg * num_entries + offset + index, slot, mask=inside)
    to = bg * selected + slot
    tl.store(level_out + to, (index * 0 + level).to(tl.int8), mask=inside)
    tl.store(index_out + to, index, mask=inside)
    tl.store(entry_out + to, offset + index, mask=inside)


def order_entries(
    parents: Tensor, inverse_map: Tensor, seq_len: int, num_levels: int, pooling_factor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, [B, G, T, L−1, m], to the fields of ``lighthouse.Selection``: level, index and entry.

    Args:
        inverse_map: [B, G, E] int32, contiguous, −1 everywhere; selected entries get their slots.
    """
    batch, groups, tiles = parents.shape[:3]
    per_tile = seq_len // pooling_factor ** (num_levels - 1) // tiles
    level, index, entry = empty_entries(parents, seq_len, num_levels, pooling_factor, tiles)
    blocks = -(-max(per_tile, PARENTS_PER_TILE * pooling_factor) // BLOCK_ENTRIES)
    launch(
        _order_kernel, blocks * tiles * batch * groups,
        (parents, level, index, entry, inverse_map),
        (seq_len, blocks, tiles, per_tile, entry.shape[-1], inverse_map.shape[-1]),
        NUM_LEVELS=num_levels, FACTOR=pooling_factor, LOG_FACTOR=log2(pooling_factor), BLOCK_ENTRIES=BLOCK_ENTRIES,
        across=num_levels,
    )  # fmt: skip
    return level, index, entry


def empty_entries(
    like: Tensor, seq_len: int, num_levels: int, pooling_factor: int, num_tiles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Level, index and entry, [B, G, S] each, for ``like`` [B, G, …]."""
    selected = seq_len // pooling_factor ** (num_levels - 1)
    selected += (num_levels - 1) * pooling_factor * num_tiles * PARENTS_PER_TILE
    level, index, entry = (
        empty(like, *like.shape[:2], selected, dtype=dtype) for dtype in (torch.int8, torch.int32, torch.int32)
    )
    return level, index, entry
