"""What a run will cost, before it is launched: what fits, how fast it is, how long it takes.

    python scripts/plan.py --model 530m --seq-len 98304 --gpus 8 --gpu h200 --tokens 50e9
    python scripts/plan.py --model my/config.json --seq-len 131072 --gpus 2 --top-k 2048 --toml my_run.toml
    python scripts/plan.py --model train_configs/530m_cp.toml --gpus 8 -- --lighthouse.local_window=512
    python scripts/plan.py --model train_configs/530m_recommended.toml --gpus 8 --gpu h100 --short 8192:4000
    python scripts/plan.py --measure my_gpu.json          # the rates of the GPU at hand, in about a minute
    torchrun --nproc_per_node 8 -m torchtitan.experiments.lighthouse.plan --measure my_gpu.json    # and of the link
    python scripts/plan.py --rates my_gpu.json --model 32m --seq-len 65536 --tokens 1e9

prints the valid budgets (top_k) of the length, each way to run it with its memory and speed, and for the fastest one
that fits, the steps, hours and memory of Stage 1, of Stage 2, and of a dense run of as many tokens, the size of a
checkpoint and how often to save one. Settings after "--" are the trainer's. Nothing is started, and no GPU is needed.
Predictions are for compiled bfloat16 training with AdamW and FSDP (docs/plan.md).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.planning.rates import Rates
    from torchtitan.experiments.lighthouse.planning.workload import Checkpointing, Workload

#: Of the budget where none is given: Hoffmann et al. (arXiv 2203.15556), about 20 tokens for each parameter.
TOKENS_PER_PARAMETER = 20

#: The paper's; the size of a step follows from it and the budget, where nothing says how large a step is.
STEPS = 16_000

#: Weights that are gathered once are kept where they take no more of the memory than this.
SMALL = 0.05


def main(arguments: list[str] | None = None) -> None:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("plan"):
        if options.measure is not None:
            measure_and_write(options.measure)
        else:
            print("\n".join(plan(options)))


def measure_and_write(file: Path) -> None:
    """Measure the GPU's rates, on all processes that torchrun has started.

    Raises:
        Refused: without a GPU, or for a file that cannot be written.
    """
    import os

    import torch
    import torch.distributed as dist
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.planning import measure, rates, tables

    if not torch.cuda.is_available():
        raise Refused("--measure: there is no GPU here; run it where the training will run")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise Refused(f"--measure {file}: cannot be written ({error})") from error
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl", device_id=device)
    measured = measure.measure(device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        rates.write_rates(measured, file)
        print("\n".join([*tables.measured(measured), "", f"Written: {file}; plan takes it with --rates {file}"]))
    if dist.is_initialized():
        dist.destroy_process_group()


def plan(options: argparse.Namespace) -> list[str]:
    """The lines of a plan; writes the TOML file where one is asked for.

    Raises:
        Refused: for what cannot be planned, naming the value, the rule and the nearest valid value.
    """
    from dataclasses import replace

    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.planning import choices, draft, tables
    from torchtitan.experiments.lighthouse.planning.rates import read_rates
    from torchtitan.experiments.lighthouse.planning.workload import workload
    from torchtitan.experiments.lighthouse.train import check_tokenizer

    _check(options)
    rates = read_rates(options.gpu, options.rates)
    if options.memory is not None:
        rates = replace(rates, memory_gib=options.memory)
    sections = _sections(options)
    settings = draft.merge(sections, options.overrides)
    tokens, split = _budget(options, sections, settings.llama)
    if sections["training"]["global_batch_size"] < 1:
        sequences = tokens / STEPS / settings.training.seq_len
        at_once = options.gpus * settings.training.local_batch_size
        sections["training"]["global_batch_size"] = max(1, round(sequences / at_once)) * at_once
        settings = draft.merge(sections, options.overrides)
    work = workload(settings, options.gpus)
    if not work.lighthouse_layers:
        raise Refused("lighthouse.enable=false: plan compares with dense itself; nearest valid value: true")
    steps = round(tokens / work.tokens_per_step)
    stage1 = round(steps * split[0] / sum(split))
    short_len, short = options.short or (None, 0)
    if not 0 < stage1 < steps:
        raise Refused(
            f"--tokens {tokens:g}: must be enough for a step of {work.tokens_per_step:,} tokens in each stage of the "
            f"split {split[0]:g}:{split[1]:g}; nearest valid value: "
            f"{round(work.tokens_per_step * sum(split) / min(split)):,}"
        )
    if short >= stage1:
        raise Refused(
            f"--short {short_len}:{short}: must end before Stage 1, whose last step is {stage1:,}; nearest valid "
            f"value: {short_len}:{stage1 - 1}"
        )
    work = replace(work, keeps_weights=_keeps_weights(sections, work, rates))
    before = None if short_len is None else (short_len, short * work.tokens_per_step)
    long = (steps - short) * work.tokens_per_step
    found = [
        choice
        for choice in choices.choices(work, rates, long, (stage1 - short, steps - stage1), before)
        if options.checkpointing in (None, choice.work.checkpointing)
        and options.context_parallel in (None, choice.work.context_parallel)
    ]
    chosen = choices.best(found, rates)
    minutes = choices.interval_minutes(work, options.disk * 1e9)
    lines = [
        *tables.head(options.model, work, rates),
        *tables.budgets(work),
        "",
        *tables.ways(found, chosen, rates),
        "",
        *tables.stages(chosen, stage1, steps, short),
        "",
        tables.checkpoints(chosen, options.disk, minutes),
        *tables.host(chosen.work),
        *tables.pace(chosen, rates),
        *tables.doubts(chosen.work, rates),
    ]
    if options.toml is None:
        return [*lines, "--toml FILE writes the settings of Stage 1"]
    _decide(sections, chosen.work, stage1, steps, minutes)
    sections["job"].setdefault("dump_folder", f"./outputs/{options.toml.stem}")
    settings = draft.merge(sections, options.overrides)
    workload(settings, options.gpus)
    check_tokenizer(settings)
    comment = ["Drafted by plan. The learning rate is a guess: plan does not predict it.", "", *lines]
    draft.write(sections, options.overrides, comment, options.toml)
    return [*lines, "", *tables.start(options.toml, settings, chosen, short)]


def _check(options: argparse.Namespace) -> None:
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.planning.step import GPUS_PER_NODE

    for name in ("gpus", "memory", "tokens", "disk", "seq_len", "sequences"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise Refused(f"--{name.replace('_', '-')} {value:g}: must be a positive number; nearest valid value: 1")
    degree, gpus = options.context_parallel, options.gpus
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        nearest = max(1, round(gpus / GPUS_PER_NODE)) * GPUS_PER_NODE
        raise Refused(
            f"--gpus {gpus}: must be at most {GPUS_PER_NODE}, or whole nodes of {GPUS_PER_NODE}; nearest valid value: "
            f"{nearest}"
        )
    if degree is not None and (degree < 1 or gpus % degree):
        nearest = min((n for n in range(1, gpus + 1) if gpus % n == 0), key=lambda n: abs(n - degree))
        raise Refused(f"--context-parallel {degree}: must divide the {gpus} GPUs; nearest valid value: {nearest}")


def _sections(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The draft, with what the command line asks for and a budget of the paper's share where nothing says more."""
    from torchtitan.experiments.lighthouse.planning import draft

    sections = draft.start(options.model)
    training, lighthouse = sections["training"], sections["lighthouse"]
    same_length = options.seq_len in (None, training["seq_len"])
    lighthouse["enable"] = True
    training["seq_len"] = options.seq_len or training["seq_len"]
    if sections.get("validation", {}).get("enable"):
        sections["validation"].setdefault("seq_len", training["seq_len"])
    if options.sequences is not None:
        training["global_batch_size"] = options.sequences
    sections["parallelism"] |= {"data_parallel_shard_degree": -1}
    if options.context_parallel is not None:
        sections["parallelism"]["context_parallel_degree"] = options.context_parallel
    settings = draft.merge(sections, options.overrides)
    checkpointing = sections["activation_checkpoint"]
    if options.checkpointing is not None:
        checkpointing |= {"mode": options.checkpointing} | _budget_of(options.checkpointing)
    elif settings.activation_checkpoint.offload_layers and settings.activation_checkpoint.mode == "none":
        checkpointing["mode"] = "full"  # The draft's is no wish.
    if "layers" not in lighthouse:
        lighthouse["layers"] = draft.layers_through_lighthouse(settings.llama.n_layers or 0)
    if options.top_k is not None:
        lighthouse["top_k"] = options.top_k
    elif "top_k" not in lighthouse or not same_length:
        lighthouse["top_k"] = draft.published_budget(settings)
    return sections


