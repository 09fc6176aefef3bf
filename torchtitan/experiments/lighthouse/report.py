#!/usr/bin/env python
"""Tables and a figure of loss curves, from the runs' metrics.jsonl alone.

    python scripts/report.py outputs/demo/stage1 outputs/demo/stage2 outputs/demo/dense --output outputs/demo

A run that holds Stage 2 continues the Stage 1 run named before it; the first dense run is what it is compared with.
Writes summary.md, loss.png, and report.html, one page with both and nothing beside it.
"""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

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

    def centred(self, window: int) -> list[float]:
        """Means over ``window`` logged steps around each: a curve that does not lag behind, for the eye."""
        before, after, losses = (window - 1) // 2, window // 2, self.losses
        return [fmean(losses[max(0, i - before) : i + after + 1]) for i in range(len(losses))]

    @property
    def tokens_per_second(self) -> float:
        """Median per device, so that compilation, validation and checkpoints do not count."""
        return median(record["tokens_per_second"] for record in self.records)

    @property
    def tokens(self) -> list[float]:
        return [record.get("tokens_seen", 0) for record in self.records]

    @property
    def hours(self) -> list[float]:
        """Since the start of its first stage, with everything: start-up, compilation, validation, checkpoints."""
        hours: list[float] = []
        for part in self.parts:
            before = hours[-1] if hours else 0.0
            hours += [before + record.get("wall_clock_s", 0.0) / 3600 for record in part.records]
        return hours

    def device_seconds(self, tokens: float) -> float:
        """Training time of the first ``tokens`` tokens on one device, at each stage's median rate."""
        total, seen = 0.0, 0.0
        for part in self.parts:
            here = min(tokens, part.tokens[-1]) - seen
            total += max(0.0, here) / part.tokens_per_second
            seen = max(seen, part.tokens[-1])
        return total


def load_experiments(runs: list[Path]) -> list[Experiment]:
    """Read the runs and join every Stage 2 to the Stage 1 before it.

    Raises:
        Refused: for a run without metrics, or a Stage 2 that continues nothing.
    """
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, read_metrics

    experiments: list[Experiment] = []
    for run in runs:
        path = run / METRICS_FILE
        if not path.is_file():
            raise Refused(f"{path} does not exist; {run} is not the dump folder of a run that has started")
        records = [record for record in read_metrics(path) if "loss" in record]
        if not records:
            raise Refused(f"{path} holds no logged step yet")
        stage = records[0]["stage"]
        if stage != "stage2":
            experiments.append(Experiment(run.name, records))
        elif experiments and experiments[-1].records[-1]["stage"] == "stage1":
            first = records[0]["step"]
            earlier = [record for record in experiments[-1].records if record["step"] < first]
            experiments[-1] = Experiment("Lighthouse, then dense", earlier + records)
        else:
            raise Refused(f"{run} holds Stage 2: name its Stage 1 run just before it")
    return experiments


