"""Whole runs whose checkpoints are poisoned or too large for the disk. Kills and damage: tests/faults."""

import re
from pathlib import Path

from helpers.launch import command, run, train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


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
