"""Samples of text; that they come from a sharded model and change nothing is in test_train.py."""

from types import SimpleNamespace

import pytest
import torch
from torchtitan.experiments.lighthouse import sampling
from torchtitan.experiments.lighthouse.data.tokenizer import build_tokenizer
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs.settings import build_model

from helpers.settings import parse


def test_the_text_is_what_one_forward_per_token_chooses(monkeypatch):
    """In a model that runs Lighthouse where it trains; the end of a document ends the text."""
    config = parse("debug.toml", "--metrics.sample_prompt", "naïve ")
    tokenizer = build_tokenizer(config)
    torch.manual_seed(0)
    monkeypatch.setattr(sampling, "NEW_TOKENS", 16)
    model = build_model(config, "cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
        model.output.weight.normal_()  # so that the choice differs from token to token
        model.output.weight[256:] = 0
    prompt = sampling.encode(config, tokenizer)
    assert prompt == [tokenizer.bos_id, *"naïve ".encode()]
    text = sampling.write(model, tokenizer, prompt, torch.device("cpu"))
    assert model.training and any(block.attention.through_lighthouse for block in model.layers.values())
    dense, tokens = build_model(parse("debug.toml", "--lighthouse.no-enable"), "cpu"), list(prompt)
    dense.load_state_dict(model.state_dict())
    dense.freqs_cis = model.freqs_cis
    with torch.no_grad():
        for _ in range(sampling.NEW_TOKENS):
            tokens.append(int(dense(torch.tensor([tokens]))[0, -1].argmax()))
    assert len(set(tokens)) > 5 and text == tokenizer.decode(tokens[len(prompt) :])
    ending = SimpleNamespace(eos_id=tokens[len(prompt) + 3], decode=tokenizer.decode)
    first = tokens.index(ending.eos_id, len(prompt))
    assert sampling.write(model, ending, prompt, torch.device("cpu")) == tokenizer.decode(tokens[len(prompt) : first])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--parallelism.context_parallel_degree", "2"], r"context_parallel_degree=2.*nearest valid value: 0"),
        (["--parallelism.tensor_parallel_degree", "4"], "tensor_parallel_degree=4"),
        (["--metrics.sample_prompt", "x" * 4032], r"at most 4,032 tokens.*4,096; it is 4,033"),
    ],
)
def test_what_cannot_be_sampled_is_refused(settings, message):
    config = parse("debug.toml", "--metrics.sample_freq", "5", *settings)
    with pytest.raises(Refused, match=message):
        sampling.check(config, build_tokenizer(config))
    config.metrics.sample_freq = 0
    sampling.check(config, build_tokenizer(config))
