"""What faults share: a random moment, the middle of a save, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from random import Random

from faults.chain import INTERVAL, Chain
from helpers.processes import Run, send


def one_line(run: Run, says: str) -> list[str]:
    """What is wrong with a refusal: one line that says so, exit status 2, and no traceback but torchrun's own."""
    text = re.sub(r"Traceback .*?\n(?:(?!Traceback ).)*?ChildFailedError: ", "", run.output(), flags=re.S)
    lines = [line for line in text.splitlines() if re.search(says, line)]
    problems = [] if len(lines) == 1 else [f"{len(lines)} lines say {says!r}, in {run.log}"]
    if "Traceback (most recent call last)" in text:
        problems.append(f"a traceback, in {run.log}")
    if not re.search(r"exitcode\s+: 2 ", text):
        problems.append("the exit status is not 2")
    return problems


def moment(chain: Chain, draw: Random) -> None:
    time.sleep(draw.uniform(0, chain.longest))


@contextlib.contextmanager
def caught_while_saving(chain: Chain, run: Run, draw: Random) -> Iterator[str]:
    """All trainers held still in the middle of a save; what of it is on the disk."""
    trainers = list(run.trainers().values())
    share = draw.uniform(0, 1.1)  # of the bytes of a rank, and beyond them the table of contents
    size = (chain.reference.folder / f"checkpoint/step-{INTERVAL}/__0_0.distcp").stat().st_size
    for _ in range(20):

        def under_way() -> bool:
            for folder in chain.checkpoints.glob("saving-*"):
                with contextlib.suppress(OSError):
                    there = (folder / "__0_0.distcp").stat().st_size / size
                    if there >= min(share, 0.99) and (share < 1 or list(folder.glob(".metadata*"))):
                        return True
            return False

        chain.wait_until(under_way, "a save", run)
        send(signal.SIGSTOP, trainers)
        folders = list(chain.checkpoints.glob("saving-*"))
        if folders:
            files = sorted(folders[0].iterdir())
            content = ", ".join(f"{file.name} {file.stat().st_size:,}" for file in files) or "nothing"
            yield f"in {folders[0].name} ({content})"
            send(signal.SIGCONT, trainers)
            return
        send(signal.SIGCONT, trainers)
    raise AssertionError("20 saves went by")
