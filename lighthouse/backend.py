"""The way to the Triton kernels: the plain-torch path must run where Triton is not installed."""

from __future__ import annotations

from types import ModuleType


def load_kernels() -> ModuleType:
    """``lighthouse.kernels``, imported with Triton at the first use."""
    import lighthouse.kernels

    return lighthouse.kernels
