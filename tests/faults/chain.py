"""A training run that is hit by one fault after the other, and compared after each with a run that was not."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.mounts import mount, unmount
from helpers import ranks
from helpers.launch import TRAINER, assert_same, command, environment, load_checkpoint, run
from helpers.processes import Run
from helpers.text import words

STEPS, INTERVAL, KEEP = 80, 2, 10

#: Cheap steps: 2 sequences of 1,024 tokens each, of which the middle layers select 768 rows.
CHEAP = {
    "training.dataset": "c4_local", "training.global_batch_size": "2",
    "checkpoint.interval": str(INTERVAL),
    "checkpoint.keep_latest_k": str(KEEP), "comm.init_timeout_seconds": "60",
    "comm.train_timeout_seconds": "20",
}  # fmt: skip

#: What a checkpoint consists of, by the first part of its keys; the others are weights.
PARTS = {
    "optimizer": "optimizer",
    "lr_scheduler": "schedule",
    "dataloader": "data position",
    "train_state": "counters",
}


#: Lines that hold no text.
BAD_LINES = [
    b'{"text": "cut',
    b'{"no text": 1}',
    b'{"text": null}',
    b'["text"]',
    b'{"text": "\xff\xfe"}',
    b"\0" * 100_000,
]


def write_corpus(folder: Path, bad: bool = False) -> Path:
    """Eight files with 5 documents of different lengths each, some compressed: about 80,000 tokens.

    Args:
        bad: with bad records between them.
    """
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        texts = [words(draw.randint(300, 4000), draw.randrange(1 << 30)).decode() for _ in range(5)]
        lines = [json.dumps({"text": text}).encode() for text in texts]
        if bad:
            lines[number % 5 : number % 5] = [
                BAD_LINES[number % len(BAD_LINES)],
                BAD_LINES[(number + 1) % len(BAD_LINES)],
            ]
        content = b"".join(line + b"\n" for line in lines)
        if number % 2:
            (folder / f"c4-train.{number}.json").write_bytes(content)
        else:
            (folder / f"c4-train.{number}.json.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder


class Finished(Exception):
    """The run has come to its last step before the fault hit it."""


@dataclass(frozen=True)
class Setup:
    """How a run is started."""

    ranks: int
    data: Path
    settings: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = TRAINER
    steps: int = STEPS

    def words(self, folder: Path, nproc: int | None = None, data: Path | None = None, **more: str) -> list[str]:
        nproc = nproc or self.ranks
        sizes = {"training.local_batch_size": str(2 // nproc), "training.dataset_path": str(data or self.data)}
        steps = {"training.steps": str(self.steps), "lr_scheduler.total_steps": str(self.steps)}
        return command(folder, nproc, program=self.program, **CHEAP | sizes | steps | self.settings | more)


class Reference:
    """The same run without faults: it is compared with.

    Args:
        forked: start it without torchrun, which costs less.
        start: from the first save of this one.
    """

    def __init__(self, folder: Path, setup: Setup, *, forked: bool = False, start: Reference | None = None) -> None:
        self.folder, self.scratch = folder / "run", folder / "scratch"
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if start is not None:
                first = self.folder / f"checkpoint/step-{INTERVAL}"
                shutil.copytree(start.folder / "checkpoint" / first.name, first)
                lines = (start.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
                (self.folder / "metrics.jsonl").write_text("".join(lines[:INTERVAL]))
            words = setup.words(self.folder, **{"checkpoint.keep_latest_k": "0"})
            if forked:
                ranks.start(setup.ranks, words[words.index("--job.config_file") :], environment())
            else:
                run(words, timeout=1200)
            (folder / "whole").touch()
        self.losses = {step: numbers for step, numbers in logged(self.folder)}
        assert list(self.losses) == list(range(1, setup.steps + 1)), "the reference was interrupted"

    def state(self, step: int) -> dict[str, Any]:
        return load_checkpoint(self.folder / f"checkpoint/step-{step}", self.scratch)


def logged(folder: Path) -> list[tuple[int, tuple[float, float]]]:
    """Step, loss and gradient norm of every line of ``metrics.jsonl``, steps that were trained twice too."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                found.append((record["step"], (record["loss"], record["grad_norm"])))
    return found


