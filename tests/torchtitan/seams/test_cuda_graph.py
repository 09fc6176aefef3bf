"""``training.cuda_graph``: what it refuses, and that it changes nothing on a GPU.

Whole runs on a CPU, with a stand-in for the graph, are in ``test_train.py``.
"""

import sys

import pytest
import torch
from torch import nn
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.seams.cuda_graph import WARM_UP, CUDARecorder, GraphedForwardBackward, check

from helpers.launch import TRAINER, arguments, losses, metrics, run
from helpers.settings import parse

ON = "--training.cuda_graph"


@pytest.mark.parametrize(
    ("overrides", "world_size", "why_not", "said"),
    [
        ((), 1, "there is no CUDA device", "there is no CUDA device"),
        ((), 8, None, "WORLD_SIZE=8: must be 1"),
        (("--training.enable_cpu_offload",), 1, None, "training.enable_cpu_offload=true"),
        (("--optimizer.early_step_in_backward",), 1, None, "optimizer.early_step_in_backward=true"),
        (("--training.sparse_loss_gradient",), 1, None, "training.sparse_loss_gradient=true waits for the device"),
        (("--model.converters=float8",), 1, None, "model.converters=['float8']"),
        (("--activation_checkpoint.mode=full",), 1, None, "activation_checkpoint.mode='full'"),
        (("--activation_checkpoint.offload_layers=2",), 1, None, "activation_checkpoint.offload_layers=2"),
    ],
)
def test_what_does_not_go_with_a_graph_is_refused(overrides, world_size, why_not, said):
    with pytest.raises(Refused) as refusal:
        check(parse("debug.toml", ON, *overrides), world_size, why_not)
    message = str(refusal.value)
    assert message.startswith(f"training.cuda_graph=true: {said}") and message.endswith("nearest valid value: false")
    check(parse("debug.toml", *overrides), world_size, why_not)


def test_what_goes_with_a_graph_is_not_refused():
    checkpointing = "--activation_checkpoint.mode=full", "--activation_checkpoint.no-preserve_rng_state"
    for overrides in ((), checkpointing, ("--training.global_batch_size=8", "--lighthouse.dense_every=8")):
        check(parse("debug.toml", ON, *overrides), 1, None)


def test_a_graph_needs_a_gpu():
    assert (CUDARecorder.why_not() is None) == torch.cuda.is_available()


def test_a_batch_of_another_shape_is_an_error():
    """It would be spread over the places of the recorded one."""
    weight = nn.Linear(4, 1, bias=False)

    class Now:
        def run(self, work):
            return work()

        def record(self, work):
            return work(), lambda: None

    def forward_backward(input_dict, labels, global_valid_tokens):
        loss = weight(input_dict["input"]).sum() / global_valid_tokens
        loss.backward()
        return loss

    def batch(rows):
        inputs = {"input": torch.ones(rows, 4)}
        return {"input_dict": inputs, "labels": torch.ones(2), "global_valid_tokens": torch.ones(())}

    graphed = GraphedForwardBackward(forward_backward, weight, Now(), accumulates=False)
    for _ in range(WARM_UP + 2):
        graphed(None, batch(2))
    with pytest.raises(ValueError, match=r"of shape \(1, 4\), recorded with \(2, 4\)"):
        graphed(None, batch(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compile__enable": None},
        {
            "compile__enable": None, "training__global_batch_size": "2", "lighthouse__dense_every": "2",
            "lighthouse__selection": "causal", "lighthouse__local_window": "128",
            "validation__enable": None, "validation__seq_len": "4096", "validation__steps": "1",
            "validation__freq": "5",
        },
        {"activation_checkpoint__mode": "full", "activation_checkpoint__no_preserve_rng_state": None},
    ],
    ids=["eager", "compiled", "everything", "checkpointed"],
)  # fmt: skip
def test_a_graph_trains_the_same_on_a_gpu(settings, tmp_path):
    """Every loss and gradient norm of nine steps in bfloat16; of the second half in the graphs. Deterministic: cuDNN's
    backward does not give the same bits twice."""
    settings = {
        "training__steps": "9", "training__seq_len": "4096", "training__mixed_precision_param": "bfloat16",
        "debug__deterministic": None, **settings,
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *TRAINER]
    for name, more in {"plain": {}, "graphed": {"training__cuda_graph": None}}.items():
        run([*torchrun, *arguments(tmp_path / name, **settings, **more)], CUDA_VISIBLE_DEVICES="0")
    plain, graphed = (
        [(r.get("loss"), r.get("grad_norm"), r.get("validation_loss")) for r in metrics(tmp_path / name)]
        for name in ("plain", "graphed")
    )
    assert plain == graphed and len(losses(tmp_path / "graphed")) == 9
