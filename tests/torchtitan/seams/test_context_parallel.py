"""A sequence split over ranks against one device, over gloo; ``context_parallel_worker.py`` also runs on GPUs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.distributed._functional_collectives import all_to_all_single
from torchtitan.experiments.lighthouse.seams.context_parallel import OVERLAP

from helpers.launch import losses, metrics, run_ranks, train

#: Eight tiles, so that each of four ranks' two chunks has one.
SPLIT = {
    "training__seq_len": "2048", "lighthouse__num_levels": "2", "lighthouse__top_k": "1024",
    "lighthouse__selection": "causal", "lighthouse__local_window": "128",
}  # fmt: skip
VALIDATED = {
    "validation__enable": None, "validation__dataset": "stdlib_validation", "validation__seq_len": "2048",
    "validation__local_batch_size": "1", "validation__steps": "2", "validation__freq": "100",
}  # fmt: skip


COMPILED_ON_TWO = {
    "parallelism__context_parallel_degree": "2", "compile__enable": None, "compile__backend": "aot_eager",
    "activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op",
    "activation_checkpoint__offload_layers": "2",
}  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layer_equals_one_device(world_size):
    """Selection identical; output and gradients to 1e-5, borders included; layouts, rotations, grouped heads."""
    run_ranks(Path(__file__).with_name("context_parallel_worker.py"), world_size, "float32")


@pytest.fixture(scope="module")
def seed(tmp_path_factory) -> Path:
    """First weights for every layout: on a CPU random numbers depend on it."""
    folder = tmp_path_factory.mktemp("seed")
    train(folder, **SPLIT, checkpoint__create_seed_checkpoint=None)
    return folder / "checkpoint/step-0"


def test_a_whole_run_equals_one_device(seed, tmp_path):
    """Same weights and data at 1, 2 and 4 ranks a sequence: the same losses, validation's too.

    Two ranks compiled, with selective checkpointing and two layers offloaded; four with the ring. The second step is
    dense.
    """
    common = SPLIT | VALIDATED | {"checkpoint__initial_load_path": str(seed)}
    common |= {"lighthouse__dense_every": "2"}
    two = common | COMPILED_ON_TWO
    four = common | {
        "parallelism__context_parallel_degree": "4", "parallelism__context_parallel_rotate_method": "alltoall",
    }  # fmt: skip
    train(tmp_path / "1", **common, training__steps="3")
    train(tmp_path / "2", 2, **two, training__steps="3")
    train(tmp_path / "4", 4, **four, training__steps="2")
    expected = losses(tmp_path / "1")
    assert list(expected) == [1, 2, 3]
    for degree, steps in (("2", 3), ("4", 2)):
        assert losses(tmp_path / degree) == pytest.approx({k: v for k, v in expected.items() if k <= steps}, rel=1e-4)
        for ours, theirs in zip(metrics(tmp_path / degree), metrics(tmp_path / "1"), strict=False):
            assert ours.get("tokens_seen") == theirs.get("tokens_seen")
            if "validation_loss" in theirs:
                assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-4)


def test_a_run_with_merged_parts_equals_one_device(seed, tmp_path):
    """Compiled, with selective checkpointing and two layers offloaded, between dense layers that run the ring."""
    split = SPLIT | {"lighthouse__combine": "softmax", "lighthouse__top_k": "512"}
    common = split | {"checkpoint__initial_load_path": str(seed), "training__steps": "2"}
    train(tmp_path / "1", **common)
    train(tmp_path / "2", 2, **common | COMPILED_ON_TWO)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("passes", [[], OVERLAP], ids=["by default", "ours"])
def test_compiled_exchanges_are_waited_for_after_what_does_not_need_them(alone, passes):
    """As in a layer's backward: a product that comes later in the program, and that only our pass moves up."""

    def step(rows, weight):
        return all_to_all_single(rows, None, None, alone), weight @ weight

    torch.use_deterministic_algorithms(False)  # with them the compiler reorders nothing
    torch.compiler.reset()
    with inductor.patch(
        reorder_for_compute_comm_overlap=bool(passes),
        reorder_for_compute_comm_overlap_passes=passes,
        fx_graph_cache=False,
    ):
        _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), torch.ones(8, 8), torch.ones(8, 8))
    exchange, wait, product = map(code[code.index("def call") :].index, ("all_to_all_single", "wait_tensor", "mm("))
    assert exchange < product < wait if passes else exchange < wait < product
