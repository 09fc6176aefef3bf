"""Predictions of ``plan`` beside runs that were measured, and how far off they are without what was fitted.

    python benchmarks/compare_plan.py benchmarks/reports/*-plan/runs.csv

prints the tables of a report: every run as predicted; the same without the fitted constants; and each report's
runs after the constants were fitted to the runs of all other reports. Needs no GPU.
"""

import argparse
import copy
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the model
from torchtitan.experiments.lighthouse.planning import step
from torchtitan.experiments.lighthouse.planning.rates import Rates, read_rates
from torchtitan.experiments.lighthouse.planning.step import Prediction
from torchtitan.experiments.lighthouse.planning.workload import Workload, workload
from torchtitan.experiments.lighthouse.seams.settings import CheckedConfigManager

REPOSITORY = Path(__file__).parents[1]

#: The fitted constants of planning/step.py as if nobody had ever measured a step: everything at the speed that
#: it has alone, no time of the host, only the passes that the algorithm asks for.
UNFITTED = {
    "ELEMENTWISE": 1.0, "KERNELS": 1.0, "SUSTAINED": 1.0, "RING_PASSES": 4.0, "FIXED": 0.0, "PARAMETER_BYTES": 16.0,
    "OPTIMIZER_BYTES": 28.0, "SELECTION": 0.0, "SCORER_SLOWDOWN": 1.0, "HOST_STEP": 0.0, "HOST_LAYER": 0.0,
    "HOST_LIGHTHOUSE": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One line of the file."""

    name: str
    part: str
    """``fit``: a constant was fitted to it; ``seen``: it was looked at meanwhile; ``held out``: neither;
    ``blind``: it was made later."""
    report: str
    work: Workload
    rates: Rates
    tokens_per_second: float
    memory_gib: float | None

    def predicted(self) -> Prediction:
        return step.predict(self.work, self.rates)

    def speed_error(self) -> float:
        return self.predicted().tokens_per_second / self.tokens_per_second - 1

    def memory_error(self) -> float | None:
        return self.predicted().memory_gib / self.memory_gib - 1 if self.memory_gib else None


def read_runs(file: Path) -> list[Run]:
    with file.open(newline="", encoding="utf-8") as lines:
        return [
            Run(
                name=row["run"],
                part=row["part"],
                report=row["source"].split(" (")[0],
                work=workload(_settings(row["config"], row["overrides"]), int(row["gpus"])),
                rates=read_rates(row["gpu"], None),
                tokens_per_second=float(row["tokens_per_second"]),
                memory_gib=float(row["memory_gib"]) if row["memory_gib"] else None,
            )
            for row in csv.DictReader(lines)
        ]


def _settings(config: str, overrides: str):
    """As the command line would make them; each file is parsed once, which takes longest."""
    settings = copy.deepcopy(_parsed(config))
    changes: dict[str, dict] = {}
    for word in overrides.split():
        setting, _, value = word.removeprefix("--").partition("=")
        section, name = setting.split(".")
        name = name.removeprefix("no-")
        before = getattr(getattr(settings, section), name)
        changes.setdefault(section, {})[name] = type(before)(value)  # of --x.no-y, the empty text is False
    for section, values in changes.items():  # at once: a section checks its values together
        setattr(settings, section, replace(getattr(settings, section), **values))
    return settings


@cache
def _parsed(config: str):
    # One sequence on each group of GPUs, whatever the file says: the runs were made on few GPUs.
    file = str(REPOSITORY / "train_configs" / config)
    return CheckedConfigManager().parse_args(["--job.config_file", file, "--training.global_batch_size=-1"])


@contextmanager
def constants(values: dict[str, float]) -> Iterator[None]:
    """With these in the place of those in planning/step.py."""
    before = {name: getattr(step, name) for name in values}
    try:
        for name, value in values.items():
            setattr(step, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(step, name, value)


def fitted(runs: list[Run]) -> dict[str, float]:
    """Constants for which these runs are predicted best, by a search one constant at a time from the unfitted ones."""
    scales = {"ELEMENTWISE": 0.5, "KERNELS": 0.5, "SUSTAINED": 0.8, "RING_PASSES": 12.0, "FIXED": 0.02,
              "PARAMETER_BYTES": 150.0, "OPTIMIZER_BYTES": 60.0, "SELECTION": 1e-4, "SCORER_SLOWDOWN": 2.0,
              "HOST_STEP": 20.0, "HOST_LAYER": 2.0, "HOST_LIGHTHOUSE": 2.0}  # fmt: skip

    def loss(shares: dict[str, float]) -> float:
        with constants(at(shares)):
            # The last term keeps a constant that no run depends on where it was.
            return sum(run.speed_error() ** 2 for run in runs) + 1e-4 * sum(share**2 for share in shares.values())

    def at(shares: dict[str, float]) -> dict[str, float]:
        return {name: UNFITTED[name] + share * (scales[name] - UNFITTED[name]) for name, share in shares.items()}

    shares, stride = dict.fromkeys(UNFITTED, 0.0), 0.5
    least = loss(shares)
    while stride > 0.01:
        better = False
        for name in shares:
            for change in (stride, -stride):
                tried = shares | {name: min(max(shares[name] + change, 0.0), 1.2)}
                if (found := loss(tried)) < least:
                    shares, least, better = tried, found, True
        if not better:
            stride /= 2
    return at(shares)


def without_its_own_report(runs: list[Run]) -> dict[str, float]:
    """For each run the error in tokens/s after a fit to the runs of all other reports."""
    errors = {}
    for report in {run.report for run in runs}:
        with constants(fitted([run for run in runs if run.report != report])):
            errors |= {run.name: run.speed_error() for run in runs if run.report == report}
    return errors


def table(runs: list[Run]) -> list[str]:
    with constants(UNFITTED):
        unfitted = {run.name: run.speed_error() for run in runs}
    left_out = without_its_own_report(runs)
    lines = [
        "| run | | GPUs | GiB | predicted | | tokens/s/GPU | predicted | | unfitted | own report left out |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        found, memory = run.predicted(), run.memory_error()
        cells = [run.name, run.part, f"{run.work.gpus} × {run.rates.gpu.split()[1]}"]
        cells += (
            ["", "", ""] if memory is None else [f"{run.memory_gib:.1f}", f"{found.memory_gib:.1f}", f"{memory:+.1%}"]
        )
        cells += [f"{run.tokens_per_second:,.0f}", f"{found.tokens_per_second:,.0f}"]
        cells += [f"{error:+.1%}" for error in (run.speed_error(), unfitted[run.name], left_out[run.name])]
        lines.append("| " + " | ".join(cells) + " |")
    kinds = {
        "memory": [error for run in runs if (error := run.memory_error()) is not None],
        "tokens/s": [run.speed_error() for run in runs],
        "tokens/s, held out": [run.speed_error() for run in runs if run.part == "held out"],
        "memory, blind": [error for run in runs if run.part == "blind" and (error := run.memory_error()) is not None],
        "tokens/s, blind": [run.speed_error() for run in runs if run.part == "blind"],
        "tokens/s, nothing fitted": list(unfitted.values()),
        "tokens/s, own report left out": list(left_out.values()),
    }
    lines += ["", "| error | runs | median | largest |", "| --- | --- | --- | --- |"]
    for kind, errors in kinds.items():
        if not errors:
            continue
        sizes = [abs(error) for error in errors]
        lines.append(f"| {kind} | {len(sizes)} | {median(sizes):.1%} | {max(sizes):.1%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="the .csv files of reports")
    print("\n".join(table([run for file in parser.parse_args().runs for run in read_runs(file)])))


if __name__ == "__main__":
    main()
