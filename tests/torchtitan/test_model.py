import copy

import pytest
import torch
from test_job_config import model_args, parse
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse import LighthouseTransformer, parallelize_lighthouse
from torchtitan.models.llama3 import Transformer

SMALL = ["--training.seq_len", "1024", "--lighthouse.pooling_factor", "2"]


def build(*overrides: str, model_cls=LighthouseTransformer):
    """An initialised model of the debug config and its merged settings."""
    config = parse("debug.toml", *SMALL, *overrides)
    args = copy.deepcopy(model_args(config))
    torch.manual_seed(0)
    model = model_cls(args)
    with torch.no_grad():
        model.init_weights()
    return model, config


def tokens(batch=2, seq_len=1024):
    return torch.randint(0, 256, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model):
    logits = model(tokens())
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def test_off_is_upstreams_model_bit_for_bit():
    ours, _ = build("--lighthouse.no-enable")
    upstream, _ = build("--lighthouse.no-enable", model_cls=Transformer)
    for a, b in zip(logits_and_gradients(ours), logits_and_gradients(upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flavor", ["debug", "debug_gqa"])
def test_on_and_off_have_the_same_state_dict(flavor):
    on, _ = build("--model.flavor", flavor)
    off, _ = build("--model.flavor", flavor, "--lighthouse.no-enable", model_cls=Transformer)
    shapes = [[(name, x.shape, x.dtype) for name, x in model.state_dict().items()] for model in (on, off)]
    assert shapes[0] == shapes[1]
    off.load_state_dict(on.state_dict(), strict=True)
    assert not torch.equal(on(tokens()), off(tokens()))


@pytest.mark.parametrize("scorer", ["norm", "dilated", "gla"])
@pytest.mark.parametrize("flavor", ["debug", "debug_gqa"])
def test_every_scorer_trains_every_parameter(flavor, scorer):
    model, _ = build("--model.flavor", flavor, "--lighthouse.scorer", scorer)
    for tensor in logits_and_gradients(model):
        assert tensor.isfinite().all() and tensor.any()


@pytest.mark.parametrize(
    "overrides",
    [
        ["--activation_checkpoint.mode", "full"],
        ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"],
        ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "2"],
        ["--compile.enable", "--compile.backend", "aot_eager"],
        ["--compile.enable", "--compile.backend", "aot_eager", "--activation_checkpoint.mode", "selective",
         "--activation_checkpoint.selective_ac_option", "op"],
    ],
    ids=["full", "op", "every second layer", "compile", "compile and op"],
)  # fmt: skip
def test_checkpointing_and_compilation_change_nothing(overrides):
    torch._dynamo.reset()
    plain, _ = build()
    model, config = build(*overrides)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    model = parallelize_lighthouse(model, dims, config)
    for got, want in zip(logits_and_gradients(model), logits_and_gradients(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
