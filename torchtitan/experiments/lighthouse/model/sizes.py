"""The sizes of a Llama: the ``[llama]`` section, the flavors as the same data, and the rules. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from torchtitan.experiments.lighthouse.errors import Refused

#: The flavor that has no sizes of its own.
CUSTOM = "custom"

#: A vocabulary as large as its tokenizer is rounded up to this many rows: for the matrix units, and so that tensor
#: parallelism can split it.
VOCAB_MULTIPLE = 128

#: Of the default width of the feed-forward network, 8/3 of ``dim``.
FFN_MULTIPLE = 256


@dataclass
class Llama:
    """The sizes and the rotary embedding of the model. What is not given is as in ``model.flavor`` or in
    ``model.hf_config``; the run's config.json holds all of them."""

    dim: int | None = None
    """Width of the model"""

    n_layers: int | None = None
    """Layers"""

    n_heads: int | None = None
    """Heads of the queries; each has dim / n_heads columns, an even number"""

    n_kv_heads: int | None = None
    """Heads of the keys and values; must divide n_heads. In flavor "custom", n_heads where it is not given"""

    ffn_dim: int | None = None
    """
    Width of the feed-forward network. In flavor "custom", 8/3 of dim where it is not given, rounded up to a multiple of
    256
    """

    vocab_size: int | Literal["tokenizer"] | None = None
    """
    Rows of the embedding and of the output; "tokenizer", and flavor "custom" where it is not given: as many as the
    tokenizer has tokens, rounded up to a multiple of 128
    """

    norm_eps: float | None = None
    """Epsilon of the norms; in flavor "custom", 1e-5 where it is not given"""

    rope_theta: float | None = None
    """Base of the rotary embedding; in flavor "custom", 10000 where it is not given"""

    rope_factor: float | None = None
    """
    By how much Llama 3's scaling stretches the slow rotations, 1 for no scaling; in flavor "custom", 8 where it is not
    given
    """

    rope_low_freq_factor: float | None = None
    """
    Rotations that turn fewer times than this in rope_original_max_position_embeddings are stretched by the whole
    factor; in flavor "custom", 1 where it is not given
    """

    rope_high_freq_factor: float | None = None
    """Those that turn more often than this are not stretched; in flavor "custom", 4 where it is not given"""

    rope_original_max_position_embeddings: int | None = None
    """The context that the scaling starts from; in flavor "custom", 8192 where it is not given"""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to a flavor, a file or a tokenizer."""
        return self.vocab_size != "tokenizer" and not self.missing

    @property
    def missing(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is None]

    def over(self, base: Llama) -> Llama:
        """These sizes, and those of ``base`` where these do not say."""
        return replace(base, **{name: value for name, value in vars(self).items() if value is not None})

    def completed(self, tokens: Callable[[], int]) -> Llama:
        """All sizes, those that are not given by their defaults.

        Args:
            tokens: says how many the tokenizer has, where that is asked for.

        Raises:
            Refused: for sizes that have no default, and as ``check``.
        """
        required = [f"llama.{name}" for name in ("dim", "n_layers", "n_heads") if getattr(self, name) is None]
        if required:
            raise Refused(
                f"model.flavor={CUSTOM!r}: {', '.join(required)} must be given in [llama], or model.hf_config must "
                f"name a Llama's config.json; or choose one of the flavors: {', '.join(map(repr, FLAVORS))}"
            )
        dim = cast(int, self.dim)
        own = Llama(n_kv_heads=self.n_heads, ffn_dim=-(-8 * dim // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE)
        sizes = self.over(own.over(_DEFAULTS))
        if sizes.vocab_size in (None, "tokenizer"):
            sizes.vocab_size = rows_for(tokens())
        sizes.check()
        return sizes

    def check(self) -> None:
        """Whether a model can be made of them.

        Raises:
            Refused: naming the size, its value, the rule and the nearest valid value.
        """
        counts = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
        for name in (*counts, "rope_original_max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise Refused(f"llama.{name}={value!r}: must be a whole number")
            if value < 1:
                raise Refused(f"llama.{name}={value}: must be at least 1; nearest valid value: 1")
        # None of them is None or a word any more.
        dim, heads, kv_heads = (cast(int, size) for size in (self.dim, self.n_heads, self.n_kv_heads))
        if dim % (2 * heads):
            # Columns are rotated in pairs.
            nearest = max(1, round(dim / (2 * heads))) * 2 * heads
            raise Refused(
                f"llama.dim={dim}: must be a multiple of {2 * heads}, an even number of columns for each of "
                f"n_heads={heads} heads; nearest valid value: {nearest}"
            )
        if heads % kv_heads:
            nearest = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - kv_heads))
            raise Refused(f"llama.n_kv_heads={kv_heads}: must divide n_heads={heads}; nearest valid value: {nearest}")
        rules: dict[str, Any] = {"norm_eps": 0, "rope_theta": 1, "rope_low_freq_factor": 0}
        rules["rope_high_freq_factor"] = self.rope_low_freq_factor
        for name, least in rules.items():
            value = _number(name, getattr(self, name))
            if not value > least:
                usual = 4 * least if name == "rope_high_freq_factor" else getattr(_DEFAULTS, name)
                raise Refused(f"llama.{name}={value}: must be more than {least}; nearest usual value: {usual}")
        if not _number("rope_factor", self.rope_factor) >= 1:
            raise Refused(f"llama.rope_factor={self.rope_factor}: must be at least 1; nearest valid value: 1")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(f"llama.{name}={value!r}: must be a number")
    return value


_DEFAULTS = Llama(
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_factor=8.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_max_position_embeddings=8192,
)

#: The byte tokenizer's 258 tokens, rounded up for the matrix units and for tensor parallelism.
_BYTES = 320

_530M = Llama(dim=1024, n_layers=30, n_heads=8, n_kv_heads=8, ffn_dim=1536).over(_DEFAULTS)
_32M = Llama(dim=512, n_layers=10, n_heads=4, n_kv_heads=4, ffn_dim=1408).over(_DEFAULTS)
_DEBUG = Llama(dim=128, n_layers=6, n_heads=4, n_kv_heads=4, ffn_dim=384).over(_DEFAULTS)

#: The named sizes.
FLAVORS = {
    "530m": replace(_530M, vocab_size=128256),
    "268m": replace(_530M, vocab_size=_BYTES),
    "32m": replace(_32M, vocab_size=_BYTES),
    "debug": replace(_DEBUG, vocab_size=_BYTES),
    "debug_gqa": replace(_DEBUG, vocab_size=_BYTES, n_kv_heads=2),
}


def rows_for(tokens: int) -> int:
    """Rows of a vocabulary for so many tokens."""
    return -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
