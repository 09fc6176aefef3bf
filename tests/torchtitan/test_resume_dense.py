import json
import multiprocessing
import re
import shutil
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchtitan.experiments.lighthouse import report, resume_dense
from torchtitan.experiments.lighthouse.errors import REFUSED, Refused
from torchtitan.experiments.lighthouse.model.sizes import FLAVORS
from torchtitan.experiments.lighthouse.runs import contract, fingerprints, launch, lock, next_stage, stages
from torchtitan.experiments.lighthouse.runs.settings import read_settings
from torchtitan.experiments.lighthouse.runs.stages import StageBefore
from torchtitan.experiments.lighthouse.train import LighthouseTrainer

from helpers.checkpoints import flip, save_settings, truncate
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
    next_batches,
    run,
    run_here,
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


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


def refusal(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        resume_dense.main([*map(str, words), "--dry-run"] if "--" not in words else list(map(str, words)))
    assert stop.value.code == REFUSED and str(stop.value).startswith("resume_dense: ")
    return str(stop.value)


def test_stage_2_takes_everything_over_and_survives_interruption(stage1, tmp_path):
    before = contents(stage1)
    stage2 = tmp_path / "stage2"
    log = run_here(resume_dense.main, stage1, "--total-steps", 6, "--dump-folder", stage2)
    assert re.search(r"dense in all 6 layers", log)
    assert f"Stage 1 checkpoint: {stage1}/checkpoint/step-4" in log
    assert re.search(r"stage2 starts after step 4, 4,096 tokens seen; learning rate 2\.0000e-03\n", log)
    assert contents(stage1) == before
    assert [record["stage"] for record in metrics(stage2)] == ["stage2"] * 2
    assert metrics(stage2)[0]["tokens_seen"] == 5 * 1024

    # The same continuation by upstream's own means: the run's folder copied, Lighthouse switched off, more steps.
    manual = shutil.copytree(stage1, tmp_path / "manual")
    allowed = {"checkpoint__allow_changed": "lighthouse.enable"}
    went_on = train(manual, training__steps="6", lighthouse__no_enable=None, **allowed)
    assert "Not as in the checkpoint: lighthouse.enable True → False\n" in went_on.stdout + went_on.stderr
    assert losses(stage2) == {step: losses(manual)[step] for step in (5, 6)}
    ours, theirs = (load_checkpoint(r / "checkpoint/step-6", tmp_path / f"all-{r.name}") for r in (stage2, manual))
    assert_same_training_state(ours, theirs)
    assert_same_position(ours, theirs, 1)

    # Interrupted while it saved its first checkpoint: the unfinished one is set aside, Stage 1's is read again.
    shutil.rmtree(stage2 / "checkpoint")
    (stage2 / "checkpoint/step-6").mkdir(parents=True)
    run_here(resume_dense.main, stage1, "--total-steps", 6, "--dump-folder", stage2)
    assert (stage2 / "checkpoint.unfinished-1/step-6").is_dir()
    assert_same_training_state(load_checkpoint(stage2 / "checkpoint/step-6", tmp_path / "again"), theirs)
    # Complete: nothing more happens. Longer, by the script and torchrun: it goes on from its own checkpoint.
    assert "is complete" in run_here(resume_dense.main, stage1, "--total-steps", 6, "--dump-folder", stage2)
    longer = run([sys.executable, *map(str, (SCRIPT, stage1, "--total-steps", 7, "--dump-folder", stage2))]).stdout
    assert f"Loading the checkpoint from {stage2}/checkpoint/step-6" in longer and 7 in losses(stage2)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Two dense steps of four sequences at 512 tokens, the first stage of a chain of six."""
    folder = tmp_path_factory.mktemp("chain") / "short"
    train(
        folder, training__steps="2", training__seq_len="512", training__local_batch_size="4",
        lighthouse__no_enable=None, lr_scheduler__total_steps="6",
    )  # fmt: skip
    return folder


def test_a_chain_changes_attention_and_context_and_keeps_all_else(short, tmp_path):
    """Dense at 512 tokens, through Lighthouse at 2,048, dense at 2,048: one schedule, one stream of tokens."""
    middle, last = tmp_path / "middle", tmp_path / "last"
    words = ["--attention", "lighthouse", "--seq-len", 2048, "--total-steps", 4, "--dump-folder", middle]
    log = run_here(resume_dense.main, short, *words, "--", "--lighthouse.layers", "1-3")
    assert f"Stage 2 from {short}/checkpoint/step-2 (step 2) to step 4, through Lighthouse" in log
    assert "training.seq_len: 512 -> 2048" in log and "training.local_batch_size: 4 -> 1" in log
    assert "Lighthouse in 3 of 6 layers (1-3)" in log and f"Stage 1 checkpoint: {short}/checkpoint/step-2" in log
    assert (
        re.search(r"stage2 starts after step 2, 4,096 tokens seen; learning rate \S+\n", log) and "Not as in" not in log
    )
    log = run_here(resume_dense.main, middle, "--dump-folder", last)
    assert f"Stage 3 from {middle}/checkpoint/step-4 (step 4) to step 6, dense" in log and "Stage 3, step 5 of 6" in log
    assert "dense in all 6 layers" in log and f"Stage 2 checkpoint: {middle}/checkpoint/step-4" in log
    records = [record for folder in (short, middle, last) for record in metrics(folder)]
    assert [record["stage"] for record in records] == ["dense"] * 2 + ["stage2"] * 2 + ["stage3"] * 2
    assert [record["tokens_seen"] for record in records] == [2048 * step for step in range(1, 7)]

    # By upstream's own means: the run's folder copied, and the settings changed.
    manual = shutil.copytree(short, tmp_path / "manual")
    train(
        manual, training__steps="4", training__seq_len="2048", lighthouse__layers="1-3", lr_scheduler__total_steps="6",
        checkpoint__allow_changed="lighthouse.enable,training.seq_len",
    )  # fmt: skip
    ours, theirs = (load_checkpoint(r / "checkpoint/step-4", tmp_path / f"all-{r.name}") for r in (middle, manual))
    assert losses(middle) == {step: losses(manual)[step] for step in (3, 4)}
    assert_same_training_state(ours, theirs)

    # A sequence takes one token more than its length, the last label; the next one begins with the very next token of
    # its stream. Short sequences come from all four of them, long ones from one after the other.
    (streams, *_), taken = next_batches(None, 0, 1, local_batch_size=4, seq_len=20_000), [0] * 4
    for folder, step, of, tokens in ((short, 2, range(4), 2 * 513), (middle, 4, (0, 1), 2049), (last, 6, (2, 3), 2049)):
        for stream in of:
            taken[stream] += tokens
        batches = next_batches(load_checkpoint(folder / f"checkpoint/step-{step}", tmp_path / folder.name), 0, 1)
        for stream, batch in enumerate(batches, start=(of[-1] + 1) % 4):
            assert batch[0].tolist() == streams[stream % 4, taken[stream % 4] :][:1024].tolist()

    report.main([*map(str, (short, middle, last)), "--output", str(tmp_path / "report")])
    text = (tmp_path / "report/summary.md").read_text()
    for stage in ("Stage 1 (dense at 512)", "Stage 2 (Lighthouse at 2,048)", "Stage 3 (dense at 2,048)"):
        assert stage in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-len", "768"], "seq_len=768: Stage 1 has 2,048 tokens per step.* nearest valid value: --seq-len 512"),
        (["--seq-len", "4096"], r"training.seq_len=4096: .* nearest valid value: --seq-len 2048"),
        (["--seq-len", "0"], r"training.seq_len=0: must be at least 1; nearest valid value: 1$"),
        (["--seq-len", "1023", "--attention", "lighthouse"], r"nearest valid value: --seq-len 1024"),
        (["--seq-len", "100", "--attention", "lighthouse"], r"nearest valid value: --seq-len 512"),
        (["--attention", "lighthouse", "--", "--lighthouse.pooling_factor", "4"], "cannot be built: .*nearest valid"),
        (["--attention", "lighthouse", "--", "--lighthouse.layers", "2-27"], "cannot be built: .* valid layer: 5"),
        (["--attention", "dense"], "Stage 2 would be Stage 1 again, dense at 512 tokens"),
        (["--", "--training.seq_len", "2048"],
         r"seq_len=2048 with 4 sequence.* value: training.global_batch_size 1, which --seq-len 2048 sets"),
        (["--seq-len", "1024", "--", "--training.local_batch_size", "3"],
         r"local_batch_size=3: must divide the 2 sequence\(s\) .*; nearest valid value: 2"),
        (["--seq-len", "1024", "--torchrun", "--standalone --nproc_per_node 3"],
         r"make 3 data-parallel rank\(s\), which must divide the 4 streams of the checkpoint's data position and the 2 "
         r"sequence\(s\) of a step; nearest valid value: 2 process\(es\)\. To give the data position up"),
        (["--attention", "lighthouse", "--torchrun", "--standalone --nproc_per_node 3"], "value: 2 or 4 process"),
        (["--seq-len", "2048", "--torchrun", "--standalone --nproc_per_node 2"], "2 data-parallel.*value: 1 process"),
        (["--attention", "lighthouse", "--torchrun", "--standalone --nproc_per_node 2", "--",
          "--training.global_batch_size", "8"], "seq_len=512 with 8 sequence.*: training.global_batch_size 4"),
        (["--seq-len", "1024", "--", "--lighthouse.stage", "7"], "lighthouse.stage must stay 2 in Stage 2"),
        (["--seq-len", "1024", "--", "--validation.enable", "--validation.seq_len", "2048"],
         "cannot be built: validation.seq_len=2048: must be at most training.seq_len=1024"),
        (["--seq-len", "2048", "--torchrun", "--standalone --nproc_per_node 2", "--",
          "--checkpoint.exclude_from_loading", "dataloader"],
         r"training.seq_len=2048: .*each of 2 data-parallel rank\(s\); nearest valid value: --seq-len 1024"),
        (["--seq-len", "2048", "--", "--model.flavor", "debug_gqa"],
         r"model.flavor 'debug' → 'debug_gqa': .*: -- --checkpoint.allow_changed model.flavor$"),
    ],
)  # fmt: skip
def test_refuses_a_stage_that_does_not_fit_the_chain(words, message, short, capsys):
    at = words.index("--") if "--" in words else len(words)
    before = contents(short.parent)
    assert re.search(message, refusal(capsys, short, *words[:at], "--dry-run", "--", *words[at + 1 :]))
    assert contents(short.parent) == before and [path.name for path in short.parent.iterdir()] == ["short"]


@pytest.mark.parametrize(
    ("seq_len", "local", "sequences"), [(128, 16, 16), (1024, 2, 2), (2048, 1, 1)]
)  # fmt: skip
def test_the_batch_sizes_follow_the_context(seq_len, local, sequences, short, capsys):
    resume_dense.main([str(short), "--seq-len", str(seq_len), "--dry-run"])
    printed = capsys.readouterr().out
    settings = tomllib.loads(printed.partition("stage2.toml would hold:\n")[2].rpartition("\n\n")[0])
    training = settings["training"]
    assert (training["seq_len"], training["local_batch_size"], training["global_batch_size"]) == (
        seq_len, local, sequences,
    )  # fmt: skip
    assert f"in {short}_dense_{seq_len}, 1 process(es)" in printed


@pytest.mark.parametrize(("processes", "local"), [(1, 4), (2, 2), (4, 1)])
def test_any_number_of_processes_that_divides_the_streams_goes_on(processes, local, short, capsys):
    """With as many tokens per step, also where the stage before took as many as its processes held."""
    torchrun = ["--torchrun", f"--standalone --nproc_per_node {processes}"]
    resume_dense.main([str(short), "--attention", "lighthouse", *torchrun, "--dry-run"])
    printed = capsys.readouterr().out
    settings = tomllib.loads(printed.partition("stage2.toml would hold:\n")[2].rpartition("\n\n")[0])
    assert settings["training"]["local_batch_size"] == local
    assert settings["training"]["global_batch_size"] == (-1 if processes == 1 else 4)


def test_batches_that_do_not_fit_at_once_are_accumulated(short, tmp_path):
    """Eight sequences a step on two ranks, two at a time; at a quarter of the length 32, eight at a time, and at four
    times the length two, one at a time."""
    training = {"seq_len": 512, "local_batch_size": 2, "global_batch_size": 8}
    ranks = {f"dataloader.dp_rank_{rank}": None for rank in range(2)}
    before = StageBefore({"training": training}, short, SimpleNamespace(state_dict_metadata=ranks))
    for seq_len, local, sequences in ((128, 8, 32), (2048, 1, 2), (1024, 1, 4)):
        batches = next_stage._batches_at(before, seq_len)
        assert batches == {"seq_len": seq_len, "local_batch_size": local, "global_batch_size": sequences}


def test_a_folder_holds_one_stage_with_one_context(short, tmp_path, capsys):
    folder = tmp_path / "stage2"
    folder.mkdir()
    there = config_of(short)
    there["lighthouse"] |= {"enable": True, "stage1_checkpoint": f"{short}/checkpoint/step-2"}
    there["training"]["seq_len"] = 2048
    (folder / "config.json").write_text(json.dumps(there))
    words = ["--dump-folder", folder, "--attention"]
    message = refusal(capsys, short, *words, "dense", "--seq-len", 2048)
    assert "already holds Stage 2 through Lighthouse at 2,048 tokens, and this one is dense at 2,048;" in message
    assert "and this one is through Lighthouse at 512" in refusal(capsys, short, *words, "lighthouse")
    resume_dense.main([str(short), *map(str, words), "lighthouse", "--seq-len", "2048", "--dry-run"])


@pytest.mark.parametrize(("delayed", "selection"), [(True, "delayed"), (False, "published")])
def test_a_run_of_an_older_version_goes_on(delayed, selection, copy, capsys):
    """It knew neither the number of a stage nor today's name of the selection."""
    config = config_of(copy)
    for name in ("stage", "selection", "local_window"):
        del config["lighthouse"][name]
    config["lighthouse"]["delay_scores"] = delayed
    save_settings(copy, config)
    resume_dense.main([str(copy), "--dry-run", "--", "--lighthouse.layers", "1"])
    assert f"to step 20, dense, in {copy}_dense" in capsys.readouterr().out
    assert read_settings(copy / "checkpoint/step-4").lighthouse.selection == selection
    # Stage 2 of such a version says only where it came from.
    config["lighthouse"] |= {"enable": False, "stage1_checkpoint": "/gone/checkpoint/step-2"}
    save_settings(copy, config)
    resume_dense.main([str(copy), "--attention", "lighthouse", "--dry-run"])
    printed = capsys.readouterr().out
    assert f"Stage 3 from {copy}/checkpoint/step-4" in printed and (f'selection = "{selection}"' in printed) == delayed


def test_a_later_stage_does_not_inherit_what_a_stage_did_for_itself(copy, capsys):
    """A position that it gave up, and settings that it changed on purpose."""
    config = config_of(copy)
    config["checkpoint"] |= {"exclude_from_loading": ["dataloader"], "allow_changed": ["model.flavor"]}
    save_settings(copy, config)
    resume_dense.main([str(copy), "--dry-run"])
    printed = capsys.readouterr().out
    assert "exclude_from_loading = []" in printed and "allow_changed = []" in printed


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
    save_settings(copy, config)
    resume_dense.main([str(copy), "--dry-run"])
    assert "--parallelism.context_parallel_load_balancer None" in capsys.readouterr().out


def test_refuses_what_is_no_run(copy, tmp_path, capsys):
    assert "no such folder" in refusal(capsys, tmp_path / "absent")
    assert "config.json is missing" in refusal(capsys, tmp_path)
    config = config_of(copy)
    del config["lighthouse"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "has no [lighthouse] section" in refusal(capsys, copy)


def test_incomplete_and_damaged_checkpoints(copy, capsys):
    """Refused where they are named; otherwise the newest sound one is taken, and nothing is moved."""
    step4, before = copy / "checkpoint/step-4", contents(copy)
    shard = max(step4.glob("*.distcp"), key=lambda file: file.stat().st_size)
    flip(shard, 1_000_000, 3)
    assert f"step-4 is damaged: {shard.name} does not hold what was saved" in refusal(capsys, step4)
    for damage in (lambda: None, lambda: truncate(shard), shard.unlink):
        damage()
        resume_dense.main([str(copy), "--dry-run"])
        printed = capsys.readouterr().out
        assert f"step-4 is damaged ({shard.name} " in printed and "checkpoint/step-2 (step 2)" in printed
    assert contents(copy).keys() == before.keys() - {str(shard)}

    for name in ("manifest.json", ".metadata"):
        (step4 / name).unlink()
    message = refusal(capsys, step4)
    assert "step-4 is incomplete (it has no .metadata" in message and "complete ones" in message
    assert message.endswith("step-2")  # which would do
    resume_dense.main([str(copy), "--dry-run"])  # the newest is the newest complete one, for every command
    printed = capsys.readouterr().out
    assert "step-4 unfinished (no .metadata), using step-2" in printed and "checkpoint/step-2 (step 2)" in printed
    shutil.rmtree(copy / "checkpoint")
    assert "holds no checkpoint" in refusal(capsys, copy)


def test_a_crafted_table_of_contents_runs_nothing(copy, tmp_path, capsys):
    """It ran a shell command, with --dry-run too."""
    (copy / "checkpoint/step-4/manifest.json").unlink()
    crafted = b"cos\nsystem\n(Vtouch " + str(tmp_path / "ran").encode() + b"\ntR."
    (copy / "checkpoint/step-4/.metadata").write_bytes(crafted)
    assert "names os.system, which no checkpoint needs" in refusal(capsys, copy)
    assert not (tmp_path / "ran").exists()


def test_refuses_a_model_only_checkpoint(copy, tmp_path, capsys):
    train(copy, training__steps="5", checkpoint__last_save_model_only=None)
    message = refusal(capsys, copy)
    assert "model-only checkpoint: it lacks optimizer, lr_scheduler, dataloader, train_state" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.flavor", "debug_gqa"], "model.flavor 'debug' → 'debug_gqa': "),
        (["--training.dataset", "stdlib_validation"], "training.dataset 'stdlib' → 'stdlib_validation': "),
        (["--training.dataset_path", "OTHER"], " is not there any more, and "),
        (["--model.hf_assets_path", "OTHER"], "/tokenizer) is not as it was: tokenizer.json had "),
        (["--model.hf_assets_path", "/nowhere"], "model.hf_assets_path='/nowhere': no tokenizer there"),
        (["--lighthouse.enable"], "lighthouse.enable must stay False"),
        (["--checkpoint.initial_load_model_only"], "checkpoint.initial_load_model_only must stay False"),
        (["--job.dump_folder", "stage1"], "job.dump_folder must stay"),
        (["--training.steps", "19"], "training.steps must stay 20"),
    ],
)  # fmt: skip
def test_refuses_another_model_tokenizer_or_dataset(overrides, message, copy, tmp_path, capsys):
    shipped = Path(config_of(copy)["model"]["hf_assets_path"])
    other = shutil.copytree(shipped, tmp_path / "tokenizer")
    edited = (shipped / "tokenizer.json").read_text().replace("<|end_of_text|>", "<|end|>")
    (other / "tokenizer.json").write_text(edited)
    for name in ("one.py", "two.py"):
        (other / name).write_text("x = 1")
    overrides = [str(other) if word == "OTHER" else word for word in overrides]
    assert message in refusal(capsys, copy, "--dry-run", "--", *overrides)
    assert not (tmp_path / "stage1_dense").exists()  # a refusal leaves nothing behind


