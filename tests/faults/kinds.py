"""The faults, by kind. Each hits the run of a chain, starts it again where it has ended, and says what came of it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from faults.chain import INTERVAL, Chain, Finished, Outcome
from faults.mounts import filled, read_only
from helpers.checkpoints import flip, random_flip, truncate
from helpers.processes import Process, Run, assert_dead, send, wait_for

STOPPED = 75


def one_line(run: Run, says: str) -> list[str]:
    """What is wrong with a refusal: one line that says so, exit status 2, and no traceback but torchrun's own."""
    text = re.sub(r"Traceback .*?\n(?:(?!Traceback ).)*?ChildFailedError: ", "", run.output(), flags=re.S)
    lines = [line for line in text.splitlines() if re.search(says, line)]
    problems = [] if len(lines) == 1 else [f"{len(lines)} lines say {says!r}, in {run.log}"]
    if "Traceback (most recent call last)" in text:
        problems.append(f"a traceback, in {run.log}")
    if not re.search(r"exitcode\s+: 2 ", text):
        problems.append("the exit status is not 2")
    return problems


def moment(chain: Chain, draw: Random) -> None:
    time.sleep(draw.uniform(0, chain.longest))


# Killing


def victims_of(run: Run, who: str, draw: Random) -> list[Process]:
    trainers = run.trainers()
    if who == "all":
        return run.all()
    if who == "torchrun":
        return [run.torchrun]
    return [trainers[draw.choice(sorted(trainers))]]


@contextlib.contextmanager
def caught_while_saving(chain: Chain, run: Run, draw: Random) -> Iterator[str]:
    """All trainers held still in the middle of a save; what of it is on the disk."""
    trainers = list(run.trainers().values())
    share = draw.uniform(0, 1.1)  # of the bytes of a rank, and beyond them the table of contents
    size = (chain.reference.folder / f"checkpoint/step-{INTERVAL}/__0_0.distcp").stat().st_size
    for _ in range(20):

        def under_way() -> bool:
            for folder in chain.checkpoints.glob("saving-*"):
                with contextlib.suppress(OSError):
                    there = (folder / "__0_0.distcp").stat().st_size / size
                    if there >= min(share, 0.99) and (share < 1 or list(folder.glob(".metadata*"))):
                        return True
            return False

        chain.wait_until(under_way, "a save", run)
        send(signal.SIGSTOP, trainers)
        folders = list(chain.checkpoints.glob("saving-*"))
        if folders:
            files = sorted(folders[0].iterdir())
            content = ", ".join(f"{file.name} {file.stat().st_size:,}" for file in files) or "nothing"
            yield f"in {folders[0].name} ({content})"
            send(signal.SIGCONT, trainers)
            return
        send(signal.SIGCONT, trainers)
    raise AssertionError("20 saves went by")


def kill(chain: Chain, draw: Random, *, who: str, saving: bool = False) -> Outcome:
    """SIGKILL at a random moment, or in the middle of a save. Those that are meant are seen to die, and the rest goes
    down with them by itself."""
    run = chain.training()
    if saving:
        chain.wait_for_checkpoints(1)
    else:
        moment(chain, draw)
    everything = run.all()
    with caught_while_saving(chain, run, draw) if saving else contextlib.nullcontext("") as where:
        if run.ended() is not None:
            raise Finished
        victims = victims_of(run, who, draw)
        ranks = {process: rank for rank, process in run.trainers().items()}
        run.kill(victims)
    whom = f"rank {ranks[victims[0]]}" if who == "one rank" else who
    problems = []
    try:
        # Torchrun waits 30 seconds for the others of a rank that is gone.
        assert_dead(everything, 45 if who == "one rank" else 10)
    except AssertionError as error:
        problems.append(f"some outlive it: {error}")
        send(signal.SIGKILL, everything)
        assert_dead(everything)
    wait_for(lambda: run.ended() is not None, "torchrun's end")
    if run.ended() == 0:
        problems.append("a killed run ended with status 0")
    left = {path: (path / "manifest.json").exists() for path in chain.checkpoints.glob("saving-*")}
    outcome = chain.go_on(f"SIGKILL {whom} {where}".strip(), problems=problems)
    assert chain.run is not None
    for path, whole in left.items():
        says = "it gets it now" if whole else f"{path}: this save did not finish; removed"
        if says not in chain.run.output():
            outcome.problems.append(f"{path.name} was left, and nothing is said of it")
    return outcome


