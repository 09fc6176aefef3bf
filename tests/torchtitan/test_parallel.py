import sys
from pathlib import Path

import pytest
from launch import CONFIG, SMALL, flags, run

FLOAT32 = flags({name: value for name, value in SMALL.items() if not name.startswith("checkpoint.")})


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ((1, 2, 1), ["--parallelism.fsdp_reshard_after_forward=always"]),
        ((1, 1, 2), ["--parallelism.disable_loss_parallel"]),
        ((1, 1, 2), ["--parallelism.disable_loss_parallel", "--model.flavor=debug_gqa"]),
        ((2, 2, 1), ["--activation_checkpoint.mode=full"]),
    ],
    ids=["FSDP 2", "TP 2", "TP 2 with grouped heads", "HSDP 2x2 with full activation checkpointing"],
)
def test_parallel_equals_one_process(layout, overrides):
    """Loss and every gradient of a step on the same sequences, float32, gloo."""
    world_size = layout[0] * layout[1] * layout[2]
    worker = Path(__file__).with_name("parallel_worker.py")
    run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"),
            *(str(worker), str(CONFIG), *map(str, layout), *FLOAT32, *overrides),
        ]
    )
