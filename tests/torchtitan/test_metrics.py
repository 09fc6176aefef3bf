import json
import logging
import math
import os
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.experiments.lighthouse import resume_dense
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.experiments.lighthouse.metrics import (
    JsonlLogger,
    LighthouseMetricsProcessor,
    Progress,
    in_words,
    wandb_environment,
)
from torchtitan.experiments.lighthouse.runs.records import read_metrics, usual_rate
from torchtitan.experiments.lighthouse.seams.metrics import step_line
from torchtitan.experiments.lighthouse.validate import Counted
from torchtitan.tools.utils import Color, NoColor

from helpers.launch import losses, train
from helpers.settings import parse


def train_line(loss: float) -> dict:
    return {
        "loss_metrics/global_avg_loss": loss, "lr": 1e-3, "grad_norm": 0.5, "n_tokens_seen": 4096,
        "throughput(tps)": 100.0, "mfu(%)": 1.0, "memory/max_active(GiB)": 1.5, "memory/max_reserved(GiB)": 2.0,
        "time_metrics/end_to_end(s)": 1.0,
    }  # fmt: skip


def test_one_line_a_step_with_everything_in_it(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    logger = JsonlLogger(path, "stage1")
    logger.log(train_line(3.0), 1)
    logger.log({"validation_metrics/loss": 2.5, "validation_metrics/throughput(tps)": 7.0}, 1)
    train, validation = (json.loads(line) for line in path.read_text().splitlines())  # flushed without close
    assert train | {"time": 0, "wall_clock_s": 0} == {
        "step": 1, "stage": "stage1", "loss": 3.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_seen": 4096,
        "tokens_per_second": 100.0, "mfu_percent": 1.0, "memory_active_gib": 1.5, "memory_gib": 2.0, "time": 0,
        "wall_clock_s": 0,
    }  # fmt: skip
    assert validation["validation_loss"] == 2.5 and "loss" not in validation
    logger.close()


def test_a_line_says_how_many_dense_steps_its_rate_is_of(tmp_path, monkeypatch):
    """Since the line before it, validation's too: the clock begins anew there."""
    lines = JsonlLogger(tmp_path / "metrics.jsonl", "stage1")
    monkeypatch.setattr(MetricsProcessor, "log", lambda self, step, *_: lines.log(train_line(3.0) | _[-1], step))
    monkeypatch.setattr(MetricsProcessor, "log_validation", lambda *_: None)
    processor = LighthouseMetricsProcessor.__new__(LighthouseMetricsProcessor)
    processor.parallel_dims, processor._progress = SimpleNamespace(cp=1), Progress("stage1", 24)
    processor.dense_steps = 0
    for every in ("4", "0"):
        processor.job_config = parse("debug.toml", "--lighthouse.dense_every", every)
        for step in range(1, 25):
            processor.dense_steps += processor.job_config.lighthouse.is_dense_step(step)
            if step % 10 == 0 or step == 24:
                processor.log(step, 3.0, 3.0, 1.0, {"n_tokens_seen": 1})
            if step == 17:
                processor.log_validation(2.0, step)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    dense = [(record["step"], record.get("dense"), record.get("dense_steps")) for record in records]
    assert dense[:3] == [(10, False, 2), (20, True, 1), (24, True, 1)]
    assert dense[3:] == [(10, None, None), (20, None, None), (24, None, None)]


def test_a_line_says_how_many_records_were_skipped_and_dropped_where_that_is_asked_for(tmp_path, monkeypatch):
    lines = JsonlLogger(tmp_path / "metrics.jsonl", "stage1")
    monkeypatch.setattr(MetricsProcessor, "log", lambda self, step, *_: lines.log(train_line(3.0) | _[-1], step))
    processor = LighthouseMetricsProcessor.__new__(LighthouseMetricsProcessor)
    processor.parallel_dims, processor._progress = SimpleNamespace(cp=1), Progress("stage1", 3)
    processor.bad_records, processor.short_documents = 2, 3
    for step, setting in enumerate(("training.max_bad_records", "training.min_document_chars", "training.steps"), 1):
        processor.job_config = parse("debug.toml", f"--{setting}", "5")
        processor.log(step, 3.0, 3.0, 1.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record.get("bad_records"), record.get("short_documents")) for record in records] == [
        (2, None), (None, 3), (None, None),
    ]  # fmt: skip