def unequal_parts(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The parts of two checkpoints that differ in any bit."""
    found = set()
    for key in ours.keys() | theirs.keys():
        try:
            assert_same(ours.get(key), theirs.get(key))
        except AssertionError:
            found.add(PARTS.get(key, "weights"))
    return sorted(found)


@dataclass
class Outcome:
    """Of one fault."""

    what: str
    resumed_from: int | None = None
    expected: int | None = None
    last_logged: int = 0
    compared_at: int | None = None
    unequal: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    command: str = "same"

    @property
    def manual_steps(self) -> int:
        """Beside starting the command again. Where that is not enough, at least one."""
        return int(self.compared_at is None)

    @property
    def survived(self) -> bool:
        return not self.problems and self.compared_at is not None

    @property
    def bit_equal(self) -> bool:
        return self.compared_at is not None and not self.unequal


class Chain:
    """The run, which goes on in the same folder.

    Args:
        folder: for the dump folder, what the starts print, and scratch.
        disk: bytes of a file system of its own for the dump folder.
        room: steps that are to be left when a fault hits.
        longest: seconds until a random moment, at most.
        starts: how the run is started.
    """

    def __init__(
        self,
        folder: Path,
        setup: Setup,
        reference: Reference,
        *,
        disk: int | None = None,
        room: int = 30,
        longest: float = 2.5,
        starts: type[Run] = Run,
    ) -> None:
        self.base, self.setup, self.reference, self.disk = folder, setup, reference, disk
        self.room, self.longest, self._new_run = room, longest, starts
        self.folder, self.ranks, self.data = folder / "run", setup.ranks, setup.data
        self.orders, self.stop_file = folder / "order", folder / "stop"
        self.run: Run | None = None
        self.starts = 0
        unmount(self.folder)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "logs").mkdir(parents=True)
        self._make_disk()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    def hit(self, inject: Callable[..., Any], draw: random.Random, **arguments: Any) -> tuple[list[Outcome], ...]:
        """By a fault, of those in ``kinds``. A run that ends before is compared there, and a new one starts.

        Returns:
            What came of the fault, or of all the faults that it is; and of the ends.
        """
        ends: list[Outcome] = []
        while True:
            try:
                found = inject(self, draw, **arguments)
                return (found if isinstance(found, list) else [found]), ends
            except Finished:
                assert len(ends) < 3, "a new run leaves no room for this fault"
                ends.append(self.finish())
                self.reset()

    # Training

    def start(self, *, folder: Path | None = None, variables: dict[str, str] | None = None, **more: str) -> Run:
        """One more process, with the same command but for what is given."""
        self.starts += 1
        log = self.base / f"logs/{self.starts:03}.log"
        words = self.setup.words(folder or self.folder, self.ranks, self.data, **more)
        known = {"LIGHTHOUSE_STOP_FILE": str(self.stop_file), "LIGHTHOUSE_FAULT": str(self.orders)}
        return self._new_run(words, log, **known | (variables or {}))

    def training(self, room: int = 0) -> Run:
        """The run, at work, started if need be.

        Args:
            room: where more steps than usual are to be left.
        """
        if self.last_logged() > self.setup.steps - max(room, self.room):
            raise Finished
        if self.run is None or self.run.ended() is not None:
            self.run = self.start()
            self.wait_for_steps(self.run, 1)
        return self.run

    def wait_for_steps(self, run: Run, steps: int) -> None:
        """Until this process has trained so many."""
        self.wait_until(lambda: run.output().count("  loss:") >= steps * self.ranks, f"{steps} step(s)", run)

    def wait_until(self, condition: Callable[[], bool], what: str, run: Run | None = None) -> None:
        run = run or self.run
        assert run is not None
        try:
            run.wait_until(condition, what)
        except AssertionError:
            if run.ended() == 0:
                raise Finished from None
            raise

    def wait_for_checkpoints(self, number: int) -> None:
        self.wait_until(lambda: len(self.whole()) >= number, f"{number} checkpoints")

    def kill(self) -> None:
        if self.run is not None:
            self.run.kill()

    def last_logged(self) -> int:
        lines = logged(self.folder)
        return lines[-1][0] if lines else 0

    def whole(self) -> list[int]:
        """The steps whose save is whole, the newest first: what is sealed last is there."""
        found = [path.parent.name for path in self.checkpoints.glob("*-*/manifest.json")]
        names = (re.fullmatch(r"(?:step|saving)-(\d+)", name) for name in found)
        return sorted({int(name[1]) for name in names if name}, reverse=True)

    # Judging

    def go_on(self, what: str, expected: int | None = None, problems: list[str] | None = None, **how: Any) -> Outcome:
        """Start the same command again and compare.

        Args:
            expected: the step to resume from; that of the newest whole save unless given.
            problems: that were seen before.
            how: ``start``'s, for the fault's own sake.
        """
        whole = self.whole()
        expected = (whole[0] if whole else 0) if expected is None else expected
        outcome = Outcome(what, expected=expected, last_logged=self.last_logged(), problems=list(problems or []))
        self.run = self.start(**how)
        return self.judge(outcome)

    def judge(self, outcome: Outcome) -> Outcome:
        """What the process that has just been started makes of it."""
        run = self.run
        assert run is not None
        try:
            self.wait_for_steps(run, 1)
        except Finished:
            pass
        except AssertionError as error:
            outcome.problems.append(f"it does not go on: {error}")
            return outcome
        found = re.findall(r"Resuming after step (\d+)$", run.output(), re.M)
        outcome.resumed_from = int(found[0]) if found else 0
        if outcome.resumed_from != outcome.expected:
            outcome.problems.append(f"resumed from step {outcome.resumed_from} instead of {outcome.expected}")
        return self.compare(outcome, outcome.resumed_from)

    def still_trains(self, what: str, problems: list[str]) -> Outcome:
        """Where the fault has ended no process: compare further on."""
        outcome = Outcome(what, last_logged=self.last_logged(), problems=problems)
        return self.compare(outcome, outcome.last_logged)

    def compare(self, outcome: Outcome, since: int) -> Outcome:
        """At the first save at least two steps after step ``since``."""
        step = min(-(-(since + 2) // INTERVAL) * INTERVAL, self.setup.steps)
        try:
            self.wait_until((self.checkpoints / f"step-{step}/manifest.json").exists, f"step-{step}")
        except Finished:
            pass
        except AssertionError as error:
            outcome.problems.append(f"it does not go on: {error}")
            return outcome
        copy = self.base / f"scratch/step-{step}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.checkpoints / copy.name, copy)
        outcome.compared_at = step
        outcome.unequal = self.unequal(load_checkpoint(copy, self.base / "scratch"), step)
        shutil.rmtree(copy)
        return outcome

    def unequal(self, ours: dict[str, Any], step: int) -> list[str]:
        """What differs at a step; every loss that was logged so far, too."""
        wrong = [step for step, numbers in logged(self.folder) if self.reference.losses[step] != numbers]
        return unequal_parts(ours, self.reference.state(step)) + ["losses"] * bool(wrong)

    def finish(self) -> Outcome:
        """Let the run come to its end, and compare there."""
        outcome = Outcome("the end of a chain", last_logged=self.last_logged())
        if self.run is None or self.run.ended() not in (None, 0):
            self.run = self.start()
        status = self.run.wait(600)
        if status != 0:
            outcome.problems.append(f"exit status {status} at the end, in {self.run.log}")
            return outcome
        return self.compare(outcome, self.setup.steps)

    def reset(self) -> None:
        """To nothing, to start over."""
        self.kill()
        self.run, self.ranks, self.data = None, self.setup.ranks, self.setup.data
        self.close()
        self._make_disk()

    def close(self) -> None:
        """End it, and remove its dump folder; what was printed stays."""
        self.kill()
        if self.disk:
            unmount(self.folder)
        for file in self.base.iterdir():
            if file.name != "logs":
                file.unlink() if file.is_symlink() or file.is_file() else shutil.rmtree(file)
        self.folder = self.base / "run"

    def _make_disk(self) -> None:
        if self.disk:
            self.folder.mkdir()
            mount("-t", "tmpfs", "-o", f"size={self.disk}", "tmpfs", self.folder)
