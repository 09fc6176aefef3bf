"""The debug model, initialised, and tokens for it."""

import copy

import torch
from torchtitan.experiments.lighthouse.model.model import LighthouseTransformer

from helpers.settings import model_args, parse

SMALL = ["--training.seq_len", "1024", "--lighthouse.pooling_factor", "2"]


def build(*overrides: str, model_cls=LighthouseTransformer):
    """An initialised model of the debug config and its merged settings."""
    config = parse("debug.toml", *SMALL, *overrides)
    args = copy.deepcopy(model_args(config))
    model = model_cls(args)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model, config


def tokens(batch=2, seq_len=1024):
    return torch.randint(0, 256, (batch, seq_len), generator=torch.Generator().manual_seed(1))
