#!/usr/bin/env python
"""One attention layer on a GPU: Lighthouse beside dense cuDNN SDPA and beside SDPA on its S rows alone (the floor).

    python benchmarks/bench_attention.py --output benchmarks/reports/DATE-attention           # all contexts
    python benchmarks/bench_attention.py --quick

B = 1, H = 8, D = 128, bfloat16, [B, N, H, D] in memory as attention modules hand it over. Times are medians by CUDA
events after warm-up, forward, and forward with backward; all on cuDNN. Rows with a window, and with ``combine =
"softmax"`` (W = 512), select causally. Writes layer.csv, kernels.csv, report.md and latency.png. Nothing is reported if
the kernels do not agree with the plain-torch path.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse import LighthouseConfig, kernels, lighthouse_attention, select
from lighthouse.kernels.scorers import norm_scores
from lighthouse.kernels.selection import order_entries, pick_parents
from lighthouse.local_window import attend_locally

HEADS, HEAD_DIM = 8, 128

#: Context to top_k, with L = 3 and p = 4.
CONTEXTS = {
    8192: 128, 16384: 256, 32768: 256, 65536: 512, 98304: 1536, 131072: 1024, 262144: 2048, 524288: 4096, 1048576: 8192,
}  # fmt: skip
QUICK = (32768, 98304, 131072)

#: Local windows that are measured: in a layer with causal selection, and attention over the window alone.
WINDOWS = (128, 512, 1024)

#: What a layer with ``combine = "softmax"`` is measured with: causal selection and this window.
SOFTMAX_WINDOW = 512

NAMES = {
    "dense", "SDPA on S rows", "torch, eager", "triton, eager", "triton, compiled", "triton, reduce-overhead",
    "triton, CUDA graph", *(f"softmax, {how}" for how in ("eager", "compiled", "reduce-overhead", "CUDA graph")),
    "causal, CUDA graph", *(f"{what}W = {window}, CUDA graph" for window in WINDOWS for what in ("", "only ")),
}  # fmt: skip


@dataclass
class Row:
    """One measurement: times in milliseconds, memory in GiB above the inputs."""

    seq_len: int
    selected: int
    name: str
    forward: float
    both: float
    peak_gib: float


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def rows_of(seq_len: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and an output gradient, random, [1, H, N, D] stored as [1, N, H, D]."""
    shape = (1, seq_len, HEADS, HEAD_DIM)
    query, key, value, grad = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    return [x.requires_grad_() for x in (query, key, value)], grad


def milliseconds(run: Callable[[], object], budget: float = 300.0) -> float:
    """Median time of one call, of as many as fit the budget (ms), 1 to 50."""

    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    once()
    first = once()  # long runs are timed once: their noise is small, and dense attention at 1M takes seconds
    return statistics.median([first, *(once() for _ in range(int(min(50, budget / first))))])


