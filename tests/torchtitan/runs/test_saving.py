"""Checkpoints in one process: whole or absent, finite, checked before they are used."""

import errno
import json
import logging
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs import manifest, saving
from torchtitan.experiments.lighthouse.runs.checkpoints import complete_checkpoints_in, damage_in, find_checkpoint
from torchtitan.experiments.lighthouse.seams import checkpoint as seam

from faults import flips
from helpers.checkpoints import flip, manager, truncate


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def log(caplog):
    logger = logging.getLogger()
    caplog.set_level(logging.INFO)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def save(checkpoints, *steps, last=False):
    for step in steps:
        checkpoints.states["train_state"].state = {"step": step}
        torch.nn.init.constant_(checkpoints.model.weight, step)
        checkpoints.save(step, last_step=last)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def loaded_step(folder: Path, step: int = -1, **settings) -> int:
    """The step that a new process would go on from; the weights are that step's."""
    again = manager(folder, **settings)
    if not again.load(step):
        return 0
    found = again.states["train_state"].state["step"]
    assert (again.model.weight == found).all()
    assert pickle.loads(again.states["dataloader"].state["dp_rank_0"])["sample"] == 7
    return found


def test_a_checkpoint_carries_a_manifest_and_comes_back(tmp_path):
    save(manager(tmp_path), 1, 2)
    step = tmp_path / "checkpoint/step-2"
    body = json.loads((step / "manifest.json").read_text())["manifest"]
    assert body["step"] == 2 and body["settings"] == {"a": 1.5} and body["fingerprints"] == {}
    assert sorted(body["files"]) == sorted(file.name for file in step.iterdir() if file.name != "manifest.json")
    assert names(tmp_path) == ["step-1", "step-2"] and loaded_step(tmp_path) == 2 and loaded_step(tmp_path, 1) == 1


def test_every_one_of_64_random_flips_is_found(tmp_path, capsys):
    """The whole, 1,000 in a checkpoint of two ranks, is tests/faults/flips.py."""
    save(manager(tmp_path), 1)
    assert flips.main([str(tmp_path / "checkpoint/step-1"), "--flips", "64"]) == 0
    assert "64 of 64 flips found" in capsys.readouterr().out


def test_what_each_kind_of_check_finds(tmp_path):
    save(manager(tmp_path), 1)
    step = tmp_path / "checkpoint/step-1"
    data = step / "__0_0.distcp"
    flip(data, 100, 3)
    assert [damage_in(step, verify) is not None for verify in ("digest", "size", "off")] == [True, False, False]
    truncate(data)
    assert re.search(r"__0_0.distcp has [\d,]+ bytes of", damage_in(step, "size"))
    data.unlink()
    assert damage_in(step, "size") == "__0_0.distcp is missing"


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "empty", "zeroed"])
def test_a_file_that_is_gone_empty_or_zeroed_is_found(name, how, tmp_path):
    save(manager(tmp_path), 1)
    step = tmp_path / "checkpoint/step-1"
    file = step / name
    size = file.stat().st_size
    file.unlink()
    if how != "missing":
        file.write_bytes(b"" if how == "empty" else bytes(size))
    assert step in complete_checkpoints_in(step.parent) or name == "manifest.json"
    assert name in damage_in(step, "digest")


def test_a_damaged_newest_is_named_once_set_aside_and_the_newest_sound_one_used(tmp_path, log):
    save(manager(tmp_path), 1, 2, 3)
    truncate(tmp_path / "checkpoint/step-3/__0_0.distcp")
    flip(tmp_path / "checkpoint/step-2/__0_0.distcp", 5000, 0)
    assert loaded_step(tmp_path) == 1
    assert re.search(r"step-3 is damaged: __0_0.distcp has .* set aside as .*damaged-3; using step-1", log.text)
    assert re.search(r"step-2 is damaged: __0_0.distcp does not hold .* set aside as .*damaged-2; using", log.text)
    assert names(tmp_path) == ["damaged-2", "damaged-3", "step-1"]
    log.clear()
    assert loaded_step(tmp_path) == 1 and "set aside" not in log.text
    # The same step again, damaged again: both are kept.
    save(manager(tmp_path), 3)
    truncate(tmp_path / "checkpoint/step-3/__0_0.distcp")
    assert loaded_step(tmp_path) == 1 and names(tmp_path) == ["damaged-2", "damaged-3", "damaged-3.2", "step-1"]


