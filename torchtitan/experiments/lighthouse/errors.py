"""The errors that users see: refusals of what cannot be done as asked, and data at fault."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """One message for the user: the value, the rule that it breaks, and the nearest valid value."""


class DataError(ValueError):
    """The data or its location is at fault: trying again cannot help."""


@contextmanager
def exit_on_refusal(command: str, status: int = 1) -> Iterator[None]:
    """End the process with ``command: message`` and without a traceback where ``Refused`` is raised.

    Args:
        status: the exit status, for a command to which 1 means something else.
    """
    try:
        yield
    except Refused as refusal:
        message = f"{command}: {refusal}"
        if status == 1:
            raise SystemExit(message) from refusal
        print(message, file=sys.stderr)
        raise SystemExit(status) from refusal
