#!/usr/bin/env python
"""Does a model that trained through Lighthouse, and then shortly dense, reach one that was dense from the start?

    python studies/recoverability.py run --text DATA/books DATA/c4 --output outputs/recoverability
    python studies/recoverability.py report --output outputs/recoverability

Every arm is one model (train_configs/32m_32k.toml) on the same tokens: Stage 1 for 10, 11 or 12 sixteenths of the
steps, the rest dense; or all of them dense. ``run`` first cuts the texts into pieces of one sequence each and shuffles
them, one shuffle per seed, held-out files apart, and then runs one arm per GPU at a time. Run again, it continues.
``report`` writes recoverability.md and recoverability.png from the runs' metrics.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torchtitan.experiments.lighthouse.data.records import read_documents
from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs.checkpoints import complete_checkpoints_in, step_of
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, mean_loss, read_metrics, recovered_after

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "train_configs/32m_32k.toml"
UNITS = 16

#: Losses of single sequences are noisy: curves and figures are means over so many steps.
WINDOW = 100


@dataclass(frozen=True)
class Arm:
    """One way to spend the steps."""

    name: str
    overrides: tuple[str, ...] = ()
    splits: tuple[int, ...] = (10,)
    """Sixteenths of the steps before the switch; none: dense from the start."""
    seed: int = 0
    """Of the weights and of the order of the text."""


ARMS = [
    Arm("dense", ("--lighthouse.no-enable",), ()),
    Arm("norm k512", (), (10, 11, 12)),
    Arm("dense, seed 1", ("--lighthouse.no-enable",), (), seed=1),
    Arm("norm k512, seed 1", seed=1),
    Arm("delayed k512", ("--lighthouse.selection=delayed",)),
    Arm("after_gather k512", ("--lighthouse.rope=after_gather",)),
    Arm("dilated k512", ("--lighthouse.scorer=dilated",)),
    Arm("norm k1024", ("--lighthouse.top_k=1024",)),
]


@dataclass
class Job:
    """One training run; ``after`` is the one whose checkpoint it starts from."""

    folder: Path
    command: list[str]
    last_step: int
    after: Job | None = None
    code: int | None = None

    @property
    def done(self) -> bool:
        return self.last_step in map(step_of, complete_checkpoints_in(self.folder / "checkpoint"))


def pieces(folders: list[Path], split: str, length: int) -> list[str]:
    """The files' text in pieces of ``length`` bytes, whatever is left of a file dropped."""
    found = []
    for folder in folders:
        files = sorted(str(file) for file in folder.rglob("*.json*") if split in file.name)
        text = "\n\n".join(document["text"] for document in read_documents(files)).encode()
        found += [text[start : start + length] for start in range(0, len(text) - length + 1, length)]
    return [piece.decode(errors="ignore") for piece in found]


def prepare(folders: list[Path], output: Path, seq_len: int) -> None:
    """Write seed0, seed1, … each with its shuffle of the training pieces and the same held-out ones."""
    length = seq_len - 1  # one sequence and its last label, with the tokens for begin and end
    train, held_out = (pieces(folders, split, length) for split in ("train", "validation"))
    if not train or not held_out:
        raise SystemExit(f"recoverability: {folders}: too little text (*train* and *validation* .json, .jsonl, .gz)")
    random.Random(0).shuffle(held_out)
    unfinished = output.with_name(f"{output.name}.unfinished")  # half of it would pass for all of it
    for seed in sorted({arm.seed for arm in ARMS}):
        order = random.Random(seed).sample(train, len(train))
        folder = unfinished / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in (("train", order), ("validation", held_out)):
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    unfinished.rename(output)
    print(f"{len(train):,} pieces of {length:,} bytes to train on, {len(held_out):,} held out", flush=True)


