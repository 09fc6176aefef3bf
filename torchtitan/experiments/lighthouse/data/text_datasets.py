"""Text datasets and their loaders: C4 from the Hub, local folders, and the standard library's sources.

`register_datasets` adds six names to torchtitan's registry:

    c4, c4_validation                  streamed from the Hub, by default from allenai/c4
    c4_local, c4_local_validation      a folder of .json(l), .json(l).gz or .parquet files
    stdlib, stdlib_validation          this Python's own .py files, which need no download

All of them are a list of files. Training deals their documents out to streams (``streams``). Validation, and runs
that an older version started, let Hugging Face `datasets` split them over the ranks.
"""

import gzip
import hashlib
import itertools
import json
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow.parquet
from datasets import IterableDataset
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.experiments.lighthouse.data.stream_loader import StreamLoader
from torchtitan.experiments.lighthouse.data.streams import Documents
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.experiments.lighthouse.seams.dataset import ResumableTextDataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import logger

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
C4_SHARDS = {"train": 1024, "validation": 8}
TEST_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
STDLIB_VALIDATION_STRIDE = 20

# Seconds before each new try; the try after the last delay is the final one.
RETRY_DELAYS = (1, 2, 4, 8, 16)
HTTP_LIBRARIES = {"aiohttp", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3"}


class StreamingError(RuntimeError):
    """The network kept failing while a remote file was read."""


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
    registered = DATASETS.get(section.dataset.lower())
    if registered is None or not isinstance(registered.loader, TextFiles):
        return None
    path = section.dataset_path or registered.path
    return path, registered.loader.files(path)


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = True
) -> BaseDataLoader:
    """Batches of [training] for one data-parallel rank: ``({"input": [B, N] int64}, labels [B, N] int64)``.

    Their order does not depend on the number of ranks, except where another module has registered the dataset: that of
    a dataset which is no ``TextFiles`` is upstream's.
    """
    section = job_config.training
    by_rank = partial(build_rank_dataloader, section, dp_world_size, dp_rank, tokenizer, infinite)
    registered = DATASETS.get(section.dataset.lower())
    if registered is None or not isinstance(registered.loader, TextFiles):
        return by_rank()  # Upstream refuses unknown names, and lists the others.
    path = section.dataset_path or registered.path
    logger.info(f"Preparing {section.dataset} dataset from {path}")

    def read(file: str) -> Iterator[str]:
        return map(registered.sample_processor, read_documents([file]))

    return StreamLoader(
        Documents(section.dataset, registered.loader.files(path), read, infinite),
        partial(tokenizer.encode, add_bos=True, add_eos=True),
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
        tokenizer=tokenizer,
        seq_len=section.seq_len,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        infinite=infinite,
    )
    settings = asdict(section.dataloader) | {"batch_size": section.local_batch_size}
    return ParallelAwareDataloader(dataset, dp_rank=dp_rank, dp_world_size=dp_world_size, **settings)


def encodable_text(sample: dict[str, Any]) -> str:
    """The sample's text; lone surrogates, which UTF-8 and so the tokenizer cannot hold, become '?'."""
    return sample["text"].encode("utf-8", errors="replace").decode("utf-8")


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


# What is in them


def read_documents(files: list[str]) -> Iterator[dict[str, str]]:
    """Yield {"text": ...} for every record of `files` (local paths or fsspec addresses), in order.

    Raises:
        DataError: if a file cannot be read, or a record has no text; names the file and the record.
        StreamingError: if the network fails on a remote file more often than `RETRY_DELAYS` allows.
    """
    for file in files:
        for text in _read_patiently(file):
            yield {"text": text}


def _read_patiently(file: str) -> Iterator[str]:
    """`_read_file`, opened anew after a network failure and wound forward to the next record."""
    done = failures = 0
    while True:
        try:
            for text in itertools.islice(_read_file(file), done, None):
                done, failures = done + 1, 0
                yield text
            return
        except Exception as error:
            if not _is_network_failure(file, error):
                raise
            if failures == len(RETRY_DELAYS):
                raise StreamingError(
                    f"{file}: network failure after record {done}, {failures + 1} tries without progress "
                    f"({_describe(error)}); the dataset 'c4_local' trains from a local copy"
                ) from error
            delay = RETRY_DELAYS[failures]
            failures += 1
            logger.warning(f"{file}: network failure ({_describe(error)}), trying again in {delay} s")
            time.sleep(delay)


def _read_file(file: str) -> Iterator[str]:
    """Yield the text of each record; every failure but the network's becomes a DataError."""
    number = 0
    try:
        with _open(file) as stream:
            for number, record in enumerate(_records(file, stream), start=1):
                text = record.get("text") if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise DataError(f"{file}: record {number} is not an object with a string 'text'")
                yield text
    except Exception as error:
        if isinstance(error, DataError) or _is_network_failure(file, error):
            raise
        place = f"after record {number}" if number else "at its start"
        raise DataError(f"{file}: cannot be read {place} ({_describe(error)})") from error


def _open(file: str) -> BinaryIO:
    return fsspec.open(file, "rb").open() if _is_remote(file) else open(file, "rb")


def _records(file: str, stream: BinaryIO) -> Iterator[Any]:
    if file.endswith(".py"):
        yield {"text": stream.read().decode("utf-8", errors="replace")}
    elif file.endswith(".parquet"):
        # A small batch: one row can be a whole book.
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=64, columns=["text"]):
            yield from batch.to_pylist()
    else:
        # Not `load_dataset("json")`: it fixes every column's type by the first 10 MB, fills a missing text
        # with None, and reports errors without a record number.
        lines = gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else stream
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _is_remote(file: str) -> bool:
    return "://" in file


def _is_network_failure(file: str, error: Exception) -> bool:
    """Whether opening the file again may help: not where it is local, absent, forbidden or damaged."""
    if not _is_remote(file) or isinstance(error, (FileNotFoundError, PermissionError, gzip.BadGzipFile)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    # The Hub's client has changed its HTTP library before, and not all of their errors are OSErrors.
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(HTTP_LIBRARIES)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