def common_window(experiments: list[Experiment]) -> int:
    """One window for all curves, so that they can be compared: a tenth of the shortest stage, within limits."""
    shortest = min(len(part.records) for experiment in experiments for part in experiment.parts)
    return max(1, min(LONGEST_WINDOW, shortest // 10))


#: A heading, the column names and the rows below them.
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(experiments: list[Experiment], window: int) -> list[Table]:
    """Every stage's figures, and what became of every switch. Losses in nats per token."""
    rows: list[tuple[str, ...]] = []
    for experiment in experiments:
        for part in experiment.parts:
            name = {"stage1": "Stage 1 (Lighthouse)", "stage2": "Stage 2 (dense)"}.get(part.name, experiment.name)
            noise = stdev(part.losses[-window:]) if len(part.losses[-window:]) > 1 else 0.0
            rows.append(
                (
                    name if experiment.parts[-1].name == "stage2" else experiment.name,
                    f"{part.steps[0]:,}–{part.steps[-1]:,}",
                    f"{part.tokens[-1]:,.0f}",
                    f"{part.smooth(window)[-1]:.4f} ± {noise:.4f}",
                    f"{part.tokens_per_second:,.0f}",
                )
            )
    stages = ("Runs", ("run", "steps", "tokens seen", f"loss, mean of last {window}", "tokens/s/device"), rows)
    dense = next((experiment for experiment in experiments if experiment.parts[0].name == "dense"), None)
    switches: list[Table] = [
        (
            f"The switch of {experiment.name}",
            ("", ""),
            [*_switch(experiment, window), *(_against(experiment, dense, window) if dense else [])],
        )
        for experiment in experiments
        if experiment.parts[-1].name == "stage2" and len(experiment.parts) > 1
    ]
    return [stages, *switches]


def _switch(experiment: Experiment, window: int) -> list[tuple[str, str]]:
    from torchtitan.experiments.lighthouse.runs.records import recovered_after

    stage1, stage2 = experiment.stage("stage1"), experiment.stage("stage2")
    before, first = stage1.smooth(window)[-1], stage2.losses[0]
    losses = dict(zip(experiment.steps, experiment.losses, strict=True))
    recovered = recovered_after(losses, stage1.steps[-1], window * _steps_per_line(stage2))
    left = f"not within {len(stage2.steps):,} ({stage2.smooth(window)[-1] - before:+.4f})"
    return [
        ("spike, first dense step", f"{first:.4f} ({first - before:+.4f}) at step {stage2.steps[0]:,}"),
        ("dense steps until Stage 1's last level", f"{recovered:,}" if recovered else left),
    ]


def _steps_per_line(part: Experiment) -> int:
    """``metrics.log_freq``, as far as the file tells."""
    return min((after - before for before, after in pairwise(part.steps)), default=1)


def _against(experiment: Experiment, dense: Experiment, window: int) -> list[tuple[str, str]]:
    """Beside the dense run at the same steps."""
    stage2 = experiment.stage("stage2")
    baseline = dict(zip(dense.steps, dense.smooth(window), strict=True))
    gaps = [
        (step, loss - baseline[step])
        for step, loss in zip(stage2.steps, stage2.smooth(window), strict=True)
        if step in baseline
    ]
    if not gaps:
        return [(f"beside {dense.name}", "no step in common")]
    crossed = next((step for step, gap in gaps if gap <= 0), None)
    tokens = min(experiment.tokens[-1], dense.tokens[-1])
    ours, theirs = (run.device_seconds(tokens) for run in (experiment, dense))
    return [
        (
            f"dense steps until below {dense.name}",
            f"{crossed - stage2.steps[0] + 1:,}" if crossed else f"not within {len(gaps):,}",
        ),
        (f"last gap to {dense.name}", f"{gaps[-1][1]:+.4f} at step {gaps[-1][0]:,}"),
        (f"speed-up over {dense.name} at {tokens:,.0f} tokens", f"{theirs / ours:.2f}" if ours else "no rate yet"),
    ]


def as_markdown(table: Table) -> str:
    _, header, rows = table
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def as_page(found: list[Table], picture: Path) -> str:
    """One HTML file that needs no other."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = [
        f"<h2>{html.escape(heading)}</h2><table>{row(header, 'th') if any(header) else ''}"
        + "".join(row(cells, "td") for cells in rows)
        + "</table>"
        for heading, header, rows in found
    ]
    image = base64.b64encode(picture.read_bytes()).decode()
    style = (
        "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:left}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Loss curves</title><style>{style}</style>'
        f'<img alt="loss against steps, tokens and hours" src="data:image/png;base64,{image}">{"".join(parts)}</html>\n'
    )


def draw(experiments: list[Experiment], window: int, path: Path) -> None:
    """Loss against steps, tokens and wall-clock, raw and smoothed, with the switch marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    longest = max(experiment.hours[-1] for experiment in experiments)
    unit, an_hour = ("hours", 1) if longest > 2 else ("minutes", 60)
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), dpi=130, layout="constrained", sharey=True)
    for number, experiment in enumerate(experiments):
        color = f"C{number}"
        smooth = [loss for part in experiment.parts for loss in part.centred(window)]
        times = [hours * an_hour for hours in experiment.hours]
        switch = len(experiment.parts[0].records) if experiment.parts[-1].name == "stage2" else None
        horizontal: tuple[Sequence[float], ...] = (experiment.steps, experiment.tokens, times)
        for axes, along in zip(panels, horizontal, strict=True):
            axes.plot(along, experiment.losses, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(along, smooth, color=color, linewidth=1.6, label=experiment.name)
            if switch and switch < len(along):
                axes.axvline((along[switch - 1] + along[switch]) / 2, color=color, linestyle=":", linewidth=1)
    for axes, label in zip(panels, ("step", "tokens", f"{unit}, with start-up, validation and saving"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=" "))
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(frameon=False)
    title = f"Training loss, raw and as a mean over {window} logged steps; dotted: the switch to dense"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="dump folders; a Stage 2 run right after its Stage 1 run")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for what is written")
    options = parser.parse_args(arguments)
    # Only now: --help should not wait for torchtitan.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("report"):
        write(load_experiments(options.runs), options.output)


def write(experiments: list[Experiment], output: Path) -> None:
    """Print the tables, and write them, the figure and the page to ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    window = common_window(experiments)
    found = tables(experiments, window)
    text = "\n\n".join(as_markdown(table) for table in found)
    written = [output / name for name in ("summary.md", "loss.png", "report.html")]
    written[0].write_text(text + "\n", encoding="utf-8")
    draw(experiments, window, written[1])
    written[2].write_text(as_page(found, written[1]), encoding="utf-8")
    print("\n" + text + "\n", *written, sep="\n")


if __name__ == "__main__":
    main()
