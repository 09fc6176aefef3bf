"""An evaluation shared among the processes that torchrun has started, or done by one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torchtitan.experiments.lighthouse.errors import REFUSED, Refused

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.evaluation.positions import Bucket

T = TypeVar("T")


def available_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


class Ranks:
    """Every process holds the whole model and takes every n-th sequence. What they add up are numbers on the host."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.size > 1:
            # They wait for one another where one may take long: on a CPU, or for a checkpoint to be read.
            dist.init_process_group("gloo", timeout=timedelta(days=1))

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def by_first(self, do: Callable[[], T]) -> T:
        """What ``do`` returns on the first process, which alone does it, on all of them.

        Raises:
            Refused: on all of them, if it was on the first.
        """
        if self.size == 1:
            return do()
        answer: list[tuple[T | None, str | None]] = [(None, None)]
        if self.rank == 0:
            try:
                answer = [(do(), None)]
            except Refused as refusal:
                answer = [(None, str(refusal))]
        dist.broadcast_object_list(answer, src=0)
        result, refused = answer[0]
        if refused is not None:
            raise Refused(refused)
        return result  # type: ignore[return-value]  # do's own

    def all_or_none(self, do: Callable[[], None]) -> None:
        """What all processes refuse alike, the first says alone."""
        try:
            do()
        except Refused:
            if self.rank == 0:
                raise
            raise SystemExit(REFUSED) from None

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Those of this process."""
        return islice(items, self.rank, None, self.size)

    def add_up_buckets(self, buckets: Sequence[Bucket], nats_at: torch.Tensor, count: int) -> int:
        """Make all processes' buckets and losses by position, float64, the sums over all of them; so ``count``."""
        if self.size == 1:
            return count
        numbers = [count, *(number for bucket in buckets for number in (bucket.tokens, bucket.bytes, bucket.nats))]
        sums = torch.tensor(numbers, dtype=torch.float64)  # whole numbers stay whole up to 2^53
        dist.all_reduce(sums)
        dist.all_reduce(nats_at)
        of_buckets = sums[1:].view(-1, 3).tolist()
        for bucket, (tokens, bytes, nats) in zip(buckets, of_buckets, strict=True):
            bucket.tokens, bucket.bytes, bucket.nats = int(tokens), int(bytes), nats
        return int(sums[0])

    def device(self) -> torch.device:
        """This process's accelerator, or the CPU where there is none."""
        device = available_device()
        if device.type == "cpu":
            return device
        index = int(os.environ.get("LOCAL_RANK", 0))
        torch.accelerator.set_device_index(index)
        return torch.device(device.type, index)
