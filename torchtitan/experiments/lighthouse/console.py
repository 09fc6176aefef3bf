"""What a run says of itself on the console: what it is, when it starts, and what came out, when it is complete."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.config.job_config import Training, Validation
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.data.files import HELD_OUT
from torchtitan.experiments.lighthouse.data.section import asked_by, scored, weights_of
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.job_config import Training as OurTraining
from torchtitan.experiments.lighthouse.metrics import in_words
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.runs import launch, stages
from torchtitan.experiments.lighthouse.runs.records import METRICS_FILE, name_of, number_of, stage_of
from torchtitan.hf_datasets.text_datasets import DATASETS


def first_line(config: MergedConfig, world_size: int, device: str) -> str:
    """Before anything is built, which can take minutes."""
    names = {"Lighthouse": "lighthouse-attention", "torchtitan": "torchtitan", "torch": "torch"}
    versions = ", ".join(f"{name} {importlib.metadata.version(package)}" for name, package in names.items())
    return f"{config.job.description}: {_stage(config)} on {world_size} × {device} ({versions})"


def start_lines(config: MergedConfig, model: LighthouseModelArgs, parameters: int, dims: ParallelDims) -> list[str]:
    """What is trained, on what, how, and where to."""
    groups = f" ({model.n_kv_heads} of keys and values)" if model.n_kv_heads else ""
    return [
        f"Model: {config.model.flavor}, {parameters:,} parameters, {model.n_layers} layers, width {model.dim}, "
        f"{model.n_heads} heads{groups}, vocabulary of {model.vocab_size:,}; tokenizer {config.model.hf_assets_path}",
        *_attention(config, model),
        f"Data: {_data(config.training)}{_order(config.training)}; {_validation(config)}",
        f"Parallelism: {_parallelism(config, dims)}",
        f"Step: {_step(config, dims)}",
        f"Schedule: {_schedule(config)}",
        f"Writes to: {_writes(config)}",
    ]


def completion_lines(config: MergedConfig, records: Iterable[Mapping[str, Any]], tokens: int) -> list[str]:
    """What came of a run that has done all its steps, and what comes next.

    Args:
        records: of its metrics.jsonl.
        tokens: that the run and the stages before it have seen.
    """
    trained: Mapping[str, Any] = {}
    validated: Mapping[str, Any] = {}
    seconds = 0.0
    for record in records:
        trained = record if "loss" in record else trained
        validated = record if "validation_loss" in record else validated
        seconds = max(seconds, record["wall_clock_s"])
    steps, folder = config.training.steps, Path(config.job.dump_folder)
    figures = [f"{steps:,} of {steps:,} steps", f"{tokens:,} tokens", f"{in_words(seconds)} in this stage"]
    if trained:
        figures.append(f"loss {trained['loss']:.4f}{_at(trained, steps)}")
    if validated:
        bits = f", {validated['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in validated else ""
        figures.append(f"held out {validated['validation_loss']:.4f} nats per token{bits}{_at(validated, steps)}")
    lines = [f"{_stage(config)} is complete: {'; '.join(figures)}"]
    if config.checkpoint.enable and not config.checkpoint.load_only:
        lines.append(f"Checkpoint: {folder / config.checkpoint.folder / f'step-{steps}'}")
        lines += _next(config, folder)
    return lines


def _next(config: MergedConfig, folder: Path) -> list[str]:
    """The command that continues, or exports, what the last step has saved, where there is one."""
    checkpoint, steps = config.checkpoint, config.training.steps
    left = (config.lr_scheduler.total_steps or steps) - steps
    if checkpoint.last_save_in_hf or (checkpoint.last_save_model_only and (config.lighthouse.enable or left)):
        return []
    if config.lighthouse.enable or left:
        following = f"Stage {number_of(stage_of(config)) + 1}"
        command = launch.as_line(launch.command("resume_dense", str(folder)))
        how = f"its {left:,} steps" if left else f"STEPS is where it ends, more than {steps}"
        return [f"Next, {following} ({how}): {command}{'' if left else ' --total-steps STEPS'}"]
    return [f"Next, to Hugging Face: {launch.as_line(launch.command('export_hf', str(folder)))}"]


def _stage(config: MergedConfig) -> str:
    return name_of(stage_of(config)).capitalize()


def _at(record: Mapping[str, Any], last: int) -> str:
    return "" if record["step"] == last else f" (step {record['step']:,})"


def _attention(config: MergedConfig, model: LighthouseModelArgs) -> list[str]:
    geometry, seq_len = model.lighthouse, config.training.seq_len
    kernels = "" if model.inner_attention == "auto" else f", by {model.inner_attention}"
    if not config.lighthouse.enable or geometry is None:
        return [f"Attention: dense in all {model.n_layers} layers{kernels}"]
    every = config.lighthouse.dense_every
    return [
        f"Attention: Lighthouse in {len(model.lighthouse_layers)} of {model.n_layers} layers "
        f"({config.lighthouse.layers}), {geometry.selected_length(seq_len):,} of {seq_len:,} rows per sequence"
        f"{kernels}: {geometry}",
        *([f"Attention: dense in all layers every {every} steps"] if every else []),
    ]


def _data(section: Training | Validation) -> str:
    weights, parts = weights_of(section), []
    for number, asked in enumerate(asked_by(section)):
        registered = DATASETS.get(asked.dataset)
        path = asked.path or (registered.path if registered else "")
        details = [value for value in (asked.config, asked.split) if value]
        share = f"{weights[number]:.1%} " if weights else ""
        parts.append(f"{share}{' '.join([asked.dataset, *details])}{f' from {path}' if path else ''}")
    return " + ".join(parts)


def _order(section: OurTraining) -> str:
    parts = []
    if buffer := section.shuffle_buffer:
        parts.append(f"shuffled among {buffer:,} document(s)")
    if share := section.held_out_share:
        parts.append(f"{share:.2%} of the documents held out")
    if chars := section.min_document_chars:
        parts.append(f"documents of fewer than {chars:,} characters dropped")
    return "".join(f", {part}" for part in parts)


def _validation(config: MergedConfig) -> str:
    section = scored(config)
    if not section.enable:
        return "no validation"
    if section.dataset == HELD_OUT:
        return f"validation every {section.freq:,} steps on what is held out"
    same = (section.dataset, section.dataset_path) == (config.training.dataset, config.training.dataset_path)
    return f"validation every {section.freq:,} steps on {'the same' if same else _data(section)}"


def _parallelism(config: MergedConfig, dims: ParallelDims) -> str:
    degrees = {"replicated": dims.dp_replicate, "sharded": dims.dp_shard, "context": dims.cp, "tensor": dims.tp}
    split = [f"{name} × {degree}" for name, degree in (degrees | {"pipeline": dims.pp}).items() if degree > 1]
    return ", ".join(
        [
            *(split or ["one device"]),
            f"{config.training.mixed_precision_param} products",
            f"activation checkpointing {config.activation_checkpoint.mode}",
            *([f"{offloaded} layers offloaded"] if (offloaded := config.activation_checkpoint.offload_layers) else []),
            "compiled" if config.compile.enable else "not compiled",
        ]
    )


def _step(config: MergedConfig, dims: ParallelDims) -> str:
    ranks, settings = dims.dp_replicate * dims.dp_shard, asdict(config)
    together, at_once = stages.sequences_per_step(settings, ranks), config.training.local_batch_size
    return (
        f"{stages.tokens_per_step(settings, ranks):,} tokens: {config.training.seq_len:,} a sequence × {at_once} "
        f"sequence(s) at once × {together // (at_once * ranks)} time(s) × {ranks} data-parallel rank(s)"
    )


def _schedule(config: MergedConfig) -> str:
    scheduler, steps = config.lr_scheduler, config.training.steps
    total = scheduler.total_steps or steps
    return (
        f"to step {steps:,} of {total:,} of all stages, learning rate {config.optimizer.lr:g} after "
        f"{scheduler.warmup_steps:,} steps of warm-up, {config.optimizer.name}"
    )


def _writes(config: MergedConfig) -> str:
    checkpoint, parts = config.checkpoint, [METRICS_FILE]
    if config.job.save_config_file:
        parts.insert(0, f"{config.job.save_config_file} (all settings)")
    if not checkpoint.enable or checkpoint.load_only:
        parts.append("no checkpoints")
    else:
        minutes = f" and {checkpoint.interval_minutes:g} minutes" if checkpoint.interval_minutes else ""
        parts.append(f"{checkpoint.folder}/step-N every {checkpoint.interval:,} steps{minutes}")
    return f"{config.job.dump_folder}: {', '.join(parts)}"
