"""How long a training step takes: operations and bytes over the rates of the GPU, part by part.

A pass is one tensor read or written once; passes are counted. The constants below were fitted once, to the runs that
they name (benchmarks/reports/2026-11-26-plan.md says which runs were held out).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchtitan.experiments.lighthouse.planning.memory import HALF, SINGLE, peak_gib
from torchtitan.experiments.lighthouse.planning.rates import Rates
from torchtitan.experiments.lighthouse.planning.workload import Workload

#: Share of the copy's speed at which compiled elementwise code moves its bytes; trace of "98k k=2048".
ELEMENTWISE = 0.88

#: The same for the kernels that score, gather and scatter; trace of "98k k=2048".
KERNELS = 0.55

#: Passes over float32 rows of the queries' width that ring attention makes for each rank, to merge outputs and to add
#: gradients up; trace of "98k k=2048 CP 2".
RING_PASSES = 10

#: Share of its speed alone that attention has within a step; trace of "98k k=2048".
SUSTAINED = 0.95

#: Seconds of a step in which the GPU has nothing to do, whatever the model; trace of "98k k=2048" (8 ms idle). None
#: with ``training.cuda_graph``; "32M 32k Stage 1, CUDA graph".
FIXED = 0.01

#: Bytes that each pass moves for each parameter, on every GPU: gathering, casts, the embedding's gradient, and what no
#: formula counts; trace of "98k k=2048" (21 ms of optimizer, copies and other).
PARAMETER_BYTES = 100

#: Bytes of AdamW and of clipping for each parameter of a GPU's share, in each step.
OPTIMIZER_BYTES = 40

#: Seconds of choosing and ordering the entries of one layer, small and serial (report "One layer").
SELECTION = 0.05e-3

#: The scorer's attention, PyTorch's default, is so much slower than cuDNN's (report "One layer").
SCORER_SLOWDOWN = 1.7

#: What the host needs for a step, for each layer, and beside that for each Lighthouse layer, in units of
#: ``Rates.launch``. The last is the report "One layer" (compiled); the sum is the run "32M 32k Stage 1"; how the rest
#: is shared between step and layers is a guess.
HOST_STEP, HOST_LAYER, HOST_LIGHTHOUSE = 9.0, 1.0, 1.3

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Prediction:
    memory_gib: float
    """Peak of one GPU."""
    seconds: float
    """Of one step; with ``dense_every`` the mean."""
    tokens_per_second: float
    """Of one GPU."""
    parts: dict[str, float]
    """Seconds of the GPU for each part of a step, without those of steps that ``dense_every`` makes dense."""
    host: float
    """Seconds of the host for a step: where they are more than the GPU's, they are the step's."""

    def hours(self, tokens: float, gpus: int) -> float:
        return tokens / (self.tokens_per_second * gpus) / 3600


def predict(work: Workload, rates: Rates) -> Prediction:
    """Memory and speed of the steps of ``work`` on the GPU of these rates."""
    parts = gpu_seconds(work, rates)
    host = _host(work, rates)
    seconds = max(sum(parts.values()), host)
    if work.dense_every and work.lighthouse_layers:
        dense = predict(work.dense(), rates).seconds
        seconds += (dense - seconds) / work.dense_every
    speed = work.tokens_per_step / seconds / work.gpus
    return Prediction(peak_gib(work), seconds, speed, parts, host)


def gpu_seconds(work: Workload, rates: Rates) -> dict[str, float]:
    """Of each part of one step."""
    routed, plain = work.lighthouse_layers, work.n_layers - work.lighthouse_layers
    once = {
        "dense attention": plain * _attention(work, rates, work.seq_len, work.tokens_at_once),
        "Lighthouse": routed * _lighthouse(work, rates),
        "products": _products(work, plain, routed) / rates.matmul,
        "elementwise": work.n_layers * _elementwise(work) / (ELEMENTWISE * rates.copy),
        "loss": _loss(work, rates),
        "exchange": _exchange(work, rates),
    }
    parts = {name: work.times_per_step * seconds for name, seconds in once.items()}
    # The exchange of weights and gradients hides behind everything else, but for its first and last part.
    parts["exchange"] += work.times_per_step * _shards(work, rates, behind=sum(once.values()))
    idle = 0.0 if work.cuda_graph else FIXED
    parts["optimizer and fixed"] = idle + _optimizer(work) / rates.copy
    return parts


def attention_operations(width: int, queries: float, keys: float) -> float:
    """Of a causal attention's forward, for heads that are together ``width`` columns wide; its backward has 2.5 times
    as many."""
    return 2 * width * queries * keys


def _attention(work: Workload, rates: Rates, keys: int, queries: int) -> float:
    """Seconds of one layer's causal attention, forward and backward, ring included."""
    operations = attention_operations(work.dim, queries, keys)
    forward = operations / (SUSTAINED * rates.attention_forward)
    backward = 2.5 * operations / (SUSTAINED * rates.attention_backward)
    again = work.checkpointing == "full"
    seconds = (1 + again) * forward + backward
    ranks = work.context_parallel
    if ranks > 1:
        seconds += ranks * RING_PASSES * queries * work.dim * SINGLE / (ELEMENTWISE * rates.copy)
        received = (ranks - 1) * queries * 2 * work.kv_dim  # numbers, from all other ranks
        link = _link(rates, ranks)
        # Keys and values hide behind attention where it takes long enough, in each pass. Their gradients do not.
        seconds += (2 + again) * max(0.0, HALF * received / link - forward) + SINGLE * received / link
    return seconds


