"""What the kernels share: sizes that Triton wants as powers of two, and accumulation types."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse.pyramid import accumulation_dtype

TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return TRITON_DTYPES[accumulation_dtype(dtype)]


def log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Kernels take any strides but the last: attention modules always hand over whole rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(size: int) -> int:
    return triton.next_power_of_2(size)
