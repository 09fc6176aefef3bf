"""Llama 3 arguments from the [llama] section, plus the layers that run Lighthouse."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import Lighthouse
from torchtitan.experiments.lighthouse.model.hf_config import read_hf_config
from torchtitan.experiments.lighthouse.model.sizes import CUSTOM, Llama
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.model import FeedForward
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.tools.utils import device_type

from lighthouse import LighthouseConfig
from lighthouse.flash_packages import PACKAGES
from lighthouse.inner_attention import AttentionName, check_settings
from lighthouse.layers import parse_layers


def context_parallel_chunks(job_config: JobConfig) -> int:
    """Into how many chunks context parallelism cuts the sequence; 1 without it.

    Raises:
        ValueError: for a load balancer that is not made for this attention, or that would hang.
    """
    parallelism = job_config.parallelism
    degree, balancer = parallelism.context_parallel_degree, parallelism.context_parallel_load_balancer
    if degree == 1:
        return 1
    if balancer not in ("headtail", None):
        raise ValueError(
            f"parallelism.context_parallel_load_balancer={balancer!r}: must be 'headtail' or None for this attention"
        )
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if balancer is None and compiled and job_config.activation_checkpoint.mode != "none":
        # Compiled recomputation repeats an exchange only on the ranks that need its result, and without balancing the
        # first rank needs none: the others wait for it for ever.
        raise ValueError(
            "parallelism.context_parallel_load_balancer=None: would hang with compile.enable=true and "
            f"activation_checkpoint.mode={job_config.activation_checkpoint.mode!r}; nearest valid value: 'headtail' "
            "(or activation_checkpoint.mode='none')"
        )
    return 2 * degree if balancer else degree


@dataclass
class LighthouseModelArgs(TransformerModelArgs):
    lighthouse: LighthouseConfig | None = None
    """Set from the [lighthouse] section where that is enabled; None is upstream's dense model"""

    lighthouse_layers: tuple[int, ...] = ()
    """The layers that run Lighthouse, ascending"""

    lighthouse_rope: str = "before_pool"
    """Where those layers apply the rotary embedding, as in the [lighthouse] section"""

    dense_every: int = 0
    """Every so many training steps, one is dense in all layers, if the trainer says so; 0: none"""

    inner_attention: AttentionName = "auto"
    """The kernels of attention, as in the [lighthouse] section; also where Lighthouse is off"""

    @property
    def sizes(self) -> Llama:
        """As the [llama] section has them."""
        scaling = self.rope_scaling_args
        with torch.device("meta"):  # Upstream's layer knows what comes of dim, multiplier and multiple.
            feed_forward = FeedForward(self.dim, 4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)
        return Llama(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            ffn_dim=feed_forward.w1.out_features,
            vocab_size=self.vocab_size,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_factor=scaling.scaling_factor,
            rope_low_freq_factor=scaling.low_freq_factor,
            rope_high_freq_factor=scaling.high_freq_factor,
            rope_original_max_position_embeddings=scaling.original_max_position_embeddings,
        )

    @sizes.setter
    def sizes(self, sizes: Llama) -> None:
        """All of them; none may be missing."""
        known: dict[str, Any] = asdict(sizes)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta"):
            setattr(self, name, known[name])
        self.rope_scaling_args = RoPEScalingArgs(
            scaling_factor=known["rope_factor"],
            low_freq_factor=known["rope_low_freq_factor"],
            high_freq_factor=known["rope_high_freq_factor"],
            original_max_position_embeddings=known["rope_original_max_position_embeddings"],
        )
        # Upstream takes a multiple of this at or above this share of 8/3 of dim: exactly one. (Half a column more, so
        # that rounding cannot make it a column less.)
        self.multiple_of = known["ffn_dim"]
        self.ffn_dim_multiplier = (known["ffn_dim"] + 0.5) / int(8 * self.dim / 3)

    @classmethod
    def of(cls, sizes: Llama) -> LighthouseModelArgs:
        args = cls()
        args.sizes = sizes
        return args

    def take_sizes(self, job_config: JobConfig) -> None:
        """Those of the [llama] section; where it does not say, of ``model.hf_config``, or else these.

        Raises:
            Refused: for sizes that no model can have, a file that cannot be read or is of another model, or a flavor
                beside that file.
        """
        section, model = getattr(job_config, "llama", None) or Llama(), job_config.model
        path = getattr(model, "hf_config", "")
        base = Llama()
        if not section.is_complete:
            if path and model.flavor != CUSTOM:
                raise Refused(
                    f"model.flavor={model.flavor!r} with model.hf_config={path!r}: both are a model; nearest valid "
                    f"value: model.flavor={CUSTOM!r}"
                )
            if path:
                base = read_hf_config(Path(path))
            elif model.flavor != CUSTOM:
                base = self.sizes

        def tokens() -> int:
            try:
                return build_tokenizer(job_config).get_vocab_size()
            except FileNotFoundError as error:
                raise Refused(f"model.hf_assets_path={model.hf_assets_path!r}: {error}") from error

        self.sizes = section.over(base).completed(tokens)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take the sizes, the sequence length and [lighthouse], refusing what cannot run before anything is built.

        Raises:
            ValueError: for sizes that no model can have, a missing section, an invalid geometry, a layer outside the
                model, a backend that is not available, kernels of attention that do not go
                with other settings, a sequence that context parallelism cannot split, or tensor parallelism that splits
                a head.
        """
        self.take_sizes(job_config)
        super().update_from_config(job_config, **kwargs)
        section = getattr(job_config, "lighthouse", None)
        if section is None:
            raise ValueError(
                "the configuration has no [lighthouse] section: set custom_config_module = "
                '"torchtitan.experiments.lighthouse.job_config" under [job]'
            )
        self.lighthouse, self.lighthouse_layers, self.dense_every = None, (), 0
        num_chunks = context_parallel_chunks(job_config)
        self._check_inner_attention(section, job_config)
        self.inner_attention = section.inner_attention
        seq_len, parallelism, validation = job_config.training.seq_len, job_config.parallelism, job_config.validation
        if validation.enable and validation.seq_len > seq_len:
            raise ValueError(
                f"validation.seq_len={validation.seq_len}: must be at most training.seq_len={seq_len}, because the "
                f"rotary embedding has so many positions; nearest valid value: {seq_len}"
            )
        if not section.enable:
            return

        if num_chunks > 1 and parallelism.tensor_parallel_degree > 1:
            raise ValueError(
                f"parallelism.tensor_parallel_degree={parallelism.tensor_parallel_degree} with "
                f"context_parallel_degree={parallelism.context_parallel_degree}: Lighthouse runs under one of the two; "
                "nearest valid value of either: 1"
            )
        kv_heads = cast(int, self.n_kv_heads)
        if kv_heads % parallelism.tensor_parallel_degree:
            valid = [d for d in range(1, kv_heads + 1) if kv_heads % d == 0]
            raise ValueError(
                f"parallelism.tensor_parallel_degree={parallelism.tensor_parallel_degree}: must divide the model's "
                f"{kv_heads} key/value heads; valid values: {', '.join(map(str, valid))}"
            )
        config = section.attention_config()
        config.resolve_backend(device_type)
        config.validate(seq_len, num_chunks)
        if section.rope == "after_gather" and config.scorer != "norm":
            raise ValueError(
                f"lighthouse.rope='after_gather' with scorer={config.scorer!r}: that scorer attends to rotated queries "
                "and keys; nearest valid values: rope='before_pool', or scorer='norm'"
            )
        if validation.enable and validation.seq_len != seq_len:
            try:
                config.validate(validation.seq_len, num_chunks)
            except ValueError as error:
                raise ValueError(f"validation.seq_len: {error}") from error
        self.lighthouse_layers = parse_layers(section.layers, self.n_layers, setting="lighthouse.layers")
        self.lighthouse, self.lighthouse_rope, self.dense_every = config, section.rope, section.dense_every

    def _check_inner_attention(self, section: Lighthouse, job_config: JobConfig) -> None:
        """By the settings alone: ``plan`` and ``resume_dense --dry-run`` may run on a machine that trains nothing."""
        setting, name = "lighthouse.inner_attention", section.inner_attention
        degree, debug = job_config.parallelism.context_parallel_degree, job_config.debug
        if name in PACKAGES and degree > 1:
            raise ValueError(
                f"{setting}={name!r} with parallelism.context_parallel_degree={degree}: the ring that "
                "attends to a split sequence runs torch's own kernels; nearest valid values: 'cudnn' or 'flash'"
            )
        if name != "auto" and section.enable and section.combine == "softmax":
            raise ValueError(
                f"{setting}={name!r} with combine='softmax': that brings an attention of its own, which returns "
                "log-sum-exps; nearest valid value: 'auto' (or combine='sum')"
            )
        if name == "cudnn" and debug.deterministic and not debug.deterministic_warn_only:
            raise ValueError(
                f"{setting}={name!r} with debug.deterministic=true: its backward is not deterministic; nearest valid "
                "value: 'flash'"
            )
        dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
        check_settings(name, dtype, self.dim // self.n_heads, setting)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and floating-point operations per token (forward and backward, matrix products only).

        Upstream's figure counts N keys per query in every layer. A Lighthouse layer runs its S queries on S keys:
        S²/N per token of the sequence. A local window adds its W keys per query, scorers that run an attention of
        their own its forward. With ``dense_every`` it is the mean over the steps.
        """
        head_dims = 2 * (self.dim // self.n_heads)
        nparams, flops = get_dense_model_nparams_and_flops(self, model, head_dims, seq_len)
        if self.lighthouse is not None:
            attention = self.n_heads * head_dims
            dense = 6 * attention * seq_len
            keys = self.lighthouse.selected_length(seq_len) ** 2 / seq_len + self.lighthouse.local_window
            # Two forward passes, two operations per product.
            scored = 2 * 2 * attention * self._scorer_keys(self.lighthouse, seq_len)
            share = 1 - 1 / self.dense_every if self.dense_every else 1  # of the steps
            flops += len(self.lighthouse_layers) * round(share * (6 * attention * keys + scored - dense))
        return nparams, flops

    def _scorer_keys(self, config: LighthouseConfig, seq_len: int) -> int:
        """Keys (or, for linear attention, state rows) that the scorer's attention reads per query."""
        match config.scorer:
            case "dilated":
                return seq_len // config.dilation
            case "gla":
                return self.dim // self.n_heads
            case _:
                return 0
