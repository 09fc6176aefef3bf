"""The ranks of a run, forked from a process that has imported the trainer: what a start of torchrun costs is imports.

Nothing but imports has run in that process, and what ``warm`` says, so a rank is like a fresh one. What torchrun itself
does (signals, its own death, its exit status) is tested with torchrun.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any
from unittest import mock

TRAINER = "torchtitan.experiments.lighthouse.train"

#: How long ranks may go on when one has failed.
GRACE = 30


def shorten_the_end() -> None:
    """At its end upstream's trainer waits two seconds for the other ranks. Ours have done all by then."""
    from torchtitan import train

    train.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 20)})


def begin(variables: dict[str, str], *files: str) -> None:
    """In a fork: what it prints goes to these files."""
    for number, file in enumerate(files, start=1):  # standard output and error
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(variables)


def become(program: str, arguments: list[str]) -> None:
    """In a fork: run a module or a file."""
    shorten_the_end()
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # the way that multiprocessing ends a process leaves them out


def _rank(program: str, arguments: list[str], variables: dict[str, str], *files: str) -> None:
    begin(variables, *files)
    become(program, arguments)


def fork(target: Callable[..., None], arguments: tuple[Any, ...], variables: dict[str, str]) -> BaseProcess:
    """Start a process that has imported the trainer; with the first one starts what they are forked from."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["helpers.warm"])
    process = forks.Process(target=target, args=arguments)
    with mock.patch.dict(os.environ, variables | {"PYTHONPATH": os.pathsep.join(sys.path)}):
        process.start()
    return process


def start(
    nproc: int, arguments: list[str], variables: dict[str, str], *, program: str = TRAINER, timeout: float = 240
) -> CompletedProcess:
    """Run a program, a module's name or a file's, to its end, with these variables of the environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        printed = stdout.name, stderr.name
        ranks = []
        for rank in range(nproc):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
            numbers |= {"MASTER_PORT": port}
            place = {"MASTER_ADDR": "localhost"} | {name: str(number) for name, number in numbers.items()}
            ranks.append(fork(_rank, (program, arguments, variables | place, *printed), variables))
        deadline, failed = time.monotonic() + timeout, False
        while any(rank.exitcode is None for rank in ranks):
            if not failed and any(rank.exitcode for rank in ranks):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE)
                for rank in ranks:
                    rank.terminate()  # as torchrun does: a rank that has left it to rank 0 to speak waits for this
            if time.monotonic() > deadline:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.02)
        for rank in ranks:
            rank.join()
        code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        return CompletedProcess(
            [program, *arguments], code, *(Path(file).read_text(errors="replace") for file in printed)
        )
