#!/usr/bin/env python
"""Tables and a figure of loss curves, from what the runs have left in metrics.jsonl and config.json.

    python scripts/report.py outputs/demo/stage1 outputs/demo/stage2 outputs/demo/dense --output outputs/demo

A run that holds Stage 2 or a later stage continues the run named just before it; what they are compared with is the
first run that is dense from its first step to its last.
Writes summary.md, loss.png, and report.html, one page with both and nothing beside it.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, groupby, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Losses are noisy: the table and the smooth curves take means over so many logged steps, fewer for short runs.
LONGEST_WINDOW = 10


@dataclass
class Experiment:
    """One curve: a dense run, or Stage 1 with the stages that continue it."""

    name: str
    records: list[dict[str, Any]]
    """Of metrics.jsonl, each with ``lighthouse``, whether its stage runs through it, and ``seq_len`` (None: unknown)"""

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    @property
    def parts(self) -> list[Experiment]:
        """The stages that were run, in order, by their labels: a mean across a switch would blur it."""
        return [Experiment(label, list(part)) for label, part in groupby(self.records, lambda record: record["stage"])]

    @property
    def lighthouse(self) -> bool:
        """Of a part."""
        return bool(self.records[0]["lighthouse"])

    @property
    def seq_len(self) -> int | None:
        """Of a part; None where nothing says so."""
        length: int | None = self.records[0]["seq_len"]
        return length

    @property
    def is_baseline(self) -> bool:
        return [part.name for part in self.parts] == ["dense"]

    @property
    def changes_context(self) -> bool:
        return len({part.seq_len for part in self.parts}) > 1

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
        """Per device, as ``usual_rate``."""
        from torchtitan.experiments.lighthouse.runs.records import usual_rate

        return usual_rate(self.records)

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
    """Read the runs and join every later stage to the one before it.

    Raises:
        Refused: for a run without metrics, or a stage that continues nothing.
    """
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.runs.checkpoints import CONFIG_FILE
    from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, number_of, read_metrics

    experiments: list[Experiment] = []
    for before, run in zip([None, *runs], runs, strict=False):
        path = run / METRICS_FILE
        if not path.is_file():
            raise Refused(f"{path} does not exist; {run} is not the dump folder of a run that has started")
        records = [record for record in read_metrics(path) if "loss" in record]
        if not records:
            raise Refused(f"{path} holds no logged step yet")
        config = json.loads((run / CONFIG_FILE).read_text()) if (run / CONFIG_FILE).is_file() else {}
        stage, section = records[0]["stage"], config.get("lighthouse", {})
        number = number_of(stage)
        about = {
            # Older runs, and files without their folder: Stage 1 alone was Lighthouse.
            "lighthouse": section.get("enable", stage == "stage1"),
            "seq_len": config.get("training", {}).get("seq_len"),
        }
        records = [record | about for record in records]
        if number == 1:
            experiments.append(Experiment(run.name, records))
            continue
        last = experiments[-1].records[-1]["stage"] if experiments else ""
        origin = Path(section.get("stage1_checkpoint", "")).parent.parent.name
        # A dense run is more often what others are compared with: it is the first stage of what says so.
        continues = last == f"stage{number - 1}" or (last == "dense" and number == 2)
        if before is None or not continues or (last == "dense" and origin != before.resolve().name):
            raise Refused(f"{run} holds Stage {number}: name its Stage {number - 1} run just before it")
        first = records[0]["step"]
        joined = Experiment("", [record for record in experiments[-1].records if record["step"] < first] + records)
        joined.name = ", then ".join(_in_words(part, joined.changes_context) for part in joined.parts)
        experiments[-1] = joined
    return experiments


def _in_words(part: Experiment, with_context: bool, dense: str = "dense", lighthouse: str = "Lighthouse") -> str:
    """The attention of a stage, and its context where the stages differ in it."""
    context = f" at {part.seq_len:,}" if with_context and part.seq_len else ""
    return (lighthouse if part.lighthouse else dense) + context


def baseline_of(experiments: list[Experiment]) -> Experiment | None:
    """The first run that is dense from scratch to its end, which the others are compared with."""
    return next((experiment for experiment in experiments if experiment.is_baseline), None)


def common_window(experiments: list[Experiment]) -> int:
    """One window for all curves, so that they can be compared: a tenth of the shortest stage, within limits."""
    shortest = min(len(part.records) for experiment in experiments for part in experiment.parts)
    return max(1, min(LONGEST_WINDOW, shortest // 10))


#: A heading, the column names and the rows below them.
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(experiments: list[Experiment], window: int) -> list[Table]:
    """Every stage's figures, and what became of every switch. Losses in nats per token."""
    from torchtitan.experiments.lighthouse.runs.records import number_of

    rows: list[tuple[str, ...]] = []
    for experiment in experiments:
        for part in experiment.parts:
            stage = f"Stage {number_of(part.name)} ({_in_words(part, experiment.changes_context)})"
            noise = stdev(part.losses[-window:]) if len(part.losses[-window:]) > 1 else 0.0
            rows.append(
                (
                    stage if number_of(experiment.parts[-1].name) > 1 else experiment.name,
                    f"{part.steps[0]:,}–{part.steps[-1]:,}",
                    f"{part.tokens[-1]:,.0f}",
                    f"{part.smooth(window)[-1]:.4f} ± {noise:.4f}",
                    f"{part.tokens_per_second:,.0f}",
                )
            )
    stages = ("Runs", ("run", "steps", "tokens seen", f"loss, mean of last {window}", "tokens/s/device"), rows)
    dense = baseline_of(experiments)
    switches: list[Table] = []
    for experiment in experiments:
        parts = experiment.parts
        for before, after in pairwise(parts):
            which = f" to Stage {number_of(after.name)}" if len(parts) > 2 else ""
            # The loss through Lighthouse is not one that can be compared.
            ends = after.name == parts[-1].name and not after.lighthouse
            against = _against(experiment, dense, window) if dense and ends else []
            heading = f"The switch of {experiment.name}{which}"
            switches.append((heading, ("", ""), [*_switch(before, after, window), *against]))
    return [stages, *switches]


