"""The settings that a run was trained with, and its model."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the model
from torch.distributed.checkpoint import state_dict_loader
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse.data.section import held_out_share
from torchtitan.experiments.lighthouse.errors import Refused, as_refusal
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer
from torchtitan.experiments.lighthouse.model.sizes import Llama
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    CONFIG_FILE,
    read_config,
    read_metadata,
    settings_of,
)
from torchtitan.experiments.lighthouse.seams.unpickle import AllowListPlanner, AllowListReader
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import device_type


def read_settings(checkpoint: Path) -> MergedConfig:
    """The settings of the run that saved ``checkpoint``: its model, tokenizer, data and [lighthouse] sections.

    Raises:
        Refused: where a module that they name cannot be imported.
    """
    saved = settings_of(checkpoint)
    import_modules(saved, str(checkpoint))
    parsed = ConfigManager().parse_args(["--job.custom_config_module", saved["job"]["custom_config_module"]])
    settings = cast(MergedConfig, parsed)  # by that module
    for section in ("model", "llama", "lighthouse", "training"):
        before = getattr(settings, section)
        # A run may have been saved by another version: what it does not know keeps its default.
        names = [field.name for field in fields(before) if not is_dataclass(getattr(before, field.name))]
        known = {name: saved[section][name] for name in names if name in saved.get(section, {})}
        setattr(settings, section, replace(before, **known))
    return settings


def import_modules(config: Mapping[str, Any], where: str) -> None:
    """Import what a run's settings name, as the trainer did: also from the current folder.

    Args:
        where: the settings are, in words.

    Raises:
        Refused: naming the module that cannot be imported.
    """
    # ``python -m``, which starts the trainer, looks there first; a program that is given by its path does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    for section, name in (("job", "custom_config_module"), ("experimental", "custom_import")):
        module = config.get(section, {}).get(name)
        if not module:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # of many kinds: it is anybody's module
            raise Refused(
                f"{section}.{name}={module!r} in {where} cannot be imported ({type(error).__name__}: {error}); start "
                "where the run was started, or put the folder that holds it on PYTHONPATH"
            ) from error


def complete(settings: MergedConfig) -> MergedConfig:
    """The same settings, in place, with all that follows from others written out, so that they need nothing else: every
    size of the model, in [llama], and the share of the documents that is held out.

    Raises:
        Refused: for sizes that no model can have, or a module that cannot be imported.
    """
    import_modules(asdict(settings), "the settings")
    settings.training.held_out_share = held_out_share(settings)
    kept = Path(settings.job.dump_folder) / CONFIG_FILE
    if settings.model.hf_config and not Path(settings.model.hf_config).exists() and kept.is_file():
        saved = read_config(kept)
        if saved.get("model", {}).get("hf_config") == settings.model.hf_config:
            # The file has gone since the run was started. What it said has been kept.
            known = {name: value for name, value in saved.get("llama", {}).items() if name in vars(settings.llama)}
            settings.llama = settings.llama.over(Llama(**known))
    with as_refusal():
        args = _of_flavor(settings)
        if isinstance(args, LighthouseModelArgs):
            args.take_sizes(settings)
            settings.llama = args.sizes
    return settings


def sizes_of_flavor(name: str, flavor: str) -> Llama | None:
    """Of a flavor as it is now, for runs of older versions, whose settings have no [llama] section."""
    try:
        args = get_train_spec(name).model_args[flavor]
    except (ValueError, KeyError):
        return None
    return args.sizes if isinstance(args, LighthouseModelArgs) else None


def _of_flavor(settings: MergedConfig) -> BaseModelArgs:
    return copy.deepcopy(get_train_spec(settings.model.name).model_args[settings.model.flavor])


def model_arguments(settings: MergedConfig) -> LighthouseModelArgs:
    """Those of the flavor and the [llama] section, at the settings' context and with their [lighthouse] section.

    Raises:
        ValueError: for settings that no model can be built from.
    """
    args = _of_flavor(settings)
    args.update_from_config(settings)
    return cast(LighthouseModelArgs, args)  # settings with a [lighthouse] section are those of this model


def build_model(settings: MergedConfig, device: str = "meta") -> LighthouseTransformer:
    """The model of these settings, its weights uninitialised; on ``meta`` it costs nothing.

    Raises:
        ValueError: for settings that no model can be built from.
    """
    args = model_arguments(settings)
    with torch.device("meta"):
        model = cast(LighthouseTransformer, get_train_spec(settings.model.name).model_cls(args))
    return model if device == "meta" else model.to_empty(device=device)


@contextmanager
def one_process() -> Iterator[None]:
    """Without a warning of torch, which guesses that one process is meant although ``no_dist`` has told it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def load_model(
    checkpoint: Path, settings: MergedConfig, *, dense: bool, device: str = device_type
) -> LighthouseTransformer:
    """The checkpoint's weights in the run's model, float32, in evaluation mode.

    The kernels of attention are "auto": those that a run asked for need not be here, nor take float32.

    Args:
        dense: whether every layer runs dense attention, as after Stage 2; otherwise as the run trained.

    Raises:
        Refused: for a checkpoint that is cut short.
    """
    read_metadata(checkpoint)
    settings = copy.deepcopy(settings)
    enable = settings.lighthouse.enable and not dense
    settings.lighthouse = replace(settings.lighthouse, enable=enable, inner_attention="auto")
    model = build_model(settings, device)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device(device))
    state = model.state_dict()
    reader, planner = AllowListReader(checkpoint), AllowListPlanner()
    with one_process():
        state_dict_loader.load(state, storage_reader=reader, planner=planner, no_dist=True)
    return model.eval()
