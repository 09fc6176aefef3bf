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
decoding, a sliding window and the like are refused, never approximated. docs/hugging_face.md has the models that were
tried. To compile, compile the layers (``for layer in model.model.layers: layer.compile()``) and set
``use_cache=False``: inside a compiled layer nobody can look at ``position_ids`` for packed documents, and transformers
looks at them only where there is no cache.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lighthouse.attention import lighthouse_attention
from lighthouse.config import LighthouseConfig
from lighthouse.inner_attention import AttentionName, check_package, resolve
from lighthouse.integrations import query_key_norm
from lighthouse.integrations.masks import why_not_causal
from lighthouse.layers import default_layers, parse_layers

logger = logging.getLogger(__name__)

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


def register(
    config: LighthouseConfig | None = None,
    name: str = "lighthouse",
    *,
    layers: str | None = None,
    attention: AttentionName = "auto",
) -> None:
    """Make ``attn_implementation=name`` mean Lighthouse Attention with ``config``, in every model of this process.

    Models look the name up at every call: registering it again gives another geometry to every model that uses it, and
    a model that needs its own takes a name of its own. Nothing of this is saved with a model.

    Args:
        config: default: ``LighthouseConfig()``. Whether it suits a sequence is checked when one arrives.
        layers: those that run Lighthouse, as in ``[lighthouse] layers`` of our trainer: ``"2--3"``. The others run
            dense attention. Default: all but the first two and the last two, or all of a model with four layers or
            fewer; a model that goes by the default says so once. Whether a model has them is checked when it runs.
        attention: the kernels of dense layers and of Lighthouse's inner attention, as in ``lighthouse_attention``.

    Raises:
        ValueError: if ``name`` already belongs to another attention, ``layers`` names none, or ``attention`` names no
            kernels, or kernels that are not installed or do not go with ``combine="softmax"``.
    """
    known = AttentionInterface()
    taken = sorted({"eager", *(key for key in known if not isinstance(known[key], Implementation))})
    if name in taken:
        raise ValueError(f"name={name!r}: belongs to another attention; any name but {', '.join(taken)} is free")
    implementation = Implementation(config or LighthouseConfig(), layers, attention)
    AttentionInterface.register(name, implementation)
    # A name without a mask function gets no mask at all: padding would be ignored without a word.
    AttentionMaskInterface.register(name, implementation.mask)


