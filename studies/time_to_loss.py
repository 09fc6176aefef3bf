#!/usr/bin/env python
"""After how many seconds of training does a model reach a held-out loss, and does it then use its long context?

    python studies/time_to_loss.py prepare --text DATA/books DATA/c4 --output outputs/time_to_loss
    python studies/time_to_loss.py run --output outputs/time_to_loss --arms dense "published 10:6"
    python studies/time_to_loss.py report --output outputs/time_to_loss

    python studies/time_to_loss.py base --output outputs/from_2k
    python studies/time_to_loss.py run --output outputs/from_2k --start outputs/from_2k/base --steps 320

QUESTION, asked before any run: at 98,304 tokens, which chain of stages, each with its attention, gets the 32M model
(train_configs/32m_32k.toml, k = 1,536) in 960 steps to dense's final held-out loss in the fewest seconds, and how do
loss beyond 16K and recall beyond 16K then compare with dense's?

MEASURE. Every arm trains on the same text in the same order, with as many tokens per step: books and C4, a fifth of it
quotes of what the same sequence has told before (recall.py), one sequence per step. A stage with a shorter context has
more sequences per step. Each sequence takes its last label too, so twelve short ones take 11 tokens more of the text
than one long one, and the long ones of a later stage begin so much further on (6,600 tokens after 600 steps). *Seconds*
are steps times tokens per step over the median tokens/s that the stage logged: no start-up, compilation, validation or
checkpoint. A stage in which every eighth step is dense logs every step, and its seconds are those of both kinds: the
number of Lighthouse steps at their median, and that of dense ones at theirs. *Held out* is the dense loss on twelve
pieces of held-out books with their own quotes, every sixteenth of the steps, in dense stages of the full context only.
*Spike* is the training loss of the first step of the first dense stage that follows one through Lighthouse, minus the
mean of the last 50 steps before it (dense ones among them left out). After the last stage, dense, on 36 held-out
pieces: loss by position, recall by distance. Reported: the gap to dense of the same seed at equal tokens and at equal
seconds (its curve interpolated), seconds until dense's final loss. All arms train on the same piece in the same step,
so training losses are compared step by step, too: texts differ more than arms do. "dense, again" is the noise of one
arm run twice.

From random weights, the arms that were scored had not learned to look back after 960 steps, dense included. ``base``
trains dense weights of short sequences first, in more and smaller steps, on the same text with more quotes (two fifths:
with a fifth, looking back was just being learned after 3,000 steps), as near as those sequences are long. With
``--start`` all arms begin with them, their optimizer anew. That is how long contexts are trained in practice, and what
recall can be measured on. Then ``base`` finds out which of their layers look back further than 128 tokens
(scripts/look_back.py): it is not the same ones after every training, not even of one seed. Arms with "local layers" run
all the others through Lighthouse, or through the window.

``prepare`` writes OUTPUT/text, which can be carried to another machine (25 MB); ``run`` plants, shuffles by the seed,
and runs one arm per GPU at a time. Killed and started again, it continues; finished arms, OUTPUT/results/ARM.json, are
skipped. Arms share the stages that they begin with. Settings after "--" go to every stage.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import recall
from time_to_loss_arms import ARMS, PARTS, Arm, Run, runs_of
from time_to_loss_report import report
from torchtitan.experiments.lighthouse.errors import exit_on_refusal
from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    checkpoints_in,
    complete_checkpoints_in,
    find_checkpoint,
    settings_of,
    step_of,
)
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, read_metrics, usual_rate

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "studies/results/time_to_loss"

#: Held-out pieces that are scored after the last stage.
SCORED = 36
#: Held-out sequences that tell which layers of the base weights look back.
LOOKED_AT = 64
#: What ``base`` finds out about them, in OUTPUT.
LOOK_BACK = "look_back.json"
#: Quotes in the text that base weights are trained on.
BASE_SHARE = 0.4
#: Steps before the switch that the spike is measured from.
BEFORE_SWITCH = 50


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Wait until no other arm, and no trainer that outlived a killed study, trains here; yields the lock's file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is being trained by another process: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def call(command: list[str], log_file: Path, device: str | None, inherited: tuple[int, ...] = ()) -> None:
    """Run a command on a device, its output appended to a file.

    Raises:
        RuntimeError: with the end of the output, if it fails.
    """
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with log_file.open("a") as log:
        # What it inherits keeps the folder locked should this process die before it does.
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, pass_fds=inherited).returncode
    if code:
        end = "\n".join(log_file.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"exit status {code}, see {log_file}:\n{end}")


def train_arm(arm: Arm, options: argparse.Namespace, device: str | None) -> None:
    """Train what is not trained yet."""
    for one in runs_of(arm, options):
        with alone_in(one.folder) as lock:
            if not one.done:
                call(one.command, one.folder.with_name(f"{one.folder.name}.log"), device, (lock,))
            if not one.done:
                raise RuntimeError(f"{one.folder} ended without a checkpoint of step {one.last}")
            remove_checkpoints(one.checkpoints, options.steps)


def score_arm(arm: Arm, options: argparse.Namespace, device: str | None) -> None:
    """Score a trained arm, and write its result."""
    runs = runs_of(arm, options)
    final, score_file = runs[-1], runs[-1].folder / "score.json"
    if not score_file.exists():
        text = options.output / f"text-seed{options.seed}/validation.jsonl.gz"
        program = [sys.executable, str(Path(recall.__file__).resolve())]
        words = [str(final.checkpoints / f"step-{final.last}"), "--text", str(text), f"--sequences={SCORED}"]
        call([*program, *words, f"--output={score_file}"], final.folder.with_name(f"{final.folder.name}.log"), device)
    recall.write_json(result_file(arm, options), result_of(arm, runs, json.loads(score_file.read_text()), options))


def remove_checkpoints(folder: Path, steps: int) -> None:
    """All that nothing can start from any more: not the newest, and no arm switches there."""
    ends = [list(accumulate(stage.parts for stage in arm.stages)) for arm in ARMS]
    switches = {end * steps // PARTS for of_arm in ends for end in of_arm[:-1]}
    newest = complete_checkpoints_in(folder)[-1]
    for old in checkpoints_in(folder):
        if step_of(old) not in switches and step_of(old) < step_of(newest):
            shutil.rmtree(old)


def result_file(arm: Arm, options: argparse.Namespace) -> Path:
    name = f"{arm.name}-seed{options.seed}".replace(",", "").replace(":", "-").replace(" ", "-")
    return options.output / "results" / f"{name}.json"


def result_of(arm: Arm, runs: list[Run], score: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What is kept of an arm, from its runs' metrics and its score."""
    stages: list[dict[str, Any]] = []
    curve: list[list[float]] = []
    training: dict[str, float] = {}  # by step
    seconds, before, spike = 0.0, None, None  # before: the mean loss before a switch, where it was through Lighthouse
    for one in runs:
        records = [r for r in read_metrics(one.folder / METRICS_FILE) if one.first < r["step"] <= one.last]
        logged = [record for record in records if "loss" in record]
        per_step = logged[-1]["tokens_seen"] / logged[-1]["step"]
        speed = usual_rate(logged)
        for record in records:
            if "validation_loss" in record:
                at = seconds + (record["step"] - one.first) * per_step / speed
                curve.append([record["step"], round(at, 3), record["validation_loss"]])
        training |= {str(record["step"]): round(record["loss"], 4) for record in logged}
        is_dense = one.stage.lighthouse is None
        if before is not None and spike is None and is_dense:
            spike = logged[0]["loss"] - before
        last_loss = fmean(r["loss"] for r in logged if r["step"] > one.last - BEFORE_SWITCH and not r.get("dense"))
        before = None if is_dense else last_loss
        seconds += (one.last - one.first) * per_step / speed
        stages.append(
            asdict(one.stage)
            | {"first": one.first, "last": one.last, "tokens_per_second": speed, "last_training_loss": last_loss}
            | {"memory_gib": max(record.get("memory_gib", 0) for record in logged)}
        )
    return {
        **{"arm": arm.name, "seed": options.seed, "seconds": round(seconds, 3), "spike": spike},
        **{"held_out": curve[-1][2], "score": score, "stages": stages, "curve": curve},
        "training": training,
        "settings": study_settings(options),
        "command": [launch.as_line(one.command) for one in runs],
        **{"gpu": score["device"], "torch": score["torch"], "commit": options.commit},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def study_settings(options: argparse.Namespace) -> dict[str, Any]:
    config = options.config.resolve()
    name = str(config.relative_to(REPOSITORY)) if config.is_relative_to(REPOSITORY) else str(config)
    settings = {"config": name, "overrides": options.overrides, "seq_len": options.seq_len, "steps": options.steps}
    if options.start is not None:
        settings |= {"start": start_settings(options.start)}
    return settings if options.local_layers is None else settings | {"local_layers": options.local_layers}


def start_settings(checkpoint: Path) -> dict[str, Any]:
    """What the weights that all arms start from have been trained with, wherever they lie."""
    training = settings_of(checkpoint)["training"]
    return {"seq_len": training["seq_len"], "sequences": training["local_batch_size"], "steps": step_of(checkpoint)}


def devices() -> list[str | None]:
    """Those of CUDA_VISIBLE_DEVICES, or all GPUs; one None without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    return [name for name in visible.split(",") if name] or [None]


def run(options: argparse.Namespace) -> int:
    """Every arm that is not finished, one per device at a time; returns how many failed.

    While an arm is scored, the next one starts: a GPU has nothing to do in either's first half minute, and an arm's
    speed is a median of its steps.
    """
    waiting, failed, lock = list(options.arms), [], threading.Lock()

    def attempt(part: Callable[[Arm, argparse.Namespace, str | None], None], arm: Arm, device: str | None) -> bool:
        began = time.monotonic()
        try:
            part(arm, options, device)
            outcome = f"done, {time.monotonic() - began:.0f} s"
        except Exception as error:  # the other arms go on
            failed.append(arm)
            outcome = f"failed: {error}"
        print(f"{arm.name}, seed {options.seed}: {part.__name__} {outcome}", flush=True)
        return arm not in failed

    def next_arm() -> Arm | None:
        with lock:
            return waiting.pop(0) if waiting else None

    def work(device: str | None) -> None:
        scorings: list[threading.Thread] = []
        while arm := next_arm():
            if result_file(arm, options).exists():
                print(f"{arm.name}, seed {options.seed}: already finished", flush=True)
            elif attempt(train_arm, arm, device):
                scorings.append(threading.Thread(target=attempt, args=(score_arm, arm, device), daemon=True))
                scorings[-1].start()
        for scoring in scorings:
            scoring.join()

    # Daemons: Ctrl-C must not start the next arms.
    workers = [threading.Thread(target=work, args=(device,), daemon=True) for device in devices()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(failed)


def main() -> None:
    arguments, overrides = launch.split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "base", "run", "report"))
    parser.add_argument("--output", type=Path, default=Path("outputs/time_to_loss"))
    parser.add_argument("--text", nargs="+", type=Path, help="prepare: folders with files named *train*, *validation*")
    parser.add_argument("--seq-len", type=int, default=98304, help="prepare: tokens per sequence")
    parser.add_argument("--steps", type=int, help=f"of every arm, a multiple of {PARTS} (default: 960, or prepare's)")
    parser.add_argument("--base", nargs=3, type=int, default=(2048, 16, 3000), metavar=("TOKENS", "SEQUENCES", "STEPS"),
                        help="base: tokens per sequence, sequences per step, steps (default: %(default)s)")  # fmt: skip
    parser.add_argument("--start", type=Path, help="run: all arms start from these weights, OUTPUT/base")
    parser.add_argument("--prepared", type=Path, help="run: what prepare wrote (default: OUTPUT/text)")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "train_configs/32m_32k.toml", help="run: the model")
    parser.add_argument("--seed", type=int, default=0, help="run: of the weights and the order of the text")
    parser.add_argument("--commit", help="run: kept in the results (default: git's HEAD)")
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=", ".join(names))
    parser.add_argument("--results", type=Path, help=f"report: default OUTPUT/results, else {RESULTS.name}'s")
    parser.add_argument("--level", type=float, help="report: seconds until this loss (default: dense's last)")
    options = parser.parse_args(arguments, argparse.Namespace(overrides=overrides, local_layers=None))
    options.output = options.output.resolve()
    if options.command == "prepare":
        options.steps = options.steps or 960
        if not options.text or options.steps % PARTS or (options.output / "text").exists():
            raise SystemExit(f"prepare needs --text, --steps a multiple of {PARTS}, and an --output without text/")
        recall.prepare(options.text, options.output / "text", options.seq_len, options.steps, held_out=SCORED)
    elif options.command == "base":
        train_base(options)
    elif options.command == "run":
        start_and_run(options)
    else:
        found = options.output / "results"
        folder = options.results or (found if found.is_dir() else RESULTS)
        report(folder, options.output, options.level, [arm.name for arm in ARMS])


def prepared_text(options: argparse.Namespace) -> Path:
    prepared = options.prepared or options.output / "text"
    if not (prepared / "about.json").is_file():
        raise SystemExit(f"time_to_loss: {prepared} holds no prepared text; run prepare first, or name it: --prepared")
    return prepared


def train_base(options: argparse.Namespace) -> None:
    """A dense model of short sequences, OUTPUT/base, and which of its layers look back, OUTPUT/look_back.json."""
    tokens, sequences, steps = options.base
    text = options.output / f"base-text-seed{options.seed}"
    recall.plant_and_shuffle(prepared_text(options), text, tokens, options.seed, BASE_SHARE)
    settings = ["--job.config_file", str(options.config), f"--job.dump_folder={options.output / 'base'}"]
    settings += ["--training.dataset=c4_local", f"--training.dataset_path={text}"]
    settings += [f"--training.seq_len={tokens}", f"--training.local_batch_size={sequences}", "--lighthouse.no-enable"]
    settings += [f"--training.steps={steps}", f"--lr_scheduler.total_steps={steps}", "--checkpoint.keep_latest_k=2"]
    settings += ["--checkpoint.interval=1000", f"--debug.seed={options.seed}", "--metrics.log_freq=20"]
    command = launch.trainer_command(launch.one_node(1), [*settings, *options.overrides])
    log_file, device = options.output / "base.log", devices()[0]
    call(command, log_file, device)
    words = ["--dataset=c4_local_validation", f"--dataset-path={text}", f"--sequences={LOOKED_AT}"]
    find = [sys.executable, str(REPOSITORY / "scripts/look_back.py"), str(options.output / "base"), *words]
    call([*find, f"--output={options.output / LOOK_BACK}"], log_file, device)


def start_and_run(options: argparse.Namespace) -> None:
    prepared = prepared_text(options)
    about = json.loads((prepared / "about.json").read_text())
    options.seq_len, options.steps = about["seq_len"], options.steps or about["steps"]
    recall.plant_and_shuffle(prepared, options.output / f"text-seed{options.seed}", options.seq_len, options.seed)
    if options.steps % PARTS:
        raise SystemExit(f"time_to_loss: --steps {options.steps}: must be a multiple of {PARTS}")
    if options.start is not None:
        with exit_on_refusal("time_to_loss"):
            options.start = find_checkpoint(options.start.resolve())
        found = options.output / LOOK_BACK
        options.local_layers = json.loads(found.read_text())["layers"] if found.exists() else None
    by_name = {arm.name: arm for arm in ARMS}
    options.arms = [by_name[name] for name in dict.fromkeys(options.arms)]  # in the order that was asked for
    for arm in options.arms:
        if reason := arm.cannot_run(options.seq_len, options.local_layers):
            raise SystemExit(f"time_to_loss: {arm.name!r} cannot run here: {reason}")
    # Runs of other settings in the same folder would be mixed with these.
    study, settings = options.output / "study.json", study_settings(options)
    if study.exists() and json.loads(study.read_text()) != settings:
        raise SystemExit(f"time_to_loss: {study} says {study.read_text()}, now {settings}: choose another --output")
    recall.write_json(study, settings)
    if options.commit is None:
        git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        answer = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
        options.commit = answer.stdout.strip() if answer and not answer.returncode else None
    if failed := run(options):
        raise SystemExit(f"time_to_loss: {failed} of {len(options.arms)} arms failed")


if __name__ == "__main__":
    main()
