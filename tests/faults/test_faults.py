"""A part of ``inject.py``: a run on two ranks that saves in the background is hit by one fault after the other."""

import random

import pytest
import torch

from faults import disks, kinds
from faults.chain import Chain, Reference, Setup, unequal_parts, write_corpus
from helpers.processes import ForkedRun

STEPS = 40
#: Through Lighthouse in the middle one.
THREE_LAYERS = {"llama.n_layers": "3", "lighthouse.layers": "1"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    data = write_corpus(folder / "data")
    reference = Reference(folder / "reference", Setup(2, data, THREE_LAYERS, steps=STEPS), forked=True)
    setup = Setup(2, data, THREE_LAYERS | {"checkpoint.async_mode": "async"}, steps=STEPS)
    made = Chain(folder / "hit", setup, reference, room=12, longest=0.5, starts=ForkedRun)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("inject", "arguments"),
    [
        (kinds.kill, {"who": "one rank", "saving": True}),
        (kinds.stop, {"by": "SIGUSR1 rank"}),
        (disks.damage_checkpoints, {"hows": ("flip", "truncated", "missing")}),
        (kinds.kill, {"who": "torchrun"}),
        (kinds.stop, {"by": "file"}),
        (disks.too_large, {}),
        (kinds.kill, {"who": "all"}),
        (kinds.hold, {"then": "SIGCONT"}),
        (disks.move, {"what": "the dump folder"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value.values())),
)
def test_a_run_goes_on_bit_for_bit(chain, inject, arguments):
    """From the newest save that is whole and sound, by the same command."""
    outcomes, ends = chain.hit(inject, random.Random(0), **arguments)
    for outcome in [*outcomes, *ends]:
        assert not outcome.problems and outcome.survived and outcome.bit_equal, outcome


def test_a_difference_of_one_bit_is_seen(chain):
    """In each part of a checkpoint, or nothing above could fail."""
    ours, theirs = (chain.reference.state(2) for _ in range(2))
    assert unequal_parts(ours, theirs) == []
    ours["norm.weight"].view(torch.int32)[0] ^= 1
    assert unequal_parts(ours, theirs) == ["weights"]
    ours["optimizer"]["state.norm.weight.exp_avg"].view(torch.int32)[0] ^= 1
    ours["lr_scheduler"]["last_epoch"] += 1
    ours["train_state"]["step"] += 1
    ours["dataloader"]["stream_0"] = ours["dataloader"]["stream_1"]
    assert unequal_parts(ours, theirs) == ["counters", "data position", "optimizer", "schedule", "weights"]
