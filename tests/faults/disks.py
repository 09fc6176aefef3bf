"""Faults of files, folders and disks. Each hits the run of a chain, starts it again, and says what came of it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
from pathlib import Path
from random import Random

from faults.chain import Chain, Outcome
from faults.moments import caught_while_saving, moment, one_line
from faults.mounts import filled, read_only
from helpers.checkpoints import flip, random_flip, truncate

# Files of checkpoints


def zero(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(bytes(size))


def damage_file(file: Path, how: str) -> None:
    ways = {"truncated": truncate, "missing": Path.unlink, "zeroed": zero, "empty": lambda file: os.truncate(file, 0)}
    ways[how](file)


def damage(folder: Path, how: str, draw: Random) -> str:
    """Damage a checkpoint; in words."""
    files = sorted(file for file in folder.iterdir() if file.stat().st_size)
    file = draw.choice(files)
    if how == "flip":
        file, byte, bit = random_flip(folder, draw)
        flip(file, byte, bit)
        return f"bit {bit} of byte {byte:,} of {file.name} flipped"
    if how == "emptied":
        for file in files:
            file.unlink()
        return "all files missing"
    damage_file(file, how)
    return f"{file.name} {how}"


def damage_checkpoints(chain: Chain, draw: Random, *, hows: tuple[str, ...]) -> list[Outcome]:
    """The newest ones, each in a way of its own, between two starts. The start names each in a line of its own, sets
    it aside, and takes the one before them all: so it is told apart what became of each."""
    chain.training()
    chain.wait_for_checkpoints(len(hows) + 2)
    chain.kill()
    for folder in chain.checkpoints.glob("saving-*"):
        shutil.rmtree(folder)  # as if the kill had come before that save
    whole = chain.whole()
    done = {step: damage(chain.checkpoints / f"step-{step}", how, draw) for step, how in zip(whole, hows, strict=False)}
    shared = chain.go_on("", expected=whole[len(hows)])
    assert chain.run is not None
    text, outcomes = chain.run.output(), []
    for (step, what), how in zip(done.items(), hows, strict=True):
        problems = list(shared.problems)
        says = rf"step-{step} is damaged: .*; set aside as .*damaged-{step}(\.\d+)?; using step-{whole[len(hows)]}$"
        if how == "emptied":
            says = rf"step-{step} is unfinished \(no .metadata\); using step-{whole[len(hows)]}$"
        if len(named := re.findall(says, text, re.M)) != 1:
            problems.append(f"step-{step} is named in {len(named)} lines")
        others = {name: getattr(shared, name) for name in vars(shared) if name not in ("what", "problems")}
        outcomes.append(Outcome(f"step-{step}: {what}", problems=problems, **others))
    return outcomes


def damage_run_files(chain: Chain, draw: Random, *, how: str) -> Outcome:
    """Files of the dump folder beside the checkpoints, as a crash of the machine may leave them."""
    chain.training()
    chain.kill()
    if how == "metrics.jsonl cut in a line":
        os.truncate(file := chain.folder / "metrics.jsonl", file.stat().st_size - draw.randrange(1, 60))
    elif how == "metrics.jsonl ends in zeros":
        with (chain.folder / "metrics.jsonl").open("ab") as stream:
            stream.write(bytes(4096))
    elif how == "config.json empty":
        os.truncate(chain.folder / "config.json", 0)
    else:
        (chain.folder / ".lock").write_bytes(draw.randbytes(64))
    return chain.go_on(how)


# Disks


def too_large(chain: Chain, draw: Random) -> Outcome:
    """A limit on the size of files, set while it trains, stands in for a quota."""
    run = chain.training()
    chain.wait_for_checkpoints(1)
    moment(chain, draw)
    limit = draw.randrange(1 << 20, 7 << 20)
    for trainer in run.trainers().values():
        resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (limit, limit))
    run.wait(90)
    says = r"step-\d+ cannot be saved: File too large\. It needs [\d,]+ bytes, and [\d,]+ are free"
    problems = one_line(run, says)
    if list(chain.checkpoints.glob("saving-*")):
        problems.append("what was written is not removed")
    return chain.go_on(f"files limited to {limit:,} bytes", problems=problems)


def full_disk(chain: Chain, draw: Random, *, when: str) -> Outcome:
    """Of a small file system of its own. Then room is made."""
    run = chain.training()
    chain.wait_for_checkpoints(1)
    says = r"step-\d+ cannot be saved: {}\. It needs [\d,]+ bytes, and [\d,]+ are free"
    if when == "before the save":
        left = draw.randrange(1 << 20, 12 << 20)
        with filled(chain.folder, left):
            run.wait(90)
        problems = one_line(run, says.format("not enough room"))
        what = f"{left:,} bytes left on the disk"
    elif when == "during the save":
        with contextlib.ExitStack() as full:
            with caught_while_saving(chain, run, draw) as where:
                full.enter_context(filled(chain.folder, 0))
            run.wait(90)
        problems = one_line(run, says.format("No space left on device"))
        what = f"the disk full, {where}"
    elif when == "at a moment":
        moment(chain, draw)
        with filled(chain.folder, 0):
            run.wait(90)
        problems = one_line(run, says.format("(not enough room|No space left on device)"))
        what = "the disk full to the last byte, at a moment"
    else:
        chain.kill()
        with filled(chain.folder, 0):
            run = chain.start()
            run.wait(90)
        problems = one_line(run, r"no checkpoint can be saved there: No space left on device \(0 bytes are free")
        what = "the disk full to the last byte, at the start"
    return chain.go_on(what, problems=problems)


def protected(chain: Chain, draw: Random, *, when: str) -> Outcome:
    """The folder becomes read-only, by a mount over it (nothing else stops root), or a file lies in its place."""
    run = chain.training()
    chain.wait_for_checkpoints(1)
    if when == "while it trains":
        with read_only(chain.checkpoints):
            run.wait(90)
        says = r"step-\d+ cannot be saved: Read-only file system"
    else:
        chain.kill()
        if when == "at the start":
            with read_only(chain.folder):
                run = chain.start()
                run.wait(90)
            says = r"no run can be started there: Read-only file system"
        else:
            aside = chain.checkpoints.rename(chain.folder / "aside")
            chain.checkpoints.touch()
            run = chain.start()
            run.wait(90)
            chain.checkpoints.unlink()
            aside.rename(chain.checkpoints)
            says = r"no checkpoint can be saved there: Not a directory"
    return chain.go_on(f"read-only {when}", problems=one_line(run, says))


# Folders


def move(chain: Chain, draw: Random, *, what: str) -> Outcome:
    """Between two starts."""
    chain.training()
    moment(chain, draw)
    chain.kill()
    if what == "the data":
        chain.data = shutil.copytree(chain.data, chain.base / f"data-{draw.randrange(1 << 20)}")
        outcome = chain.go_on("the data folder moved")
    else:
        before, chain.folder = chain.folder, chain.base / f"run-{draw.randrange(1 << 20)}"
        before.rename(chain.folder)
        if what == "the dump folder, with a link":
            before.symlink_to(chain.folder)
            outcome = chain.go_on(f"{what} in its place", folder=before)
            chain.folder = before
            return outcome
        outcome = chain.go_on(f"{what} moved")
    outcome.command = "names the new folder"
    return outcome


def change_data(chain: Chain, draw: Random, *, how: str) -> Outcome:
    """A file of the training data is changed between two starts: refused. It is put back."""
    chain.training()
    chain.wait_for_checkpoints(1)
    chain.kill()
    whole, kept = chain.data, chain.base / "kept"
    chain.data = shutil.copytree(whole, chain.base / f"data, {how}")  # whole may be one of those already
    file = draw.choice(sorted(chain.data.iterdir()))
    kept.write_bytes(file.read_bytes())
    if how == "edited":
        flip(file, draw.randrange(file.stat().st_size), 0)
        says = "holds another text than before"
    else:
        damage_file(file, how)
        says = {"missing": "is not there any more", "truncated": r"had [\d,]+ bytes, and has [\d,]+"}[how]
    run = chain.start()
    run.wait(90)
    kept.replace(file)
    problems = one_line(run, rf"train: .*training\.dataset_path.*{re.escape(file.name)} {says}")
    outcome = chain.go_on(f"{file.name} of the data {how}", problems=problems)
    outcome.command = "names a copy of the data"
    return outcome
