#!/usr/bin/env python
"""Stage 2: resume a Stage 1 checkpoint with dense attention in every layer.

    python scripts/resume_dense.py outputs/530m_stage1

takes the newest complete checkpoint of that run (or the one you name, outputs/530m_stage1/checkpoint/step-10000) and
goes on with the same weights, optimizer state, data position and learning-rate schedule, to the end of the schedule or
to --total-steps, in a dump folder of its own, so that Stage 1's files are never touched. Run the same command again
after an interruption and Stage 2 continues. Everything is checked before anything is launched or written. Settings
after "--" change Stage 2 only:

    python scripts/resume_dense.py RUN -- --activation_checkpoint.mode full
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    options, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    # Only now: --help should not wait for torch.
    from torchtitan.experiments.lighthouse.errors import exit_on_refusal

    with exit_on_refusal("resume_dense"):
        resume(options, overrides)


def resume(options: argparse.Namespace, overrides: list[str]) -> None:
    """Check, prepare Stage 2's folder, and become the trainer.

    Raises:
        Refused: if Stage 2 would not be a continuation of Stage 1.
    """
    from dataclasses import asdict

    from torchtitan.experiments.lighthouse.runs import launch, stage2
    from torchtitan.experiments.lighthouse.runs.checkpoints import dump_folder_of

    stage1 = stage2.find_stage1(options.stage1)
    folder = options.dump_folder or Path(f"{dump_folder_of(stage1.checkpoint)}_dense")
    newest = stage2.newest_step_in(folder, stage1)
    config = stage2.stage2_settings(stage1, folder, options.total_steps)
    torchrun = options.torchrun or launch.one_node(stage1.world_size)
    processes = launch.read_torchrun(torchrun)
    toml = stage2.as_toml(config)
    changes = [*stage2.explicit_none(config), *overrides]
    merged = stage2.merge(toml, changes)
    stage2.check_overrides(config, merged)
    stage2.check_continuation(stage1, merged, processes.world_size)

    last = merged.training.steps
    if newest is not None and newest >= last:
        print(f"Stage 2 in {folder} is complete: {newest:,} of {last:,} steps.")
        return
    start = f"step {newest:,} of Stage 2" if newest is not None else f"{stage1.checkpoint} (step {stage1.step:,})"
    print(f"Stage 2 from {start} to step {last:,}, dense, in {folder}, {processes.world_size} process(es)")
    for name, before, after in stage2.differences(stage1.config, asdict(merged)):
        print(f"  {name}: {before!r} -> {after!r}")
    settings = ["--job.config_file", str(folder / stage2.SETTINGS_FILE), *changes]
    command = launch.trainer_command(torchrun, settings)
    if options.dry_run:
        print(f"# {folder / stage2.SETTINGS_FILE} would hold:\n{toml}\n{launch.as_line(command)}", flush=True)
        return
    if processes.node_rank in (0, None):
        stage2.prepare(folder, toml, folder / merged.checkpoint.folder if newest is None else None)
    else:
        stage2.wait_until_prepared(folder, toml)
    launch.execute(command)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    # As launch.split_overrides, whose import would bring torch.
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage1", type=Path, help="Stage 1's dump folder, or one of its checkpoint/step-N folders")
    parser.add_argument(
        "--total-steps", type=int, help="steps of both stages together (default: Stage 1's lr_scheduler.total_steps)"
    )
    parser.add_argument("--dump-folder", type=Path, help="Stage 2's own folder (default: Stage 1's with _dense added)")
    parser.add_argument(
        "--torchrun",
        metavar="ARGS",
        help="torchrun's arguments as one string, e.g. '--nnodes 4 --nproc_per_node 8 --rdzv_backend c10d "
        "--rdzv_endpoint HOST:PORT' (default: one node, as many processes as Stage 1 had)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print settings and command; write nothing")
    return parser.parse_args(arguments), overrides


if __name__ == "__main__":
    main()
