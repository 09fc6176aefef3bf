"""The pyramid (docs/method.md, section 1): sizes of its levels, numbering of its entries, and pooling in plain torch.

Entries of all levels are numbered in one line, finest level first: entry i of level ℓ has the number
``level_offsets(...)[ℓ] + i``. Selection, gather and scatter all use these numbers.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor


def level_lengths(seq_len: int, num_levels: int, pooling_factor: int) -> tuple[int, ...]:
    """N/p^ℓ for ℓ = 0 … L−1."""
    return tuple(seq_len // pooling_factor**level for level in range(num_levels))


def level_offsets(seq_len: int, num_levels: int, pooling_factor: int) -> tuple[int, ...]:
    """The number of each level's first entry and, as value L + 1, how many entries the whole pyramid has."""
    return tuple(accumulate(level_lengths(seq_len, num_levels, pooling_factor), initial=0))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and means accumulate in float32, or in float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool_levels(rows: Tensor, num_levels: int, pooling_factor: int, how: Literal["mean", "sum"]) -> list[Tensor]:
    """Reduce windows of p, p², … rows, where p is the pooling factor.

    Args:
        rows: [..., N, D] of any floating dtype, strides as they come; N divisible by p^(L−1).

    Returns:
        One tensor per level, [..., N/p^ℓ, D]: ``rows`` itself, then reductions in the accumulation dtype.
    """
    levels, dtype = [rows], accumulation_dtype(rows.dtype)
    for _ in range(num_levels - 1):
        windows = levels[-1].unflatten(-2, (-1, pooling_factor))
        levels.append(windows.mean(-2, dtype=dtype) if how == "mean" else windows.sum(-2, dtype=dtype))
    return levels


def pool_scores(scores: Tensor, num_levels: int, pooling_factor: int) -> list[Tensor]:
    """Maxima over windows (docs/method.md, section 2): from [..., N] to one tensor per level, [..., N/p^ℓ]."""
    levels = [scores]
    for _ in range(num_levels - 1):
        levels.append(levels[-1].unflatten(-1, (-1, pooling_factor)).amax(-1))
    return levels