def jobs_of(arm: Arm, options: argparse.Namespace) -> Iterator[Job]:
    """Stage 1 and its Stage 2 runs, or the dense run."""
    unit = options.steps // UNITS
    folder, text = options.output / arm.name.replace(",", "").replace(" ", "-"), options.output / f"text/seed{arm.seed}"
    # Dense runs log every step: the spike is the first. What is held out is scored with dense attention only.
    dense = ["--metrics.log_freq=1", "--validation.enable", f"--validation.dataset_path={text}"]
    dense += [f"--validation.freq={unit}", f"--checkpoint.interval={4 * unit}"]
    common = [
        *(f"--training.dataset_path={text}", f"--debug.seed={arm.seed}", f"--lr_scheduler.total_steps={options.steps}"),
        *options.overrides,
    ]

    def train(name: str, steps: int, *more: str) -> Job:
        run = folder / name
        settings = [f"--job.dump_folder={run}", f"--training.steps={steps}", *common, *arm.overrides, *more]
        return Job(
            run, launch.trainer_command(launch.one_node(1), ["--job.config_file", str(CONFIG), *settings]), steps
        )

    if not arm.splits:
        yield train("dense", options.steps, *dense)
        return
    yield (stage1 := train("stage1", max(arm.splits) * unit, f"--checkpoint.interval={unit}"))
    for split in arm.splits:
        run = folder / f"stage2-{split}-{UNITS - split}"
        start = stage1.folder / f"checkpoint/step-{split * unit}"
        command = launch.resume_dense_command(start, run, launch.one_node(1), dense)
        yield Job(run, command, options.steps, after=stage1)


def run(jobs: list[Job]) -> None:
    """All jobs in order, one a device at a time, each as soon as what it starts from is there; sets their codes."""
    waiting = list(jobs)
    lock = threading.Condition()

    def next_ready() -> Job | None:
        return next((job for job in waiting if job.after is None or job.after.code is not None), None)

    def work(device: int) -> None:
        environment = dict(os.environ)
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        while True:
            with lock:
                lock.wait_for(lambda: not waiting or next_ready())
                if not waiting:
                    return
                job = next_ready()
                waiting.remove(job)
            began, log_file = time.time(), job.folder.with_name(f"{job.folder.name}.log")
            if job.after is not None and job.after.code:
                code = job.after.code
            elif job.done:
                code = 0
            else:
                log_file.parent.mkdir(parents=True, exist_ok=True)
                with log_file.open("a") as log:
                    code = subprocess.run(job.command, stdout=log, stderr=log, env=environment).returncode
            outcome = "done" if code == 0 else f"failed ({code}), see {log_file}"
            print(f"{job.folder}: {outcome}, {time.time() - began:.0f} s", flush=True)
            with lock:
                job.code = code
                lock.notify_all()

    # Daemons: Ctrl-C, which also stops the runs, must not start the next ones.
    devices = range(max(1, torch.cuda.device_count()))
    workers = [threading.Thread(target=work, args=(device,), daemon=True) for device in devices]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@dataclass
class Curve:
    """One arm and split from its first step to its last."""

    name: str
    seed: int
    switch: int
    """The last step before the switch; 0 for a dense run."""
    losses: dict[int, float]
    held_out: dict[int, float]
    seconds: float
    """Training time on one device at each stage's median rate, without start-up, compilation and validation."""

    def mean(self, step: int) -> float:
        """Over the logged steps of the last ``WINDOW``, none of them on the other side of the switch."""
        return mean_loss(self.losses, step, WINDOW, after=self.switch if step > self.switch else 0)

    @property
    def last(self) -> int:
        return max(self.losses)


