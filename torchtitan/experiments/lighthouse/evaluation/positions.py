"""Held-out loss by position in the sequence; ``evaluate`` is the command and says what is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.data.files import HELD_OUT
from torchtitan.experiments.lighthouse.data.text_datasets import build_validation_dataloader
from torchtitan.experiments.lighthouse.data.tokenizer import utf8_bytes
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer
from torchtitan.experiments.lighthouse.runs.checkpoints import settings_of
from torchtitan.experiments.lighthouse.runs.settings import load_model
from torchtitan.hf_datasets.text_datasets import DATASETS

#: Logits that exist at a time: 512 MiB in float32, of which a few copies live.
CHUNK_LOGITS = 2**27


class Scored(Protocol):
    """A language model in parts, so that its logits need not exist all at once."""

    @property
    def norm(self) -> nn.Module: ...

    @property
    def output(self) -> nn.Module:
        """Its weight has a row for each token of the vocabulary."""
        ...

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to what ``norm`` and then ``output`` make logits of."""
        ...


@dataclass
class Bucket:
    """The positions from ``start`` to before ``end`` of every sequence."""

    start: int
    end: int
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the text that these tokens stand for"""
    nats: float = 0.0
    """Summed loss"""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def add(self, losses: Tensor, bytes: int = 0) -> None:
        """Count tokens with these losses, float64 on the host, that stand for so many bytes."""
        self.nats += losses.sum().item()
        self.tokens += losses.numel()
        self.bytes += bytes

    def record(self) -> dict[str, int | float]:
        return asdict(self) | {"loss": self.loss, "bits_per_byte": self.bits_per_byte}


#: Where the first of the buckets of a long context ends.
FIRST_BUCKET = 4096

#: How many points a curve has.
POINTS = 64


def default_edges(seq_len: int, smallest: int | None = None) -> list[int]:
    """0, powers of two below ``seq_len``, and ``seq_len``: 0, 8K, 16K, 32K, 64K, 96K of 98,304.

    The four largest of them, and all others from ``smallest`` on.
    """
    powers = [2**n for n in range((seq_len - 1).bit_length()) if 2**n < seq_len]
    others = [power for power in powers[:-4] if smallest is not None and power >= smallest]
    return [0, *others, *powers[-4:], seq_len]


def choose_edges(asked: Sequence[int] | None, seq_len: int) -> list[int]:
    """Bucket edges, from 0 to ``seq_len`` whether these were named or not.

    Raises:
        Refused: for an edge outside the sequence, or edges that do not ascend.
    """
    if asked is None:
        return default_edges(seq_len, FIRST_BUCKET)
    for edge in asked:
        if not 0 <= edge <= seq_len:
            raise Refused(
                f"--buckets {edge}: must be a position of a sequence of {seq_len} tokens; nearest valid value: "
                f"{min(max(edge, 0), seq_len)}"
            )
    if any(low >= high for low, high in pairwise(asked)):
        given = ",".join(map(str, asked))
        raise Refused(f"--buckets {given}: must ascend; valid: {','.join(map(str, sorted(set(asked))))}")
    return sorted({0, *asked, seq_len})


def held_out_data(path: Path, dataset: str | None, dataset_path: str | None) -> tuple[str, str | None]:
    """The dataset to evaluate the run at ``path`` on, by name, and where it lies.

    What is asked for; otherwise the run's validation set, if it validated; otherwise what it held out; otherwise its
    training set's twin.

    Raises:
        Refused: for a dataset that does not exist, or a run that has none.
    """
    saved = settings_of(path)
    if dataset is None:
        section = saved.get("validation", {})
        trained_on = saved["training"]["dataset"].removesuffix("_validation")
        if section.get("enable") and section["dataset"] != HELD_OUT:
            dataset, of_run = section["dataset"], section.get("dataset_path")
        elif saved["training"].get("held_out_share"):
            dataset, of_run = HELD_OUT, None
        elif f"{trained_on}_validation" not in DATASETS:
            raise Refused(
                f"{path}: the run held nothing out of {trained_on!r}; nearest valid value: --dataset with data that it "
                "has not seen"
            )
        else:
            dataset = f"{trained_on}_validation"
            of_run = saved["training"].get("dataset_path")
        dataset_path = of_run if dataset_path is None else dataset_path
    if dataset not in DATASETS:
        raise Refused(f"--dataset {dataset!r}: must be one of {', '.join(sorted(DATASETS))}")
    return dataset, dataset_path


def read_sequences(
    settings: MergedConfig, tokenizer: HuggingFaceTokenizer, dataset: str, dataset_path: str | None, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Up to ``count`` sequences of ``training.seq_len`` tokens: inputs and labels, [1, N] int64, as a run reads them.

    Raises:
        Refused: for data that is missing or at fault.
    """
    config = copy.deepcopy(settings)
    config.validation = replace(
        config.validation,
        dataset=dataset,
        dataset_path=dataset_path,
        seq_len=settings.training.seq_len,
        local_batch_size=1,
        steps=-1,
    )
    try:
        # Only data and tokenizer count: one reader, whatever the run had.
        loader = build_validation_dataloader(1, 0, tokenizer, config)
        for inputs, labels in islice(loader, count):
            yield inputs["input"], labels
    except DataError as error:
        raise Refused(f"--dataset {dataset} --dataset-path {dataset_path}: {error}") from error


