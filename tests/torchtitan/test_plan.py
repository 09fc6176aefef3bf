"""The command that says what a run will cost."""

import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from torchtitan.experiments.lighthouse import plan
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.job_config import check_degrees
from torchtitan.experiments.lighthouse.planning import choices
from torchtitan.experiments.lighthouse.planning.workload import workload
from torchtitan.experiments.lighthouse.seams.settings import CheckedConfigManager
from torchtitan.experiments.lighthouse.train import check_tokenizer

from helpers.settings import REPOSITORY, model_args, parse

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536, "vocab_size": 1000,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stop:
        plan.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_plan_and_its_settings(tmp_path: Path, capsys):
    """Of a Hugging Face model, with the trainer's settings after the --; the trainer takes what was written."""
    model, file = tmp_path / "config.json", tmp_path / "drafts/mine.toml"
    model.write_text(json.dumps(LLAMA))
    plan.main([
        *("--model", str(model), "--seq-len", "65536", "--gpus", "4", "--tokens", "1e9", "--split", "3:1"),
        *("--toml", str(file), "--", "--lighthouse.local_window=512", "--training.seq_len=32768"),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    model.unlink()
    settings = CheckedConfigManager().parse_args(["--job.config_file", str(file)])
    args = model_args(settings)  # refuses an invalid geometry
    check_degrees(settings.parallelism, 4)
    check_tokenizer(settings)
    assert (args.dim, args.n_kv_heads, args.vocab_size, args.lighthouse_layers) == (512, 4, 1000, tuple(range(2, 10)))
    assert settings.training.seq_len == 32768 and settings.lighthouse.local_window == 512
    assert settings.lighthouse.top_k == 512 and "S = 6,144 rows, 18.8%" in printed, "the paper's share"
    tokens = settings.training.global_batch_size * 32768
    assert settings.lr_scheduler.total_steps == round(1e9 / tokens)
    assert settings.training.steps == pytest.approx(0.75 * settings.lr_scheduler.total_steps, abs=1)
    assert settings.checkpoint.interval_minutes == 60 and "one every 60 minutes" in printed
    assert "→  none" in printed and settings.activation_checkpoint.mode == "none"
    # The plan is in the file, and the file is as it was printed.
    comment = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
    assert {line for line in comment[1:] if line} <= set(printed.splitlines())
    assert "hf_config" not in tomllib.loads(file.read_text())["model"]
    # What to do with it, and what not to rely on.
    assert f"--nproc_per_node 4 -m torchtitan.experiments.lighthouse.train --job.config_file {file}" in printed
    assert settings.job.dump_folder == "./outputs/mine" and "resume_dense.py ./outputs/mine" in printed
    assert "258 tokens for the 1,000 rows of the model" in printed
    assert "less sure: more than 2 GPUs, head dimension 64, this GPU's window_forward" in printed


def test_a_model_brings_its_tokenizer(tmp_path: Path, capsys):
    """A folder from the Hub; one token more than the model has rows is refused before a file is written."""
    model, file = tmp_path / "model", tmp_path / "mine.toml"
    shutil.copytree(BYTE_TOKENIZER_PATH, model)
    (model / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 258}))
    arguments = ["--model", str(model), "--seq-len", "65536", "--gpus", "2", "--toml", str(file)]
    plan.main(arguments)
    assert f"tokenizer: {model}, 258 tokens" in capsys.readouterr().out
    assert tomllib.loads(file.read_text())["model"]["hf_assets_path"] == str(model)
    file.unlink()
    (model / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 257}))
    assert "258 tokens, but the model" in refusal(arguments, capsys) and not file.exists()


