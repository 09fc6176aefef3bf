"""The table of models in docs/hugging_face.md: tiny random ones, each trained through Lighthouse or refused."""

import logging
import re
from pathlib import Path

import pytest
import torch

from lighthouse import LighthouseConfig
from lighthouse.attention import lighthouse_attention

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")

import lighthouse.integrations.transformers as integration  # noqa: E402
from lighthouse.integrations import query_key_norm  # noqa: E402

SEQ_LEN, VOCABULARY = 512, 32
GEOMETRY = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=128)
DOCUMENT = Path(__file__).resolve().parents[3] / "docs/hugging_face.md"

#: The settings beside ``build``'s that make it the model of its row.
TAKEN = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral without window": {"sliding_window": None},
    "OLMo2": {},
    "Phi3": {},
    "SmolLM3": {},
    "GPT-NeoX": {},
}
#: And what of the message says why.
REFUSED = {
    "Mistral with window": ({"sliding_window": 4096}, "sliding_window=4096 in the model's config"),
    "Gemma2": ({"sliding_window": 64}, "sliding_window=64 in the model's config"),
    "Gemma3": ({"sliding_window": 64}, "sliding_window=64 in the model's config"),
    "GPT-OSS": ({"sliding_window": 64, "num_local_experts": 2}, "sliding_window=64 in the model's config"),
    "Llama4": ({"attention_chunk_size": 64, "num_local_experts": 2}, "attention_chunk_size=64 in the model's config"),
    "Granite": ({"attention_multiplier": 0.5}, "scaling=0.5: must be 1/√head_dim"),
}
CONFIGS = {"OLMo2": "Olmo2", "GPT-NeoX": "GPTNeoX", "GPT-OSS": "GptOss", "Llama4": "Llama4Text", "Gemma3": "Gemma3Text"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    monkeypatch.setattr(query_key_norm, "_warned", set())
    integration.register(GEOMETRY, layers="1")


def build(name, attention="lighthouse", layers=2, **settings):
    """Two layers, four query heads and two key/value heads of 8, always with the same weights."""
    config = getattr(transformers, f"{CONFIGS.get(name, name.split()[0])}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        max_position_embeddings=SEQ_LEN, attn_implementation=attention, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def tokens():
    return torch.randint(VOCABULARY, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch) -> list:
    """What each call of ``lighthouse_attention`` was scored by."""
    seen = []

    def spy(*rows, score_by=None, **more):
        seen.append(score_by)
        return lighthouse_attention(*rows, score_by=score_by, **more)

    monkeypatch.setattr(integration, "lighthouse_attention", spy)
    return seen


def test_the_table_is_what_is_tested():
    rows = re.findall(r"^\| ([^|]+?) \| (yes|refused)", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*((name, "yes") for name in TAKEN), *((name, "refused") for name in REFUSED)]


@pytest.mark.parametrize("name", TAKEN)
def test_a_model_of_the_table_trains(name, calls):
    """One layer through Lighthouse and one dense: every parameter has a gradient, and the dense layer is sdpa's."""
    model, dense = build(name, **TAKEN[name]), build(name, "sdpa", **TAKEN[name])
    output = model(tokens(), labels=tokens(), output_hidden_states=True)
    output.loss.backward()
    assert len(calls) == 1 and all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    expected = dense(tokens(), output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[1], expected.hidden_states[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output.hidden_states[2], expected.hidden_states[2], atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_the_table_is_refused_by_its_own_settings(name):
    settings, message = REFUSED[name]
    model = build(name, **settings)
    with pytest.raises(ValueError, match=re.escape(message) + '.*attn_implementation="sdpa"'):
        model(tokens())


@pytest.mark.parametrize("name", ["Qwen3", "OLMo2"])
def test_models_that_normalise_are_scored_before_it(name, calls):
    """Whatever is done to the lengths after the projections, the norm takes it away, and the scores see it."""
    model = build(name)
    attention = model.model.layers[1].self_attn
    given = []
    attention.q_norm.register_forward_hook(lambda norm, inputs, output: given.append(inputs[0]))
    model(tokens())
    ((query, key),) = calls
    assert torch.equal(query, given[0].view(2, SEQ_LEN, 4, 8).transpose(1, 2))
    assert query.shape == (2, 4, SEQ_LEN, 8) and key.shape == (2, 2, SEQ_LEN, 8)
    # Normalised rows are all equally long; these are not. And nothing is kept.
    assert query.norm(dim=-1).std() > 0.05 * query.norm(dim=-1).mean()
    assert not hasattr(attention.q_norm, "rows_before") and not hasattr(attention.k_norm, "rows_before")
    dense_layer = model.model.layers[0].self_attn
    assert not hasattr(dense_layer.q_norm, "rows_before")
    model.set_attn_implementation("sdpa")
    model(tokens())
    assert not hasattr(attention.q_norm, "rows_before")


def test_scoring_before_the_norm_survives_checkpointing_and_compilation():
    plain, checkpointed, compiled = (build("Qwen3") for _ in range(3))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in compiled.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    expected = {}
    for model in (plain, checkpointed, compiled):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, expected.setdefault(name, parameter.grad)), name


def test_where_nothing_from_before_the_norm_is_known_one_warning_names_the_alternative(calls, caplog):
    """As in a model whose norms are called before anything was asked to keep what they are given."""
    layer, rows = build("Qwen3").model.layers[1].self_attn, torch.randn(2, 4, SEQ_LEN, 8)
    attend = integration.Implementation(GEOMETRY, "1")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            attend(layer, rows, rows, rows, None)
    assert calls == [None, None]
    (message,) = [record.message for record in caplog.records if "Lighthouse" in record.message]
    assert "Qwen3Attention normalises query and key" in message and "take scorer='dilated' or 'gla'" in message


@pytest.mark.parametrize(("layers", "said"), [(2, "all layers of 2"), (6, "layers 2-3 of 6")])
def test_the_default_layers_are_said_once(layers, said, calls, caplog):
    integration.register(GEOMETRY)
    model = build("Llama", layers=layers)
    with caplog.at_level(logging.WARNING):
        model(tokens())
        model(tokens())
    assert len(calls) == 4
    (message,) = [record.message for record in caplog.records if "Lighthouse" in record.message]
    assert f"runs in {said}, the default; register(config, layers=" in message


def test_layers_that_the_model_does_not_have_are_refused():
    integration.register(GEOMETRY, layers="2-27")
    with pytest.raises(ValueError, match=re.escape("layers='2-27': layer 2 is outside the model, whose 2 layers")):
        build("Llama")(tokens())
    with pytest.raises(ValueError, match="layers=3: must be a text"):
        integration.register(GEOMETRY, layers=3)
