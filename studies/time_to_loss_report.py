"""Tables and figure of the study ``time_to_loss``, from the results of its arms."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def crossing(curve: list[list[float]], level: float) -> float | None:
    """The seconds at which a curve of (step, seconds, loss) first comes down to ``level``, None where it does not.

    A straight line between two points; where the first point is below already, that point.
    """
    for number, (_, seconds, loss) in enumerate(curve):
        if loss <= level:
            if not number:
                return seconds
            _, earlier, above = curve[number - 1]
            return earlier + (seconds - earlier) * (above - level) / (above - loss)
    return None


def loss_at(curve: list[list[float]], seconds: float) -> float | None:
    """The curve's loss at a time, a straight line between two points; None outside of it."""
    for (_, start, before), (_, end, after) in pairwise(curve):
        if start <= seconds <= end:
            return before + (after - before) * (seconds - start) / (end - start)
    return None


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown whose columns also stand under each other as text."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [titles, ["-" * width for width in widths], *rows]
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


ABOUT = """\
Losses in nats per byte of held-out books, with dense attention: "held out" on 12 pieces, "beyond 16K" and recall on 36.
Shares and differences (Δ, negative is better) are to dense of the same seed: to its end, with as many tokens, and to
where it was after as many seconds. Seconds until {goal}: on a straight line between two
measurements; ≤ where the first one is below it already.
"""


def tables(results: list[dict[str, Any]], level: float | None) -> str:
    """All that is reported in figures; ``level``: seconds until this loss, None: until dense's last one."""
    dense = {result["seed"]: result for result in results if result["arm"] == "dense"}
    goal = "dense's last loss" if level is None else f"a loss of {level}"
    titles = ["arm", "seed", "seconds", "of dense's", "held out", "Δ equal tokens", "Δ equal seconds"]
    titles += [f"s until {goal}", "of dense's", "beyond 16K", "Δ", "spike", "recall beyond 16K"]
    rows = [compare(result, dense.get(result["seed"]), level) for result in results]
    parts = [ABOUT.format(goal=goal), table(titles, rows), "Stages\n", stages(results)]
    parts += ["Training loss minus dense's in the same step, of the same text\n", step_by_step(results, dense)]
    for name, title, form in (
        ("by_position", "Held-out loss by position, all bytes / text outside quotes", ".4f"),
        ("recall", "Recall by distance: share of the loss that is saved when text is quoted / bytes right", ".1%"),
    ):
        first, second = ("loss", "loss_text") if name == "by_position" else ("recall", "right")
        ends = [f"{part['start']:,}–{part['end']:,}" for part in results[0]["score"][name]]
        rows = [
            [result["arm"], str(result["seed"])]
            + [f"{cell(part[first], form)} / {cell(part[second], form)}" for part in result["score"][name]]
            for result in results
        ]
        parts += [f"{title}\n", table(["arm", "seed", *ends], rows)]
    return "\n".join(parts)


def compare(result: dict[str, Any], dense: dict[str, Any] | None, level: float | None) -> list[str]:
    """A line of the first table: an arm beside dense of the same seed, where that is finished."""
    curve, seconds, score = result["curve"], result["seconds"], result["score"]
    goal = dense["held_out"] if dense is not None and level is None else level
    reached = None if goal is None else crossing(curve, goal)
    whole = None if goal is None or dense is None else crossing(dense["curve"], goal)
    at_most = "≤ " if goal is not None and curve[0][2] <= goal else ""
    until = "" if goal is None else "not reached" if reached is None else f"{at_most}{reached:.0f}"
    share = f"{at_most}{reached / whole:.2f}" if reached is not None and whole else ""
    far = score["held_out_far"]["loss"]
    gaps: list[float | None] = [None] * 3
    if dense is not None and dense is not result:
        beside = loss_at(dense["curve"], seconds)
        gaps[0] = result["held_out"] - dense["held_out"]
        gaps[1] = None if beside is None else result["held_out"] - beside
        gaps[2] = far - dense["score"]["held_out_far"]["loss"]
    equal_tokens, equal_seconds, beyond = (cell(gap, "+.4f") for gap in gaps)
    return [
        *(result["arm"], str(result["seed"]), f"{seconds:.0f}"),
        *("" if dense is None else f"{seconds / dense['seconds']:.2f}", f"{result['held_out']:.4f}"),
        *(equal_tokens, equal_seconds, until, share, f"{far:.4f}", beyond),
        *(cell(result["spike"], "+.3f"), cell(score["recall_far"]["recall"], ".1%")),
    ]