def headlines(experiments: list[Experiment]) -> list[str]:
    """What Lighthouse is for, a sentence for each stage through it: its rate beside that of dense attention.

    The dense run's rate, or, where there is none of this context, that of the same run's last dense stage of it.
    """
    from torchtitan.experiments.lighthouse.runs.records import number_of

    baseline = baseline_of(experiments)
    sentences = []
    for experiment in experiments:
        own = [part for part in reversed(experiment.parts) if not part.lighthouse]
        for part in experiment.parts:
            dense = [one for one in [*([baseline] if baseline else []), *own] if _same_context(one, part)]
            if part.lighthouse and dense and dense[0].tokens_per_second:
                whose = "" if len(experiments) <= 2 else f" of {experiment.name}"
                stage, times = number_of(part.name), part.tokens_per_second / dense[0].tokens_per_second
                sentences.append(
                    f"Stage {stage}{whose} ran {times:.1f} times as many tokens per second as dense attention."
                )
    return sentences


def _same_context(one: Experiment, other: Experiment) -> bool:
    return one.seq_len == other.seq_len or None in (one.seq_len, other.seq_len)


def _switch(before: Experiment, after: Experiment, window: int) -> list[tuple[str, str]]:
    from torchtitan.experiments.lighthouse.runs.records import number_of, recovered_after

    level, first = before.smooth(window)[-1], after.losses[0]
    losses = dict(zip(before.steps + after.steps, before.losses + after.losses, strict=True))
    recovered = recovered_after(losses, before.steps[-1], window * _steps_per_line(after))
    left = f"not within {len(after.steps):,} ({after.smooth(window)[-1] - level:+.4f})"
    kind, earlier = "Lighthouse" if after.lighthouse else "dense", f"Stage {number_of(before.name)}"
    return [
        (f"spike, first {kind} step", f"{first:.4f} ({first - level:+.4f}) at step {after.steps[0]:,}"),
        (f"{kind} steps until {earlier}'s last level", f"{recovered:,}" if recovered else left),
    ]


def _steps_per_line(part: Experiment) -> int:
    """``metrics.log_freq``, as far as the file tells."""
    return min((after - before for before, after in pairwise(part.steps)), default=1)


