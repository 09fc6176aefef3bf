"""A sequence split over ranks against one device, over gloo; ``context_parallel_worker.py`` also runs on GPUs."""

import sys
from pathlib import Path

import pytest
from launch import run


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layer_equals_one_device(world_size):
    """Selection identical; output and gradients to 1e-5, borders included; layouts, rotations, grouped heads."""
    worker = Path(__file__).with_name("context_parallel_worker.py")
    run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"),
            *(str(worker), "float32"),
        ]
    )
