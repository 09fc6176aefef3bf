#!/usr/bin/env python
"""The paper's runs by name: every row of its table, the splits and the context-parallel rows.

    python scripts/sweep.py list                          # names, geometry, predictions, how far each one is
    python scripts/sweep.py show l3-p2-k1536-dilated      # the command and the settings, nothing is started
    python scripts/sweep.py run l3-p2-k1536-dilated       # Stage 1
    python scripts/sweep.py stage2 l3-p2-k1536-dilated    # Stage 2, from its last checkpoint
    python scripts/sweep.py run dense --torchrun "--nnodes 2 --nproc_per_node 8 …" -- --training.dataset c4_local …

A run is a file of train_configs and a few overrides; those after "--" come last. Runs live in outputs/sweep/NAME/stage1
and stage2 (--outputs changes the folder). The same command, run again, continues where the run was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torchtitan.experiments.lighthouse.job_config import MergedConfig
    from torchtitan.experiments.lighthouse.planning.rates import Rates

STEPS = 16_000


@dataclass(frozen=True)
class Run:
    """One row of the paper's table: settings, and the figures that were published for it."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    stage1_steps: int = STEPS
    loss: float | None = None
    """The published final loss, nats per token."""
    tokens_per_second: float | None = None
    """Published thousands of tokens/s/GPU in Stage 1, on B200s."""

    @property
    def is_dense(self) -> bool:
        return self.config == "530m_dense.toml"


def _grid(
    levels: int, pooling_factor: int, top_k: int, scorer: str, tokens_per_second: float, loss: float,
    stage1: int = 10_000, split: bool = False,
) -> Run:  # fmt: skip
    suffix = f"-{stage1 // 1000}k{(STEPS - stage1) // 1000}k" if split else ""
    return Run(
        f"l{levels}-p{pooling_factor}-k{top_k}-{scorer}{suffix}",
        "530m_stage1.toml",
        (
            *(f"--lighthouse.num_levels={levels}", f"--lighthouse.pooling_factor={pooling_factor}"),
            *(f"--lighthouse.top_k={top_k}", f"--lighthouse.scorer={scorer}"),
        ),
        stage1,
        loss,
        tokens_per_second,
    )


_TABLE = [
    Run("dense", "530m_dense.toml", (), STEPS, 0.7237, 45.6),
    _grid(3, 4, 1536, "norm", 126.0, 0.6946),
    _grid(3, 4, 2048, "norm", 122.4, 0.6921),
    _grid(3, 4, 1536, "dilated", 99.5, 0.6881),
    _grid(3, 4, 2048, "dilated", 97.1, 0.6969),
    _grid(3, 2, 1536, "dilated", 93.9, 0.6825),
    _grid(3, 8, 1536, "dilated", 92.1, 0.6828),
    _grid(3, 2, 2048, "dilated", 90.9, 0.6880),
    _grid(3, 2, 3072, "dilated", 86.1, 0.6890),
    _grid(3, 2, 4096, "dilated", 83.5, 0.6951),
    _grid(3, 2, 6144, "dilated", 88.3, 0.6831),
    _grid(4, 2, 1536, "dilated", 96.4, 0.6978),
    _grid(4, 2, 2048, "dilated", 94.5, 0.6983),
    _grid(5, 2, 1536, "dilated", 96.3, 0.6991),
    _grid(5, 2, 2048, "dilated", 92.3, 0.7043),
    _grid(3, 2, 6144, "dilated", 75.0, 0.6980, 10_000, split=True),
    _grid(3, 2, 6144, "dilated", 75.4, 0.7001, 11_000, split=True),
    _grid(3, 2, 6144, "dilated", 74.7, 0.7102, 12_000, split=True),
    # The paper does not say how it split k = 1536 over 2 ranks; 12 tiles make 4 chunks of 3.
    Run("l3-p4-k1536-norm-cp2", "530m_cp.toml", ("--lighthouse.top_k=1536",), 10_000, 0.6903, 91.8),
    Run("l3-p4-k2048-norm-cp2", "530m_cp.toml", (), 10_000, 0.6928, 89.2),
    Run("l3-p4-k4096-norm-256k-cp8", "530m_256k_cp8.toml", (), 10_000, 0.6721, 48.9),
    Run("l4-p4-k4096-norm-1m-cp8", "1m_cp8_32gpus.toml", (), 10_000),
]
RUNS = {run.name: run for run in _TABLE}


