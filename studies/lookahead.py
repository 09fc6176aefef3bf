#!/usr/bin/env python
"""How much of a Stage 1 model's loss on the next token comes from the tokens after it.

Attention over selected entries is causal, but which entries are selected depends on the whole tile. This script scores
token t+1 at random positions t four ways: with the text as it is; with every token after t replaced by other text;
with every token after t + p^(L-1) replaced; and with dense attention in all layers.

    python studies/lookahead.py outputs/268m/stage1/checkpoint/step-400 --dataset c4_local_validation \\
        --dataset-path FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchtitan.experiments.lighthouse.seams.cpu import use_cpu_without_accelerator

use_cpu_without_accelerator()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer  # noqa: E402
from torchtitan.experiments.lighthouse.runs import settings as runs  # noqa: E402
from torchtitan.protocols.train_spec import get_train_spec  # noqa: E402
from torchtitan.tools.utils import device_type  # noqa: E402

SEQUENCES = 8


def read_settings(checkpoint: Path, dataset: str | None, dataset_path: str | None) -> JobConfig:
    settings = runs.read_settings(checkpoint)
    settings.training.local_batch_size = 1
    settings.training.dataset = dataset or settings.training.dataset
    settings.training.dataset_path = dataset_path or settings.training.dataset_path
    return settings


@torch.no_grad()
def score(checkpoint: Path, settings: JobConfig, positions: int) -> dict[str, Tensor]:
    """Losses in nats, [positions] a way of scoring."""
    lighthouse, dense = (runs.load_model(checkpoint, settings, dense=d) for d in (False, True))
    spec = get_train_spec(settings.model.name)
    batches = iter(
        spec.build_dataloader_fn(dp_world_size=1, dp_rank=0, tokenizer=build_tokenizer(settings), job_config=settings)
    )
    texts = [next(batches) for _ in range(2 * SEQUENCES)]
    seq_len = settings.training.seq_len
    window = settings.lighthouse.pooling_factor ** (settings.lighthouse.num_levels - 1)
    generator = torch.Generator().manual_seed(0)
    losses: dict[str, list[float]] = {}
    for i in range(positions):
        inputs, labels = texts[i % SEQUENCES]
        tokens = inputs["input"].to(device_type)
        other = texts[SEQUENCES + i % SEQUENCES][0]["input"].to(device_type)
        t = int(torch.randint(seq_len // 8, seq_len - 4 * window, (1,), generator=generator))

        for name, model, kept in (
            ("Lighthouse, the text as it is", lighthouse, seq_len),
            ("Lighthouse, all after t replaced", lighthouse, t + 1),
            (f"Lighthouse, all after t + {window} replaced", lighthouse, t + 1 + window),
            ("dense, the same weights", dense, seq_len),
        ):
            text = torch.cat([tokens[:, :kept], other[:, kept:]], dim=1)
            with torch.autocast(device_type, torch.bfloat16):
                logits = model(text)[0, t].float()
            losses.setdefault(name, []).append(F.cross_entropy(logits, labels[0, t].to(device_type)).item())
    return {name: torch.tensor(values) for name, values in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint/step-N of a Stage 1 run")
    parser.add_argument("--dataset", help="default: the run's training set")
    parser.add_argument("--dataset-path", help="default: the run's")
    parser.add_argument("--positions", type=int, default=100)
    options = parser.parse_args()
    settings = read_settings(options.checkpoint, options.dataset, options.dataset_path)
    for name, values in score(options.checkpoint, settings, options.positions).items():
        print(f"| {name:42} | {values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f} |")


if __name__ == "__main__":
    main()
