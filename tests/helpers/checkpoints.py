"""Small checkpoints in one process, by the trainer's own manager; and ways to damage them."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.experiments.lighthouse.job_config import Checkpoint
from torchtitan.experiments.lighthouse.runs import manifest
from torchtitan.experiments.lighthouse.runs.checkpoints import complete_checkpoints_in
from torchtitan.experiments.lighthouse.runs.saving import SoundCheckpoints


class Part(Stateful):
    """A part of the state that is a dictionary."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def manager(folder: Path, verify: str = "digest", **settings: Any) -> SoundCheckpoints:
    """Of a run in ``folder`` with a model of one layer whose weights are all 1; it saves every step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    torch.nn.init.ones_(model.weight)
    position = pickle.dumps({"token_buffer": list(range(100)), "sample": 7})
    made = SoundCheckpoints(
        verify=verify,
        about={"settings": {"a": 1.5}, "versions": {}, "fingerprints": {}},
        dataloader=Part({"dp_rank_0": position, "world_size": 1}),
        model_parts=[model],
        optimizers=Part({"exp_avg": torch.zeros(64, 64), "lr": 0.1}),
        lr_schedulers=Part({"last_epoch": 0}),
        states={"train_state": Part({"step": 0})},
        checkpoint_config=Checkpoint(**{"enable": True, "interval": 1} | settings),
        sd_adapter=None,
        base_folder=str(folder),
    )
    made.model = model
    return made


def save_settings(run: Path, settings: dict[str, Any], read: dict[str, Any] | None = None) -> None:
    """As if ``run`` had been trained with these, and had read ``read`` besides."""
    (run / "config.json").write_text(json.dumps(settings))
    for checkpoint in complete_checkpoints_in(run / "checkpoint"):
        said = manifest.read(checkpoint)
        about = {name: said[name] for name in ("versions", "fingerprints", "tokens_per_step")} | {"settings": settings}
        about["fingerprints"] |= read or {}
        files, last = manifest.files_of(said), said["last_of_stage"]
        manifest.write(checkpoint, files, about, step=said["step"], last_of_stage=last)


def flip(file: Path, byte: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(byte)
        changed = stream.read(1)[0] ^ (1 << bit)
        stream.seek(byte)
        stream.write(bytes([changed]))


def random_flip(folder: Path, draw: random.Random) -> tuple[Path, int, int]:
    """A file of ``folder``, a byte and a bit of it: half of the time any byte of the folder, else any file first."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.stat().st_size)
    weights = [file.stat().st_size for file in files] if draw.random() < 0.5 else None
    file = draw.choices(files, weights)[0]
    return file, draw.randrange(file.stat().st_size), draw.randrange(8)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)
