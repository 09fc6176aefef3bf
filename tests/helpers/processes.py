"""Training runs in the background, and how to end them: by process number, and seen to be dead."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch.distributed import run as torchrun

from helpers import ranks
from helpers.launch import environment


class Process(NamedTuple):
    pid: int
    started: str
    """Clock ticks since the machine's start: numbers are used again."""


def find(pid: int) -> Process | None:
    """The process of this number; None if there is none, or it has ended and waits for its parent."""
    with contextlib.suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            return Process(pid, rest[18])
    return None


def is_alive(process: Process) -> bool:
    return find(process.pid) == process


def children(pid: int) -> list[Process]:
    """The processes that a process has started itself, and that live."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return [process for process in map(find, found) if process is not None]


def descendants(pid: int) -> list[Process]:
    """Those, and what they have started, and so on."""
    return [process for child in children(pid) for process in (child, *descendants(child.pid))]


def send(number: int, processes: Iterable[Process]) -> None:
    for process in processes:
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    """
    Raises:
        AssertionError: naming ``what`` was waited for in vain.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.002)


def assert_dead(processes: Iterable[Process], seconds: float = 10) -> None:
    """All of them, so many seconds later at the latest."""
    wait_for(lambda: not any(map(is_alive, processes)), f"that {list(processes)} be dead", seconds)


class Run:
    """A training run: torchrun, its trainers, and what they print.

    Args:
        words: the command.
        log: the file for what is printed, from here on.
    """

    def __init__(self, words: list[str], log: Path, **variables: str) -> None:
        self.log = log
        with log.open("wb") as out:
            self._popen = subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, env=environment() | variables, start_new_session=True
            )
        process = find(self._popen.pid)
        assert process is not None
        self.torchrun = process

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self) -> int | None:
        """torchrun's exit status; None while it lives."""
        return self._popen.poll()

    def trainers(self) -> dict[int, Process]:
        """By rank. (Torchrun gives each its rank in the environment, and puts it into a session of its own.)"""
        found = {}
        for child in children(self.torchrun.pid):
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
                found |= {int(text[5:]): child for text in variables if text.startswith(b"RANK=")}
        return found

    def all(self) -> list[Process]:
        """Torchrun, the trainers, and what those have started."""
        return [self.torchrun, *descendants(self.torchrun.pid)]

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
        """
        Raises:
            AssertionError: also if the run ends before.
        """

        def there() -> bool:
            ended = self.ended()  # asked first: the condition may have come true with the run's last act
            if condition():
                return True
            assert ended is None, f"status {ended} before {what}: {self.log} ends in {self.output()[-600:]!r}"
            return False

        wait_for(there, what, seconds)

    def wait(self, seconds: float = 180) -> int:
        """Until torchrun has ended by itself, and all that it had started is gone; its exit status."""
        everything = self.all()
        wait_for(lambda: self.ended() is not None, "that the run ends", seconds)
        assert_dead(everything)
        status = self.ended()
        assert status is not None
        return status

    def kill(self, victims: Iterable[Process] | None = None) -> None:
        """Without warning, all of it or these; then they are dead."""
        victims = list(self.all() if victims is None else victims)
        # Trainers first: torchrun would have no time to end them, but they might have some to act on its death.
        send(signal.SIGKILL, sorted(victims, key=lambda process: process == self.torchrun))
        if self.torchrun in victims:
            wait_for(lambda: self.ended() is not None, "torchrun's end")
        assert_dead(victims)


class ForkedRun(Run):
    """The same from forks of a process that has imported the trainer: torchrun's agent, and from it the trainers."""

    def __init__(self, words: list[str], log: Path, **variables: str) -> None:
        self.log = log
        log.write_bytes(b"")
        arguments = words[words.index("torch.distributed.run") + 1 :]
        known = environment() | variables
        self._process = ranks.fork(_torchrun, (arguments, known, str(log), str(log)), environment())
        assert self._process.pid is not None
        process = find(self._process.pid)
        assert process is not None
        self.torchrun = process

    def ended(self) -> int | None:
        return self._process.exitcode

    def trainers(self) -> dict[int, Process]:
        """In the order of their start, which is that of the ranks."""
        return dict(enumerate(sorted(children(self.torchrun.pid), key=lambda child: (int(child.started), child.pid))))


def _torchrun(arguments: list[str], variables: dict[str, str], *files: str) -> None:
    os.setsid()
    ranks.begin(variables, *files)
    launch = torchrun.elastic_launch
    torchrun.elastic_launch = lambda config, entrypoint: launch(replace(config, start_method="fork"), _trainer)
    torchrun.main(arguments)


def _trainer(*words: str) -> None:
    """As ``python -u …`` would."""
    # torch's own forks are sent SIGINT when their parent dies, and would stop; torchrun's processes are not.
    pr_set_pdeathsig, no_signal = 1, 0
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, no_signal)
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    ranks.become(program, arguments)
