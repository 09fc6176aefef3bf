"""What one training step has to do, in sizes: read off the settings, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torchtitan.experiments.lighthouse.errors import Refused, as_refusal
from torchtitan.experiments.lighthouse.infra.offload import check_offload
from torchtitan.experiments.lighthouse.job_config import MergedConfig, check_degrees
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.runs import stages
from torchtitan.experiments.lighthouse.runs.settings import model_arguments
from torchtitan.experiments.lighthouse.seams import cuda_graph

from lighthouse import LighthouseConfig
from lighthouse.config import PARENTS_PER_TILE
from lighthouse.inner_attention import AttentionName
from lighthouse.parts import HEAD_DIMS

Checkpointing = Literal["none", "memory_budget", "selective", "full"]

#: From the fastest to the one that needs the least memory.
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "memory_budget", "selective", "full")

#: ``activation_checkpoint.memory_budget`` of the second: torch's partitioner then computes again what costs next to
#: nothing, the norms and the product in the feed-forward network, which are only read and written.
MEMORY_BUDGET = 0.9


@dataclass(frozen=True)
class Workload:
    """One training step of a model on some GPUs. Widths are columns of one token's row."""

    dim: int
    """Of the residual stream, of the queries and of the attention's output."""
    kv_dim: int
    """Of the keys, and of the values."""
    head_dim: int
    ffn_dim: int
    vocab_size: int
    n_layers: int
    lighthouse_layers: int
    """How many of them run Lighthouse; 0: the model is dense."""
    geometry: LighthouseConfig
    """Without effect where no layer runs Lighthouse."""
    dense_every: int
    """Every so many steps, one is dense in all layers; 0: none."""

    seq_len: int
    sequences_at_once: int
    """That a group of context-parallel GPUs holds."""
    sequences_per_step: int
    gpus: int
    context_parallel: int
    rotation: Literal["allgather", "alltoall"]
    checkpointing: Checkpointing
    offloaded: int
    """Layers whose inputs wait in host memory."""
    keeps_weights: bool
    """Whether the gathered weights stay for the backward and the next step."""
    inner_attention: AttentionName = "auto"
    """Whose kernels attend; the rates are of cuDNN's."""
    cuda_graph: bool = False
    """Whether forward and backward are one CUDA graph."""

    @property
    def parameters(self) -> int:
        return count_parameters(self.dim, self.kv_dim, self.ffn_dim, self.vocab_size, self.n_layers)

    @property
    def layer_parameters(self) -> int:
        """Of one layer: its products and two norms."""
        return self.layer_products + 2 * self.dim

    @property
    def layer_products(self) -> int:
        """Entries of the seven matrices of a layer."""
        return 2 * self.dim * (self.dim + self.kv_dim) + 3 * self.dim * self.ffn_dim

    @property
    def tokens_at_once(self) -> int:
        """On one GPU."""
        return self.sequences_at_once * self.seq_len // self.context_parallel

    @property
    def rows(self) -> int:
        """S of a sequence, the rows that attention runs on in a Lighthouse layer."""
        return self.geometry.selected_length(self.seq_len) if self.lighthouse_layers else 0

    @property
    def rows_at_once(self) -> int:
        """Of Lighthouse layers, on one GPU."""
        return self.sequences_at_once * self.rows // self.context_parallel

    @property
    def window(self) -> int:
        """Of the local attention in a Lighthouse layer."""
        return self.geometry.local_window if self.lighthouse_layers else 0

    @property
    def selects(self) -> bool:
        return bool(self.lighthouse_layers) and self.geometry.selection != "none"

    @property
    def merges(self) -> bool:
        """Whether levels and local window are one softmax."""
        return self.selects and self.geometry.combine == "softmax"

    @property
    def by_flex(self) -> bool:
        """Whether this softmax is FlexAttention's, and not cuDNN's and Flash's (``lighthouse.merging``)."""
        return self.merges and (self.context_parallel > 1 or self.head_dim not in HEAD_DIMS)

    @property
    def times_per_step(self) -> int:
        """Forward and backward passes on each GPU, whose gradients are added up."""
        return self.sequences_per_step * self.context_parallel // (self.sequences_at_once * self.gpus)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def dense(self) -> Workload:
        """The same with dense attention in all layers."""
        return replace(self, lighthouse_layers=0, dense_every=0)

    def valid_top_k(self) -> Iterator[LighthouseConfig]:
        return valid_budgets(self.geometry, self.seq_len)


def valid_budgets(geometry: LighthouseConfig, seq_len: int) -> Iterator[LighthouseConfig]:
    """The geometry with each top_k that is valid at this length, ascending."""
    for top_k in range(PARENTS_PER_TILE, seq_len + 1, PARENTS_PER_TILE):
        one = replace(geometry, top_k=top_k)
        try:
            one.validate(seq_len)
        except ValueError:
            continue
        yield one


