import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.lighthouse.seams.trainer import HostTensor, on_host

from helpers.launch import REPOSITORY, run, run_ranks

WORKER = Path(__file__).with_name("host_tensor_worker.py")


def watched(printed: str) -> dict[str, list[int]]:
    return json.loads(next(line for line in printed.splitlines()[::-1] if line.startswith("{")))


def test_upstream_moves_batches_by_our_own_method(tmp_path):
    """Inputs, labels and the count of tokens of every step: were the subclass lost on the way, upstream's ``to`` would
    run, and wait for the device."""
    assert watched(run_ranks(WORKER, 1, str(tmp_path)).stdout)["moved"] == [3] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_device(tmp_path):
    """Steps that are not logged, on one GPU."""
    path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(WORKER), str(tmp_path)]
    found = watched(run(words, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="0").stdout)
    assert found["moved"] == [3] * 4 and found["waits"] == [0] * 2


def test_what_is_computed_from_a_batch_stays_on_its_way():
    inputs, labels = next(on_host([({"input": torch.ones(1, 4)}, torch.arange(4))]))
    total = torch.tensor(0)
    total += (labels != 2).sum()
    assert all(type(x) is HostTensor for x in (inputs["input"], labels, total))
    assert type(labels.to(torch.device("cpu"))) is torch.Tensor
