"""Injects faults into real training runs, one after the other, and says what became of each.

    python tests/faults/inject.py --output OUT             # all of them; again: those that are missing
    python tests/faults/inject.py --output OUT --only kill # the kinds whose name begins so
    python tests/faults/inject.py --list                   # which, without injecting any
    python tests/faults/inject.py --output OUT --break     # resume broken on purpose: it must say NOT EQUAL

The debug model trains on CPU, on one or two ranks, with a save after every second step. A run goes on after each fault
by the same command, and two to three steps later its checkpoint (weights, optimizer, schedule, counters, data
position) and each loss that it has logged are compared with those of a run that nothing has hit. That one is trained
first, twice, to see that it gives the same bits. Then the next fault hits the same run. When it comes to its last step,
it is compared once more, and a new one starts.

OUT/results.jsonl has a line for each fault, OUT/faults.csv is a list, and OUT/table.md a table by kind. Exit status 0
if all were survived, without a manual step, and bit-equal; else 1. Where nothing can be mounted, faults of disks are
left out, and named.
"""

# ruff: noqa: E402  (run alone, it has to find the packages beside it first)

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
from torch.distributed.checkpoint.api import CheckpointException

from faults.chain import Chain, Outcome, Reference, Setup, unequal_parts, write_corpus
from faults.elastic import ElasticChain
from faults.faulty_trainer import BREAKS
from faults.mounts import can_mount
from faults.plan import Fault, planned
from faults.table import render, write_list

FAULTY_TRAINER = (str(Path(__file__).with_name("faulty_trainer.py")),)
DENSE = {"lighthouse.no-enable": None}
SKIPPING = {"training.max_bad_records": "100"}
TMPFS = 400 << 20

#: The runs that are hit: settings, and which reference they are compared with.
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one": ("one", 1, {}),
    "two": ("two", 2, {}),
    "two, saving in the background": ("two", 2, {"checkpoint.async_mode": "async"}),
    "one, with a data worker": ("one", 1, {"training.dataloader.num_workers": "1"}),
    "one, a disk of its own": ("one", 1, {}),
    "two, a disk of its own": ("two", 2, {}),
    "one, faulty": ("one", 1, {}),
    "two, faulty": ("two", 2, {}),
    "elastic": ("dense two", 2, DENSE),
    "one, bad records": ("bad one", 1, SKIPPING),
}


