import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse import parallelize_lighthouse
from torchtitan.experiments.lighthouse.model.model import dense_attention, rotate
from torchtitan.experiments.lighthouse.seams.cpu import use_cpu_without_accelerator
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3 import Transformer
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis

from helpers import packages
from helpers.model import build, tokens
from lighthouse.inner_attention import SDPA_BACKENDS


def logits_and_gradients(model):
    logits = model(tokens())
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def test_off_is_upstreams_model():
    """Logits and every gradient; the rotary embedding's real products round where complex ones do not."""
    ours, _ = build("--lighthouse.no-enable")
    upstream, _ = build("--lighthouse.no-enable", model_cls=Transformer)
    for a, b in zip(logits_and_gradients(ours), logits_and_gradients(upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batched", [False, True], ids=["one row of positions", "a row a sequence"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "positions"])
def test_rotary_embedding_is_upstreams(dtype, shuffled, batched):
    """To float32's rounding before the one to ``dtype``; positions as context parallelism hands them over."""
    freqs = precompute_freqs_cis(32, 4096)
    query, key = (torch.randn(2, 1024, 3, 32).to(dtype) for _ in range(2))
    positions = torch.randperm(4096)[:2048].view(2, 1024)[: 2 if batched else 1] if shuffled else None
    want = apply_rotary_emb(query, key, freqs, positions)
    angles = torch.view_as_real(freqs)
    angles = angles[None, :1024] if positions is None else angles[positions]
    for rows, expected in zip((query, key), want, strict=True):
        got = rotate(rows, angles[:, :, None])
        assert got.dtype == dtype
        rounding = 4 * 2**-24 + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)
        length = rows.float().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
        assert ((got.float() - expected.float()).abs() <= rounding * length).all()


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


@pytest.mark.parametrize("flavor", ["debug", "debug_gqa"])
def test_rotary_embedding_after_the_gather(flavor):
    """Trains every parameter; a model of its own; the dense model that both become in Stage 2 is the same."""
    gathered, _ = build("--model.flavor", flavor, "--lighthouse.rope", "after_gather")
    pooled, _ = build("--model.flavor", flavor)
    for tensor in logits_and_gradients(gathered):
        assert tensor.isfinite().all() and tensor.any()
    logits_and_gradients(pooled)
    ours, published = (model.layers["2"].attention.wq.weight.grad for model in (gathered, pooled))
    assert (ours - published).norm() > 0.05 * published.norm()
    dense = [build("--lighthouse.no-enable", "--lighthouse.rope", rope)[0] for rope in ("after_gather", "before_pool")]
    assert torch.equal(*(model(tokens()) for model in dense))


@pytest.mark.parametrize(
    "overrides",
    [
        ["--lighthouse.rope=after_gather", "--activation_checkpoint.mode", "full"],
        ["--lighthouse.rope=after_gather", "--compile.enable", "--compile.backend", "aot_eager"],
        ["--activation_checkpoint.mode", "full"],
        ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"],
        ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "2"],
        ["--compile.enable", "--compile.backend", "aot_eager"],
        ["--compile.enable", "--compile.backend", "aot_eager", "--activation_checkpoint.mode", "selective",
         "--activation_checkpoint.selective_ac_option", "op"],
        ["--lighthouse.combine=softmax", "--lighthouse.local_window=128", "--activation_checkpoint.mode", "full"],
        ["--lighthouse.combine=softmax", "--lighthouse.local_window=128", "--compile.enable",
         "--compile.backend", "aot_eager", "--activation_checkpoint.mode", "selective",
         "--activation_checkpoint.selective_ac_option", "op"],
    ],
    ids=["rope, full", "rope, compile", "full", "op", "every second layer", "compile", "compile and op",
         "softmax, full", "softmax, compile and op"],
)  # fmt: skip
def test_checkpointing_and_compilation_change_nothing(overrides, one_process):
    torch._dynamo.reset()
    plain, _ = build(*(word for word in overrides if word.startswith("--lighthouse.")))
    model, config = build("--training.mixed_precision_param", "float32", *overrides)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    model = parallelize_lighthouse(model, dims, config)
    for got, want in zip(logits_and_gradients(model), logits_and_gradients(plain), strict=True):
        got = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def train_as(model):
    """Logits and gradients of a step; the next one begins anew."""
    found = logits_and_gradients(model)
    model.zero_grad()
    return found


@pytest.mark.parametrize("rope", ["before_pool", "after_gather"])
def test_a_dense_step_is_the_dense_model_and_other_steps_are_lighthouse(rope):
    """Logits and every gradient, to the bit, and so again after each other."""
    rotated = ["--lighthouse.rope", rope]
    model, dense, lighthouse = (
        build(*rotated, *words)[0] for words in ([], ["--lighthouse.no-enable"], ["--lighthouse.dense_every", "0"])
    )
    wanted = {"dense": train_as(dense), "lighthouse": train_as(lighthouse)}
    assert not torch.equal(wanted["dense"][0], wanted["lighthouse"][0])
    for kind in ("lighthouse", "dense", "lighthouse", "dense"):
        with dense_attention([model] if kind == "dense" else []):
            found = train_as(model)
        assert all(map(torch.equal, found, wanted[kind])), kind


SELECTIVE = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"]


