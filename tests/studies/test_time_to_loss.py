import argparse
import fcntl
import json
import os
import subprocess
import sys

import pytest
import recall
import time_to_loss
from time_to_loss import alone_in, result_of, runs_of
from time_to_loss_arms import ARMS, PARTS, Arm, Stage
from time_to_loss_report import crossing, loss_at
from torchtitan.experiments.lighthouse.runs import launch

from helpers.text import write_documents

DENSE, PUBLISHED = ARMS[0], ARMS[1]
BY_NAME = {arm.name: arm for arm in ARMS}
ORDER = [arm.name for arm in ARMS]
SCORE = {
    "held_out_far": {"start": 16384, "loss": 1.9},
    "recall_far": {"recall": 0.25},
    "by_position": [{"start": 0, "end": 98304, "loss": 2.0, "loss_text": 1.5}],
    "recall": [{"start": 0, "end": 98304, "recall": 0.5, "right": 0.75}],
    "device": "H200",
    "torch": "2.11",
}


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        output=tmp_path, steps=960, seq_len=98304, seed=0, overrides=["--optimizer.lr=2e-3"], commit="abc", start=None,
        local_layers="1-6,8",
        config=time_to_loss.REPOSITORY / "train_configs/32m_32k.toml",
    )  # fmt: skip


def test_every_arm_is_sixteen_sixteenths_and_names_mean_one_thing():
    assert all(
        sum(stage.parts for stage in arm.stages) == PARTS and arm.cannot_run(98304, "0-6") is None for arm in ARMS
    )
    settings = {}
    for stage in (stage for arm in ARMS for stage in arm.stages):
        what = stage.lighthouse, stage.context
        assert settings.setdefault(stage.name, what) == what
    # Of two names one may mean the same: "dense, again".
    assert len({arm.name for arm in ARMS}) == len(ARMS) and len(set(settings.values())) == len(settings) - 1
    chains = {tuple((stage.name, stage.parts) for stage in arm.stages) for arm in ARMS}
    assert len(chains) == len(ARMS)


def test_a_chain_that_has_no_place_in_the_study_says_why():
    short, long = Stage("short", 8, context=8192), Stage("dense", 8)
    assert Arm("short, then long", (short, long)).cannot_run(98304) is None
    assert "8,192 tokens per sequence, which must divide 1,024" in Arm("short, then long", (short, long)).cannot_run(
        1024
    )
    for last in (short, Stage("published", 8, ())):
        assert "must be dense at 98,304" in Arm("ends otherwise", (long, last)).cannot_run(98304)


def test_a_chain_expands_to_a_run_of_each_stage(options):
    """Twelve short sequences per step are as many tokens as one long one; the schedule is that of the whole chain."""
    short, middle, last = runs_of(BY_NAME["short, Lighthouse, dense"], options)
    assert [(run.first, run.last) for run in (short, middle, last)] == [(0, 240), (240, 720), (720, 960)]
    words = ("--training.seq_len=8192", "--training.local_batch_size=12", "--lighthouse.no-enable")
    assert {*words, "--training.steps=240", "--lr_scheduler.total_steps=960"} < set(short.command)
    assert not any("validation" in word or "keep_latest" in word for word in short.command)
    own, changes = launch.split_overrides(middle.command)
    assert {"--attention=lighthouse", "--seq-len=98304", "--total-steps=720"} < set(own)
    assert str(short.checkpoints / "step-240") in own and changes == ["--validation.no-enable", "--optimizer.lr=2e-3"]
    own, changes = launch.split_overrides(last.command)
    assert {"--attention=dense", "--seq-len=98304", "--total-steps=960"} < set(own)
    assert str(middle.checkpoints / "step-720") in own and "--validation.freq=60" in changes
    # The other chain begins with more steps of the same short stage, and has no middle.
    first, long = runs_of(BY_NAME["short 8192 then long"], options)
    assert first.folder == short.folder and first.last == 600 and long.folder not in (middle.folder, last.folder)
    for step in range(60, 901, 60):
        save(short, step)
        save(middle, step)
    for run in (short, middle):
        time_to_loss.remove_checkpoints(run.checkpoints, options.steps)
        kept = {path.name for path in run.checkpoints.iterdir()}
        assert {"step-240", "step-600", "step-720", "step-900"} < kept and "step-300" not in kept


