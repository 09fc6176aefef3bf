"""docs/your_own_run.md from its first line to its last but two, at a small size, with a kill in Stage 1."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the datasets
from torchtitan.experiments.lighthouse import evaluate, export_hf, plan, report, resume_dense

from helpers.launch import REPOSITORY, TRAINER, flags, losses, metrics, run_here
from helpers.processes import ForkedRun

PAGE = (REPOSITORY / "docs/your_own_run.md").read_text(encoding="utf-8")
COMMANDS = {
    "plan": plan, "resume_dense": resume_dense, "evaluate": evaluate, "report": report, "export_hf": export_hf,
}  # fmt: skip

#: What makes the page's run small.
SMALL = {
    "llama.dim": "64", "llama.n_layers": "5", "llama.n_heads": "4", "llama.n_kv_heads": "2", "llama.ffn_dim": "128",
    "lighthouse.layers": "2", "lighthouse.top_k": "128", "lighthouse.pooling_factor": "2",
    "lighthouse.local_window": "128", "training.seq_len": "1024", "training.global_batch_size": "1",
    "training.steps": "12", "lr_scheduler.total_steps": "15", "lr_scheduler.warmup_steps": "1", "optimizer.lr": "4e-3",
    "training.mixed_precision_param": "float32", "training.dataloader.num_workers": "0", "compile.no-enable": None,
    "parallelism.context_parallel_degree": "1", "activation_checkpoint.mode": "none", "checkpoint.interval": "4",
    "validation.freq": "6", "validation.steps": "2", "validation.seq_len": "1024", "metrics.log_freq": "1",
    "metrics.no-enable_tensorboard": None,
}  # fmt: skip


def commands() -> list[list[str]]:
    lines = re.sub(r"\\\n\s+", "", PAGE)
    return [
        shlex.split(line)
        for line in re.findall(r"^    (\w+ .+)$", re.sub(r"```.*?```", "", lines, flags=re.DOTALL), re.MULTILINE)
    ]


def train(settings: list[str], run: Path) -> None:
    """Killed with all its processes when it has saved once, and started again with the same command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *TRAINER, *settings]
    killed = ForkedRun(command, run.with_suffix(".killed"))
    killed.wait_until((run / "checkpoint/step-4").exists, "the first checkpoint")
    killed.kill()
    assert not (run / "checkpoint/step-12").exists()
    again = ForkedRun(command, run.with_suffix(".again"))
    assert again.wait() == 0, again.output()[-4000:]
    assert re.search(r"Loading the checkpoint from .*/step-(4|8)\.", again.output()), again.output()


def test_the_page_from_tokenizer_to_export(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")
    monkeypatch.chdir(tmp_path)
    code, toml = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "your_own_run.md", "exec"), {})
    # The ranks start elsewhere: all paths are whole.
    Path("DATA/mine.toml").write_text(toml.replace('"DATA/', f'"{tmp_path}/DATA/'))
    mine, dense, hf = (tmp_path / "outputs" / name for name in ("mine", "mine_dense", "mine_hf"))
    done = []
    for words in commands():
        words = [str(tmp_path / word) if re.match("(DATA|outputs)/", word) else word for word in words]
        if words[0] == "torchrun":
            train([*words[words.index("-m") + 2 :], "--job.dump_folder", str(mine), *flags(SMALL)], mine)
            done.append("train")
        elif words[0] == "python":
            name = re.fullmatch(r"scripts/(\w+)\.py", words[1])[1]
            words = ["2" if word == "64" else word for word in words]
            run = run_here if name == "resume_dense" else lambda main, *arguments: main(list(arguments))
            run(COMMANDS[name].main, *words[2:])
            done.append(name)
    assert done == ["plan", "train", "resume_dense", "evaluate", "report", "export_hf", "evaluate"]
    assert [words[0] for words in commands()][-2:] == ["lm_eval", "vllm"]

    stage1, stage2 = losses(mine), losses(dense)
    assert sorted(stage1) == list(range(1, 13)) and sorted(stage2) == [13, 14, 15]
    # What Stage 1 has learned is there: weights that know nothing start at the first step's loss.
    assert stage2[13] < (stage1[1] + stage1[12]) / 2
    held_out = {record["step"]: record["validation_loss"] for record in metrics(mine) if "validation_loss" in record}
    assert set(held_out) == {1, 6, 12} and held_out[12] < held_out[1] - 0.4
    ours, exported = (json.loads((folder / "evaluate/evaluate.json").read_text()) for folder in (dense, hf))
    assert ours["model"].endswith("/mine_dense/checkpoint/step-15")
    assert ours["settings"] == exported["settings"] and ours["settings"]["dataset"] == "held_out"
    for a, b in zip(ours["buckets"] + ours["curve"], exported["buckets"] + exported["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert 1 < ours["loss"] < stage1[1] - 0.3
    assert (hf / "evaluate/loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "outputs/report/summary.md").is_file()
