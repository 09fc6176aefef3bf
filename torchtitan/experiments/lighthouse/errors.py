"""The errors that users see: refusals of what cannot be done as asked, and data at fault."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Set to anything, this environment variable brings tracebacks back.
DEBUG = "LIGHTHOUSE_DEBUG"

#: The exit status of a command that refused; argparse's too. 1 is a crash's.
REFUSED = 2


class Refused(ValueError):
    """One message for the user: the value, the rule that it breaks, and the nearest valid value."""


class DataError(Refused):
    """The data or its location is at fault: trying again cannot help."""


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
def exit_on_refusal(command: str, *, silent: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Where ``Refused`` is raised, end the process with ``command: message``, status 2, and without a traceback.

    Args:
        silent: asked then: whether to print nothing, because another process prints the same.
    """
    try:
        yield
    except Refused as refusal:
        if os.environ.get(DEBUG):
            raise
        message = f"{command}: {refusal}"
        if not silent():
            print(message, file=sys.stderr, flush=True)
        stop = SystemExit(message)
        stop.code = REFUSED
        raise stop from refusal