def kill_starting(chain: Chain, draw: Random) -> Outcome:
    """SIGKILL of all while it starts or loads."""
    chain.training()
    chain.kill()
    whole = chain.whole()
    run = chain.start()
    time.sleep(draw.uniform(0, 8))
    run.kill()
    said = "it had not resumed yet" if "Resuming after" not in run.output() else "it had resumed"
    problems = ["a save has vanished"] if not set(whole[:2]) <= set(chain.whole()) else []
    return chain.go_on(f"SIGKILL all while it starts ({said})", problems=problems)


def kill_worker(chain: Chain, draw: Random) -> Outcome:
    """SIGKILL of a process that reads data."""
    run = chain.training()
    moment(chain, draw)
    trainers = list(run.trainers().values())
    workers = [process for process in run.all() if process not in trainers and process != run.torchrun]
    assert workers, "there is no data worker"
    run.kill([draw.choice(workers)])
    problems = []
    if run.wait(90) == 0:
        problems.append("the run ended with status 0")
    return chain.go_on("SIGKILL of a data worker", problems=problems)


# Stopping


def hold(chain: Chain, draw: Random, *, then: str) -> Outcome:
    """SIGSTOP of one rank; it goes on, is killed, or is left until the others have waited too long for it."""
    run = chain.training()
    moment(chain, draw)
    everything, trainers = run.all(), run.trainers()
    rank = draw.choice(sorted(trainers))
    send(signal.SIGSTOP, [trainers[rank]])
    what = f"SIGSTOP of rank {rank}"
    if then == "SIGCONT":
        seconds = draw.uniform(1, 6)
        time.sleep(seconds)
        send(signal.SIGCONT, [trainers[rank]])
        return chain.still_trains(f"{what}, SIGCONT after {seconds:.1f} s", [])
    if then == "SIGKILL":
        moment(chain, draw)
        run.kill([trainers[rank]])
    begin = time.monotonic()
    status = run.wait(120)
    assert_dead(everything)
    problems = ["the run ended with status 0"] if status == 0 else []
    waited = f", the run ended by itself after {time.monotonic() - begin:.0f} s" if then == "timeout" else ", SIGKILL"
    return chain.go_on(what + waited, problems=problems)


def stop(chain: Chain, draw: Random, *, by: str) -> Outcome:
    """A request to stop: it saves the step that it is in, and goes on from it."""
    run = chain.training()
    moment(chain, draw)
    # It stops two steps later, as a rule: where nothing would be saved if it had not been asked.
    chain.wait_until(lambda: chain.last_logged() % INTERVAL > 0, "a step that is not saved")
    trainers, before = run.trainers(), chain.last_logged()
    rank = draw.choice(sorted(trainers))
    if by == "file":
        chain.stop_file.touch()
    else:
        name, _, whom = by.partition(" ")
        send(signal.Signals[name], [run.torchrun if whom == "torchrun" else trainers[rank]])
    status = run.wait(90)
    if status == 0 and chain.last_logged() == chain.setup.steps:
        raise Finished
    last, text, problems = chain.last_logged(), run.output(), []
    if f"step {last} is the last one for now" not in text:
        problems.append(f"it does not say where it stopped, in {run.log}")
    if chain.whole()[:1] != [last] or list(chain.checkpoints.glob("saving-*")):
        problems.append(f"it stopped after step {last}, and the newest save is {chain.whole()[:1]}")
    if "torchrun" not in by and not re.search(rf"exitcode\s+: {STOPPED} ", text):
        problems.append(f"the exit status is not {STOPPED}")
    if last > before + 3:
        problems.append(f"asked after step {before}, it stopped after step {last}")
    chain.stop_file.unlink(missing_ok=True)
    whom = f" (rank {rank})" if by.endswith("rank") else ""
    return chain.go_on(f"asked to stop by {by}{whom} after step {before}", expected=last, problems=problems)