def step_by_step(results: list[dict[str, Any]], dense: dict[int, dict[str, Any]]) -> str:
    """Mean difference, and its standard error, in each eighth of the steps that both have logged."""
    last = max(int(step) for result in results for step in result["training"])
    edges = [last * part // 8 for part in range(9)]
    rows = []
    for result in results:
        beside = dense.get(result["seed"])
        if beside is None or beside is result:
            continue
        losses, cells = beside["training"], []
        both = {int(at): loss - losses[at] for at, loss in result["training"].items() if at in losses}
        for start, end in pairwise(edges):
            gaps = [gap for at, gap in both.items() if start < at <= end]
            cells.append(f"{fmean(gaps):+.4f} ± {stdev(gaps) / len(gaps) ** 0.5:.4f}" if len(gaps) > 1 else "")
        rows.append([result["arm"], str(result["seed"]), *cells])
    return table(["arm", "seed", *(f"{start + 1:,}–{end:,}" for start, end in pairwise(edges))], rows)


def stages(results: list[dict[str, Any]]) -> str:
    titles = ["arm", "seed", "stage", "steps", "tokens/s", "training loss, last 50 steps", "GiB"]
    rows = []
    for result in results:
        for one in result["stages"]:
            cells = [result["arm"], str(result["seed"]), one["name"], f"{one['first'] + 1:,}–{one['last']:,}"]
            cells += [f"{one['tokens_per_second']:,.0f}", f"{one['last_training_loss']:.4f}"]
            rows.append([*cells, f"{one['memory_gib']:.1f}"])
    return table(titles, rows)


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Held-out loss against training seconds: dense stages, where it is measured. Arms by their last loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in dict.fromkeys(result["arm"] for result in results) if name != "dense"]
    seeds = sorted({result["seed"] for result in results})
    height = 5 + 0.2 * len(results)  # the legend, below, has a line for each
    figure, axes = plt.subplots(figsize=(9, height), dpi=110, layout="constrained")
    for result in sorted(results, key=lambda one: one["held_out"]):
        name, seed, curve = result["arm"], result["seed"], result["curve"]
        style: dict[str, Any] = {"color": "black", "marker": "o"}
        if name in names:
            # Ten colours, then the same ones with other markers.
            nth = names.index(name)
            style = {"color": f"C{nth % 10}", "marker": "os^Dv"[nth // 10 % 5]}
        label = f"{name}{f', seed {seed}' if seed else ''}: {result['held_out']:.3f}, {result['seconds']:.0f} s"
        line = ("-", "--", "-.", ":")[seeds.index(seed) % 4]
        style |= {"linestyle": line, "linewidth": 1.4, "markersize": 3, "label": label}
        seconds, losses = [point[1] for point in curve], [point[2] for point in curve]
        axes.plot(seconds, losses, **style)
        axes.plot(seconds[-1], losses[-1], color=style["color"], marker=style["marker"], markersize=8)
        if name == "dense":
            axes.axhline(result["held_out"], color="grey", linestyle=line, linewidth=0.7)
    # Around where the arms end: the first steps would squeeze the rest.
    ends = [result["held_out"] for result in results]
    room = max(0.03, max(ends) - min(ends))
    axes.set(xlim=(0, None), ylim=(min(ends) - room / 3, max(ends) + 2 * room))
    axes.set(xlabel="training seconds, one GPU", ylabel="held-out loss in dense stages, nats per byte")
    about = "A curve begins in its arm's dense stage. Large: the end of an arm. Thin: dense's last loss"
    axes.set_title(about, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    figure.savefig(file)
    plt.close(figure)


def report(folder: Path, output: Path, level: float | None, order: list[str]) -> None:
    """Write time_to_loss.md and .png from the results in ``folder``, arms in this order."""
    results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if not results:
        raise SystemExit(f"time_to_loss: {folder} holds no finished arm")
    for result in results:
        if "recall" not in result["score"]["recall_far"]:
            raise SystemExit(
                f"time_to_loss: {folder}: arm {result['arm']!r} was measured without recall by an earlier version; the "
                f"report of its commit reads it: {result['commit']}"
            )
    results.sort(key=lambda one: (one["seed"], order.index(one["arm"]) if one["arm"] in order else len(order)))
    output.mkdir(parents=True, exist_ok=True)
    about = sorted({f"{one['gpu']}, torch {one['torch']}, commit {one['commit']}" for one in results})
    settings = sorted({json.dumps(one["settings"]) for one in results})
    text = f"{tables(results, level)}\n{'; '.join(about)}. Settings: {'; '.join(settings)}\n"
    (output / "time_to_loss.md").write_text(text, encoding="utf-8")
    draw(results, output / "time_to_loss.png")
    print(text)
