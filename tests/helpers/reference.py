"""Lighthouse Attention in float64, written from docs/method.md entry by entry: slow, plain, and unlike the library."""

from collections.abc import Callable

import torch
from torch import Tensor

from lighthouse import LighthouseConfig

M = 128
Turn = Callable[[Tensor, int], Tensor]


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

    def rows(x: Tensor) -> Tensor:
        return torch.stack([x[i * p**level : (i + 1) * p**level].mean(0) for level, i in entries])

    q, k, v = rows(query), rows(key), rows(value)
    end = torch.tensor([(i + 1) * p**level - 1 for level, i in entries])
    if turn is not None:
        q, k = (
            torch.stack([turn(row, position) for row, position in zip(x, end.tolist(), strict=True)]) for x in (q, k)
        )
    level = torch.tensor([level for level, _ in entries])
    visible = (end[None] < end[:, None]) | ((end[None] == end[:, None]) & (level[None] <= level[:, None]))
    scores = (q @ k.T / head_dim**0.5).masked_fill(~visible, float("-inf"))
    short = scores.softmax(-1) @ v

    output = [torch.zeros(head_dim, dtype=query.dtype) for _ in range(seq_len)]
    for row, (level, i) in zip(short, entries, strict=True):
        first = i * p**level + p**level - 1
        for position in range(first, min(first + p**level, seq_len)):
            output[position] = output[position] + row
    if window:
        if turn is not None:
            query, key = (torch.stack([turn(row, t) for t, row in enumerate(x)]) for x in (query, key))
        near, selected = attend_locally_naively(query, key, value, window), set(entries)
        for position in range(seq_len):
            if (0, position) not in selected:
                output[position] = output[position] + near[position]
    return torch.stack(output)
