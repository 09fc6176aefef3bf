"""Allocations of a step, sorted by cause."""

from peak_memory import FORWARD, GIB, MARK, at_peak, by_cause, cause, largest, table


def frame(filename, name="f"):
    return {"filename": filename, "name": name, "line": 1}


def alloc(addr, size, *frames):
    return {"action": "alloc", "addr": addr, "size": size, "frames": list(frames)}


def free(addr, size=0):
    return {"action": "free_completed", "addr": addr, "size": size}


WEIGHT = alloc(1, 5, frame("torch/nn/modules/module.py", "to_empty"))


def test_the_peak_is_that_of_the_last_step():
    """More was in use before it, and as much as that only for a while; an address is used again."""
    mark = [alloc(9, 1, frame("peak_memory.py", MARK)), free(9)]
    before = [WEIGHT, alloc(2, 100), free(2)]
    step = [alloc(2, 10), free(2), alloc(2, 20), alloc(3, 7), free(2), alloc(4, 9), free(3), free(4)]
    assert [(event["addr"], event["size"]) for event in at_peak([*before, *mark, *step])] == [(1, 5), (2, 20), (3, 7)]
    # The recording may end where most is in use, and what was there before it began has no event.
    rising = [free(77), alloc(2, 20), free(2), alloc(3, 30)]
    assert [event["addr"] for event in at_peak([*before, *mark, *rising])] == [1, 3]


def test_every_cause():
    """Of nested code, the part that says most."""
    compiled, hidden = frame(f"torch/{FORWARD}runtime_wrappers.py", "forward"), 64
    backward = frame(f"torch/{FORWARD}runtime_wrappers.py", "backward")
    kernels = frame("lighthouse/kernels/gather_scatter.py", "gather")
    found = {
        cause(alloc(0, size, *frames), hidden)
        for size, frames in [
            (5, (frame("torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", "foreach_reduce"),)),
            (6, (kernels, frame("/tmp/torchinductor/x.py", "call"), backward)),
            (hidden, (frame("/tmp/torchinductor/x.py", "call"), compiled)),
            (hidden, (frame("torch/nn/modules/sparse.py", "forward"),)),
            (7, (kernels, compiled)),
            (
                7,
                (
                    frame("/tmp/torchinductor/y.py", "call"),
                    frame("experiments/lighthouse/loss.py", "forward"),
                    compiled,
                ),
            ),
            (8, (frame("experiments/lighthouse/infra/offload.py", "fetch"),)),
            (9, ()),
            (9, (frame("somewhere.py"),)),
        ]
    }
    assert found == {
        "gradients", "inside a layer, backward", "inputs of layers", "kept by layers, beside inputs", "loss",
        "inputs of layers on their way back", "embedding and last norm, backward", "other",
    }  # fmt: skip
    assert cause(WEIGHT, hidden) == "weights"
    assert by_cause([WEIGHT, alloc(2, 9), WEIGHT], hidden) == {"weights": 10, "embedding and last norm, backward": 9}
    assert [one["cause"] for one in largest([WEIGHT, alloc(2, 9), alloc(3, hidden, compiled)], hidden, count=1)] == [
        "embedding and last norm, backward"
    ]


def test_runs_stand_beside_each_other():
    totals = {"in use": 3 * GIB, "reserved": 4 * GIB, "predicted": 0, "pinned on the host": 0}
    one, two = {"causes": {"weights": GIB, "loss": 2 * GIB}, **totals}, {"causes": {"gradients": GIB}, **totals}
    lines = table({"1m": one, "2m": two}).splitlines()
    assert lines[0] == "| GiB | 1m | 2m |"
    assert (
        "| weights | 1.00 |  |" in lines
        and "| gradients |  | 1.00 |" in lines
        and "| reserved | 4.00 | 4.00 |" in lines
    )
