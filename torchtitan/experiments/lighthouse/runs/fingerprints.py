"""What a run reads, by content: of its tokenizer and its training data, recorded with each checkpoint.

Paths change when a run moves, and a path that stays may hold other files. A fingerprint holds the names relative to the
folder, in the order in which the run reads them, with sizes and digests. It stays cheap for terabytes: of a large data
file the digest covers the size and ``BLOCKS`` blocks, the first and the last among them. So it finds files that were
added, removed, renamed, cut or written anew, and not a few bytes that changed in the middle of a large file. Where
there are more than ``MOST_CONTENTS`` files, the names and sizes of all of them count, and the contents of so many.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.experiments.lighthouse.data.files import MIXTURE
from torchtitan.experiments.lighthouse.errors import DataError
from torchtitan.experiments.lighthouse.runs.checkpoints import saved_with
from torchtitan.experiments.lighthouse.runs.manifest import MANIFEST_FILE, FileRecord, digest_of

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.data.sources import Source
    from torchtitan.experiments.lighthouse.job_config import MergedConfig

BLOCK = 1 << 16  # bytes
BLOCKS = 6
MOST_CONTENTS = 1024

#: Reads wait for the disk or the network, not for the processor.
_THREADS = 16

#: The kinds of what is read, each with the setting that says where it is.
SETTINGS = {"tokenizer": "model.hf_assets_path", "data": "training.dataset_path"}
#: One kind more: the checkpoint that a stage started from.
STAGE_BEFORE = "stage_before"

#: As ``of_files`` gives it, or ``{"remote": address}`` of a dataset on the Hub. It goes into the manifest, as JSON.
Fingerprint = dict[str, Any]


def of_run(settings: MergedConfig) -> dict[str, Fingerprint]:
    """The fingerprints of what the run reads, by kind. A dataset registered in upstream's way has none.

    Raises:
        DataError: if the data or the tokenizer is not there or cannot be read.
    """
    found = {kind: of_kind(kind, settings) for kind in SETTINGS}
    return {kind: fingerprint for kind, fingerprint in found.items() if fingerprint is not None}


def of_kind(kind: str, settings: MergedConfig) -> Fingerprint | None:
    """The fingerprint of the files that these settings name; None for a dataset registered in upstream's way.

    Raises:
        DataError: as ``of_run``.
    """
    from torchtitan.experiments.lighthouse.data.section import sources_of
    from torchtitan.experiments.lighthouse.data.tokenizer import tokenizer_files

    if kind == "tokenizer":
        folder = Path(settings.model.hf_assets_path)
        files = [str(file) for file in tokenizer_files(folder)]
        if not files:
            raise DataError(
                f"model.hf_assets_path={str(folder)!r}: no tokenizer there (relative paths start at {Path.cwd()})"
            )
        # Every byte decides, and they are few.
        return of_files(files, str(folder), whole=True)
    found = sources_of(settings.training)
    if found is None:
        return None
    prints = [_of_source(source) for source in found]
    return {"mixture": prints} if settings.training.dataset == MIXTURE else prints[0]


def setting_of(kind: str, settings: MergedConfig) -> str:
    """The setting that says where it is."""
    mixed = kind == "data" and settings.training.dataset == MIXTURE
    return "training.mixture" if mixed else SETTINGS[kind]


def _of_source(source: Source) -> Fingerprint:
    path, files = source.asked.path, source.files
    if "://" in files[0]:
        # The list of a dataset of fixed shards says nothing, and older versions have not recorded it.
        return {"remote": path} if source.asked.dataset.startswith("c4") else _of_remote(path, files)
    if not os.path.isfile(files[0]):
        return _of_remote(path, files)  # the texts that a reader of the user's own takes
    return of_files(files, os.path.expanduser(path))


def _of_remote(path: str, files: Sequence[str]) -> Fingerprint:
    """Of files that are not looked at: their names. A revision changes with every text about the data."""
    from xxhash import xxh3_128

    names = "".join(re.sub(r"^(hf://datasets/[^/]+/[^/@]+)@[^/]+", r"\1", file) + "\n" for file in files)
    return {"remote": path, "files": len(files), "listing": xxh3_128(names.encode()).hexdigest()}


def of_files(files: Sequence[str], folder: str, *, whole: bool = False) -> Fingerprint:
    """Of local files, in this order, by their names in ``folder``.

    Args:
        whole: whether to read every byte.

    Returns:
        ``files`` and ``bytes``, their number and size; ``listing``, a digest of all names and sizes in order; and
        ``contents``, size and digest of those that were looked into, by name.

    Raises:
        DataError: naming the file that cannot be read.
    """
    from xxhash import xxh3_128

    root = f"{os.path.abspath(folder)}{os.sep}"
    names = [file.removeprefix(root).replace(os.sep, "/") for file in files]
    looked_into = set(_evenly(len(files), MOST_CONTENTS))
    records = [FileRecord(0, "")] * len(files)

    def look(first: int) -> None:
        # A thread takes every 16th file: a task for each file would cost more than a small file does.
        for i in range(first, len(files), _THREADS):
            records[i] = _record(files[i], contents=i in looked_into, whole=whole)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(look, range(_THREADS)))
    listing = "".join(f"{record.bytes} {name}\n" for name, record in zip(names, records, strict=True))
    return {
        "files": len(files),
        "bytes": sum(record.bytes for record in records),
        "listing": xxh3_128(listing.encode()).hexdigest(),
        "contents": {names[i]: asdict(records[i]) for i in sorted(looked_into)},
    }


def of_stage_before(origin: str, own: Path | None) -> dict[str, str]:
    """The fingerprint of the checkpoint from which the run's stage started, by its kind; empty where it is not known.

    Args:
        origin: where that checkpoint was then.
        own: a checkpoint of the run's own. What it says stays: the other one may have moved, or be gone.
    """
    if own is not None:
        saved = (saved_with(own) or {}).get("fingerprints", {})
        return {STAGE_BEFORE: saved[STAGE_BEFORE]} if STAGE_BEFORE in saved else {}
    found = of_checkpoint(Path(origin)) if origin else None
    return {} if found is None else {STAGE_BEFORE: found}


def of_checkpoint(checkpoint: Path) -> str | None:
    """What tells a checkpoint from every other, wherever it lies; None for one without a manifest."""
    file = checkpoint / MANIFEST_FILE
    return digest_of(file) if file.is_file() else None


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What is not as it was, in words; None if nothing is."""
    if before == now:
        return None
    if "mixture" in before or "mixture" in now:
        return _difference_of_mixtures(before, now)
    if "remote" in before or "remote" in now:
        was, there = (part.get("remote", "files on this machine") for part in (before, now))
        if was == there:
            return f"{there} had {before.get('files', 0):,} files, and has {now.get('files', 0):,}, or others"
        return f"{was} → {there}"
    found = list(_differences(before, now)) or [f"the names or sizes of its {now['files']:,} files differ"]
    others = f", and {len(found) - 1} more difference(s)" if len(found) > 1 else ""
    return f"{found[0]}{others}"