def _lighthouse(work: Workload, rates: Rates) -> float:
    """Seconds of one Lighthouse layer beside its products and norms."""
    d, kv, tokens, rows = work.dim, work.kv_dim, work.tokens_at_once, work.rows_at_once
    again = int(work.checkpointing == "full")
    # Selective checkpointing keeps what was gathered and what attention returns, and scatters again. With a softmax by
    # cuDNN and Flash it keeps nothing of the window, and merges again.
    partly_again = int(work.checkpointing in ("selective", "full"))
    forward, backward = _window(work, rates)
    seconds = (1 + (partly_again if work.merges and not work.by_flex else again)) * forward + backward
    if not work.selects:
        return seconds
    score, gather = tokens * (d + kv), (tokens + rows) * (d + 2 * kv)
    joined, joined_back = _joined(work)
    numbers = (1 + again) * (score + gather) + gather + (1 + partly_again) * joined + joined_back
    seconds += HALF * numbers / (KERNELS * rates.copy) + (1 + again) * SELECTION
    seconds += _attention_by_flex(work, rates, forward) if work.by_flex else _attention(work, rates, work.rows, rows)
    if work.geometry.scorer == "dilated":
        pairs = attention_operations(d, tokens, work.seq_len / work.geometry.dilation)
        seconds += (1 + again) * 2 * pairs * SCORER_SLOWDOWN / rates.attention_forward
    return seconds


def _window(work: Workload, rates: Rates) -> tuple[float, float]:
    """Seconds of one layer's attention over the local window, forward and backward."""
    d, kv, tokens = work.dim, work.kv_dim, work.tokens_at_once
    operations = 2 * attention_operations(d, tokens, work.window)
    # Gradients of query, key and value come from two sides, and are added up. That of a row comes from what is
    # scattered, but in a softmax it is the result's.
    moved = (2 * (d + kv), 5 * d + 6 * kv if work.merges else 6 * (d + kv))
    both = ((operations, rates.window_forward), (2.5 * operations, rates.window_backward))
    forward, backward = (
        count / rate + HALF * tokens * width / (KERNELS * rates.copy)
        for (count, rate), width in zip(both, moved, strict=True)
    )
    return (forward, backward) if work.window else (0.0, 0.0)


def _joined(work: Workload) -> tuple[float, float]:
    """Numbers that are read and written where the rows of all levels become the output, forward and backward."""
    long, short = work.tokens_at_once * work.dim, work.rows_at_once * work.dim
    near = long if work.window else 0
    if not work.merges:
        return long + short, long + short
    if work.by_flex:
        # Compiled: of each level the weighted gradient, which is scattered back.
        return long + short + near, work.geometry.num_levels * (3 * long + 2 * short) + 2 * long + 3 * near
    # Gradient and result become two rows of each entry.
    return long + short + near, 2 * (long + short)


