"""Upstream's parallelism for Llama 3, plus what a single device, the compiler and gloo need."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_fsdp
from torchtitan.tools.utils import device_type

from lighthouse.selection import kernels


def parallelize_lighthouse(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Apply tensor parallelism, activation checkpointing, compile and FSDP/HSDP as upstream does.

    Lighthouse needs nothing of its own: its heads are the rank's local heads, and it has no parameters to shard.
    """
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
