"""What ``plan`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.planning import choices, memory
from torchtitan.experiments.lighthouse.planning.choices import Choice
from torchtitan.experiments.lighthouse.planning.rates import Rates, read_rates
from torchtitan.experiments.lighthouse.planning.step import GPUS_PER_NODE, predict
from torchtitan.experiments.lighthouse.planning.workload import Workload

#: The largest number of GPUs that any run was measured on which the predictions were compared with.
MEASURED_GPUS = 2

#: That the rates of attention were measured with, and every such run had.
MEASURED_HEAD_DIM = 128


def head(model: str, work: Workload, rates: Rates) -> list[str]:
    sequences = "1 sequence" if work.sequences_per_step == 1 else f"{work.sequences_per_step:,} sequences"
    return [
        f"Model: {model}, {work.parameters:,} parameters, {work.lighthouse_layers} of {work.n_layers} layers through "
        "Lighthouse",
        f"GPUs: {work.gpus} × {rates.gpu}, {rates.memory_gib:g} GiB each; rates of {rates.date}",
        f"Step: {work.tokens_per_step:,} tokens, {sequences} of {work.seq_len:,}",
    ]


def budgets(work: Workload) -> list[str]:
    """S, tiles and share of the budget, and the other valid ones around it."""
    geometry = work.geometry
    if not work.selects:
        return [f"Selection: none, a window of {work.window:,} alone"]
    valid = [one.top_k for one in work.valid_top_k()]
    around = sorted(sorted(valid, key=lambda k: abs(k - geometry.top_k))[:9])
    return [
        f"Selection: top_k {geometry.top_k:,} in {geometry.num_tiles} tiles, L {geometry.num_levels}, "
        f"p {geometry.pooling_factor}: S = {work.rows:,} rows, {work.rows / work.seq_len:.1%} of the sequence",
        f"Valid top_k: {', '.join(map(str, around))}" + (f" … {valid[-1]}" if valid[-1] != around[-1] else ""),
    ]


def ways(found: Sequence[Choice], chosen: Choice, rates: Rates) -> list[str]:
    """Every way to run it, fastest first."""
    rows = [("", "checkpointing", "context parallel", "GiB", "tokens/s/GPU", "hours", "")]
    for choice in found:
        one, two = choice.stage1, choice.dense
        rows.append(
            (
                "→" if choice is chosen else "",
                choice.work.checkpointing,
                str(choice.work.context_parallel),
                f"{one.memory_gib:.1f} / {two.memory_gib:.1f}",
                f"{one.tokens_per_second:,.0f} / {two.tokens_per_second:,.0f}",
                f"{choice.hours:,.1f}",
                "fits" if choice.fits(rates) else "does not fit",
            )
        )
    return [
        "Ways to run it, fastest first; Stage 1 / dense. A way fits if "
        f"{memory.MARGIN:.0%} and {memory.RUNTIME_GIB:g} GiB of memory are left:",
        *aligned(rows),
    ]


def stages(chosen: Choice, stage1: int, steps: int, short: int = 0) -> list[str]:
    """Steps, hours and memory of each stage.

    Args:
        stage1: the step at which Stage 1 ends, of all ``steps``.
        short: the step at which it begins.
    """
    work = chosen.work
    rows = [("", "steps", "tokens", "GiB", "tokens/s/GPU", "s/step", "hours")]
    whole = [
        *([(f"dense at {chosen.short[0].seq_len:,}", short, chosen.short[1])] if chosen.short else []),
        ("Stage 1", stage1 - short, chosen.stage1),
        ("Stage 2, dense", steps - stage1, chosen.dense),
        ("all dense", steps, chosen.dense),
    ]
    for name, count, predicted in whole:
        tokens = count * work.tokens_per_step
        rows.append(
            (
                name,
                f"{count:,}",
                _short(tokens),
                f"{predicted.memory_gib:.1f}",
                f"{predicted.tokens_per_second:,.0f}",
                f"{predicted.seconds:.2f}",
                f"{predicted.hours(tokens, work.gpus):,.1f}",
            )
        )
    name = "all stages" if chosen.short else "both stages"
    both = (name, f"{steps:,}", _short(steps * work.tokens_per_step), "", "", "", f"{chosen.hours:,.1f}")
    rows.insert(-1, both)
    return aligned(rows)


def checkpoints(chosen: Choice, disk: float, minutes: int) -> str:
    """How large, how often, and how many.

    Args:
        disk: GB/s.
    """
    size, seconds = memory.checkpoint_bytes(chosen.work) / 1e9, choices.save_seconds(chosen.work, disk * 1e9)
    count = int(chosen.hours * 60 / minutes) + 1
    return (
        f"Checkpoints: {size:.1f} GB each, {seconds:.1f} s at {disk:g} GB/s; one every {minutes} minutes "
        f"(checkpoint.interval_minutes), {count:,} in all: {count * size:,.0f} GB if all are kept "
        "(checkpoint.keep_latest_k)"
    )


def host(work: Workload) -> list[str]:
    """Host memory, where it is needed."""
    if not work.offloaded:
        return []
    gib, here = memory.host_gib(work), min(work.gpus, GPUS_PER_NODE)
    return [f"Host memory: {here * gib:.0f} GiB of a node, for the inputs of {work.offloaded} layers of {here} GPU(s)"]


def pace(chosen: Choice, rates: Rates) -> list[str]:
    """Which steps wait for the host, and what they would gain without."""
    lines = []
    for name, work, found in (
        ("Stage 1", chosen.work, chosen.stage1),
        ("Dense steps", chosen.work.dense(), chosen.dense),
    ):
        gpu = sum(found.parts.values())
        if found.host <= gpu:
            continue
        remedy = "A larger training.local_batch_size gives the GPU more to do at once"
        if work.gpus == 1 and not work.offloaded and work.checkpointing == "none":
            graphed = predict(replace(work, cuda_graph=True), rates)
            remedy = f"With training.cuda_graph=true: {graphed.tokens_per_second:,.0f} tokens/s/GPU"
        verb = "waits" if name == "Stage 1" else "wait"
        lines.append(
            f"{name} {verb} for the host, which needs {1e3 * found.host:,.0f} ms for a step, the GPU "
            f"{1e3 * gpu:,.0f} ms. {remedy}"
        )
    return lines


def doubts(work: Workload, rates: Rates) -> list[str]:
    """Where the predictions go beyond what they were compared with."""
    beyond = []
    if work.context_parallel > MEASURED_GPUS:
        beyond.append(f"context parallel above {MEASURED_GPUS}")
    if work.gpus > MEASURED_GPUS:
        beyond.append(f"more than {MEASURED_GPUS} GPUs")
    if work.offloaded and work.gpus > 1:
        beyond.append("offloaded layers on several GPUs (their copies are taken to cost no time)")
    if work.checkpointing == "memory_budget":
        beyond.append("activation_checkpoint.mode='memory_budget'")
    if work.gpus > GPUS_PER_NODE:
        beyond.append("several nodes")
    if work.head_dim != MEASURED_HEAD_DIM:
        beyond.append(f"head dimension {work.head_dim}")
    if work.inner_attention not in ("auto", "cudnn"):
        beyond.append(f"attention by {work.inner_attention!r} (the rates are of cuDNN)")
    if work.by_flex:
        beyond.append("lighthouse.combine='softmax' by FlexAttention (context parallel)")
    if work.cuda_graph:
        beyond.append("training.cuda_graph (one model was measured)")
    needed = {"link": work.gpus > 1, "window_forward": work.window, "window_backward": work.window}
    if names := [name for name in rates.assumed if needed.get(name, True)]:
        beyond.append(f"this GPU's {', '.join(names)}")
    return [f"Not measured, so less sure: {', '.join(beyond)} (docs/plan.md)"] if beyond else []


def start(file: Path, settings: MergedConfig, chosen: Choice, short: int = 0) -> list[str]:
    """What to do with the settings that were written; ``short`` as in ``stages``."""
    gpus = chosen.work.gpus
    launch = (
        f"torchrun --standalone --nproc_per_node {gpus} -m torchtitan.experiments.lighthouse.train --job.config_file "
        if gpus <= GPUS_PER_NODE
        else f"sbatch --nodes {gpus // GPUS_PER_NODE} scripts/multinode.slurm "
    )
    tokens, rows = build_tokenizer(settings).get_vocab_size(), settings.llama.vocab_size
    folder = settings.job.dump_folder
    commands = [f"Stage 1: {launch}{file}", f"Stage 2: python scripts/resume_dense.py {folder}"]
    if chosen.short:
        shorter, split = chosen.short[0], chosen.work.context_parallel
        degree = "--parallelism.context_parallel_degree"
        alone, together = (f" {degree} 1", f" {degree} {split}") if split > 1 else ("", "")
        commands = [
            f"Dense at {shorter.seq_len:,}: {launch}{file} --job.dump_folder {folder}_short --lighthouse.no-enable "
            f"--training.seq_len {shorter.seq_len} --training.local_batch_size {shorter.sequences_at_once} "
            f"--training.global_batch_size {shorter.sequences_per_step} --training.steps {short}{alone}",
            f"Layers: python scripts/look_back.py {folder}_short",
            f"Stage 1: python scripts/resume_dense.py {folder}_short --attention lighthouse --seq-len "
            f"{chosen.work.seq_len} --total-steps {settings.training.steps} -- --lighthouse.layers LAYERS{together}",
            f"Stage 2: python scripts/resume_dense.py {folder}_short_lighthouse_{chosen.work.seq_len}",
        ]
    return [
        f"Settings of Stage 1: {file}",
        f"Data: {settings.training.dataset}; tokenizer: {settings.model.hf_assets_path}, {tokens:,} tokens for the "
        f"{rows:,} rows of the model",
        *commands,
    ]


#: Of each rate, what it counts and how large one is.
UNITS = {
    **dict.fromkeys(("matmul", "attention_forward", "attention_backward"), ("TFLOP/s", 1e12)),
    **dict.fromkeys(("window_forward", "window_backward"), ("TFLOP/s", 1e12)),
    **dict.fromkeys(("copy", "link", "network"), ("GB/s", 1e9)),
    "launch": ("ms", 1e-3),
}


def measured(rates: Rates) -> list[str]:
    """Rates of a GPU, beside those that are shipped for it."""
    try:
        known = read_rates(rates.gpu, None)
    except Refused:
        known = None
    rows = [("", "measured", "shipped" if known else "", "")]
    for name, (unit, size) in UNITS.items():
        assumed = "assumed" if name in (*rates.assumed, "network") else ""
        shipped = f"{getattr(known, name) / size:,.2f}" if known else ""
        rows.append((name, f"{getattr(rates, name) / size:,.2f}", shipped, f"{unit} {assumed}"))
    return [f"{rates.gpu}, {rates.memory_gib:g} GiB", *aligned(rows)]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _short(tokens: float) -> str:
    """Tokens in billions, or in millions, or all of them."""
    if tokens < 1e6:
        return f"{tokens:,.0f}"
    return f"{tokens / 1e9:,.2f} B" if tokens >= 1e9 else f"{tokens / 1e6:,.1f} M"
