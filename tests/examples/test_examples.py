"""The programs in ``examples/``, each run as a reader would run it, only smaller."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(*words: str | Path) -> subprocess.CompletedProcess:
    """A Python program, on the CPU, without Triton's interpreter, which the test session may have switched on."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    # Importing the trainer sets LOCAL_RANK in the process of the tests, which transformers takes for a launcher's.
    clean = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, env=clean | settings
    )


def output_of(*words: str | Path) -> str:
    result = run(*words)
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture
def text(tmp_path) -> Path:
    """Four bytes in turn: a few steps learn them, without luck."""
    path = tmp_path / "text"
    path.write_bytes(b"abcd" * 20_000)
    return path


@pytest.fixture
def counting(tmp_path) -> Path:
    """Runs the program that it is given and prints how often Lighthouse attended."""
    path = tmp_path / "counting.py"
    path.write_text(
        "import runpy, sys\n"
        "import lighthouse.attention\n"
        "calls, attend = [], lighthouse.attention.lighthouse_attention\n"
        "lighthouse.attention.lighthouse_attention = lambda *rows, **more: calls.append(1) or attend(*rows, **more)\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('calls:', len(calls))\n"
    )
    return path


def test_train_gpt(text, counting):
    steps, layers = (8, 4), 4
    printed = output_of(
        counting, EXAMPLES / "train_gpt.py", "--text", text, "--context", 4096, "--width", 32, "--heads", 1,
        "--layers", layers, "--steps", *steps,
    )  # fmt: skip
    lines = re.findall(r"^step (\d+) of 12, stage (\d): loss ([\d.]+), [\d,]+ tokens/s$", printed, re.MULTILINE)
    assert [(int(step), int(stage)) for step, stage, _ in lines] == [(n, 1 if n <= 8 else 2) for n in range(1, 13)]
    losses = [float(loss) for *_, loss in lines]
    # From about ln 256 = 5.5 towards 0, in both stages; the second starts from the weights of the first.
    assert losses[7] < losses[0] - 1 and losses[11] < losses[8] < losses[0] - 1, losses
    summary = r"^stage (\d): loss [\d.]+, over its last 4 steps [\d.]+; [\d,]+ tokens/s$"
    assert re.findall(summary, printed, re.MULTILINE) == ["1", "2"]
    # Stage 1 goes through Lighthouse in all layers but the first and the last, Stage 2 in none.
    assert f"calls: {steps[0] * (layers - 2)}\n" in printed


def test_train_gpt_fits_on_a_page():
    assert len((EXAMPLES / "train_gpt.py").read_text().splitlines()) <= 80


def test_hf_trainer(text, counting, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate (the extra 'hf')")
    printed = output_of(
        counting, EXAMPLES / "hf_trainer.py", "--text", text, "--context", 2048, "--batch", 1, "--width", 32,
        "--layers", 2, "--steps", 10, 6, "--save", tmp_path / "model", "--through", "-1", "--family", "Qwen3",
    )  # fmt: skip
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\w.]+)'?", printed)]
    assert len(losses) == 16 and all(map(math.isfinite, losses)), printed
    assert losses[9] < losses[0] - 1 and losses[15] < losses[10] < losses[0] - 1, losses
    assert re.findall(r"^stage (\d, \w+): (\d+) steps", printed, re.MULTILINE) == [
        ("1, Lighthouse", "10"),
        ("2, dense", "6"),
    ]
    assert "calls: 10\n" in printed  # the last layer in each step of Stage 1, none in Stage 2
    assert "lighthouse" not in (tmp_path / "model/config.json").read_text().lower()
    assert (tmp_path / "model/model.safetensors").exists()


def test_context_parallel():
    printed = output_of(*TORCHRUN, EXAMPLES / "context_parallel.py")
    for rank in range(2):
        assert f"rank {rank} of 2, 16384 tokens through 5120 rows: equal to one device's result" in printed
    differences = re.findall(r"(output|dq|dk|dv): largest difference ([\d.e+-]+), allowed ([\d.e+-]+)", printed)
    assert [name for name, *_ in differences] == ["output", "dq", "dk", "dv"] * 2
    assert all(float(difference) <= float(allowed) < 1e-3 for _, difference, allowed in differences)


def test_context_parallel_notices_that_chunks_hand_nothing_over(tmp_path):
    without = tmp_path / "without.py"
    # The library's only collective, before it is imported: every chunk receives zeros.
    without.write_text(
        "import runpy\n"
        "import torch.distributed._functional_collectives as collectives\n"
        "receive_zeros = lambda rows, sizes, *rest: rows.new_zeros(sum(sizes), *rows.shape[1:])\n"
        "collectives.all_to_all_single_autograd = receive_zeros\n"
        f"runpy.run_path({str(EXAMPLES / 'context_parallel.py')!r}, run_name='__main__')\n"
    )
    result = run(*TORCHRUN, without)
    assert result.returncode != 0
    assert "DIFFERENT from one device's result" in result.stdout, result.stderr[-4000:]
