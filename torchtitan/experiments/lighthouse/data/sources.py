"""Datasets by name: what settings say of one becomes its files, and how they are read.

``register_datasets`` adds these names to torchtitan's registry, where datasets are looked up:

    local                              a folder of .json(l), .json(l).gz, .parquet or .txt files
    hub                                any dataset on the Hub whose files are of these kinds, streamed
    c4, c4_validation                  streamed from the Hub, by default from allenai/c4
    c4_local, c4_local_validation      a copy of C4 in a folder
    stdlib, stdlib_validation          this Python's own .py files, which need no download

``register_dataset`` adds one of yours. ``mixture`` and ``held_out`` stand for what ``section`` makes of them.
"""

from __future__ import annotations

import difflib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from datasets import IterableDataset
from torchtitan.experiments.lighthouse.data.documents import FileDocuments
from torchtitan.experiments.lighthouse.data.files import (
    HELD_OUT,
    MIXTURE,
    Asked,
    list_c4,
    list_c4_folder,
    list_folder,
    list_hub,
    list_python_sources,
)
from torchtitan.experiments.lighthouse.data.records import (
    BadRecord,
    Skipping,
    encodable,
    read_documents,
    read_texts,
)
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

Read = Callable[[str], Iterator[str | BadRecord]]


@dataclass(frozen=True)
class TextFiles:
    """What upstream's registry calls a loader: from a dataset's path to its records. Here it is a list of files."""

    list_files: Callable[[Asked], list[str]]
    """From what settings say, with the path, to the files, in their order."""
    split: str = ""
    """That its name stands for; empty where the settings choose one."""
    read: Read | None = None
    """From a file to the text of each record; None where ``records`` knows the file."""
    settings: tuple[str, ...] = ()
    """Which of dataset_split, dataset_config and text_column it has a use for."""
    by_rank: bool = False
    """Whether validation, and runs of older versions, let Hugging Face `datasets` deal its files out to the ranks."""

    def files(self, path: str) -> list[str]:
        return self.list_files(Asked("", path, self.split))

    def __call__(self, path: str) -> IterableDataset:
        if not self.by_rank:
            raise Refused("this dataset has no data position of an older version")
        return IterableDataset.from_generator(read_documents, gen_kwargs={"files": self.files(path)})


@dataclass(frozen=True)
class Source:
    """A dataset that was found."""

    asked: Asked
    files: list[str]
    read: Read
    takes_column: bool = False
    """Whether a setting says which column the text is in."""

    def documents(self, **how: Any) -> FileDocuments:
        return FileDocuments(self.asked.dataset, self.files, self.read, **how)


def register_datasets() -> None:
    """Add the datasets named above to upstream's registry. Idempotent."""
    for split, suffix in (("train", ""), ("validation", "_validation")):
        for name, path, list_files in (
            ("c4", "allenai/c4", list_c4),
            ("c4_local", "", list_c4_folder),
            ("stdlib", sysconfig.get_paths()["stdlib"], list_python_sources),
        ):
            _register(name + suffix, path, TextFiles(list_files, split, by_rank=True))
    _register("local", "", TextFiles(list_folder, settings=("dataset_split", "text_column")))
    for name in (MIXTURE, HELD_OUT):
        # Upstream's validator builds a loader of its own, which nobody reads.
        DATASETS[name] = DatasetConfig(path="", loader=_nothing, sample_processor=encodable_text)
    _register("hub", "", TextFiles(list_hub, settings=("dataset_split", "dataset_config", "text_column")))


def register_dataset(
    name: str,
    list_files: Callable[[str, str], list[str]],
    read: Callable[[str], Iterator[str]],
    path: str = "",
) -> None:
    """Add a dataset of your own, for ``training.dataset`` and ``validation.dataset``. All processes must do it alike.

    Args:
        list_files: from ``dataset_path`` and ``dataset_split`` to what ``read`` takes: files, addresses, or any other
            texts. Their order counts, and must be the same in every process and at every start.
        read: from one of them to its documents, always the same ones in the same order. Called anew for every pass, and
            to go on: what it reads before the place where a run goes on is passed over.
        path: for settings that give none.
    """

    def listed(asked: Asked) -> list[str]:
        return list_files(asked.path, asked.split)

    def texts(file: str) -> Iterator[str | BadRecord]:
        return map(encodable, read(file))

    _register(name.lower(), path, TextFiles(listed, read=texts, settings=("dataset_split",)))


def _nothing(path: str) -> IterableDataset:
    return IterableDataset.from_generator(read_documents, gen_kwargs={"files": []})


def _register(name: str, path: str, loader: TextFiles) -> None:
    DATASETS[name] = DatasetConfig(path=path, loader=loader, sample_processor=encodable_text)


def encodable_text(sample: dict[str, Any]) -> str:
    """The sample's text, which can be encoded.

    Raises:
        DataError: for a bad record; a reader that may skip it does not ask.
    """
    if "bad" in sample:
        Skipping().skip(sample["bad"], 0)
    return encodable(sample["text"])


def find(asked: Asked) -> Source | None:
    """The files of a dataset. None for one that another module has registered in upstream's way.

    Raises:
        Refused: if there is no such dataset, or it has no use for a setting.
        DataError: if there are no files.
    """
    registered = DATASETS.get(asked.dataset)
    if registered is None:
        _refuse_unknown(asked)
    loader = registered.loader
    if not isinstance(loader, TextFiles):
        return None
    for setting, value, default in (
        ("dataset_split", asked.split, ""),
        ("dataset_config", asked.config, ""),
        ("text_column", asked.column, "text"),
    ):
        if value != default and setting not in loader.settings:
            others = [name for name, other in DATASETS.items() if setting in getattr(other.loader, "settings", ())]
            rule = f"dataset {asked.dataset!r} has no use for it, unlike {', '.join(map(repr, others))}"
            raise asked.refusal(setting, value, rule, repr(default))
    asked = replace(asked, path=asked.path or registered.path, split=asked.split or loader.split)
    read: Read = loader.read or partial(read_texts, column=asked.column)
    return Source(asked, loader.list_files(asked), read, "text_column" in loader.settings)


def _refuse_unknown(asked: Asked) -> NoReturn:
    (nearest,) = difflib.get_close_matches(asked.dataset, DATASETS, n=1, cutoff=0)
    rule = f"must be one of {', '.join(sorted(DATASETS))}"
    raise Refused(f"{asked.section}.dataset={asked.dataset!r}: {rule}; nearest valid value: {nearest!r}")
