"""The arms of the study ``time_to_loss``: chains of stages, each with its attention and its share of the steps; and
the training runs that these are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs.checkpoints import complete_checkpoints_in, step_of

#: Of an arm's steps.
PARTS = 16
#: Held-out pieces of a curve's points.
CURVE = 12


@dataclass(frozen=True)
class Stage:
    """A part of an arm's steps."""

    name: str
    """Names its folder: the same name, the same settings"""
    parts: int
    """Sixteenths of the steps"""
    lighthouse: tuple[str, ...] | None = None
    """Trainer settings of the Lighthouse layers; None: dense"""
    context: int | None = None
    """Tokens per sequence; None: the study's"""

    @property
    def settings(self) -> tuple[str, ...]:
        """Of the trainer: Lighthouse's, and every step logged where some are dense, to time each kind."""
        lighthouse = self.lighthouse or ()
        is_mixed = any(setting.startswith(DENSE_EVERY) for setting in lighthouse)
        return (*lighthouse, "--metrics.log_freq=1") if is_mixed else lighthouse


@dataclass(frozen=True)
class Arm:
    name: str
    stages: tuple[Stage, ...]

    def cannot_run(self, seq_len: int, local_layers: str | None = None) -> str | None:
        """Why this chain has no place in a study of ``seq_len`` tokens per sequence, and so per step."""
        if not local_layers and any(LOCAL_LAYERS in stage.settings for stage in self.stages):
            return "it needs weights whose local layers are known: run base in this --output, and name it, --start"
        for stage in self.stages:
            if stage.context is not None and seq_len % stage.context:
                return f"stage {stage.name!r} has {stage.context:,} tokens per sequence, which must divide {seq_len:,}"
        if self.stages[-1].lighthouse is not None or self.stages[-1].context not in (None, seq_len):
            return f"its last stage must be dense at {seq_len:,} tokens, as its held-out loss is"
        return None


def two_stages(name: str, parts: int, *lighthouse: str) -> tuple[Stage, ...]:
    return Stage(name, parts, lighthouse), Stage("dense", PARTS - parts)


