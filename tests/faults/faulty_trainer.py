"""The trainer with faults that no signal and no file can make, for ``inject.py``: broken numbers, and a broken resume.

Started in place of the trainer. Unless it is asked for a fault, it trains the same, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.experiments.lighthouse.runs.saving import SoundCheckpoints
from torchtitan.experiments.lighthouse.seams.settings import main
from torchtitan.experiments.lighthouse.train import LighthouseTrainer

#: Names a file that asks for a fault, once: ``<this>-RANK`` holds one of ``NUMBERS``.
ORDERS = "LIGHTHOUSE_FAULT"
NUMBERS = ("weight", "saved weight", "moment", "gradient")

#: How resuming is broken: one of these.
BREAK = "LIGHTHOUSE_BREAK"
BREAKS = ("skip a batch", "load the step before", "forget the moments")


class ForgetfulCheckpoints(SoundCheckpoints):
    def _candidates(self, folder: Path, step: int) -> list[int]:
        return super()._candidates(folder, step)[1:]


def spoil(tensor: Tensor, number: float = float("nan")) -> None:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    with torch.no_grad():
        local.view(-1)[0] = number


class FaultyTrainer(LighthouseTrainer):
    def _is_asked_for(self, *numbers: str) -> bool:
        file = Path(f"{os.environ[ORDERS]}-{os.environ['RANK']}")
        with suppress(FileNotFoundError):
            if file.read_text() in numbers:
                file.unlink()
                return True
        return False

    def _moments(self) -> list[Tensor]:
        return [state["exp_avg"] for part in self.optimizers.optimizers for state in part.state.values()]

    def _weight(self) -> torch.nn.Parameter:
        return next(self.model_parts[0].parameters())

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        if self._is_asked_for("weight"):
            spoil(self._weight())
        if self._is_asked_for("moment"):
            spoil(self._moments()[0], float("inf"))
        super().train_step(data_iterator)

    def forward_backward_step(self, **kwargs: Any) -> Tensor:
        loss = super().forward_backward_step(**kwargs)
        if self._is_asked_for("gradient"):
            spoil(self._weight().grad)
        return loss

    def end_step(self) -> None:
        super().end_step()
        if self.step % self.job_config.checkpoint.interval == 0 and self._is_asked_for("saved weight"):
            spoil(self._weight())

    def checkpoint_manager(self) -> Callable[..., CheckpointManager]:
        made = super().checkpoint_manager()
        if os.environ.get(BREAK) == "load the step before":
            return partial(ForgetfulCheckpoints, **made.keywords)
        return made

    def check_loaded(self) -> None:
        super().check_loaded()
        if self.step and os.environ.get(BREAK) == "forget the moments":
            for moment in self._moments():
                moment.zero_()

    def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[Any]:
        batches = super().batch_generator(data_iterable)
        if self.step and os.environ.get(BREAK) == "skip a batch":
            next(batches)
        return batches


if __name__ == "__main__":
    main(FaultyTrainer)
