import json
import os

from torchtitan.experiments.lighthouse.metrics import JsonlLogger, wandb_environment
from torchtitan.experiments.lighthouse.runs.records import read_metrics

from helpers.launch import train
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


def test_an_interrupted_wandb_run_goes_on_offline(tmp_path, monkeypatch):
    """No account, no network: both starts write under the same id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ("1", "2"):
        train(tmp_path, training__steps=steps, metrics__enable_wandb=None)
    runs = [name for path in tmp_path.rglob("wandb") for name in os.listdir(path) if name.startswith("offline-run-")]
    assert len(runs) == 2 and {name.rsplit("-", 1)[1] for name in runs} == {(tmp_path / "wandb_id").read_text()}