def both_ways(layer: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(*inputs), inputs, grad)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def with_less_overhead(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled to CUDA graphs by torch itself, each call a step of its own."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def run(*rows: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = compiled(*rows)
        return out

    return run


def measure_layer(seq_len: int, config: LighthouseConfig, names: set[str]) -> list[Row]:
    torch.compiler.reset()
    selected = config.selected_length(seq_len)
    torch_config, triton_config = (replace(config, backend=backend) for backend in ("torch", "triton"))

    def layer_of(config: LighthouseConfig) -> Callable[..., Tensor]:
        return lambda *rows: lighthouse_attention(*rows, config, attention=cudnn)

    plain, ours = layer_of(torch_config), layer_of(triton_config)
    layers: dict[str, tuple[Callable[..., Tensor], int, bool]] = {
        "dense": (cudnn, seq_len, False),
        "SDPA on S rows": (cudnn, selected, False),
        "torch, eager": (plain, seq_len, False),
        "triton, eager": (ours, seq_len, False),
        "triton, compiled": (torch.compile(ours, fullgraph=True, dynamic=False), seq_len, False),
        "triton, reduce-overhead": (with_less_overhead(ours), seq_len, False),
        "triton, CUDA graph": (ours, seq_len, True),
        "causal, CUDA graph": (layer_of(replace(triton_config, selection="causal")), seq_len, True),
    }
    for window in WINDOWS:
        config = replace(triton_config, selection="causal", local_window=window)
        layers[f"W = {window}, CUDA graph"] = (layer_of(config), seq_len, True)
        layers[f"only W = {window}, CUDA graph"] = (partial(attend_locally, window=window), seq_len, True)
    config = replace(triton_config, selection="causal", local_window=SOFTMAX_WINDOW, combine="softmax")
    softmax = partial(lighthouse_attention, config=config)  # it brings its own attention
    layers["softmax, eager"] = (softmax, seq_len, False)
    layers["softmax, compiled"] = (torch.compile(softmax, fullgraph=True, dynamic=False), seq_len, False)
    layers["softmax, reduce-overhead"] = (with_less_overhead(softmax), seq_len, False)
    layers["softmax, CUDA graph"] = (softmax, seq_len, True)
    measured = []
    for name, (layer, length, graph) in layers.items():
        if name not in names:
            continue
        inputs, grad = rows_of(length)
        runs: list[Callable[[], object]] = [
            lambda layer=layer, inputs=inputs: layer(*inputs),
            both_ways(layer, inputs, grad),
        ]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runs[1]()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        times = [milliseconds(captured(run) if graph else run) for run in runs]
        measured.append(Row(seq_len, selected, name, *times, peak))
        print(f"{seq_len:>9,} {name:24} {times[0]:9.3f} {times[1]:9.3f} ms {peak:7.2f} GiB", flush=True)
        del inputs, grad, runs
        torch.cuda.empty_cache()
    return measured


def measure_kernels(seq_len: int, config: LighthouseConfig) -> list[tuple[str, float, float, float]]:
    """(kernel, milliseconds, GB that it must move, GB/s of it)."""
    rows, grad = rows_of(seq_len)
    query, key, value = (x.detach() for x in rows)
    num_levels, p, selected = config.num_levels, config.pooling_factor, config.selected_length(seq_len)
    chosen = select(query, key, config)
    inverse_map = chosen.inverse_map.clone()
    scores = norm_scores(query, key, p, inverse_map)
    how = (num_levels, p, config.num_tiles, 1)
    parents = pick_parents(*scores, *how, False, False)
    short = torch.randn(1, HEADS, selected, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    long_bytes, short_bytes = (HEADS * n * HEAD_DIM * 2 / 1e9 for n in (seq_len, selected))
    map_bytes, entry_bytes = chosen.inverse_map.numel() * 4 / 1e9, chosen.entry.numel() * 9 / 1e9
    score_bytes, parent_bytes = scores[0].numel() * 8 / 1e9, parents.numel() * 4 / 1e9
    shape, maps = (num_levels, p), (chosen.entry, chosen.inverse_map)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "copy of one tensor (the ceiling)": (lambda: grad.clone(), 2 * long_bytes),
        "norm_scores": (lambda: norm_scores(query, key, p, inverse_map), 2 * long_bytes + score_bytes + map_bytes),
        "pick_parents": (lambda: pick_parents(*scores, *how, False, False), score_bytes + parent_bytes),
        "pick_parents, causal": (lambda: pick_parents(*scores, *how, True, True), score_bytes + parent_bytes),
        "order_entries": (
            lambda: order_entries(parents, inverse_map, seq_len, *shape),
            parent_bytes + map_bytes + entry_bytes,
        ),
        "select_by_norms, all of these": (
            lambda: kernels.select_by_norms(query, key, *how, False, False),
            2 * long_bytes + 2 * score_bytes + 2 * parent_bytes + 2 * map_bytes + entry_bytes,
        ),
        "gather": (
            lambda: kernels.gather(query, *maps, *shape),
            long_bytes + short_bytes + map_bytes,
        ),
        "gather_three": (
            lambda: kernels.gather_three(query, key, value, *maps, *shape),
            3 * (long_bytes + short_bytes + map_bytes),
        ),
        "gather_three_backward": (
            lambda: kernels.gather_three_backward(short, short, short, chosen.inverse_map, seq_len, *shape),
            3 * (long_bytes + short_bytes + map_bytes),
        ),
        "gather_three_backward, with a window's": (
            lambda: kernels.gather_three_backward(
                short, short, short, chosen.inverse_map, seq_len, *shape, (query, key, value)
            ),
            3 * (2 * long_bytes + short_bytes + map_bytes),
        ),
        "gather_backward": (
            lambda: kernels.gather_backward(short, chosen.inverse_map, seq_len, *shape),
            long_bytes + short_bytes + map_bytes,
        ),
        "scatter": (
            lambda: kernels.scatter(short, *maps, seq_len, *shape),
            long_bytes + short_bytes + map_bytes,
        ),
        "scatter_backward": (
            lambda: kernels.scatter_backward(grad, *maps, *shape),
            long_bytes + short_bytes + map_bytes,
        ),
    }
    measured = []
    for name, (run, gigabytes) in work.items():
        time = milliseconds(captured(run))
        measured.append((name, time, gigabytes, gigabytes / time * 1e3))
        print(
            f"{seq_len:>9,} {name:36} {time:8.4f} ms {gigabytes:7.3f} GB {gigabytes / time * 1e3:7.0f} GB/s", flush=True
        )
    return measured


def check(config: LighthouseConfig, seq_len: int = 8192) -> None:
    """Refuse to measure kernels that are wrong: same selection, and an error no larger than the plain path's.

    Raises:
        SystemExit: if they are.
    """
    inputs, grad = rows_of(seq_len)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]

    def results(backend: str, rows: list[Tensor], grad: Tensor) -> list[Tensor]:
        out = lighthouse_attention(*rows, replace(config, backend=backend))
        return [out.detach(), *torch.autograd.grad(out, rows, grad)]

    chosen = [select(*inputs[:2], replace(config, backend=backend)) for backend in ("torch", "triton")]
    if not torch.equal(chosen[0].entry, chosen[1].entry):
        raise SystemExit("bench_attention: the backends select different entries; nothing was measured")
    exact = results("torch", exact_inputs, grad.float())
    plain, ours = (results(backend, inputs, grad) for backend in ("torch", "triton"))
    for name, want, reference, got in zip(("output", "dq", "dk", "dv"), exact, plain, ours, strict=True):
        error, allowed = ((x.float() - want).norm() / want.norm() for x in (got, reference))
        if not error <= 1.25 * allowed:
            raise SystemExit(f"bench_attention: {name} is off by {error:.2e}, the plain path by {allowed:.2e}")


