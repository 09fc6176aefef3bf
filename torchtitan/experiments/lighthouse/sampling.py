"""Text that the model in training writes every so many steps, if ``metrics.sample_freq`` asks for it."""

from __future__ import annotations

import torch
from torch import nn
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import MergedConfig
from torchtitan.experiments.lighthouse.model.model import dense_attention
from torchtitan.experiments.lighthouse.seams.parallelism import reshard

#: Tokens that are written.
NEW_TOKENS = 64


def check(config: MergedConfig, tokenizer: HuggingFaceTokenizer) -> None:
    """Whether samples can be written as asked.

    Raises:
        Refused: where a rank does not hold whole sequences and logits, or the prompt is too long.
    """
    if not config.metrics.sample_freq:
        return
    for kind in ("context", "tensor", "pipeline"):
        degree = getattr(config.parallelism, f"{kind}_parallel_degree")
        if degree > 1:
            raise Refused(
                f"metrics.sample_freq={config.metrics.sample_freq}: no samples with parallelism."
                f"{kind}_parallel_degree={degree}, because no rank has a whole sequence and its logits; nearest valid "
                "value: 0"
            )
    tokens, most = len(encode(config, tokenizer)), config.training.seq_len - NEW_TOKENS
    if tokens > most:
        raise Refused(
            f"metrics.sample_prompt: must be at most {most:,} tokens, because {NEW_TOKENS} more have to fit into "
            f"training.seq_len={config.training.seq_len:,}; it is {tokens:,}"
        )


def encode(config: MergedConfig, tokenizer: HuggingFaceTokenizer) -> list[int]:
    return list(tokenizer.encode(config.metrics.sample_prompt, add_bos=True, add_eos=False))


@torch.no_grad()
def write(model: nn.Module, tokenizer: HuggingFaceTokenizer, prompt: list[int], device: torch.device) -> str:
    """The text that the likeliest tokens after ``prompt`` make, with dense attention, up to the end of a document.

    All ranks of a sharded model take part, as often as each other, and have the same text. Every forward has the same
    shape: what comes after a position does not reach it.
    """
    tokens = torch.zeros(1, len(prompt) + NEW_TOKENS, dtype=torch.int64, device=device)
    tokens[0, : len(prompt)] = torch.tensor(prompt, device=device)
    was_training = model.training
    model.eval()
    try:
        with dense_attention([model]):
            for at in range(len(prompt), tokens.shape[1]):
                tokens[0, at] = model(tokens)[0, at - 1].argmax()
    finally:
        reshard(model)
        model.train(was_training)
    new = tokens[0, len(prompt) :].tolist()
    end = new.index(tokenizer.eos_id) if tokenizer.eos_id in new else len(new)
    return str(tokenizer.decode(new[:end]))