def test_refuses_an_architecture_that_changed_under_the_same_name(copy, capsys, monkeypatch):
    """Of a run that an older version saved: a new one says which sizes it has."""
    from torchtitan.experiments.lighthouse import lighthouse_args

    config = config_of(copy)
    del config["llama"]
    save_settings(copy, config)
    monkeypatch.setattr(lighthouse_args["debug"], "n_layers", 7)
    assert "different architecture: layers.6." in refusal(capsys, copy)
    monkeypatch.setattr(lighthouse_args["debug"], "n_layers", 6)
    monkeypatch.setattr(lighthouse_args["debug"], "vocab_size", 384)
    assert re.search(r"output\.weight is \(320, 128\) in .* and \(384, 128\)", refusal(capsys, copy))
    save_settings(copy, config | {"llama": asdict(FLAVORS["debug"])})
    resume_dense.main([str(copy), "--dry-run"])


def test_another_number_of_processes_may_drop_the_position(copy, capsys):
    two = ["--torchrun", "--standalone --nproc_per_node 2", "--dry-run"]
    assert "nearest valid value: 1 process(es). To give the data position up: -- --che" in refusal(capsys, copy, *two)
    drop = ["--", "--checkpoint.exclude_from_loading", "dataloader"]
    message = "training.global_batch_size=1: must be a multiple of the 2 data-parallel rank(s); nearest valid value: 2"
    assert message in refusal(capsys, copy, *two, *drop)
    resume_dense.main([str(copy), *two, *drop, "--training.global_batch_size", "2"])
    assert "2 process(es)" in capsys.readouterr().out
    assert "plain numbers" in refusal(capsys, copy, "--torchrun", "--nnodes 1:4 --nproc_per_node 8")


