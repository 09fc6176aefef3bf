#!/usr/bin/env python
"""Whole training steps: tokens per second and device, and peak memory, dense beside Lighthouse.

    python benchmarks/bench_train.py --nproc 2 -- --training.dataset c4_local --training.dataset_path FOLDER
    python benchmarks/bench_train.py --nproc 1 --runs 1m -- …

Every run is the trainer itself, started by torchrun on a file of train_configs with the overrides below and those after
``--``; one sequence a device (or a group of context-parallel devices), no checkpoints. Rates are medians over the steps
after the warm-up, memory is the peak that the allocator reserved. Writes train.csv, train.md and each run's
log and metrics. Nothing is reported if the kernels do not agree with the plain-torch path.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from bench_attention import check
from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, read_metrics

from lighthouse import LighthouseConfig

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP = 4

#: Steps between two readings: as in real runs, the host need not wait for the device after each.
LOG_FREQ = 4

NO_CHECKPOINTING = ("--activation_checkpoint.mode=none",)
FULL_CHECKPOINTING = ("--activation_checkpoint.mode=full",)
MEMORY_BUDGET = ("--activation_checkpoint.mode=memory_budget", "--activation_checkpoint.memory_budget=0.9")

MILLION = (
    "--training.seq_len=1048576",
    "--lighthouse.layers=0--1",
    "--lighthouse.num_levels=4",
    "--lighthouse.top_k=4096",
    *FULL_CHECKPOINTING,
)

#: 88 GiB of host memory at 2,097,152 tokens.
OFFLOADED = "--activation_checkpoint.offload_layers=22"

GRAPH = "--training.cuda_graph"
FLASH4 = "--lighthouse.inner_attention=flash4"

Run = tuple[str, tuple[str, ...]]


def context_parallel_runs(degree: int) -> dict[str, Run]:
    """98,304 tokens and more, every sequence split over ``degree`` devices."""
    split = (f"--parallelism.context_parallel_degree={degree}",)
    return {
        f"98k cp{degree} dense": ("530m_cp.toml", (*NO_CHECKPOINTING, *split, "--lighthouse.no-enable")),
        f"98k cp{degree}": ("530m_cp.toml", (*NO_CHECKPOINTING, *split)),
        f"1m cp{degree}": ("530m_cp.toml", (*MILLION, *split)),
        f"1m cp{degree} layers 2-27": ("530m_cp.toml", (*MILLION, *split, "--lighthouse.layers=2-27")),
        f"2m cp{degree}": ("530m_cp.toml", (*MILLION, *split, "--training.seq_len=2097152")),
        f"4m cp{degree}": ("530m_cp.toml", (*MILLION, *split, "--training.seq_len=4194304")),
    }


#: Name to config file and overrides. A run whose name ends in "dense" is what those before the next one compare with.
RUNS: dict[str, Run] = {
    "98k dense": ("530m_dense.toml", NO_CHECKPOINTING),
    "98k": ("530m_stage1.toml", NO_CHECKPOINTING),
    "98k full checkpointing": ("530m_stage1.toml", FULL_CHECKPOINTING),
    "98k memory budget": ("530m_stage1.toml", MEMORY_BUDGET),
    "98k selective checkpointing": ("530m_stage1.toml", ()),
    "98k recommended": ("530m_recommended.toml", ()),
    "98k dilated": ("530m_stage1.toml", (*NO_CHECKPOINTING, "--lighthouse.scorer=dilated", "--lighthouse.dilation=4")),
    "98k plain torch": ("530m_stage1.toml", ("--lighthouse.backend=torch", *FULL_CHECKPOINTING)),
    "98k sparse gradient": ("530m_stage1.toml", (*NO_CHECKPOINTING, "--training.sparse_loss_gradient")),
    "98k fastest": ("530m_stage1.toml", (*MEMORY_BUDGET, "--training.sparse_loss_gradient", FLASH4)),
    "98k k2048": ("530m_stage1.toml", (*NO_CHECKPOINTING, "--lighthouse.top_k=2048")),
    "98k flash4 dense": ("530m_dense.toml", (*NO_CHECKPOINTING, FLASH4)),
    "32m graph dense": ("32m_32k.toml", ("--lighthouse.no-enable", GRAPH)),
    "32m dense": ("32m_32k.toml", ("--lighthouse.no-enable",)),
    "32m": ("32m_32k.toml", ()),
    "32m graph": ("32m_32k.toml", (GRAPH,)),
    "1m": ("530m_stage1.toml", MILLION),
    "98k offload": ("530m_stage1.toml", (*FULL_CHECKPOINTING, OFFLOADED)),
    "1m offload": ("530m_stage1.toml", (*MILLION, OFFLOADED)),
    "2m offload": ("530m_stage1.toml", (*MILLION, OFFLOADED, "--training.seq_len=2097152")),
    **context_parallel_runs(2),
    **context_parallel_runs(4),
}


@dataclass
class Row:
    """One run: tokens per second and device, GiB, and the losses of the first and the last step."""

    name: str
    tokens_per_second: float
    memory_gib: float
    first_loss: float
    last_loss: float


def measure(name: str, options: argparse.Namespace) -> Row | None:
    """Train for a few steps; None if the run failed, whose log then says why."""
    config, overrides = RUNS[name]
    folder = options.output / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        *("--job.config_file", str(REPOSITORY / "train_configs" / config), f"--job.dump_folder={folder}"),
        *(f"--training.steps={options.steps}", "--training.global_batch_size=-1"),
        *(f"--metrics.log_freq={LOG_FREQ}", "--metrics.no-enable_tensorboard", "--checkpoint.no-enable"),
        *overrides,
        *options.overrides,
    ]
    command = launch.trainer_command(launch.one_node(options.nproc), settings)
    (folder / METRICS_FILE).unlink(missing_ok=True)
    with (folder / "log.txt").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=options.timeout).returncode
        except subprocess.TimeoutExpired:
            code = "too slow"
    metrics = folder / METRICS_FILE
    steps = read_metrics(metrics) if metrics.exists() else []
    measured = [step for step in steps if step["step"] > WARM_UP]
    if code != 0 or not measured:
        print(f"{name}: failed ({code}), see {folder / 'log.txt'}", flush=True)
        return None
    row = Row(
        name,
        statistics.median(step["tokens_per_second"] for step in measured),
        max(step["memory_gib"] for step in steps),
        steps[0]["loss"],
        steps[-1]["loss"],
    )
    print(f"{name:28} {row.tokens_per_second:9,.0f} tokens/s/GPU {row.memory_gib:7.1f} GiB", flush=True)
    return row


def report(rows: list[Row], options: argparse.Namespace) -> str:
    lines = [
        f"{options.nproc} × {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, Triton {triton.__version__}; {options.steps} steps.",
        "",
        "| run | tokens/s/GPU | × dense | peak GiB | loss, first and last step |",
        "| --- | --- | --- | --- | --- |",
    ]
    dense = None
    for row in rows:
        dense = row if row.name.endswith("dense") else dense
        same_context = dense is not None and row.name.startswith(dense.name.removesuffix(" dense"))
        ratio = f"{row.tokens_per_second / dense.tokens_per_second:.2f}" if same_context else ""
        lines.append(
            f"| {row.name} | {row.tokens_per_second:,.0f} | {ratio} | {row.memory_gib:.1f} "
            f"| {row.first_loss:.3f}, {row.last_loss:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write(rows: list[Row], options: argparse.Namespace) -> None:
    with (options.output / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    (options.output / "train.md").write_text(report(rows, options), encoding="utf-8")


def main() -> None:
    arguments, overrides = launch.split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--nproc", type=int, default=max(1, torch.cuda.device_count()), help="devices; default: all")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds before a run is given up")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_train"))
    options = parser.parse_args(arguments, argparse.Namespace(overrides=overrides))
    if not torch.cuda.is_available():
        raise SystemExit("bench_train: needs a GPU")
    if options.steps < WARM_UP + LOG_FREQ:
        raise SystemExit(f"bench_train: --steps {options.steps}: must be at least {WARM_UP + LOG_FREQ}")
    check(LighthouseConfig(top_k=128))
    torch.cuda.empty_cache()
    rows = []
    for name in options.runs:
        if row := measure(name, options):
            rows.append(row)
            write(rows, options)
    if not rows:
        raise SystemExit("bench_train: no run succeeded")
    print("\n" + report(rows, options))


if __name__ == "__main__":
    main()
