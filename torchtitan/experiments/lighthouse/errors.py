"""The errors that users see: refusals of what cannot be done as asked, and data at fault."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Set to anything, this environment variable brings tracebacks back.
DEBUG = "LIGHTHOUSE_DEBUG"

#: The exit status of a command that refused; argparse's too. 1 is a crash's.
REFUSED = 2


class Refused(ValueError):
    """One message for the user: the value, the rule that it breaks, and the nearest valid value."""

    def __init__(self, message: object = "") -> None:
        super().__init__(message if os.environ.get(DEBUG) else _without_worker(str(message)))


class DataError(Refused):
    """The data or its location is at fault: trying again cannot help."""


def _without_worker(message: str) -> str:
    """The message alone, where torch raises a data worker's error again, with the worker's traceback in the message."""
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.\n", message):
        *_, last = re.finditer(r"^[\w.]+: ", message, re.MULTILINE)
        return message[last.end() :].rstrip()
    return message


@contextmanager
def as_refusal() -> Iterator[None]:
    """Make the ``ValueError`` of a check that knows no ``Refused``, the library's for example, one."""
    try:
        yield
    except Refused:
        raise
    except ValueError as error:
        raise Refused(str(error)) from error


@contextmanager
def exit_on_refusal(command: str, *, before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Where ``Refused`` is raised, end the process with ``command: message``, status 2, and without a traceback.

    Args:
        before: called then, before anything is printed.
    """
    try:
        yield
    except Refused as refusal:
        if os.environ.get(DEBUG):
            raise
        before()
        message = f"{command}: {refusal}"
        print(message, file=sys.stderr, flush=True)
        stop = SystemExit(message)
        stop.code = REFUSED
        raise stop from refusal