def test_validation_is_in_bits_per_byte_of_the_text_that_was_used(tmp_path, monkeypatch):
    """Upstream asks for one batch more than it uses; begin and end of a text stand for no bytes."""
    tokenizer = build_tokenizer(parse("debug.toml"))
    document = [tokenizer.bos_id, *"naïve".encode(), tokenizer.eos_id]
    batches = [({}, torch.tensor([document, [*document[:7], IGNORE_INDEX]]))] * 3
    counted = Counted(batches, tokenizer)
    for _ in range(2):  # each validation counts anew
        for used, _ in enumerate(counted):
            if used == 2:
                break
        assert (counted.tokens, counted.bytes) == (2 * 15, 2 * 12)
    list(counted)
    assert (counted.tokens, counted.bytes) == (3 * 15, 3 * 12)
    others = iter([True, False])
    assert len(list(Counted(batches, tokenizer, lambda yes: yes and next(others)))) == 1
    with pytest.raises(DataError, match=r"too short for one sequence of .* on every data-parallel rank"):
        list(Counted([], tokenizer))

    given, lines = {}, JsonlLogger(tmp_path / "metrics.jsonl", "stage2")
    monkeypatch.setattr(MetricsProcessor, "log_validation", lambda self, loss, step, extra: given.update(extra))
    processor = LighthouseMetricsProcessor.__new__(LighthouseMetricsProcessor)
    processor.job_config = parse("debug.toml", "--lighthouse.no-enable", "--lighthouse.stage", "2")
    processor._progress, processor.bytes_per_token = Progress("stage2", 9), lambda: 12 / 15
    processor.log_validation(0.8 * math.log(2), 5)
    assert given == {"stage": 2, "validation_metrics/bits_per_byte": pytest.approx(1.0)}  # to TensorBoard and W&B
    lines.log({"validation_metrics/loss": 1.0} | given, 5)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["stage"], record["bits_per_byte"]) == ("stage2", pytest.approx(1.0))


def test_the_usual_rate_sees_dense_steps():
    """Seven steps of a second and one of three are eight of 1.25; medians, of each kind."""
    plain = [{"tokens_per_second": rate} for rate in (1.0, *[49.0] * 5)]  # the first one compiled
    assert usual_rate(plain) == 49
    mixed = [{"tokens_per_second": 30.0, "dense_steps": 0}] * 21 + [{"tokens_per_second": 10.0, "dense_steps": 1}] * 3
    assert usual_rate(mixed) == pytest.approx(30 / 1.25)
    mixed[0] = mixed[-1] = {"tokens_per_second": 0.1, "dense_steps": 1}
    assert usual_rate([*mixed, *mixed[21:23]]) == pytest.approx(26 / (20 / 30 + 6 / 10))


def test_a_resumed_run_appends_and_its_clock_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(path, "stage1")
    for step in (1, 2, 3):
        first.log(train_line(float(step)), step)
    first.close()
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1]) | {"wall_clock_s": 1000.0}
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + '\n{"step": 4, "sta')  # killed while it wrote
    again = JsonlLogger(path, "stage1")
    for step in (3, 4):
        again.log(train_line(10.0 * step), step)
    again.close()
    assert path.read_text().startswith("\n".join(lines[:2]))  # nothing on disk was lost
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert records[-1]["wall_clock_s"] >= 1000.0


