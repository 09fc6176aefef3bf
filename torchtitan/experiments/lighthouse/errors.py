"""The errors that users see: refusals of what cannot be done as asked, and data at fault."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """One message for the user: the value, the rule that it breaks, and the nearest valid value."""


class DataError(ValueError):
    """The data or its location is at fault: trying again cannot help."""


@contextmanager
def exit_on_refusal(command: str) -> Iterator[None]:
    """End the process with ``command: message`` and exit status 1, without a traceback, where ``Refused`` is raised."""
    try:
        yield
    except Refused as refusal:
        raise SystemExit(f"{command}: {refusal}") from refusal
