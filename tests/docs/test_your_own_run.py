"""docs/your_own_run.md from its first line to its last but two, at a small size."""

import json
import re
import shlex

import pytest
import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the datasets
from torchtitan.experiments.lighthouse import evaluate, export_hf, report, resume_dense

from helpers import ranks
from helpers.launch import REPOSITORY, environment, flags, losses, run_here

PAGE = (REPOSITORY / "docs/your_own_run.md").read_text(encoding="utf-8")
COMMANDS = {"resume_dense": resume_dense, "evaluate": evaluate, "report": report, "export_hf": export_hf}

#: What makes the page's run small.
SMALL = {
    "llama.dim": "64", "llama.n_layers": "5", "llama.n_heads": "4", "llama.n_kv_heads": "2", "lighthouse.top_k": "128",
    "lighthouse.pooling_factor": "2", "lighthouse.local_window": "128", "training.seq_len": "1024",
    "training.global_batch_size": "1", "training.steps": "12", "lr_scheduler.total_steps": "15",
    "lr_scheduler.warmup_steps": "1", "optimizer.lr": "1e-2", "training.mixed_precision_param": "float32",
    "compile.no-enable": None, "activation_checkpoint.mode": "none", "validation.no-enable": None,
    "metrics.log_freq": "1", "metrics.no-enable_tensorboard": None, "training.dataloader.num_workers": "0",
}  # fmt: skip


def commands() -> list[list[str]]:
    lines = re.sub(r"\\\n\s+", "", PAGE)
    return [
        shlex.split(line)
        for line in re.findall(r"^    (\w+ .+)$", re.sub(r"```.*?```", "", lines, flags=re.DOTALL), re.MULTILINE)
    ]


def test_the_page_from_tokenizer_to_export(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "your_own_run.md", "exec"), {})
    done = []
    for words in commands():
        # The ranks start elsewhere: all paths are whole.
        words = [str(tmp_path / word) if re.match("(DATA|outputs)/", word) else word for word in words]
        if words[0] == "torchrun":
            settings = words[words.index("-m") + 2 :]
            settings[settings.index("--job.config_file") + 1] = str(REPOSITORY / settings[1])
            result = ranks.start(1, [*settings, *flags(SMALL)], environment())
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
            done.append("train")
        elif words[0] == "python":
            name = re.fullmatch(r"scripts/(\w+)\.py", words[1])[1]
            more = ["--seq-len", "1024", "--sequences", "2"] if name == "evaluate" else []
            run = run_here if name == "resume_dense" else lambda main, *arguments: main(list(arguments))
            run(COMMANDS[name].main, *words[2:], *more)
            done.append(name)
    assert done == ["train", "resume_dense", "evaluate", "report", "export_hf", "evaluate"]
    assert [words[0] for words in commands()][-2:] == ["lm_eval", "vllm"]
    stage1, stage2 = (losses(tmp_path / f"outputs/{name}") for name in ("mine", "mine_dense"))
    assert sorted(stage1) == list(range(1, 13)) and sorted(stage2) == [13, 14, 15]
    # What Stage 1 has learned is there: weights that know nothing start at the first step's loss.
    assert stage2[13] < (stage1[1] + stage1[12]) / 2 and stage1[12] < stage1[1] - 0.5
    ours, exported = (
        json.loads((tmp_path / f"outputs/{name}/evaluate/evaluate.json").read_text())
        for name in ("mine_dense", "mine_hf")
    )
    assert ours["model"].endswith("/mine_dense/checkpoint/step-15")
    assert ours["settings"] == exported["settings"] | {"dataset_path": ours["settings"]["dataset_path"]}
    assert ours["bits_per_byte"] == pytest.approx(exported["bits_per_byte"], rel=1e-5)
    assert 1 < ours["loss"] < stage1[1] - 0.3
    assert (tmp_path / "outputs/report/summary.md").is_file()