def test_wandb_keeps_the_run_and_groups_the_stages(tmp_path):
    """The same id for the same folder, one group for both stages, another for another run."""

    def environment(folder, *overrides):
        return wandb_environment(parse("debug.toml", "--job.dump_folder", str(tmp_path / folder), *overrides))

    stage1 = environment("run")
    checkpoint = tmp_path / "run/checkpoint/step-75"
    stage2 = environment("run_dense", "--lighthouse.no-enable", "--lighthouse.stage1_checkpoint", str(checkpoint))
    assert stage1 == environment("run") and stage1["WANDB_RESUME"] == "allow"
    assert stage1["WANDB_RUN_ID"] != stage2["WANDB_RUN_ID"]
    assert stage1["WANDB_RUN_GROUP"] == stage2["WANDB_RUN_GROUP"] != environment("other")["WANDB_RUN_GROUP"]
    assert (stage1["WANDB_RUN_JOB_TYPE"], stage2["WANDB_RUN_JOB_TYPE"]) == ("stage1", "stage2")
    # A third stage finds the group through the second one's settings.
    (tmp_path / "run_dense/config.json").write_text(json.dumps({"lighthouse": {"stage1_checkpoint": str(checkpoint)}}))
    later = str(tmp_path / "run_dense/checkpoint/step-90")
    stage3 = environment("run_third", "--lighthouse.stage", "3", "--lighthouse.stage1_checkpoint", later)
    assert (stage3["WANDB_RUN_GROUP"], stage3["WANDB_RUN_JOB_TYPE"]) == (stage1["WANDB_RUN_GROUP"], "stage3")
    # All of them moved, though the settings name the old place; nothing comes to be there again.
    (tmp_path / "run/checkpoint/step-75").mkdir(parents=True)
    (tmp_path / "run_dense/checkpoint/step-90").mkdir(parents=True)
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    words = ["--lighthouse.stage", "3", "--lighthouse.stage1_checkpoint", later]
    again = wandb_environment(parse("debug.toml", "--job.dump_folder", str(moved / "run_third"), *words))
    assert again == stage3 and not tmp_path.exists()
    shutil.rmtree(moved / "run_dense")
    alone = wandb_environment(parse("debug.toml", "--job.dump_folder", str(moved / "run_third"), *words))
    assert alone["WANDB_RUN_ID"] == stage3["WANDB_RUN_ID"] and not tmp_path.exists()


def test_an_interrupted_wandb_run_goes_on_offline(tmp_path, monkeypatch):
    """No account, no network: both starts write under the same id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ("1", "2"):
        train(tmp_path, training__steps=steps, metrics__enable_wandb=None)
    runs = [name for path in tmp_path.rglob("wandb") for name in os.listdir(path) if name.startswith("offline-run-")]
    assert len(runs) == 2 and {name.rsplit("-", 1)[1] for name in runs} == {(tmp_path / "wandb_id").read_text()}


def test_a_run_says_what_it_is_how_far_it_has_come_and_what_comes_next(tmp_path, capsys):
    """Of a real run, into a pipe: the figures of a step are upstream's, and there are no colour codes."""
    output = train(tmp_path, training__steps="3").stdout
    lines = [line[len("2026-01-31 12:00:00 ") :] for line in output.splitlines()]
    steps = [number for number, line in enumerate(lines) if "grad_norm:" in line]
    beginnings = [re.match(r"Stage 1, step \d of 3, (.*?)  loss: .* memory: .* tps: \d", lines[n])[1] for n in steps]
    assert len(steps) == 3 and "step:" not in output and "\x1b" not in output and "titan]" not in output
    assert beginnings[0] == "time left not known yet" and re.fullmatch(r"\d+ s left", beginnings[1])
    assert beginnings[2] == "finished"
    start = [line for line in lines[: steps[0]] if not line.startswith("WARNING")]
    kinds = ["Lighthouse", "Model", "Attention", "Data", "Parallelism", "Step", "Schedule", "Writes to", "Stage 1"]
    assert [re.match(r"[A-Z][a-z]+( to| 1)?", line)[0] for line in start] == kinds
    assert "1,361,536 parameters" in start[1] and "1,024 tokens: 1,024 a sequence" in start[5]
    # Between the steps nothing, and one line for what was saved.
    assert steps == list(range(steps[0], steps[0] + 3))
    saved, complete, checkpoint, following = lines[steps[-1] + 1 :]
    assert saved.startswith(f"Saved {tmp_path}/checkpoint/step-3: ")
    assert complete.startswith("Stage 1 is complete: 3 of 3 steps; 3,072 tokens; ")
    assert f"; loss {losses(tmp_path)[3]:.4f}" in complete and checkpoint == f"Checkpoint: {tmp_path}/checkpoint/step-3"
    # The command that it names is one that works.
    words = shlex.split(following.partition("): ")[2])
    assert words[1:3] == ["-m", resume_dense.__name__]
    resume_dense.main([*words[3:], "--dry-run"])
    assert f"Stage 2 from {tmp_path}/checkpoint/step-3 (step 3) to step 20, dense" in capsys.readouterr().out