def _against(experiment: Experiment, dense: Experiment, window: int) -> list[tuple[str, str]]:
    """Beside the dense run: differences at the same steps, so on the same data, as means over ``window`` of them."""
    last = experiment.parts[-1]
    differences = _differences(last, dense)
    if not differences.records:
        return [(f"beside {dense.name}", "no step in common")]
    steps, gaps = differences.steps, differences.smooth(window)
    tokens = min(experiment.tokens[-1], dense.tokens[-1])
    ours, theirs = (run.device_seconds(tokens) for run in (experiment, dense))
    return [
        (f"first below {dense.name} after", _first_below(steps, gaps, last.steps[0])),
        (f"last gap to {dense.name}", f"{gaps[-1]:+.4f} at step {steps[-1]:,}"),
        (f"speed-up over {dense.name} at {tokens:,.0f} tokens", f"{theirs / ours:.2f}" if ours else "no rate yet"),
    ]


def _differences(part: Experiment, dense: Experiment) -> Experiment:
    """The losses of ``part`` minus the dense run's at the same steps, where both were logged."""
    baseline = dict(zip(dense.steps, dense.losses, strict=True))
    return Experiment(
        part.name,
        [
            record | {"loss": record["loss"] - baseline[record["step"]]}
            for record in part.records
            if record["step"] in baseline
        ],
    )


def _first_below(steps: list[int], gaps: list[float], first_step: int) -> str:
    """After how many dense steps the gap was first not above 0, and whether it stayed so."""
    at = next((i for i, gap in enumerate(gaps) if gap <= 0), None)
    if at is None:
        return f"not within {len(gaps):,}"
    taken = steps[at] - first_step + 1
    crossed = f"{taken:,} dense step{'s' if taken > 1 else ''}"
    below = sum(gap <= 0 for gap in gaps)
    if below == len(gaps) - at:
        return f"{crossed}, and stays below"
    end = "below" if gaps[-1] <= 0 else "above"
    return f"{crossed}, but does not stay: below at {below:,} of {len(gaps):,} logged steps, {end} it at the last"