def _attention_by_flex(work: Workload, rates: Rates, window: float) -> float:
    """Seconds of one layer's attention to the selected rows of all ranks, whose keys and values travel behind that of
    the ``window``."""
    rows, ranks = work.rows_at_once, work.context_parallel
    # FlexAttention as fast as cuDNN: "32M 98k softmax by FlexAttention".
    seconds = _attention(replace(work, context_parallel=1), rates, work.rows, rows)
    if ranks > 1:
        travel = HALF * (ranks - 1) * rows * 2 * work.kv_dim / _link(rates, ranks)
        # Checkpointing keeps nothing that was received. Gradients hide behind nothing.
        again = work.checkpointing in ("selective", "full")
        seconds += (1 + again) * max(0.0, travel - window) + travel
        # Written to be sent, received, put in order; the same back.
        seconds += HALF * 6 * ranks * rows * 2 * work.kv_dim / (ELEMENTWISE * rates.copy)
    return seconds


def product_operations(work: Workload) -> float:
    """Of the layers' products for one token, forward and backward."""
    return 6 * work.n_layers * work.layer_products


def _products(work: Workload, plain: int, routed: int) -> float:
    d, kv, ffn = work.dim, work.kv_dim, work.ffn_dim
    again = 0
    if work.checkpointing == "full":
        again = work.n_layers * (work.layer_products - d * ffn)  # the last product's result is not wanted
    elif work.checkpointing == "selective":
        again = work.n_layers * d * (d + ffn) + (plain if work.selects and not work.window else plain + routed) * d * kv
    return work.tokens_at_once * (product_operations(work) + 2 * again)


def _elementwise(work: Workload) -> float:
    """Bytes that one layer's norms, rotations, activations and sums move."""
    d, kv, ffn = work.dim, work.kv_dim, work.ffn_dim
    forward, backward = 11 * d + 2 * kv + 3 * ffn, 18.5 * d + 2 * kv + 5 * ffn
    again = {"none": 0, "memory_budget": 4 * d + 3 * ffn}.get(work.checkpointing, forward - 3 * d)
    return HALF * work.tokens_at_once * (forward + backward + again)


def _loss(work: Workload, rates: Rates) -> float:
    """Seconds of the output layer: three products, and three passes over the logits."""
    logits = work.tokens_at_once * work.vocab_size
    return 6 * logits * work.dim / rates.matmul + 3 * HALF * logits / (ELEMENTWISE * rates.copy)


def _link(rates: Rates, ranks: int) -> float:
    return rates.link if ranks <= GPUS_PER_NODE else rates.network


def _exchange(work: Workload, rates: Rates) -> float:
    """Of FSDP, what nothing hides: the embedding's and the output layer's weights and gradients."""
    return _share_of_others(work) * 2 * work.vocab_size * work.dim * (HALF + SINGLE) / _link(rates, work.gpus)


def _shards(work: Workload, rates: Rates, behind: float) -> float:
    """Of the layers' weights and gradients, the seconds that do not hide ``behind`` the rest."""
    gathered = HALF if work.keeps_weights else 2 * HALF
    travels = _share_of_others(work) * work.n_layers * work.layer_parameters * (gathered + SINGLE)
    return max(0.0, travels / _link(rates, work.gpus) - behind)


def _share_of_others(work: Workload) -> float:
    return (work.gpus - 1) / work.gpus


def _optimizer(work: Workload) -> float:
    """Bytes of a step that grow with the parameters alone."""
    return work.parameters * (OPTIMIZER_BYTES / work.gpus + PARAMETER_BYTES * work.times_per_step)


def _host(work: Workload, rates: Rates) -> float:
    if work.cuda_graph:
        return 0.0  # The optimizer's launches are left, less than the shortest step that was measured.
    layers = HOST_LAYER * work.n_layers + HOST_LIGHTHOUSE * work.lighthouse_layers
    return rates.launch * (HOST_STEP + layers) * work.times_per_step
