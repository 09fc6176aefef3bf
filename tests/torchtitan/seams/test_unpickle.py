"""A crafted checkpoint runs no program, wherever in it a pickle lies."""

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torchtitan.experiments.lighthouse.runs.checkpoints import damage_in, read_metadata
from torchtitan.experiments.lighthouse.seams.unpickle import AllowListPlanner, AllowListReader, Unsafe, unpickle


class Program:
    """Pickled, it is a shell command that leaves a file behind."""

    def __init__(self, left_behind):
        self.left_behind = left_behind

    def __reduce__(self):
        return os.system, (f"touch {self.left_behind}",)


@pytest.fixture
def left_behind(tmp_path):
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def save(state, folder):
    state_dict_saver.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(state, folder):
    reader, planner = AllowListReader(folder), AllowListPlanner()
    state_dict_loader.load(state, storage_reader=reader, planner=planner, no_dist=True)


def test_the_program_would_run(tmp_path):
    pickle.loads(pickle.dumps(Program(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_in_the_table_of_contents(left_behind, tmp_path):
    checkpoint = save({"weight": torch.ones(2)}, tmp_path / "step-1")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Program(left_behind)))
    with pytest.raises(Unsafe, match=r"\.metadata names posix\.system, which no checkpoint needs"):
        read_metadata(checkpoint)
    with pytest.raises(Unsafe, match=r"posix\.system"):  # not damage, for which another one would be taken
        damage_in(checkpoint, "digest")


def test_in_a_value(left_behind, tmp_path):
    checkpoint = save({"weight": torch.ones(2), "value": Program(left_behind)}, tmp_path / "step-1")
    with pytest.raises(BaseException, match="value in the checkpoint is no plain data"):
        load({"weight": torch.zeros(2), "value": 0}, checkpoint)


def test_in_a_data_position(left_behind, tmp_path):
    position = pickle.dumps({"sample": Program(left_behind)})
    checkpoint = save({"dataloader": {"dp_rank_0": position}}, tmp_path / "step-1")
    with pytest.raises(BaseException, match=r"dataloader\.dp_rank_0 in the checkpoint names posix\.system"):
        load({"dataloader": {"dp_rank_0": b""}}, checkpoint)


def test_what_checkpoints_hold_is_loaded_as_it_is(tmp_path):
    position = {"sample": 7, "buffer": [1, 2], "nested": {"a": (None, True, 1.5, "text", b"bytes", {3})}}
    state = {
        "dataloader": {"dp_rank_0": pickle.dumps(position), "world_size": 1},
        "lr_scheduler": {"base_lrs": [0.1, 0.2], "last_epoch": 3, "initial": False, "nothing": None},
        "weight": torch.arange(6.0).reshape(2, 3),
    }
    checkpoint = save(state, tmp_path / "step-1")
    found = {
        "dataloader": {"dp_rank_0": b"", "world_size": 0},
        "lr_scheduler": {"base_lrs": [], "last_epoch": 0, "initial": True, "nothing": 1},
        "weight": torch.zeros(2, 3),
    }
    load(found, checkpoint)
    assert pickle.loads(found["dataloader"].pop("dp_rank_0")) == position and found["dataloader"] == {"world_size": 1}
    assert found["lr_scheduler"] == state["lr_scheduler"] and torch.equal(found["weight"], state["weight"])


@pytest.mark.parametrize("name", ["Size.__reduce__", "serialization.pickle.loads", "load"])
def test_the_list_is_of_exact_names(name):
    data = b"\x80\x04\x8c" + bytes([5]) + b"torch\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    with pytest.raises(Unsafe):
        unpickle(data, "here", {("torch", "Size")})
