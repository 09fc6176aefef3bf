"""Finding the checkpoints of a run; imports no torch until one is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs import manifest

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

CONFIG_FILE = "config.json"
TABLE_OF_CONTENTS = ".metadata"

#: Before the keys of the data position in a checkpoint.
POSITION = "dataloader."

#: What is compared with a checkpoint's manifest before it is loaded: contents, sizes, or nothing.
Verify = Literal["digest", "size", "off"]

#: In the ``.metadata`` of a checkpoint that was given a manifest: without one, it has been lost.
HAS_MANIFEST = "lighthouse.manifest"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None


def is_hugging_face(folder: Path) -> bool:
    """Whether it holds a Hugging Face model: its config.json names a model type, a run's does not."""
    file = folder / CONFIG_FILE
    return file.is_file() and "model_type" in json.loads(file.read_text())


def is_complete(checkpoint: Path) -> bool:
    """Whether the save came to its end, damaged since or not.

    A save becomes a ``step-N`` folder only when it is complete (``runs.saving``). Where another program has saved, or
    an older version of this one, the table of contents is what is written last.
    """
    if (checkpoint / TABLE_OF_CONTENTS).is_file():
        return True
    try:
        saved = manifest.read(checkpoint)
    except manifest.BadManifest:
        return False
    return saved is not None and TABLE_OF_CONTENTS in saved["files"]


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
    return first_stage_of(where_now(Path(origin), folder)) if origin else folder


def where_now(origin: Path, folder: Path) -> Path:
    """The checkpoint ``origin`` from which the run in ``folder`` started; beside it, where both have been moved."""
    beside = folder.absolute().parent.joinpath(*origin.parts[-3:])
    return beside if beside.is_dir() and not origin.is_dir() else origin


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
    return by_todays_names(json.loads(file.read_text()))


def by_todays_names(config: dict[str, Any]) -> dict[str, Any]:
    """Saved settings, where an older version or another installation saved them."""
    section = config.get("lighthouse", {})
    if section.pop("delay_scores", False):
        section.setdefault("selection", "delayed")
    assets = Path(config.get("model", {}).get("hf_assets_path", ""))
    shipped = Path(__file__).absolute().parents[1] / "byte_tokenizer"
    if assets.parts[-3:] == shipped.parts[-3:] and not assets.is_dir():
        config["model"]["hf_assets_path"] = str(shipped)
    return config