def folder_of(run: Run, stage: int, outputs: Path) -> Path:
    return outputs / run.name / f"stage{stage}"


def arguments_of(run: Run, outputs: Path, overrides: list[str]) -> list[str]:
    """The trainer's arguments for Stage 1 (or for the dense run)."""
    return [
        *("--job.config_file", str(_train_configs() / run.config)),
        f"--job.dump_folder={folder_of(run, 1, outputs)}",
        f"--job.description={run.name}",
        f"--training.steps={run.stage1_steps}",
        *run.overrides,
        *overrides,
    ]


def settings_of(run: Run, outputs: Path = Path("outputs/sweep"), overrides: list[str] | None = None) -> MergedConfig:
    """The merged settings of Stage 1.

    Raises:
        SystemExit: from the parser, for an override that does not exist.
    """
    from torchtitan.config import ConfigManager

    # All of train_configs name the module that adds [lighthouse].
    return cast("MergedConfig", ConfigManager().parse_args(arguments_of(run, outputs, overrides or [])))


def geometry(settings: MergedConfig) -> str:
    """S, k and tiles of a run that uses Lighthouse."""
    if not settings.lighthouse.enable:
        return "dense"
    config, seq_len = settings.lighthouse.attention_config(), settings.training.seq_len
    return f"S {config.selected_length(seq_len):,} of {seq_len:,}, k {config.top_k}, {config.num_tiles} tiles"


def progress(run: Run, outputs: Path) -> str:
    """How far a run is on disk, its latest loss and its newest checkpoint."""
    from torchtitan.experiments.lighthouse.runs.checkpoints import complete_checkpoints_in, step_of
    from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, read_metrics

    found = []
    for stage in (1, 2):
        folder = folder_of(run, stage, outputs)
        if not (folder / METRICS_FILE).is_file():
            continue
        records = [record for record in read_metrics(folder / METRICS_FILE) if "loss" in record]
        saved = [step_of(path) for path in complete_checkpoints_in(folder / "checkpoint")]
        if records:
            last = records[-1]
            saved_at = f", saved at {saved[-1]:,}" if saved else ""
            found.append(f"stage {stage}: step {last['step']:,}, loss {last['loss']:.4f}{saved_at}")
    return "; ".join(found) or "not started"


def command_of(run: Run, stage: int, options: argparse.Namespace) -> list[str]:
    """What ``run`` and ``stage2`` execute.

    Raises:
        Refused: for Stage 2 of a dense run.
    """
    from torchtitan.experiments.lighthouse.errors import Refused
    from torchtitan.experiments.lighthouse.runs import launch

    if stage == 1:
        return launch.trainer_command(options.torchrun, arguments_of(run, options.outputs, options.overrides))
    if run.is_dense:
        raise Refused(f"{run.name} is dense from the start: it has no Stage 2")
    stage1, stage2 = (folder_of(run, number, options.outputs) for number in (1, 2))
    return launch.resume_dense_command(stage1, stage2, options.torchrun, options.overrides)


def show(run: Run, options: argparse.Namespace) -> None:
    """Print the commands of both stages and the merged settings; start nothing."""
    from torchtitan.experiments.lighthouse.runs import launch, next_stage

    settings = settings_of(run, options.outputs, options.overrides)
    for stage in (1,) if run.is_dense else (1, 2):
        print(f"# Stage {stage}\n{launch.as_line(command_of(run, stage, options))}\n")
    print(f"# {geometry(settings)}; {run.stage1_steps:,} of {settings.lr_scheduler.total_steps:,} steps in Stage 1")
    if run.loss is not None:
        print(f"# published: loss {run.loss:.4f}, {run.tokens_per_second}k tokens/s/GPU in Stage 1 (B200)")
    print(f"# here: {progress(run, options.outputs)}\n")
    print(next_stage.as_toml(asdict(settings)))


#: What the words in ``table`` mean.
EXPLANATION = """
A line is one run. S rows: in a Lighthouse layer attention runs on S pooled queries, keys and values, its rows, in place
of the N tokens of the sequence; k of each level are expanded, in tiles that each choose on their own.
GiB of a GPU, tokens/s/GPU and hours, Stage 1 / Stage 2, are predictions (docs/plan.md) for
{where}.
"""

#: Where a prediction has the mark.
DOES_NOT_FIT = (
    "! A GPU has {gib:g} GiB. scripts/plan.py finds settings that fit, for example activation_checkpoint.mode=full."
)


