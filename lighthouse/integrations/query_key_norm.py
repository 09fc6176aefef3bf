"""Queries and keys from before a model normalises them, for the scorer ``norm`` (docs/method.md, section 10.5)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger(__name__)

#: What transformers' attention layers call the norms of their queries and keys.
NAMES = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
    ("q_layer_norm", "k_layer_norm"),
    ("qk_norm", "qk_norm"),
)


def norms_of(attention: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The modules that normalise queries and keys, if this attention layer has them."""
    for names in NAMES:
        query_norm, key_norm = (getattr(attention, name, None) for name in names)
        if isinstance(query_norm, nn.Module) and isinstance(key_norm, nn.Module):
            return query_norm, key_norm
    return None


def keep_rows(config: Any) -> None:
    """Let the norms of the model whose configuration this is keep what they are given, from their next call on.

    Whoever makes the mask is told the configuration and not the model. The attention layers hold it too, and are found
    by it among the objects of the process, a matter of a tenth of a second. Calling it again changes nothing.
    """
    # No other way was found that knows the layers before their norms first run. The attention function is given its
    # layer after them: the first step would choose by other rows, and under gradient checkpointing not as its own
    # recomputation. torch's hooks on every module's call slow down all modules, and become part of compiled layers.
    # Those on a module's registration miss models that are older than ``register``.
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        norms = norms_of(module) if module.__dict__.get("config") is config else None
        for norm in norms or ():
            if not any(getattr(hook, "func", None) is _keep for hook in norm._forward_pre_hooks.values()):
                norm.register_forward_pre_hook(partial(_keep, module))


def rows_before(attention: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the layer's norms were given for ``query`` [B, H, N, D] and ``key`` [B, G, N, D], in these shapes.

    None for a layer without such norms. None too where they kept nothing that fits, with a warning, once.
    """
    norms = norms_of(attention)
    if norms is None:
        return None
    rows = [_as_heads(_taken_from(norm), like) for norm, like in zip(norms, (query, key), strict=True)]
    if rows[0] is None or rows[1] is None:
        if not torch.compiler.is_compiling():
            _warn_once(type(attention).__name__)
        return None
    return rows[0], rows[1]


def _keep(attention: nn.Module, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Only where Lighthouse will ask for it: elsewhere it would hold memory for nothing."""
    config: Any = attention.config
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, _keep
    )  # the default is for eager
    wants: Callable[[nn.Module], bool] | None = getattr(implementation, "scores_before_norm", None)
    if wants is not None and wants(attention):
        norm.rows_before = inputs[0].detach()


def _taken_from(norm: nn.Module) -> Tensor | None:
    """The rows, which the norm no longer holds then. By what torch 2.11 compiles too: it knows no ``__dict__.pop``."""
    rows: Tensor | None = getattr(norm, "rows_before", None)
    if rows is not None:
        del norm.rows_before
    return rows


def _as_heads(rows: Tensor | None, like: Tensor) -> Tensor | None:
    """Rows as norms get them, [B, N, H, D], [B, N, H·D] or [B, H, N, D], as [B, H, N, D]."""
    batch, heads, seq_len, head_dim = like.shape
    if rows is None or rows.numel() != like.numel():
        return None
    if rows.shape == like.shape:
        return rows
    if rows.shape[:2] != (batch, seq_len):
        return None
    return rows.reshape(batch, seq_len, heads, head_dim).transpose(1, 2)


_warned: set[str] = set()


def _warn_once(layer: str) -> None:
    if layer not in _warned:
        _warned.add(layer)
        logger.warning(
            "%s normalises query and key where Lighthouse Attention cannot look before: all rows are nearly as long as "
            "each other, and scorer='norm' chooses almost at random; take scorer='dilated' or 'gla'",
            layer,
        )