def saved_with(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, its manifest: ``settings``, by today's names, ``fingerprints``, and others.

    None for one that has no manifest, a damaged one, or one of another program, without settings.
    """
    try:
        saved = manifest.read(checkpoint)
    except manifest.BadManifest:
        return None
    if saved is None or "settings" not in saved:
        return None
    by_todays_names(saved["settings"])
    return saved


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that ``path`` was trained with, by today's names: a checkpoint, or a dump folder.

    A checkpoint's manifest says it. The run's config.json is of its last start: it counts where there is no manifest,
    and for a tokenizer or data that do not lie any more where the manifest has them.

    Raises:
        Refused: if neither is there.
    """
    saved = saved_with(path) if is_checkpoint(path) else None
    if saved is None or "job" not in saved["settings"]:  # weights that were imported have none
        return read_config(config_file_of(path))
    settings: dict[str, Any] = saved["settings"]
    file = dump_folder_of(path) / CONFIG_FILE
    if file.is_file():
        now = read_config(file)
        for section, name in (
            ("model", "hf_assets_path"),
            ("training", "dataset_path"),
            ("validation", "dataset_path"),
        ):
            here, moved = (config.get(section, {}).get(name) for config in (settings, now))
            if here and moved and not Path(here).exists():
                settings[section][name] = moved
    return settings


def find_checkpoint(path: Path, verify: Verify = "digest") -> Path:
    """The checkpoint at ``path``: a ``step-N`` folder, or a run's dump folder, whose newest sound one it is.

    Every command means this one by "newest". Unfinished and damaged ones after it are passed over, and named in a line.
    Nothing is moved: the run may still be going on.

    Raises:
        Refused: if there is none, or the one that was named is incomplete or damaged.
    """
    config_file = config_file_of(path)
    if is_checkpoint(path):
        others = [other.name for other in complete_checkpoints_in(path.parent) if other.name != path.name]
        instead = f"complete ones in {path.parent}: {', '.join(others) or 'none'}"
        if not is_complete(path):
            raise Refused(f"{path} is incomplete (it has no .metadata: the save did not finish); {instead}")
        if what := damage_in(path, verify):
            raise Refused(f"{path} is damaged: {what}; other {instead}")
        return path.resolve()
    folder = path / json.loads(config_file.read_text())["checkpoint"]["folder"]
    saved, complete = checkpoints_in(folder), complete_checkpoints_in(folder)
    if not complete:
        raise Refused(
            f"{folder} holds no checkpoint that is complete: {', '.join(p.name for p in saved) or 'none at all'}"
        )
    damaged: list[str] = []
    for checkpoint in reversed(complete):
        what = damage_in(checkpoint, verify)
        if what is None:
            if unfinished := [p.name for p in saved if step_of(p) > step_of(checkpoint) and p not in complete]:
                print(
                    f"{folder}: {', '.join(unfinished)} unfinished (no .metadata), using {checkpoint.name}", flush=True
                )
            for line in damaged:
                print(f"{line}, using {checkpoint.name}", flush=True)
            return checkpoint.resolve()
        damaged.append(f"{folder}: {checkpoint.name} is damaged ({what})")
    raise Refused(f"{folder} holds no sound checkpoint. {'; '.join(damaged)}")


def damage_in(checkpoint: Path, verify: Verify, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a complete checkpoint, in words; None if nothing is.

    One without a manifest, saved by another program, can only be too short.

    Args:
        share: (i, n) looks at every n-th file from the i-th on, so that n processes together look at all.

    Raises:
        Refused: if it cannot be judged: its table of contents names what it must not.
    """
    if verify == "off":
        return None
    try:
        saved = manifest.read(checkpoint)
        if saved is not None:
            return manifest.damage(checkpoint, saved, digests=verify == "digest", share=share)
    except manifest.BadManifest as error:
        return str(error)
    if share[0] > 0:
        return None
    try:
        metadata = unpickled_metadata(checkpoint)
        if metadata.storage_meta is not None and HAS_MANIFEST in metadata.storage_meta.modules:
            return f"{manifest.MANIFEST_FILE} is missing"
        return _missing_bytes(checkpoint, metadata)
    except Refused:
        raise
    except Exception as error:  # of many kinds: a flipped bit can make anything of a pickle
        return f"{TABLE_OF_CONTENTS} cannot be read ({type(error).__name__}: {error})"


def unpickled_metadata(checkpoint: Path) -> Metadata:
    """The table of contents, unchecked.

    Raises:
        Refused: if it names what no table of contents needs.
        Exception: of many kinds, if it is damaged.
    """
    from torchtitan.experiments.lighthouse.seams.unpickle import AllowListReader

    return AllowListReader(checkpoint).read_metadata()


def read_metadata(checkpoint: Path) -> Metadata:
    """The table of contents of a complete checkpoint, after a look at the size of every file that it names.

    Raises:
        Refused: if a file is missing or cut short.
    """
    metadata = unpickled_metadata(checkpoint)
    if what := _missing_bytes(checkpoint, metadata):
        raise Refused(f"{checkpoint} is incomplete: {what}")
    return metadata


def position_keys(metadata: Metadata) -> list[str]:
    """The keys of a checkpoint's data position, as the data loader knows them."""
    return [key.removeprefix(POSITION) for key in metadata.state_dict_metadata if key.startswith(POSITION)]


def _missing_bytes(checkpoint: Path, metadata: Metadata) -> str | None:
    for info in (metadata.storage_data or {}).values():
        file = checkpoint / info.relative_path
        needed, found = info.offset + info.length, file.stat().st_size if file.is_file() else 0
        if found < needed:
            return f"{file.name} has {found:,} bytes of at least {needed:,}"
    return None
