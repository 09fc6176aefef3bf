import argparse
import gzip
import json
import sys

import matplotlib.pyplot as plt
import pytest
from recoverability import ARMS, Job, draw, jobs_of, pieces, prepare, read_curves, run, table

OPTIONS = {"steps": 1600, "overrides": []}


def write_books(folder):
    folder.mkdir()
    for name, count in (("books-train.00.json.gz", 5), ("books-validation.00.json.gz", 2)):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            for i in range(count):
                file.write(json.dumps({"text": f"{name[6]}{i} " + "abcdefgh" * 40}) + "\n")
    return folder


def test_text_is_cut_whole_shuffled_by_seed_and_held_out_apart(tmp_path):
    books = write_books(tmp_path / "books")
    train = pieces([books], "train", 100)
    assert "".join(train) == "\n\n".join(f"t{i} " + "abcdefgh" * 40 for i in range(5))[: 100 * len(train)]
    prepare([books], tmp_path / "text", 101)
    read = {
        path.relative_to(tmp_path / "text").as_posix(): [
            json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).splitlines()
        ]
        for path in (tmp_path / "text").rglob("*.gz")
    }
    first, second = read["seed0/train.jsonl.gz"], read["seed1/train.jsonl.gz"]
    assert first != second and sorted(first) == sorted(second) == sorted(train)
    held_out = read["seed0/validation.jsonl.gz"]
    assert held_out == read["seed1/validation.jsonl.gz"] and sorted(held_out) == sorted(
        pieces([books], "validation", 100)
    )
    with pytest.raises(SystemExit, match="too little text"):
        prepare([books], tmp_path / "more", 10**6)


def test_every_split_starts_from_a_checkpoint_that_stage_1_saves(tmp_path):
    options = argparse.Namespace(**OPTIONS, output=tmp_path)
    stage1, *rest = jobs_of(next(arm for arm in ARMS if arm.splits == (10, 11, 12)), options)
    saved = {100 * n for n in range(1, 13)}
    assert "--checkpoint.interval=100" in stage1.command and stage1.last_step == 1200
    for split, job in zip((10, 11, 12), rest, strict=True):
        start = next(part for part in job.command if "/checkpoint/step-" in part)
        assert int(start.rpartition("-")[2]) == split * 100 and split * 100 in saved
        assert job.after is stage1 and job.last_step == 1600


def test_a_job_whose_start_failed_is_not_run(tmp_path):
    def job(name, code, after=None):
        return Job(tmp_path / name, [sys.executable, "-c", f"print('ran'); raise SystemExit({code})"], 1, after)

    stage1, dense = job("stage1", 3), job("dense", 0)
    jobs = [stage1, job("stage2", 0, after=stage1), dense, job("more", 0, after=dense)]
    run(jobs)
    assert [job.code for job in jobs] == [3, 3, 0, 0]
    assert {path.stem for path in tmp_path.glob("*.log")} == {"stage1", "dense", "more"}


def test_the_report_reads_gap_spike_recovery_and_time(tmp_path, monkeypatch):
    """Losses by formula: the arm ends 0.1 above dense, jumps by 1.5 and is back at Stage 1's level 200 steps later."""
    arms = [arm for arm in ARMS if arm.name in ("dense", "norm k512, seed 1", "dense, seed 1")]
    options = argparse.Namespace(**OPTIONS, output=tmp_path, arms=arms)

    def record(folder, steps, loss, rate, held_out=None):
        folder.mkdir(parents=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for step in steps:
                line = {"step": step, "loss": loss(step), "tokens_seen": 10 * step, "tokens_per_second": rate}
                file.write(json.dumps(line) + "\n")
            if held_out:
                file.write(json.dumps({"step": steps[-1], "validation_loss": held_out}) + "\n")

    for name in ("dense", "dense-seed-1"):
        record(tmp_path / name / "dense", range(1, 1601), lambda step: 2.0, 10, held_out=2.0)
    record(tmp_path / "norm-k512-seed-1/stage1", range(5, 1001, 5), lambda step: 2.5, 20)
    after = lambda step: 4.0 if step == 1001 else 2.6 if step <= 1100 else 2.1  # noqa: E731
    record(tmp_path / "norm-k512-seed-1/stage2-10-6", range(1001, 1601), after, 10, held_out=2.125)
    curves = read_curves(options)
    row = next(line for line in table(curves).splitlines() if line.startswith("| norm"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == ["norm k512, seed 1, 10:6", "1,600", "2.1250", "+0.1250", "2.1000", "+0.1000", "+1.500"]
    assert 100 < int(cells[7]) <= 200
    assert cells[8:] == ["1100", "1.45"]  # 1,000 steps at twice the rate, then 600

    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw([curve for curve in curves if curve.seed == 1], tmp_path / "curves.png")
    losses, gaps = ([line.get_ydata() for line in axes.lines] for axes in plt.gcf().axes)
    # From step 101 on: dense, Stage 1 at every fifth step, its dense tail.
    assert [len(line) for line in losses if len(line)] == [1500, 180, 600]
    assert [list(line) for line in gaps] == [[0.125], [0, 0]]
