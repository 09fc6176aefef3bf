"""Text datasets and their loaders: C4 from the Hub, local folders, and the standard library's sources.

`register_datasets` adds six names to torchtitan's registry:

    c4, c4_validation                  streamed from the Hub, by default from allenai/c4
    c4_local, c4_local_validation      a folder of .json(l), .json(l).gz or .parquet files
    stdlib, stdlib_validation          this Python's own .py files, which need no download

All of them are a list of files. Training deals their documents out to streams (``streams``). Validation, and runs
that an older version started, let Hugging Face `datasets` split them over the ranks.
"""

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.experiments.lighthouse.data.pieces import PieceEncoder
from torchtitan.experiments.lighthouse.data.records import BadRecord, Skipping, is_remote, read_documents
from torchtitan.experiments.lighthouse.data.stream_loader import StreamLoader
from torchtitan.experiments.lighthouse.data.streams import Documents, is_text
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.experiments.lighthouse.seams.dataset import ResumableTextDataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
C4_SHARDS = {"train": 1024, "validation": 8}
TEST_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
STDLIB_VALIDATION_STRIDE = 20

#: Local files whose first record is read before a run starts.
MOST_CHECKED = 256


@dataclass(frozen=True)
class TextFiles:
    """What upstream's registry calls a loader: from a dataset's path to its records."""

    list_files: Callable[[str, str], list[str]]
    """From path and split to the files, in their order."""
    split: str

    def files(self, path: str) -> list[str]:
        return self.list_files(path, self.split)

    def __call__(self, path: str) -> IterableDataset:
        return _dataset(self.files(path))


def register_datasets() -> None:
    """Add the datasets named above to upstream's registry, where datasets are looked up by name. Idempotent."""
    for split, suffix in (("train", ""), ("validation", "_validation")):
        for name, path, list_files in (
            ("c4", "allenai/c4", _list_hub),
            ("c4_local", "", _list_folder),
            ("stdlib", sysconfig.get_paths()["stdlib"], _list_python_sources),
        ):
            DATASETS[name + suffix] = DatasetConfig(
                path=path, loader=TextFiles(list_files, split), sample_processor=encodable_text
            )


def training_files(section: Training) -> tuple[str, list[str]] | None:
    """The folder or repository of [training]'s dataset, and its files in the order in which they are read.

    None for a dataset that another module has registered.

    Raises:
        DataError: if there are none.
    """
    found = _own_files(section)
    return None if found is None else found[1:]


def _own_files(section: Training | Validation) -> tuple[Callable[[dict[str, Any]], str], str, list[str]] | None:
    """From a sample of the section's dataset to its text, and what ``training_files`` says of it."""
    registered = DATASETS.get(section.dataset.lower())
    if registered is None or not isinstance(registered.loader, TextFiles):
        return None
    path = section.dataset_path or registered.path
    return registered.sample_processor, path, registered.loader.files(path)


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = True
) -> BaseDataLoader:
    """Batches of [training] for one data-parallel rank: ``({"input": [B, N] int64}, labels [B, N] int64)``.

    Their order does not depend on the number of ranks, except where another module has registered the dataset: that of
    a dataset which is no ``TextFiles`` is upstream's.
    """
    section = job_config.training
    by_rank = partial(build_rank_dataloader, section, dp_world_size, dp_rank, tokenizer, infinite)
    if (found := _own_files(section)) is None:
        return by_rank()  # Upstream refuses unknown names, and lists the others.
    processor, _, files = found
    return StreamLoader(
        Documents(section.dataset, files, partial(_texts, processor), infinite, _skipping(section)),
        PieceEncoder(tokenizer),
        by_rank,
        seq_len=section.seq_len,
        batch_size=section.local_batch_size,
        global_batch_size=section.global_batch_size,
        rank=dp_rank,
        ranks=dp_world_size,
        workers=asdict(section.dataloader),
    )


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = False
) -> ParallelAwareDataloader:
    """Batches of [validation], in an order that depends on the number of ranks."""
    return build_rank_dataloader(job_config.validation, dp_world_size, dp_rank, tokenizer, infinite)


def build_rank_dataloader(
    section: Training | Validation, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, infinite: bool
) -> ParallelAwareDataloader:
    """Each rank packs documents of its own, one after the other: upstream's way, and that of older runs."""
    # Upstream's builders cannot be told which dataset class to build.
    dataset = ResumableTextDataset(
        dataset_name=section.dataset,
        dataset_path=section.dataset_path,
        encode=PieceEncoder(tokenizer),
        skip=_skipping(section).skip_and_log,
        seq_len=section.seq_len,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        infinite=infinite,
    )
    settings = asdict(section.dataloader) | {"batch_size": section.local_batch_size}
    return ParallelAwareDataloader(dataset, dp_rank=dp_rank, dp_world_size=dp_world_size, **settings)


