"""The settings of Lighthouse Attention and every rule of valid geometry (docs/method.md, section 3)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lighthouse.pyramid import level_lengths

Scorer = Literal["norm", "dilated", "gla"]
Backend = Literal["auto", "torch", "triton"]
ResolvedBackend = Literal["torch", "triton"]
SelectionRule = Literal["published", "delayed", "causal", "none"]
Combine = Literal["sum", "softmax"]

#: Triton's interpreter runs kernels on CPU tensors. Triton reads this variable when it is imported, and so do we.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: m, the parents that a tile picks at every level: half by query score, half by key score.
PARENTS_PER_TILE = 128

#: ``local_window`` is a multiple of this, the rows that window attention's kernels take at once.
WINDOW_STEP = 128


@dataclass(frozen=True, kw_only=True)
class LighthouseConfig:
    """How the pyramid is built, scored and selected.

    Names and values that make no sense at any length are refused at construction; ``validate(seq_len)`` applies the
    geometry rules, each of which has its own ``ValueError`` with the value, the rule and the nearest valid values.
    """

    num_levels: int = 3
    """L ≥ 2, the levels of the pyramid, level 0 (the sequence itself) included."""

    pooling_factor: int = 4
    """p, a power of two ≥ 2: an entry of level ℓ is the mean of p entries of level ℓ − 1."""

    top_k: int = 1536
    """k, the parents picked at every level above 0, a multiple of 128."""

    scorer: Scorer = "norm"
    """What ranks the entries: row norms, or norms of a cheap attention's output (``lighthouse.scorers``)."""

    dilation: int = 4
    """δ ≥ 1, the interleaving of the ``dilated`` and ``gla`` scorers, which must divide the sequence length."""

    cover_start: bool = True
    """Make window 0 of every level ≥ 1 a parent, so that every position receives an output.

    See docs/method.md, section 10.1.
    """

    selection: SelectionRule = "published"
    """Which scores a window is selected by (docs/method.md, section 10.2).

    ``published``: its own, compared with all of its tile. A model learns to read from the selection what comes next.
    ``delayed``: those of the window of its size that lies one coarsest window earlier in the tile, compared with all of
    the tile; windows under the first coarsest one of a tile score 0. ``causal``: the same scores, compared with earlier
    windows of the tile only, so that nothing depends on later tokens. ``none``: nothing is selected, and the layer is
    attention over the local window alone.
    """

    local_window: int = 0
    """W, a multiple of 128: a position whose level-0 entry is not selected gets exact causal attention over its last W
    positions in place of that entry's output (docs/method.md, section 10.4). 0, as published: it gets nothing.
    """

    combine: Combine = "sum"
    """What a position makes of its parts, which are the rows of each level and of the local window (docs/method.md,
    section 10.6). ``sum``, as published: it adds them up. ``softmax``: it merges them into one softmax over all that
    they attended to, by their log-sum-exps; the local window is then a part at every position. Not with
    ``selection="none"``, which leaves one part only.
    """

    backend: Backend = "auto"
    """``torch``: plain PyTorch; ``triton``: kernels, never a silent fallback; ``auto``: triton on a GPU, else torch."""

    def __post_init__(self) -> None:
        for name in ("num_levels", "pooling_factor", "top_k", "dilation", "local_window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r}: must be an integer")
        named = {"scorer": Scorer, "selection": SelectionRule, "combine": Combine, "backend": Backend}
        for name, choices in ((name, get_args(rule)) for name, rule in named.items()):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
        if self.dilation < 1:
            raise ValueError(f"dilation={self.dilation}: must be at least 1; nearest valid value: 1")
        if self.local_window < 0 or self.local_window % WINDOW_STEP:
            below = max(0, self.local_window // WINDOW_STEP * WINDOW_STEP)
            nearest = _either({below, below + WINDOW_STEP} if self.local_window > 0 else {0})
            raise ValueError(
                f"local_window={self.local_window}: must be 0 or a positive multiple of {WINDOW_STEP}; "
                f"nearest valid values: {nearest}"
            )
        if self.selection == "none" and not self.local_window:
            raise ValueError(
                f"local_window=0: selection='none' needs a window; nearest valid value: {WINDOW_STEP} (or another "
                "selection)"
            )
        if self.selection == "none" and self.combine != "sum":
            raise ValueError(
                f"combine={self.combine!r}: selection='none' leaves nothing to merge but the window; nearest valid "
                "value: 'sum' (or another selection)"
            )

    @property
    def num_tiles(self) -> int:
        """T = k / m, the equal contiguous tiles that select on their own."""
        return self.top_k // PARENTS_PER_TILE

    def validate(self, seq_len: int, num_chunks: int = 1) -> None:
        """Check that a sequence of ``seq_len`` tokens can be selected from, whole or in equal chunks.

        Chunks are those of context parallelism (docs/method.md, section 8).

        Raises:
            ValueError: naming the value, the rule it breaks and the nearest valid values.
        """
        if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
            raise ValueError(f"seq_len={seq_len!r}: must be a positive integer")
        if num_chunks > 1 and self.local_window > seq_len // num_chunks:
            raise ValueError(
                f"local_window={self.local_window}: must not be longer than the {seq_len // num_chunks} tokens of each "
                f"of the {num_chunks} chunks of context parallelism; nearest valid value: "
                f"{seq_len // num_chunks // WINDOW_STEP * WINDOW_STEP}"
            )
        if self.selection == "none":
            return
        p, levels, top_k, m = self.pooling_factor, self.num_levels, self.top_k, PARENTS_PER_TILE
        if num_chunks > 1 and self.scorer != "norm":
            raise ValueError(
                f"scorer={self.scorer!r}: looks past the chunks of context parallelism; nearest valid value: 'norm'"
            )
        if levels < 2:
            raise ValueError(f"num_levels={levels}: the pyramid needs at least 2; nearest valid value: 2")
        if p < 2 or p & (p - 1):
            nearest = _either(_powers_of_two_around(p))
            raise ValueError(f"pooling_factor={p}: must be a power of two ≥ 2; nearest valid values: {nearest}")
        if top_k < m or top_k % m:
            nearest = _either({max(m, top_k // m * m), max(m, (top_k // m + 1) * m)})
            raise ValueError(f"top_k={top_k}: must be a positive multiple of {m}; nearest valid values: {nearest}")

        if self.num_tiles % num_chunks:
            step = m * num_chunks
            nearest = _either({max(step, top_k // step * step), -(-top_k // step) * step})
            raise ValueError(
                f"top_k={top_k}: must be a multiple of {m} for each of the {num_chunks} chunks of context parallelism, "
                f"{step}; nearest valid values: {nearest}"
            )
        lengths = _either(self._seq_lens_around(seq_len))
        span = p ** (levels - 1)
        if seq_len % span:
            raise ValueError(
                f"seq_len={seq_len}: must be divisible by pooling_factor^(num_levels-1) = {p}^{levels - 1} = {span}; "
                f"nearest valid values with top_k={top_k}: {lengths}"
            )
        coarsest, tiles = seq_len // span, self.num_tiles
        if coarsest % tiles or coarsest // tiles < m:
            budgets = _either(_budgets_around(top_k, coarsest))
            remedy = f"nearest valid top_k: {budgets}; nearest valid seq_len with top_k={top_k}: {lengths}"
            if coarsest % tiles:
                raise ValueError(
                    f"top_k={top_k}, seq_len={seq_len}: the coarsest level's {coarsest} entries must split evenly "
                    f"into top_k/{m} = {tiles} tiles; {remedy}"
                )
            raise ValueError(
                f"top_k={top_k}, seq_len={seq_len}: each of the {tiles} tiles must hold at least {m} entries of the "
                f"coarsest level, but {coarsest} entries leave {coarsest // tiles}; {remedy}"
            )
        if self.scorer in ("dilated", "gla") and seq_len % self.dilation:
            nearest = _either(_divisors_around(self.dilation, seq_len))
            raise ValueError(
                f"dilation={self.dilation}: must divide seq_len={seq_len} for scorer={self.scorer!r}; "
                f"nearest valid values: {nearest}"
            )

    def of_chunk(self, num_chunks: int) -> LighthouseConfig:
        """The settings of one of ``num_chunks`` equal chunks, which selects with its share of the tiles.

        See docs/method.md, section 8.
        """
        return replace(self, top_k=self.top_k // num_chunks)

    def selected_length(self, seq_len: int) -> int:
        """S = N/p^(L−1) + (L−1)·p·k, the rows that attention runs on, the same for every head.

        Raises:
            ValueError: as ``validate``.
        """
        self.validate(seq_len)
        if self.selection == "none":
            return 0
        coarsest = level_lengths(seq_len, self.num_levels, self.pooling_factor)[-1]
        return coarsest + (self.num_levels - 1) * self.pooling_factor * self.top_k

    def resolve_backend(self, device_type: str) -> ResolvedBackend:
        """The backend that runs on ``device_type``; an explicit request never falls back.

        Raises:
            ValueError: if the requested backend is not available there.
        """
        if self.backend == "triton" and device_type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"backend='triton' is not available on {device_type!r}: its kernels need a GPU; nearest valid values: "
                "'auto' or 'torch' (TRITON_INTERPRET=1 runs the kernels on CPU, slowly, for tests)"
            )
        if self.backend == "auto":
            return "triton" if device_type == "cuda" else "torch"
        return self.backend

    def _seq_lens_around(self, seq_len: int) -> set[int]:
        """The valid lengths just below and above ``seq_len``: whole tiles of whole coarsest windows."""
        step = self.pooling_factor ** (self.num_levels - 1) * self.num_tiles
        shortest = PARENTS_PER_TILE * step
        below = seq_len // step * step
        return {max(shortest, below), max(shortest, below + step)}


def _either(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values))) or "none: the sequence is too short"


def _powers_of_two_around(value: int) -> set[int]:
    if value < 2:
        return {2}
    below = 1 << (value.bit_length() - 1)
    return {below, 2 * below}


def _budgets_around(top_k: int, coarsest: int) -> set[int]:
    """The valid budgets just below and above ``top_k`` for a coarsest level of ``coarsest`` entries."""
    m = PARENTS_PER_TILE
    valid = [m * tiles for tiles in range(1, coarsest // m + 1) if coarsest % tiles == 0]
    return set([k for k in valid if k < top_k][-1:] + [k for k in valid if k > top_k][:1])


def _divisors_around(divisor: int, number: int) -> set[int]:
    valid = [d for d in range(1, number + 1) if number % d == 0]
    return set([d for d in valid if d < divisor][-1:] + [d for d in valid if d > divisor][:1])
