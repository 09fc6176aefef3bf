"""`scripts/multinode.slurm` with programs that stand in for Slurm's: what becomes of the job when the run has ended."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts/multinode.slurm"
ENVIRONMENT = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}

#: A run that goes on until its file asks it to stop, and ends with torchrun's status: 1 where it was stopped.
UNTIL_ASKED = """
touch running
for _ in $(seq 200); do
    [ -e "$LIGHTHOUSE_STOP_FILE" ] && exit 1
    sleep 0.05
done
exit 9
"""


class Job:
    """The script, in a folder of its own.

    Args:
        run: what `srun` does, in bash.
    """

    def __init__(self, folder: Path, run: str, **variables: str) -> None:
        self.folder = folder
        programs = {"srun": f'echo "$@" > started\n{run}', "scontrol": 'echo n1; echo "$@" >> asked_slurm'}
        for name, body in programs.items():
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"#!/bin/bash\n{body}\n")
            file.chmod(0o755)
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").touch()
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", SCRIPT, "a.toml", "--training.steps", "3"],
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"PATH": path} | variables,
            stdout=subprocess.DEVNULL,
        )

    @property
    def requeued(self) -> bool:
        return "requeue 7" in (self.folder / "asked_slurm").read_text()


def test_near_its_time_limit_the_run_is_asked_to_stop_and_the_job_comes_back(tmp_path):
    """However often it has, and not as a crash."""
    job = Job(tmp_path, UNTIL_ASKED, SLURM_RESTART_COUNT="5")
    while not (tmp_path / "running").exists():
        assert job.process.poll() is None
        time.sleep(0.02)
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(20) == 0
    assert job.requeued
    words = (tmp_path / "started").read_text().split()
    assert words[-4:] == ["--job.config_file", "a.toml", "--training.steps", "3"]


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, "0", False), (2, "0", True), (2, "1", True), (2, "2", False)]
)
def test_a_crash_is_tried_again_twice_and_what_is_complete_is_not(status, restarts, requeued, tmp_path):
    job = Job(tmp_path, f"exit {status}", SLURM_RESTART_COUNT=restarts)
    assert job.process.wait(20) == status
    assert job.requeued == requeued


def test_a_run_that_was_complete_when_it_was_asked_does_not_come_back(tmp_path):
    job = Job(tmp_path, UNTIL_ASKED.replace("exit 1", "exit 0"))
    while not (tmp_path / "running").exists():
        assert job.process.poll() is None
        time.sleep(0.02)
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(20) == 0
    assert not job.requeued
