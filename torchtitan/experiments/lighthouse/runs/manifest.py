"""The manifest of a checkpoint: what it consists of, and what it was saved with. Imports no torch.

``manifest.json`` is written last, when all else is on the disk. It holds the size and the digest of every file, and a
digest of itself, so that every flipped bit in the folder is found. The digest is XXH3 of 128 bits: it is several times
as fast as a disk, so that it costs next to nothing. It finds accidents. It is no protection against a person who
changes a file and the manifest with it (docs/reliability.md).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
DIGEST = "xxh3_128"


@dataclass(frozen=True)
class FileRecord:
    """Of one file."""

    bytes: int
    digest: str


class BadManifest(ValueError):
    """A manifest that is not what was written."""


def write(
    folder: Path, files: Mapping[str, FileRecord], about: Mapping[str, Any], *, step: int, last_of_stage: bool
) -> None:
    """Write the manifest of ``folder``, whole or not at all, and see it onto the disk.

    Args:
        files: by name.
        about: ``settings``, ``versions`` and ``fingerprints`` of what the run reads (tokenizer and data files).
        last_of_stage: whether this is where the run ends, and where a next stage starts.
    """
    body = {
        "format": FORMAT,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "last_of_stage": last_of_stage,
        "digest": DIGEST,
        "files": {name: asdict(files[name]) for name in sorted(files)},
        **about,
    }
    unfinished = folder / f"{MANIFEST_FILE}.tmp"
    with unfinished.open("wb") as file:
        file.write(_render(body))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST_FILE)
    sync_folder(folder)


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder``; None where there is none, as before there were manifests.

    Raises:
        BadManifest: if it is not what was written.
    """
    file = folder / MANIFEST_FILE
    if not file.exists():
        return None
    try:
        found = file.read_bytes()
        body = json.loads(found)["manifest"]
        same = _render(body) == found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadManifest(f"{MANIFEST_FILE} cannot be read") from error
    # Byte for byte: also where a flipped bit leaves the meaning as it was.
    if not same:
        raise BadManifest(f"{MANIFEST_FILE} is not what was written")
    if body["format"] != FORMAT or body["digest"] != DIGEST:
        raise BadManifest(f"{MANIFEST_FILE} is of format {body['format']}, {body['digest']}, made by another version")
    return body


def files_of(manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for name, record in manifest["files"].items()}


def is_last_of_stage(folder: Path) -> bool:
    try:
        manifest = read(folder)
    except BadManifest:
        return False
    return manifest is not None and bool(manifest["last_of_stage"])


def damage(folder: Path, manifest: Mapping[str, Any], *, digests: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first file that is not what the manifest says, in words; None if all are.

    Args:
        digests: whether to compare contents too, not sizes alone.
        share: (i, n) looks at every n-th file from the i-th on.
    """
    records = files_of(manifest)
    for name in sorted(records)[share[0] :: share[1]]:
        file, record = folder / name, records[name]
        try:
            size = file.stat().st_size
            if size != record.bytes:
                return f"{name} has {size:,} bytes of {record.bytes:,}"
            if digests and digest_of(file) != record.digest:
                return f"{name} does not hold what was saved (its digest differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def digest_of(file: Path) -> str:
    from xxhash import xxh3_128

    digest, buffer = xxh3_128(), memoryview(bytearray(1 << 22))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Of every file in ``folder``, where nothing digested them while they were written."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST_FILE)
    return {str(f.relative_to(folder)): FileRecord(f.stat().st_size, digest_of(f)) for f in files}


def sync_folder(folder: Path) -> None:
    """See the names in ``folder`` onto the disk, as ``fsync`` does a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(finished: Path, target: Path, replaced: Path) -> None:
    """Rename the folder ``finished`` to ``target``. One that is there already goes, once the new one is in its place.

    Args:
        replaced: a free name for the one that goes.
    """
    if target.exists():
        target.rename(replaced)
    finished.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _render(body: Mapping[str, Any]) -> bytes:
    from xxhash import xxh3_128

    text = json.dumps(body, indent=1, default=str)
    return f'{{"manifest": {text},\n"digest": "{xxh3_128(text.encode()).hexdigest()}"}}\n'.encode()
