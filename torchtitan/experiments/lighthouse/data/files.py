"""Where the files of a dataset are: from what settings say of it to a list, in the order in which they are read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchtitan.experiments.lighthouse.errors import DataError, Refused

#: The value of ``training.dataset`` for what ``training.mixture`` says.
MIXTURE = "mixture"
#: The value of ``validation.dataset`` for the documents that training holds out.
HELD_OUT = "held_out"

C4_SHARDS = {"train": 1024, "validation": 8}
C4_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SUFFIXES = (*C4_SUFFIXES, ".txt")
TEST_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
STDLIB_VALIDATION_STRIDE = 20

#: Words in the name of a file by which it is for validation.
FOR_VALIDATION = {"validation", "valid"}


@dataclass(frozen=True)
class Asked:
    """A dataset as a section of settings names it, or a table of ``training.mixture``."""

    dataset: str
    path: str = ""
    split: str = ""
    config: str = ""
    column: str = "text"
    section: str = "training"
    """For messages: what comes before the names of these settings"""

    def refusal(self, setting: str, value: object, rule: str, nearest: str) -> DataError:
        return DataError(f"{self.section}.{setting}={value!r}: {rule}; nearest valid value: {nearest}")


def list_c4(asked: Asked) -> list[str]:
    """The shards of a Hub dataset repository laid out like allenai/c4.

    Raises:
        DataError: if the path is no repository id.
    """
    path, split = asked.path, asked.split
    if not is_repository(path):
        raise DataError(
            f"dataset 'c4' streams from the Hub, and {path!r} is not a repository id like 'allenai/c4'; "
            "for a local folder use the dataset 'c4_local'"
        )
    total = C4_SHARDS[split]
    return [f"hf://datasets/{path}/en/c4-{split}.{index:05d}-of-{total:05d}.json.gz" for index in range(total)]


def list_c4_folder(asked: Asked) -> list[str]:
    """The files of a local folder and its `en` subfolder that belong to the split.

    Files named `*validation*` are for validation. Those with a word that begins with "train" are for training and,
    where there are none, all that are not for validation.

    Raises:
        DataError: if the folder is not given, is missing, or holds no file for the split.
    """
    path, split = asked.path, asked.split
    if not path:
        section = "validation" if split == "validation" else "training"
        raise DataError(
            f"dataset 'c4_local' reads a local folder: set {section}.dataset_path, for example "
            f"--{section}.dataset_path=/data/c4 for a folder that holds en/c4-{split}.*.json.gz"
        )
    root = existing_folder(path)
    found = [
        file
        for folder in (root, root / "en")
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.name.endswith(C4_SUFFIXES) and not file.name.startswith(".") and file.is_file()
    ]
    if not found:
        raise DataError(f"{root}: no data file here or in {root / 'en'}; supported are {', '.join(C4_SUFFIXES)}")
    # Not within a word: `constraints.jsonl` would be all that is read.
    pattern = r"(?<![A-Za-z])train" if split == "train" else split
    files = [file for file in found if re.search(pattern, file.name)]
    if not files and split == "train":
        files = [file for file in found if "validation" not in file.name]
    if not files:
        raise DataError(f"{root}: {len(found)} data files, but none of them is for {split} (named *{split}*)")
    return [str(file) for file in files]


def list_python_sources(asked: Asked) -> list[str]:
    """The .py files below the path, one document each; every 20th is for validation.

    Raises:
        DataError: if the folder is missing or holds no source for the split.
    """
    return _list_python_sources(asked.path, asked.split)


@cache  # It takes a second, and Python's own library stays as it is.
def _list_python_sources(path: str, split: str) -> list[str]:
    root = existing_folder(path)
    names = (file.relative_to(root) for file in root.rglob("*.py"))
    # Sorted by a hash, so that neighbours, and the validation files, are not from one package.
    ordered = sorted(
        (name.as_posix() for name in names if TEST_FOLDERS.isdisjoint(name.parts)),
        key=lambda name: hashlib.sha256(name.encode()).digest(),
    )
    chosen = [
        str(root / name)
        for index, name in enumerate(ordered)
        if (index % STDLIB_VALIDATION_STRIDE == 0) == (split == "validation")
    ]
    if not chosen:
        raise DataError(f"{root}: too few .py files ({len(ordered)}) for {split}")
    return chosen


def list_folder(asked: Asked) -> list[str]:
    """The data files at any depth of a local folder, by name; those of a split where one is asked for.

    The split ``train`` is the files with the word "train" in their path or, where there are none, those without
    "validation"; any other split is the files with its name as a word.

    Raises:
        DataError: if the folder is not given, is missing, or holds no file for the split; and if no split is asked for
            where some of the files are for validation.
    """
    if not asked.path:
        raise asked.refusal("dataset_path", asked.path, "dataset 'local' reads a local folder", "its path")
    root = existing_folder(asked.path)
    names = sorted(
        name.as_posix()
        for name in (file.relative_to(root) for file in root.rglob("*") if file.name.endswith(SUFFIXES))
        if not any(part.startswith(".") for part in name.parts) and (root / name).is_file()
    )
    if not names:
        raise DataError(f"{root}: no data file here or below; supported are {', '.join(SUFFIXES)}")
    chosen = _of_split(asked, names)
    return [str(root / name) for name in chosen]


def _of_split(asked: Asked, names: list[str]) -> list[str]:
    words = {name: set(re.split(r"[^a-z0-9]+", name.lower())) for name in names}
    held_out = [name for name in names if words[name] & FOR_VALIDATION]
    if not asked.split:
        if held_out and len(held_out) < len(names):
            rule = f"{asked.path} has files for validation too ({held_out[0]}): name the split"
            raise asked.refusal("dataset_split", "", rule, "'train'")
        return names
    chosen = [name for name in names if asked.split.lower() in words[name]]
    if not chosen and asked.split == "train":
        chosen = [name for name in names if name not in held_out]
    if not chosen:
        rule = f"none of the {len(names):,} data files in {asked.path} has this word in its name"
        raise asked.refusal("dataset_split", asked.split, rule, "'' (all of them)")
    return chosen


def list_hub(asked: Asked) -> list[str]:
    """The files of a dataset on the Hub, as its configurations and splits name them, at its newest revision.

    The path is ``owner/name``, or ``owner/name@revision``.

    Raises:
        DataError: for an id that is none, a configuration or split that is not there, or files of another format.
        Refused: if the Hub cannot be asked.
    """
    repository, _, revision = asked.path.partition("@")
    if not is_repository(repository):
        rule = "dataset 'hub' streams from the Hub, and this is no id like 'allenai/c4'"
        raise asked.refusal("dataset_path", asked.path, rule, "'owner/name', or training.dataset='local' for a folder")
    return list_repository(asked, repository, revision or None)


@cache  # The Hub may have another answer a moment later.
def list_repository(asked: Asked, repository: str, revision: str | None = None) -> list[str]:
    """``list_hub`` of a repository's id, or of a local copy of one."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(repository, asked.config or None, revision=revision)
    except (ConnectionError, OSError) as error:
        if isinstance(error, FileNotFoundError):  # datasets' own for a repository that is not there
            raise asked.refusal("dataset_path", asked.path, _first_line(error), "the id of a dataset") from error
        raise Refused(f"{asked.section}.dataset_path={asked.path!r}: the Hub: {_first_line(error)}") from error
    except ValueError as error:  # of a configuration
        known = re.search(r"\[(.*)\]", str(error))
        if known is None:
            raise DataError(f"{asked.section}.dataset_path={asked.path!r}: {_first_line(error)}") from error
        rule = f"must be one of {known[1]}"
        raise asked.refusal("dataset_config", asked.config, rule, known[1].split(", ")[0]) from error
    except RuntimeError as error:  # of a repository that has a program instead of files
        raise DataError(f"{asked.section}.dataset_path={asked.path!r}: {_first_line(error)}") from error
    splits = {str(name): list(map(str, files)) for name, files in (builder.config.data_files or {}).items()}
    split = asked.split or "train"
    if split not in splits:
        rule = f"must be one of {', '.join(map(repr, splits)) or '(none)'}"
        raise asked.refusal("dataset_split", asked.split, rule, repr(next(iter(splits), "")))
    for file in splits[split]:
        if not file.endswith(SUFFIXES):
            raise DataError(
                f"{asked.section}.dataset_path={asked.path!r}: {file} cannot be read; supported are "
                f"{', '.join(SUFFIXES)}, and docs/data.md says how to read another format"
            )
    return splits[split]


def is_repository(path: str) -> bool:
    """Whether it looks like an id on the Hub, and is nothing on this machine."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not Path(path).exists()


def existing_folder(path: str) -> Path:
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"dataset path {path!r} is not a folder (looked for {root})")
    return root


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
