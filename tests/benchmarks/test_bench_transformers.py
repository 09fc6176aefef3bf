"""The benchmark of Hugging Face models, at a small size on the CPU."""

import json
import math
import sys
from pathlib import Path

import pytest

from helpers.launch import run
from helpers.text import words

pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate (the extra 'hf')")

import bench_transformers

STEPS, SEQ_LEN, LAYERS = 10, 2048, 5


@pytest.fixture
def text(tmp_path) -> Path:
    """As much as is needed, in documents whose ends are no ends of sequences."""
    folder = tmp_path / "text"
    folder.mkdir()
    documents = [words(3000, seed).decode() for seed in range(-(-STEPS * SEQ_LEN // 3001))]
    (folder / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def test_both_attentions_train_on_the_same_batches(text, tmp_path):
    sizes = {"seq-len": SEQ_LEN, "steps": STEPS, "layers": LAYERS, "width": 32, "heads": 1, "kv-heads": 1, "lr": 1e-2}
    flags = [f"--text={text}", f"--output={tmp_path}", *(f"--{name}={value}" for name, value in sizes.items())]
    # This process has imported the trainer, which on a CPU sets LOCAL_RANK: to accelerate, a launcher's.
    outside = {"LOCAL_RANK": "-1", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    printed = run([sys.executable, bench_transformers.__file__, "--models=llama", *flags], **outside).stdout
    lighthouse, sdpa = json.loads((tmp_path / "transformers.json").read_text())["runs"]
    assert (lighthouse["attention"], lighthouse["layers"]) == ("lighthouse", "2-2")
    assert (sdpa["attention"], sdpa["layers"]) == ("sdpa", None)
    assert lighthouse["batches"] == sdpa["batches"]
    for trained in lighthouse, sdpa:
        losses = trained["losses"]
        # From about ln 256 = 5.5 towards the 17 characters of the text.
        assert len(losses) == STEPS and losses[-1] < losses[0] - 1 and all(map(math.isfinite, losses)), losses
        assert trained["mean_loss_of_last"] == pytest.approx(sum(losses) / STEPS)
        assert sum(trained["kernels"].values()) == LAYERS
        assert f"| {trained['tokens_per_second']:,.0f} |" in printed
    assert lighthouse["losses"] != sdpa["losses"]
    assert lighthouse["losses"] == pytest.approx(sdpa["losses"], abs=0.3)  # one of five layers, and nothing else
    assert (tmp_path / "transformers.md").read_text() in printed


def test_too_little_text_is_refused(text):
    assert len(bench_transformers.examples(text, SEQ_LEN, STEPS)) == STEPS
    with pytest.raises(SystemExit, match=rf"nearest valid value: --steps {STEPS}$"):
        bench_transformers.examples(text, SEQ_LEN, STEPS + 1)
