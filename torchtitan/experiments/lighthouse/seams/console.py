"""Which log lines reach the console: upstream and the libraries log about 90 at a start, on every rank.

The lines are chosen where they leave, by a filter of logging's own. With ``LIGHTHOUSE_DEBUG`` in the environment all
of them are there, as upstream writes them.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import torchtitan
from torchtitan.experiments.lighthouse.errors import DEBUG
from torchtitan.tools.logging import init_logger, logger

_PACKAGE = Path(__file__).parents[1]
_UPSTREAM = Path(torchtitan.__file__).parent

#: The functions of upstream whose lines are for the user: the figures, where they go, loading, profiles.
_FOR_USERS = {
    ("metrics", "log"),
    ("metrics", "log_validation"),
    ("metrics", "__init__"),
    ("checkpoint", "load"),
    ("profiling", "trace_handler"),
    ("profiling", "step"),
    ("profiling", "maybe_enable_profiling"),
    ("profiling", "maybe_enable_memory_snapshot"),
}

#: The functions of upstream whose warnings every rank gives in the same words, some of them twice.
_WARNED_BY_ALL = {
    ("utils", "get_peak_flops"),
    ("utils", "_warn_overwrite_env"),
    ("state_dict_adapter", "__init__"),
}

#: The functions of upstream whose warnings are not true here: ranks agree where validation ends.
_NOT_SO = {("validate", "__init__")}

#: As ``extra`` of a line of ours that only explains upstream's.
DETAIL = {"detail": True}


class Essentials(logging.Filter):
    """Passes every warning and error; of the rest, on rank 0, what is for the user.

    A record may say by an attribute ``here`` that another rank is the one to print it.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._warned: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        where = record.module, record.funcName
        path = Path(record.pathname)
        ours = path.is_relative_to(_PACKAGE)
        upstreams = not ours and path.is_relative_to(_UPSTREAM)
        if record.levelno >= logging.WARNING:
            if upstreams and where in _NOT_SO:
                return False
            if not (upstreams and where in _WARNED_BY_ALL):
                return True
            message, again = record.getMessage(), record.getMessage() in self._warned
            self._warned.add(message)
            return self._rank == 0 and not again
        if not getattr(record, "here", self._rank == 0):
            return False
        return not hasattr(record, "detail") if ours else upstreams and where in _FOR_USERS


class Line(logging.Formatter):
    """``2026-01-31 12:00:00 message``; a warning names itself, and the rank if that is not the first."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
        named = f"%(asctime)s %(levelname)s{f' of rank {rank}' if rank else ''}: %(message)s"
        self._named = logging.Formatter(named, self.datefmt)

    def format(self, record: logging.LogRecord) -> str:
        return self._named.format(record) if record.levelno >= logging.WARNING else super().format(record)


def quiet_logger() -> None:
    """Upstream's ``init_logger``, its console for the user."""
    init_logger()
    if os.environ.get(DEBUG):
        return
    rank = int(os.environ.get("RANK", 0))
    if rank and not sys.warnoptions:
        # Python's own are of the code, and the same on every rank.
        warnings.simplefilter("ignore")
    for handler in logger.handlers:
        handler.addFilter(Essentials(rank))
        handler.setFormatter(Line(rank))
