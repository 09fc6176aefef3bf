"""Which faults are injected: a list that a seed puts in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from faults import disks, kinds


@dataclass(frozen=True)
class Fault:
    """Those that one start serves."""

    kind: str
    run: str
    inject: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    mounts: bool = False

    def __str__(self) -> str:
        return f"[{self.run}] {self.inject.__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


def planned(seed: int) -> list[Fault]:
    """All of them; those of one run one after the other."""
    found: list[Fault] = []
    counts: dict[str, int] = {}

    def add(kind: str, run: str, inject: Callable[..., Any], times: int = 1, **arguments: Any) -> None:
        for _ in range(times):
            number = len(arguments["hows"]) if "hows" in arguments else 1
            first = counts.get(kind, 0)
            counts[kind] = first + number
            ids = tuple(f"{kind}-{first + n:02}" for n in range(number))
            found.append(Fault(kind, run, inject, arguments, ids, kind in ("full disk", "read-only")))

    background, worker = "two, saving in the background", "one, with a data worker"
    add("kill at a moment", "one", kinds.kill, 2, who="all")
    add("kill at a moment", "one", kinds.kill, who="torchrun")
    add("kill at a moment", "two", kinds.kill, 2, who="all")
    add("kill at a moment", "two", kinds.kill, 3, who="one rank")
    add("kill at a moment", "two", kinds.kill, 2, who="torchrun")
    add("kill while starting", "one", kinds.kill_starting)
    add("kill while starting", "two", kinds.kill_starting)
    add("kill in a save", "one", kinds.kill, 3, who="all", saving=True)
    add("kill in a save", "two", kinds.kill, 2, who="all", saving=True)
    add("kill in a save", "two", kinds.kill, 3, who="one rank", saving=True)
    add("kill in a save", "two", kinds.kill, who="torchrun", saving=True)
    add("kill in a save", background, kinds.kill, who="all", saving=True)
    add("kill in a save", background, kinds.kill, who="one rank", saving=True)
    add("kill of a data worker", worker, kinds.kill_worker)
    add("SIGSTOP", "two", kinds.hold, 4, then="SIGCONT")
    add("SIGSTOP", "two", kinds.hold, then="SIGKILL")
    add("SIGSTOP", "two", kinds.hold, then="timeout")
    for by in ("SIGTERM rank", "SIGINT rank", "file"):
        add("asked to stop", "one", kinds.stop, by=by)
    for by in ("SIGTERM torchrun", "SIGUSR1 rank", "SIGINT torchrun", "file"):
        add("asked to stop", "two", kinds.stop, by=by)
    add("asked to stop", "two", kinds.stop_at_once)
    add("asked to stop", background, kinds.stop, by="SIGTERM rank")
    for run, hows in (
        ("one", ("truncated", "flip", "missing", "zeroed", "empty", "flip")),
        ("one", ("emptied", "flip", "zeroed", "truncated", "missing", "flip")),
        ("two", ("flip", "zeroed", "missing", "truncated", "flip", "empty")),
        ("two", ("missing", "flip", "emptied", "zeroed", "truncated", "flip")),
        ("two", ("truncated", "missing", "zeroed", "flip", "flip", "missing")),
    ):
        add("damaged checkpoint", run, disks.damage_checkpoints, hows=hows)
    for how in ("metrics.jsonl cut in a line", "metrics.jsonl ends in zeros", "config.json empty", ".lock of noise"):
        add("damaged file of the run", "one", disks.damage_run_files, how=how)
    for run, hows in (("one", ("before the save", "during the save", "at the start")), ("two", ("during the save",))):
        add("full disk", f"{run}, a disk of its own", disks.too_large)
        for when in hows:
            add("full disk", f"{run}, a disk of its own", disks.full_disk, when=when)
    for when in ("at the start", "by a file in place of the folder"):
        add("read-only", "one, a disk of its own", disks.protected, when=when)
    add("read-only", "two, a disk of its own", disks.protected, when="while it trains")
    for how in ("a second start", "the first is held", "both start at once"):
        add("two runs at once", "one", kinds.second_run, how=how)
    add("two runs at once", "two", kinds.second_run, how="both start at once")
    for what in ("the dump folder", "the dump folder, with a link", "the data"):
        add("moved", "one", disks.move, what=what)
    for how in ("edited", "missing"):
        add("changed data", "one", disks.change_data, how=how)
    add("bad records", "one, bad records", kinds.kill, 2, who="all")
    add("bad records", "one, bad records", kinds.stop, by="SIGTERM rank")
    add("other ranks", "elastic", kinds.other_ranks, 6)
    for number in ("weight", "saved weight", "gradient"):
        add("not finite", "one, faulty", kinds.not_finite, number=number)
    for number in ("saved weight", "moment"):
        add("not finite", "two, faulty", kinds.not_finite, number=number)
    Random(seed).shuffle(found)
    order = ["elastic", "one", "two", "one, faulty", "two, faulty", "one, a disk of its own", "two, a disk of its own"]
    order += [worker, background, "one, bad records"]
    return sorted(
        found, key=lambda fault: (order.index(fault.run), fault.kind not in ("damaged checkpoint", "SIGSTOP"))
    )
