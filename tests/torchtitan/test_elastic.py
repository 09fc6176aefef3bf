"""Whole runs over gloo whose number of processes changes, and one that an older version started."""

import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse.data.text_datasets import build_rank_dataloader
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer

from helpers.launch import SMALL, flags, load_checkpoint, losses, metrics, train
from helpers.settings import parse

#: Four sequences per step, dense: selections that nearly tie would make more of rounding.
STEADY = {"training__global_batch_size": "4", "lighthouse__no_enable": None}


def position(run: Path, step: int, scratch: Path) -> dict[str, str]:
    saved = load_checkpoint(run / f"checkpoint/step-{step}", scratch)["dataloader"]
    return {key: value for key, value in saved.items() if key != "streams"}


def test_a_run_goes_on_alike_on_four_ranks_and_on_two_and_then_one(tmp_path):
    """In losses to rounding, and in its data position exactly. The two are two pairs: each splits its sequences."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(whole, 2, training__steps="2", **STEADY)  # the first weights depend on the number of ranks
    shutil.copytree(whole, moved)
    train(whole, 4, training__steps="5", **STEADY)
    train(moved, 4, training__steps="4", parallelism__context_parallel_degree="2", **STEADY)
    train(moved, 1, training__steps="5", training__local_batch_size="2", **STEADY)
    ours, theirs = losses(moved), losses(whole)
    assert list(ours) == list(theirs) == list(range(1, 6))
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step
    for run in (whole, moved):
        assert [record["tokens_seen"] for record in metrics(run)] == [step * 4 * 1024 for step in range(1, 6)]
    ours, theirs = (position(run, 5, tmp_path / f"all-{run.name}") for run in (moved, whole))
    assert ours == theirs and ours.keys() == {f"stream_{number}" for number in range(4)}


def test_a_run_of_an_older_version_goes_on_with_its_own_data(tmp_path):
    """Its checkpoint, made of one of today's: the data position is that of a reader per rank."""
    train(tmp_path, training__steps="2", training__local_batch_size="2")
    step = tmp_path / "checkpoint/step-2"
    saved = load_checkpoint(step, tmp_path / "all")
    settings = parse("debug.toml", *flags(SMALL | {"training.local_batch_size": "2"}))
    older = build_rank_dataloader(settings.training, 1, 0, build_tokenizer(settings), True)
    batches = iter(older)
    for _ in range(5):
        next(batches)
    saved["dataloader"] = older.state_dict()
    shutil.rmtree(step)
    dcp.save(saved, checkpoint_id=step, no_dist=True)

    train(tmp_path, training__steps="3", training__local_batch_size="2")
    assert list(losses(tmp_path)) == [1, 2, 3]
    after = load_checkpoint(tmp_path / "checkpoint/step-3", tmp_path / "all")["dataloader"]
    assert after.keys() == {"dp_rank_0", "world_size"}
    next(batches)  # What the third step has trained on.
    again = build_rank_dataloader(settings.training, 1, 0, build_tokenizer(settings), True)
    again.load_state_dict(after)
    assert next(iter(again))[0]["input"].equal(next(batches)[0]["input"])