def stop_at_once(chain: Chain, draw: Random) -> Outcome:
    """A second signal, before the step has ended: it stops without a save, or with the one of the first signal."""
    run = chain.training()
    moment(chain, draw)
    everything, trainer = run.all(), run.trainers()[0]
    send(signal.SIGTERM, [trainer])
    time.sleep(0.02)
    send(signal.SIGTERM, [trainer])
    status = run.wait(90)
    assert_dead(everything)
    return chain.go_on("SIGTERM twice", problems=["the run ended with status 0"] if status == 0 else [])


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


def second_run(chain: Chain, draw: Random, *, how: str) -> Outcome:
    """Two runs in one folder: one of them is refused, and the other one does not notice."""
    first = chain.training(room=65)
    if how == "both start at once":
        chain.wait_for_checkpoints(1)
        chain.kill()
        expected, last = chain.whole()[0], chain.last_logged()
        runs = [chain.start(), chain.start()]
        wait_for(lambda: any(run.ended() is not None for run in runs), "that one is refused")
        loser, chain.run = sorted(runs, key=lambda run: run.ended() is None)
        loser.wait()
        problems = one_line(loser, r"train: .*: a run is at work there \(process \d+ on")
        return chain.judge(Outcome(how, expected=expected, last_logged=last, problems=problems))
    folder = chain.folder
    if how == "by another name":
        folder = chain.base / "alias"
        folder.unlink(missing_ok=True)
        folder.symlink_to(chain.folder)
    trainers, holder = list(first.trainers().values()), first.trainers()[0].pid
    # Or the first would come to its end before the second has asked.
    send(signal.SIGSTOP, trainers)
    second = chain.start(folder=folder)
    wait_for(lambda: "Loading tokenizer" in second.output() or second.ended() is not None, "that the second starts")
    if how != "the first is held":
        send(signal.SIGCONT, trainers)
    second.wait(90)
    send(signal.SIGCONT, trainers)
    problems = one_line(second, rf"train: .*: a run is at work there \(process {holder} on")
    problems += ["the first has ended"] if first.ended() is not None else []
    return chain.still_trains(f"a second run, {how}", problems)


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
    chain.data = shutil.copytree(whole, chain.base / "changed", dirs_exist_ok=True)
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


def other_ranks(chain: Chain, draw: Random) -> Outcome:
    """Killed, and started again on one rank where there were two, or on two."""
    run = chain.training()
    chain.wait_for_checkpoints(1)  # the first weights depend on the number of ranks
    moment(chain, draw)
    everything = run.all()
    run.kill()
    assert_dead(everything)
    before, chain.ranks = chain.ranks, 3 - chain.ranks
    outcome = chain.go_on(f"{before} → {chain.ranks} ranks")
    outcome.command = "names the number of ranks"
    return outcome


# Numbers


def not_finite(chain: Chain, draw: Random, *, number: str) -> Outcome:
    """NaN or infinity on one rank. It stops before it logs or saves what came of it."""
    run = chain.training()
    moment(chain, draw)
    rank = draw.choice(sorted(run.trainers()))
    before = chain.last_logged()
    partial = chain.base / "new order"
    partial.write_text(number)
    partial.rename(f"{chain.orders}-{rank}")
    status, text = run.wait(90), run.output()
    problems = ["the run ended with status 0"] if status == 0 else []
    said = re.search(r"FloatingPointError: step \d+: .*must be finite|step \d+ is not saved: \S+ holds NaN", text)
    if not said:
        problems.append(f"it does not say why, in {run.log}")
    elif number == "saved weight":
        problems += one_line(run, r"step \d+ is not saved: \S+ holds NaN or infinite numbers \(on rank \d\)")
    for step in chain.whole():
        if step > chain.last_logged():
            problems.append(f"step-{step} was saved, and step {chain.last_logged()} is the last that was logged")
    return chain.go_on(f"{number} not finite on rank {rank} after step {before}", problems=problems)
