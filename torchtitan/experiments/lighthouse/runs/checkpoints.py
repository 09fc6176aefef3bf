"""Finding the checkpoints of a run; imports no torch until one is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.experiments.lighthouse.errors import Refused

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

CONFIG_FILE = "config.json"


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


def first_stage_of(checkpoint: Path) -> Path:
    """The dump folder of the first run in the chain of stages that led to ``checkpoint``, as far as it is on disk."""
    folder = checkpoint.parent.parent
    config_file = folder / CONFIG_FILE
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    origin = config.get("lighthouse", {}).get("stage1_checkpoint", "")
    return first_stage_of(Path(origin)) if origin else folder


def config_file_of(path: Path) -> Path:
    """The saved settings of the run at ``path``, its dump folder or one of its checkpoints.

    Raises:
        Refused: saying what is there instead.
    """
    if not path.is_dir():
        raise Refused(f"{path}: no such folder; give a run's dump folder or one of its checkpoint/step-N folders")
    file = (dump_folder_of(path) if is_checkpoint(path) else path) / CONFIG_FILE
    if not file.is_file():
        raise Refused(f"{file} is missing: {path} is neither a run's dump folder nor a checkpoint of one")
    return file


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a run's ``config.json``, by today's names where an older version saved them."""
    config: dict[str, Any] = json.loads(file.read_text())
    section = config.get("lighthouse", {})
    if section.pop("delay_scores", False):
        section.setdefault("selection", "delayed")
    return config


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: a ``step-N`` folder, or a run's dump folder, whose newest complete one it is.

    Every command means this one by "newest". Unfinished ones after it are passed over, and named in a line.

    Raises:
        Refused: if there is none, or the one that was named is not complete.
    """
    config_file = config_file_of(path)
    if is_checkpoint(path):
        if not is_complete(path):
            others = ", ".join(other.name for other in complete_checkpoints_in(path.parent)) or "none"
            raise Refused(
                f"{path} is incomplete (it has no .metadata: the save did not finish); complete ones in "
                f"{path.parent}: {others}"
            )
        return path.resolve()
    folder = path / json.loads(config_file.read_text())["checkpoint"]["folder"]
    saved, complete = checkpoints_in(folder), complete_checkpoints_in(folder)
    if not complete:
        raise Refused(
            f"{folder} holds no checkpoint that is complete: {', '.join(p.name for p in saved) or 'none at all'}"
        )
    if unfinished := [other.name for other in saved if step_of(other) > step_of(complete[-1])]:
        print(f"{folder}: {', '.join(unfinished)} unfinished (no .metadata), using {complete[-1].name}", flush=True)
    return complete[-1].resolve()


def read_metadata(checkpoint: Path) -> Metadata:
    """The table of contents of a complete checkpoint, after a look at the size of every file that it names.

    Raises:
        Refused: if a file is missing or cut short.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    metadata = FileSystemReader(checkpoint).read_metadata()
    for info in (metadata.storage_data or {}).values():
        file = checkpoint / info.relative_path
        needed, found = info.offset + info.length, file.stat().st_size if file.is_file() else 0
        if found < needed:
            raise Refused(f"{checkpoint} is incomplete: {file.name} has {found:,} bytes of at least {needed:,}")
    return metadata
