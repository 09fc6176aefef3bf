"""The peak of a GPU's memory in a training step, counted tensor by tensor.

What a compiled layer keeps for its backward is what torch's partitioner of compiled code keeps (the test asks it).
Nothing here is fitted but ``RING_OUTPUTS``.
"""

from __future__ import annotations

from dataclasses import replace

from torchtitan.experiments.lighthouse.infra.offload import host_bytes
from torchtitan.experiments.lighthouse.loss import CHUNK_LOGITS
from torchtitan.experiments.lighthouse.planning.workload import Workload

GIB = 2**30

#: Bytes of a number in bfloat16 and in float32.
HALF, SINGLE = 2, 4

#: Ring attention keeps its output, merged in float32, beside the keys and values of all ranks: so many rows of the
#: queries' width in bfloat16. Fitted to the run "98k k=2048 CP 2".
RING_OUTPUTS = 1.3

#: Of the layers whose inputs wait in host memory, one runs backward, and the one before it is on its way.
INPUTS = 2

#: What is on a GPU beside the tensors: CUDA's context and NCCL's buffers.
RUNTIME_GIB = 1.5

#: What predictions may be wrong by, and the allocator lose between blocks, before a run counts as one that fits.
MARGIN = 0.05


def peak_gib(work: Workload) -> float:
    """What the allocator reserves at most, in GiB, of one GPU."""
    kinds = [work]
    if work.dense_every:
        kinds.append(work.dense())
    return (max(_peak(kind) for kind in kinds) + _held_by_graphs(work)) / GIB


def _held_by_graphs(work: Workload) -> int:
    """The gradients of a graph and of one for dense steps, and their sums over several batches, beside the parameters'.

    The first is the difference that was measured (benchmarks/reports/2026-11-27-step.md).
    """
    more = 1 + (work.times_per_step > 1) + (work.dense_every > 0)
    return work.cuda_graph * more * SINGLE * work.parameters


def fits(gib: float, memory_gib: float) -> bool:
    return needed_gib(gib) <= memory_gib


def needed_gib(gib: float) -> float:
    """The memory that a GPU must have for a predicted peak."""
    return gib * (1 + MARGIN) + RUNTIME_GIB


def checkpoint_bytes(work: Workload) -> int:
    """Of one checkpoint: weights and AdamW's two moments, float32."""
    return 3 * SINGLE * work.parameters


def _peak(work: Workload) -> int:
    kept = {through: _kept(work, through) for through in (False, True)}
    dense_layers = work.n_layers - work.lighthouse_layers
    layers = dense_layers * kept[False] + work.lighthouse_layers * kept[True]
    # A layer that is computed again in the backward holds for a moment what it would have kept.
    again = max(
        _kept_without_checkpointing(work, through) - kept[through]
        for through in (False, True)
        if (work.lighthouse_layers if through else dense_layers)
    )
    layers -= _input(work) * min(work.offloaded, work.n_layers - INPUTS)
    return _states(work) + layers + max(_loss(work), again + _gradients(work))


def _input(work: Workload) -> int:
    """A layer's input, in bytes of one GPU."""
    return HALF * work.tokens_at_once * work.dim


def host_gib(work: Workload) -> float:
    """Pinned host memory for the inputs that are offloaded, in GiB of one GPU."""
    return work.offloaded * host_bytes(_input(work)) / GIB


def layers_to_offload(work: Workload, memory_gib: float) -> Workload | None:
    """The same with as few layers offloaded as fit into so much memory, dense steps too; None if no number does."""
    for layers in range(1, work.n_layers):
        one = replace(work, offloaded=layers)
        if fits(max(peak_gib(one), peak_gib(one.dense())), memory_gib):
            return one
    return None


def _states(work: Workload) -> int:
    """Weights, gradients and moments in float32, shared out among all GPUs, the gathered weights in bfloat16, and the
    rotary table of the whole sequence."""
    sharded = 4 * SINGLE * work.parameters // work.gpus
    gathered = work.parameters if work.keeps_weights else 2 * work.vocab_size * work.dim + 2 * work.layer_parameters
    return sharded + HALF * gathered + SINGLE * work.seq_len * work.head_dim


def _kept(work: Workload, through: bool) -> int:
    """What a layer keeps for its backward, through Lighthouse or dense, in bytes of one GPU."""
    d, kv, ffn = work.dim, work.kv_dim, work.ffn_dim
    if work.checkpointing == "full":
        return _input(work)
    if work.checkpointing == "none":
        return _kept_without_checkpointing(work, through)
    if work.checkpointing == "memory_budget":
        # Both norms are made again, and the product of the feed-forward network's two halves.
        return _kept_without_checkpointing(work, through) - HALF * work.tokens_at_once * (2 * d + ffn)
    # Upstream keeps every second product, as far as the backward wants it: of query, value and w1 here.
    width = d + ffn
    if not through or not work.selects or work.window:
        # Elsewhere the gathered rows are kept, and nobody wants query and value again.
        width += d + kv
        # Attention's result, but not the window's part of a softmax by cuDNN and Flash.
        width += 0 if through and work.merges and not work.by_flex else d
    return HALF * work.tokens_at_once * width + _kept_by_attention(work, through)


def _kept_without_checkpointing(work: Workload, through: bool) -> int:
    d, kv, ffn = work.dim, work.kv_dim, work.ffn_dim
    # The layer's input, its norm, the sum before the second norm, that norm, the attention's output, three of the
    # feed-forward network.
    width = 5 * d + 3 * ffn
    if not through or not work.selects:
        width += d + 2 * kv
    elif work.window:
        width += d + 2 * kv
        # The window's rows, but in a softmax by cuDNN and Flash its backward takes the output's in their place.
        width += 0 if work.merges and not work.by_flex else d
    return HALF * work.tokens_at_once * width + _kept_by_attention(work, through)


def _kept_by_attention(work: Workload, through: bool) -> int:
    """The gathered rows of a Lighthouse layer, and what ring attention keeps beside its inputs and its output."""
    if through and not work.selects:
        return 0
    rows = work.rows_at_once if through else work.tokens_at_once
    width = 2.0 * (work.dim + work.kv_dim) if through else 0.0
    if through and work.by_flex:
        # No ring: queries, their rows, and the keys and values of all ranks.
        width += 2 * (work.context_parallel - 1) * work.kv_dim
    elif through and work.merges and work.checkpointing in ("none", "memory_budget"):
        width -= work.dim  # Its backward takes others in the place of the rows that it returned.
    elif work.context_parallel > 1:
        others = work.context_parallel - (work.rotation == "alltoall")
        width += others * 2 * work.kv_dim + RING_OUTPUTS * work.dim
    return round(HALF * rows * width)


def _loss(work: Workload) -> int:
    """A chunk of logits and its gradient; the gradient of the weight in both precisions; three rows of hidden state."""
    rows = min(work.tokens_at_once, max(128, CHUNK_LOGITS // work.vocab_size // 1024 * 1024))
    weight = (SINGLE + HALF) * work.vocab_size * work.dim
    return 2 * HALF * rows * work.vocab_size + weight + 3 * HALF * work.tokens_at_once * work.dim


def _gradients(work: Workload) -> int:
    """Of what flows back through one layer at once."""
    return HALF * work.tokens_at_once * (3 * work.dim + 3 * work.ffn_dim)
