"""Llama 3 arguments plus the layers that run Lighthouse."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.job_config import parse_layers
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.tools.utils import device_type

from lighthouse import LighthouseConfig


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

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take the sequence length and the [lighthouse] section, refusing what cannot run before anything is built.

        Raises:
            ValueError: for a missing section, an invalid geometry, a layer outside the model, a backend that is not
                available, a sequence that context parallelism cannot split, or tensor parallelism that splits a head.
        """
        super().update_from_config(job_config, **kwargs)
        section = getattr(job_config, "lighthouse", None)
        if section is None:
            raise ValueError(
                "the configuration has no [lighthouse] section: set custom_config_module = "
                '"torchtitan.experiments.lighthouse.job_config" under [job]'
            )
        self.lighthouse, self.lighthouse_layers, self.dense_every = None, (), 0
        num_chunks = context_parallel_chunks(job_config)
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
        kv_heads = self.n_kv_heads or self.n_heads
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
        self.lighthouse_layers = parse_layers(section.layers, self.n_layers)
        self.lighthouse, self.lighthouse_rope, self.dense_every = config, section.rope, section.dense_every

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
