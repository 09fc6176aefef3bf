"""Starts real training runs for tests: the debug config made smaller, float32."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torchtitan.experiments.lighthouse.train_spec  # noqa: F401  registers the model
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse import resume_dense
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.runs import launch
from torchtitan.experiments.lighthouse.runs.records import read_metrics
from torchtitan.protocols.train_spec import get_train_spec

from helpers import ranks

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "train_configs/debug.toml"
TRAINER = ("-m", ranks.TRAINER)

#: 1,024 tokens per sequence, one process's worth of work in well under a second per step.
SMALL = {
    "training.seq_len": "1024",
    "training.mixed_precision_param": "float32",
    "lighthouse.pooling_factor": "2",
    "lr_scheduler.warmup_steps": "2",
    "lr_scheduler.total_steps": "20",
    "checkpoint.interval": "1000",
}


def flags(settings: dict[str, str]) -> list[str]:
    """``{"a.b": "c", "a.d": None}`` to ``--a.b=c --a.d``."""
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in settings.items()]


def command(dump_folder: Path, nproc: int, *, program: tuple[str, ...] = TRAINER, **settings: str) -> list[str]:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}")
    return [*torchrun, *program, *arguments(dump_folder, **settings)]


def arguments(dump_folder: Path, **settings: str) -> list[str]:
    """The trainer's. Settings as keywords, section and name joined by two underscores."""
    named = {name.replace("__", ".").replace(".no_", ".no-"): value for name, value in settings.items()}
    return ["--job.config_file", str(CONFIG), *flags({"job.dump_folder": str(dump_folder)} | SMALL | named)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(words: list[str], *, check: bool = True, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    result = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment() | variables)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(words)}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}")
    return result


def train(dump_folder: Path, nproc: int = 1, *, check: bool = True, **settings: str) -> subprocess.CompletedProcess:
    """Train to the end, without torchrun."""
    return run_ranks(ranks.TRAINER, nproc, *arguments(dump_folder, **settings), check=check)


def run_ranks(
    program: str | Path, nproc: int, *words: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """A module or a file, on ranks that need not import what the trainer does."""
    result = ranks.start(nproc, list(words), environment() | variables, program=str(program))
    if check and result.returncode:
        raise AssertionError(f"{program} {' '.join(words)}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}")
    return result


def _become(command: list[str]) -> None:
    """As ``launch.execute``, but the trainer's processes are forked, and come back."""
    _, _, module, *words = command
    if module == launch.command("resume_dense")[-1]:
        return resume_dense.main(words)
    at = words.index(ranks.TRAINER)
    processes = launch.read_torchrun(shlex.join(words[: at - 1])).per_node
    print(run_ranks(ranks.TRAINER, processes, *words[at + 1 :]).stdout)


def run_here(main: Callable[[list[str]], None], *words: str | Path | int) -> str:
    """What a command prints that starts the trainer, and what that prints; without torchrun."""
    printed = io.StringIO()
    with mock.patch.object(launch, "execute", _become), contextlib.redirect_stdout(printed):
        main([str(word) for word in words])
    return printed.getvalue()


def metrics(dump_folder: Path) -> list[dict]:
    path = dump_folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def losses(dump_folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics(dump_folder) if "loss" in record}


def config_of(dump_folder: Path) -> dict:
    return json.loads((dump_folder / "config.json").read_text())


def load_checkpoint(folder: Path, scratch: Path) -> dict:
    """Everything in a distributed checkpoint, unsharded, as one flat dictionary."""
    scratch.mkdir(parents=True, exist_ok=True)
    dcp_to_torch_save(folder, scratch / "all.pt")
    return torch.load(scratch / "all.pt", weights_only=False)


def next_batches(
    checkpoint: dict | None, dp_rank: int, dp_world_size: int, local_batch_size: int = 1, seq_len: int = 1024
) -> list[torch.Tensor]:
    """The three batches that a run resumed from this checkpoint (None: from scratch) would train on next."""
    settings = SMALL | {
        "training.local_batch_size": str(local_batch_size),
        "training.global_batch_size": str(local_batch_size * dp_world_size),
        "training.seq_len": str(seq_len),
    }
    config = ConfigManager().parse_args(["--job.config_file", str(CONFIG), *flags(settings)])
    loader = get_train_spec("lighthouse").build_dataloader_fn(
        dp_world_size=dp_world_size, dp_rank=dp_rank, tokenizer=build_tokenizer(config), job_config=config
    )
    if checkpoint is not None:
        loader.load_state_dict(checkpoint["dataloader"])
    batches = iter(loader)
    return [next(batches)[0]["input"] for _ in range(3)]


def assert_same_position(a: dict, b: dict, dp_world_size: int, **options) -> None:
    """Two checkpoints read the same data next. (Their loaders may have read ahead by a document more or less.)"""
    for rank in range(dp_world_size):
        batches = [next_batches(checkpoint, rank, dp_world_size, **options) for checkpoint in (a, b)]
        assert_same(*batches, path=f"batches of rank {rank}")


def assert_same_training_state(a: dict, b: dict) -> None:
    """Weights, optimizer, schedule and counters of two checkpoints are equal to the bit."""
    assert {"train_state", "optimizer", "lr_scheduler", "dataloader"} < a.keys()
    assert_same(*({key: value for key, value in x.items() if key != "dataloader"} for x in (a, b)))


def assert_same(a, b, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert a == b, path
