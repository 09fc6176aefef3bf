"""The curves: runs joined to chains of stages, from metrics.jsonl and config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs.checkpoints import CONFIG_FILE
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, number_of, read_metrics, usual_rate

#: Losses are noisy: the table and the smooth curves take means over so many logged steps, fewer for short runs.
LONGEST_WINDOW = 10


@dataclass
class Experiment:
    """One curve: a dense run, or Stage 1 with the stages that continue it."""

    name: str
    records: list[dict[str, Any]]
    """Of metrics.jsonl, each with ``lighthouse``, whether its stage runs through it, ``seq_len`` and ``data`` (None:
    unknown)"""
    labelled: bool = False
    """Whether somebody chose its name"""

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
    def data(self) -> str | None:
        """Of a part; None where nothing says so."""
        data: str | None = self.records[0]["data"]
        return data

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


def load_experiments(runs: list[Path], labels: list[str] | None = None) -> list[Experiment]:
    """Read the runs and join every later stage to the one before it.

    Args:
        labels: a name for each curve, in their order; by default what a chain consists of, or a run's folder, and where
            two would be called the same, the folders that tell them apart.

    Raises:
        Refused: for a run without metrics, a stage that continues nothing, or labels that do not fit.
    """
    experiments: list[Experiment] = []
    folders: list[Path] = []
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
            "data": _data_of(config),
        }
        records = [record | about for record in records]
        if number == 1:
            experiments.append(Experiment(run.resolve().name, records))
            folders.append(run.resolve())
            continue
        last = experiments[-1].records[-1]["stage"] if experiments else ""
        origin = Path(section.get("stage1_checkpoint", "")).parent.parent.name
        # A dense run is more often what others are compared with: it is the first stage of what says so.
        continues = last == f"stage{number - 1}" or (last == "dense" and number == 2)
        if before is None or not continues or (last == "dense" and origin != before.resolve().name):
            raise Refused(f"{run} holds Stage {number}: name its Stage {number - 1} run just before it")
        first = records[0]["step"]
        joined = Experiment("", [record for record in experiments[-1].records if record["step"] < first] + records)
        joined.name = ", then ".join(in_words(part, joined.changes_context) for part in joined.parts)
        experiments[-1] = joined
    _name(experiments, folders, labels)
    return experiments


def _name(experiments: list[Experiment], folders: list[Path], labels: list[str] | None) -> None:
    if labels is not None:
        if len(labels) != len(experiments) or len(set(labels)) < len(labels) or not all(labels):
            curves = ", ".join(experiment.name for experiment in experiments)
            raise Refused(
                f"--labels {','.join(labels)}: must be {len(experiments)} different names, one for each curve ({curves}"
                f"); nearest valid value: {','.join(folder.name for folder in folders)}"
            )
        for experiment, label in zip(experiments, labels, strict=True):
            experiment.name, experiment.labelled = label, True
        return
    names = [experiment.name for experiment in experiments]
    for experiment, folder in zip(experiments, folders, strict=True):
        alike = [
            other for other, name in zip(folders, names, strict=True) if name == experiment.name and other != folder
        ]
        if alike:
            parts = next(
                (n for n in range(1, len(folder.parts)) if all(folder.parts[-n:] != o.parts[-n:] for o in alike)), 1
            )
            where = "/".join(folder.parts[-parts:])
            experiment.name = where if experiment.name == folder.name else f"{experiment.name} ({where})"


def _data_of(config: dict[str, Any]) -> str | None:
    """What a run was trained on, as far as its settings tell."""
    training = config.get("training", {})
    if "dataset" not in training:
        return None
    return " ".join(filter(None, (training["dataset"], training.get("dataset_path"))))


def differing(experiments: list[Experiment]) -> list[str]:
    """Warnings: what keeps these curves from being compared, a sentence each."""
    found = []
    for what, of in (("contexts", lambda part: part.seq_len and f"{part.seq_len:,}"), ("data", lambda part: part.data)):
        last = {experiment.name: of(experiment.parts[-1]) for experiment in experiments}
        if len({value for value in last.values() if value}) > 1:
            of_each = ", ".join(f"{name}: {value or 'unknown'}" for name, value in last.items())
            found.append(f"Warning: these runs have different {what}, so their losses cannot be compared ({of_each}).")
    return found


def in_words(part: Experiment, with_context: bool, dense: str = "dense", lighthouse: str = "Lighthouse") -> str:
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


def differences(part: Experiment, dense: Experiment) -> Experiment:
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
