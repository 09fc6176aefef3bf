"""Stopping a run between two steps, all ranks after the same one, so that it can be saved and goes on later.

Asked for by SIGTERM, SIGUSR1 or the first Ctrl-C, at any rank, or by a file (for schedulers that reach no process of
the run). A second signal stops at once, as without this module.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

#: The exit status of a run that was stopped, saved, and not finished: "try again" in sysexits.h.
STOPPED = 75

#: Names the file that asks a run to stop; looked for after every step, by rank 0.
STOP_FILE = "LIGHTHOUSE_STOP_FILE"

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Requests:
    """What all ranks agree to do after a step.

    Ranks tell each other on the host, each time what they know, and act on what was told the time before: so no step
    waits, not for the device and not for a rank that is late by less than a step.
    """

    def __init__(self, patience: float) -> None:
        """To be made on all ranks at the same point, when there is a process group.

        Args:
            patience: seconds after which a rank that does not answer fails the others. Where it is longer than that of
                the run's other collectives, a process that ends because one of those has failed waits for this.
        """
        self.signal: str | None = None
        self._process = os.getpid()
        # The fake backend, for dry runs, has other ranks in name only.
        alone = dist.get_world_size() == 1 or dist.get_backend() == "fake"
        self._group = None if alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
        self._told: tuple[torch.Tensor, dist.Work | None] | None = None
        self._file = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ and dist.get_rank() == 0 else None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process forked from this one, to read data: Ctrl-C is not for it, it ends with this one.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal = signal.Signals(number).name
        for other in SIGNALS:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)

    def exchange(self, save: bool = False) -> tuple[bool, bool]:
        """To be called by all ranks after every step.

        Args:
            save: whether this rank asks for a checkpoint.

        Returns:
            Whether to stop, and whether to save: what any rank asked for when this was called before.
        """
        stop = self.signal is not None or (self._file is not None and self._file.exists())
        asked = torch.tensor([stop, save], dtype=torch.int32)
        before, self._told = self._told, (asked, None)
        if self._group is not None:
            self._told = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return False, False
        told, work = before
        if work is not None:
            work.wait()
        stop, save = told.bool().tolist()
        return stop, save