DELAYED, CAUSAL = "--lighthouse.selection=delayed", "--lighthouse.selection=causal"
LOCAL = "--lighthouse.local_window="
CAUSAL_W512 = (CAUSAL, f"{LOCAL}512")
SOFTMAX_W512 = (*CAUSAL_W512, "--lighthouse.combine=softmax")
WINDOW_ALONE = ("--lighthouse.selection=none", f"{LOCAL}1024")
DENSE_EVERY = "--lighthouse.dense_every="
KEEP_LOOKING_BACK = "--lighthouse.layers=0-6,8"
#: Those of the base weights that do not look back, as ``base`` has found them: other weights, other layers.
LOCAL_LAYERS = "--lighthouse.layers=LOCAL"
ARMS = [
    Arm("dense", (Stage("dense", PARTS),)),
    Arm("published 10:6", two_stages("published", 10)),
    Arm("published 12:4", two_stages("published", 12)),
    Arm("published 14:2", two_stages("published", 14)),
    Arm("delayed 10:6", two_stages("delayed", 10, DELAYED)),
    Arm("delayed 14:2", two_stages("delayed", 14, DELAYED)),
    *(
        Arm(
            f"causal W{window} {parts}:{PARTS - parts}",
            two_stages(f"causal-w{window}", parts, CAUSAL, f"{LOCAL}{window}"),
        )
        for window, splits in ((512, (10, 12, 14, 15)), (128, (14,)), (1024, (14,)))
        for parts in splits
    ),
    Arm("published layers 3-6 10:6", two_stages("layers-3-6", 10, "--lighthouse.layers=3-6")),
    Arm("k1024 10:6", two_stages("k1024", 10, "--lighthouse.top_k=1024")),
    Arm("k2048 10:6", two_stages("k2048", 10, "--lighthouse.top_k=2048")),
    *(
        Arm(
            f"causal W512 every 8th dense {parts}:{PARTS - parts}",
            two_stages("causal-w512-every-8th-dense", parts, *CAUSAL_W512, f"{DENSE_EVERY}8"),
        )
        for parts in (14, 15)
    ),
    Arm("causal W512 k1024 14:2", two_stages("causal-w512-k1024", 14, *CAUSAL_W512, "--lighthouse.top_k=1024")),
    Arm("causal W512 layers 1-7 14:2", two_stages("causal-w512-1-7", 14, *CAUSAL_W512, "--lighthouse.layers=1-7")),
    # Dense stay the two layers with which the base weights look back (docs: the report, "Which layers look back").
    *(
        Arm(
            f"causal W512 layers 0-6 and 8 {parts}:{PARTS - parts}",
            two_stages("causal-w512-looking-back", parts, *CAUSAL_W512, KEEP_LOOKING_BACK),
        )
        for parts in (10, 12, 14, 15)
    ),
    Arm("published layers 0-6 and 8 10:6", two_stages("published-looking-back", 10, KEEP_LOOKING_BACK)),
    Arm(
        "causal W512 layers 0-6 14:2",
        two_stages("causal-w512-last-3-dense", 14, *CAUSAL_W512, "--lighthouse.layers=0-6"),
    ),
    Arm(
        "causal W512 layers 1-6 and 8 14:2",
        two_stages("causal-w512-looking-back-3", 14, *CAUSAL_W512, "--lighthouse.layers=1-6,8"),
    ),
    Arm(
        "window 1024 alone layers 0-6 and 8 14:2",
        two_stages("window-1024-looking-back", 14, *WINDOW_ALONE, KEEP_LOOKING_BACK),
    ),
    Arm(
        "short 8192, causal W512 layers 0-6 and 8, dense 4:10:2",
        (
            Stage("short", 4, context=8192),
            Stage("causal-w512-looking-back", 10, (*CAUSAL_W512, KEEP_LOOKING_BACK)),
            Stage("dense", 2),
        ),
    ),
    Arm(
        "causal W512 layers 0-6 and 8 every 8th dense 14:2",
        two_stages("causal-w512-looking-back-every-8th", 14, *CAUSAL_W512, KEEP_LOOKING_BACK, f"{DENSE_EVERY}8"),
    ),
    Arm(
        "window 1024 alone layers 0-6 and 8 every 8th dense 14:2",
        two_stages("window-1024-looking-back-every-8th", 14, *WINDOW_ALONE, KEEP_LOOKING_BACK, f"{DENSE_EVERY}8"),
    ),
    Arm(
        "window 512 alone layers 0-6 and 8 every 8th dense 14:2",
        two_stages(
            "window-512-looking-back-every-8th",
            14,
            *("--lighthouse.selection=none", f"{LOCAL}512", KEEP_LOOKING_BACK, f"{DENSE_EVERY}8"),
        ),
    ),
    Arm(
        "short 8192, causal W512 layers 0-6 and 8 every 8th dense, dense 8:6:2",
        (
            Stage("short", 8, context=8192),
            Stage("causal-w512-looking-back-every-8th", 6, (*CAUSAL_W512, KEEP_LOOKING_BACK, f"{DENSE_EVERY}8")),
            Stage("dense", 2),
        ),
    ),
    # The parts of a position merged as one softmax, which is what dense weights know.
    Arm("softmax W512 14:2", two_stages("softmax-w512", 14, *SOFTMAX_W512)),
    *(
        Arm(
            f"softmax W512 layers 0-6 and 8 {parts}:{PARTS - parts}",
            two_stages("softmax-w512-looking-back", parts, *SOFTMAX_W512, KEEP_LOOKING_BACK),
        )
        for parts in (14, 15)
    ),
    *(
        Arm(
            f"softmax W512 k{top_k} layers 0-6 and 8 14:2",
            two_stages(
                f"softmax-w512-k{top_k}-looking-back",
                14,
                *(*SOFTMAX_W512, KEEP_LOOKING_BACK, f"--lighthouse.top_k={top_k}"),
            ),
        )
        for top_k in (1024, 2048)
    ),
    *(
        Arm(
            f"softmax W512 local layers {parts}:{PARTS - parts}",
            two_stages("softmax-w512-local-layers", parts, *SOFTMAX_W512, LOCAL_LAYERS),
        )
        for parts in (12, 14, 15)
    ),
    Arm(
        "softmax W512 local layers every 8th dense 14:2",
        two_stages("softmax-w512-local-layers-every-8th", 14, *SOFTMAX_W512, LOCAL_LAYERS, f"{DENSE_EVERY}8"),
    ),
    Arm(
        "window 1024 alone local layers every 8th dense 14:2",
        two_stages("window-1024-local-layers-every-8th", 14, *WINDOW_ALONE, LOCAL_LAYERS, f"{DENSE_EVERY}8"),
    ),
    Arm("published local layers 10:6", two_stages("published-local-layers", 10, LOCAL_LAYERS)),
    Arm(
        "softmax W512 layers 0-6 and 8 every 8th dense 14:2",
        two_stages("softmax-w512-looking-back-every-8th", 14, *SOFTMAX_W512, KEEP_LOOKING_BACK, f"{DENSE_EVERY}8"),
    ),
    Arm(
        "short 8192, softmax W512 layers 0-6 and 8, dense 4:10:2",
        (
            Stage("short", 4, context=8192),
            Stage("softmax-w512-looking-back", 10, (*SOFTMAX_W512, KEEP_LOOKING_BACK)),
            Stage("dense", 2),
        ),
    ),
    Arm("short 8192 then long 14:2", (Stage("short", 14, context=8192), Stage("dense", 2))),
    Arm("window 1024 alone 14:2", two_stages("window-1024", 14, *WINDOW_ALONE)),
    Arm("window 1024 alone 10:6", two_stages("window-1024", 10, *WINDOW_ALONE)),
    Arm(
        "causal W512, layers 3-6, dense 12:2:2",
        (
            Stage("causal-w512", 12, CAUSAL_W512),
            Stage("causal-w512-3-6", 2, (*CAUSAL_W512, "--lighthouse.layers=3-6")),
            Stage("dense", 2),
        ),
    ),
    Arm("short 8192 then long", (Stage("short", 10, context=8192), Stage("dense", 6))),
    Arm("short, Lighthouse, dense", (Stage("short", 4, context=8192), Stage("published", 8, ()), Stage("dense", 4))),
    Arm("dense, again", (Stage("dense-again", PARTS),)),
]