def commit() -> str:
    """Of the code that is at fault, if any is."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


class Injector:
    """
    Args:
        output: for everything.
        seed: of what the faults draw.
    """

    def __init__(self, output: Path, seed: int) -> None:
        self.output, self.seed = output, seed
        self.results = output / "results.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        self.data, self.bad_data = write_corpus(output / "data"), write_corpus(output / "bad data", bad=True)
        self._references: dict[str, Reference] = {}
        self._chains: dict[str, Chain] = {}

    def reference(self, name: str) -> Reference:
        if name not in self._references:
            settings = DENSE if name.startswith("dense") else SKIPPING if name.startswith("bad") else {}
            setup = Setup(2 if name.endswith("two") else 1, self.bad_data if "bad" in name else self.data, settings)
            # The first weights depend on the number of ranks (on CPU, torch draws them by shard).
            start = self.reference("dense two") if name == "dense one" else None
            self._references[name] = Reference(self.output / f"reference {name}", setup, start=start)
            if name in ("one", "two"):
                self._see_it_repeat(name, setup)
            if name == "bad one":
                # A bad record is as if it were not there. (Only the position counts it.)
                assert self._references[name].losses == self.reference("one").losses
        return self._references[name]

    def _see_it_repeat(self, name: str, setup: Setup) -> None:
        """Whether the same run without faults gives the same bits: else no other could."""
        known = self.output / f"reference {name}/repeats"
        if not known.exists():
            first, again = self._references[name], Reference(self.output / f"reference {name} again", setup)
            last = setup.steps
            assert first.losses == again.losses and not unequal_parts(first.state(last), again.state(last)), (
                f"two runs without faults differ ({name}): nothing can be compared here"
            )
            known.touch()
            shutil.rmtree(again.folder.parent)

    def chain(self, name: str) -> Chain:
        if name not in self._chains:
            reference, ranks, settings = RUNS[name]
            data = self.bad_data if "bad" in name else self.data
            setup = Setup(ranks, data, settings, **({"program": FAULTY_TRAINER} if "faulty" in name else {}))
            folder, disk = self.output / f"run {name}", TMPFS if "disk" in name else None
            if name == "elastic":
                chain: Chain = ElasticChain(folder, setup, self.reference(reference), self.reference("dense one"))
            else:
                chain = Chain(folder, setup, self.reference(reference), disk=disk)
            self._chains[name] = chain
        return self._chains[name]

    def done(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def inject(self, fault: Fault) -> bool:
        """Whether all is well."""
        chain, begin = self.chain(fault.run), time.monotonic()
        ends: list[Outcome] = []
        try:
            outcomes, ends = chain.hit(fault.inject, Random(f"{self.seed} {fault.ids[0]}"), **fault.arguments)
        except (Exception, CheckpointException):  # torch's is no Exception
            outcomes = [Outcome("the injection failed", problems=[traceback.format_exc()])] * len(fault.ids)
        seconds = (time.monotonic() - begin) / len(fault.ids)
        for name, outcome in zip(fault.ids, outcomes, strict=True):
            self.record(name, fault.kind, fault.run, outcome, seconds)
        for outcome in ends:
            number = sum(result["kind"] == "end" for result in self.done())
            self.record(f"end-{number}", "end", fault.run, outcome, 0.0)
        well = all(outcome.survived and outcome.bit_equal for outcome in [*outcomes, *ends])
        if not well:
            chain.reset()
        return well

    def record(self, name: str, kind: str, run: str, outcome: Outcome, seconds: float) -> None:
        line = {"id": name, "kind": kind, "run": run, **vars(outcome)}
        line |= {"survived": outcome.survived, "bit_equal": outcome.bit_equal}
        line |= {"manual_steps": outcome.manual_steps, "seconds": round(seconds, 1), "commit": commit()}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        verdict = "EQUAL" if outcome.bit_equal else f"NOT EQUAL ({', '.join(outcome.unequal) or 'not compared'})"
        print(
            f"{time.strftime('%H:%M:%S')} {name} [{run}] {outcome.what}: last step logged {outcome.last_logged}, "
            f"resumed from {outcome.resumed_from}, compared at {outcome.compared_at}: {verdict}"
            + "".join(f"\n    PROBLEM {problem}" for problem in outcome.problems),
            flush=True,
        )

    def broken(self) -> bool:
        """Whether this program sees each way in which resuming is broken on purpose."""
        seen = []
        for how in BREAKS:
            chain = self.chain("one, faulty")
            chain.reset()
            chain.training()
            chain.wait_for_checkpoints(2)
            chain.kill()
            outcome = chain.go_on(f"resume broken: {how}", variables={"LIGHTHOUSE_BREAK": how})
            self.record(f"break-{len(seen)}", "break", "one, faulty", outcome, 0.0)
            seen.append(not (outcome.survived and outcome.bit_equal))
            chain.reset()
        return all(seen)

    def close(self) -> None:
        for chain in self._chains.values():
            chain.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a folder; about 6 GB while it runs")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    parser.add_argument("--only", metavar="KIND", default="", help="kinds whose name begins so")
    parser.add_argument("--list", action="store_true", help="list the faults, and end")
    parser.add_argument("--break", dest="breaks", action="store_true", help="break resuming, and see that it is seen")
    options = parser.parse_args(arguments)
    faults = [fault for fault in planned(options.seed) if fault.kind.startswith(options.only)]
    if options.list:
        print("\n".join(f"{name}: {fault}" for fault in faults for name in fault.ids))
        return 0
    if options.output is None:
        parser.error("--output is needed")
    injector = Injector(options.output.resolve(), options.seed)
    # What was started and mounted goes with this program. (torch would swallow an exception.)
    signal.signal(signal.SIGTERM, lambda *_: (injector.close(), os._exit(1)))
    try:
        if options.breaks:
            return int(not injector.broken())
        return int(not inject_all(injector, faults))
    finally:
        injector.close()


def inject_all(injector: Injector, faults: list[Fault]) -> bool:
    done = {result["id"] for result in injector.done()}
    mounts = can_mount()
    well = True
    for fault in faults:
        if done.issuperset(fault.ids):
            continue
        if fault.mounts and not mounts:
            print(f"{', '.join(fault.ids)}: left out, nothing can be mounted here")
            continue
        well = injector.inject(fault) and well
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    table = render(injector.done(), f"seed {injector.seed}, {versions}")
    (injector.output / "table.md").write_text(table)
    write_list(injector.output / "faults.csv", injector.done())
    print(table)
    return well


if __name__ == "__main__":
    sys.exit(main())
