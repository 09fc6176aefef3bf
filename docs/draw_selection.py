#!/usr/bin/env python
"""Draw docs/selection.png, the picture of docs/method.md, from a real selection.

    python docs/draw_selection.py

It calls ``lighthouse.select`` on a random sequence of 1,024 positions (p = 2, L = 3, k = 128) and draws the first 32:
the pyramid, the order of the selected entries, and the positions that they write to. Takes a few seconds on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from lighthouse import LighthouseConfig, select

SEQ_LEN, SHOWN, SEED = 1024, 32, 49
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=128, backend="torch")
P, LEVELS = CONFIG.pooling_factor, CONFIG.num_levels

#: Positions whose outputs are followed, and the entry whose view is shown.
FOLLOWED = (9, 17, 24)
LOOKING = (2, 4)

#: Okabe and Ito's blue, orange and green: told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73")
INK, QUIET, LINE = "#222222", "#6b6b6b", "#b0b0b0"

Entry = tuple[int, int]


def light(color: str) -> tuple[float, ...]:
    return tuple(1 - (1 - part) * 0.32 for part in to_rgb(color))


def selected_entries() -> list[Entry]:
    """(level, index) of the selected entries of one head, in the order in which attention sees them."""
    generator = torch.Generator().manual_seed(SEED)
    query, key = (torch.randn(1, 1, SEQ_LEN, 8, generator=generator) for _ in range(2))
    selection = select(query, key, CONFIG)
    return list(zip(selection.level[0, 0].tolist(), selection.index[0, 0].tolist(), strict=True))


def last_position(entry: Entry) -> int:
    level, index = entry
    return (index + 1) * P**level - 1


def box(axes: Axes, left: float, bottom: float, width: float, height: float, **style) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, **{"linewidth": 1.0, **style}))


def text(axes: Axes, x: float, y: float, words: str, **style) -> None:
    axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": 9.5, "color": INK, **style})


def bare(axes: Axes, title: str, left: float, right: float, bottom: float, top: float) -> None:
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=8)


def name_level(axes: Axes, level: int) -> None:
    style = {"ha": "right", "color": COLORS[level], "fontweight": "bold", "fontsize": 11}
    text(axes, -0.4, level + 0.38, f"level {level}", **style)


def draw_pyramid(axes: Axes, entries: set[Entry]) -> None:
    bare(axes, "(a) Selection: coarse to fine, the children of a parent are selected", -4.6, SHOWN, -1.6, 2.9)
    for level in range(LEVELS):
        width = P**level
        name_level(axes, level)
        for index in range(SHOWN // width):
            left = index * width
            selected, parent = (level, index) in entries, (level - 1, index * P) in entries
            style = {"facecolor": "white", "edgecolor": LINE, "linestyle": (0, (2, 2))}
            if selected:
                style = {"facecolor": COLORS[level] if parent else light(COLORS[level]), "edgecolor": COLORS[level]}
            box(axes, left + 0.08, level + 0.06, width - 0.16, 0.64, **style)
            color = "white" if parent else INK if selected else LINE
            text(axes, left + width / 2, level + 0.38, str(index), color=color, fontsize=8.5)
            if parent:
                for child in range(P):
                    middle = left + (child + 0.5) * width / P
                    axes.plot([left + width / 2, middle], [level + 0.06, level - 0.3], color=COLORS[level], lw=1.1)
    for position in range(0, SHOWN, 4):
        text(axes, position + 0.5, -0.3, str(position), color=QUIET, fontsize=8.5)
    text(axes, -0.4, -0.3, "position", ha="right", color=QUIET, fontsize=9.5)
    gray = "#777777"
    kinds = [
        Patch(facecolor=gray, edgecolor=gray, label="selected, a parent"),
        Patch(facecolor=light(gray), edgecolor=gray, label="selected, no parent"),
        Patch(facecolor="white", edgecolor=LINE, linestyle=(0, (2, 2)), label="not selected"),
    ]
    axes.legend(
        handles=kinds, loc="lower center", bbox_to_anchor=(SHOWN / 2, -1.2), bbox_transform=axes.transData,
        ncols=3, frameon=False, fontsize=10.5, columnspacing=3,
    )  # fmt: skip


def draw_order(axes: Axes, order: list[Entry]) -> None:
    count = len(order)
    bare(
        axes, "(b) Order: what attention sees, sorted by last covered position, then level",
        -4.6 * count / SHOWN, count, -0.8, 1.9,
    )  # fmt: skip
    for slot, (level, index) in enumerate(order):
        parent = (level - 1, index * P) in order
        face = COLORS[level] if parent else light(COLORS[level])
        box(axes, slot + 0.06, 0, 0.88, 0.8, facecolor=face, edgecolor=COLORS[level])
        text(axes, slot + 0.5, 0.4, f"{level}:{index}", color="white" if parent else INK, fontsize=8)
    begin = 0
    for slot in range(count):
        end = last_position(order[slot])
        if slot + 1 == count or last_position(order[slot + 1]) != end:
            axes.plot([begin + 0.12, slot + 0.88], [-0.16, -0.16], color=QUIET, lw=1.2)
            text(axes, (begin + slot + 1) / 2, -0.46, str(end), color=QUIET, fontsize=8.5)
            begin = slot + 1
    left = -0.4 * count / SHOWN
    text(axes, left, 0.4, "level:index", ha="right", fontsize=9.5)
    text(axes, left, -0.46, "last position", ha="right", color=QUIET, fontsize=9.5)
    level, index = LOOKING
    slot = order.index(LOOKING)
    axes.plot([0.06, 0.06, slot + 0.94, slot + 0.94], [0.9, 1.06, 1.06, 0.9], color=INK, lw=1.2)
    text(axes, (slot + 1) / 2, 1.42, f"entry {level}:{index} attends to itself and to every entry on its left")


def draw_writes(axes: Axes, order: list[Entry]) -> None:
    bare(
        axes, "(c) Scatter-back: an entry writes from its last covered position on, a position adds up what it gets",
        -4.6, SHOWN, -1.8, 3.0,
    )  # fmt: skip
    received = [[] for _ in range(SHOWN)]
    for level, index in order:
        first = last_position((level, index))
        stop = min(first + P**level, SHOWN)
        for position in range(first, stop):
            received[position].append((level, index))
        box(axes, first + 0.08, level + 0.06, stop - first - 0.16, 0.64, facecolor=light(COLORS[level]),
            edgecolor=COLORS[level])  # fmt: skip
        text(axes, first + 0.5, level + 0.38, str(index), fontsize=8.5)
    for level in range(LEVELS):
        name_level(axes, level)
    for position, sources in enumerate(received):
        followed = position in FOLLOWED
        style = {"fontweight": "bold"} if followed else {"color": QUIET}
        text(axes, position + 0.5, -0.3, str(position), fontsize=8.5, **style)
        text(axes, position + 0.5, -0.78, str(len(sources)), fontsize=8.5, **style)
        if followed:
            box(axes, position, -1.0, 1, 3.85, facecolor="none", edgecolor=INK, linewidth=1.5, zorder=5)
            terms = " + ".join(f"{level}:{index}" for level, index in sorted(sources))
            text(axes, position + 0.5, -1.42, f"output {position} = {terms}", fontsize=10)
    text(axes, -0.4, -0.3, "position", ha="right", color=QUIET, fontsize=9.5)
    text(axes, -0.4, -0.78, "outputs added", ha="right", color=QUIET, fontsize=9.5)


def main() -> None:
    entries = selected_entries()
    shown = [entry for entry in entries if last_position(entry) < SHOWN]
    figure, panels = plt.subplots(
        3, 1, figsize=(12, 9.4), dpi=110, height_ratios=(4.5, 2.7, 4.8), layout="constrained"
    )  # fmt: skip
    draw_pyramid(panels[0], set(entries))
    draw_order(panels[1], shown)
    draw_writes(panels[2], shown)
    figure.savefig(Path(__file__).with_name("selection.png"))


if __name__ == "__main__":
    main()
