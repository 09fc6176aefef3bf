"""Upstream's parser of settings (tyro), three times as fast: for its help it reads every section's source each time."""

import sys
from types import ModuleType
from typing import Any


def speed_up() -> None:
    """Read the source of each class once.

    What is parsed, and the help, stay the same. Where tyro has no such function, nothing is replaced.
    """
    try:
        from tyro._docstrings import _ClassTokenization

        make = _ClassTokenization.make
    except (ImportError, AttributeError):
        return
    made: dict[tuple[object, ...], Any] = {}

    def make_once(cls: type) -> Any:
        # Sections of merged settings are new classes each time: their source is found by these names too, or not.
        module = sys.modules.get(cls.__module__, ModuleType(""))
        key = cls.__module__, cls.__qualname__, getattr(module, "__file__", None)
        if key not in made:
            try:
                made[key] = make(cls)
            except (OSError, TypeError) as error:  # there is no source
                made[key] = error
        if isinstance(made[key], Exception):
            raise made[key]
        return made[key]

    _ClassTokenization.make = staticmethod(make_once)
