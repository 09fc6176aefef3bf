"""How functions on tensors become operators ``lighthouse::NAME``, which compile and can be kept by checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import _C, Tensor
from torch.autograd.function import once_differentiable

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
