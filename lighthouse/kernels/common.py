"""What the kernels share: how operators are registered and kernels launched, sizes, and accumulation types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import _C, Tensor
from torch.autograd.function import once_differentiable

from lighthouse.pyramid import accumulation_dtype

TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

_LIBRARY = torch.library.Library("lighthouse", "FRAGMENT")

#: A differentiable operator's two functions, as ``torch.library.register_autograd`` takes them.
SetupContext = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def operator(
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: SetupContext | None = None,
    backward: Backward | None = None,
) -> torch._ops.OpOverload:
    """Register ``run`` as the operator ``lighthouse::NAME``, under its own name and annotations.

    The same to a caller, to the compiler, to fake tensors and to checkpointing as ``torch.library.custom_op``, but at a
    third of its time on the host, which a layer pays for each of its operators: custom_op looks for aliases among
    arguments and results at every call, and its autograd is made for any signature.

    Args:
        run: takes tensors and numbers, all of them without a default (the dispatcher would leave those out), and
            returns tensors of its own.
        fake: the same without data.
        setup_context, backward: as in ``torch.library.register_autograd``; differentiable once.
    """
    name = run.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"lighthouse::{name}", fake, lib=_LIBRARY)
    overload = cast(torch._ops.OpOverload, getattr(torch.ops.lighthouse, name).default)
    if backward is not None:
        assert setup_context is not None
        _LIBRARY.impl(name, _with_autograd(overload, setup_context, backward), "Autograd")
    return overload


def _with_autograd(
    overload: torch._ops.OpOverload, setup_context: SetupContext, backward: Backward
) -> Callable[..., Any]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        with _C._AutoDispatchBelowAutograd():
            output = overload(*inputs)
        setup_context(ctx, inputs, output)
        return output

    functions = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    apply = cast(Any, type(f"Backward_{overload._opname}", (torch.autograd.Function,), functions)).apply

    def dispatched(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*inputs):
            return apply(*inputs)
        with _C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    return dispatched


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
