#!/usr/bin/env python
"""What is on a GPU when a training step needs most: every tensor at that moment, by cause.

    python benchmarks/peak_memory.py --runs "98k full checkpointing" 1m "1m offload" -- --training.dataset stdlib

Every run is the trainer itself on one GPU, with the settings that bench_train.py gives it and those after ``--``. Torch
records all allocations; from those of the last step the moment with most memory in use is found, and what was in use
then is sorted by the Python code that asked for it. Writes a file for each run, a table of all (peak_memory.md), and
each run's log and metrics.
"""

from __future__ import annotations

import argparse
import json
import linecache
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_train import REPOSITORY, RUNS
from torchtitan.experiments.lighthouse.runs import launch

GIB = 2**30

#: A part of a file's name, a part of a function's, and the cause of what is allocated there or in what it calls. The
#: first row that fits counts.
CAUSES = (
    ("infra/offload.py", "", "inputs of layers on their way back"),
    ("loss.py", "", "loss"),
    ("", "_precompute_freqs_cis", "rotary table"),
    ("torch/optim/", "", "optimizer"),
    ("fsdp", "foreach_reduce", "gradients"),
    ("fsdp", "post_backward", "gradients"),
    ("fsdp", "reduce", "gradients"),
    ("fsdp", "", "weights, gathered"),
    ("torch/nn/modules/module.py", "to_empty", "weights"),
    ("", "clip_grad_norm_", "gradient norm"),
    ("_aot_autograd/", "backward", "inside a layer, backward"),
)

#: What compiled code of a layer allocates in the forward: its output, which is the next one's input, and what else it
#: keeps or uses.
FORWARD, INPUT, KEPT = "_aot_autograd/", "inputs of layers", "kept by layers, beside inputs"

#: Autograd's own functions, of the embedding and the last norm, run where there is no Python.
OTHER, NO_PYTHON = "other", "embedding and last norm, backward"

#: The function below whose allocation begins the recorded step.
MARK = "_mark_step"


