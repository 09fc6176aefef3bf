#!/usr/bin/env python
"""A table and a figure of loss curves, from the runs' metrics.jsonl alone.

    python scripts/report.py outputs/demo/stage1 outputs/demo/stage2 outputs/demo/dense --output outputs/demo

A run that holds Stage 2 continues the Stage 1 run named before it. Writes summary.md and loss.png.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torchtitan.experiments.lighthouse.metrics import METRICS_FILE, read_metrics

#: Losses are noisy: the table and the smooth curves take means over so many logged steps, fewer for short runs.
LONGEST_WINDOW = 10


@dataclass
class Experiment:
    """One curve: a dense run, or Stage 1 with the Stage 2 that continues it."""

    name: str
    records: list[dict[str, Any]]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    def stage(self, stage: str) -> Experiment:
        return Experiment(stage, [record for record in self.records if record["stage"] == stage])

    @property
    def parts(self) -> list[Experiment]:
        """The stages that were run, in order: a mean across the switch would blur it."""
        return [part for stage in ("dense", "stage1", "stage2") if (part := self.stage(stage)).records]

    def smooth(self, window: int) -> list[float]:
        """Means over the last ``window`` logged steps."""
        losses = self.losses
        return [fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]

    @property
    def tokens_per_second(self) -> float:
        """Median per device, so that compilation, validation and checkpoints do not count."""
        return median(record["tokens_per_second"] for record in self.records)


def load_experiments(runs: list[Path]) -> list[Experiment]:
    """Read the runs and join every Stage 2 to the Stage 1 before it.

    Raises:
        SystemExit: for a run without metrics, or a Stage 2 that continues nothing.
    """
    experiments: list[Experiment] = []
    for run in runs:
        path = run / METRICS_FILE
        if not path.is_file():
            raise SystemExit(f"report: {path} does not exist; {run} is not the dump folder of a run that has started")
        records = [record for record in read_metrics(path) if "loss" in record]
        if not records:
            raise SystemExit(f"report: {path} holds no logged step yet")
        stage = records[0]["stage"]
        if stage != "stage2":
            experiments.append(Experiment(run.name, records))
        elif experiments and experiments[-1].records[-1]["stage"] == "stage1":
            first = records[0]["step"]
            earlier = [record for record in experiments[-1].records if record["step"] < first]
            experiments[-1] = Experiment("Lighthouse, then dense", earlier + records)
        else:
            raise SystemExit(f"report: {run} holds Stage 2: name its Stage 1 run just before it")
    return experiments


def common_window(experiments: list[Experiment]) -> int:
    """One window for all curves, so that they can be compared: a tenth of the shortest stage, within limits."""
    shortest = min(len(part.records) for experiment in experiments for part in experiment.parts)
    return max(1, min(LONGEST_WINDOW, shortest // 10))


def summary(experiments: list[Experiment], window: int) -> str:
    """The table; losses in nats per token."""
    rows = [("run", "steps", f"loss (last {window})", "tokens/s/device")]
    for experiment in experiments:
        stage1, stage2 = experiment.stage("stage1"), experiment.stage("stage2")
        if not stage2.records:
            rows.append(_row(experiment.name, experiment, window))
            continue
        rows.append(_row("Stage 1 (Lighthouse), at its end", stage1, window))
        first = stage2.losses[0]
        spike = f"{first:.4f} ({first - stage1.smooth(window)[-1]:+.4f})"
        rows.append(("spike at the switch, first dense step", f"{stage2.steps[0]:,}", spike, ""))
        rows.append(_row("Stage 2 (dense), at its end", stage2, window))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(name: str, part: Experiment, window: int) -> tuple[str, str, str, str]:
    return (
        name,
        f"{part.steps[0]:,}–{part.steps[-1]:,}",
        f"{part.smooth(window)[-1]:.4f}",
        f"{part.tokens_per_second:,.0f}",
    )


def draw(experiments: list[Experiment], window: int, path: Path) -> None:
    """Loss against steps, raw and smoothed, with the switch marked."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    for number, experiment in enumerate(experiments):
        color = f"C{number}"
        axes.plot(experiment.steps, experiment.losses, color=color, alpha=0.3, linewidth=0.8)
        parts = experiment.parts
        smooth = [loss for part in parts for loss in part.smooth(window)]
        axes.plot(experiment.steps, smooth, color=color, linewidth=1.6, label=experiment.name)
        if parts[-1].name == "stage2":
            switch = parts[-1].steps[0] - 0.5
            axes.axvline(switch, color=color, linestyle=":", linewidth=1)
            axes.annotate(
                "switch to dense",
                (switch, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -12),
                textcoords="offset points",
                color=color,
                fontsize=8,
            )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"Training loss, raw and as a mean over {window} logged steps", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="dump folders; a Stage 2 run right after its Stage 1 run")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for summary.md and loss.png")
    options = parser.parse_args(arguments)
    experiments = load_experiments(options.runs)
    options.output.mkdir(parents=True, exist_ok=True)
    window = common_window(experiments)
    table = summary(experiments, window)
    (options.output / "summary.md").write_text(table + "\n", encoding="utf-8")
    draw(experiments, window, options.output / "loss.png")
    print(f"\n{table}\n\n{options.output / 'summary.md'}\n{options.output / 'loss.png'}")


if __name__ == "__main__":
    main()
