"""The data loaders of training and validation, from their sections of settings.

Training deals the documents of one dataset, or of a mixture, out to streams (``streams``). So does validation on the
held-out share of the training data, and on the datasets ``local``, ``hub`` and your own. Validation on the other named
ones, and runs that an older version started, let Hugging Face `datasets` split the files over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.experiments.lighthouse.data.documents import Choice, Documents, Shuffling
from torchtitan.experiments.lighthouse.data.files import HELD_OUT
from torchtitan.experiments.lighthouse.data.mixture import Mixture
from torchtitan.experiments.lighthouse.data.pieces import PieceEncoder
from torchtitan.experiments.lighthouse.data.records import Skipping
from torchtitan.experiments.lighthouse.data.section import (
    held_out_share,
    scored,
    section_name,
    sources_of,
    weights_of,
)
from torchtitan.experiments.lighthouse.data.sources import Source
from torchtitan.experiments.lighthouse.data.stream_loader import StreamLoader, batches_of
from torchtitan.experiments.lighthouse.data.streams import StreamDataset
from torchtitan.experiments.lighthouse.data.tokenizer import check_ends
from torchtitan.experiments.lighthouse.seams.dataset import ResumableTextDataset
from torchtitan.hf_datasets.text_datasets import DATASETS

Batch = tuple[dict[str, Tensor], Tensor]


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = True
) -> BaseDataLoader:
    """Batches of [training] for one data-parallel rank: ``({"input": [B, N] int64}, labels [B, N] int64)``.

    Their order does not depend on the number of ranks, except where another module has registered the dataset in
    upstream's way: the order is upstream's too then.

    Raises:
        Refused: for data or a tokenizer that cannot be used.
    """
    section = job_config.training
    if isinstance(tokenizer, HuggingFaceTokenizer):
        check_ends(tokenizer, job_config.model.hf_assets_path)
    by_rank = partial(build_rank_dataloader, section, dp_world_size, dp_rank, tokenizer, infinite)
    if (found := sources_of(section)) is None:
        return by_rank()
    return StreamLoader(
        documents_of(section, found, endless=infinite, share=held_out_share(job_config)),
        PieceEncoder(tokenizer),
        by_rank,
        seq_len=section.seq_len,
        batch_size=section.local_batch_size,
        global_batch_size=section.global_batch_size,
        rank=dp_rank,
        ranks=dp_world_size,
        workers=asdict(section.dataloader),
    )


def documents_of(
    section: Training | Validation,
    found: list[Source],
    *,
    endless: bool,
    share: float = 0,
    held_out: bool = False,
    skipping: Skipping | None = None,
) -> Documents:
    """The documents of a section in their order: as its settings choose, shuffle and mix them.

    Args:
        share: that is held out.
        held_out: whether that share is what is read, in the order of the files.
        skipping: of bad records; None as the section has it.
    """
    get = partial(getattr, section)
    shuffling = Shuffling(0 if held_out else get("shuffle_buffer", 0), get("data_seed", 0))
    how = {
        "endless": endless,
        "skipping": skipping or skipping_of(section),
        "choice": Choice(share, held_out, get("min_document_chars", 0)),
        "shuffling": shuffling,
    }
    datasets = [source.documents(**how) for source in found]
    weights = weights_of(section)
    return Mixture(datasets, weights, shuffling.seed) if weights else datasets[0]


class ValidationLoader:
    """The same batches of one data-parallel rank at each validation, from the first document on."""

    def __init__(self, dataset: StreamDataset, workers: dict[str, Any], limit: int) -> None:
        """
        Args:
            workers: the settings of [validation.dataloader].
            limit: so many batches, which stay in memory: to find the held-out documents again, all others would be read
                too. 0: all there are, and none stays.
        """
        self._dataset, self._workers, self._limit = dataset, workers, limit
        self._kept: list[Batch] = []
        self._rest: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if not self._limit:
            yield from self._read()
            return
        for number in range(self._limit):
            if number == len(self._kept):
                self._rest = self._rest or self._read()
                if (batch := next(self._rest, None)) is None:
                    return
                self._kept.append(batch)
            inputs, labels = self._kept[number]
            # Under context parallelism on a CPU, a sequence is cut up in place.
            yield {name: tensor.clone() for name, tensor in inputs.items()}, labels.clone()
        self._rest = iter(())

    def _read(self) -> Iterator[Batch]:
        for inputs, labels, _ in batches_of(self._dataset, self._workers):
            yield {"input": inputs}, labels


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = False
) -> ValidationLoader | ParallelAwareDataloader:
    """Batches of [validation], or of the training data's held-out share; their order depends on the number of ranks."""
    section = scored(job_config)
    held_out = section.dataset == HELD_OUT
    if not held_out and _by_rank(section.dataset):
        return build_rank_dataloader(section, dp_world_size, dp_rank, tokenizer, infinite)
    read, share = (job_config.training, held_out_share(job_config)) if held_out else (section, 0.0)
    if (found := sources_of(read)) is None:
        return build_rank_dataloader(section, dp_world_size, dp_rank, tokenizer, infinite)
    documents = documents_of(
        read, found, endless=infinite, share=share, held_out=held_out, skipping=skipping_of(section)
    )
    dataset = StreamDataset(
        documents,
        PieceEncoder(tokenizer),
        seq_len=section.seq_len,
        batch_size=section.local_batch_size,
        rank=dp_rank,
        ranks=dp_world_size,
        streams=section.local_batch_size * dp_world_size,
    )
    return ValidationLoader(dataset, asdict(section.dataloader), max(0, section.steps))  # -1: all


def _by_rank(dataset: str) -> bool:
    registered = DATASETS.get(dataset.lower())
    return registered is not None and getattr(registered.loader, "by_rank", True)


def build_rank_dataloader(
    section: Training | Validation, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, infinite: bool
) -> ParallelAwareDataloader:
    """Each rank packs documents of its own, one after the other: upstream's way, and that of older runs."""
    # Upstream's builders cannot be told which dataset class to build.
    dataset = ResumableTextDataset(
        dataset_name=section.dataset,
        dataset_path=section.dataset_path,
        encode=PieceEncoder(tokenizer),
        skip=skipping_of(section).skip_and_log,
        seq_len=section.seq_len,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        infinite=infinite,
    )
    settings = asdict(section.dataloader) | {"batch_size": section.local_batch_size}
    return ParallelAwareDataloader(dataset, dp_rank=dp_rank, dp_world_size=dp_world_size, **settings)


def skipping_of(section: Training | Validation) -> Skipping:
    # Upstream's own sections do not have the setting.
    return Skipping(getattr(section, "max_bad_records", 0), f"{section_name(section)}.max_bad_records")
