"""Upstream's parallelism for Llama 3, plus what a single device, the compiler and gloo need."""

from functools import cache, wraps

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.config.job_config import Parallelism
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.cpu import support_ring_attention
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_fsdp
from torchtitan.tools.utils import device_type

from lighthouse import SequenceShards, ShardedLighthouseAttention
from lighthouse.selection import kernels

#: The compiler's pass that starts exchanges early, waits for them late and puts what need not wait in between, weight
#: gradients for one; it runs none by default. It keeps the order of the exchanges, which must be the same on all ranks.
OVERLAP = ["reorder_compute_for_overlap"]


def remember_layout() -> None:
    """Make the head-tail layout once: upstream makes a list of all positions for every batch, and then waits until the
    device has run everything before it copies the list there.
    """
    make = _HeadTailLoadBalancer._generate_indices
    if hasattr(make, "__wrapped__"):
        return

    @cache
    def indices(seq_length: int, world_size: int, device: str | torch.device, restore: bool) -> Tensor:
        return make(_HeadTailLoadBalancer(seq_length, world_size, device), restore)

    @wraps(make)
    def remembered(self: _HeadTailLoadBalancer, restore: bool = False) -> Tensor:
        return indices(self.seq_length, self.world_size, self.device, restore)

    _HeadTailLoadBalancer._generate_indices = remembered


def shard_sequence(model: nn.Module, parallel_dims: ParallelDims, parallelism: Parallelism) -> None:
    """What context parallelism needs beside upstream's ring attention, which upstream applies itself."""
    # Upstream reads this setting for validation only.
    set_rotate_method(parallelism.context_parallel_rotate_method)
    remember_layout()
    # While it is traced, the ring waits for an exchange where it starts it: let the compiler put attention in between.
    inductor.reorder_for_compute_comm_overlap = True
    inductor.reorder_for_compute_comm_overlap_passes = OVERLAP
    if device_type == "cpu":
        support_ring_attention()
    shards = SequenceShards(
        parallel_dims.get_mesh("cp").get_group(), load_balanced=parallelism.context_parallel_load_balancer is not None
    )
    for block in model.layers.values():
        attention = block.attention
        if attention.lighthouse is not None:
            attention.lighthouse = ShardedLighthouseAttention(
                attention.lighthouse.config, attention.inner_attention, shards
            )


def parallelize_lighthouse(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Apply tensor and context parallelism, activation checkpointing, compile and FSDP/HSDP as upstream does.

    Lighthouse has no parameters to shard, and its heads are the rank's local heads; under context parallelism it is
    told which chunks of the sequence are the rank's.
    """
    if parallel_dims.cp_enabled:
        shard_sequence(model, parallel_dims, job_config.parallelism)
    config = model.model_args.lighthouse
    if config is not None and config.resolve_backend(device_type) == "triton":
        _op_sac_save_list.update(kernels().WORTH_SAVING)
    model = parallelize_llama(model, parallel_dims, job_config)
    if job_config.compile.enable and "loss" in job_config.compile.components and model.output is not None:
        model.output.of_chunk = torch.compile(model.output.of_chunk, backend=job_config.compile.backend)
    if parallel_dims.world_size == 1:
        # Not for sharding, but so that one device computes in the precision of many: autocast, upstream's choice for
        # one, would keep the residual stream in float32, twice the memory.
        apply_fsdp(
            model,
            parallel_dims.world_mesh,
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy="never",
        )
    if device_type == "cpu":
        # Upstream's unit gradient divisor is a pre-multiplied sum, which gloo does not know.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
