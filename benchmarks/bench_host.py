#!/usr/bin/env python
"""What one Lighthouse layer costs the host: the time to issue it, which a GPU that is fast enough waits for.

    python benchmarks/bench_host.py                       # a GPU: launches included
    python benchmarks/bench_host.py --without-kernels     # anywhere: every launch of Triton replaced by nothing

Microseconds a call, the least of several rounds: forward without gradients, forward, forward and backward; eager and
compiled. The sequence is so short that a GPU is never late. Without kernels the layer attends to nothing either.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

CALLS, ROUNDS = 10, 60

LAYERS = {
    "published": {},
    "causal": {"selection": "causal"},
    "causal, W = 512": {"selection": "causal", "local_window": 512},
}


def microseconds(run: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    # Threads of others on the same cores count only where the clock is the wall's: a GPU's launches need it.
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    for _ in range(10):
        run()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        start = clock()
        for _ in range(CALLS):
            run()
        rounds.append((clock() - start) / CALLS * 1e6)
    wait()
    return min(rounds)


def nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query + key + value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-kernels", action="store_true")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--eager", action="store_true", help="only eager")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        if not options.without_kernels:
            raise SystemExit("bench_host: no GPU: only --without-kernels can be measured")
        os.environ["TRITON_INTERPRET"] = "1"  # lets the kernels' backend be chosen; before Triton is imported
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # results that no kernel wrote
    from triton.runtime.jit import KernelInterface

    from lighthouse import LighthouseConfig, causal_attention, lighthouse_attention

    if options.without_kernels:
        KernelInterface.__getitem__ = lambda kernel, grid: lambda *arguments, **constants: None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, head_dim, dtype = (8, 128, torch.bfloat16) if device == "cuda" else (2, 8, torch.float32)
    attention = nothing if options.without_kernels else causal_attention
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}; microseconds")
    for name, settings in LAYERS.items():
        if "local_window" in settings and device == "cpu":
            continue  # attention over a window is no kernel of ours
        config = LighthouseConfig(top_k=128, backend="triton", **settings)
        layer = partial(lighthouse_attention, config=config, attention=attention)
        shape = (1, options.seq_len, heads, head_dim)
        query, key, value, grad = (
            torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_(i < 3) for i in range(4)
        )
        inputs = (query, key, value)
        compiled = {} if options.eager else {"compiled": torch.compile(layer, fullgraph=True, dynamic=False)}
        for how, run in {"eager": layer, **compiled}.items():
            with torch.no_grad():
                bare = microseconds(lambda run=run, inputs=inputs: run(*inputs))
            forward = microseconds(lambda run=run, inputs=inputs: run(*inputs))
            both = microseconds(
                lambda run=run, inputs=inputs, grad=grad: torch.autograd.grad(run(*inputs), inputs, grad)
            )
            print(
                f"{name:16} {how:9} without gradients {bare:7.0f}   forward {forward:7.0f}   "
                f"forward and backward {both:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
