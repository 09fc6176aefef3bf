"""FlashAttention 3 and 4, packages of their own, as operators: ``lighthouse::flash3`` and ``lighthouse::flash4``.

Torch can put them in the place of its own Flash attention (``torch.nn.attention.activate_flash_attention_impl``), in
the whole process, that of local windows included. And torch 2.11 unpacks two results of FlashAttention 4's forward,
which returns more in later versions. Operators of ours compile, stand beside torch's, and can be kept by checkpointing.

Each takes query [B, H, N, D] and key and value [B, G, N, D] in bfloat16 or float16, attends causally with scale 1/√D,
and returns the rows [B, H, N, D], stored as [B, N, H, D], and their log-sum-exps [B, H, N], float32. It is
differentiable once, in the three.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lighthouse.registration import operator

#: The module of each, and how it gets there.
PACKAGES = {
    "flash3": ("flash_attn_interface", "built from the folder hopper of github.com/Dao-AILab/flash-attention"),
    "flash4": ("flash_attn.cute.interface", 'pip install "flash-attn-4>=4.0.0b30"'),
}


@functools.cache
def load(name: str) -> Any:
    """The functions of a package: of FlashAttention 3 its operators, of FlashAttention 4 its module.

    Raises:
        ImportError: where it is not installed, or cannot be imported.
    """
    module_name, how = PACKAGES[name]
    try:
        functions = importlib.import_module(module_name)
        if name == "flash3":
            functions = torch.ops.flash_attn_3
        needed = ("fwd", "bwd") if name == "flash3" else ("_flash_attn_fwd", "_flash_attn_bwd")
        missing = [function for function in needed if not hasattr(functions, function)]
        if missing:
            raise ImportError(f"it has no {' and no '.join(missing)}")
    except Exception as error:  # It compiles and loads libraries when it is imported: of many kinds.
        raise ImportError(f"{module_name} ({how}) cannot be imported: {type(error).__name__}: {error}") from error
    return functions


def _flash3(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # One split: otherwise it chooses a number, and adds up in an order that depends on it.
    out, sums, *_ = load("flash3").fwd(
        *_by_position(query, key, value), softmax_scale=query.shape[-1] ** -0.5, is_causal=True, num_splits=1
    )
    return out.transpose(1, 2), sums


def _flash3_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _by_position(grad, query, key, value, out)
    grads = [_empty(x) for x in (query, key, value)]
    load("flash3").bwd(
        *rows,
        sums,
        *(x.transpose(1, 2) for x in grads),
        softmax_scale=query.shape[-1] ** -0.5,
        is_causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads[0], grads[1], grads[2]


def _flash4(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # Two results, or from 4.0.0b18 on more.
    out, sums, *_ = load("flash4")._flash_attn_fwd(*_by_position(query, key, value), causal=True, return_lse=True)
    return out.transpose(1, 2), sums


def _flash4_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, *rows = _by_position(grad, query, key, value, out)
    grads = [_empty(x) for x in (query, key, value)]
    load("flash4")._flash_attn_bwd(
        *rows,
        grad,
        sums,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **{name: x.transpose(1, 2) for name, x in zip(("dq", "dk", "dv"), grads, strict=True)},
    )
    return grads[0], grads[1], grads[2]


def _by_position(*rows: Tensor) -> list[Tensor]:
    """[B, H, N, D] as [B, N, H, D], a view of rows that are whole."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in rows]


def _empty(like: Tensor) -> Tensor:
    batch, heads, length, columns = like.shape
    return like.new_empty(batch, length, heads, columns).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


def _differentiable(run: Callable[..., Any], backward: torch._ops.OpOverload) -> torch._ops.OpOverload:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = backward(grad, *ctx.saved_tensors)
        return grads

    return operator(run, _fake, setup_context=setup_context, backward=differentiate)


#: By name. What activation checkpointing should keep of them is what it keeps of torch's attention: their results.
OPERATORS = {
    "flash3": _differentiable(_flash3, operator(_flash3_backward, _fake_backward)),
    "flash4": _differentiable(_flash4, operator(_flash4_backward, _fake_backward)),
}
