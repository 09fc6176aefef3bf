"""Whole runs whose checkpoints are cut off, damaged, poisoned or too large for the disk."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path

from torchtitan.experiments.lighthouse.runs.checkpoints import damage_in

from helpers.checkpoints import flip
from helpers.launch import command, environment, losses, run, train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def logged(folder: Path) -> dict[int, list[float]]:
    """Every loss that was logged for a step, the first one first."""
    found = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found[json.loads(line)["step"]].append(json.loads(line)["loss"])
    return found


def kill_all(process: subprocess.Popen) -> None:
    """Without warning: torchrun, and what it has started, which is in sessions of its own."""
    children = defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children[int(file.read_text().rpartition(")")[2].split()[1])].append(int(file.parent.name))
    doomed = [process.pid]
    for pid in doomed:
        doomed += children[pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def killed_while_saving(folder: Path, **settings: str) -> int | None:
    """Start a run and kill it while it writes a checkpoint after step 2. The step; None where the save was faster."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(folder, 1, **settings), env=environment(), **quiet)
    deadline = time.monotonic() + 120
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was killed"
            for data in (folder / "checkpoint").glob("saving-*/*.distcp"):
                step = int(data.parent.name.removeprefix("saving-"))
                with contextlib.suppress(FileNotFoundError):
                    if step > 2 and data.stat().st_size > 1_000_000:
                        kill_all(process)
                        return step if data.exists() else None
            time.sleep(0.001)
    finally:
        kill_all(process)


def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_save_before(tmp_path):
    settings = {"training__steps": "40", "lr_scheduler__total_steps": "40", "checkpoint__interval": "1"}
    attempts = (killed_while_saving(tmp_path, **settings) for _ in range(5))
    step = next(step for step in attempts if step is not None)
    assert f"step-{step}" not in names(tmp_path) and f"saving-{step}" in names(tmp_path)
    resumed = train(tmp_path, **settings | {"training__steps": str(step + 1)})
    output = resumed.stdout + resumed.stderr
    assert f"checkpoint/saving-{step}: this save did not finish; removed" in output
    assert f"Resuming after step {step - 1}\n" in output and f"Training starts at step {step}\n" in output
    assert names(tmp_path)[-1].startswith("step-") and "saving" not in "".join(names(tmp_path))
    assert all(damage_in(path, "digest") is None for path in (tmp_path / "checkpoint").iterdir())
    before, after = logged(tmp_path)[step]  # trained twice, from the same state
    assert before == after


def test_two_ranks_save_in_the_background_and_agree_on_what_is_damaged(tmp_path):
    settings = {"checkpoint__interval": "1", "checkpoint__keep_latest_k": "0"}
    train(tmp_path, 2, training__steps="3", checkpoint__async_mode="async", **settings)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    assert all(damage_in(path, "digest") is None for path in (tmp_path / "checkpoint").iterdir())
    # Of the second rank, in the middle, where only its content tells.
    flip(tmp_path / "checkpoint/step-3/__1_0.distcp", 4_000_000, 6)
    resumed = train(tmp_path, 2, training__steps="4", **settings)
    output = resumed.stdout + resumed.stderr
    said = r"step-3 is damaged: __1_0.distcp does not hold what was saved .*; set aside as .*damaged-3; using step-2"
    assert len(re.findall(said, output)) == 1
    assert names(tmp_path) == ["damaged-3", "step-1", "step-2", "step-3", "step-4"]
    before, after = logged(tmp_path)[3]
    assert before == after and list(losses(tmp_path)) == [1, 2, 3, 4]


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path):
    """Loss and gradients were finite: only the save looks at what the optimizer has made of them."""
    result = train(
        tmp_path, 2, check=False, training__steps="3", optimizer__lr="1e39", lr_scheduler__warmup_steps="0",
        checkpoint__interval="1",
    )  # fmt: skip
    assert result.returncode
    said = "step 1 is not saved: tok_embeddings.weight holds NaN or infinite numbers (on rank 0)"
    assert said in result.stdout + result.stderr
    assert not (tmp_path / "checkpoint/step-1").exists()


def test_a_save_that_does_not_fit_is_one_line_and_goes_on_with_room(tmp_path):
    """A limit of 4 MB for a file stands in for a full disk, which is not known before."""
    settings = {"training__steps": "2", "checkpoint__interval": "2"}
    limited = ["bash", "-c", 'ulimit -f 4096; exec "$@"', "bash", *command(tmp_path, 1, **settings)]
    full = run(limited, check=False)
    said = r"checkpoint/step-2 cannot be saved: File too large\. It needs 1[67],\d{3},\d{3} bytes, and [\d,]+ are free"
    assert full.returncode and re.search(said, full.stdout + full.stderr) and names(tmp_path) == []
    train(tmp_path, **settings)
    assert names(tmp_path) == ["step-2"]
