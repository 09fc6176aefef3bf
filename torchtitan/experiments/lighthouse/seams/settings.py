"""Upstream's parser and entry point, with settings checked as a whole and refusals as one line."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import tomllib
from typing import Any, cast

import torch
import torchtitan.train as upstream
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse.errors import Refused, as_refusal, exit_on_refusal
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.runs.stopping import STOPPED
from torchtitan.experiments.lighthouse.seams.trainer import HookedTrainer
from torchtitan.experiments.lighthouse.settings_rules import check_settings

#: Of Linux's prctl: the signal for this process when its parent is gone.
PR_SET_PDEATHSIG = 1

#: How long another rank waits for rank 0 to find the same and say so.
SECONDS_FOR_RANK_0 = 20


class CheckedConfigManager(ConfigManager):
    """Upstream takes values as they come, and asserts a few of them. It has no hook after parsing."""

    def parse_args(self, args: list[str] | None = None) -> MergedConfig:
        """The merged settings.

        Raises:
            Refused: for a file that cannot be read, and as ``check_settings``.
        """
        try:
            with as_refusal():
                config = cast(MergedConfig, super().parse_args(sys.argv[1:] if args is None else args))
        except AssertionError as error:
            raise Refused(str(error)) from error
        except (FileNotFoundError, tomllib.TOMLDecodeError) as error:
            raise Refused(f"--job.config_file: {error}") from error
        check_settings(config)
        return config


def die_with_launcher() -> None:
    """Have the kernel kill this process when torchrun is gone: it must not go on writing beside a restarted run.

    Torchrun ends its processes itself, unless it was killed.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(trainer: type[HookedTrainer]) -> None:
    """Upstream's entry point. What is refused before there is a process group is the same on all ranks: one says it."""

    def another_says_it() -> bool:
        silent = os.environ.get("RANK", "0") != "0" and not torch.distributed.is_initialized()
        if silent:
            # Torchrun ends all processes when the first one fails: that must not be this one.
            time.sleep(SECONDS_FOR_RANK_0)
        return silent

    die_with_launcher()
    with exit_on_refusal("train", silent=another_says_it):
        as_module: Any = upstream
        as_module.ConfigManager = CheckedConfigManager  # its ``main`` makes one
        upstream.main(trainer)
    if trainer.stopped_early:
        sys.exit(STOPPED)
