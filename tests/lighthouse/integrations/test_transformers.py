import doctest
import json
import re
from types import SimpleNamespace

import pytest
import torch

from helpers import packages
from lighthouse import LighthouseConfig, lighthouse_attention

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")

import lighthouse.integrations.transformers as integration  # noqa: E402

SEQ_LEN, VOCABULARY, LAYERS = 512, 32, 2
GEOMETRY = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=128)
INSTEAD = 'attn_implementation="sdpa"'
#: What an attention layer says of itself.
LAYER = SimpleNamespace(is_causal=True, layer_idx=0, config=SimpleNamespace(num_hidden_layers=LAYERS))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """``lighthouse`` with ``GEOMETRY``; what a test registers ends with it."""
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    integration.register(GEOMETRY)


@pytest.fixture
def calls(monkeypatch) -> list:
    """The dtypes and shapes of every call of ``lighthouse_attention``."""
    seen = []

    def spy(query, key, value, config, **more):
        seen.append([(x.dtype, tuple(x.shape)) for x in (query, key, value)])
        return lighthouse_attention(query, key, value, config, **more)

    monkeypatch.setattr(integration, "lighthouse_attention", spy)
    return seen


def build(family="Llama", attention="lighthouse", **settings):
    """A random model of two layers, four query heads and two key/value heads of 8, always with the same weights."""
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} | settings
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, pad_token_id=None, attn_implementation=attention,
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def tokens(batch=2):
    return torch.randint(VOCABULARY, (batch, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def gradients(model, **inputs):
    model(tokens(), labels=tokens(), **inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def register_direct(name, config):
    """An attention that does nothing but call the library."""

    def direct(module, query, key, value, attention_mask, **kwargs):
        return lighthouse_attention(query, key, value, config).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register(name, direct)


def refused(*parts):
    """One error that names the value, the rule and what to use instead."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, (*parts, INSTEAD))))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_training_lowers_the_loss_and_reaches_every_parameter(family, calls):
    model = build(family)
    text = (torch.arange(SEQ_LEN) % 7)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(text, labels=text).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses  # seven of 32 tokens occur: from ln 32 = 3.5 towards ln 7 = 1.9
    grouped = [(torch.float32, (1, heads, SEQ_LEN, 8)) for heads in (4, 2, 2)]
    assert calls == [grouped] * (5 * LAYERS)  # every layer, with key/value heads that nobody repeated


def test_logits_and_gradients_are_those_of_a_direct_call():
    register_direct("direct", GEOMETRY)
    ours, direct, dense = (build(attention=name) for name in ("lighthouse", "direct", "sdpa"))
    logits = ours(tokens()).logits
    assert torch.equal(logits, direct(tokens()).logits)
    assert torch.equal(logits, ours.eval()(tokens()).logits)
    assert not torch.allclose(logits, dense(tokens()).logits, atol=1e-4)
    expected = gradients(direct)
    for name, grad in gradients(ours.train()).items():
        assert torch.equal(grad, expected[name]), name


def test_output_is_contiguous_and_has_no_weights():
    query, key = torch.randn(1, 4, SEQ_LEN, 8), torch.randn(1, 2, SEQ_LEN, 8)
    output, weights = integration.Implementation(GEOMETRY)(LAYER, query, key, key, None)
    assert output.shape == (1, SEQ_LEN, 4, 8) and output.is_contiguous() and weights is None


def test_every_name_has_its_geometry():
    other = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=128)
    integration.register(other, name="deeper")
    register_direct("direct", other)
    expected = build(attention="direct")(tokens()).logits
    ours = build()
    first = ours(tokens()).logits
    assert torch.equal(build(attention="deeper")(tokens()).logits, expected)
    assert torch.equal(ours(tokens()).logits, first)
    assert not torch.equal(first, expected)
    integration.register(other)  # again: the name now means this
    assert torch.equal(ours(tokens()).logits, expected)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_names_of_other_attentions_are_refused(name):
    with pytest.raises(ValueError, match=f"name='{name}': belongs to another"):
        integration.register(GEOMETRY, name=name)


def test_the_default_geometry_is_the_default_config():
    integration.register()
    with pytest.raises(ValueError, match=f"top_k=1536, seq_len={SEQ_LEN}"):
        build()(tokens())


def test_a_checkpoint_goes_on_under_sdpa(tmp_path):
    model, dense = build(), build(attention="sdpa")
    assert model.state_dict().keys() == dense.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    dense.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    assert "lighthouse" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    expected = dense(tokens()).logits
    assert torch.equal(loaded(tokens()).logits, expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients(calls):
    plain, checkpointed = build(), build()
    checkpointed.gradient_checkpointing_enable()
    expected = gradients(plain)
    assert len(calls) == LAYERS
    for name, grad in gradients(checkpointed).items():
        assert torch.equal(grad, expected[name]), name
    assert len(calls) == 3 * LAYERS  # each layer of the second model ran twice


def test_autocast_casts_as_it_does_for_sdpa(calls):
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert {dtype for call in calls for dtype, _ in call} == {torch.bfloat16}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_layers_compile_into_one_graph_each():
    model, compiled = build(), build()
    for layer in compiled.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens(), use_cache=False).logits, model(tokens()).logits)


def test_an_all_ones_mask_is_no_mask():
    model = build()
    ones = torch.ones_like(tokens())
    assert torch.equal(model(tokens(), attention_mask=ones).logits, model(tokens()).logits)


@pytest.mark.parametrize("position", [0, -1], ids=["left", "right"])
def test_padding_is_refused(position):
    mask = torch.ones_like(tokens())
    mask[1, position] = 0
    with refused("attention_mask hides 1 of 1024 positions", "no padding"):
        build()(tokens(), attention_mask=mask)


def test_a_mask_tensor_is_refused():
    mask = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    with refused("attention_mask is a tensor of shape (1, 1, 512, 512)", "no mask but"):
        build()(tokens(), attention_mask=mask)


@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_is_refused(cache):
    model = build().eval()
    lengths = "512 query positions for 513" if cache else "1 query position for 513"  # a static cache is longer at once
    advice = 'for generate, switch to sdpa first: model.set_attn_implementation("sdpa")'
    with pytest.raises(
        ValueError, match=re.escape(f"{lengths} key positions: no decoding and no cached positions; {advice}")
    ):
        model.generate(tokens(1), max_new_tokens=2, use_cache=True, do_sample=False, cache_implementation=cache)


def test_a_cache_that_holds_something_is_refused():
    model = build().eval()
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"512 query positions for 1024 key positions: .*no cached positions"):
        model(tokens(), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_are_refused(use_cache):
    """With a cache transformers itself does not look, and without one it does."""
    packed, model = torch.arange(SEQ_LEN // 2).repeat(2, 2), build()
    with refused("position_ids start anew", "packed documents are not supported"):
        model(tokens(), position_ids=packed, use_cache=use_cache)
    model(tokens(), position_ids=torch.arange(SEQ_LEN).repeat(2, 1), use_cache=use_cache)


def test_a_sliding_window_is_refused():
    model = build("Qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    with refused("sliding_window=64 in the model's config", "window"):
        model(tokens())


def test_a_bidirectional_model_is_refused():
    with refused("is_causal=False in the model's config", "must be causal"):
        build(is_causal=False)(tokens())


def test_dropout_is_refused_in_training_only():
    model = build(attention_dropout=0.25)
    with refused("dropout=0.25", "must be 0"):
        model(tokens())
    model.eval()(tokens())


@pytest.mark.parametrize(
    ("parts", "arguments"),
    [
        (("1 query position for 512 key positions", "no decoding"), {"query": torch.ones(1, 4, 1, 8)}),
        (("dropout=0.5", "must be 0"), {"dropout": 0.5}),
        (("is_causal=False", "must be causal"), {"is_causal": False}),
        (("is_causal=False", "must be causal"), {"module": SimpleNamespace(is_causal=False)}),
        (("scaling=0.25", "1/√head_dim = 0.353553"), {"scaling": 0.25}),
        (("sliding_window=64 in the model's config", "a sliding window"), {"sliding_window": 64}),
        (("value heads of 4 columns beside key heads of 8", "equally wide"), {"value": torch.ones(1, 4, SEQ_LEN, 4)}),
        (("position_ids start anew 1 times", "packed"), {"position_ids": torch.arange(256).repeat(1, 2)}),
        (("SimpleNamespace does not know which layer it is",), {"module": SimpleNamespace(config=LAYER.config)}),
        (("softcap=50.0", "soft-capped"), {"softcap": 50.0}),
        (("s_aux=a tensor of shape (4,)", "sinks"), {"s_aux": torch.ones(4)}),
        (("position_bias=a tensor of shape (1, 4, 1, 1)", "bias"), {"position_bias": torch.ones(1, 4, 1, 1)}),
        (("cu_seq_lens_q=a tensor of shape (3,)", "packed"), {"cu_seq_lens_q": torch.tensor([0, 8, 512])}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_plain_causal_attention_is_refused(parts, arguments):
    rows = torch.ones(1, 4, SEQ_LEN, 8)
    plain = {"module": LAYER, "query": rows, "key": rows, "value": rows}
    plain |= {"attention_mask": None, "scaling": 8**-0.5, "dropout": 0.0}
    attend = integration.Implementation(GEOMETRY)
    attend(**plain, sliding_window=None, softcap=None)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        attend(**plain | arguments)


def test_the_example_runs():
    results = doctest.testmod(integration)
    assert results.attempted >= 8 and results.failed == 0


def test_kernels_are_chosen_for_every_layer(monkeypatch):
    """Dense layers over all positions, Lighthouse layers over the selected rows."""
    called = packages.install(monkeypatch)
    integration.register(GEOMETRY, layers="1", attention="flash4")
    build().bfloat16()(tokens())
    assert [(name, shape[1]) for name, shape in called] == [
        ("flash4", SEQ_LEN),
        ("flash4", GEOMETRY.selected_length(SEQ_LEN)),
    ]


def test_kernels_that_cannot_be_had_are_refused_at_once():
    with pytest.raises(ValueError, match=r"attention='flash2': must be one of 'auto', "):
        integration.register(GEOMETRY, attention="flash2")
    with pytest.raises(ValueError, match=r"attention='flash3': flash_attn_interface .* cannot be imported: .*'flash'$"):
        integration.register(GEOMETRY, attention="flash3")
    with pytest.raises(ValueError, match=r"attention='flash': combine='softmax' needs"):
        integration.register(LighthouseConfig(combine="softmax"), attention="flash")
