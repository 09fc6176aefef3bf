"""Upstream's parallelism for Llama 3, plus what FSDP needs on CPU."""

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.tools.utils import device_type


def parallelize_lighthouse(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Apply tensor parallelism, activation checkpointing, compile and FSDP/HSDP as upstream does.

    Lighthouse needs nothing of its own: its heads are the rank's local heads, and it has no parameters to shard.
    """
    model = parallelize_llama(model, parallel_dims, job_config)
    if device_type == "cpu":
        # Upstream's unit gradient divisor is a pre-multiplied sum, which gloo does not know.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
