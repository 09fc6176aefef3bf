"""The checkpoints that a run saves and loads: whole or absent, finite, checked before they are used.

A folder of checkpoints holds, besides ``step-N``:

- ``saving-N``: a save that goes on, or was killed. It gets its manifest last, and then its name.
- ``replaced-N``: for a moment, the ``step-N`` that a newer save of the same step takes the place of.
- ``damaged-N``: what was ``step-N`` until it was found to be damaged. Nothing deletes it.
- ``purging-N``: being deleted, because ``checkpoint.keep_latest_k`` newer ones are sound.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torchtitan.components.checkpoint import DATALOADER, AsyncMode
from torchtitan.experiments.lighthouse.data.stream_loader import StreamLoader
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.runs import manifest
from torchtitan.experiments.lighthouse.runs.checkpoints import (
    HAS_MANIFEST,
    Verify,
    checkpoints_in,
    complete_checkpoints_in,
    damage_in,
    is_complete,
    position_keys,
    read_metadata,
    step_of,
)
from torchtitan.experiments.lighthouse.seams import checkpoint as seam
from torchtitan.tools.logging import logger

#: What a full, broken or protected disk says: too little room, a quota, a limit, no permission, a read-only mount.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENODEV}


class SoundCheckpoints(seam.HookedCheckpoints):
    """The run's checkpoint manager.

    Args:
        verify: ``checkpoint.verify``.
        about: of the manifests.
        compare: called on the first rank with the checkpoint that is loaded; it refuses one of another run.
        others: upstream's arguments.
    """

    mark = HAS_MANIFEST
    #: Bytes of the tensors of the save that is under way.
    _needed = 0

    def __init__(
        self,
        *,
        verify: Verify,
        about: Mapping[str, Any],
        compare: Callable[[Path], None] = lambda checkpoint: None,
        **others: Any,
    ) -> None:
        self.verify, self.about, self.compare = verify, about, compare
        mode = others["checkpoint_config"].async_mode
        if mode.lower() == AsyncMode.ASYNC_WITH_PINNED_MEM and not torch.accelerator.is_available():
            # Upstream's assertion would come at the first save.
            raise Refused(f"checkpoint.async_mode={mode!r} needs a GPU; nearest valid value: 'async'")
        super().__init__(**others)

    # Loading

    def choose(self, step: int) -> int | None:
        folder = Path(self.folder)
        candidates = seam.on_first_rank(lambda: self._candidates(folder, step))
        damaged: dict[int, str] = {}
        for candidate in candidates:
            what = self._damage(folder / f"step-{candidate}")
            if what is None:
                seam.on_first_rank(partial(self._report, folder, damaged, candidate))
                return candidate
            damaged[candidate] = what
        if not damaged:
            return None
        found = "; ".join(f"step-{number}: {what}" for number, what in damaged.items())
        if step >= 0:
            raise Refused(
                f"{folder}/step-{step} (checkpoint.load_step={step}) is damaged: {damaged[step]}. Without "
                "checkpoint.load_step the newest sound checkpoint is used"
            )
        raise Refused(
            f"{folder} holds no sound checkpoint ({found}), and a run never starts over by itself. Nothing was moved. "
            f"To start from the beginning, move {folder} away; to load without a check, set checkpoint.verify=off"
        )

    def check_initial(self, checkpoint: Path) -> None:
        if not checkpoint.is_dir():
            return  # Upstream says so.
        if not is_complete(checkpoint):
            raise Refused(f"checkpoint.initial_load_path: {checkpoint} is no complete checkpoint (no .metadata)")
        if what := self._damage(checkpoint):
            raise Refused(f"checkpoint.initial_load_path: {checkpoint} is damaged: {what}")

    def prepare_to_load(self, checkpoint: Path) -> None:
        loader = self.states[DATALOADER]
        if isinstance(loader, StreamLoader):
            loader.prepare_to_load(position_keys(read_metadata(checkpoint)))

    def _candidates(self, folder: Path, step: int) -> list[int]:
        """The steps to try, the best first; on the first rank, after what a kill has interrupted is put in order."""
        if not self.load_only and folder.is_dir():
            tidy(folder)
        complete = [step_of(path) for path in complete_checkpoints_in(folder)]
        if step >= 0:
            if step not in complete:
                state = "incomplete" if (folder / f"step-{step}").is_dir() else "not there"
                raise Refused(
                    f"checkpoint.load_step={step}: {folder}/step-{step} is {state}; complete ones: "
                    f"{', '.join(map(str, complete)) or 'none'}"
                )
            return [step]
        return complete[::-1]

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, as ``damage_in`` says it. Each rank looks at a share of the files."""
        found, refused = None, None
        try:
            found = damage_in(checkpoint, self.verify, (dist.get_rank(), dist.get_world_size()))
        except Refused as refusal:
            refused = str(refusal)
        everyone = seam.from_every_rank((found, refused))
        for _, refusal_there in everyone:
            if refusal_there is not None:
                raise Refused(refusal_there)
        return next((there for there, _ in everyone if there is not None), None)

    def _report(self, folder: Path, damaged: Mapping[int, str], chosen: int) -> None:
        """Name what is passed over for ``chosen``, and set the damaged ones aside, so that they are named once."""
        self.compare(folder / f"step-{chosen}")
        for path in checkpoints_in(folder):
            if step_of(path) > chosen and not is_complete(path):
                logger.warning(f"{path} is unfinished (no .metadata); using step-{chosen}")
        for number, what in damaged.items():
            path = folder / f"step-{number}"
            if self.load_only:
                logger.warning(f"{path} is damaged: {what}; using step-{chosen}")
                continue
            aside = _free_name(folder, f"damaged-{number}")
            try:
                path.rename(aside)
                moved = f"set aside as {aside}"
            except OSError as error:
                moved = f"it could not be set aside ({error.strerror})"
            logger.warning(f"{path} is damaged: {what}; {moved}; using step-{chosen}")

    # Saving

    def begin_save(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> Path:
        step = step_of(checkpoint)
        self._refuse_nonfinite(step, tensors)
        self._needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        folder = checkpoint.with_name(f"saving-{step}")

        def make_room() -> None:
            # What an earlier process or an earlier failure has left: files of this save would come to lie beside it.
            shutil.rmtree(folder, ignore_errors=True)
            free = free_bytes(checkpoint)
            if free < self._needed:
                raise Refused(self._disk_line(checkpoint, "not enough room", free))

        seam.on_first_rank(make_room)
        return folder

    def dcp_save(
        self, state_dict: dict[str, Any], checkpoint_id: str, async_mode: AsyncMode, *others: Any, **named: Any
    ) -> Future[Any] | AsyncSaveResponse | None:
        begin = time.monotonic()
        future = super().dcp_save(state_dict, checkpoint_id, async_mode, *others, **named)
        size = f"{self._needed / 2**30:.2f} GiB"

        def log_saved(ended: Future[Any] | None = None) -> None:
            # One that has failed in the background is said where the run waits for it.
            if ended is None or ended.exception() is None:
                logger.info(f"Saved {checkpoint_id}: {size} in {time.monotonic() - begin:.1f} s")

        if future is None:
            log_saved()
        else:
            logger.info(
                f"Saving {checkpoint_id} beside the training: {size}, copied in {time.monotonic() - begin:.1f} s"
            )
            ended = future.upload_completion if isinstance(future, AsyncSaveResponse) else future
            ended.add_done_callback(log_saved)
        return future

    def seal_for(self, checkpoint: Path, last_of_stage: bool) -> seam.Seal:
        return partial(seal, target=checkpoint, about=self.about, last_of_stage=last_of_stage)

    def seal_unrecorded(self, checkpoint: Path, folder: Path) -> None:
        def record_and_seal() -> None:
            files = {name: (record.bytes, record.digest) for name, record in manifest.record_files(folder).items()}
            seal(folder, files, target=checkpoint, about=self.about, last_of_stage=True)

        seam.on_first_rank(record_and_seal)

    def explain(self, failures: Mapping[int, BaseException], saving: Path | None) -> str | None:
        for error in failures.values():
            if isinstance(error, Refused):
                return str(error)
            if saving is not None and isinstance(error, OSError) and error.errno in _DISK:
                if dist.get_rank() == 0:
                    # Half a save is of no use, and the room may be what is missing.
                    shutil.rmtree(saving, ignore_errors=True)
                return self._disk_line(saving.with_name(f"step-{number_of(saving)}"), cast(str, error.strerror))
        return None

    def _disk_line(self, checkpoint: Path, why: str, free: int | None = None) -> str:
        free = free_bytes(checkpoint) if free is None else free
        return (
            f"{checkpoint} cannot be saved: {why}. It needs {self._needed:,} bytes, and {free:,} are free. Earlier "
            "checkpoints are whole: once this is put right, the same command resumes from the newest"
        )

    def _refuse_nonfinite(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Look for NaN and infinity. They spread to all weights in a step: a checkpoint that holds one is of no use.

        Raises:
            Refused: on every rank, naming the first tensor that holds one.
        """
        bad = next(nonfinite(tensors), None)
        if found := [(*there, rank) for rank, there in enumerate(seam.from_every_rank(bad)) if there]:
            _, name, rank = min(found)
            raise Refused(
                f"step {step} is not saved: {name} holds NaN or infinite numbers (on rank {rank}). Earlier checkpoints "
                f"in {self.folder} are whole, and the same command resumes from the newest; a lower optimizer.lr or a "
                "longer lr_scheduler.warmup_steps is the usual remedy"
            )

    # Purging

    def stale(self, keep: int) -> list[Path]:
        stale = []
        for checkpoint in purgeable(Path(self.folder), keep):
            # At once, so that half a checkpoint is never taken for a damaged one.
            gone = _free_name(checkpoint.parent, f"purging-{step_of(checkpoint)}")
            checkpoint.rename(gone)
            stale.append(gone)
        return stale


def about(settings: MergedConfig, fingerprints: Mapping[str, Any], tokens_per_step: int) -> dict[str, Any]:
    """What the manifests of a run's checkpoints say of the run.

    Args:
        fingerprints: of what it reads: tokenizer and data files.
        tokens_per_step: of all processes. Settings alone do not always say so.
    """
    packages = {"lighthouse": "lighthouse-attention", "torchtitan": "torchtitan", "torch": "torch"}
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {
        "settings": asdict(settings),
        "versions": versions | {"python": platform.python_version()},
        "fingerprints": dict(fingerprints),
        "tokens_per_step": tokens_per_step,
    }


def seal(folder: Path, written: seam.Written, *, target: Path, about: Mapping[str, Any], last_of_stage: bool) -> None:
    """Make the checkpoint ``target`` of ``folder``, in which all is written and on the disk."""
    files = {name: manifest.FileRecord(*record) for name, record in written.items()}
    manifest.write(folder, files, about, step=step_of(target), last_of_stage=last_of_stage)
    manifest.put_in_place(folder, target, _free_name(target.parent, f"replaced-{step_of(target)}"))


def tidy(folder: Path) -> None:
    """Finish or undo, in the folder of checkpoints, what a kill has interrupted."""
    for path in _numbered(folder, "saving"):
        target = folder / f"step-{number_of(path)}"
        whole = (path / manifest.MANIFEST_FILE).exists() and damage_in(path, "size") is None
        if whole and not is_complete(target):
            logger.warning(f"{target} was saved whole and killed before it got its name: it gets it now")
            manifest.put_in_place(path, target, _free_name(folder, f"replaced-{step_of(target)}"))
        else:
            logger.warning(f"{path}: this save did not finish; removed")
            shutil.rmtree(path, ignore_errors=True)
    for path in _numbered(folder, "replaced"):
        target = folder / f"step-{number_of(path)}"
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in _numbered(folder, "purging"):
        shutil.rmtree(path, ignore_errors=True)


def purgeable(folder: Path, keep: int) -> list[Path]:
    """What ``checkpoint.keep_latest_k`` deletes: what is older than the ``keep`` newest sound checkpoints.

    Those with which a stage ended stay. Damaged and unfinished ones are not among the ``keep``. (Only sizes are looked
    at: for digests, all would be read again at every save.)
    """
    sound, stale = 0, []
    for checkpoint in reversed(checkpoints_in(folder)):
        if sound < keep:
            sound += is_complete(checkpoint) and damage_in(checkpoint, "size") is None
        elif not manifest.is_last_of_stage(checkpoint):
            stale.append(checkpoint)
    return stale


def nonfinite(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, str]]:
    """Of each tensor whose part on this rank is not finite: its place in the order of ``tensors``, and its name."""
    parts = {name: seam.local_part(tensor).detach() for name, tensor in tensors.items()}
    checked = [
        (i, name, part) for i, (name, part) in enumerate(parts.items()) if part.is_floating_point() and part.numel()
    ]
    verdicts: dict[torch.device, list[Tensor]] = {}
    for _, _, part in checked:
        # One pass that writes nothing, and NaN wins.
        verdict = torch.stack(torch.aminmax(part)).isfinite().all()
        verdicts.setdefault(part.device, []).append(verdict)
    # One wait for each device.
    finite = {device: iter(torch.stack(found).tolist()) for device, found in verdicts.items()}
    for i, name, part in checked:
        if not next(finite[part.device]):
            yield i, name


def check_writable(folder: Path) -> None:
    """Whether checkpoints can be saved in ``folder``, which need not exist yet.

    Raises:
        Refused: if not, with the path, the reason and the free bytes.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"1")
    except OSError as error:
        raise Refused(
            f"{folder}: no checkpoint can be saved there: {error.strerror} ({free_bytes(folder):,} bytes are free in "
            f"{there}). Put it right, choose another job.dump_folder, or train without checkpoints "
            "(checkpoint.enable=false)"
        ) from error


def free_bytes(path: Path) -> int:
    """How many bytes are free on the disk on which ``path`` is, or will be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def number_of(path: Path) -> int:
    """N of ``saving-N`` and its like."""
    return int(path.name.partition("-")[2].partition(".")[0])


def _numbered(folder: Path, kind: str) -> list[Path]:
    return [path for path in folder.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d+(\.\d+)?", path.name)]


def _free_name(folder: Path, name: str) -> Path:
    return next(path for n in count(1) if not os.path.lexists(path := folder / (name if n == 1 else f"{name}.{n}")))
