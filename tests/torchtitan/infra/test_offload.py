"""Inputs of blocks that wait in host memory: the same numbers, less on the device, no second copy on the host."""

import weakref

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse import parallelize_lighthouse
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.infra import offload
from torchtitan.experiments.lighthouse.infra.offload import check_host_memory, check_offload, host_bytes
from torchtitan.experiments.lighthouse.seams.cpu import use_cpu_without_accelerator

from helpers.model import build, tokens
from helpers.settings import parse

FULL = ["--activation_checkpoint.mode=full"]
OPS = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
COMPILED = ["--compile.enable", "--compile.backend=aot_eager"]
LAYERS = 4
SIZES = [
    f"--llama.n_layers={LAYERS}",
    "--lighthouse.layers=1-2",
    "--llama.dim=64",
    "--llama.n_heads=2",
    "--llama.n_kv_heads=2",
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A device, and a process group of one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    use_cpu_without_accelerator()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield request.param
    torch.distributed.destroy_process_group()


def parallelized(layers: int, *words: str, device: str = "cpu"):
    """The debug model as the trainer makes it, with so many layers offloaded."""
    torch._dynamo.reset()
    model, config = build(*SIZES, *words, f"--activation_checkpoint.offload_layers={layers}")
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    return parallelize_lighthouse(model.to(device), dims, config)


def loss_of(model, seed: int = 0):
    inputs = tokens().roll(seed, 1).to(model.freqs_cis.device)
    return model(inputs, labels=inputs.roll(-1, 1))


def gradients(model):
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]


def inputs_seen(model) -> list[StorageWeakRef]:
    """Of each block, the memory of its input, which fills up with every forward."""
    seen: list[StorageWeakRef] = []
    for block in model.layers.values():
        block.register_forward_pre_hook(lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    return seen


class Journal(list[tuple[str, int]]):
    """What happens to the inputs, in order: ("to host", "back" or "taken", number of the input)."""

    def __init__(self):
        super().__init__()
        self.waiting: weakref.WeakSet = weakref.WeakSet()
        """Those that the host still has memory for."""


@pytest.fixture
def journal(monkeypatch):
    found = Journal()

    class Recorded(offload._HostInput):
        def __init__(self, *args):
            found.waiting.add(self)
            self.number = sum(what == "to host" for what, _ in found)
            found.append(("to host", self.number))
            super().__init__(*args)

        def fetch(self):
            if self._back is None:
                found.append(("back", self.number))
            super().fetch()

        def take(self):
            rows = super().take()
            found.append(("taken", self.number))
            return rows

    monkeypatch.setattr(offload, "_HostInput", Recorded)
    return found


@pytest.mark.parametrize(
    ("layers", "words"),
    [(1, FULL), (3, FULL), (2, OPS), (2, [*COMPILED, *FULL])],
    ids=["1 of 4", "3 of 4", "selective", "compiled"],
)
def test_the_same_numbers_with_less_on_the_device(layers, words, device, journal):
    """Loss and every gradient to the bit. Meanwhile the inputs are nowhere on the device; each comes back once, before
    the backward of the block after it. Then their memory on the host is free, although the loss is still there: the
    trainer drops it after the next forward."""
    expected = parallelized(0, *words, device=device)
    expected_loss = loss_of(expected)
    expected_loss.backward()
    assert not journal
    model = parallelized(layers, *words, device=device)
    seen = inputs_seen(model)
    loss = loss_of(model)
    assert torch.equal(loss, expected_loss)
    assert [memory.expired() for memory in seen] == [index < layers for index in range(LAYERS)]
    assert journal == [("to host", index) for index in range(layers)]
    journal.clear()
    loss.backward()
    assert all(map(torch.equal, gradients(model), gradients(expected)))
    # The first one comes with the backward of a block that is not offloaded.
    one_ahead = [("back", layers - 1)]
    for number in reversed(range(layers)):
        one_ahead += [("back", number - 1)] if number else []
        one_ahead += [("taken", number)]
    assert journal == one_ahead
    assert loss.requires_grad and len(journal.waiting) == 0


def test_several_passes_and_none(device, journal):
    """Gradients add up; two passes may be under way; validation copies nothing."""
    expected, model = (parallelized(layers, *FULL, device=device) for layers in (0, 2))
    for seed in (0, 1, 2):
        loss_of(expected, seed).backward()
    loss_of(model, 0).backward()
    first, second = loss_of(model, 1), loss_of(model, 2)
    first.backward()
    second.backward()
    assert all(map(torch.equal, gradients(model), gradients(expected)))
    journal.clear()
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(expected))
    assert not journal
    unused = loss_of(model)
    assert len(journal.waiting) == 2
    del unused
    assert len(journal.waiting) == 0


def test_a_block_that_fails_leaves_nothing_behind(device):
    model = parallelized(2, *FULL, device=device)
    wrong = model.layers["1"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    wrong.remove()
    kept = torch.ones(3, requires_grad=True, device=device)
    assert (kept * kept).grad_fn._saved_self is kept, "no hooks are left"
    loss_of(model).backward()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode=none", "offload_layers=2"], "offload_layers=2: must be 0 with activation_checkpoint.mode='none'"),
        (["mode=memory_budget", "offload_layers=2"], "mode='memory_budget', .* nearest valid value: 0, or"),
        (["mode=full", "offload_layers=6"], "offload_layers=6: must be at most 5, .* nearest valid value: 5$"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    config = parse("debug.toml", *(f"--activation_checkpoint.{word}" for word in words))
    with pytest.raises(Refused, match=message):
        check_offload(config, n_layers=6)


def test_what_the_host_cannot_hold_is_refused():
    """2,097,152 tokens: 4 GiB a layer. Buffers are powers of two."""
    words = ["--training.seq_len=2097152", "--activation_checkpoint.mode=full"]
    config = parse("530m_stage1.toml", *words, "--activation_checkpoint.offload_layers=22")
    check_host_memory(config, 1024, 1, available=88 * 2**30)
    with pytest.raises(Refused, match=r"=22: needs 88\.0 GiB .* 4\.00 GiB a layer, and 87\.0 GiB .* value: 21$"):
        check_host_memory(config, 1024, 1, available=87 * 2**30)
    with pytest.raises(Refused, match=r"needs 176\.0 GiB .* 8\.00 GiB a layer for 2 processes, .* value: 12$"):
        check_host_memory(config, 1024, 2, available=100 * 2**30)
    assert [host_bytes(size) for size in (1, 3, 4, 192 * 2**20)] == [1, 4, 4, 256 * 2**20]
    free = offload.available_memory()
    assert free is None or 2**20 < free < 2**50
