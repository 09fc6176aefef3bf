"""Lighthouse over a sequence that is split across devices: the one-device result, chunk by chunk.

Source: docs/method.md, section 8. Selection and pooling look at one chunk at a time. Ring attention runs over all
gathered chunks as over any sequence. What the last windows of a chunk write past its end, its halo, travels to the
device that holds the next chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from lighthouse import merging
from lighthouse.attention import (
    LighthouseAttention,
    Rotate,
    check_inputs,
    gather_three,
    rows_to_score,
    scatter,
)
from lighthouse.config import LighthouseConfig
from lighthouse.inner_attention import InnerAttention, resolve
from lighthouse.local_window import attend_locally, turned
from lighthouse.pyramid import level_lengths, level_offsets
from lighthouse.selection import Selection, select


@dataclass(frozen=True)
class SequenceShards:
    """Which chunks of the sequence the ranks of a group hold.

    With ``load_balanced``, rank r holds chunks r and 2W − 1 − r of 2W equal ones, one after the other, so that every
    rank has the same share of causal attention's work. Without, it holds the r-th of W.
    """

    group: dist.ProcessGroup
    load_balanced: bool = True

    @property
    def held(self) -> int:
        """Chunks on each rank."""
        return 2 if self.load_balanced else 1

    @property
    def num_chunks(self) -> int:
        return self.held * dist.get_world_size(self.group)

    @property
    def chunks(self) -> tuple[int, ...]:
        """The numbers of the chunks on this rank, ascending."""
        rank = dist.get_rank(self.group)
        return (rank, self.num_chunks - 1 - rank) if self.load_balanced else (rank,)

    @property
    def starts_every(self) -> int:
        """Which of the chunks in the batch (``stack``) are starts of a sequence: ``lighthouse.select``'s argument."""
        return self.held if dist.get_rank(self.group) == 0 else 0

    def stack(self, rows: Tensor) -> Tensor:
        """[B, H, n, D] to [B·C, H, n/C, D]: the C chunks that this rank holds, as sequences of the batch."""
        return rows.unflatten(2, (self.held, -1)).transpose(1, 2).flatten(0, 1)

    def join(self, chunks: Tensor) -> Tensor:
        """The inverse of ``stack``."""
        return chunks.unflatten(0, (-1, self.held)).transpose(1, 2).flatten(2, 3)

    def pass_halo_on(self, halo: Tensor) -> Tensor:
        """Hand each chunk's halo to the chunk that follows it in the sequence.

        A rank's head is followed by the head of the next rank, or on the last rank by its own tail; a tail is followed
        by the tail of the rank before. One collective, to the neighbours only, differentiable.

        Args:
            halo: [B·C, …], as ``stack`` orders the chunks.

        Returns:
            The halo of the chunk before, in the same order; zeros for the chunk that starts the sequence.
        """
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        to, source = [0] * size, [0] * size
        chunks = halo.unflatten(0, (-1, self.held)).transpose(0, 1)  # [C, B, …]
        if self.load_balanced:
            last = rank == size - 1
            to[rank if last else rank + 1] += 1  # the head
            source[rank if last else rank + 1] += 1  # what the tail receives
            if rank > 0:
                to[rank - 1] += 1  # the tail; rank 0's ends the sequence
                source[rank - 1] += 1  # what the head receives
            # In the order of ranks: the tail goes to a lower rank than the head, the head hears from a lower one.
            sent = chunks.flip(0) if rank > 0 else chunks[:1]
        else:
            if rank < size - 1:
                to[rank + 1] += 1
            if rank > 0:
                source[rank - 1] += 1
            sent = chunks[: sum(to)]
        received = all_to_all_single_autograd(sent.contiguous(), source, to, self.group)
        if rank == 0:
            received = torch.cat([torch.zeros_like(chunks[:1]), received])
        return received.transpose(0, 1).flatten(0, 1)

    def send_to_all(self, chunks: Tensor) -> Tensor:
        """Give every rank the chunks of all. One collective, differentiable; it runs until its result is used.

        Not an all-gather: the gradients, which all ranks send back, are then added up here, and rounded once.

        Args:
            chunks: [B·C, …], as ``stack`` orders them.

        Returns:
            [W·C, B, …], which ``in_sequence`` puts into order.
        """
        sizes = [self.held] * dist.get_world_size(self.group)
        own = chunks.unflatten(0, (-1, self.held)).transpose(0, 1)  # [C, B, …]
        sent = own.expand(len(sizes), *own.shape).flatten(0, 1)
        return all_to_all_single_autograd(sent.contiguous(), sizes, sizes, self.group)

    def in_sequence(self, received: Tensor) -> Tensor:
        """[W·C, B, G, n, D] of ``send_to_all`` to [B, G, W·C·n, D]: the chunks of all ranks as one sequence."""
        if self.load_balanced:
            heads, tails = received.unflatten(0, (-1, 2)).unbind(1)
            received = torch.cat([heads, tails.flip(0)])
        else:
            received = received.clone()  # as in ``hand_part_on``
        return received.movedim(0, 2).flatten(2, 3)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: LighthouseConfig,
    shards: SequenceShards,
    *,
    attention: InnerAttention | None,
    rotate: Rotate | None = None,
    score_by: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``lighthouse_attention`` of the whole sequence, on the chunks that this rank holds.

    Args:
        query: [B, H, N/W, D], the rank's chunks one after the other.
        key, value: [B, G, N/W, D].
        config: of the whole sequence; ``config.validate(N, shards.num_chunks)`` must hold.
        shards: the layout and the group.
        attention: causal attention over the sequence that all ranks hold together, in the same layout: ring attention.
            None with ``combine="softmax"``, which needs log-sum-exps: every rank then gets all keys and values of the
            short sequence.
        rotate: as in ``lighthouse_attention``; positions count the rank's own N/W rows.
        score_by: as in ``lighthouse_attention``, of the rank's own rows.

    Returns:
        [B, H, N/W, D], equal to one device's result.

    Raises:
        ValueError: for shapes that do not fit together, a geometry that cannot be split, a backend that is not
            available, or an ``attention`` that ``combine`` does not go with.
    """
    check_inputs(query, key, value)
    scored = rows_to_score(query, key, config, score_by)
    local_len = query.shape[2]
    config.validate(local_len * dist.get_world_size(shards.group), shards.num_chunks)
    attention = attention_over_ranks(attention, config)
    backend = config.resolve_backend(query.device.type)
    chunk_len, config = local_len // shards.held, config.of_chunk(shards.num_chunks)
    chunks = [shards.stack(rows) for rows in (query, key, value)]
    near: Callable[[], Any] | None = None
    if config.local_window:
        near_query, near_key = (shards.stack(rows) for rows in turned(query, key, rotate))
        before = shards.pass_halo_on(last_rows(near_key, chunks[2], config.local_window)).chunk(2, dim=-1)
        attend_near = attend_locally if config.combine == "sum" else merging.attend_locally
        # Copies, as in ``hand_part_on``.
        around: dict[str, Any] = {"before": [rows.contiguous() for rows in before], "starts_every": shards.starts_every}
        near = partial(attend_near, near_query, near_key, chunks[2], config.local_window, **around)
    if config.selection == "none":
        assert near is not None
        return shards.join(near())
    # Where they are query and key themselves, as nearly always, they are stacked already.
    scored_query, scored_key = chunks[:2] if score_by is None else map(shards.stack, scored)
    selection = select(scored_query, scored_key, config, starts_every=shards.starts_every, backend=backend)
    query_rows, key_rows, value_rows = chunks
    gathered = gather_three(query_rows, key_rows, value_rows, selection, config, backend)
    short = [shards.join(rows) for rows in gathered]
    if rotate is not None:
        position = selection.last_positions(config.pooling_factor)
        # Where each chunk begins in the rank's own rows, in the order of ``stack``.
        first = torch.arange(len(position), device=position.device) % shards.held * chunk_len
        position = shards.join((position + first[:, None, None])[..., None])[..., 0]
        short[:2] = [rotate(rows, position) for rows in short[:2]]
    if config.combine == "softmax":
        keys_and_values = shards.send_to_all(shards.stack(torch.cat(short[1:], dim=-1)))
        # They travel while the window is attended to.
        local = near() if near is not None else None
        keys, values = shards.in_sequence(keys_and_values).chunk(2, dim=-1)
        rows, sums = map(shards.stack, merging.attend_from_chunks(short[0], keys, values, shards.chunks))
        halo = hand_part_on(rows, sums, selection, chunk_len, config, shards)
        return shards.join(merging.merge((rows, sums), local, halo, selection, chunk_len, config, backend))
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    output = shards.stack(attention(*short, **grouped))
    passed = shards.pass_halo_on(halo_of(output, selection, chunk_len, config))
    local = near() if near is not None else None
    return shards.join(scatter(output, selection, chunk_len, config, backend, passed, local))


def attention_over_ranks(attention: InnerAttention | None, config: LighthouseConfig) -> InnerAttention:
    """The given one; refused where it is missing, is one device's, or could not do what ``combine`` asks for."""
    if (attention is None or isinstance(attention, str)) and config.combine == "sum":
        raise ValueError(
            f"attention={attention!r}: combine='sum' needs an attention over the rows of all ranks; nearest valid "
            "value: ring attention (or combine='softmax')"
        )
    return resolve(attention, config)