@pytest.mark.parametrize("color", [Color(), NoColor()])
def test_upstreams_own_line_of_a_step_is_the_one_that_changes(color, caplog):
    """Upstream's method itself: fails when its line no longer begins in the way that the seam knows."""
    memory = SimpleNamespace(**{f"max_{kind}": 1.0 for kind in (
        "active_gib", "active_pct", "reserved_gib", "reserved_pct")}, num_alloc_retries=0, num_ooms=0)  # fmt: skip
    processor = SimpleNamespace(
        num_flops_per_token=1, time_last_log=0.0, ntokens_since_last_log=1, gpu_peak_flops=1, data_loading_times=[0.0],
        parallel_dims=SimpleNamespace(non_data_parallel_size=1), color=color, logger=SimpleNamespace(log=lambda *_: 0),
        job_config=SimpleNamespace(metrics=SimpleNamespace(log_freq=1)),
        device_memory_monitor=SimpleNamespace(get_peak_stats=lambda: memory, reset_peak_stats=lambda: None),
    )  # fmt: skip

    def log(step):
        caplog.clear()
        processor.data_loading_times = [0.0]
        with caplog.at_level(logging.INFO):
            MetricsProcessor.log(processor, step, 2.0, 2.0, 1.0)
            MetricsProcessor.log_validation(processor, 2.0, step)
        return caplog.messages

    figures = re.compile(r"tps: .*")
    for step, number in ((5, " 5"), (12345, "12345")):
        before = log(step)
        with step_line("Stage 2, step 5 of 9"):
            after = log(step)
        assert len(before) == len(after) == 2
        for ours, theirs, found in zip(after, before, (f"step: {number}", f"validate step: {number}"), strict=True):
            assert f"{found}  " in theirs
            assert figures.sub("", ours) == figures.sub("", theirs.replace(found, "Stage 2, step 5 of 9"))
        assert all(f"step: {number}  " in line for line in log(step))


def test_other_messages_pass_unchanged(caplog):
    with caplog.at_level(logging.INFO), step_line("Stage 1"):
        logging.info("revalidate step:  5  loss:  2.0")
        logging.info("Saving at step: %d", 5)
    assert caplog.messages == ["revalidate step:  5  loss:  2.0", "Saving at step: 5"]


def test_time_left_follows_the_recent_steps():
    """A slow start is forgotten, and steps between two logged ones count."""
    progress = Progress("stage2", 2000)
    assert progress.after(1001, 0.0) == "Stage 2, step 1,001 of 2,000, time left not known yet"  # resumed
    assert progress.after(1010, 90.0) == "Stage 2, step 1,010 of 2,000, 2 h 45 min left"  # 10 s per step
    for line in range(1, 11):
        after = progress.after(1010 + 10 * line, 90.0 + 10.0 * line)
    assert after == "Stage 2, step 1,110 of 2,000, 15 min left"  # 1 s per step
    assert Progress("dense", 40).after(1, 0.0).startswith("dense, step  1 of 40, ")
    assert [in_words(s) for s in (0, 89, 91, 3599, 4 * 3600 + 300, 76 * 3600)] == [
        "0 s", "89 s", "2 min", "1 h 00 min", "4 h 05 min", "3 d 4 h",
    ]  # fmt: skip