def test_an_arm_expands_to_its_commands(options):
    first, second = runs_of(PUBLISHED, options)
    assert (first.first, first.last, second.first, second.last) == (0, 600, 600, 960)
    for words in ("--lighthouse.top_k=1536", "--training.seq_len=98304", "--lr_scheduler.total_steps=960",
                  "--training.steps=600", "--checkpoint.interval=60", "--debug.seed=0"):  # fmt: skip
        assert words in first.command
    assert not any("validation" in word or "no-enable" in word for word in first.command)
    # Lighthouse's own settings after those of all arms, and the user's last.
    k1024 = runs_of(BY_NAME["k1024 10:6"], options)[0].command
    assert k1024.index("--lighthouse.top_k=1024") > k1024.index("--lighthouse.top_k=1536")
    assert k1024[-1] == second.command[-1] == "--optimizer.lr=2e-3"
    assert str(first.checkpoints / "step-600") in second.command
    assert {"--validation.enable", "--validation.freq=60", "--validation.steps=12"} < set(second.command)
    (dense,) = runs_of(DENSE, options)
    assert {"--lighthouse.no-enable", "--validation.seq_len=98304", "--training.steps=960"} < set(dense.command)


def test_all_arms_start_from_the_weights_that_are_given(options, tmp_path):
    """The first stage of each, with an optimizer of its own; results say what the weights were trained with."""
    options.start = tmp_path / "base/checkpoint/step-5000"
    options.start.mkdir(parents=True)
    training = {"training": {"seq_len": 2048, "local_batch_size": 8}}
    (tmp_path / "base/config.json").write_text(json.dumps(training))
    for arm in ARMS:
        first, *later = runs_of(arm, options)
        assert f"--checkpoint.initial_load_path={options.start}" in first.command
        assert not any("initial_load_model_only" in word for run in (first, *later) for word in run.command)
        assert not any(str(options.start) in word for run in later for word in run.command)
    said = time_to_loss.study_settings(options)
    assert said["start"] == {"seq_len": 2048, "sequences": 8, "steps": 5000}
    options.start = None
    assert "start" not in time_to_loss.study_settings(options)
    assert not any("initial_load" in word for word in runs_of(DENSE, options)[0].command)


def test_a_gentler_switch_is_a_stage_of_its_own(options):
    """Fewer layers in it, from the checkpoint that the arm with two stages would go on from at 12:4."""
    first, middle, last = runs_of(BY_NAME["causal W512, layers 3-6, dense 12:2:2"], options)
    assert first == runs_of(BY_NAME["causal W512 12:4"], options)[0]
    own, changes = launch.split_overrides(middle.command)
    assert {"--attention=lighthouse", "--total-steps=840"} < set(own) and str(first.checkpoints / "step-720") in own
    assert {"--lighthouse.layers=3-6", "--lighthouse.local_window=512", "--validation.no-enable"} < set(changes)
    own, _ = launch.split_overrides(last.command)
    assert {"--attention=dense", "--total-steps=960"} < set(own) and str(middle.checkpoints / "step-840") in own


def test_local_layers_are_those_that_were_found(options):
    arm = BY_NAME["softmax W512 local layers 14:2"]
    first, last = runs_of(arm, options)
    assert {"--lighthouse.layers=1-6,8", "--lighthouse.combine=softmax"} < set(first.command)
    assert not any("LOCAL" in word for run in (first, last) for word in run.command)
    assert time_to_loss.study_settings(options)["local_layers"] == "1-6,8"
    assert "run base" in arm.cannot_run(98304) and arm.cannot_run(98304, "1-6,8") is None


