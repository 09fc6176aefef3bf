"""Whole runs on CPU, over gloo where there are several processes."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.lighthouse import sampling
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs import lock
from torchtitan.experiments.lighthouse.runs.settings import load_model, read_settings

from helpers.launch import (
    arguments,
    assert_same_position,
    assert_same_training_state,
    config_of,
    load_checkpoint,
    losses,
    metrics,
    run_ranks,
    train,
)

#: The trainer with a stand-in for CUDA graphs.
GRAPHED = Path(__file__).with_name("seams") / "cuda_graph_worker.py"
RECORDED = "run as a CUDA graph from now on"


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Eight uninterrupted steps of two sequences each, one process."""
    folder = tmp_path_factory.mktemp("baseline")
    train(folder, training__steps="8", training__local_batch_size="2")
    return folder


def test_loss_falls_and_every_step_is_logged(baseline):
    records = metrics(baseline)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert all(record["stage"] == "stage1" and record["memory_gib"] > 0 for record in records)
    assert records[-1]["tokens_seen"] == 8 * 2 * 1024
    assert config_of(baseline)["lighthouse"]["enable"] is True


def test_changed_optimizer_settings_take_effect_on_resume(baseline, tmp_path):
    """In the very first step; what is not changed is not touched (bit for bit: tests/faults)."""
    shutil.copytree(baseline, tmp_path / "run")
    changed = {"optimizer__lr": "1e-4", "optimizer__weight_decay": "0.3", "lr_scheduler__total_steps": "30"}
    resumed = train(tmp_path / "run", training__steps="10", training__local_batch_size="2", **changed)
    said = resumed.stdout + resumed.stderr
    for line in ("optimizer.lr 0.002 → 0.0001", "optimizer.weight_decay 0.1 → 0.3", "learning rate 0.002 → 0.0001"):
        assert f"Not as in the checkpoint: {line}\n" in said
    assert [record["lr"] for record in metrics(tmp_path / "run")[-2:]] == pytest.approx([1e-4, 1e-4])
    state = load_checkpoint(tmp_path / "run/checkpoint/step-10", tmp_path / "all")
    assert {value for name, value in state["optimizer"].items() if name.endswith(".weight_decay")} == {0.3}
    # A tenth of the rate, a tenth of the way: two steps of AdamW move a weight by less than two rates.
    before = load_checkpoint(baseline / "checkpoint/step-8", tmp_path / "before")
    name = "layers.0.attention.wq.weight"
    assert 0 < (state[name] - before[name]).abs().max() < 2.5e-4


def test_a_recorded_step_trains_the_same(baseline, tmp_path):
    """``training.cuda_graph``, with a stand-in for the graph: the same bits, also of a run that goes on."""
    settings = {"training__local_batch_size": "2", "checkpoint__interval": "4", "training__cuda_graph": None}
    for _ in range(2):
        printed = run_ranks(GRAPHED, 1, *arguments(tmp_path, training__steps="8", **settings)).stdout
        assert printed.count(RECORDED) == 1
        assert_trained_the_same(tmp_path, baseline, 8)
        shutil.rmtree(tmp_path / "checkpoint/step-8")


def test_recorded_steps_of_two_kinds_accumulate(tmp_path):
    """Dense steps among those through Lighthouse, two batches a step, and validation in between."""
    settings = {
        "training__steps": "5", "training__global_batch_size": "2", "lighthouse__dense_every": "2",
        "validation__enable": None, "validation__seq_len": "1024", "validation__steps": "1", "validation__freq": "3",
    }  # fmt: skip
    plain, graphed = tmp_path / "plain", tmp_path / "graphed"
    train(plain, **settings)
    printed = run_ranks(GRAPHED, 1, *arguments(graphed, training__cuda_graph=None, **settings)).stdout
    assert printed.count(RECORDED) == 2
    assert_trained_the_same(graphed, plain, 5)


def assert_trained_the_same(run: Path, other: Path, step: int) -> None:
    """Every number of the log but times, memory and rates, and the last checkpoint."""
    names = ("step", "loss", "grad_norm", "lr", "validation_loss", "dense")
    ours, theirs = ([{name: r.get(name) for name in names} for r in metrics(folder)] for folder in (run, other))
    assert ours == theirs and ours[-1]["step"] == step
    saved = (load_checkpoint(folder / f"checkpoint/step-{step}", folder / "all") for folder in (run, other))
    assert_same_training_state(*saved)


