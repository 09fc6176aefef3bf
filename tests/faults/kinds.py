"""Faults of processes and numbers. Each hits the run of a chain, starts it again where it ended, and says what came."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from random import Random

from faults.chain import INTERVAL, Chain, Finished, Outcome
from faults.moments import caught_while_saving, moment, one_line
from helpers.processes import Process, Run, assert_dead, send, wait_for

STOPPED = 75


# Killing


def victims_of(run: Run, who: str, draw: Random) -> list[Process]:
    trainers = run.trainers()
    if who == "all":
        return run.all()
    if who == "torchrun":
        return [run.torchrun]
    return [trainers[draw.choice(sorted(trainers))]]


def kill(chain: Chain, draw: Random, *, who: str, saving: bool = False) -> Outcome:
    """SIGKILL at a random moment, or in the middle of a save. Those that are meant are seen to die, and the rest goes
    down with them by itself."""
    run = chain.training()
    # With fewer, to load nothing, or the save before the newest, might be right.
    chain.wait_for_checkpoints(2)
    if not saving:
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


# Several runs, other ranks


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
