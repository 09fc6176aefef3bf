"""The sizes in a Hugging Face ``config.json``, where our model can be that one. Imports no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.model.sizes import Llama

#: The file's name for each size that it must hold.
_REQUIRED = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}

#: What upstream's Llama has no part for, and the value at which it needs none; absent, it has this value.
_WITHOUT: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0,
    "sliding_window": None,
    "quantization_config": None,
}


def read_hf_config(path: Path) -> Llama:
    """All sizes of the Llama that ``path`` describes, a config.json or the folder that holds one.

    The names are those of transformers 5 and of the versions before. The longest context that the file names is not
    read: a run's is training.seq_len.

    Raises:
        Refused: if it cannot be read, or naming all that our model is not.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"model.hf_config={str(path)!r}: cannot be read ({error})") from error
    where = f"model.hf_config={str(path)!r}"
    if not isinstance(config, dict):
        raise Refused(f"{where}: holds no settings of a model")
    kind, made_for = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or "LlamaForCausalLM" not in made_for:
        raise Refused(
            f"{where}: model_type is {kind!r} and architectures {made_for!r}; must be 'llama' and 'LlamaForCausalLM'"
        )
    if missing := [name for name in _REQUIRED.values() if config.get(name) is None]:
        raise Refused(f"{where}: {', '.join(missing)} must be there")
    rope = rope_parameters(config)
    if lacking := list(_what_we_lack(config, rope)):
        raise Refused(f"{where}: this trainer's Llama cannot have {'; '.join(lacking)}")
    scaled = rope["rope_type"] == "llama3"
    given = {size: config[name] for size, name in _REQUIRED.items()}
    sizes = Llama(
        **given,
        # What transformers takes for what is absent.
        n_kv_heads=config.get("num_key_value_heads") or given["n_heads"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_factor=rope["factor"] if scaled else 1.0,
        rope_low_freq_factor=rope["low_freq_factor"] if scaled else 1.0,
        rope_high_freq_factor=rope["high_freq_factor"] if scaled else 4.0,
        rope_original_max_position_embeddings=rope["original_max_position_embeddings"] if scaled else 8192,
    )
    try:
        sizes.check()
    except Refused as refusal:
        raise Refused(f"{where}: {refusal}") from refusal
    return sizes


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings in one dictionary, as transformers 5 writes them; before, they were two entries."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _what_we_lack(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[str]:
    for name, without in _WITHOUT.items():
        # 0.0 and False are the same "none"; None is too, where the file says null.
        if (value := config.get(name, without)) != without and value is not None:
            yield f"{name}={value!r} (must be {without!r})"
    columns = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, columns):
        yield f"head_dim={config['head_dim']} (must be hidden_size / num_attention_heads, {columns})"
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope_type={rope['rope_type']!r} (must be 'default' or 'llama3')"
    elif rope["rope_type"] == "llama3":
        needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if absent := [name for name in needed if rope.get(name) is None]:
            yield f"rope_type='llama3' without {', '.join(absent)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']} (must be 1)"
