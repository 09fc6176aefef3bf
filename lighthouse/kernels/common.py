"""What the kernels share: how they are launched, sizes, and accumulation types."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.pyramid import accumulation_dtype

TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

#: What Triton compiled, by everything that it specialises a kernel on, or more.
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: triton.JITFunction, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], /,
    *, across: int = 1, num_warps: int = 4, **constants: Any,
) -> None:  # fmt: skip
    """Run ``kernel``, whose arguments are ``tensors``, ``numbers`` and ``constants``, in this order.

    From the second time on it is launched without Triton's own way from arguments to compiled kernel, which takes
    about twice as long as the launch.
    """
    grid = (programs, across, 1)
    unaligned = 0
    for x in tensors:
        unaligned |= x.data_ptr() % 16
    dtypes = [x.dtype for x in tensors]
    key = (id(kernel), tensors[0].device, unaligned, num_warps, numbers, *constants.values(), *dtypes)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*tensors, *numbers, *constants.values())
        return
    compiled = kernel[grid](*tensors, *numbers, **constants, num_warps=num_warps)
    if not unaligned:  # otherwise it matters which of the tensors is
        _COMPILED[key] = compiled  # None in the interpreter, which compiles nothing


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return TRITON_DTYPES[accumulation_dtype(dtype)]


def log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, which takes the host twice as long."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Kernels take any strides but the last: attention modules always hand over whole rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()