def table(options: argparse.Namespace) -> str:
    """A line for each run, and what the columns mean.

    Raises:
        Refused: for a GPU without rates, or a number of GPUs that no run can have.
    """
    from torchtitan.experiments.lighthouse.planning.rates import read_rates
    from torchtitan.experiments.lighthouse.planning.tables import aligned
    from torchtitan.experiments.lighthouse.runs.launch import read_torchrun

    rates, gpus = read_rates(options.gpu, options.rates), read_torchrun(options.torchrun).world_size
    lines = [("name", "rows", "steps", "GiB", "tokens/s/GPU", "hours", "published loss", "here")]
    larger = []
    for run in RUNS.values():
        settings = settings_of(run)
        published = f"{run.loss:.4f}" if run.loss is not None else ""
        steps = "" if run.is_dense else f"{run.stage1_steps // 1000}k+{(STEPS - run.stage1_steps) // 1000}k"
        taken = max(gpus, _least_gpus(settings))
        larger += [f"{run.name} on {taken}"] if taken > gpus else []
        figures = predictions(run, settings, taken, rates)
        lines.append((run.name, geometry(settings), steps, *figures, published, progress(run, options.outputs)))
    where = ", ".join([f"{gpus} × {rates.gpu}", *larger, f"rates of {rates.date}"])
    explanation = EXPLANATION.format(where=where)
    if any("!" in memory for _, _, _, memory, *_ in lines):
        explanation += DOES_NOT_FIT.format(gib=rates.memory_gib)
    return "\n".join(aligned(lines)) + "\n" + explanation.rstrip()


def predictions(run: Run, settings: MergedConfig, gpus: int, rates: Rates) -> tuple[str, str, str]:
    """GiB of a GPU (marked where there are not as many), tokens/s of a GPU and hours, of Stage 1 / Stage 2 (of a dense
    run, of the one stage)."""
    from torchtitan.experiments.lighthouse.planning.memory import fits
    from torchtitan.experiments.lighthouse.planning.step import predict
    from torchtitan.experiments.lighthouse.planning.workload import workload

    work = workload(settings, gpus)
    stages = [(work, run.stage1_steps)] + ([] if run.is_dense else [(work.dense(), STEPS - run.stage1_steps)])
    found = [(predict(stage, rates), steps * stage.tokens_per_step) for stage, steps in stages]
    return (
        " / ".join(f"{one.memory_gib:.0f}" + "!" * (not fits(one.memory_gib, rates.memory_gib)) for one, _ in found),
        " / ".join(f"{one.tokens_per_second:,.0f}" for one, _ in found),
        " / ".join(f"{one.hours(tokens, gpus):.1f}" for one, tokens in found),
    )


def _least_gpus(settings: MergedConfig) -> int:
    parallelism = settings.parallelism
    return parallelism.context_parallel_degree * max(1, parallelism.data_parallel_shard_degree)


def _parse(arguments: list[str]) -> argparse.Namespace:
    # As launch.split_overrides, whose import would bring torch.
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "show", "run", "stage2"))
    parser.add_argument("name", nargs="?", help="one of list's names")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/sweep"), help="where runs live")
    parser.add_argument(
        "--torchrun",
        default="--standalone --nproc_per_node 8",
        help="torchrun's arguments as one string; default: %(default)s",
    )
    parser.add_argument("--gpu", default="h200", help="list: whose rates, h100 or h200 (default: %(default)s)")
    parser.add_argument("--rates", type=Path, help="list: a file of plan --measure, in place of --gpu")
    options = parser.parse_args(arguments, argparse.Namespace(overrides=overrides))
    if options.command != "list" and options.name not in RUNS:
        parser.error(f"name {options.name!r}: must be one of {', '.join(RUNS)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal
    from torchtitan.experiments.lighthouse.runs import launch

    with exit_on_refusal("sweep"):
        if options.command == "list":
            print(table(options))
        elif options.command == "show":
            show(RUNS[options.name], options)
        else:
            launch.execute(command_of(RUNS[options.name], 1 if options.command == "run" else 2, options))


def _train_configs() -> Path:
    """The repository's folder of TOML files, which the installed package does not hold.

    Raises:
        Refused: where the package was installed without the repository.
    """
    from torchtitan.experiments.lighthouse.errors import Refused

    folder = Path(__file__).resolve().parents[3] / "train_configs"
    if not folder.is_dir():
        raise Refused(f"{folder} does not exist: the runs of the paper need the repository (make install)")
    return folder


if __name__ == "__main__":
    main()