def test_the_data_position_of_an_older_version_belongs_to_its_readers(copy, monkeypatch, capsys):
    """As it did when it was saved: to data-parallel ranks and data workers."""
    before = stages.find_stage_before(copy)
    assert before.position and before.data_parallel_size == 1
    keys = [key for key in before.metadata.state_dict_metadata if not key.startswith("dataloader.")]
    metadata = SimpleNamespace(
        state_dict_metadata=dict.fromkeys([*keys, *(f"dataloader.dp_rank_{r}" for r in range(2))])
    )
    older = StageBefore(before.config, before.checkpoint, metadata)
    assert older.position is None and older.data_parallel_size == 2
    monkeypatch.setattr(stages, "find_stage_before", lambda *_, **__: older)
    monkeypatch.setattr(contract, "_check_shapes", lambda *_: None)
    one = refusal(capsys, copy, "--torchrun", "--nproc_per_node 1")
    assert "an older version saved" in one and "that of 2 data-parallel rank(s); 1 process(es)" in one
    workers = refusal(capsys, copy, "--dry-run", "--", "--training.dataloader.num_workers", "1")
    assert "different data workers: training.dataloader.num_workers is 0 in Stage 1 and 1 here" in workers
    resume_dense.main([str(copy), "--dry-run"])
    assert "2 process(es)" in capsys.readouterr().out


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


