"""Upstream's lists and defaults for parallelism, adjusted to Lighthouse's operators, one device, and gloo."""

from collections.abc import Iterable

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.job_config import Training
from torchtitan.distributed import ParallelDims


def keep_when_checkpointing_selectively(operators: Iterable[torch._ops.OpOverload]) -> None:
    """Add to what selective activation checkpointing keeps. Upstream passes its own list and takes no other."""
    from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

    _op_sac_save_list.update(operators)


def shard_on_one_device(model: nn.Module, parallel_dims: ParallelDims, training: Training) -> None:
    """FSDP on a mesh of one: not for sharding, but so that one device computes in the precision of many.

    Autocast, upstream's choice for one device, would keep the residual stream in float32, twice the memory.
    """
    from torchtitan.models.llama3.infra.parallelize import apply_fsdp

    apply_fsdp(
        model,
        parallel_dims.world_mesh,
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=False,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy="never",
    )


def sum_gradients_plainly(model: nn.Module) -> None:
    """Upstream's unit gradient divisor makes FSDP use a pre-multiplied sum, which gloo does not know."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Shard what a forward without a backward has left whole: a checkpoint could not be saved of it."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def communication_streams(model: nn.Module) -> list[torch.cuda.Stream]:
    """Those that FSDP uses beside the current one; after the first forward on a GPU."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        return []
    context = model._get_fsdp_state()._comm_ctx
    return [value for value in vars(context).values() if isinstance(value, torch.cuda.Stream)]


def gather_gradients_without_the_host() -> None:
    """FSDP's gradients of a module go to one place by plain copies, on one device.

    Its own operator for it first sends their addresses from host memory that is used again afterwards. A CUDA graph
    would send whatever is there by then, where torch does not keep the memory for it.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    def copy_in(gradients: list[torch.Tensor], together: torch.Tensor, world_size: int) -> None:
        assert world_size == 1
        places = together.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_([place.view(x.shape) for place, x in zip(places, gradients, strict=True)], gradients)

    names, name = vars(collectives), "foreach_reduce_scatter_copy_in"
    assert name in names, f"FSDP has no {name} in torch {torch.__version__}"
    names[name] = copy_in