class Implementation:
    """What ``register`` makes of a geometry and its layers: an attention and a mask, as transformers calls them."""

    def __init__(self, config: LighthouseConfig, layers: str | None = None, attention: AttentionName = "auto") -> None:
        if layers is not None and not isinstance(layers, str):
            raise ValueError(f"layers={layers!r}: must be a text such as '2-27' or '2--3'")
        check_package(attention)
        self.config, self.layers, self.attention = config, layers, resolve(attention, config)
        self._chosen: dict[int, frozenset[int]] = {}
        self._known: list[weakref.ref[Any]] = []
        self._positions: weakref.ref[Tensor] | None = None

    def __call__(
        self,
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
        """``lighthouse_attention``, or in a dense layer its inner attention alone.

        Args:
            module: the attention layer, which knows its ``layer_idx`` and the model's ``config``.
            query: [B, H, N, D].
            key, value: [B, G, N, D], not repeated.
            attention_mask: None, which is what ``mask`` makes of a batch without padding.
            scaling, dropout, is_causal, kwargs: what the model wants of its attention; refused unless it is plain
                causal attention with scale 1/√D.

        Returns:
            [B, N, H, D], contiguous, and None for the weights, which are never formed.

        Raises:
            ValueError: for anything but that, naming it, and as ``lighthouse_attention``.
        """
        seq_len, head_dim = query.shape[2:]
        if key.shape[2] != seq_len:
            queries = "1 query position" if seq_len == 1 else f"{seq_len} query positions"
            _refuse(
                f"{queries} for {key.shape[2]} key positions",
                "no decoding and no cached positions",
                instead='for generate, switch to sdpa first: model.set_attn_implementation("sdpa")',
            )
        if attention_mask is not None:
            _refuse(f"attention_mask is {_short(attention_mask)}", "no mask but an all-ones [batch, seq_len] is taken")
        for name, what in UNSUPPORTED.items():
            if kwargs.get(name) is not None:
                where = " in the model's config" if name == "sliding_window" else ""
                _refuse(f"{name}={_short(kwargs[name])}{where}", f"{what} is not supported")
        if dropout:
            _refuse(f"dropout={dropout}", "must be 0 (in the model's config: attention_dropout)")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            _refuse("is_causal=False", "attention must be causal")
        if scaling is not None and not math.isclose(scaling, head_dim**-0.5, rel_tol=1e-6):
            _refuse(f"scaling={scaling}", f"must be 1/√head_dim = {head_dim**-0.5:.6g}")
        if value.shape != key.shape:
            _refuse(
                f"value heads of {value.shape[-1]} columns beside key heads of {key.shape[-1]}", "must be equally wide"
            )
        self._refuse_packed(kwargs.get("position_ids"))

        through_lighthouse = self._is_chosen(module)
        score_by = query_key_norm.rows_before(module, query, key) if self.scores_before_norm(module) else None
        if torch.is_autocast_enabled(query.device.type):
            # As autocast does for SDPA. Rotary embedding leaves query and key in float32, and value as it came.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        if through_lighthouse:
            output = lighthouse_attention(query, key, value, self.config, attention=self.attention, score_by=score_by)
        else:
            output = self.attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
        return output.transpose(1, 2).contiguous(), None

    def mask(
        self, *, mask_function: Callable[..., Any], attention_mask: Tensor | None, config: Any = None, **kwargs: Any
    ) -> None:
        """The mask of a forward pass, made once for all its layers: none, or an error if one would be needed.

        It runs before the layers and is never compiled, so it is also where a model is looked at for the first time.

        Args:
            mask_function: who sees whom, padding aside.
            attention_mask: [batch, seq_len], 0 where there is padding.
            config: the model's.
            kwargs: sizes, and whatever else describes a mask.

        Raises:
            ValueError: for any pattern but the causal one, padding, or layers that the model does not have.
        """
        why = why_not_causal(mask_function, config)
        if why is not None:
            _refuse(*why)
        if attention_mask is not None and not attention_mask.all():
            _refuse(
                f"attention_mask hides {attention_mask.numel() - int(attention_mask.count_nonzero())} of "
                f"{attention_mask.numel()} positions",
                "a batch must hold no padding",
            )
        self._meet(config)

    def scores_before_norm(self, module: nn.Module) -> bool:
        """Whether this attention layer's choice is made by what its norms of query and key are given."""
        return self.config.scorer == "norm" and self.config.selection != "none" and self._is_chosen(module)

    def _meet(self, config: Any) -> None:
        """What is done once for each model: choose its layers, and score by what they have before a norm."""
        n_layers = getattr(config, "num_hidden_layers", None)
        if n_layers is None or any(known() is config for known in self._known):
            return
        chosen = self._layers_of(n_layers)
        self._known = [known for known in self._known if known() is not None] + [weakref.ref(config)]
        if self.layers is None:
            which = f"layers {default_layers(n_layers)}" if len(chosen) < n_layers else "all layers"
            logger.warning(
                "Lighthouse Attention runs in %s of %d, the default; register(config, layers=…) chooses others",
                which,
                n_layers,
            )
        query_key_norm.keep_rows(config)

    def _layers_of(self, n_layers: int) -> frozenset[int]:
        if n_layers not in self._chosen:
            layers = default_layers(n_layers) if self.layers is None else self.layers
            self._chosen[n_layers] = frozenset(parse_layers(layers, n_layers))
        return self._chosen[n_layers]

    def _is_chosen(self, module: nn.Module) -> bool:
        layer, n_layers = getattr(module, "layer_idx", None), getattr(module.config, "num_hidden_layers", None)
        if layer is None or n_layers is None:
            _refuse(f"{type(module).__name__} does not know which layer it is", "layers must be numbered (layer_idx)")
        return layer in self._layers_of(n_layers)

    def _refuse_packed(self, position_ids: Tensor | None) -> None:
        """Packed documents, which transformers does not look for where there is a mask or a cache.

        A value has to reach the host for it: once in a forward pass, for the first layer, and not in compiled ones.
        """
        if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
            return
        if self._positions is not None and self._positions() is position_ids:
            return
        starts = int((position_ids.diff(dim=-1) != 1).count_nonzero())
        if starts:
            _refuse(f"position_ids start anew {starts} times", "packed documents are not supported")
        self._positions = weakref.ref(position_ids)


def _refuse(value: str, rule: str, instead: str = 'use attn_implementation="sdpa" instead') -> NoReturn:
    raise ValueError(f"{value}: {rule}; {instead}")


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