def test_steps_of_two_kinds_are_all_logged(options):
    first, _ = runs_of(BY_NAME["causal W512 every 8th dense 15:1"], options)
    assert {"--lighthouse.dense_every=8", "--metrics.log_freq=1"} < set(first.command) and first.last == 900
    others = [run for arm in ARMS for run in runs_of(arm, options) if run.stage.lighthouse is not None]
    of_two_kinds = {
        run.folder for run in others if any(word.startswith("--lighthouse.dense_every=") for word in run.command)
    }
    assert of_two_kinds == {run.folder for run in others if "--metrics.log_freq=1" in run.command}
    assert of_two_kinds != {run.folder for run in others}


def test_arms_share_their_beginning_and_nothing_else(options):
    folders = {arm.name: [run.folder for run in runs_of(arm, options)] for arm in ARMS}
    assert folders["published 10:6"][0] == folders["published 14:2"][0] != folders["delayed 14:2"][0]
    last = [names[-1] for names in folders.values()]
    assert len(set(last)) == len(ARMS)
    options.seed = 1
    assert not {run.folder for arm in ARMS for run in runs_of(arm, options)} & {
        f for fs in folders.values() for f in fs
    }


def save(run, step):
    (folder := run.checkpoints / f"step-{step}").mkdir(parents=True)
    (folder / ".metadata").touch()


def test_checkpoints_that_an_arm_may_start_from_stay(options, monkeypatch):
    monkeypatch.setattr(time_to_loss, "ARMS", [PUBLISHED, BY_NAME["published 14:2"]])
    run = runs_of(PUBLISHED, options)[0]
    for step in range(60, 901, 60):
        save(run, step)
    time_to_loss.remove_checkpoints(run.checkpoints, options.steps)
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert kept == {"step-600", "step-840", "step-900"}


def test_a_finished_stage_is_not_run_again_and_a_finished_arm_is_skipped(options, monkeypatch, capsys):
    called = []

    def call(command, log_file, device, inherited=()):
        called.append(command)
        run = next(one for one in runs_of(PUBLISHED, options) + runs_of(DENSE, options) if one.command == command)
        save(run, run.last)
        raise RuntimeError("killed right after the save")

    monkeypatch.setattr(time_to_loss, "call", call)
    monkeypatch.setattr(time_to_loss, "devices", lambda: [None])
    options.arms = [PUBLISHED, DENSE]
    first, second = runs_of(PUBLISHED, options)
    assert time_to_loss.run(options) == 2 and len(called) == 2  # one arm's failure does not stop the next
    assert time_to_loss.run(options) == 2 and called[2] == second.command  # on from where it stopped
    recall.write_json(time_to_loss.result_file(PUBLISHED, options), {})
    called.clear()
    time_to_loss.run(options)
    assert first.command not in called and "published 10:6, seed 0: already finished" in capsys.readouterr().out


