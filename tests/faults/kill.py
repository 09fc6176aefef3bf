"""Trains, kills the run twice, and compares it with a run that nothing has hit: bit for bit. For a GPU; on a CPU too.

    python tests/faults/kill.py --output OUT                                            # the debug model
    python tests/faults/kill.py --output OUT --config train_configs/32m_32k.toml -- --training.dataset_path=FOLDER

Both runs have the same settings, those after "--" included, and are deterministic (``debug.deterministic``). All
processes of the second get SIGKILL in the steps of ``--kill-in``, and the same command is started again. Then its
losses and gradient norms of all steps, those that were trained twice too, and all that the last checkpoint holds are
compared. Prints a line for each of these. Exit status 0 if all are equal, 1 if not.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch
from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs.checkpoints import complete_checkpoints_in, step_of

import lighthouse  # noqa: F401

# Behind all else, and after the packages under test: in the folder of tests, the tests of lighthouse have its name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from faults.chain import PARTS, logged, unequal_parts
from helpers.launch import CONFIG, load_checkpoint
from helpers.processes import Run

#: Seconds for a start, with its compilation, and all steps.
PATIENCE = 900


def main(arguments: list[str] | None = None) -> int:
    words, overrides = launch.split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder, which must not exist")
    parser.add_argument("--config", type=Path, default=CONFIG, help="(default: train_configs/debug.toml)")
    parser.add_argument("--steps", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--interval", type=int, default=10, help="steps between two saves (default: %(default)s)")
    parser.add_argument("--kill-in", type=int, nargs="+", default=[14, 27], metavar="STEP", help="(default: 14 27)")
    parser.add_argument("--nproc", type=int, default=1, help="processes (default: %(default)s)")
    options = parser.parse_args(words)
    for step in options.kill_in:
        if not options.interval < step <= options.steps:
            rule = f"must be after the first save, at step {options.interval}, and at most --steps {options.steps}"
            nearest = min(max(step, options.interval + 1), options.steps)
            parser.error(f"--kill-in {step}: {rule}; nearest valid value: {nearest}")
    if options.output.exists():
        parser.error(f"--output {options.output}: exists; name a new folder, or remove it")
    return int(not Killed(options, overrides).is_equal())


class Killed:
    """The two runs.

    Args:
        options: the command line's.
        overrides: settings of both runs.
    """

    def __init__(self, options: argparse.Namespace, overrides: list[str]) -> None:
        self.options, self.overrides = options, overrides
        self.folder = options.output.resolve()
        self.starts = 0
        (self.folder / "logs").mkdir(parents=True)

    def newest(self, name: str) -> int:
        """The step of the last checkpoint that is whole; 0 if there is none."""
        return max(map(step_of, complete_checkpoints_in(self.folder / name / "checkpoint")), default=0)

    def start(self, name: str) -> Run:
        """The run of this name, always by the same command."""
        settings = [
            *("--job.config_file", str(self.options.config.resolve()), f"--job.dump_folder={self.folder / name}"),
            *(f"--training.steps={self.options.steps}", f"--checkpoint.interval={self.options.interval}"),
            *("--checkpoint.enable", "--checkpoint.keep_latest_k=0", "--metrics.log_freq=1"),
            *("--debug.deterministic", "--debug.seed=0", *self.overrides),
        ]
        self.starts += 1
        log = self.folder / f"logs/{self.starts}-{name}.log"
        words = launch.trainer_command(launch.one_node(self.options.nproc), settings)
        # Other tests hide the GPUs from what they start.
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        return Run(words, log, CUDA_VISIBLE_DEVICES=gpus)

    def last_logged(self, name: str) -> int:
        return max((step for step, _ in logged(self.folder / name)), default=0)

    def train_to_the_end(self, name: str) -> None:
        newest, run = self.newest(name), self.start(name)
        try:
            self.wait_for_step(run, name, self.options.steps)
            status = run.wait(PATIENCE)
        finally:
            run.kill()
        if status != 0:
            raise SystemExit(f"kill.py: status {status} at the end of a run, see {run.log}")
        self.check_where_from(run, newest)

    def wait_for_step(self, run: Run, name: str, step: int) -> None:
        try:
            run.wait_until(lambda: self.last_logged(name) >= step, f"step {step}", PATIENCE)
        except AssertionError as error:
            raise SystemExit(f"kill.py: {error}") from None

    def kill_in(self, step: int) -> None:
        newest, run = self.newest("killed"), self.start("killed")
        try:
            self.wait_for_step(run, "killed", step - 1)
        finally:
            run.kill()
        self.check_where_from(run, newest)
        print(f"killed after step {self.last_logged('killed')} was logged", flush=True)

    def check_where_from(self, run: Run, newest: int) -> None:
        """A run that goes back further than it must, or starts over, is equal in the end, too."""
        found = re.search(r"Resuming after step (\d+)$", run.output(), re.M)
        resumed = int(found[1]) if found else 0
        print(f"{run.log.stem}: {f'resumed after step {resumed}' if resumed else 'from the beginning'}", flush=True)
        if resumed != newest:
            raise SystemExit(f"kill.py: NOT EQUAL: its newest checkpoint was of step {newest}, see {run.log}")

    def is_equal(self) -> bool:
        """Train both, compare, and print what is equal and what is not."""
        self.train_to_the_end("reference")
        for step in self.options.kill_in:
            self.kill_in(step)
        self.train_to_the_end("killed")
        steps = self.options.steps
        reference, killed = (logged(self.folder / name) for name in ("reference", "killed"))
        expected = dict(reference)
        wrong = sorted({step for step, numbers in killed if expected.get(step) != numbers})
        wrong += [step for step in range(1, steps + 1) if step not in dict(killed) or step not in expected]
        verdicts = {f"losses and gradient norms of {steps} steps, {len(killed)} lines": not wrong}
        checkpoints = [
            load_checkpoint(self.folder / name / f"checkpoint/step-{steps}", self.folder / "scratch")
            for name in ("reference", "killed")
        ]
        unequal = unequal_parts(*checkpoints)
        for part in ("weights", *PARTS.values()):
            there = any(PARTS.get(key, "weights") == part for key in checkpoints[0])
            verdicts[f"{part} after step {steps}"] = there and part not in unequal
        for what, equal in verdicts.items():
            print(f"{what}: {'EQUAL' if equal else 'NOT EQUAL'}")
        if wrong:
            print(f"first step that differs: {min(wrong)}")
        return all(verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
