"""Lighthouse Attention in float64, written from docs/method.md over all pairs: slow, plain, and unlike the library."""

from collections.abc import Callable

import torch
from torch import Tensor

from lighthouse import LighthouseConfig

M = 128
#: Rows [n, D] at their positions [n].
Turn = Callable[[Tensor, Tensor], Tensor]


def select_naively(query_score: Tensor, key_score: Tensor, config: LighthouseConfig) -> list[tuple[int, int]]:
    """Scores [N] of one head to its (level, index) entries in causal order (docs/method.md, sections 3 and 4)."""
    p, num_levels, tiles = config.pooling_factor, config.num_levels, config.top_k // M
    seq_len = len(query_score)

    def pooled(score: Tensor, level: int) -> list[float]:
        return [max(window) for window in zip(*[iter(score.tolist())] * p**level, strict=True)]

    selected = []
    window = p ** (num_levels - 1)
    coarsest = seq_len // window
    if config.selection != "published":
        tile = seq_len // tiles
        query_score, key_score = (
            torch.tensor([score[j - window] if j % tile >= window else 0.0 for j in range(seq_len)], dtype=score.dtype)
            for score in (query_score, key_score)
        )
    for tile in range(tiles):
        candidates = list(range(tile * coarsest // tiles, (tile + 1) * coarsest // tiles))
        for level in range(num_levels - 1, 0, -1):
            selected += [(level, i) for i in candidates]
            by_query, by_key = pooled(query_score, level), pooled(key_score, level)
            if config.cover_start:
                by_query[0] = float("inf")
            if config.selection == "causal":
                parents = choose_one_by_one(by_query, by_key, candidates, config.cover_start)
            else:
                a = sorted(candidates, key=lambda i: (-by_query[i], i))[: M // 2]
                rest = [i for i in candidates if i not in a]
                parents = sorted(a + sorted(rest, key=lambda i: (-by_key[i], i))[: M // 2])
            candidates = [p * i + j for i in parents for j in range(p)]
        selected += [(0, i) for i in candidates]
    return sorted(selected, key=lambda entry: ((entry[1] + 1) * p ** entry[0] - 1, entry[0]))


def choose_one_by_one(
    by_query: list[float], by_key: list[float], candidates: list[int], cover_start: bool
) -> list[int]:
    """The parents of a tile from the past alone (docs/method.md, section 10.2), as one passes over its candidates."""
    half, count = M // 2, len(candidates)
    a: list[int] = []
    b: list[int] = []
    rest: list[int] = []  # those so far that are not in a
    forced: list[int] = []
    for place, i in enumerate(candidates):
        taken_before = len(a) + len(b) + len(forced)
        rank = sum(by_query[j] >= by_query[i] for j in candidates[:place])
        wanted_by_query = (rank + 0.5) / (place + 1) < half / count or (cover_start and i == 0)
        if wanted_by_query and len(a) < half:
            a.append(i)
            continue
        rank = sum(by_key[j] >= by_key[i] for j in rest)
        rest.append(i)
        if (rank + 0.5) / len(rest) < half / (count - half) and len(b) < half:
            b.append(i)
        elif count - place <= M - taken_before:
            forced.append(i)
    return sorted(a + b + forced)


def attend_locally_naively(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """One head, [N, D] float64: each position over the last ``window`` positions (docs/method.md, section 10.4)."""
    position = torch.arange(len(query))
    distance = position[:, None] - position
    scores = query @ key.T / query.shape[-1] ** 0.5
    return scores.masked_fill((distance < 0) | (distance >= window), float("-inf")).softmax(-1) @ value


def attend_naively(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entries: list[tuple[int, int]],
    p: int,
    turn: Turn | None = None,
    window: int = 0,
) -> Tensor:
    """One head, [N, D] float64, through given entries. What an entry sees is read off the definition, not the order:
    every entry whose last position is not after its own, ancestors of itself excepted (they follow it).
    ``turn`` rotates a pooled query or key by the last position of its entry; ``window`` is ``local_window``."""
    seq_len, head_dim = query.shape
    level, index = (torch.tensor(numbers)[:, None] for numbers in zip(*entries, strict=True))
    first, end = index * p**level, (index + 1) * p**level - 1
    position = torch.arange(seq_len)
    mean = ((first <= position) & (position <= end)).to(query.dtype) / p**level
    q, k, v = (mean @ x for x in (query, key, value))
    if turn is not None:
        q, k = (turn(x, end[:, 0]) for x in (q, k))
    visible = (end > end.T) | ((end == end.T) & (level >= level.T))
    scores = (q @ k.T / head_dim**0.5).masked_fill(~visible, float("-inf"))
    short = scores.softmax(-1) @ v

    # A row is written to p**level positions, the first of which is its entry's last.
    output = ((end <= position) & (position < end + p**level)).T.to(query.dtype) @ short
    if window:
        if turn is not None:
            query, key = (turn(x, position) for x in (query, key))
        in_holes = torch.ones(seq_len, 1, dtype=query.dtype)
        in_holes[index[level == 0]] = 0.0
        output = output + in_holes * attend_locally_naively(query, key, value, window)
    return output
