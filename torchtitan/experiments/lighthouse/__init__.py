"""Lighthouse Attention in torchtitan: the trainer, what it is made of, and the commands around it.

Importing this package loads nothing and registers nothing. ``train_spec`` registers the model and the datasets with
torchtitan; ``train`` is the trainer; ``resume_dense``, ``evaluate``, ``check_causality``, ``eval_niah``, ``export_hf``,
``report`` and ``sweep`` are commands, each run with ``python -m``. docs/architecture.md shows the rooms.
"""

from typing import Any

#: What can be imported from here, and the module that has it.
_LAZY = {
    "LighthouseModelArgs": "model.args",
    "LighthouseTransformer": "model.model",
    "get_train_spec": "train_spec",
    "lighthouse_args": "train_spec",
    "parallelize_lighthouse": "infra.parallelize",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