def test_saves_come_by_minutes_too(tmp_path):
    train(tmp_path, training__steps="6", checkpoint__interval_minutes="0.0001")
    assert {f"step-{step}" for step in (3, 4, 5, 6)} <= {path.name for path in (tmp_path / "checkpoint").iterdir()}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    """By who holds it; the lock of a dead process is free."""
    hold = "import sys, time; from pathlib import Path; from torchtitan.experiments.lighthouse.runs import lock"
    code = f"{hold}; lock.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    said = f"a run is at work there (process {holder.pid} on {socket.gethostname()}, since 2"
    for attempt in (lambda: lock.refuse_if_held(tmp_path), lambda: lock.hold(tmp_path, patience=0.5)):
        with pytest.raises(Refused, match=re.escape(said)):
            attempt()
    second = train(tmp_path, check=False, training__steps="1")
    assert second.returncode and said in second.stderr and not metrics(tmp_path)
    holder.kill()
    holder.wait()
    lock.refuse_if_held(tmp_path)
    lock.hold(tmp_path)
    lock.hold(tmp_path)
    assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file/run", "Not a directory")):
        with pytest.raises(Refused, match=f"{folder}: no run can be started there: {why}"):
            lock.hold(folder)


def test_gradient_accumulation_equals_a_larger_batch(baseline, tmp_path):
    """Loss and gradient norm of the first step, and, with room for what AdamW makes of float32 noise, of the second,
    which sees the first one's update. Later steps may part: noise decides between scores that nearly tie."""
    train(tmp_path, training__steps="2", training__local_batch_size="1", training__global_batch_size="2")
    for ours, theirs in zip(metrics(tmp_path), metrics(baseline), strict=False):
        for name in ("loss", "grad_norm"):
            rel = 1e-5 if ours["step"] == 1 else 1e-3
            assert ours[name] == pytest.approx(theirs[name], rel=rel), (ours["step"], name)


def test_fsdp_trains_validates_and_resumes(tmp_path):
    """Two ranks, with activation checkpointing, compilation, deterministic mode and dense steps: resumed from the save
    of step 2, now with layers offloaded, equal to the bit to the run that went on. Validation ends with the rank that
    has less text."""
    text = Path(json.__file__).read_text()
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": text[:n]}) + "\n" for n in (2200, 1100)))
    settings = {
        "activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op",
        "compile__enable": None, "compile__backend": "aot_eager", "debug__deterministic": None,
        "lighthouse__dense_every": "3",
        "validation__enable": None, "validation__seq_len": "1024",
        "validation__dataset": "c4_local_validation", "validation__dataset_path": str(tmp_path),
        "validation__local_batch_size": "1", "validation__steps": "-1", "validation__freq": "2",
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Samples of text change nothing.
    samples = {"metrics__sample_freq": "3", "metrics__sample_prompt": "import "}
    printed = train(whole, 2, training__steps="4", checkpoint__interval="1", **samples, **settings).stdout
    # By one of the ranks; step 1 is validated too.
    assert [printed.count(f"Stage 1, step {step} of 4, ") for step in (1, 2, 3, 4)] == [2, 2, 2, 2]
    (sample,) = (r for r in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()) if "sample" in r)
    step_3 = whole / "checkpoint/step-3"
    tokenizer, model = (
        build_tokenizer(read_settings(step_3)),
        load_model(step_3, read_settings(step_3), dense=True, device="cpu"),
    )
    prompt = [tokenizer.bos_id, *b"import "]
    assert sample["step"] == 3 and len(sample["sample"]) > 9
    assert sample["sample"] == sampling.write(model, tokenizer, prompt, torch.device("cpu"))
    assert f"Stage 1, step 3 of 4, sample: {'import ' + sample['sample']!r}\n" in printed
    assert printed.count("Stage 1 is complete") == printed.count("bits per byte (") + 1 == 1
    # As if it had been stopped there: to train up to it again would compile all of it again.
    shutil.copytree(whole / "checkpoint/step-2", parts / "checkpoint/step-2")
    records = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (parts / "metrics.jsonl").write_text("".join(line for line in records if json.loads(line)["step"] <= 2))
    # Of new weights, no column is negligible.
    same = {"activation_checkpoint__offload_layers": "4", "training__sparse_loss_gradient": None}
    said = train(parts, 2, training__steps="4", **settings, **same).stdout
    assert "Not as in the checkpoint: training.sparse_loss_gradient False → True" in said
    assert [r["gradient_share"] for r in metrics(parts) if "gradient_share" in r] == [1, 1]
    assert losses(whole) == losses(parts) and len(losses(whole)) == 4
    assert losses(whole)[4] < losses(whole)[1]
    validated = [record for record in metrics(whole) if "validation_loss" in record]
    assert len(validated) == 3 and validated[-1]["validation_loss"] < validated[0]["validation_loss"]
    # Over both ranks' text: all tokens but those that begin and end a text are a byte.
    bytes_per_token = [r["validation_loss"] / math.log(2) / r["bits_per_byte"] for r in validated]
    assert all(0.98 < ratio <= 1 for ratio in bytes_per_token)
    ours, theirs = (load_checkpoint(run / "checkpoint/step-4", tmp_path / f"all-{run.name}") for run in (parts, whole))
    assert_same_training_state(ours, theirs)
    assert_same_position(ours, theirs, 2)


def test_every_second_step_is_dense(tmp_path):
    """Counted from the start of the run, wherever it stopped. To the bit the step that a dense run makes from the same
    checkpoint; validation after it is through Lighthouse. Two micro-batches a step."""
    settings = {
        "training__global_batch_size": "2", "validation__enable": None, "validation__dataset": "stdlib_validation",
        "validation__seq_len": "1024", "validation__local_batch_size": "1", "validation__steps": "1",
        "validation__freq": "1",
    }  # fmt: skip
    mixed, switched = tmp_path / "mixed", tmp_path / "switched"
    for last in ("1", "3"):
        train(mixed, training__steps=last, **settings, lighthouse__dense_every="2")
    train(switched, training__steps="1", **settings)
    allowed = {"checkpoint__allow_changed": "lighthouse.enable"}
    train(switched, training__steps="2", **settings, lighthouse__no_enable=None, **allowed)
    ours, theirs = ([r for r in metrics(run) if "loss" in r] for run in (mixed, switched))
    assert [(r["loss"], r["grad_norm"]) for r in ours[:2]] == [(r["loss"], r["grad_norm"]) for r in theirs]
    assert [(r["dense"], r["dense_steps"]) for r in ours] == [(False, 0), (True, 1), (False, 0)]
    assert not any("dense" in record for record in theirs)
    ours, theirs = ([r["validation_loss"] for r in metrics(run) if "validation_loss" in r] for run in (mixed, switched))
    assert ours[0] == theirs[0] and ours[1] != theirs[1]  # each the first of its process, on the same text


@pytest.mark.parametrize(("nproc", "log_freq"), [(1, 1), (2, 1), (1, 100)])
def test_a_nonfinite_loss_stops_the_run_before_it_is_saved(nproc, log_freq, tmp_path):
    """Also where steps are not logged, and so not waited for: then the save waits."""
    result = train(
        tmp_path, nproc, check=False, training__steps="5", optimizer__lr="1e30", lr_scheduler__warmup_steps="0",
        checkpoint__interval="1", metrics__log_freq=str(log_freq),
    )  # fmt: skip
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "FloatingPointError: step 2: " in output and "Nothing was saved after step 1" in output
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-1"]
    assert list(losses(tmp_path)) == [1]


def test_a_nonfinite_loss_stops_a_run_that_neither_logs_nor_saves(tmp_path):
    """A step late."""
    result = train(
        tmp_path, check=False, training__steps="5", optimizer__lr="1e30", lr_scheduler__warmup_steps="0",
        metrics__log_freq="100",
    )  # fmt: skip
    assert result.returncode != 0 and "FloatingPointError: step 2: " in result.stdout + result.stderr
    assert not (tmp_path / "checkpoint").exists()


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path):
    """Loss and gradients were finite: only the save looks at what the optimizer has made of them."""
    result = train(
        tmp_path, 2, check=False, training__steps="3", optimizer__lr="1e39", lr_scheduler__warmup_steps="0",
        checkpoint__interval="1",
    )  # fmt: skip
    assert result.returncode
    said = "step 1 is not saved: tok_embeddings.weight holds NaN or infinite numbers (on rank 0)"
    assert said in result.stdout + result.stderr
    assert not (tmp_path / "checkpoint/step-1").exists()


def test_a_stage_2_that_loads_nothing_is_an_error(tmp_path):
    """An unfinished checkpoint makes upstream ignore initial_load_path and start from random weights, in silence."""
    (tmp_path / "checkpoint/step-3").mkdir(parents=True)
    result = train(
        tmp_path, check=False, training__steps="2", lighthouse__no_enable=None,
        lighthouse__stage1_checkpoint="/nowhere/checkpoint/step-3",
    )  # fmt: skip
    assert result.returncode != 0 and "Stage 2 loaded no checkpoint" in result.stdout + result.stderr
    assert losses(tmp_path) == {}