def test_what_cannot_be_planned_is_one_line(capsys):
    message = refusal(["--model", "530m", "--seq-len", "98304", "--top-k", "1500"], capsys)
    assert "top_k=1500" in message and "nearest valid values: 1408 or 1536" in message
    message = refusal(["--model", "530m", "--seq-len", "98310"], capsys)
    assert "seq_len=98310: must be divisible by" in message and "98304" in message
    message = refusal(["--model", "32m", "--seq-len", "98304", "--memory", "2"], capsys)
    assert "memory of 2 GiB" in message and "nearest valid value: 6 GiB" in message and "'full'" in message
    assert "must divide the 4 GPUs; nearest valid value: 2" in refusal(
        ["--gpus", "4", "--context-parallel", "3"], capsys
    )
    assert "whole nodes of 8; nearest valid value: 16" in refusal(["--gpus", "13"], capsys)
    assert "must be a flavor (530m" in refusal(["--model", "7b"], capsys)
    for tokens in ("-3", "inf", "nan"):
        assert "nearest valid value: 1" in refusal(["--tokens", tokens], capsys)
    assert "--toml /proc/x.toml: cannot be written" in refusal(["--toml", "/proc/x.toml"], capsys)
    with pytest.raises(SystemExit):
        plan.main(["--split", "10:0"])
    assert "--split: 10:0: must be two positive numbers, such as 10:6" in capsys.readouterr().err
    assert "there is no GPU here" in refusal(["--measure", "x.json"], capsys)


def test_a_longer_context_takes_more_gpus_for_each_sequence(capsys):
    """A file of settings, on GPUs that do not hold a sequence each."""
    config = str(REPOSITORY / "train_configs/530m_cp.toml")
    plan.main(["--model", config, "--seq-len", "524288", "--gpus", "8", "--memory", "30"])
    chosen = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("→"))
    assert int(chosen.split()[2]) > 1 and chosen.endswith("fits") and not chosen.endswith("does not fit")


def test_kernels_that_split_no_sequence_are_planned_without(capsys):
    said = {}
    for name in ("auto", "flash4"):
        plan.main(["--model", "530m", "--top-k", "1024", "--gpus", "2", "--", "--lighthouse.inner_attention", name])
        said[name] = capsys.readouterr().out
    ways = {name: sum(line.startswith(("→  ", "   ")) for line in text.splitlines()) for name, text in said.items()}
    assert ways["flash4"] < ways["auto"]
    assert "attention by 'flash4' (the rates are of cuDNN)" in said["flash4"] and "Not measured" not in said["auto"]


@pytest.mark.parametrize("config", sorted(file.name for file in (REPOSITORY / "train_configs").glob("*.toml")))
def test_every_file_of_settings_is_planned(config, capsys):
    """On a node of H100s; the demo, which is for CPUs too, is refused in one line."""
    file = REPOSITORY / "train_configs" / config
    arguments = ["--model", str(file), "--gpus", "8", "--gpu", "h100"]
    if config == "demo.toml":
        assert "training.mixed_precision_param=float32" in refusal(arguments, capsys)
        return
    plan.main(arguments)
    printed = capsys.readouterr().out
    assert any(line.startswith("→") and line.endswith(" fits") for line in printed.splitlines())
    chosen = next(line for line in printed.splitlines() if line.startswith("→"))
    # Nobody has measured this mode.
    assert ("mode='memory_budget'" in printed) == ("memory_budget" in chosen)