def _difference_of_mixtures(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, there = (part.get("mixture", [part]) for part in (before, now))
    if len(was) != len(there):
        return f"{len(was)} dataset(s) → {len(there)}"
    found = (difference(then, here) for then, here in zip(was, there, strict=True))
    return "; ".join(f"dataset {number}: {what}" for number, what in enumerate(found) if what)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    then, here = before["contents"], now["contents"]
    all_named = all(part["files"] == len(part["contents"]) for part in (before, now))
    if all_named:
        yield from (f"{name} is not there any more" for name in then if name not in here)
        yield from (f"{name} is new" for name in here if name not in then)
    elif (before["files"], before["bytes"]) != (now["files"], now["bytes"]):
        counts = (f"{part['files']:,} files with {part['bytes']:,} bytes" for part in (before, now))
        yield " → ".join(counts)
    for name in then:
        if name not in here or then[name] == here[name]:
            continue
        was, size = then[name]["bytes"], here[name]["bytes"]
        same_size = was == size
        yield f"{name} holds another text than before" if same_size else f"{name} had {was:,} bytes, and has {size:,}"
    if all_named and then.keys() == here.keys() and list(then) != list(here):
        was, name = next((a, b) for a, b in zip(then, here, strict=True) if a != b)
        yield f"the files have another order: {name} is where {was} was"


def _evenly(number: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers below ``number``, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return [i * (number - 1) // (most - 1) for i in range(most)]


def _record(file: str, *, contents: bool, whole: bool) -> FileRecord:
    try:
        size = os.stat(file).st_size
        return FileRecord(size, _digest(file, size, whole) if contents else "")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _digest(file: str, size: int, whole: bool) -> str:
    from xxhash import xxh3_128

    if whole or size <= BLOCKS * BLOCK:
        return xxh3_128(Path(file).read_bytes()).hexdigest()
    digest = xxh3_128(str(size).encode())
    with open(file, "rb", buffering=0) as stream:
        for i in range(BLOCKS):
            stream.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()
