"""Which process logs: upstream decides it in a private function."""

import torch
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims


def logs_here(parallel_dims: ParallelDims, job_config: JobConfig) -> bool:
    """Whether this is the rank whose losses upstream logs."""
    from torchtitan.components.metrics import _get_metrics_rank

    return torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config)