def test_a_chain_that_begins_with_short_sequences(tmp_path, capsys):
    """The recommended recipe as README has it: its first command runs what was planned, and all hours add up."""
    file, readme = tmp_path / "mine.toml", (REPOSITORY / "README.md").read_text()
    config = str(REPOSITORY / "train_configs/530m_recommended.toml")
    arguments = ["--model", config, "--gpus", "8", "--gpu", "h100", "--short"]
    plan.main([*arguments, "8192:4000", "--toml", str(file)])
    printed = capsys.readouterr().out
    first, stage1, stage2 = (
        next(line for line in printed.splitlines() if line.startswith(f"{name}: ")).split(": ", 1)[1]
        for name in ("Dense at 8,192", "Stage 1", "Stage 2")
    )
    words = first.split("--job.config_file ")[1].split()
    settings = CheckedConfigManager().parse_args(["--job.config_file", *words])
    work = workload(settings, 8)
    assert not work.lighthouse_layers and settings.training.steps == 4000
    assert (work.seq_len, work.sequences_at_once, work.sequences_per_step) == (8192, 12, 384)
    sizes = "--training.seq_len 8192 --training.local_batch_size 12 --training.global_batch_size 384"
    assert sizes in first and sizes in readme
    assert "--attention lighthouse --seq-len 98304 --total-steps 14000" in stage1 and "8192" not in stage1
    assert stage1.split()[2] + "_lighthouse_98304" == stage2.split()[2]
    names = re.compile("dense at|Stage 1  |Stage 2, |all stages")
    rows = [re.split("  +", line) for line in printed.splitlines() if names.match(line)]
    steps, hours = ([float(cells[n].replace(",", "")) for cells in rows] for n in (1, -1))
    assert steps == [4000, 10000, 2000, 16000] and hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.2)
    message = refusal([*arguments, "9000:4000"], capsys)
    assert "--short 9000" in message and "nearest valid value: 8192" in message
    assert "nearest valid value: 8192:13999" in refusal([*arguments, "8192:14000"], capsys)
    with pytest.raises(SystemExit):
        plan.main([*arguments, "8192"])
    assert "must be two positive whole numbers, such as 8192:4000" in capsys.readouterr().err


def test_a_step_that_waits_for_the_host_names_the_graph(capsys):
    """With the graph the prediction is what was promised without; only checkpointing that it goes with is offered."""
    config = ["--model", str(REPOSITORY / "train_configs/32m_32k.toml"), "--gpu", "h100"]
    plan.main(config)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "waits for the host" in line)
    speed = re.search(r"training.cuda_graph=true: ([\d,]+) tokens/s/GPU", line)[1]
    plan.main([*config, "--", "--training.cuda_graph"])
    printed = capsys.readouterr().out
    assert f"→  none           1                 5.5 / 6.1  {speed} /" in printed and "waits" not in printed
    assert "selective  " not in printed and "training.cuda_graph (one model was measured)" in printed
    plan.main([*config, "--gpus", "8"])
    assert "waits for the host" in (printed := capsys.readouterr().out) and "local_batch_size" in printed
    message = refusal([*config, "--checkpointing", "full", "--", "--training.cuda_graph"], capsys)
    assert "activation_checkpoint.mode='full'" in message and "nearest valid value: false" in message


def test_the_memory_that_a_refusal_names_is_enough(capsys):
    base = ["--model", "32m", "--seq-len", "98304"]
    plan.main([*base, "--memory", "6", "--checkpointing", "full"])
    assert "→  full" in capsys.readouterr().out


def test_layers_that_a_refusal_offloads_are_enough(tmp_path, capsys):
    """A sequence that does not fit; with the host's memory for the inputs of layers it does, and the file says so."""
    base = ["--model", "530m", "--seq-len", "2097152", "--tokens", "1e10"]
    words = ["--lighthouse.layers=0--1", "--lighthouse.num_levels=4"]
    message = refusal([*base, "--", *words], capsys)
    layers = int(re.search(r"offload_layers=(\d+), with (\d+) GiB of host memory a GPU, or more GPUs", message)[1])
    offloaded = f"--activation_checkpoint.offload_layers={layers}"
    plan.main([*base, "--toml", str(tmp_path / "mine.toml"), "--", *words, offloaded])
    printed = capsys.readouterr().out
    assert "→  full" in printed and f"Host memory: {4 * layers} GiB" in printed and "none  " not in printed
    written = tomllib.loads((tmp_path / "mine.toml").read_text())["activation_checkpoint"]
    assert (written["mode"], written["offload_layers"]) == ("full", layers)
    refusal([*base, "--", *words, f"--activation_checkpoint.offload_layers={layers - 1}"], capsys)


def test_checkpoints_are_as_rare_as_failures():
    """Young's rule: 4 times the GPUs, half the minutes; never further apart than an hour."""
    work = workload(parse("530m_stage1.toml"), 8)
    at = {gpus: choices.interval_minutes(replace(work, gpus=gpus), 1e8) for gpus in (8, 8192, 32768)}
    assert at[8] == choices.LONGEST and at[8192] == pytest.approx(2 * at[32768], abs=1) and at[32768] >= 5