def test_the_checkpoint_that_is_used_is_compared_with_the_run(tmp_path, log):
    """Also where it is not the newest: it may be of other settings. Refused, nothing is moved."""
    save(manager(tmp_path), 1, 2)
    truncate(tmp_path / "checkpoint/step-2/__0_0.distcp")
    again = manager(tmp_path)

    def compare(checkpoint: Path) -> None:
        raise Refused(f"{checkpoint.name} is of another run")

    again.compare = compare
    with pytest.raises(Refused, match="step-1 is of another run"):
        again.load()
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_step_that_was_named_is_refused_not_replaced(tmp_path):
    save(manager(tmp_path), 1, 2)
    truncate(tmp_path / "checkpoint/step-2/__0_0.distcp")
    with pytest.raises(Refused, match=r"load_step=2\) is damaged: __0_0.distcp has"):
        loaded_step(tmp_path, 2)
    with pytest.raises(Refused, match=r"load_step=7: .*step-7 is not there; complete ones: 1, 2"):
        loaded_step(tmp_path, 7)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_run_without_a_sound_checkpoint_does_not_start_over(tmp_path):
    save(manager(tmp_path), 1, 2)
    for step in (1, 2):
        truncate(tmp_path / f"checkpoint/step-{step}/__0_0.distcp")
    with pytest.raises(Refused, match=r"holds no sound checkpoint .* never starts over by itself"):
        loaded_step(tmp_path)
    assert names(tmp_path) == ["step-1", "step-2"]


def test_a_run_that_only_loads_moves_nothing(tmp_path, log):
    save(manager(tmp_path), 1, 2)
    truncate(tmp_path / "checkpoint/step-2/__0_0.distcp")
    (tmp_path / "checkpoint/saving-3").mkdir()
    assert loaded_step(tmp_path, load_only=True) == 1 and "step-2 is damaged" in log.text
    assert names(tmp_path) == ["saving-3", "step-1", "step-2"]


def test_the_checkpoint_that_a_run_starts_from_is_checked_too(tmp_path):
    save(manager(tmp_path / "before"), 4)
    origin = tmp_path / "before/checkpoint/step-4"
    start = {"initial_load_path": str(origin), "initial_load_model_only": False}
    (tmp_path / "run/checkpoint/saving-5").mkdir(parents=True)  # killed in its first save: it starts again
    assert loaded_step(tmp_path / "run", **start) == 4
    flip(origin / "__0_0.distcp", 3000, 5)
    with pytest.raises(Refused, match=r"initial_load_path: .*step-4 is damaged: __0_0.distcp does not hold"):
        loaded_step(tmp_path / "run", **start)


def test_a_checkpoint_without_a_manifest_counts_by_its_sizes(tmp_path):
    """An older version saved it, or another program."""
    ours = manager(tmp_path)
    save(ours, 1)
    old = tmp_path / "checkpoint/step-2"
    state = {**ours._flattened_model_states_sd(), "weight": torch.full((64, 64), 2.0)}
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    state_dict_saver.save(state | {"train_state": {"step": 2}}, checkpoint_id=old)
    assert damage_in(old, "digest") is None and loaded_step(tmp_path) == 2
    truncate(old / "__0_0.distcp")
    assert "bytes of at least" in damage_in(old, "digest") and loaded_step(tmp_path) == 1


class Killed(BaseException):
    """Nothing cleans up after it: what is on the disk is what a kill would leave there."""


