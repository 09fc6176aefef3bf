"""Upstream's parallelism for Llama 3, plus what a single device, the compiler and gloo need."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Parallelism
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.infra.offload import offload_inputs
from torchtitan.experiments.lighthouse.seams import context_parallel, parallelism
from torchtitan.experiments.lighthouse.sparse_gradient import SparseGradient
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.tools.utils import device_type

from lighthouse import SequenceShards, ShardedLighthouseAttention
from lighthouse.backend import load_kernels
from lighthouse.flash_packages import OPERATORS
from lighthouse.inner_attention import check_machine

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.model.model import LighthouseLlamaAttention, LighthouseTransformer


def parallelize_lighthouse(
    model: LighthouseTransformer, parallel_dims: ParallelDims, job_config: JobConfig
) -> LighthouseTransformer:
    """Apply tensor and context parallelism, activation checkpointing, compile and FSDP/HSDP as upstream does.

    Lighthouse has no parameters to shard, and its heads are the rank's local heads; under context parallelism it is
    told which chunks of the sequence are the rank's.
    """
    config, kernels = model.model_args.lighthouse, model.model_args.inner_attention
    check_machine(kernels, torch.device(device_type), "lighthouse.inner_attention")
    if parallel_dims.cp_enabled:
        shard_sequence(model, parallel_dims, job_config.parallelism)
    if kernels in OPERATORS:
        parallelism.keep_when_checkpointing_selectively({OPERATORS[kernels]})
    if config is not None and config.resolve_backend(device_type) == "triton":
        parallelism.keep_when_checkpointing_selectively(load_kernels().WORTH_SAVING)
    model = parallelize_llama(model, parallel_dims, job_config)
    compiles = job_config.compile.enable and "loss" in job_config.compile.components
    backend = job_config.compile.backend if compiles else None
    if backend is not None and model.output is not None:
        model.output.of_chunk = torch.compile(model.output.of_chunk, backend=backend)
    if getattr(job_config.training, "sparse_loss_gradient", False) and model.output is not None:
        model.output.sparse = SparseGradient(backend)
    if parallel_dims.world_size == 1:
        parallelism.shard_on_one_device(model, parallel_dims, job_config.training)
    if device_type == "cpu":
        parallelism.sum_gradients_plainly(model)
    # Upstream's own entry point knows the setting only where our settings are merged in.
    if layers := getattr(job_config.activation_checkpoint, "offload_layers", 0):
        offload_inputs(list(model.layers.values()), layers)
    return model


def shard_sequence(model: LighthouseTransformer, parallel_dims: ParallelDims, settings: Parallelism) -> None:
    """What context parallelism needs beside upstream's ring attention, which upstream applies itself."""
    context_parallel.set_rotation(settings.context_parallel_rotate_method)
    context_parallel.remember_layout()
    context_parallel.overlap_exchanges()
    if device_type == "cpu":
        context_parallel.support_ring_on_cpu()
    shards = SequenceShards(
        parallel_dims.get_mesh("cp").get_group(), load_balanced=settings.context_parallel_load_balancer is not None
    )
    for block in model.layers.values():
        attention = cast("LighthouseLlamaAttention", block.attention)
        whole = attention.lighthouse
        if whole is not None:
            attention.lighthouse = ShardedLighthouseAttention(whole.config, whole.attention, shards)
