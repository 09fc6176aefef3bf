"""Lighthouse Attention as ``attn_implementation="lighthouse"`` in Hugging Face transformers (``pip install .[hf]``).

Stage 1 trains through it, from scratch or from a checkpoint; Stage 2 is the same model with dense attention:

    >>> import torch
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from lighthouse import LighthouseConfig
    >>> from lighthouse.integrations.transformers import register
    >>> register(LighthouseConfig(num_levels=2, pooling_factor=2, top_k=128))
    >>> body = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                    num_attention_heads=4, num_key_value_heads=2)
    >>> model = AutoModelForCausalLM.from_config(body, attn_implementation="lighthouse")
    >>> tokens = torch.randint(64, (1, 256))
    >>> model(tokens, labels=tokens).loss.backward()
    >>> model.set_attn_implementation("sdpa")  # Stage 2

It replaces causal self-attention over whole sequences and nothing else: a padded batch, packed documents, a step of
decoding, a sliding window and the like are refused, never approximated. To compile, compile the layers (``for layer in
model.model.layers: layer.compile()``). Inside a compiled model transformers cannot tell packed documents from one
sequence, and the mask that it then asks for is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from lighthouse.attention import lighthouse_attention
from lighthouse.config import LighthouseConfig

#: What models hand to their attention when it is not plain causal attention, and how a message calls it.
UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "position_bias": "a bias on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "another selection",
    "block_indices": "another selection",
    "cu_seq_lens_q": "packed documents",
    "cu_seq_lens_k": "packed documents",
    "cache": "a paged cache",
}


def register(config: LighthouseConfig | None = None, name: str = "lighthouse") -> None:
    """Make ``attn_implementation=name`` mean Lighthouse Attention with ``config``, in every model of this process.

    Models look the name up at every call: registering it again gives another geometry to every model that uses it, and
    a model that needs its own takes a name of its own. Nothing of this is saved with a model.

    Args:
        config: default: ``LighthouseConfig()``. Whether it suits a sequence is checked when one arrives.

    Raises:
        ValueError: if ``name`` already belongs to another attention.
    """
    attention = AttentionInterface()
    taken = sorted({"eager", *(key for key in attention if not _is_ours(attention[key]))})
    if name in taken:
        raise ValueError(f"name={name!r}: belongs to another attention; any name but {', '.join(taken)} is free")
    AttentionInterface.register(name, partial(attention_forward, config or LighthouseConfig()))
    # A name without a mask function gets no mask at all: padding would be ignored without a word.
    AttentionMaskInterface.register(name, no_mask)


def attention_forward(
    geometry: LighthouseConfig,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``lighthouse_attention`` as transformers calls an attention.

    Args:
        query: [B, H, N, D].
        key, value: [B, G, N, D], not repeated.
        attention_mask: None, which is what ``no_mask`` makes of a batch without padding.
        scaling, dropout, is_causal, kwargs: what the model wants of its attention; refused unless it is plain causal
            attention with scale 1/√D.

    Returns:
        [B, N, H, D], contiguous, and None for the weights, which are never formed.

    Raises:
        ValueError: for anything but that, naming it, and as ``lighthouse_attention``.
    """
    seq_len, head_dim = query.shape[2:]
    if key.shape[2] != seq_len:
        _refuse(
            f"{seq_len} query positions for {key.shape[2]} key positions",
            "must be the same: no decoding, no cached positions",
        )
    if attention_mask is not None:
        _refuse(f"attention_mask is {_short(attention_mask)}", "no mask but an all-ones [batch, seq_len] one is taken")
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            _refuse(f"{name}={_short(kwargs[name])}", f"{what} is not supported")
    if dropout:
        _refuse(f"dropout={dropout}", "must be 0 (in the model's config: attention_dropout)")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        _refuse("is_causal=False", "attention must be causal")
    if scaling is not None and not math.isclose(scaling, head_dim**-0.5, rel_tol=1e-6):
        _refuse(f"scaling={scaling}", f"must be 1/√head_dim = {head_dim**-0.5:.6g}")
    if torch.is_autocast_enabled(query.device.type):
        # As autocast does for SDPA. Rotary embedding leaves query and key in float32, and value as it came.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    output = lighthouse_attention(query, key, value, geometry)
    return output.transpose(1, 2).contiguous(), None


def no_mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None, **kwargs: Any) -> None:
    """The mask of a forward pass, made once for all its layers: none, or an error if one would be needed.

    Transformers recognises packed documents by their ``position_ids``, and only where there is neither a mask nor a
    cache; elsewhere they attend to each other, under ``sdpa`` as here (``use_cache=False`` turns the cache off).

    Args:
        mask_function: who sees whom, padding aside.
        attention_mask: [batch, seq_len], 0 where there is padding.
        kwargs: sizes, and whatever else describes a mask.

    Raises:
        ValueError: for any pattern but the causal one, or padding.
    """
    if mask_function is not causal_mask_function:
        _refuse(
            f"mask_function={getattr(mask_function, '__qualname__', mask_function)}",
            "must be causal_mask_function: no packed documents, window, chunks or bidirectional part, and no "
            "compilation of the whole model (compile its layers)",
        )
    if attention_mask is not None and not attention_mask.all():
        _refuse(
            f"attention_mask hides {attention_mask.numel() - int(attention_mask.count_nonzero())} of "
            f"{attention_mask.numel()} positions",
            "a batch must hold no padding",
        )


def _refuse(value: str, rule: str) -> NoReturn:
    raise ValueError(f'{value}: {rule}; use attn_implementation="sdpa" instead')


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _is_ours(function: Callable[..., Any]) -> bool:
    return isinstance(function, partial) and function.func is attention_forward
