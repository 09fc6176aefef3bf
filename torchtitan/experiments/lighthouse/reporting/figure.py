"""The curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.experiments.lighthouse.reporting.experiments import Experiment, baseline_of, differences, in_words
from torchtitan.experiments.lighthouse.reporting.tables import headlines
from torchtitan.experiments.lighthouse.runs.records import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
            words = in_words(part, experiment.changes_context, lighthouse="through Lighthouse")
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
            gaps = [differences(part, dense) for part in experiment.parts]
            shown["gap"] = ([step for part in gaps for step in part.steps], gaps)
        for name, (along, parts) in shown.items():
            for part, style, at in _draw_parts(panels[name], along, parts, styles, window):
                if name != "gap":
                    words = f"switch to {in_words(part, experiment.changes_context)} "
                    panels[name].annotate(words, (at, 1), xycoords=("data", "axes fraction"), rotation=90,
                                          color=style["color"], fontsize=9, ha="right", va="top")  # fmt: skip
    for name, axes in panels.items():
        axes.grid(alpha=0.25)
        axes.set_ylabel("training loss (nats per token)" if name != "gap" else f"minus {dense.name}" if dense else "")
    if len(per_step) > 1:
        panels["loss"].xaxis.set_major_formatter(EngFormatter(sep=" "))
    panels["loss"].set_xlabel("step" if len(per_step) == 1 else "tokens")
    panels["time"].set_xlabel(f"{unit}, with start-up, validation and saving")
    # Below the panels: within one it would lie on a curve, or on the words at a switch.
    handles, labels = panels["time"].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
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
