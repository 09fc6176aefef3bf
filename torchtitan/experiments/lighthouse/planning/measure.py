"""The rates of the GPU at hand, each by one timing of what it is the rate of. About a minute."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer
from torchtitan.experiments.lighthouse.planning.rates import Rates, shipped
from torchtitan.experiments.lighthouse.planning.step import KERNELS, attention_operations

from lighthouse import LighthouseConfig, causal_attention, lighthouse_attention
from lighthouse.local_window import attend_locally


@dataclass(frozen=True)
class Sizes:
    """Of what is timed: large enough that launches do not count, but for ``launch_len``."""

    rows: int = 65536
    columns: int = 1024
    heads: int = 8
    head_dim: int = 128
    seq_len: int = 65536
    window: int = 1024
    launch_len: int = 8192
    copied: int = 2**28
    exchanged: int = 2**28
    seconds: float = 2.0
    """That each timing goes on, at least."""

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def measure(device: torch.device, sizes: Sizes | None = None) -> Rates:
    """Time products, attention, copies, launches and, where torchrun has started several processes, the link between
    them. All processes call it."""
    sizes = sizes or Sizes()
    gpu, memory = _name_and_memory(device)
    forward, backward = _attention(sizes, device, causal_attention)
    window_forward, window_backward = _attention(
        sizes, device, lambda query, key, value: attend_locally(query, key, value, sizes.window)
    )
    copy = _copy(sizes, device)
    pairs = attention_operations(sizes.width, sizes.seq_len, sizes.seq_len)
    near = 2 * attention_operations(sizes.width, sizes.seq_len, sizes.window)
    # What the prediction adds for the bytes of a window is not the operations'.
    moved = 2 * sizes.seq_len * sizes.width / (KERNELS * copy)
    link, how = _link(sizes, device)
    return Rates(
        gpu=gpu,
        date=datetime.date.today().isoformat(),
        source=f"plan --measure, torch {torch.__version__}; {how}; network: 400 Gbit/s a GPU, assumed",
        memory_gib=round(memory, 1),
        matmul=_matmul(sizes, device),
        attention_forward=pairs / forward,
        attention_backward=2.5 * pairs / backward,
        window_forward=near / max(window_forward - 4 * moved, window_forward / 2),
        window_backward=2.5 * near / max(window_backward - 12 * moved, window_backward / 2),
        copy=copy,
        link=link,
        network=shipped()["h200"].network,
        launch=_launch(sizes, device),
        assumed=[] if _ranks() > 1 else ["link"],
    )


def _name_and_memory(device: torch.device) -> tuple[str, float]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory / 2**30
    return device.type, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _seconds(run: Callable[[], Any], sizes: Sizes) -> float:
    run()
    return float(Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=sizes.seconds).median)


def _matmul(sizes: Sizes, device: torch.device) -> float:
    """Operations a second, of a product as a layer's first in its feed-forward network."""
    out = sizes.columns * 3 // 2
    left = torch.randn(sizes.rows, sizes.columns, device=device, dtype=torch.bfloat16)
    right = torch.randn(sizes.columns, out, device=device, dtype=torch.bfloat16)
    return 2 * sizes.rows * sizes.columns * out / _seconds(lambda: left @ right, sizes)


def _attention(sizes: Sizes, device: torch.device, attention: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """Seconds of a forward, and of a backward."""
    query, key, value = _heads(sizes, device, sizes.seq_len)
    with torch.no_grad():
        forward = _seconds(lambda: attention(query, key, value), sizes)
    out = attention(query, key, value)
    grad = torch.randn_like(out)
    inputs = (query, key, value)
    return forward, _seconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), sizes)


def _launch(sizes: Sizes, device: torch.device) -> float:
    """Seconds of a layer so short that the host sets its pace."""
    query, key, value = _heads(sizes, device, sizes.launch_len)
    config = LighthouseConfig(top_k=128)

    def layer() -> None:
        out = lighthouse_attention(query, key, value, config)
        torch.autograd.grad(out, (query, key, value), out)

    return _seconds(layer, sizes)


def _heads(sizes: Sizes, device: torch.device, seq_len: int) -> list[torch.Tensor]:
    shape = (1, seq_len, sizes.heads, sizes.head_dim)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(shape, **options).transpose(1, 2) for _ in range(3)]


def _copy(sizes: Sizes, device: torch.device) -> float:
    """Bytes a second, those read and those written."""
    source = torch.empty(sizes.copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * sizes.copied / _seconds(lambda: target.copy_(source), sizes)


def _link(sizes: Sizes, device: torch.device) -> tuple[float, str]:
    """Bytes a second that a device receives, and how that is known."""
    ranks = _ranks()
    if ranks == 1:
        return shipped()["h200"].link, "link: H200's, start with torchrun --nproc_per_node GPUS to measure it"
    own = torch.empty(sizes.exchanged // ranks, device=device, dtype=torch.uint8)
    everything = torch.empty(len(own) * ranks, device=device, dtype=torch.uint8)
    # As often on every rank, however long it takes: each needs the others.
    timer = Timer(
        "run(everything, own)", globals={"run": dist.all_gather_into_tensor, "everything": everything, "own": own}
    )
    timer.timeit(3)
    return len(own) * (ranks - 1) / timer.timeit(20).median, f"link: {ranks} GPUs, all-gather"


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