def _budget(
    options: argparse.Namespace, sections: dict[str, dict[str, Any]], sizes: Any
) -> tuple[float, tuple[float, float]]:
    """Tokens of both stages, and how they are shared."""
    from torchtitan.experiments.lighthouse.planning.choices import SPLIT
    from torchtitan.experiments.lighthouse.planning.draft import parameters

    training = sections["training"]
    steps, total = training.get("steps"), sections["lr_scheduler"].get("total_steps")
    split = options.split or ((steps, total - steps) if steps and total and total > steps else SPLIT)
    if options.tokens is not None:
        return options.tokens, split
    if total and training["global_batch_size"] > 0:
        return total * training["global_batch_size"] * training["seq_len"], split
    return TOKENS_PER_PARAMETER * parameters(sizes), split


def _keeps_weights(sections: dict[str, dict[str, Any]], work: Workload, rates: Rates) -> bool:
    """As the file says; otherwise where they are small."""
    if "fsdp_reshard_after_forward" not in sections["parallelism"]:
        small = 2 * work.parameters / 2**30 <= SMALL * rates.memory_gib
        sections["parallelism"]["fsdp_reshard_after_forward"] = "never" if small else "default"
    return work.gpus == 1 or sections["parallelism"]["fsdp_reshard_after_forward"] == "never"


