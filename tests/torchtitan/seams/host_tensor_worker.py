"""A few training steps in one process, to see how batches go to the device. Run by ``test_trainer.py``.

    python host_tensor_worker.py FOLDER

Prints, as JSON, how often ``HostTensor.to`` was called in each step, and on a GPU how often a step without a log line
made the host wait for the device.
"""

import json
import os
import sys
import warnings

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
os.environ.setdefault("MASTER_PORT", "29517")

import torch
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse.seams.trainer import HostTensor
from torchtitan.experiments.lighthouse.train import LighthouseTrainer

from helpers.launch import CONFIG, SMALL, flags

STEPS = 4


class Watched(LighthouseTrainer):
    def __init__(self, *args) -> None:
        self.moved: list[int] = []
        self.waits: list[int] = []
        super().__init__(*args)

    def train_step(self, *args) -> None:
        self.moved.append(0)
        on_gpu = self.device.type == "cuda"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            super().train_step(*args)
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        self.waits.append(sum("synchroniz" in str(warning.message) for warning in caught))


def main(folder: str) -> None:
    move = HostTensor.to

    def counted(self, device):
        trainer.moved[-1] += 1
        return move(self, device)

    HostTensor.to = counted
    settings = SMALL | {
        "job.dump_folder": folder, "training.steps": str(STEPS), "metrics.log_freq": "100",
        "metrics.no-enable_tensorboard": None, "checkpoint.no-enable": None,
    }  # fmt: skip
    trainer = Watched(ConfigManager().parse_args(["--job.config_file", str(CONFIG), *flags(settings)]))
    trainer.train()
    # The first step is logged; it also allocates, and compiles kernels.
    print(json.dumps({"moved": trainer.moved, "waits": trainer.waits[2:]}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
