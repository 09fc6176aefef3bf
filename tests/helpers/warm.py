"""What takes long in a trainer's process and is the same in all: ranks are forked from a process that has done it."""

import torch.distributed.run  # noqa: F401
from torchtitan.experiments.lighthouse import train  # noqa: F401
from torchtitan.experiments.lighthouse.data.section import sources_of
from torchtitan.experiments.lighthouse.job_config import Training

from helpers import settings_parser
from helpers.settings import parse

settings_parser.speed_up()
parse("debug.toml")

for dataset in ("stdlib", "stdlib_validation"):
    sources_of(Training(dataset=dataset))  # a walk through Python's own library