#: Where a save is cut off: a function, and whether a call of it with these arguments is the place.
PLACES = {
    "before the manifest": (manifest, "write", lambda *_: True),
    "before the renames": (manifest, "put_in_place", lambda *_: True),
    "between the renames": (Path, "rename", lambda path, to: (path.name, Path(to).name) == ("saving-2", "step-2")),
    "after the renames": (shutil, "rmtree", lambda path: Path(path).name == "replaced-2"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_step_saved_again_is_the_old_or_the_new_one_wherever_it_is_cut_off(place, tmp_path, monkeypatch):
    save(manager(tmp_path), 1, 2)
    data = tmp_path / "checkpoint/step-2/__0_0.distcp"
    before = data.stat().st_mtime_ns
    owner, name, is_here = PLACES[place]
    original = getattr(owner, name)

    def cut_off(*words, **options):
        if is_here(*words):
            raise Killed
        return original(*words, **options)

    with monkeypatch.context() as killing:
        killing.setattr(owner, name, cut_off)
        with pytest.raises(BaseException, match="Killed"):
            save(manager(tmp_path), 2)
    assert damage_in(tmp_path / "checkpoint/step-1", "digest") is None
    assert loaded_step(tmp_path) == 2 and names(tmp_path) == ["step-1", "step-2"]
    assert (data.stat().st_mtime_ns != before) == (place in ("between the renames", "after the renames"))


def test_a_save_that_was_whole_gets_its_name(tmp_path, log):
    save(manager(tmp_path), 1, 2)
    (tmp_path / "checkpoint/step-2").rename(tmp_path / "checkpoint/saving-2")
    (tmp_path / "checkpoint/step-2").mkdir()  # which another program has not finished
    assert loaded_step(tmp_path) == 2 and "it gets it now" in log.text
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "moments"])
def test_what_is_not_finite_is_not_saved(value, where, tmp_path):
    checkpoints = manager(tmp_path)
    save(checkpoints, 1)
    with torch.no_grad():
        if where == "weights":
            checkpoints.model.bias[63] = value
        else:
            checkpoints.states["optimizer"].state["exp_avg"][63, 63] = -value
    name = "bias" if where == "weights" else "optimizer.exp_avg"
    with pytest.raises(Refused, match=f"step 2 is not saved: {name} holds NaN or infinite numbers"):
        save(checkpoints, 2)
    assert names(tmp_path) == ["step-1"] and loaded_step(tmp_path) == 1


def test_purging_keeps_the_newest_sound_ones_and_the_last_one_of_a_stage(tmp_path):
    checkpoints = manager(tmp_path, keep_latest_k=2)
    save(checkpoints, 1)
    save(checkpoints, 2, last=True)  # where a stage ended, and was made longer since
    save(checkpoints, 3, 4)
    truncate(tmp_path / "checkpoint/step-4/__0_0.distcp")
    (tmp_path / "checkpoint/step-9").mkdir()  # of another program, unfinished
    save(checkpoints, 5)
    checkpoints.close()
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-5", "step-9"]
    checkpoints = manager(tmp_path, keep_latest_k=2)
    save(checkpoints, 6)
    checkpoints.close()
    assert names(tmp_path) == ["step-2", "step-5", "step-6", "step-9"]


def test_too_little_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = manager(tmp_path)
    save(checkpoints, 1)
    with monkeypatch.context() as full:
        full.setattr(saving, "free_bytes", lambda _: 1000)
        with pytest.raises(
            Refused, match=r"step-2 cannot be saved: not enough room. It needs 33,\d\d\d .* and 1,000 are"
        ):
            save(checkpoints, 2)
        assert names(tmp_path) == ["step-1"]
    save(checkpoints, 2)
    assert loaded_step(tmp_path) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_fills_up_while_saving(mode, small_disk, monkeypatch):
    """One line, with the path and the numbers; half a save is removed; it goes on where there is room again."""
    checkpoints = manager(small_disk, async_mode=mode)
    save(checkpoints, 1)
    checkpoints._async_wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(60_000))
    monkeypatch.setattr(saving.SoundCheckpoints, "_needed", 0)
    real = saving.free_bytes
    monkeypatch.setattr(saving, "free_bytes", lambda path: 10**9)  # as a quota: it is not known beforehand
    with pytest.raises(Refused, match=r"step-2 cannot be saved: (No space left on device|Disk quota)"):
        save(checkpoints, 2)
        checkpoints._async_wait()
    monkeypatch.setattr(saving, "free_bytes", real)
    assert names(small_disk) == ["step-1"] and loaded_step(small_disk) == 1
    filler.unlink()
    save(checkpoints, 2)
    checkpoints.close()
    assert loaded_step(small_disk) == 2


