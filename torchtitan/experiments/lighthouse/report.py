#!/usr/bin/env python
"""Tables and a figure of loss curves, from what the runs have left in metrics.jsonl and config.json.

    python scripts/report.py outputs/demo/stage1 outputs/demo/stage2 outputs/demo/dense --output outputs/demo

A run that holds Stage 2 or a later stage continues the run named just before it; what they are compared with is the
first run that is dense from its first step to its last.
Curves that would be called the same get the names of their folders; --labels names them all.
Writes summary.md, loss.png, and report.html, one page with both and nothing beside it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.reporting.experiments import Experiment


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="dump folders; each stage right after the one before it")
    parser.add_argument(
        "--labels", type=lambda text: text.split(","), metavar="NAME,NAME,…", help="a name for each curve"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for what is written (default: report, in the folder that holds the runs)"
    )
    options = parser.parse_args(arguments)
    # Only now: --help should not wait for torchtitan.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal
    from torchtitan.experiments.lighthouse.reporting.experiments import load_experiments

    with exit_on_refusal("report"):
        write(load_experiments(options.runs, options.labels), options.output or default_output(options.runs))


def default_output(runs: list[Path]) -> Path:
    """``report`` in the folder that holds all runs; in a single run's own."""
    folders = {str(run.resolve()) for run in runs}
    return Path(os.path.commonpath(folders)) / "report"


def write(experiments: list[Experiment], output: Path) -> None:
    """Print the tables, and write them, the figure and the page to ``output``."""
    from torchtitan.experiments.lighthouse.reporting import experiments as curves
    from torchtitan.experiments.lighthouse.reporting import figure, page
    from torchtitan.experiments.lighthouse.reporting.tables import headlines, tables

    output.mkdir(parents=True, exist_ok=True)
    window = curves.common_window(experiments)
    found = tables(experiments, window)
    sentences = [*headlines(experiments), *curves.differing(experiments)]
    text = "\n\n".join([*sentences, *(f"{table[0]}\n\n{page.as_markdown(table)}" for table in found)])
    written = [output / name for name in ("summary.md", "loss.png", "report.html")]
    written[0].write_text(text + "\n", encoding="utf-8")
    figure.draw(experiments, window, written[1])
    written[2].write_text(page.as_page(sentences, found, written[1]), encoding="utf-8")
    print(f"\n{text}\n\nFigure: {written[1]}\nFigure and tables on one page: {written[2]}\nTables: {written[0]}")


if __name__ == "__main__":
    main()
