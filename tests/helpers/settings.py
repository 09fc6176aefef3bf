"""Settings and model arguments as the trainer sees them."""

import copy
from pathlib import Path

import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the model
from torchtitan.config import ConfigManager
from torchtitan.protocols.train_spec import get_train_spec

REPOSITORY = Path(__file__).resolve().parents[2]


def parse(config: str, *overrides: str):
    """The merged settings of a file in train_configs."""
    return ConfigManager().parse_args(["--job.config_file", str(REPOSITORY / "train_configs" / config), *overrides])


def model_args(job_config):
    args = copy.deepcopy(get_train_spec(job_config.model.name).model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    return args