def test_refuses_a_stage_that_is_at_work(copy, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(launch, "execute", started.append)
    folder = tmp_path / "stage2"
    resume_dense.main([str(copy), "--dump-folder", str(folder)])
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as trainer:
        trainer.submit(lock.hold, folder).result()
        before = contents(folder)
        assert f"{folder}: a run is at work there (process " in refusal(capsys, copy, "--dump-folder", folder, "--")
    assert contents(folder) == before and len(started) == 1
    resume_dense.main([str(copy), "--dump-folder", str(folder)])
    assert len(started) == 2


def test_on_several_nodes_one_process_prepares_the_folder(copy, tmp_path, monkeypatch, capsys):
    """The others wait until its settings are there, and write nothing."""
    started = []
    monkeypatch.setattr(launch, "execute", started.append)
    folder = tmp_path / "stage2"
    (folder / "checkpoint/step-6").mkdir(parents=True)  # cut off while it saved its first checkpoint
    there = config_of(copy)
    there["lighthouse"] |= {"enable": False, "stage1_checkpoint": f"{copy}/checkpoint/step-4"}
    (folder / "config.json").write_text(json.dumps(there))

    def on_node(rank: int) -> None:
        launcher = f"--nnodes 2 --nproc_per_node 1 --node_rank {rank} --rdzv_backend c10d --rdzv_endpoint host:29500"
        words = ["--dump-folder", str(folder), "--torchrun", launcher]
        dropped = ["--training.global_batch_size", "2", "--checkpoint.exclude_from_loading", "dataloader"]
        resume_dense.main([str(copy), *words, "--", *dropped])

    monkeypatch.setattr(next_stage, "PATIENCE_SECONDS", 0.5)
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
    monkeypatch.setenv("WORLD_SIZE", "1")
    origin = ["--lighthouse.no-enable", f"--lighthouse.stage1_checkpoint={copy}/checkpoint/step-4", *flags(SMALL)]

    def check(*overrides: str) -> None:
        settings = parse("debug.toml", *origin, f"--job.dump_folder={copy}_dense", *overrides)
        trainer = SimpleNamespace(job_config=settings, recorder=LighthouseTrainer.recorder)
        trainer._checkpoint_folder = lambda: "absent"
        LighthouseTrainer.check_before_build(trainer)

    check()
    with pytest.raises(Refused, match=r"model\.flavor 'debug' → 'debug_gqa'"):
        check("--model.flavor=debug_gqa")
    with pytest.raises(Refused, match=r"training\.dataset 'stdlib' → 'stdlib_validation'"):
        check("--training.dataset=stdlib_validation")
    check("--lighthouse.enable", "--training.seq_len=512", "--training.local_batch_size=2")
    with pytest.raises(Refused, match="Stage 1 has 1,024 tokens per step"):
        check("--training.seq_len=512")
    for kind in ("--lighthouse.enable", "--lighthouse.no-enable"):  # a stage may have dense steps of its own
        check(kind, "--lighthouse.dense_every=8")
    with pytest.raises(Refused, match="would be Stage 1 again, through Lighthouse at 1,024 tokens"):
        check("--lighthouse.enable")
    check("--lighthouse.enable", "--lighthouse.layers=1-3")
    check("--lighthouse.enable", "--llama.rope_theta=20000")
    with pytest.raises(Refused, match="would be Stage 1 again"):
        check("--lighthouse.enable", "--optimizer.lr=1e-4")


def trainer_of(*words: str) -> LighthouseTrainer:
    """With settings, and nothing built."""
    trainer = LighthouseTrainer.__new__(LighthouseTrainer)
    trainer.job_config = parse("debug.toml", *flags(SMALL), *words)
    return trainer


def test_the_trainer_refuses_another_run_in_its_folder(copy, monkeypatch):
    """Before anything is built. On purpose it may, and says so."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = f"--job.dump_folder={copy}"
    same = trainer_of(folder)
    same.check_before_build()
    assert same._not_as_before == []
    said = (
        r"lighthouse\.top_k 128 → 256: .*/checkpoint/step-4 was trained otherwise, .*allow_changed lighthouse\.top_k$"
    )
    with pytest.raises(Refused, match=said):
        trainer_of(folder, "--lighthouse.top_k=256").check_before_build()
    with pytest.raises(Refused, match="makes 1,024 tokens per step → 2,048"):
        trainer_of(folder, "--training.local_batch_size=2").check_before_build()
    two = ["--checkpoint.load_step=2", "--lighthouse.top_k=256"]
    with pytest.raises(Refused, match="/checkpoint/step-2 was trained otherwise"):
        trainer_of(folder, *two).check_before_build()
    allowed = trainer_of(folder, "--lighthouse.top_k=256", "--checkpoint.allow_changed=lighthouse.top_k")
    allowed.check_before_build()
    assert allowed._not_as_before == ["Not as in the checkpoint: lighthouse.top_k 128 → 256"]
    # Another process leaves it to the first.
    monkeypatch.setenv("RANK", "1")
    trainer_of(folder, "--lighthouse.top_k=256").check_before_build()


def test_both_stages_moved_together_go_on(copy, tmp_path, monkeypatch, capsys):
    """Where everything that was saved names the old place; Stage 2 from the checkpoint of its own that it has."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    old, new = copy.parent, tmp_path.with_name(f"{tmp_path.name}-moved")
    tokenizer = shutil.copytree(config_of(copy)["model"]["hf_assets_path"], old / "tokenizer")
    config = config_of(copy)
    config["model"]["hf_assets_path"] = str(tokenizer)
    save_settings(copy, config)
    stage2 = shutil.copytree(copy, old / "stage2")
    config["lighthouse"] |= {"enable": False, "stage": 2, "stage1_checkpoint": f"{copy}/checkpoint/step-2"}
    config["job"]["dump_folder"] = str(stage2)
    origin = fingerprints.of_stage_before(f"{copy}/checkpoint/step-2", None)
    save_settings(stage2, config, origin)
    old.rename(new)

    moved, before = new / "stage2", new / "stage1/checkpoint/step-2"
    given = ["--", f"--model.hf_assets_path={new}/tokenizer"]
    words = ["--dump-folder", moved, "--dry-run"]
    resume_dense.main([str(word) for word in (before, *words, *given)])
    assert f"Stage 2 from step 4 of Stage 2 to step 20, dense, in {moved}" in capsys.readouterr().out
    # What it was started with, but for the folder.
    stage = [
        "--lighthouse.no-enable",
        "--lighthouse.stage=2",
        f"--lighthouse.stage1_checkpoint={copy}/checkpoint/step-2",
    ]
    trainer = trainer_of(*stage, f"--job.dump_folder={moved}", f"--model.hf_assets_path={new}/tokenizer")
    trainer.check_before_build()
    assert trainer._not_as_before == [] and trainer._reads["stage_before"] == origin["stage_before"]
    stage1 = trainer_of(f"--job.dump_folder={new}/stage1", f"--model.hf_assets_path={new}/tokenizer")
    stage1.check_before_build()
    assert stage1._not_as_before == []
    # Settings of the stage itself are held to its own checkpoint, before anything is launched.
    message = refusal(capsys, before, *words, *given, "--debug.seed=5")
    assert (
        f"debug.seed 0 → 5: {moved}/checkpoint/step-4 was trained otherwise, and this would be another run" in message
    )
    # Another checkpoint at the same place is not what Stage 2 came from; nor is one that only has its name.
    assert "already holds Stage 2 of" in refusal(capsys, new / "stage1/checkpoint/step-4", *words, *given)
    save_settings(new / "stage1", config_of(new / "stage1"))
    assert "already holds Stage 2 of" in refusal(capsys, before, *words, *given)


def test_a_next_stage_takes_other_data_on_purpose(copy, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for name in ("one.py", "two.py"):
        (tmp_path / "text" / name).write_text("x = 1")
    words = [copy, "--dry-run", "--", f"--training.dataset_path={tmp_path}/text"]
    resume_dense.main([*map(str, words), "--checkpoint.allow_changed=training.dataset_path"])
    printed = capsys.readouterr().out
    assert f"  Not as in the checkpoint: training.dataset_path ({tmp_path}/text) is not as it was: " in printed


def test_the_next_stage_continues_what_the_checkpoint_was_trained_with(copy, capsys):
    """The run's file says what the run was started with last, and may not have reached a checkpoint."""
    config = config_of(copy)
    config["lighthouse"]["top_k"] = 256
    (copy / "config.json").write_text(json.dumps(config))
    resume_dense.main([str(copy), "--dry-run"])
    assert "top_k = 128" in capsys.readouterr().out