class ShardedLighthouseAttention(LighthouseAttention):
    """``LighthouseAttention`` on the chunks that this rank holds; its inner attention must be ring attention, or None
    with ``combine="softmax"``."""

    def __init__(self, config: LighthouseConfig, attention: InnerAttention | None, shards: SequenceShards) -> None:
        super().__init__(config, attention_over_ranks(attention, config))
        self.shards = shards

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        return context_parallel_attention(query, key, value, self.config, self.shards, attention=self.attention, **more)


def last_rows(key: Tensor, value: Tensor, window: int) -> Tensor:
    """The last W keys and values of a chunk, which its successor's first positions attend to: [B, G, W, 2·D]."""
    return torch.cat([rows[:, :, -window:] for rows in (key, value)], dim=-1)


def hand_part_on(
    rows: Tensor, sums: Tensor, selection: Selection, seq_len: int, config: LighthouseConfig, shards: SequenceShards
) -> tuple[Tensor, Tensor]:
    """Give each chunk the halo of the chunk before it, with the log-sum-exps that its rows are weighted by.

    They travel as they are, in float32 (float64 for float64 inputs): in bfloat16 a log-sum-exp of 8 would be off by up
    to 0.03, and the weight by as many parts of itself.

    Args:
        rows, sums: [B·C, H, S, D] and [B·C, H, S].

    Returns:
        [B·C, H, L − 1, D] and [B·C, H, L − 1], both in the dtype of ``sums``; −∞ where nothing is handed on.
    """
    halo = halo_of(rows, selection, seq_len, config)
    halo_sums = halo_of(sums[..., None], selection, seq_len, config, missing=-math.inf)
    received = shards.pass_halo_on(torch.cat([halo, halo_sums], dim=-1))
    # Copies: outside compiled code, views of what was received wait when they are used. Compiled code gets none.
    halo, halo_sums = received[..., :-1].contiguous(), received[..., -1].contiguous()
    if shards.starts_every:
        is_start = torch.arange(len(received), device=received.device) % shards.starts_every == 0
        halo_sums = halo_sums.masked_fill(is_start[:, None, None], -math.inf)
    return halo, halo_sums


