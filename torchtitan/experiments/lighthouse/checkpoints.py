"""Finding checkpoints on disk, and loading a run's model without its trainer."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import device_type


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None


def is_complete(checkpoint: Path) -> bool:
    """Whether the save came to its end: the table of contents is written last."""
    return (checkpoint / ".metadata").is_file()


def checkpoints_in(folder: Path) -> list[Path]:
    """The ``step-N`` folders in ``folder``, complete or not, by step."""
    return sorted(filter(is_checkpoint, folder.glob("step-*")), key=step_of)


def complete_checkpoints_in(folder: Path) -> list[Path]:
    return [path for path in checkpoints_in(folder) if is_complete(path)]


def dump_folder_of(checkpoint: Path) -> Path:
    """The run's folder; checkpoints lie in a folder of it."""
    return checkpoint.resolve().parent.parent


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: a ``step-N`` folder, or a run's dump folder, whose newest complete one it is.

    Raises:
        FileNotFoundError: saying what is there instead.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a run's dump folder or one of its checkpoint/step-N")
    if is_checkpoint(path):
        if not is_complete(path):
            names = [other.name for other in complete_checkpoints_in(path.parent)]
            raise FileNotFoundError(f"{path} is incomplete; complete ones beside it: {', '.join(names) or 'none'}")
        return path.resolve()
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} is missing: {path} is neither a run's dump folder nor a checkpoint")
    folder = path / json.loads(config_file.read_text())["checkpoint"]["folder"]
    complete = complete_checkpoints_in(folder)
    if not complete:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint")
    return complete[-1].resolve()


def read_settings(checkpoint: Path) -> JobConfig:
    """The settings of the run that saved ``checkpoint``: its model, tokenizer, data and [lighthouse] sections."""
    saved = json.loads((dump_folder_of(checkpoint) / "config.json").read_text())
    settings = ConfigManager().parse_args(["--job.custom_config_module", saved["job"]["custom_config_module"]])
    for section in ("model", "lighthouse", "training"):
        for name, value in saved[section].items():
            if not isinstance(value, dict):
                setattr(getattr(settings, section), name, value)
    return settings


def load_model(checkpoint: Path, settings: JobConfig, *, dense: bool, device: str = device_type) -> nn.Module:
    """The checkpoint's weights in the run's model, float32, in evaluation mode.

    Args:
        dense: whether every layer runs dense attention, as after Stage 2; otherwise as the run trained.
    """
    settings = copy.deepcopy(settings)
    settings.lighthouse.enable = settings.lighthouse.enable and not dense
    spec = get_train_spec(settings.model.name)
    args = copy.deepcopy(spec.model_args[settings.model.flavor])
    args.update_from_config(settings)
    with torch.device("meta"):
        model = spec.model_cls(args)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device(device))
    state = model.state_dict()
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return model.eval()
