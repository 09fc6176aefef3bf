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
    if config.delay_scores:
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
            a = sorted(candidates, key=lambda i: (-by_query[i], i))[: M // 2]
            rest = [i for i in candidates if i not in a]
            b = sorted(rest, key=lambda i: (-by_key[i], i))[: M // 2]
            candidates = [p * i + j for i in sorted(a + b) for j in range(p)]
        selected += [(0, i) for i in candidates]
    return sorted(selected, key=lambda entry: ((entry[1] + 1) * p ** entry[0] - 1, entry[0]))


def attend_naively(
    query: Tensor, key: Tensor, value: Tensor, entries: list[tuple[int, int]], p: int, turn: Turn | None = None
) -> Tensor:
    """One head, [N, D] float64, through given entries. What an entry sees is read off the definition, not the order:
    every entry whose last position is not after its own, ancestors of itself excepted (they follow it).
    ``turn`` rotates a pooled query or key by the last position of its entry."""
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
    return torch.stack(output)