@pytest.mark.parametrize(
    "overrides",
    [[], SELECTIVE, ["--compile.enable", "--compile.backend", "aot_eager"]],
    ids=["plain", "selective", "compiled"],
)
def test_every_layer_attends_by_the_kernels_that_are_chosen(overrides, one_process, monkeypatch):
    """Dense layers over N positions, Lighthouse layers over the S selected rows, none by others, and all over N in a
    dense step. Their results are kept when activations are checkpointed selectively."""
    calls = packages.install(monkeypatch)
    monkeypatch.setattr("torchtitan.experiments.lighthouse.infra.parallelize.check_machine", lambda *_: None)
    torch._dynamo.reset()
    model, config = build("--lighthouse.inner_attention", "flash4", *overrides)
    plain, _ = build()
    selected = config.lighthouse.attention_config().selected_length(1024)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    model = parallelize_lighthouse(model, dims, config)
    for models, lengths in (([], [1024, 1024, selected, selected, 1024, 1024]), ([model], [1024] * 6)):
        with dense_attention(models):
            logits = model(tokens(batch=1))
            assert [(name, shape[1]) for name, shape in calls] == [("flash4", length) for length in lengths]
            logits.float().logsumexp(-1).sum().backward()
        assert len(calls) == 6
        calls.clear()
    monkeypatch.undo()
    with dense_attention([plain]):
        torch.testing.assert_close(logits.float(), plain(tokens(batch=1)), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", SDPA_BACKENDS)
def test_upstreams_module_is_bound_to_one_backend_of_torch(name):
    """The very module that context parallelism turns into ring attention, in dense layers and in Lighthouse."""
    model, _ = build("--lighthouse.inner_attention", name)
    for layer, block in model.layers.items():
        attention = block.attention
        assert isinstance(attention.inner_attention, ScaledDotProductAttentionWrapper)
        assert attention.inner_attention.sdpa_backends == [SDPA_BACKENDS[name]]
        if layer in "23":
            assert attention.lighthouse.attention is attention.inner_attention
    unchanged = {tuple(block.attention.inner_attention.sdpa_backends) for block in build()[0].layers.values()}
    assert unchanged == {tuple(ScaledDotProductAttentionWrapper().sdpa_backends)} and len(*unchanged) == 3


def test_a_dense_step_that_fails_leaves_lighthouse_on():
    model, _ = build()
    before = [block.attention.through_lighthouse for block in model.layers.values()]
    with pytest.raises(KeyError), dense_attention([model]):
        assert not any(block.attention.through_lighthouse for block in model.layers.values())
        raise KeyError
    assert [block.attention.through_lighthouse for block in model.layers.values()] == before
    assert before == [False, False, True, True, False, False]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_dense_steps_compile_nothing_of_their_own(checkpointing, one_process):
    """Two versions of a block, whatever the order of steps: a dense step's is that of the layers that stay dense."""
    torch._dynamo.reset()
    words = ["--compile.enable", "--training.mixed_precision_param", "float32"]
    model, config = build(*words, "--activation_checkpoint.mode", checkpointing)
    dense, _ = build("--lighthouse.no-enable")
    config.compile.backend = compiled = CompileCounterWithBackend("eager")  # what is counted comes before the backend
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    model = parallelize_lighthouse(model, dims, config)
    for models in ([], [model], [model], [], [model]):
        with dense_attention(models):
            found = train_as(model)
        assert compiled.frame_count == 2
    for got, want in zip(found, train_as(dense), strict=True):  # the last one was dense
        got = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_trainer_without_dense_steps_does_not_ignore_the_setting():
    """Upstream's own entry point, for example. Evaluation needs no steps."""
    model, _ = build("--lighthouse.dense_every", "8")
    with pytest.raises(RuntimeError, match=r"dense_every=8: this trainer knows no dense steps; .*dense_every=0"):
        model(tokens())
    model.eval()(tokens())
    model.train().trainer_runs_dense_steps = True
    model(tokens())
    build("--lighthouse.dense_every", "8", "--lighthouse.no-enable")[0](tokens())


@pytest.fixture
def one_process():
    """A process group of one, over gloo."""
    use_cpu_without_accelerator()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_that_normalises_queries_and_keys_is_scored_before_it(monkeypatch):
    """The norm takes away what is added to the lengths; what is selected still follows it."""
    model, _ = build("--lighthouse.layers", "1")
    attention = model.layers["1"].attention
    scored = []
    monkeypatch.setattr(attention.lighthouse, "attend", lambda *rows, **more: scored.append((rows, more)) or rows[0])
    for layer in model.layers.values():
        layer.attention.q_norm = torch.nn.RMSNorm(layer.attention.head_dim, elementwise_affine=False)
        layer.attention.k_norm = torch.nn.RMSNorm(layer.attention.head_dim, elementwise_affine=False)
    model(tokens())
    (((query, key, _), more),) = scored
    for after, before in zip((query, key), more["score_by"], strict=True):
        length = after.norm(dim=-1)
        assert length.std() < 1e-3 * length.mean() and before.norm(dim=-1).std() > 0.05 * before.norm(dim=-1).mean()
        direction = torch.nn.functional.normalize(before, dim=-1).norm(dim=-1)
        assert before.shape == after.shape and direction.allclose(torch.ones(()), atol=1e-4)