def _decide(sections: dict[str, dict[str, Any]], work: Workload, stage1: int, steps: int, minutes: int) -> None:
    """What the plan has chosen, into the draft."""
    from torchtitan.experiments.lighthouse.planning.draft import WARM_UP

    sections["training"] |= {"steps": stage1, "global_batch_size": work.sequences_per_step}
    sections["lr_scheduler"]["total_steps"] = steps
    sections["lr_scheduler"]["warmup_steps"] = min(
        sections["lr_scheduler"].get("warmup_steps", steps), max(1, round(WARM_UP * steps))
    )
    sections["activation_checkpoint"] |= {"mode": work.checkpointing} | _budget_of(work.checkpointing)
    sections["parallelism"]["context_parallel_degree"] = work.context_parallel
    # By the clock; by steps, at the end alone.
    sections["checkpoint"] |= {"interval_minutes": minutes, "interval": stage1}


def _budget_of(checkpointing: Checkpointing) -> dict[str, float]:
    """The setting that goes with the mode ``memory_budget``."""
    from torchtitan.experiments.lighthouse.planning.workload import MEMORY_BUDGET

    return {"memory_budget": MEMORY_BUDGET} if checkpointing == "memory_budget" else {}


def _split(text: str) -> tuple[float, float]:
    """10:6"""
    try:
        first, second = map(float, text.split(":"))
    except ValueError:
        first = second = 0.0
    if not (0 < first < math.inf and 0 < second < math.inf):
        raise argparse.ArgumentTypeError(f"{text}: must be two positive numbers, such as 10:6")
    return first, second


def _short(text: str) -> tuple[int, int]:
    """8192:4000"""
    try:
        length, steps = map(int, text.split(":"))
    except ValueError:
        length = steps = 0
    if length < 1 or steps < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be two positive whole numbers, such as 8192:4000")
    return length, steps


def _parse(arguments: list[str]) -> argparse.Namespace:
    # As launch.split_overrides, whose import would bring torch.
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="530m", help="a flavor, a Llama's config.json, or a .toml of settings")
    parser.add_argument("--seq-len", type=int, help="the context, in tokens (default: the file's, or 98304)")
    parser.add_argument("--top-k", type=int, help="the budget (default: the file's, or the paper's share)")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", default="h200", help="whose rates: h100 or h200 (default: %(default)s)")
    parser.add_argument("--rates", type=Path, help="a file of --measure, in place of --gpu")
    parser.add_argument("--memory", type=float, help="GiB of each GPU (default: the GPU's)")
    parser.add_argument("--tokens", type=float, help="of all stages together (default: the file's, or 20 a parameter)")
    parser.add_argument("--split", type=_split, help="tokens of Stage 1 : Stage 2 (default: the file's, or 10:6)")
    parser.add_argument(
        "--short",
        type=_short,
        metavar="TOKENS:STEPS",
        help="before Stage 1: dense steps on sequences of so many tokens",
    )
    parser.add_argument(
        "--sequences", type=int, help="of a step (default: the file's, or as many as make 16,000 steps)"
    )
    parser.add_argument("--checkpointing", choices=("none", "memory_budget", "selective", "full"), help="only this one")
    parser.add_argument("--context-parallel", type=int, help="only this degree")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s that checkpoints are written at")
    parser.add_argument("--toml", type=Path, help="write the settings of Stage 1 to this file")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure the rates of the GPU at hand, and end")
    return parser.parse_args(arguments, argparse.Namespace(overrides=overrides))


if __name__ == "__main__":
    main()