def test_a_trainer_that_outlives_the_study_keeps_its_folder_locked(tmp_path):
    with alone_in(tmp_path / "run") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    again = os.open(tmp_path / "run.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.communicate(b"\n")
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


def test_devices_are_those_that_are_visible(monkeypatch):
    for visible, devices in (("3,1", ["3", "1"]), ("GPU-5a", ["GPU-5a"]), ("", [None])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert time_to_loss.devices() == devices


def write_metrics(run, steps, loss, rate, held_out=None, dense_every=0):
    run.folder.mkdir(parents=True)
    with (run.folder / "metrics.jsonl").open("w") as file:
        for step in steps:
            record = {"step": step, "loss": loss(step), "tokens_seen": 100 * step, "tokens_per_second": rate}
            if dense_every:
                is_dense = step % dense_every == 0
                record |= {"dense": is_dense, "dense_steps": int(is_dense)}
                record |= {"tokens_per_second": 100} if is_dense else {}
            # The first steps compile.
            file.write(json.dumps(record if step > 20 else record | {"tokens_per_second": 1}) + "\n")
            if held_out and not step % 60:
                file.write(json.dumps({"step": step, "validation_loss": held_out(step), "tokens_per_second": 7}) + "\n")


def made_up(options):
    """Dense: one second per step, from 3 down to 2. The arm: half of it in Stage 1; from 2.4 down to 1.95."""
    (dense,), (first, second) = runs_of(DENSE, options), runs_of(PUBLISHED, options)
    write_metrics(dense, range(1, 961), lambda step: 2.5, 100, lambda step: 3 - step / 960)
    # Shared with an arm that switches later: what comes after this arm's switch is not its own.
    write_metrics(first, range(5, 841, 5), lambda step: 2.0 if step <= 600 else 9.0, 200)
    write_metrics(second, range(601, 961), lambda step: 2.75 if step == 601 else 2.2, 100,
                  lambda step: 2.4 - 0.45 * (step - 660) / 300)  # fmt: skip
    return [result_of(DENSE, [dense], SCORE, options), result_of(PUBLISHED, [first, second], SCORE, options)]


def test_a_result_holds_seconds_curve_and_spike(options):
    dense, arm = made_up(options)
    assert (dense["seconds"], dense["spike"], dense["held_out"]) == (960, None, 2.0)
    assert arm["seconds"] == 600 / 2 + 360 and arm["spike"] == pytest.approx(0.75)
    assert [point[:2] for point in arm["curve"]] == [[step, step - 300] for step in range(660, 961, 60)]
    assert arm["gpu"] == "H200" and arm["settings"]["overrides"] == ["--optimizer.lr=2e-3"] and arm["commit"] == "abc"
    assert arm["stages"][0]["last_training_loss"] == 2.0 and len(json.dumps(arm)) < 20_000
    assert len(arm["training"]) == 120 + 360 and len(dense["training"]) == 960


def test_seconds_and_spike_of_a_stage_with_dense_steps(options):
    """105 of 840 steps at the dense rate; the spike is measured from steps through Lighthouse."""
    arm = BY_NAME["causal W512 every 8th dense 14:2"]
    first, second = runs_of(arm, options)
    write_metrics(first, range(1, 841), lambda step: 9.0 if step % 8 == 0 else 2.0, 400, dense_every=8)
    write_metrics(second, range(841, 961), lambda step: 2.25 if step == 841 else 2.2, 100, lambda step: 2.0)
    result = result_of(arm, [first, second], SCORE, options)
    assert result["seconds"] == 735 / 4 + 105 + 120 and result["spike"] == pytest.approx(0.25)
    assert result["curve"][-1][1] == result["seconds"]


def test_the_spike_of_a_chain_is_where_lighthouse_ends(options):
    def spike_of(name, *losses):
        """``losses``: of each stage, its first step's and that of the others."""
        runs = runs_of(BY_NAME[name], options)
        for run, (first, rest) in zip(runs, losses, strict=True):
            steps, held_out = range(run.first + 1, run.last + 1), None if run.stage.lighthouse else lambda step: 2.0
            write_metrics(run, steps, lambda step, run=run, first=first, rest=rest:
                          first if step == run.first + 1 else rest, 100, held_out)  # fmt: skip
        result = result_of(BY_NAME[name], runs, SCORE, options)
        for run in runs:
            (run.folder / "metrics.jsonl").unlink()
            run.folder.rmdir()
        return result["spike"]

    gentle = spike_of("causal W512, layers 3-6, dense 12:2:2", (5.0, 2.0), (2.5, 1.75), (2.0, 1.5))
    assert gentle == pytest.approx(0.25)
    assert spike_of("short, Lighthouse, dense", (5.0, 2.0), (3.0, 1.5), (2.0, 1.4)) == pytest.approx(0.5)
    assert spike_of("short 8192 then long", (5.0, 2.0), (3.0, 1.5)) is None  # dense all along


def test_curves_are_straight_between_points():
    curve = [[1, 10.0, 3.0], [2, 20.0, 2.0], [3, 40.0, 1.0]]
    assert crossing(curve, 2.5) == 15 and crossing(curve, 1.25) == 35 and crossing(curve, 0.9) is None
    assert crossing(curve, 3.5) == 10
    assert loss_at(curve, 30) == 1.5 and loss_at(curve, 5) is None and loss_at(curve, 41) is None


def test_the_report_compares_at_equal_tokens_and_at_equal_seconds(options, capsys):
    results = options.output / "results"
    for result in made_up(options):
        recall.write_json(results / f"{result['arm'].replace(' ', '-')}.json", result)
    time_to_loss.report(results, options.output / "report", None, ORDER)
    lines = (options.output / "report/time_to_loss.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    titles, dense, arm = rows[0], *(row for row in rows[2:4])
    assert titles == [
        "arm", "seed", "seconds", "of dense's", "held out", "Δ equal tokens", "Δ equal seconds",
        "s until dense's last loss", "of dense's", "beyond 16K", "Δ", "spike", "recall beyond 16K",
    ]  # fmt: skip
    assert dense == ["dense", "0", "960", "1.00", "2.0000", "", "", "960", "1.00", "1.9000", "", "", "25.0%"]
    # At 660 s dense was at 3 - 660/960 = 2.3125; the arm is at 2 after 360 + 60 * (0.4 / 0.45) * 5 seconds.
    assert arm == ["published 10:6", "0", "660", "0.69", "1.9500", "-0.0500", "-0.3625", "627", "0.65", "1.9000",
                   "+0.0000", "+0.750", "25.0%"]  # fmt: skip
    for row in (["published 10:6", "0", "published", "1–600", "200", "2.0000", "0.0"],
                ["published 10:6", "0", *["-0.5000 ± 0.0000"] * 5, "-0.2954 ± 0.0046", *["-0.3000 ± 0.0000"] * 2],
                ["published 10:6", "0", "2.0000 / 1.5000"], ["published 10:6", "0", "50.0% / 75.0%"]):  # fmt: skip
        assert row in rows
    assert (options.output / "report/time_to_loss.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for level, said in ((1.0, "not reached"), (2.45, "≤ 360")):  # measured first 360 s after the start, at 2.4
        time_to_loss.report(results, options.output / "report", level, ORDER)
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no finished arm"):
        time_to_loss.report(options.output, options.output, None, ORDER)
    del result["score"]["recall_far"]["recall"]  # as the study's first text was measured
    recall.write_json(results / "old.json", result | {"commit": "e08b9bd"})
    with pytest.raises(SystemExit, match=r"without recall by an earlier version; .*: e08b9bd$"):
        time_to_loss.report(results, options.output / "report", None, ORDER)


def test_prepare_then_a_run_that_is_refused(tmp_path, monkeypatch):
    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["time_to_loss", *map(str, arguments), "--output", str(tmp_path / "out")])
        time_to_loss.main()

    books = write_documents(tmp_path / "books", train=40_000, validation=40_000)
    with pytest.raises(SystemExit, match="run prepare first"):
        main("run", "--arms", "dense")
    main("prepare", "--text", books, "--seq-len", 1024, "--steps", 32)
    assert json.loads((tmp_path / "out/text/about.json").read_text())["train"] == 32
    with pytest.raises(SystemExit, match="without text/"):
        main("prepare", "--text", books)
    (tmp_path / "out/study.json").write_text('{"steps": 960}')
    with pytest.raises(SystemExit, match="choose another --output"):
        main("run", "--arms", "dense")
    with pytest.raises(SystemExit, match=r"'short 8192 then long' cannot run here: .* must divide 1,024"):
        main("run", "--arms", "short 8192 then long")
