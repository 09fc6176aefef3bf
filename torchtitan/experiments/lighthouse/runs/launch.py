"""The commands that start a trainer or continue a run, for every program that starts one."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan.experiments.lighthouse.errors import Refused

PACKAGE = "torchtitan.experiments.lighthouse"


def one_node(processes: int) -> str:
    """torchrun's arguments for ``processes`` processes on this machine."""
    return f"--standalone --nproc_per_node={processes}"


def trainer_command(torchrun: str, settings: Sequence[str]) -> list[str]:
    """Start the trainer with ``settings``, as torchrun's arguments (one string) say."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *shlex.split(torchrun)]
    return [*launcher, "-m", f"{PACKAGE}.train", *settings]


def command(module: str, *arguments: str) -> list[str]:
    """One of the package's commands."""
    return [sys.executable, "-m", f"{PACKAGE}.{module}", *arguments]


def resume_dense_command(
    before: Path,
    dump_folder: Path,
    torchrun: str | None = None,
    overrides: Sequence[str] = (),
    *options: str,
) -> list[str]:
    """Start the next stage from ``before``, a dump folder or checkpoint, in ``dump_folder``.

    Args:
        options: the command's own, where the next stage is not simply dense to the end of the schedule.
    """
    words = command("resume_dense", str(before), "--dump-folder", str(dump_folder))
    words += [*(["--torchrun", torchrun] if torchrun else []), *options]
    return [*words, "--", *overrides] if overrides else words


@dataclass(frozen=True)
class Processes:
    """What torchrun's arguments say about the processes that they start."""

    per_node: int
    nodes: int
    node_rank: int | None
    """Which of the nodes this is; None where nothing says so."""

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


def read_torchrun(torchrun: str) -> Processes:
    """Read the numbers of nodes and processes off torchrun's arguments, one string.

    Raises:
        Refused: for numbers that are not plain.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nproc_per_node", "--nproc-per-node", default="1")
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--node_rank", "--node-rank", default=os.environ.get("SLURM_NODEID", ""))
    known, _ = parser.parse_known_args(shlex.split(torchrun))
    if not (known.nproc_per_node.isdigit() and known.nnodes.isdigit()):
        raise Refused(
            f"--torchrun {torchrun!r}: --nnodes and --nproc_per_node must be plain numbers, because the batches are "
            "shared out among a number of processes"
        )
    nodes = int(known.nnodes)
    rank = int(known.node_rank) if known.node_rank.isdigit() else None
    return Processes(int(known.nproc_per_node), nodes, 0 if nodes == 1 else rank)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command line at its "--": a program's own arguments, and settings that it passes on to the trainer."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def as_line(command: Sequence[str]) -> str:
    """As a shell takes it."""
    return shlex.join(command)


def execute(command: list[str]) -> None:
    """Print the command and become it."""
    print(as_line(command), flush=True)
    os.execv(command[0], command)