def count_parameters(dim: int, kv_dim: int, ffn_dim: int, vocab_size: int, n_layers: int) -> int:
    """Of a Llama whose output is not its embedding."""
    layer = 2 * dim * (dim + kv_dim) + 3 * dim * ffn_dim + 2 * dim
    return 2 * vocab_size * dim + n_layers * layer + dim


def workload(settings: MergedConfig, gpus: int) -> Workload:
    """What a step of these settings has to do on so many GPUs.

    Raises:
        Refused: for settings that cannot run, and for those that the predictions do not know.
    """
    _refuse_unknown(settings)
    with as_refusal():
        check_degrees(settings.parallelism, gpus)
        args = model_arguments(settings)
    check_offload(settings, args.n_layers)
    cuda_graph.check(settings, gpus, None)
    return _workload(args, settings, gpus)


def _workload(args: LighthouseModelArgs, settings: MergedConfig, gpus: int) -> Workload:
    sizes, training, parallelism = args.sizes, settings.training, settings.parallelism
    known: dict[str, Any] = asdict(sizes)
    degree = parallelism.context_parallel_degree
    ranks = gpus // degree
    sequences, at_once = stages.sequences_per_step(asdict(settings), ranks), training.local_batch_size
    if sequences % (ranks * at_once):
        nearest = max(1, round(sequences / (ranks * at_once))) * ranks * at_once
        raise Refused(
            f"training.global_batch_size={sequences}: must be a multiple of local_batch_size={at_once} × {ranks} "
            f"data-parallel ranks; nearest valid value: {nearest}"
        )
    return Workload(
        dim=known["dim"],
        kv_dim=known["dim"] // known["n_heads"] * known["n_kv_heads"],
        head_dim=known["dim"] // known["n_heads"],
        ffn_dim=known["ffn_dim"],
        vocab_size=known["vocab_size"],
        n_layers=known["n_layers"],
        lighthouse_layers=len(args.lighthouse_layers),
        geometry=settings.lighthouse.attention_config(),
        dense_every=args.dense_every,
        seq_len=training.seq_len,
        sequences_at_once=at_once,
        sequences_per_step=sequences,
        gpus=gpus,
        context_parallel=degree,
        rotation=parallelism.context_parallel_rotate_method,
        checkpointing=settings.activation_checkpoint.mode,
        offloaded=settings.activation_checkpoint.offload_layers,
        # On one GPU there is nothing to gather again.
        keeps_weights=gpus == 1 or parallelism.fsdp_reshard_after_forward == "never",
        inner_attention=args.inner_attention,
        cuda_graph=settings.training.cuda_graph,
    )


def _refuse_unknown(settings: MergedConfig) -> None:
    parallelism, checkpointing = settings.parallelism, settings.activation_checkpoint
    compiled = settings.compile.enable and {"model", "loss"} <= {*settings.compile.components}
    known = {
        "compile.enable": (compiled, True),
        "training.mixed_precision_param": (settings.training.mixed_precision_param, "bfloat16"),
        "parallelism.tensor_parallel_degree": (parallelism.tensor_parallel_degree, 1),
        "parallelism.pipeline_parallel_degree": (parallelism.pipeline_parallel_degree, 1),
        "parallelism.data_parallel_replicate_degree": (parallelism.data_parallel_replicate_degree, 1),
        "parallelism.context_parallel_load_balancer": (parallelism.context_parallel_load_balancer, "headtail"),
        "training.enable_cpu_offload": (settings.training.enable_cpu_offload, False),
        "optimizer.name": (settings.optimizer.name, "AdamW"),
    }
    if settings.lighthouse.enable:
        # Its states are computed in float32 by plain torch; nobody has measured it on a GPU.
        scorer = settings.lighthouse.scorer
        known["lighthouse.scorer"] = (scorer, "norm" if scorer == "gla" else scorer)
        known["lighthouse.backend"] = (settings.lighthouse.backend.replace("triton", "auto"), "auto")
    for name, (value, only) in known.items():
        if value != only:
            raise Refused(f"{name}={value}: its time and memory are not predicted; nearest value that is: {only}")
    if checkpointing.mode not in CHECKPOINTING or (
        checkpointing.mode == "selective" and checkpointing.selective_ac_option != "op"
    ):
        raise Refused(
            f"activation_checkpoint.mode={checkpointing.mode!r} (selective_ac_option="
            f"{checkpointing.selective_ac_option!r}): its time and memory are not predicted; values that are: 'none', "
            f"'memory_budget' with {MEMORY_BUDGET}, 'selective' with 'op', 'full'"
        )
    if checkpointing.mode == "memory_budget" and checkpointing.memory_budget != MEMORY_BUDGET:
        raise Refused(
            f"activation_checkpoint.memory_budget={checkpointing.memory_budget}: its time and memory are not "
            f"predicted; nearest value that is: {MEMORY_BUDGET}"
        )
