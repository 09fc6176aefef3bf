"""Tables and figure of the study ``time_to_loss``, from the results of its arms."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import recall


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


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables(results: list[dict[str, Any]], level: float | None) -> str:
    """Losses in nats per byte; differences, × and % are to dense of the same seed."""
    dense = {result["seed"]: result for result in results if result["arm"] == "dense"}
    titles = ["arm", "seed", "seconds", "× dense", "held out", "− dense, equal tokens", "− dense, equal seconds"]
    titles += ["seconds to level", "of dense's", "beyond 16K", "− dense", "recall beyond 16K", "spike"]
    lines = [row(*titles), row(*["---"] * len(titles))]
    for result in results:
        base, score = dense.get(result["seed"]), result["score"]
        cells = [result["arm"], str(result["seed"]), f"{result['seconds']:.0f}"]
        far = score["held_out_far"]["loss"]
        if base is None:
            reached = None if level is None else crossing(result["curve"], level)
            cells += ["", f"{result['held_out']:.4f}", "", "", cell(reached, ".0f"), "", f"{far:.4f}", ""]
        else:
            goal = base["held_out"] if level is None else level
            reached, whole = crossing(result["curve"], goal), crossing(base["curve"], goal)
            beside = loss_at(base["curve"], result["seconds"])
            cells += [f"{base['seconds'] / result['seconds']:.2f}", f"{result['held_out']:.4f}"]
            cells += [f"{result['held_out'] - base['held_out']:+.4f}"]
            cells += ["" if beside is None else f"{result['held_out'] - beside:+.4f}"]
            cells += ["not reached" if reached is None else f"{reached:.0f}"]
            cells += [f"{reached / whole:.2f}" if reached and whole else "", f"{far:.4f}"]
            cells += [f"{far - base['score']['held_out_far']['loss']:+.4f}"]
        lines.append(row(*cells, cell(score["recall_far"]["exact"], ".1%"), cell(result["spike"], "+.3f")))
    for name, title, form in (
        ("by_position", "Held-out loss by position, all bytes / text outside planted sentences", ".4f"),
        ("recall", f"Recall by distance, whole values (chance {recall.CHANCE['exact']:.2%}) / digits (10%)", ".1%"),
    ):
        first, second = ("loss", "loss_text") if name == "by_position" else ("exact", "digits")
        parts = results[0]["score"][name]
        ends = [f"{part['start']:,}–{part['end']:,}" for part in parts]
        lines += ["", title, "", row("arm", "seed", *ends), row(*["---"] * (2 + len(ends)))]
        for result in results:
            cells = [f"{cell(p[first], form)} / {cell(p[second], form)}" for p in result["score"][name]]
            lines.append(row(result["arm"], str(result["seed"]), *cells))
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Held-out loss against training seconds: dense stages, where it is measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), dpi=110, layout="constrained")
    names = list(dict.fromkeys(result["arm"] for result in results))
    for result in results:
        # The first steps would squeeze the rest.
        points = [(seconds, loss) for step, seconds, loss in result["curve"] if step > result["stages"][-1]["last"] / 8]
        label = result["arm"] + (f", seed {result['seed']}" if result["seed"] else "")
        style = {"color": f"C{names.index(result['arm'])}", "linestyle": "--" if result["seed"] else "-"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=label, **style)
    axes.set(xlabel="training seconds, one GPU", ylabel="held-out loss, dense, nats per byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
    plt.close(figure)


def report(folder: Path, output: Path, level: float | None, order: list[str]) -> None:
    """Write time_to_loss.md and .png from the results in ``folder``, arms in this order."""
    results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    if not results:
        raise SystemExit(f"time_to_loss: {folder} holds no finished arm")
    results.sort(key=lambda one: (one["seed"], order.index(one["arm"]) if one["arm"] in order else len(order)))
    output.mkdir(parents=True, exist_ok=True)
    about = sorted({f"{one['gpu']}, torch {one['torch']}, commit {one['commit']}" for one in results})
    settings = sorted({json.dumps(one["settings"]) for one in results})
    text = f"{tables(results, level)}\n{'; '.join(about)}. Settings: {'; '.join(settings)}\n"
    (output / "time_to_loss.md").write_text(text, encoding="utf-8")
    draw(results, output / "time_to_loss.png")
    print(text)
