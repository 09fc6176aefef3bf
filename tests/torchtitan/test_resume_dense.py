import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchtitan.experiments.lighthouse import resume_dense
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs import stage2 as contract

from helpers.launch import (
    REPOSITORY,
    SMALL,
    assert_same_position,
    assert_same_training_state,
    config_of,
    flags,
    load_checkpoint,
    losses,
    metrics,
    run,
    train,
)
from helpers.settings import parse

SCRIPT = REPOSITORY / "scripts/resume_dense.py"


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    """Four steps through Lighthouse, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    train(folder, training__steps="4", checkpoint__interval="2")
    return folder


@pytest.fixture
def copy(stage1, tmp_path) -> Path:
    """A Stage 1 run that a test may damage."""
    return shutil.copytree(stage1, tmp_path / "stage1")


def resume(*words, check=True):
    return run([sys.executable, str(SCRIPT), *map(str, words)], check=check)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


def refusal(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        resume_dense.main([*map(str, words), "--dry-run"] if "--" not in words else list(map(str, words)))
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("resume_dense: ")
    return stop.value.code


def test_stage_2_takes_everything_over_and_survives_interruption(stage1, tmp_path):
    before = contents(stage1)
    stage2 = tmp_path / "stage2"
    result = resume(stage1, "--total-steps", 6, "--dump-folder", stage2)

    log = result.stdout
    assert re.search(r"dense in all 6 layers", log)
    assert f"Stage 1 checkpoint: {stage1}/checkpoint/step-4" in log
    assert re.search(
        r"stage2 starts after step 4, 4,096 tokens seen; learning rate 2\.0000e-03 before .*, 2\.0000e-03 after", log
    )
    assert contents(stage1) == before
    assert [record["stage"] for record in metrics(stage2)] == ["stage2"] * 2
    assert metrics(stage2)[0]["tokens_seen"] == 5 * 1024

    # The same continuation by upstream's own means: the run's folder copied, Lighthouse switched off, more steps.
    manual = shutil.copytree(stage1, tmp_path / "manual")
    train(manual, training__steps="6", lighthouse__no_enable=None)
    assert losses(stage2) == {step: losses(manual)[step] for step in (5, 6)}
    ours, theirs = (load_checkpoint(r / "checkpoint/step-6", tmp_path / f"all-{r.name}") for r in (stage2, manual))
    assert_same_training_state(ours, theirs)
    assert_same_position(ours, theirs, 1)

    # Interrupted while it saved its first checkpoint: the unfinished one is set aside, Stage 1's is read again.
    shutil.rmtree(stage2 / "checkpoint")
    (stage2 / "checkpoint/step-6").mkdir(parents=True)
    resume(stage1, "--total-steps", 6, "--dump-folder", stage2)
    assert (stage2 / "checkpoint.unfinished-1/step-6").is_dir()
    assert_same_training_state(load_checkpoint(stage2 / "checkpoint/step-6", tmp_path / "again"), theirs)
    # Complete: nothing more happens. Longer: it goes on from its own checkpoint.
    assert "is complete" in resume(stage1, "--total-steps", 6, "--dump-folder", stage2).stdout
    longer = resume(stage1, "--total-steps", 7, "--dump-folder", stage2).stdout
    assert f"Loading the checkpoint from {stage2}/checkpoint/step-6" in longer and 7 in losses(stage2)


def test_dry_run_prints_a_command_and_its_settings(stage1, tmp_path, capsys):
    folder = tmp_path / "dry"
    resume_dense.main([str(stage1), "--dump-folder", str(folder), "--dry-run", "--", "--metrics.log_freq", "5"])
    printed = capsys.readouterr().out
    *_, command = printed.splitlines()
    settings = tomllib.loads(printed.partition("stage2.toml would hold:\n")[2].rpartition("\n\n")[0])
    assert (
        f"--nproc_per_node=1 -m torchtitan.experiments.lighthouse.train --job.config_file {folder}/stage2.toml"
        in command
    )
    assert command.endswith("--metrics.log_freq 5") and "metrics.log_freq: 1 -> 5" in printed
    assert settings["training"]["steps"] == 20  # the schedule's length
    assert settings["lighthouse"]["enable"] is False
    assert settings["checkpoint"]["initial_load_path"] == f"{stage1}/checkpoint/step-4"
    assert settings["checkpoint"]["initial_load_model_only"] is False
    unchanged = {"model", "optimizer", "lr_scheduler", "parallelism", "debug"}
    for section in unchanged:
        known = {name: value for name, value in config_of(stage1)[section].items() if value is not None}
        assert settings[section] == known
    assert not folder.exists()
    # A settings file alone is no run: another checkpoint may still take the folder.
    folder.mkdir()
    (folder / "stage2.toml").write_text("")
    resume_dense.main([str(stage1 / "checkpoint/step-2"), "--dump-folder", str(folder), "--dry-run"])
    assert f"from {stage1}/checkpoint/step-2 (step 2)" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["stage2.toml"] and not (folder / "stage2.toml").read_text()


def test_default_folder_and_a_named_launcher(stage1, capsys):
    words = "--nnodes 1 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint host:29500"
    resume_dense.main([str(stage1), "--torchrun", words, "--dry-run"])
    printed = capsys.readouterr().out
    assert f"{words} -m torchtitan.experiments.lighthouse.train" in printed
    assert f"{stage1.parent}/stage1_dense/stage2.toml" in printed and not (stage1.parent / "stage1_dense").exists()


def test_settings_that_toml_cannot_hold_survive(copy, capsys):
    config = config_of(copy)
    config["parallelism"]["context_parallel_load_balancer"] = None  # its default is "headtail"
    (copy / "config.json").write_text(json.dumps(config))
    resume_dense.main([str(copy), "--dry-run"])
    assert "--parallelism.context_parallel_load_balancer None" in capsys.readouterr().out


def test_refuses_what_is_no_stage_1(copy, tmp_path, capsys):
    assert "no such folder" in refusal(capsys, tmp_path / "absent")
    assert "config.json is missing" in refusal(capsys, tmp_path)
    config = config_of(copy)
    config["lighthouse"]["enable"] = False
    (copy / "config.json").write_text(json.dumps(config))
    assert "no Stage 1 run" in refusal(capsys, copy)


def test_refuses_incomplete_checkpoints(copy, capsys):
    shard = max((copy / "checkpoint/step-4").glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"incomplete: {shard.name} has" in refusal(capsys, copy)
    shard.unlink()
    assert "incomplete" in refusal(capsys, copy)
    (copy / "checkpoint/step-4/.metadata").unlink()
    message = refusal(capsys, copy / "checkpoint/step-4")
    assert "step-4 is incomplete (it has no .metadata" in message and "complete ones" in message
    assert message.endswith("step-2")  # which would do
    resume_dense.main([str(copy), "--dry-run"])  # the newest is the newest complete one, for every command
    printed = capsys.readouterr().out
    assert "step-4 unfinished (no .metadata), using step-2" in printed and "checkpoint/step-2 (step 2)" in printed
    shutil.rmtree(copy / "checkpoint")
    assert "holds no checkpoint" in refusal(capsys, copy)


def test_refuses_a_model_only_checkpoint(copy, tmp_path, capsys):
    train(copy, training__steps="5", checkpoint__last_save_model_only=None)
    message = refusal(capsys, copy)
    assert "model-only checkpoint: it lacks optimizer, lr_scheduler, dataloader, train_state" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.flavor", "debug_gqa"], "architecture: model.flavor is 'debug' in Stage 1 and 'debug_gqa' here"),
        (["--training.dataset", "stdlib_validation"], "different dataset: training.dataset is 'stdlib'"),
        (["--training.dataset_path", "/tmp"], "different dataset: training.dataset_path is None"),
        (["--model.hf_assets_path", "OTHER"], "different tokenizer: model.hf_assets_path is"),
        (["--model.hf_assets_path", "/nowhere"], "tokenizer: /nowhere/tokenizer.json does not exist"),
        (["--lighthouse.enable"], "lighthouse.enable must stay False"),
        (["--checkpoint.initial_load_model_only"], "checkpoint.initial_load_model_only must stay False"),
        (["--job.dump_folder", "stage1"], "job.dump_folder must stay"),
        (["--training.steps", "99"], "training.steps must stay 20"),
    ],
)  # fmt: skip
def test_refuses_another_model_tokenizer_or_dataset(overrides, message, copy, tmp_path, capsys):
    other = tmp_path / "tokenizer"
    other.mkdir()
    shipped = Path(config_of(copy)["model"]["hf_assets_path"]) / "tokenizer.json"
    (other / "tokenizer.json").write_text(shipped.read_text().replace("<|end_of_text|>", "<|end|>"))
    overrides = [str(other) if word == "OTHER" else word for word in overrides]
    assert message in refusal(capsys, copy, "--dry-run", "--", *overrides)
    assert not (tmp_path / "stage1_dense").exists()  # a refusal leaves nothing behind


def test_refuses_an_architecture_that_changed_under_the_same_name(copy, capsys, monkeypatch):
    from torchtitan.experiments.lighthouse import lighthouse_args

    monkeypatch.setattr(lighthouse_args["debug"], "n_layers", 7)
    assert "different architecture: layers.6." in refusal(capsys, copy)
    monkeypatch.setattr(lighthouse_args["debug"], "n_layers", 6)
    monkeypatch.setattr(lighthouse_args["debug"], "vocab_size", 384)
    assert re.search(r"output\.weight is \(320, 128\) in .* and \(384, 128\)", refusal(capsys, copy))


def test_refuses_another_data_parallel_size_unless_told_to_drop_the_position(copy, capsys):
    two = ["--torchrun", "--standalone --nproc_per_node 2", "--dry-run"]
    message = refusal(capsys, copy, *two)
    assert "different data-parallel size" in message and "1 data-parallel rank(s)" in message and "make 2" in message
    resume_dense.main([str(copy), *two, "--", "--checkpoint.exclude_from_loading", "dataloader"])
    assert "2 process(es)" in capsys.readouterr().out
    assert "plain numbers" in refusal(capsys, copy, "--torchrun", "--nnodes 1:4 --nproc_per_node 8")


def test_refuses_lengths_that_the_schedule_does_not_cover(copy, capsys):
    assert "--total-steps 4: must be more than the checkpoint's 4 steps" in refusal(capsys, copy, "--total-steps", 4)
    message = refusal(capsys, copy, "--total-steps", 21)
    assert "schedule ends at step 20" in message and "largest valid value is 20" in message


def test_refuses_folders_of_other_runs(copy, stage1, tmp_path, capsys):
    assert "is Stage 1's own" in refusal(capsys, copy, "--dump-folder", copy)
    assert "already holds a run or files" in refusal(capsys, copy, "--dump-folder", tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text(
        json.dumps({"lighthouse": {"stage1_checkpoint": f"{stage1}/checkpoint/step-2"}, "checkpoint": {"folder": "c"}})
    )
    message = refusal(capsys, stage1, "--dump-folder", taken)
    assert f"already holds Stage 2 of {stage1}/checkpoint/step-2; choose another --dump-folder" in message


def test_on_several_nodes_one_process_prepares_the_folder(copy, tmp_path, monkeypatch, capsys):
    """The others wait until its settings are there, and write nothing."""
    started = []
    monkeypatch.setattr(launch, "execute", started.append)
    folder = tmp_path / "stage2"
    (folder / "checkpoint/step-6").mkdir(parents=True)  # cut off while it saved its first checkpoint
    (folder / "config.json").write_text(
        json.dumps(
            {"lighthouse": {"stage1_checkpoint": f"{copy}/checkpoint/step-4"}, "checkpoint": {"folder": "checkpoint"}}
        )
    )

    def on_node(rank: int) -> None:
        launcher = f"--nnodes 2 --nproc_per_node 1 --node_rank {rank} --rdzv_backend c10d --rdzv_endpoint host:29500"
        words = ["--dump-folder", str(folder), "--torchrun", launcher]
        resume_dense.main([str(copy), *words, "--", "--checkpoint.exclude_from_loading", "dataloader"])

    monkeypatch.setattr(contract, "PATIENCE_SECONDS", 0.5)
    before = contents(folder)
    with pytest.raises(SystemExit, match="the first node writes it"):
        on_node(1)
    assert contents(folder) == before and not started
    on_node(0)
    assert (folder / "checkpoint.unfinished-1/step-6").is_dir()
    prepared = contents(folder)
    on_node(1)
    assert contents(folder) == prepared and len(started) == 2
    assert started[0][-1] == started[1][-1] == "dataloader"


def test_the_trainer_holds_stage_2_to_the_same_contract(copy, monkeypatch):
    """Started by hand, past the command."""
    from torchtitan.experiments.lighthouse.train import LighthouseTrainer

    monkeypatch.setenv("WORLD_SIZE", "1")
    origin = ["--lighthouse.no-enable", f"--lighthouse.stage1_checkpoint={copy}/checkpoint/step-4", *flags(SMALL)]

    def check(*overrides: str) -> None:
        settings = parse("debug.toml", *origin, f"--job.dump_folder={copy}_dense", *overrides)
        LighthouseTrainer.check_before_build(SimpleNamespace(job_config=settings, _checkpoint_folder=lambda: "absent"))

    check()
    with pytest.raises(Refused, match=r"different architecture: model\.flavor is"):
        check("--model.flavor=debug_gqa")
    with pytest.raises(Refused, match=r"different dataset: training\.dataset is"):
        check("--training.dataset=stdlib_validation")
