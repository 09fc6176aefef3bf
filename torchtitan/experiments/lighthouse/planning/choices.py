"""Which activation checkpointing, and over how many GPUs a sequence is split: what fits, and how fast each is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.planning import memory
from torchtitan.experiments.lighthouse.planning.rates import Rates
from torchtitan.experiments.lighthouse.planning.step import GPUS_PER_NODE, Prediction, predict
from torchtitan.experiments.lighthouse.planning.workload import CHECKPOINTING, Checkpointing, Workload

from lighthouse.flash_packages import PACKAGES

#: Of the budget, the part of the steps in Stage 1, as the paper splits it.
SPLIT = (10, 6)


@dataclass(frozen=True)
class Choice:
    """One way to run all stages."""

    work: Workload
    """Of Stage 1."""
    stage1: Prediction
    dense: Prediction
    """Of Stage 2, and of a model that is dense from the start."""
    hours: float
    """Of all stages together."""
    short: tuple[Workload, Prediction] | None = None
    """Of the dense steps on short sequences that come before Stage 1."""

    @property
    def memory_gib(self) -> float:
        return max(self.stage1.memory_gib, self.dense.memory_gib, self.short[1].memory_gib if self.short else 0.0)

    def fits(self, rates: Rates) -> bool:
        return memory.fits(self.memory_gib, rates.memory_gib)


def context_parallel_degrees(work: Workload) -> Iterator[int]:
    """Degrees that divide the GPUs, leave a multiple of the data-parallel ranks in a step, cut the sequence into chunks
    of whole tiles (a load-balanced rank holds two), and stay on a node, unless it is the degree that ``work`` has; 1
    alone where its attention kernels split no sequence."""
    for degree in {*range(1, min(work.gpus, GPUS_PER_NODE) + 1), work.context_parallel}:
        ranks, chunks = work.gpus // degree, 1 if degree == 1 else 2 * degree
        if degree > 1 and work.inner_attention in PACKAGES:
            continue
        if work.gpus % degree or work.seq_len % chunks or work.sequences_per_step % (ranks * work.sequences_at_once):
            continue
        if work.lighthouse_layers:
            try:
                work.geometry.validate(work.seq_len, chunks)
            except ValueError:
                continue
        yield degree


def checkpointing_modes(work: Workload) -> Sequence[Checkpointing]:
    """Those that go with the other settings, from the fastest on."""
    of_layers: tuple[Checkpointing, ...] = ("selective", "full")
    if work.offloaded:
        return of_layers
    # A graph goes with these only where they do not keep the state of the random generator. Then the settings may have
    # one of them.
    without = work.cuda_graph and work.checkpointing not in of_layers
    return [mode for mode in CHECKPOINTING if not without or mode not in of_layers]


def on_short_sequences(work: Workload, seq_len: int) -> Workload:
    """Dense steps of as many tokens on shorter sequences, each on one GPU, which holds no more tokens at once.

    Raises:
        Refused: for a length that no number of sequences fills such a step with.
    """

    def fills(length: int) -> bool:
        return work.tokens_per_step % (length * work.gpus) == 0

    if not 0 < seq_len < work.seq_len or not fills(seq_len):
        nearest = min(filter(fills, range(1, work.seq_len)), key=lambda length: abs(length - seq_len))
        raise Refused(
            f"--short {seq_len}: sequences must be shorter than {work.seq_len:,}, and a step of "
            f"{work.tokens_per_step:,} tokens on {work.gpus} GPU(s) a whole number of them; nearest valid value: "
            f"{nearest}"
        )
    sequences = work.tokens_per_step // seq_len
    most = max(1, work.tokens_at_once // seq_len)
    at_once = max(size for size in range(1, most + 1) if sequences % (size * work.gpus) == 0)
    return replace(
        work.dense(), seq_len=seq_len, sequences_at_once=at_once, sequences_per_step=sequences, context_parallel=1
    )


def choices(
    work: Workload,
    rates: Rates,
    tokens: float,
    split: tuple[float, float] = SPLIT,
    short: tuple[int, float] | None = None,
) -> list[Choice]:
    """All that are valid, fastest first.

    Args:
        tokens: of both stages together.
        split: how they are shared between Stage 1 and Stage 2.
        short: the length of sequences in dense steps before them, and their tokens.
    """
    found = []
    for degree in context_parallel_degrees(work):
        for mode in checkpointing_modes(work):
            one = replace(work, context_parallel=degree, checkpointing=mode)
            stage1, dense = predict(one, rates), predict(one.dense(), rates)
            shares = [part / sum(split) for part in split]
            hours = sum(
                stage.hours(share * tokens, work.gpus) for stage, share in zip((stage1, dense), shares, strict=True)
            )
            before = None
            if short is not None:
                shorter = on_short_sequences(one, short[0])
                before = shorter, predict(shorter, rates)
                hours += before[1].hours(short[1], work.gpus)
            found.append(Choice(one, stage1, dense, hours, before))
    return sorted(found, key=lambda choice: choice.hours)


def best(found: Sequence[Choice], rates: Rates) -> Choice:
    """The fastest one that fits.

    Raises:
        Refused: if none does, naming the memory that one would need.
    """
    for choice in found:
        if choice.fits(rates):
            return choice
    least = min(found, key=lambda choice: choice.memory_gib)
    work = least.work
    more, offload = memory.layers_to_offload(work, rates.memory_gib) if work.checkpointing == "full" else None, ""
    if more is not None:
        host = f"with {memory.host_gib(more):.0f} GiB of host memory a GPU"
        offload = f"activation_checkpoint.offload_layers={more.offloaded}, {host}, or "
    raise Refused(
        f"memory of {rates.memory_gib:g} GiB: {work.n_layers} layers at {work.seq_len:,} tokens do not fit on "
        f"{work.gpus} GPU(s); nearest valid value: {memory.needed_gib(least.memory_gib):.0f} GiB (with "
        f"{description(work)}), or {offload}more GPUs, or a shorter context"
    )


def description(work: Workload) -> str:
    split = (
        f"each sequence on {work.context_parallel} GPUs" if work.context_parallel > 1 else "each sequence on one GPU"
    )
    offloaded = f" with {work.offloaded} layers offloaded" if work.offloaded else ""
    return f"activation checkpointing {work.checkpointing!r}{offloaded}, {split}"


def save_seconds(work: Workload, bytes_per_second: float) -> float:
    """How long the run stands still for one checkpoint."""
    return memory.checkpoint_bytes(work) / bytes_per_second


#: Between two failures of one GPU or what belongs to it: 419 in 54 days on 16,384 GPUs ("The Llama 3 Herd of Models",
#: arXiv 2407.21783, section 3.3.4).
GPU_HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419

#: Bounds for the minutes between two checkpoints. A person, too, does not like to lose more than an hour.
SHORTEST, LONGEST = 5, 60


def interval_minutes(work: Workload, bytes_per_second: float) -> int:
    """Between two checkpoints: √(2 · time of a save · time between failures), Young's rule, within bounds."""
    between_failures = GPU_HOURS_PER_FAILURE * 3600 / work.gpus
    minutes = (2 * save_seconds(work, bytes_per_second) * between_failures) ** 0.5 / 60
    return round(min(max(minutes, SHORTEST), LONGEST))
