"""Settings of a run as ``plan`` drafts them: a dictionary of sections, and the TOML file that the trainer takes."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.experiments.lighthouse.data.tokenizer import tokenizer_files
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.model.sizes import CUSTOM, FLAVORS, Llama
from torchtitan.experiments.lighthouse.planning.workload import count_parameters, valid_budgets
from torchtitan.experiments.lighthouse.runs import next_stage
from torchtitan.experiments.lighthouse.runs.settings import complete

from lighthouse.config import PARENTS_PER_TILE

#: What a drafted run has beside what is planned. The learning rate is a guess: nothing here predicts it.
BASE: dict[str, dict[str, Any]] = {
    "job": {
        "description": "A planned run, Stage 1",
        "custom_config_module": "torchtitan.experiments.lighthouse.job_config",
    },
    "experimental": {"custom_import": "torchtitan.experiments.lighthouse.train_spec"},
    "model": {"name": "lighthouse"},
    "lighthouse": {"enable": True, "num_levels": 3, "pooling_factor": 4},
    "training": {
        "dataset": "c4",
        "seq_len": 98304,
        "local_batch_size": 1,
        "global_batch_size": -1,
        "max_norm": 1.0,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
        "dataloader": {"num_workers": 1},
    },
    "optimizer": {"name": "AdamW", "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "lr_scheduler": {"decay_ratio": 0.0},
    "metrics": {"log_freq": 10, "enable_tensorboard": True},
    "checkpoint": {"enable": True, "async_mode": "disabled", "last_save_model_only": False, "keep_latest_k": 0},
    "activation_checkpoint": {"mode": "none", "selective_ac_option": "op"},
    "compile": {"enable": True},
    "parallelism": {"context_parallel_degree": 1},
    "comm": {"init_timeout_seconds": 1800, "train_timeout_seconds": 600},
    "debug": {"seed": 0},
}

#: S of N in the paper's main runs: L = 3, p = 4, top_k = N/64.
PUBLISHED_SHARE = 3 / 16

#: Of all steps, those in which the learning rate rises: 2,000 of the paper's 16,000.
WARM_UP = 1 / 8


def start(model: str) -> dict[str, dict[str, Any]]:
    """The sections that a draft begins with.

    Args:
        model: a flavor, a Llama's Hugging Face config.json (or the folder that holds one), or a TOML file of settings.

    Raises:
        Refused: for a name that is none of these, or a file that cannot be read.
    """
    sections = copy.deepcopy(BASE)
    path = Path(model)
    if model in FLAVORS:
        sections["model"]["flavor"] = model
    elif path.suffix == ".toml":
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refused(f"--model {model}: cannot be read ({error})") from error
        for section, values in given.items():
            sections.setdefault(section, {}).update(values)
    elif path.exists():
        sections["model"] |= {"flavor": CUSTOM, "hf_config": model}
        folder = path if path.is_dir() else path.parent
        if tokenizer_files(folder):
            sections["model"]["hf_assets_path"] = str(folder)
    else:
        raise Refused(
            f"--model {model}: must be a flavor ({', '.join(FLAVORS)}), a Llama's config.json, or a .toml file with a "
            "[llama] section"
        )
    return sections


def layers_through_lighthouse(n_layers: int) -> str:
    """All but the first and last two, as in the paper; but one in a small model."""
    ends = 2 if n_layers >= 12 else 1
    return f"{ends}-{n_layers - 1 - ends}" if n_layers > 2 * ends else "0--1"


def published_budget(settings: MergedConfig) -> int:
    """The valid top_k that selects the share nearest to the paper's; where none is valid, about N/p^L, as there."""
    geometry, seq_len = settings.lighthouse.attention_config(), settings.training.seq_len
    valid = min(
        valid_budgets(geometry, seq_len),
        key=lambda one: abs(one.selected_length(seq_len) / seq_len - PUBLISHED_SHARE),
        default=None,
    )
    if valid is not None:
        return valid.top_k
    return max(1, seq_len // geometry.pooling_factor**geometry.num_levels // PARENTS_PER_TILE) * PARENTS_PER_TILE


def parameters(sizes: Llama) -> int:
    """Of the model; the sizes are complete."""
    known: dict[str, Any] = asdict(sizes)
    kv_dim = known["dim"] // known["n_heads"] * known["n_kv_heads"]
    return count_parameters(known["dim"], kv_dim, known["ffn_dim"], known["vocab_size"], known["n_layers"])


def merge(sections: dict[str, dict[str, Any]], overrides: Sequence[str] = ()) -> MergedConfig:
    """The settings as the trainer sees and checks them, with every size of the model.

    Raises:
        Refused: as ``check_settings`` and ``complete``.
    """
    return complete(next_stage.merge(next_stage.as_toml(sections), list(overrides)))


def write(
    sections: dict[str, dict[str, Any]], overrides: Sequence[str], comment: Sequence[str], file: Path
) -> MergedConfig:
    """Write the settings of a draft, with what the overrides make of them, under a comment; those settings.

    Raises:
        Refused: as ``merge``, or for a file that cannot be written.
    """
    plain, settings = merge(sections), merge(sections, overrides)
    merged = asdict(settings)
    written = {name: _as_in(values, merged[name]) for name, values in sections.items()}
    for setting, _, value in next_stage.differences(asdict(plain), merged):
        section, name = setting.split(".")
        written.setdefault(section, {})[name] = value
    if settings.model.flavor == CUSTOM:
        written["llama"] = merged["llama"]  # the file of the sizes need not be there any more
        written["model"].pop("hf_config", None)
    lines = "".join(f"# {line}".rstrip() + "\n" for line in comment)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{lines}\n{next_stage.as_toml(written)}", encoding="utf-8")
    except OSError as error:
        raise Refused(f"--toml {file}: cannot be written ({error})") from error
    return settings


def _as_in(asked: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _as_in(value, merged[name]) if isinstance(value, dict) else merged[name] for name, value in asked.items()
    }