def halo_of(rows: Tensor, selection: Selection, seq_len: int, config: LighthouseConfig, missing: float = 0.0) -> Tensor:
    """The halo of a chunk, which is what it writes past its end: the rows of each level's last entry, from level 1 on.

    Entry (ℓ, i) writes to p^ℓ positions, from its last covered one on (docs/method.md, section 6). Of each level only
    the last entry reaches past the end, and only if it is selected.

    Args:
        rows: [B, H, S, D], the attention's output, in the order of the selection.

    Returns:
        [B, H, L − 1, D], ``missing`` where the last entry is not selected.
    """
    lengths = level_lengths(seq_len, config.num_levels, config.pooling_factor)
    offsets = level_offsets(seq_len, config.num_levels, config.pooling_factor)
    last = [offset + length - 1 for offset, length in zip(offsets, lengths, strict=False)][1:]
    # Slices, not an index: a list would be copied to the device.
    slot = torch.cat([selection.inverse_map[..., entry : entry + 1] for entry in last], dim=-1)
    slot = slot.repeat_interleave(rows.shape[1] // slot.shape[1], dim=1)[..., None]  # [B, H, L − 1, 1]
    taken = rows.gather(2, slot.clamp(min=0).long().expand(-1, -1, -1, rows.shape[-1]))
    return taken.where(slot >= 0, missing)