def as_markdown(table: Table) -> str:
    _, header, rows = table
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def as_page(sentences: list[str], found: list[Table], picture: Path) -> str:
    """One HTML file that needs no other."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    said = "".join(f"<h1>{html.escape(sentence)}</h1>" for sentence in sentences)
    parts = [
        f"<h2>{html.escape(heading)}</h2><table>{row(header, 'th') if any(header) else ''}"
        + "".join(row(cells, "td") for cells in rows)
        + "</table>"
        for heading, header, rows in found
    ]
    image = base64.b64encode(picture.read_bytes()).decode()
    style = (
        "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}img{max-width:100%}"
        "h1{font-size:1.4em}table{border-collapse:collapse}"
        "td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:left}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Loss curves</title><style>{style}</style>'
        f'{said}<img alt="loss against steps and time" src="data:image/png;base64,{image}">{"".join(parts)}</html>\n'
    )


#: Lighthouse light and dense dark, a pair per run that has both. The pairs differ in lightness too, for readers who do
#: not see the colours; a dense run is dashed, black or grey.
PAIRS = (("#56B4E9", "#0054A6"), ("#E69F00", "#B03A00"), ("#DDAACC", "#882255"), ("#66CCAA", "#117733"))
GREYS = ("#000000", "#888888")
DASHES = (0, (3, 2))

#: Of a chain's first, second … stage with the same attention.
LINES = ("-", ":", "-.", "--")

#: A dense run's curve: thin, above the wide ones of the stages, so that curves that coincide are all seen.
_ON_TOP = {"linewidth": 1.3, "zorder": 3}


def _styles(experiments: list[Experiment]) -> list[list[dict[str, Any]]]:
    """Label, colour and dashes of every stage of every run."""
    from torchtitan.experiments.lighthouse.runs.records import number_of

    pairs, greys = cycle(PAIRS), cycle(GREYS)
    styles: list[list[dict[str, Any]]] = []
    for experiment in experiments:
        name = f"{experiment.name}: " if len(experiments) > 2 else ""
        if experiment.is_baseline:
            styles.append(
                [{"label": f"{experiment.name}, all steps", "color": next(greys), "linestyle": DASHES} | _ON_TOP]
            )
            continue
        (light, dark), lines = next(pairs), {True: cycle(LINES), False: cycle(LINES)}
        of_stages: list[dict[str, Any]] = []
        for part in experiment.parts:
            words = _in_words(part, experiment.changes_context, lighthouse="through Lighthouse")
            of_stages.append(
                {
                    "label": f"{name}Stage {number_of(part.name)}, {words}",
                    "color": light if part.lighthouse else dark,
                    "linestyle": next(lines[part.lighthouse]),
                    "linewidth": 3,
                }
            )
        styles.append(of_stages)
    return styles


def draw(experiments: list[Experiment], window: int, path: Path) -> None:
    """Loss against steps (tokens, if the runs have unequal ones per step) and time, and minus the dense run's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    longest = max(experiment.hours[-1] for experiment in experiments)
    unit, an_hour = ("hours", 1) if longest > 2 else ("minutes", 60)
    per_step = {round(run.tokens[-1] / run.steps[-1]) for run in experiments}
    dense = baseline_of(experiments)
    compared = dense is not None and len(experiments) > 1
    mosaic = [["loss", "time"], ["gap", "time"]] if compared else [["loss", "time"]]
    figure, panels = plt.subplot_mosaic(
        mosaic,  # type: ignore[arg-type]  # matplotlib's own type has no plain lists
        figsize=(13, 5.5),
        dpi=130,
        layout="constrained",
        height_ratios=[2, 1][: len(mosaic)],
    )
    panels["time"].sharey(panels["loss"])
    for experiment, styles in zip(experiments, _styles(experiments), strict=True):
        shown = {
            "loss": (experiment.steps if len(per_step) == 1 else experiment.tokens, experiment.parts),
            "time": ([hours * an_hour for hours in experiment.hours], experiment.parts),
        }
        if dense and experiment is not dense:
            gaps = [_differences(part, dense) for part in experiment.parts]
            shown["gap"] = ([step for part in gaps for step in part.steps], gaps)
        for name, (along, parts) in shown.items():
            for part, style, at in _draw_parts(panels[name], along, parts, styles, window):
                if name != "gap":
                    words = f"switch to {_in_words(part, experiment.changes_context)} "
                    panels[name].annotate(words, (at, 1), xycoords=("data", "axes fraction"), rotation=90,
                                          color=style["color"], fontsize=9, ha="right", va="top")  # fmt: skip
    for name, axes in panels.items():
        axes.grid(alpha=0.25)
        axes.set_ylabel("training loss (nats per token)" if name != "gap" else f"minus {dense.name}" if dense else "")
    if len(per_step) > 1:
        panels["loss"].xaxis.set_major_formatter(EngFormatter(sep=" "))
    panels["loss"].set_xlabel("step" if len(per_step) == 1 else "tokens")
    panels["time"].set_xlabel(f"{unit}, with start-up, validation and saving")
    panels["time"].legend(frameon=False, loc="upper right")
    if compared:
        panels["gap"].axhline(0, color=GREYS[0], linewidth=1, linestyle=DASHES)
        panels["gap"].set_xlabel("step")
    thin = "" if window == 1 else f"; thick: means over {window} logged steps, thin: each of them"
    figure.suptitle("\n".join([*headlines(experiments), f"Training loss{thin}"]), fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def _draw_parts(
    axes: Axes, along: Sequence[float], parts: list[Experiment], styles: list[dict[str, Any]], window: int
) -> list[tuple[Experiment, dict[str, Any], float]]:
    """A run's stages one after the other, with lines between them; returns what begins there, and where."""
    start, switches = 0, []
    for part, style in zip(parts, styles, strict=True):
        here = along[start : start + len(part.records)]
        if start and here:
            switch = (along[start - 1] + here[0]) / 2
            switches.append((part, style, switch))
            axes.axvline(switch, color=style["color"], linestyle=":", linewidth=1.2)
        axes.plot(here, part.losses, color=style["color"], alpha=0.3, linewidth=0.8, zorder=1)
        axes.plot(here, part.centred(window), **style)
        start += len(part.records)
    return switches


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="dump folders; each stage right after the one before it")
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
    sentences = headlines(experiments)
    text = "\n\n".join([*sentences, *(as_markdown(table) for table in found)])
    written = [output / name for name in ("summary.md", "loss.png", "report.html")]
    written[0].write_text(text + "\n", encoding="utf-8")
    draw(experiments, window, written[1])
    written[2].write_text(as_page(sentences, found, written[1]), encoding="utf-8")
    print(f"\n{text}\n\nFigure: {written[1]}\nFigure and tables on one page: {written[2]}\nTables: {written[0]}")


if __name__ == "__main__":
    main()