@dataclass(frozen=True)
class Run:
    """A stage of an arm as a training run."""

    stage: Stage
    folder: Path
    first: int
    """The step that it starts after"""
    last: int
    command: list[str]

    @property
    def done(self) -> bool:
        return self.last in map(step_of, complete_checkpoints_in(self.checkpoints))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"


def trainer_settings(stage: Stage, options: argparse.Namespace) -> list[str]:
    """The trainer's, with the layers that were found to be local."""
    found = f"--lighthouse.layers={options.local_layers}"
    return [found if setting == LOCAL_LAYERS else setting for setting in stage.settings]


def runs_of(arm: Arm, options: argparse.Namespace) -> list[Run]:
    """The commands of an arm. Folders tell the chain so far: arms with the same beginning share it.

    A step has ``options.seq_len`` tokens in every stage: one sequence, or as many short ones as make as many.
    """
    unit, text = options.steps // PARTS, options.output / f"text-seed{options.seed}"
    common = [
        *("--training.dataset=c4_local", f"--training.dataset_path={text}", f"--debug.seed={options.seed}"),
        *(f"--lr_scheduler.total_steps={options.steps}", f"--checkpoint.interval={unit}", "--lighthouse.top_k=1536"),
    ]
    validate = [
        *("--validation.enable", "--validation.dataset=c4_local_validation", f"--validation.dataset_path={text}"),
        *(f"--validation.seq_len={options.seq_len}", "--validation.local_batch_size=1", f"--validation.steps={CURVE}"),
        # Every step is logged: the spike is the first. Of a dense stage nothing but its end is needed later.
        *(f"--validation.freq={unit}", "--metrics.log_freq=1", "--checkpoint.keep_latest_k=3"),
    ]
    runs: list[Run] = []
    for stage in arm.stages:
        first = runs[-1].last if runs else 0
        last = first + stage.parts * unit
        before = f"{runs[-1].folder.name}-{runs[-1].stage.parts}-" if runs else f"seed{options.seed}-"
        folder = options.output / "runs" / f"{before}{stage.name}"
        context = stage.context or options.seq_len
        # What is held out is scored with dense attention at the study's context only.
        is_scored = stage.lighthouse is None and context == options.seq_len
        if runs:
            start = runs[-1].checkpoints / f"step-{first}"
            attention = "dense" if stage.lighthouse is None else "lighthouse"
            words = [f"--attention={attention}", f"--seq-len={context}", f"--total-steps={last}"]
            # It would be taken over from the stage before.
            scored = validate if is_scored else ["--validation.no-enable"]
            changes = [*trainer_settings(stage, options), *scored, *options.overrides]
            command = launch.resume_dense_command(start, folder, launch.one_node(1), changes, *words)
        else:
            settings = ["--job.config_file", str(options.config), f"--job.dump_folder={folder}"]
            settings += [f"--training.steps={last}", *common, f"--training.seq_len={context}"]
            settings += [f"--training.local_batch_size={options.seq_len // context}"]
            settings += ["--lighthouse.no-enable"] if stage.lighthouse is None else trainer_settings(stage, options)
            settings += [] if options.start is None else [f"--checkpoint.initial_load_path={options.start}"]
            command = launch.trainer_command(
                launch.one_node(1), [*settings, *(validate if is_scored else ()), *options.overrides]
            )
        runs.append(Run(stage, folder, first, last, command))
    return runs