def at_peak(trace: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The allocations in use when they were most, after the last mark.

    Args:
        trace: events of torch's allocator, in their order.
    """
    events = list(trace)
    marks = [at for at, event in enumerate(events) if any(frame["name"] == MARK for frame in event.get("frames", ()))]
    in_use: dict[int, Mapping[str, Any]] = {}
    used = most = 0
    peak: list[Mapping[str, Any]] = []
    grew = False
    for at, event in enumerate(events):
        if event["action"] == "alloc":
            in_use[event["addr"]] = event
            used += event["size"]
            grew = True
        elif event["action"] == "free_completed" and event["addr"] in in_use:
            # The most so far is copied only once it is left.
            if grew and used > most and marks and at > marks[-1]:
                most, peak = used, list(in_use.values())
            grew = False
            used -= in_use.pop(event["addr"])["size"]
    return list(in_use.values()) if used > most else peak


def cause(event: Mapping[str, Any], input_bytes: int) -> str:
    """Of one allocation.

    Args:
        input_bytes: of a layer's input.
    """
    frames = event.get("frames", ())
    for file, function, name in CAUSES:
        if any(file in frame["filename"] and function in frame["name"] for frame in frames):
            return name
    compiled = any(FORWARD in frame["filename"] for frame in frames)
    embedding = any("nn/modules/sparse.py" in frame["filename"] for frame in frames)
    if compiled or embedding:
        return INPUT if event["size"] == input_bytes else KEPT
    return OTHER if any(frame["filename"].endswith(".py") for frame in frames) else NO_PYTHON


def by_cause(events: Iterable[Mapping[str, Any]], input_bytes: int) -> dict[str, int]:
    """Bytes of each cause, the largest first."""
    found: dict[str, int] = {}
    for event in events:
        name = cause(event, input_bytes)
        found[name] = found.get(name, 0) + event["size"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def largest(events: Iterable[Mapping[str, Any]], input_bytes: int, count: int = 24) -> list[dict[str, Any]]:
    """The largest tensors that are no layer's input, with the line that asked for each."""
    named = [(event, cause(event, input_bytes)) for event in events]
    chosen = sorted((pair for pair in named if pair[1] != INPUT), key=lambda pair: -pair[0]["size"])[:count]
    return [{"gib": event["size"] / GIB, "cause": name, "line": _line(event)} for event, name in chosen]


def _line(event: Mapping[str, Any]) -> str:
    for frame in event.get("frames", ()):
        if frame["filename"].endswith(".py"):
            text = linecache.getline(frame["filename"], frame["line"]).strip()
            return f"{Path(frame['filename']).name}:{frame['line']} {text}"
    return ""


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """All runs beside each other, in GiB."""
    names = list(runs)
    causes: dict[str, None] = {}
    for run in runs.values():
        causes |= dict.fromkeys(run["causes"])
    lines = ["| GiB | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]

    def row(title: str, values: Sequence[float]) -> None:
        lines.append(f"| {title} | " + " | ".join(f"{value:.2f}" if value else "" for value in values) + " |")

    for name in causes:
        row(name, [run["causes"].get(name, 0) / GIB for run in runs.values()])
    for title in ("in use", "reserved", "predicted", "pinned on the host"):
        row(title, [run[title] / GIB for run in runs.values()])
    return "\n".join(lines) + "\n"


def _mark_step() -> None:
    import torch

    torch.empty(1, device="cuda")


def train(file: Path) -> None:
    """On one GPU, with the trainer's settings as arguments; what its last step needed goes to the file."""
    import torch
    from torchtitan.experiments.lighthouse.planning.memory import peak_gib
    from torchtitan.experiments.lighthouse.planning.workload import workload
    from torchtitan.experiments.lighthouse.seams.settings import main as run
    from torchtitan.experiments.lighthouse.train import LighthouseTrainer

    class Recorded(LighthouseTrainer):
        def check_before_build(self) -> None:
            super().check_before_build()
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=2_000_000)

        def around_step(self):
            if self.step == self.job_config.training.steps:
                _mark_step()
            return super().around_step()

        def end_step(self) -> None:
            if self.step == self.job_config.training.steps:
                self.write()
            super().end_step()

        def write(self) -> None:
            torch.cuda.synchronize()
            (trace,) = (events for events in torch.cuda.memory._snapshot()["device_traces"] if events)
            torch.cuda.memory._record_memory_history(enabled=None)
            work = workload(self.job_config, 1)
            input_bytes, events = 2 * work.tokens_at_once * work.dim, at_peak(trace)
            found = {
                "causes": by_cause(events, input_bytes),
                "in use": sum(event["size"] for event in events),
                "reserved": torch.cuda.max_memory_reserved(),
                "predicted": round(peak_gib(work) * GIB),
                "pinned on the host": torch.cuda.host_memory_stats().get("allocated_bytes.current", 0),
                "largest": largest(events, input_bytes),
            }
            file.write_text(json.dumps(found, indent=1))

    run(Recorded)


def measure(name: str, options: argparse.Namespace) -> Mapping[str, Any] | None:
    """Train for a few steps in a process of its own; None if that failed, whose log then says why."""
    config, overrides = RUNS[name]
    folder = (options.output / name.replace(" ", "-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    file = folder / "peak.json"
    settings = [
        *("--job.config_file", str(REPOSITORY / "train_configs" / config), f"--job.dump_folder={folder}"),
        *(f"--training.steps={options.steps}", "--training.global_batch_size=-1", "--metrics.log_freq=1"),
        *("--metrics.no-enable_tensorboard", "--checkpoint.no-enable", *overrides, *options.overrides),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with (folder / "log.txt").open("w") as log:
        try:
            command = [*torchrun, str(Path(__file__).resolve()), "--worker", str(file), *settings]
            code = subprocess.run(command, stdout=log, stderr=log, timeout=options.timeout).returncode
        except subprocess.TimeoutExpired:
            code = "too slow"
    if code != 0 or not file.exists():
        print(f"{name}: failed ({code}), see {folder / 'log.txt'}", flush=True)
        return None
    return json.loads(file.read_text())


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        file = Path(sys.argv[2])
        del sys.argv[1:3]
        train(file)
        return
    arguments, overrides = launch.split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["98k full checkpointing", "1m"]
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=default, metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--steps", type=int, default=2, help="the last one is looked at (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds before a run is given up")
    parser.add_argument("--output", type=Path, default=Path("outputs/peak_memory"))
    options = parser.parse_args(arguments, argparse.Namespace(overrides=overrides))
    runs: dict[str, Mapping[str, Any]] = {}
    for name in options.runs:
        if found := measure(name, options):
            runs[name] = found
            (options.output / "peak_memory.md").write_text(table(runs), encoding="utf-8")
    if not runs:
        raise SystemExit("peak_memory: no run succeeded")
    print(table(runs))


if __name__ == "__main__":
    main()
