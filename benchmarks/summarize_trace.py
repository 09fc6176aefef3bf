#!/usr/bin/env python
"""Where the GPU's time goes in a training step, from a trace of torchtitan's profiler.

    torchrun … -m torchtitan.experiments.lighthouse.train … --profiling.enable_profiling --profiling.profile_freq 12
    python benchmarks/summarize_trace.py outputs/RUN/profile_traces/iteration_12/rank0_trace.json [--kernels 20]

The trace's last step is summed up, as the device ran it; what the device still did of the step before is left out.
Compute is summed by kind. Communication is summed by process group, and its exposed part is the time during which
nothing is computed. Idle is when the device does neither.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What a kernel's name says it does; the first that fits. The rest are "other".
KINDS = {
    "attention": ("cudnn", "flash", "fmha", "sdpa"),
    "Lighthouse kernels": ("_norm_scores", "_pick_parents", "_order_kernel", "_pool_kernel", "_spread_kernel"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "compiled elementwise": ("triton_",),
    "optimizer and lists": ("multi_tensor",),
    "copies and fills": ("memcpy", "memset", "copy", "fill"),
}

#: How the profiler names a step.
STEP = "ProfilerStep"

Spans = list[tuple[float, float]]


@dataclass
class Summary:
    """Microseconds of one step on one device."""

    total: float
    idle: float
    compute: dict[str, float]
    communication: dict[str, float]
    """By process group: when one of its collectives runs."""
    exposed: dict[str, float]
    """By process group: the part of it during which no other kernel runs."""
    kernels: dict[str, tuple[int, float]] = field(repr=False)
    """By name: how often, and how long together."""


def read_trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return json.load(file)["traceEvents"]


def summarize(events: list[dict[str, Any]]) -> Summary:
    """Sum up the device's events of the last step.

    Raises:
        ValueError: for a trace without any.
    """
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps = [event for event in events if event.get("cat") == "gpu_user_annotation" and STEP in event["name"]]
    if steps:
        last = max(steps, key=lambda event: event["ts"])
        # The device's span: the host, which runs ahead, begins the step while the device is still busy with the last.
        work = [event for event in work if last["ts"] <= event["ts"] < last["ts"] + last["dur"]]
    if not work:
        raise ValueError("the trace holds no work of a GPU")
    compute: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[int, float]] = {}
    busy: Spans = []
    collectives: dict[str, Spans] = defaultdict(list)
    for event in work:
        name, start, length = event["name"], event["ts"], event["dur"]
        count, time = kernels.get(name, (0, 0.0))
        kernels[name] = count + 1, time + length
        if "nccl" in name.lower():
            collectives[_collective(event)].append((start, start + length))
        else:
            busy.append((start, start + length))
            compute[_kind(name)] += length
    busy = _merged(busy)
    communication = {name: _merged(spans) for name, spans in collectives.items()}
    everything = _merged(busy + [span for spans in communication.values() for span in spans])
    total = everything[-1][1] - everything[0][0]
    return Summary(
        total,
        total - _length(everything),
        dict(compute),
        {name: _length(spans) for name, spans in communication.items()},
        {name: _length(_merged(busy + spans)) - _length(busy) for name, spans in communication.items()},
        kernels,
    )


def report(summary: Summary) -> str:
    lines = ["| | ms | share of the step |", "| --- | --- | --- |"]

    def add(name: str, time: float) -> None:
        lines.append(f"| {name} | {time / 1e3:.1f} | {time / summary.total:.1%} |")

    add("step", summary.total)
    for name, time in sorted(summary.compute.items(), key=lambda item: -item[1]):
        add(name, time)
    for name, time in sorted(summary.communication.items(), key=lambda item: -item[1]):
        add(f"communication, {name}", time)
        add("… of it exposed", summary.exposed[name])
    add("idle", summary.idle)
    return "\n".join(lines)


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in lower for mark in marks)), "other")


def _collective(event: dict[str, Any]) -> str:
    arguments = event.get("args", {})
    group = arguments.get("Process Group Description") or arguments.get("Process Group Name") or "unknown group"
    return f"{group} {arguments.get('Collective name', '')}".strip()


def _merged(spans: Spans) -> Spans:
    """The union of intervals, as disjoint ones in order."""
    union: Spans = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="rankN_trace.json, or .json.gz")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="also list the N longest kernels")
    options = parser.parse_args()
    try:
        summary = summarize(read_trace(options.trace))
    except (OSError, ValueError) as error:
        raise SystemExit(f"summarize_trace: {options.trace}: {error}") from error
    print(report(summary))
    longest = sorted(summary.kernels.items(), key=lambda item: -item[1][1])[: options.kernels]
    for name, (count, time) in longest:
        print(f"{time / 1e3:10.2f} ms {count:6} × {name[:120]}")


if __name__ == "__main__":
    main()
