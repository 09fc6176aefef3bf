#!/usr/bin/env python
"""Hugging Face models in transformers' ``Trainer``: tokens per second, memory and losses, Lighthouse beside sdpa.

    python benchmarks/bench_transformers.py --text FOLDER
    python benchmarks/bench_transformers.py --text FOLDER --models qwen3 --seq-len 131072 --steps 20

For each model, random weights of about 100M parameters are trained on the bytes of FOLDER (read as the dataset
``local`` reads it, the files for training), one sequence a step, in bfloat16 (autocast): through ``register(config)``,
whose default keeps the first two and the last two layers dense, and from the same weights on the same batches through
``sdpa``, as torch chooses its kernels. Rates are medians over the steps after the warm-up, data loading and optimizer
included; memory is the peak that the allocator reserved. The losses of the two cannot be compared: the published
selection looks ahead (README.md, Limits). On a CPU it runs at a small size, to see that it works. Writes
transformers.json and transformers.md after each run.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torchtitan.experiments.lighthouse.data.files import Asked
from torchtitan.experiments.lighthouse.data.sources import find, register_datasets
from torchtitan.experiments.lighthouse.errors import as_refusal, exit_on_refusal
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from lighthouse import LighthouseConfig
from lighthouse.integrations.transformers import register
from lighthouse.layers import default_layers

#: transformers' name of a model's family to the width of its heads.
HEAD_DIM = {"llama": 64, "qwen3": 128}
ATTENTIONS = ("lighthouse", "sdpa")

#: The share of steps, at the beginning, that no rate counts.
WARM_UP = 0.2

#: Steps whose mean loss is shown.
LAST = 10


def examples(folder: Path, seq_len: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """One sequence for each step, [seq_len] of bytes; a document ends with a zero.

    Raises:
        SystemExit: if there is too little text.
    """
    register_datasets()
    source = find(Asked("local", str(folder), "train"))
    assert source is not None  # ``local`` is ours
    text, wanted = bytearray(), seq_len * steps
    for _, document in source.documents(endless=False).read_from(None):
        text += document.encode() + b"\0"
        if len(text) >= wanted:
            break
    if len(text) < wanted:
        raise SystemExit(
            f"bench_transformers: --text {folder}: {len(text):,} bytes are too few for --steps {steps} with --seq-len "
            f"{seq_len}, which take {wanted:,}; nearest valid value: --steps {len(text) // seq_len}"
        )
    rows = torch.frombuffer(text, dtype=torch.uint8)[:wanted].view(steps, seq_len).long()
    return [{"input_ids": row, "labels": row} for row in rows]


def build(family: str, attention: str, options: argparse.Namespace) -> PreTrainedModel:
    """A model with random weights, the same for every ``attention``."""
    config = AutoConfig.for_model(
        family,
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=HEAD_DIM[family],
        max_position_embeddings=options.seq_len,
        rope_theta=500000.0,
        # All tokens are bytes: by default some would be special.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(options.seed)
    return AutoModelForCausalLM.from_config(config)


class Clock(TrainerCallback):
    """When each step was done, on the device too; seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Collator:
    """Stacks examples, and remembers a checksum of all of them."""

    def __init__(self) -> None:
        self.checksum = 0

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.checksum = zlib.crc32(batch["input_ids"].numpy(), self.checksum)
        return batch


def measure(
    family: str, attention: str, text: list[dict[str, torch.Tensor]], options: argparse.Namespace
) -> dict[str, Any]:
    """Train once. A line of the table, with the loss of every step, and which kernels of SDPA a forward pass ran."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build(family, attention, options)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    clock, collator = Clock(), Collator()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=options.steps,
                per_device_train_batch_size=1,
                learning_rate=options.lr,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=max(1, options.steps // 5),
                bf16=True,
                use_cpu=not on_gpu,
                seed=options.seed,
                logging_steps=1,
                dataloader_pin_memory=on_gpu,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=collator,
            train_dataset=text,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    peak = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None
    seconds = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
    typical = statistics.median(seconds[int(WARM_UP * options.steps) :])
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {
        "model": family,
        "attention": attention,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": default_layers(options.layers) if attention == "lighthouse" else None,
        "tokens_per_second": options.seq_len / typical,
        "memory_gib": peak,
        "losses": losses,
        "mean_loss_of_last": statistics.fmean(losses[-LAST:]),
        "kernels": kernels_of(trainer.model, text[0]["input_ids"][None]),
        "batches": f"{collator.checksum:08x}",
    }


def kernels_of(model: Any, tokens: torch.Tensor) -> dict[str, int]:
    """How often each implementation of SDPA runs in a forward pass on ``tokens`` [1, N], as torch's profiler says."""
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with torch.autocast(model.device.type, torch.bfloat16), torch.profiler.profile(activities=cpu_only) as profile:
        model(tokens.to(model.device))
    found: dict[str, int] = {}
    for event in profile.key_averages():
        name = re.fullmatch(r"aten::_scaled_dot_product_(?:attention_)?(\w+?)(?:_attention)?(?:_for_cpu)?", event.key)
        if name is not None:
            found[name[1]] = found.get(name[1], 0) + event.count
    return found


