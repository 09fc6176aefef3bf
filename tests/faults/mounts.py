"""Small and read-only file systems, where this process may mount."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def unmount(path: Path) -> None:
    """Also where files in it are open."""
    subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount("-t", "tmpfs", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(folder))
    return True


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        unmount(folder)


@contextlib.contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """The file system of ``folder`` with so many bytes left; with room again afterwards."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        if (much := free_bytes(folder) - left) > 0:
            os.posix_fallocate(file.fileno(), 0, much)
        with contextlib.suppress(OSError):
            while not left:
                os.pwrite(file.fileno(), bytes(1), os.fstat(file.fileno()).st_size)
    try:
        yield
    finally:
        filler.unlink()


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
