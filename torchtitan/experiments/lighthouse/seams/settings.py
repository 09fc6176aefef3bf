"""Upstream's parser and entry point, with settings checked as a whole and refusals as one line."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torchtitan.train as upstream
from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as Upstreams
from torchtitan.experiments.lighthouse.errors import Refused, as_refusal, exit_on_refusal
from torchtitan.experiments.lighthouse.job_config import JobConfig, MergedConfig
from torchtitan.experiments.lighthouse.runs.stopping import STOPPED
from torchtitan.experiments.lighthouse.seams.console import quiet_logger
from torchtitan.experiments.lighthouse.seams.trainer import HookedTrainer
from torchtitan.experiments.lighthouse.settings_rules import check_settings

#: Of Linux's prctl: the signal for this process when its parent is gone.
PR_SET_PDEATHSIG = 1

#: How long another rank waits for rank 0 to find the same and say so, and one rank more than the one before it.
SECONDS_FOR_RANK_0, SECONDS_A_RANK = 20, 1

#: How long a rank that failed waits for torchrun to end it, because another one failed first.
SECONDS_FOR_TORCHRUN = 3


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

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type[Upstreams]:
        setting, nearest = "job.custom_config_module", f"nearest valid value: {JobConfig.__module__!r}"
        try:
            merged = super()._maybe_add_custom_config(args, toml_values)
        except Exception as error:  # of many kinds: it is anybody's module
            raise Refused(f"{setting} cannot be used ({type(error).__name__}: {error}); {nearest}") from error
        known = {field.name for field in fields(merged)}
        missing = [field.name for field in fields(JobConfig) if field.name not in known]
        if missing and not {"-h", "--help"} & set(args):
            raise Refused(f"{setting} must name a module with the sections {', '.join(missing)}; {nearest}")
        return merged


def die_with_launcher() -> None:
    """Have the kernel kill this process when torchrun is gone: it must not go on writing beside a restarted run.

    Torchrun ends its processes itself, unless it was killed.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(trainer: type[HookedTrainer]) -> None:
    """Upstream's entry point. What is refused is the same on all ranks, or nearly always: rank 0 says it."""
    rank = int(os.environ.get("RANK", 0))
    command = f"train, rank {rank} on {socket.gethostname()}" if rank else "train"
    die_with_launcher()
    with exit_on_refusal(command, before=partial(_leave_it_to_rank_0, rank)):
        _run(trainer)
    if trainer.stopped_early:
        sys.exit(STOPPED)


def _run(trainer: type[HookedTrainer]) -> None:
    as_module: Any = upstream
    as_module.ConfigManager = CheckedConfigManager  # its ``main`` makes one
    as_module.init_logger = quiet_logger
    try:
        upstream.main(trainer)
    except RuntimeError:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # Perhaps a collective that failed because another rank has ended: that one has said why.
            with _without_traceback_for_torchrun():
                _await_end(SECONDS_FOR_TORCHRUN)
        raise


def _leave_it_to_rank_0(rank: int) -> None:
    """Returns at once on rank 0, and elsewhere only where rank 0 does not find the same."""
    with _without_traceback_for_torchrun() as aside:
        if rank:
            _await_end(SECONDS_FOR_RANK_0 + SECONDS_A_RANK * min(rank, 30))
        aside.unlink(missing_ok=True)


@contextmanager
def _without_traceback_for_torchrun() -> Iterator[Path]:
    """Torchrun shows the traceback that upstream leaves in a file for it, of every process that ends: not in here."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull))
    aside = file.with_name(f"{file.name}.aside")
    if file.is_file():
        file.rename(aside)
    yield aside
    if aside.is_file():
        aside.rename(file)


def _await_end(seconds: float) -> None:
    """Torchrun ends all processes when the first one fails: that must not be this one."""
    # Not a request to stop after a step any more.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)
