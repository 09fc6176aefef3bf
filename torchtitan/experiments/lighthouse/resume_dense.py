#!/usr/bin/env python
"""The next stage: resume a checkpoint with dense attention in every layer, or with other attention, layers or context.

    python scripts/resume_dense.py outputs/530m_stage1

is Stage 2 of the paper. It takes the newest sound checkpoint of that run (or the one you name,
outputs/530m_stage1/checkpoint/step-10000) and goes on with the same weights, optimizer state, data position and
learning-rate schedule, to the end of the schedule or to --total-steps, in a dump folder of its own, so that the files
of the stage before are never touched. Run the same command again after an interruption and the stage continues.
Everything is checked before anything is launched or written. Settings after "--" change this stage, and the stages that
continue it take them over; the stage before stays as it is:

    python scripts/resume_dense.py RUN -- --activation_checkpoint.mode full

Model, tokenizer and data stay those of the run, wherever their files lie now. Another one is refused, unless
"-- --checkpoint.allow_changed training.dataset_path" names it (docs/reliability.md has the table of settings).

Stages form a chain of any length, and only the first is started without this command. Dense at 8,192 tokens, then
through Lighthouse at 98,304, then dense at 98,304:

    python scripts/resume_dense.py SHORT --attention lighthouse --seq-len 98304 --total-steps 12000
    python scripts/resume_dense.py SHORT_lighthouse_98304

At another context the batch sizes follow, so that a step has as many tokens as before. The schedule of all stages is
lr_scheduler.total_steps of the first.
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
    """Check, prepare the stage's folder, and become the trainer.

    Raises:
        Refused: if the stage would not be a continuation of the one before.
    """
    from dataclasses import asdict

    from torchtitan.experiments.lighthouse.runs import (
        contract,
        fingerprints,
        launch,
        lock,
        next_stage,
        settings,
        stages,
    )

    before = stages.find_stage_before(options.before, options.verify)
    settings.import_modules(before.config, str(before.checkpoint))
    folder = options.dump_folder or next_stage.default_folder(before, options.attention, options.seq_len)
    torchrun = options.torchrun or launch.one_node(before.world_size)
    processes = launch.read_torchrun(torchrun)
    ranks = max(1, processes.world_size // stages.model_parallel_size(before.config))
    config = next_stage.next_settings(before, folder, options.total_steps, options.attention, options.seq_len, ranks)
    toml = next_stage.as_toml(config)
    changes = [*next_stage.explicit_none(config), *overrides]
    merged = settings.complete(next_stage.merge(toml, changes))
    newest = next_stage.newest_step_in(folder, before, merged)
    next_stage.check_overrides(before, config, merged)
    reads = fingerprints.of_run(merged)
    lines = contract.check_continuation(before, merged, processes.world_size, reads)
    if newest is not None and (there := contract.to_resume(merged)) is not None:
        lines = contract.check_resume(there, merged, processes.world_size, reads)

    this, last = before.next_name, merged.training.steps
    if newest is not None and newest >= last:
        print(f"{this} in {folder} is complete: {newest:,} of {last:,} steps.")
        return
    start = f"step {newest:,} of {this}" if newest is not None else f"{before.checkpoint} (step {before.step:,})"
    attention, count = stages.attention_of(asdict(merged)), processes.world_size
    print(f"{this} from {start} to step {last:,}, {attention}, in {folder}, {count} process(es)")
    for name, earlier, now in next_stage.differences(before.config, asdict(merged)):
        print(f"  {name}: {earlier!r} -> {now!r}")
    for line in lines:
        print(f"  {line}")
    file = folder / before.settings_file
    command = launch.trainer_command(torchrun, ["--job.config_file", str(file), *changes])
    if options.dry_run:
        print(f"# {file} would hold:\n{toml}\n{launch.as_line(command)}", flush=True)
        return
    if processes.node_rank in (0, None):
        lock.refuse_if_held(folder)
        next_stage.prepare(file, toml, folder / merged.checkpoint.folder if newest is None else None)
    else:
        next_stage.wait_until_prepared(file, toml)
    launch.execute(command)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    # As launch.split_overrides, whose import would bring torch.
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "before",
        metavar="RUN",
        type=Path,
        help="dump folder of the stage before, or one of its checkpoint/step-N folders",
    )
    parser.add_argument(
        "--attention",
        choices=("dense", "lighthouse"),
        default="dense",
        help="of the next stage (default: %(default)s); settings of [lighthouse] go after the --",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="the next stage's tokens per sequence (default: as before); the batch sizes follow, so that a step has as "
        "many tokens",
    )
    parser.add_argument(
        "--total-steps",
        type=int,
        help="steps of all stages up to this one (default: lr_scheduler.total_steps of Stage 1)",
    )
    parser.add_argument(
        "--dump-folder",
        type=Path,
        help="the next stage's own folder (default: RUN_dense, RUN_lighthouse, RUN_dense_N, …)",
    )
    parser.add_argument(
        "--torchrun",
        metavar="ARGS",
        help="torchrun's arguments as one string, e.g. '--nnodes 4 --nproc_per_node 8 --rdzv_backend c10d "
        "--rdzv_endpoint HOST:PORT' (default: one node, as many processes as the stage before had)",
    )
    parser.add_argument(
        "--verify",
        choices=("digest", "size", "off"),
        default="digest",
        help="what is compared with the checkpoint's manifest: contents, sizes, or nothing (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print settings and command; write nothing")
    return parser.parse_args(arguments), overrides


if __name__ == "__main__":
    main()