def read_curve(name: str, seed: int, folders: list[Path], switch: int) -> Curve | None:
    """Stage 1 up to the switch and what follows; None where a run is missing."""
    losses: dict[int, float] = {}
    held_out: dict[int, float] = {}
    seconds = 0.0
    for folder in folders:
        records = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
        until = switch if folder.name == "stage1" else max((record["step"] for record in records), default=0)
        steps = [record for record in records if "loss" in record and record["step"] <= until]
        if not steps:
            return None
        last = steps[-1]
        trained = last["step"] - (0 if folder is folders[0] else switch)
        seconds += trained * last["tokens_seen"] / last["step"] / median(step["tokens_per_second"] for step in steps)
        losses |= {record["step"]: record["loss"] for record in steps}
        held_out |= {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    return Curve(name, seed, switch, losses, held_out, seconds)


def read_curves(options: argparse.Namespace) -> list[Curve]:
    curves = []
    for arm in options.arms:
        first, *rest = jobs_of(arm, options)
        if not arm.splits:
            curves.append(read_curve(arm.name, arm.seed, [first.folder], 0))
        for split, job in zip(arm.splits, rest, strict=False):
            name = f"{arm.name}, {split}:{UNITS - split}"
            curves.append(read_curve(name, arm.seed, [first.folder, job.folder], split * options.steps // UNITS))
    return [curve for curve in curves if curve is not None]


def table(curves: list[Curve]) -> str:
    """Losses in nats per byte; differences are to the dense run of the same seed at the same step."""
    dense = {curve.seed: curve for curve in curves if not curve.switch}
    lines = [
        "| arm | steps | held out | − dense | training | − dense | spike | below Stage 1 after | seconds | × dense |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in curves:
        last, base = curve.last, dense.get(curve.seed)
        held_out = curve.held_out.get(last)
        cells = [curve.name, f"{last:,}", "" if held_out is None else f"{held_out:.4f}"]
        beside = base is not None and base is not curve
        both = beside and held_out is not None and last in base.held_out
        cells += [f"{held_out - base.held_out[last]:+.4f}" if both else "", f"{curve.mean(last):.4f}"]
        cells += [f"{curve.mean(last) - base.mean(last):+.4f}" if beside and last <= base.last else ""]
        if curve.switch and last > curve.switch:
            before = curve.mean(curve.switch)
            after = [step for step in curve.losses if step > curve.switch]
            back = recovered_after(curve.losses, curve.switch, WINDOW)
            cells += [f"{curve.losses[after[0]] - before:+.3f}", f"{back:,}" if back else "not yet"]
        else:
            cells += ["", ""]
        speed = f"{base.seconds / curve.seconds:.2f}" if beside and base.last == last else ""
        lines.append("| " + " | ".join([*cells, f"{curve.seconds:.0f}", speed]) + " |")
    return "\n".join(lines) + "\n"


def draw(curves: list[Curve], path: Path) -> None:
    """Training loss of the first arms of one seed; what is held out of all arms, as the difference to dense."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4), dpi=110, layout="constrained")
    dense = {curve.seed: curve for curve in curves if not curve.switch}
    headline = [curve for curve in curves if curve.seed == curves[0].seed][:4]
    for number, curve in enumerate(curves):
        base, color = dense.get(curve.seed), f"C{number}"
        if curve in headline:
            steps = sorted(step for step in curve.losses if step > WINDOW)
            for part in ([s for s in steps if s <= curve.switch], [s for s in steps if s > curve.switch]):
                label = curve.name if part and part[-1] == curve.last else None
                left.plot(part, [curve.mean(step) for step in part], color=color, linewidth=1.4, label=label)
        if base is not None and base is not curve:
            steps = [step for step in sorted(curve.held_out) if step in base.held_out]
            gaps = [curve.held_out[step] - base.held_out[step] for step in steps]
            right.plot([step - curve.switch for step in steps], gaps, "o-", color=color, markersize=3, label=curve.name)
    left.set(xlabel="step", ylabel=f"training loss, nats per byte, mean of {WINDOW} steps")
    right.set(xlabel="dense steps after the switch", ylabel="held-out loss − dense at the same step")
    right.axhline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9)
    if right.lines[:-1]:  # all but the line at zero
        right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    arguments, overrides = launch.split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--text", nargs="+", type=Path, help="folders with files named *train*, *validation*")
    parser.add_argument("--output", type=Path, default=Path("outputs/recoverability"))
    parser.add_argument("--steps", type=int, default=2400, help=f"of every arm, a multiple of {UNITS}")
    parser.add_argument("--seq-len", type=int, default=32768)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help=", ".join(names))
    options = parser.parse_args(arguments, argparse.Namespace(overrides=overrides))
    if options.steps % UNITS:
        raise SystemExit(f"recoverability: --steps {options.steps}: must be a multiple of {UNITS}")
    options.arms = [arm for arm in ARMS if arm.name in options.arms]
    options.output = options.output.resolve()
    jobs = [job for arm in options.arms for job in jobs_of(arm, options)]
    if options.command == "run":
        if not (options.output / "text").exists():
            if not options.text:
                raise SystemExit("recoverability: --text names the folders to train on")
            prepare(options.text, options.output / "text", options.seq_len)
        run(jobs)
    curves = read_curves(options)
    if not curves:
        raise SystemExit(f"recoverability: no run in {options.output} has both stages, or is dense, so far")
    text = table(curves)
    (options.output / "recoverability.md").write_text(text, encoding="utf-8")
    draw(curves, options.output / "recoverability.png")
    print("\n" + text)
    if failed := sum(bool(job.code) for job in jobs):
        raise SystemExit(f"recoverability: {failed} of {len(jobs)} runs failed")


if __name__ == "__main__":
    main()