def draw(rows: list[Row], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), dpi=150, layout="constrained", sharey=True)
    for panel, field, title in zip(panels, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        for name in dict.fromkeys(row.name for row in rows):
            points = [(row.seq_len, getattr(row, field)) for row in rows if row.name == name]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.set(xscale="log", yscale="log", xlabel="context (tokens)", title=title)
        panel.set_xticks(sorted({row.seq_len for row in rows}))
        panel.set_xticklabels([f"{n // 1024}K" for n in sorted({row.seq_len for row in rows})], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("milliseconds")
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def report(rows: list[Row], kernel_rows: list[tuple[str, float, float, float]], seq_len: int) -> str:
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
        f"Triton {triton.__version__}; B = 1, H = {HEADS}, D = {HEAD_DIM}, bfloat16; milliseconds, medians.",
        "",
        "| N | S | | forward | × dense | forward + backward | × dense | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    dense = {row.seq_len: row for row in rows if row.name == "dense"}
    for row in rows:
        ratios = ("", "")
        if row.seq_len in dense:
            ratios = (
                f"{dense[row.seq_len].forward / row.forward:.1f}",
                f"{dense[row.seq_len].both / row.both:.1f}",
            )
        lines.append(
            f"| {row.seq_len:,} | {row.selected:,} | {row.name} | {row.forward:.3f} | {ratios[0]} | {row.both:.3f} "
            f"| {ratios[1]} | {row.peak_gib:.2f} |"
        )
    lines += [
        "",
        f"Kernels at N = {seq_len:,}:",
        "",
        "| kernel | ms | GB to move | GB/s |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {ms:.4f} | {gb:.3f} | {rate:,.0f} |" for name, ms, gb, rate in kernel_rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(map(str, QUICK))} tokens; two minutes")
    parser.add_argument("--contexts", type=int, nargs="+", choices=CONTEXTS, help="only these")
    parser.add_argument("--without", nargs="*", default=[], choices=NAMES, metavar="NAME", help="leave out, e.g. dense")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_attention"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_attention: needs a GPU")
    torch.manual_seed(0)
    check(LighthouseConfig(top_k=128))
    for combine in ("sum", "softmax"):
        check(LighthouseConfig(top_k=128, selection="causal", local_window=512, combine=combine))
    names = NAMES - set(options.without)
    contexts = options.contexts or (QUICK if options.quick else list(CONTEXTS))
    rows = [
        row for seq_len in contexts for row in measure_layer(seq_len, LighthouseConfig(top_k=CONTEXTS[seq_len]), names)
    ]
    kernel_rows = measure_kernels(98304, LighthouseConfig())
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "layer.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("N", "S", "name", "forward_ms", "forward_backward_ms", "peak_gib")])
        csv.writer(file).writerows(list(vars(row).values()) for row in rows)
    with (options.output / "kernels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("kernel", "ms", "gigabytes", "gigabytes_per_second"), *kernel_rows])
    text = report(rows, kernel_rows, 98304)
    (options.output / "report.md").write_text(text, encoding="utf-8")
    draw(rows, options.output / "latency.png")
    print("\n" + text)


if __name__ == "__main__":
    main()
