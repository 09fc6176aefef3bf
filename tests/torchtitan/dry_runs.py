"""Starts runs of the paper's table, up to their first step, at their full number of GPUs.

    python tests/torchtitan/dry_runs.py FOLDER            # all of them
    python tests/torchtitan/dry_runs.py FOLDER NAME ...

One process stands for all ranks (torchtitan's fake backend). Each run is a fork of one that has imported the trainer,
which takes longer than to start it.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from torchtitan.experiments.lighthouse import sweep
from torchtitan.experiments.lighthouse.train import LighthouseTrainer

BEFORE_THE_FIRST_STEP = [
    *("--comm.mode=fake_backend", "--training.steps=0", "--training.dataset=stdlib"),
    *("--checkpoint.no-enable", "--metrics.no-enable_tensorboard"),
]
GPUS = {"1m_cp8_32gpus.toml": 32, "1m_recommended.toml": 32}


def start(name: str, outputs: Path) -> str:
    size = str(GPUS.get(sweep.RUNS[name].config, 8))
    os.environ |= {"NGPU": size, "WORLD_SIZE": size, "RANK": "0", "LOCAL_RANK": "0"}
    trainer = LighthouseTrainer(sweep.settings_of(sweep.RUNS[name], outputs, BEFORE_THE_FIRST_STEP))
    trainer.train()
    trainer.close()
    return name


def main(outputs: Path, *names: str) -> None:
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for started in [pool.apply_async(start, (name, outputs)) for name in names or sweep.RUNS]:
            print(started.get(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
