"""One run per dump folder: a lock that the run holds as long as it lives, however it ends.

The lock is the operating system's, on the file ``.lock`` in the folder. It belongs to a process: the system gives it
back when the process is gone, also after SIGKILL, so no dead process holds it. The file says who does.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from torchtitan.experiments.lighthouse.errors import Refused

LOCK_FILE = ".lock"

#: How long a new run waits for one that is just ending, for example after a restart by torchrun.
PATIENCE_SECONDS = 10

#: Locks of this process. A lock of this kind ends when the process closes the file, so they stay open.
_held: dict[Path, int] = {}


def hold(folder: Path, patience: float = PATIENCE_SECONDS) -> None:
    """Hold ``folder`` until this process ends; created if it does not exist.

    Raises:
        Refused: if another process holds it after ``patience`` seconds, naming its host, its number and since when; or
            if nothing can be written there.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Refused(
            f"{folder}: no run can be started there: {error.strerror}. Put it right, or choose another job.dump_folder"
        ) from error
    deadline = time.monotonic() + patience
    while not _taken(file):
        if time.monotonic() > deadline:
            os.close(file)
            _refuse(folder)
        time.sleep(0.2)
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
    _held[folder] = file


def refuse_if_held(folder: Path) -> None:
    """Whether another process holds ``folder``; nothing is written.

    Raises:
        Refused: if so, as ``hold``.
    """
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        if not _taken(file):
            _refuse(folder)
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    """Whether the lock was free, and is now this process's."""
    try:
        # POSIX's locks and not flock's: processes forked from this one, to read data, do not inherit them, and NFS
        # has them.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _refuse(folder: Path) -> None:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    raise Refused(f"{folder}: a run is at work there ({who}). Wait for it or stop it, or choose another folder")
