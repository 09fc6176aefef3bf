"""The loss by position as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.evaluation.positions import Bucket


def draw(buckets: Sequence[Bucket], curve: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Both: the means of the buckets as steps with their figures, and the finer curve under them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(9, 4.5), dpi=130, layout="constrained")
    # Position 0 has no place on a logarithmic axis: it is drawn from where the first stretch ends.
    first = max(1, buckets[0].end // 16)
    places = [(point["start"] * point["end"]) ** 0.5 for point in curve if point["start"] >= first]
    losses = [point["loss"] for point in curve if point["start"] >= first]
    axes.plot(places, losses, color="#888888", linewidth=1, label="finer")
    for bucket in buckets:
        start = max(first, bucket.start)
        axes.hlines(bucket.loss, start, bucket.end, color="#0054A6", linewidth=3)
        axes.annotate(
            f"{bucket.loss:.3f}\n{bucket.bits_per_byte:.3f} b/B", ((start * bucket.end) ** 0.5, bucket.loss),
            textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8, color="#0054A6",
            bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "linewidth": 0},
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([max(first, bucket.start) for bucket in buckets] + [buckets[-1].end])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.2)
    axes.grid(alpha=0.25)
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(f"{title}\nthick: means of the buckets, with bits per byte; thin: finer", fontsize=10)
    figure.savefig(path)
    plt.close(figure)