def load(checkpoint: Path, settings: MergedConfig, *, dense: bool, device: torch.device) -> LighthouseTransformer:
    """``load_model`` for a length that may not be the run's own.

    Raises:
        Refused: where the run's Lighthouse settings do not fit the length.
    """
    try:
        return load_model(checkpoint, settings, dense=dense, device=str(device))
    except ValueError as error:
        raise Refused(f"--seq-len {settings.training.seq_len}: {error}") from error


@torch.inference_mode()
def losses_and_hits(model: LighthouseTransformer | Scored, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every position, the loss, and whether the label has the highest logit.

    The logits exist for some positions at a time: 98,304 tokens over 128,256 words would be 50 GB in float32.

    Args:
        inputs: [B, N] int64, on the model's device.
        labels: [B, N] int64, there too.

    Returns:
        [B, N] nats, in float32 at least, and [B, N] bool.

    Raises:
        FloatingPointError: for a loss that is not finite.
    """
    device = inputs.device.type
    losses, hits = [], []
    # As the trainer computes: bfloat16 products on an accelerator.
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        hidden = model.hidden_states(inputs)
        vocabulary = cast(Tensor, model.output.weight).shape[0]
        rows = max(128, CHUNK_LOGITS // vocabulary // hidden.shape[0])
        for start in range(0, inputs.shape[1], rows):
            chunk = slice(start, start + rows)
            logits = model.output(model.norm(hidden[:, chunk]))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            label = labels[:, chunk, None]
            losses.append(logits.logsumexp(-1) - logits.gather(-1, label).squeeze(-1))
            hits.append(logits.argmax(-1) == labels[:, chunk])
            del logits
    loss = torch.cat(losses, 1)
    if not loss.isfinite().all():
        raise FloatingPointError("the model's loss is not finite: its weights are damaged, or overflow at this length")
    return loss, torch.cat(hits, 1)


def by_position(
    model: LighthouseTransformer | Scored,
    sequences: Iterable[tuple[Tensor, Tensor]],
    edges: Sequence[int],
    tokenizer: HuggingFaceTokenizer,
    device: torch.device,
    nats_at: Tensor | None = None,
) -> tuple[list[Bucket], int]:
    """The loss in every bucket over all ``sequences``, and how many these were.

    Args:
        nats_at: [N] float64 on the host; the loss at each position is added to it.
    """
    buckets = [Bucket(start, end) for start, end in pairwise(edges)]
    count = 0
    for inputs, labels in sequences:
        loss, _ = losses_and_hits(model, inputs.to(device), labels.to(device))
        # Summed in float64: the sum over many sequences would lose what one token adds to it.
        loss = loss.double().cpu()
        count += len(loss)
        if nats_at is not None:
            nats_at += loss.sum(0)
        for bucket in buckets:
            part = slice(bucket.start, bucket.end)
            bucket.add(loss[:, part], sum(utf8_bytes(row, tokenizer) for row in labels[:, part].tolist()))
    return buckets, count


def total(buckets: Sequence[Bucket]) -> Bucket:
    """All buckets as one."""
    summed = {name: sum(getattr(bucket, name) for bucket in buckets) for name in ("tokens", "bytes", "nats")}
    return Bucket(buckets[0].start, buckets[-1].end, **summed)


def curve(loss_at: Tensor) -> list[dict[str, float]]:
    """Means of the losses [N] over up to ``POINTS`` stretches, each longer than the one before it."""
    length = len(loss_at)
    edges = sorted({0, length, *(round(length ** (n / POINTS)) for n in range(POINTS))})
    return [{"start": start, "end": end, "loss": loss_at[start:end].mean().item()} for start, end in pairwise(edges)]


def table(buckets: Sequence[Bucket]) -> str:
    lines = [f"{'positions':>19}  {'tokens':>11}  nats/token  bits/byte"]
    for bucket in [*buckets, total(buckets)]:
        where = f"{bucket.start:,} - {bucket.end:,}"
        lines.append(f"{where:>19}  {bucket.tokens:>11,}  {bucket.loss:>10.4f}  {bucket.bits_per_byte:>9.4f}")
    return "\n".join(lines)