def encodable_text(sample: dict[str, Any]) -> str:
    """The sample's text; lone surrogates, which UTF-8 and so the tokenizer cannot hold, become '?'.

    Raises:
        DataError: for a bad record; a reader that may skip it does not ask.
    """
    if "bad" in sample:
        Skipping().skip(sample["bad"], 0)
    return sample["text"].encode("utf-8", errors="replace").decode("utf-8")


def _texts(processor: Callable[[dict[str, Any]], str], file: str) -> Iterator[str | BadRecord]:
    for sample in read_documents([file]):
        yield sample["bad"] if "bad" in sample else processor(sample)


def _skipping(section: Training | Validation) -> Skipping:
    # Upstream's own sections do not have the setting.
    name = "validation" if isinstance(section, Validation) else "training"
    return Skipping(getattr(section, "max_bad_records", 0), f"{name}.max_bad_records")


# Before a run starts


def check_data(job_config: JobConfig) -> None:
    """Whether there is data to train on, and to validate on: files that open, with records, and some text in them.

    Reads the first record of each local file, up to ``MOST_CHECKED`` files. Of remote files only the first is opened.

    Raises:
        Refused: if not.
    """
    sections: list[Training | Validation] = [job_config.training]
    if job_config.validation.enable:
        sections.append(job_config.validation)
    for section in sections:
        name = "validation" if isinstance(section, Validation) else "training"
        if section.dataset.lower() not in DATASETS:
            raise Refused(f"{name}.dataset={section.dataset!r}: must be one of {', '.join(sorted(DATASETS))}")
        if (found := _own_files(section)) is not None:
            processor, _, files = found
            if not _has_text(files, partial(_texts, processor), _skipping(section)):
                raise DataError(
                    f"{name}.dataset={section.dataset!r}: no text in any record of its {len(files):,} file(s), the "
                    f"first of which is {files[0]}"
                )


def _has_text(files: list[str], read: Callable[[str], Iterator[str | BadRecord]], skipping: Skipping) -> bool:
    skipped, found = 0, False
    for number, file in enumerate(files):
        if found and (number >= MOST_CHECKED or is_remote(file)):
            break
        for text in read(file):
            if isinstance(text, BadRecord):
                skipped = skipping.skip(text, skipped)
                continue
            found = found or is_text(text)
            if found:
                break
    return found


# Where the files are


def _list_hub(path: str, split: str) -> list[str]:
    """The shards of a Hub dataset repository laid out like allenai/c4.

    Raises:
        DataError: if `path` is no repository id.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) or Path(path).exists():
        raise DataError(
            f"dataset 'c4' streams from the Hub, and {path!r} is not a repository id like 'allenai/c4'; "
            "for a local folder use the dataset 'c4_local'"
        )
    total = C4_SHARDS[split]
    return [f"hf://datasets/{path}/en/c4-{split}.{index:05d}-of-{total:05d}.json.gz" for index in range(total)]


def _list_folder(path: str, split: str) -> list[str]:
    """The files of a local folder and its `en` subfolder that belong to `split`.

    Files named after a split belong to it. Where no file is named `*train*`, every file that is not named
    `*validation*` is for training.

    Raises:
        DataError: if the folder is not given, is missing, or holds no file for the split.
    """
    if not path:
        section = "validation" if split == "validation" else "training"
        raise DataError(
            f"dataset 'c4_local' reads a local folder: set {section}.dataset_path, for example "
            f"--{section}.dataset_path=/data/c4 for a folder that holds en/c4-{split}.*.json.gz"
        )
    root = _existing_folder(path)
    found = [
        file
        for folder in (root, root / "en")
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.name.endswith(SUFFIXES) and not file.name.startswith(".") and file.is_file()
    ]
    if not found:
        raise DataError(f"{root}: no data file here or in {root / 'en'}; supported are {', '.join(SUFFIXES)}")
    files = [file for file in found if split in file.name]
    if not files and split == "train":
        files = [file for file in found if "validation" not in file.name]
    if not files:
        raise DataError(f"{root}: {len(found)} data files, but none of them is for {split} (named *{split}*)")
    return [str(file) for file in files]


@cache  # It takes a second, and Python's own library stays as it is.
def _list_python_sources(path: str, split: str) -> list[str]:
    """The .py files below `path`, one document each; every 20th is for validation.

    Raises:
        DataError: if the folder is missing or holds no source for the split.
    """
    root = _existing_folder(path)
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


def _existing_folder(path: str) -> Path:
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"dataset path {path!r} is not a folder (looked for {root})")
    return root


def _dataset(files: list[str]) -> IterableDataset:
    return IterableDataset.from_generator(read_documents, gen_kwargs={"files": files})