def report(runs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    ours = LighthouseConfig(top_k=options.top_k)
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if on_gpu else ""
    checkpointing = "on" if options.gradient_checkpointing else "off"
    versions = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}{cudnn}"
    geometry = f"L={ours.num_levels}, p={ours.pooling_factor}, k={ours.top_k}"
    lines = [
        f"{versions}. {options.steps} steps of {options.seq_len:,} tokens, bfloat16, gradient checkpointing "
        f"{checkpointing}. Lighthouse: {geometry}, {ours.selected_length(options.seq_len):,} rows.",
        "",
        f"| model | attention | tokens/s | × sdpa | peak GiB | loss, first and mean of last {LAST} | SDPA's kernels |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    dense = {run["model"]: run["tokens_per_second"] for run in runs if run["attention"] == "sdpa"}
    for run in runs:
        through = f"lighthouse, layers {run['layers']}" if run["layers"] else run["attention"]
        ratio = f"{run['tokens_per_second'] / dense[run['model']]:.2f}" if run["model"] in dense else ""
        memory = f"{run['memory_gib']:.1f}" if run["memory_gib"] is not None else ""
        kernels = ", ".join(f"{count} {name}" for name, count in sorted(run["kernels"].items()))
        losses = f"{run['losses'][0]:.3f}, {run['mean_loss_of_last']:.3f}"
        name, rate = f"{run['model']}, {run['parameters']:,}", f"{run['tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {through} | {rate} | {ratio} | {memory} | {losses} | {kernels} |")
    return "\n".join(lines) + "\n"


def write(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    everything = {"settings": settings, "versions": versions, "runs": runs}
    (options.output / "transformers.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (options.output / "transformers.md").write_text(report(runs, options), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a folder, as the dataset 'local' reads it")
    parser.add_argument("--models", nargs="+", choices=HEAD_DIM, default=list(HEAD_DIM), help="(default: both)")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="(default: both)")
    parser.add_argument("--seq-len", type=int, default=65536, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="default: a 64th of the sequence, 128 at least")
    parser.add_argument("--steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=6e-4, help="after a warm-up (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=12, help="of 64, or 128 in Qwen3 (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
                        help="compute each layer anew in its backward (default: off)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_transformers"))
    options = parser.parse_args()
    if options.steps < LAST:
        raise SystemExit(f"bench_transformers: --steps {options.steps}: must be at least {LAST}")
    options.top_k = options.top_k or max(128, options.seq_len // 64 // 128 * 128)
    with exit_on_refusal("bench_transformers"), as_refusal():
        geometry = LighthouseConfig(top_k=options.top_k)
        geometry.validate(options.seq_len)
        text = examples(options.text, options.seq_len, options.steps)
    register(geometry)
    options.output.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for family in options.models:
        for attention in options.attentions:
            try:
                run = measure(family, attention, text, options)
            except torch.OutOfMemoryError as error:
                print(f"{family}, {attention}: {error}; --gradient-checkpointing needs less", flush=True)
                continue
            finally:
                gc.collect()
            runs.append(run)
            write(runs, options)
            rate, loss = run["tokens_per_second"], run["mean_loss_of_last"]
            print(f"{family}, {attention}: {rate:,.0f} tokens/s, loss of the last {LAST} {loss:.3f}", flush=True)
    if len(runs) < len(options.models) * len(options.attentions):
        raise SystemExit("bench_transformers: not every run succeeded")
    if len({run["batches"] for run in runs}) > 1:
        raise SystemExit("bench_transformers: the runs were trained on different batches")
    print("\n" + report(runs, options))


if __name__ == "__main__":
    main()