def test_a_folder_that_cannot_be_written_is_said_before_the_run(small_disk):
    saving.check_writable(small_disk / "checkpoint")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        Refused, match=r"checkpoint: no checkpoint can be saved there: Read-only file system \([\d,]+ bytes"
    ):
        saving.check_writable(small_disk / "checkpoint")


def test_no_rank_waits_for_one_that_failed():
    def fails():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(Refused, match="broken"):
        seam.on_first_rank(fails)


def test_saving_in_the_background(tmp_path, log):
    """The weights of the step, though training goes on at once; complete when the run closes; purged all the same."""
    checkpoints = manager(tmp_path, async_mode="async", keep_latest_k=2)
    save(checkpoints, 1, 2, 3, 4)
    torch.nn.init.constant_(checkpoints.model.weight, 99)
    checkpoints.close()
    assert all(damage_in(path, "digest") is None for path in complete_checkpoints_in(tmp_path / "checkpoint"))
    assert loaded_step(tmp_path) == 4 and len(names(tmp_path)) <= 3
    said = re.findall(r"(Sav(?:ing|ed)) \S*/step-(\d)", log.text)
    assert sorted(said) == [(word, str(step)) for word in ("Saved", "Saving") for step in (1, 2, 3, 4)]


def test_saving_in_another_process(tmp_path, monkeypatch, log):
    """``async_with_pinned_mem``, without what needs a GPU in it: writer, digests and seal go to the process."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    checkpoints = manager(tmp_path, async_mode="async_with_pinned_mem")
    monkeypatch.undo()
    checkpoints.stager = DefaultStager(StagingOptions(False, True, True, False))
    for step in (1, 2):
        save(checkpoints, step)
        checkpoints.maybe_wait_for_staging()  # upstream's trainer does, before it changes the weights
    torch.nn.init.constant_(checkpoints.model.weight, 99)
    checkpoints.close()
    assert names(tmp_path) == ["step-1", "step-2"] and loaded_step(tmp_path) == 2 and loaded_step(tmp_path, 1) == 1
    assert all(damage_in(path, "digest") is None for path in complete_checkpoints_in(tmp_path / "checkpoint"))
    assert re.findall(r"Saved \S*/step-(\d)", log.text) == ["1", "2"]


def test_pinned_memory_needs_an_accelerator(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(Refused, match=r"async_mode='async_with_pinned_mem'.*nearest valid value: 'async'"):
        manager(tmp_path, async_mode="async_with_pinned_mem")


def test_commands_name_the_damage_use_the_newest_sound_one_and_move_nothing(tmp_path, capsys):
    save(manager(tmp_path), 1, 2)
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"folder": "checkpoint"}}))
    folder = tmp_path / "checkpoint"
    flip(folder / "step-2/__0_0.distcp", 3000, 1)
    assert find_checkpoint(tmp_path) == folder / "step-1"
    assert "step-2 is damaged (__0_0.distcp does not hold what was saved" in (printed := capsys.readouterr().out)
    assert printed.endswith("using step-1\n") and printed.count("\n") == 1
    assert find_checkpoint(tmp_path, "size") == find_checkpoint(folder / "step-2", "off") == folder / "step-2"
    with pytest.raises(Refused, match=r"step-2 is damaged: .*; other complete ones in .*: step-1"):
        find_checkpoint(folder / "step-2")
    truncate(folder / "step-1/.metadata")
    with pytest.raises(Refused, match="holds no sound checkpoint"):
        find_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-1", "step-2"]
