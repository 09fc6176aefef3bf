from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer
from torchtitan.experiments.lighthouse.seams.context_parallel import remember_layout

from helpers.launch import CONFIG, SMALL, flags, run_ranks

WINDOWED = ["--lighthouse.selection=causal", "--lighthouse.local_window=128"]
MERGED = "--lighthouse.combine=softmax"
SPARSE = ["--training.sparse_loss_gradient", "--llama.vocab_size=2048"]
FLOAT32 = flags({name: value for name, value in SMALL.items() if not name.startswith("checkpoint.")})


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ((1, 2, 1), ["--parallelism.fsdp_reshard_after_forward=always"]),
        ((1, 1, 2), ["--parallelism.disable_loss_parallel"]),
        ((1, 1, 2), ["--parallelism.disable_loss_parallel", "--model.flavor=debug_gqa", *WINDOWED]),
        ((1, 1, 2), ["--parallelism.disable_loss_parallel", "--model.flavor=debug_gqa", *WINDOWED, MERGED]),
        (
            (2, 2, 1),
            ["--activation_checkpoint.mode=full", "--activation_checkpoint.offload_layers=3", *WINDOWED, *SPARSE],
        ),
    ],
    ids=[
        "FSDP 2",
        "TP 2",
        "TP 2, grouped heads, window",
        "the same, merged",
        "HSDP 2x2, full activation checkpointing, offloaded, window, sparse gradient of the loss",
    ],
)
def test_parallel_equals_one_process(layout, overrides):
    """Loss and every gradient of a step on the same sequences, float32, gloo."""
    world_size = layout[0] * layout[1] * layout[2]
    worker = Path(__file__).with_name("parallel_worker.py")
    run_ranks(worker, world_size, str(CONFIG), *map(str, layout), *FLOAT32, *overrides)


def test_the_layout_of_a_split_sequence_is_made_once():
    """As upstream makes it, and the same tensor for the next batch."""
    fresh = [_HeadTailLoadBalancer(64, 4, "cpu")._generate_indices(restore) for restore in (False, True)]
    remember_layout()
    remember_layout()  # every model of a process asks for it
    remembered = [_HeadTailLoadBalancer(64, 4, "cpu")._generate_indices(restore) for restore in (False, True)]
    again = [_HeadTailLoadBalancer(64, 4, "cpu")._generate_indices(restore) for restore in (False, True)]
    for first, second, third in zip(fresh, remembered, again, strict=True):
        assert torch.equal(first, second) and second is third
    assert torch.equal(remembered[0][0, :16], torch.tensor([*range(8), *range(56, 64)]))
    other = _HeadTailLoadBalancer(128, 4, "cpu")._generate_indices()
    assert other.shape == (1, 128)
