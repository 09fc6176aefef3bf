"""A model's sizes: the named flavors, the [llama] section, a Hugging Face config.json. No trainer is started."""

import copy
import json
import random
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse import LighthouseTransformer, check_causality, evaluate
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.model.args import LighthouseModelArgs
from torchtitan.experiments.lighthouse.model.hf_config import read_hf_config
from torchtitan.experiments.lighthouse.model.sizes import FLAVORS, Llama
from torchtitan.experiments.lighthouse.runs.settings import complete, model_arguments, read_settings

from helpers.launch import SMALL, flags
from helpers.settings import parse

#: As transformers writes a small Llama.
HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 200,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
    "tie_word_embeddings": False, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SIZES = Llama(96, 4, 6, 2, 200, 300, 1e-6, 500000.0, 1.0, 1.0, 4.0, 8192)
SCALED = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LAYERS = ["--lighthouse.layers", "1--2"]


@cache
def parsed():
    return parse("debug.toml", *flags(SMALL), *LAYERS)


def settings(*overrides: str):
    """As the parser makes them, which takes half a second each time."""
    changed = copy.copy(parsed())
    for override in overrides:
        name, _, text = override.removeprefix("--").partition("=")
        section, name = name.split(".")
        kinds = (int, float, str)
        value = next(made for kind in kinds if (made := made_of(kind, text)) is not None)
        setattr(changed, section, replace(getattr(changed, section), **{name: value}))
    return changed


def made_of(kind, text: str):
    try:
        return kind(text)
    except ValueError:
        return None


@pytest.fixture
def hf(tmp_path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF))
    return folder


# The same data, there and back


def test_every_width_of_the_feed_forward_network_is_exactly_the_one_that_was_asked_for():
    """Upstream rounds up to a multiple of a share: no width may come out as its neighbour."""
    draw = random.Random(0)
    for _ in range(300):
        heads = draw.choice([1, 2, 3, 5, 8])
        sizes = replace(SIZES, dim=2 * heads * draw.randint(1, 400), n_heads=heads, n_kv_heads=1)
        sizes = replace(sizes, ffn_dim=draw.choice([1, 2, 3, draw.randint(1, 20_000)]))
        assert LighthouseModelArgs.of(sizes).sizes == sizes


def test_sizes_are_the_models():
    with torch.device("meta"):
        model = LighthouseTransformer(LighthouseModelArgs.of(SIZES))
    found = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert found["tok_embeddings.weight"] == found["output.weight"] == (300, 96)
    assert found["layers.3.attention.wk.weight"] == (32, 96) and "layers.4.attention.wk.weight" not in found
    assert found["layers.0.feed_forward.w1.weight"] == (200, 96)


def test_a_named_flavor_says_in_the_settings_what_it_is_and_may_be_changed():
    assert complete(settings("--model.flavor=debug_gqa")).llama == FLAVORS["debug_gqa"]
    changed = complete(settings("--model.flavor=debug", "--llama.rope_theta=500000", "--llama.ffn_dim=200"))
    assert changed.llama == replace(FLAVORS["debug"], rope_theta=500000, ffn_dim=200)
    # And the flavor itself is as it was.
    assert complete(settings("--model.flavor=debug")).llama == FLAVORS["debug"]


def test_own_sizes_and_what_follows_from_them():
    given = ["--model.flavor=custom", "--llama.dim=96", "--llama.n_layers=4", "--llama.n_heads=6"]
    llama = complete(settings(*given)).llama
    # 8/3 of 96 is 256; 258 tokens, rounded up to a multiple of 128.
    assert (llama.n_kv_heads, llama.ffn_dim, llama.vocab_size) == (6, 256, 384)
    assert complete(parse("debug.toml", *given, "--llama.vocab_size=tokenizer")).llama == llama
    assert complete(parse("debug.toml", *given, "--llama.vocab_size=1000")).llama == replace(llama, vocab_size=1000)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--llama.n_heads=3"], "llama.dim=128: must be a multiple of 6, an even number of columns for each of n_heads=3 heads; nearest valid value: 126"),  # noqa: E501
        (["--llama.dim=100"], "llama.dim=100: must be a multiple of 8, an even number of columns for each of n_heads=4 heads; nearest valid value: 96"),  # noqa: E501
        (["--llama.n_kv_heads=3"], "llama.n_kv_heads=3: must divide n_heads=4; nearest valid value: 2"),
        (["--llama.n_layers=0"], "llama.n_layers=0: must be at least 1; nearest valid value: 1"),
        (["--llama.vocab_size=-1"], "llama.vocab_size=-1: must be at least 1; nearest valid value: 1"),
        (["--llama.rope_factor=0.5"], "llama.rope_factor=0.5: must be at least 1; nearest valid value: 1"),
        (["--llama.rope_theta=1"], "llama.rope_theta=1: must be more than 1; nearest usual value: 10000.0"),
        (["--llama.rope_high_freq_factor=1"], "llama.rope_high_freq_factor=1: must be more than 1.0; nearest usual value: 4.0"),  # noqa: E501
        (["--model.flavor=custom", "--llama.dim=64"], "model.flavor='custom': llama.n_layers, llama.n_heads must be given in [llama], or model.hf_config must name a Llama's config.json; or choose one of the flavors: '530m'"),  # noqa: E501
        (["--llama.vocab_size=tokenizer", "--model.hf_assets_path=/none"], "model.hf_assets_path='/none': "),
        (["--model.hf_config=/none"], "model.flavor='debug' with model.hf_config='/none': both are a model; nearest valid value: model.flavor='custom'"),  # noqa: E501
        (["--model.flavor=custom", "--model.hf_config=/none"], "model.hf_config='/none': cannot be read ("),
    ],
)  # fmt: skip
def test_sizes_that_no_model_can_have(overrides, message):
    with pytest.raises(Refused, match=f"^{re.escape(message)}[^\n]*$"):
        complete(settings(*overrides))


# A Hugging Face config.json


def write(hf: Path, **changes) -> Path:
    config = {name: value for name, value in (HF | changes).items() if value is not ...}
    (hf / "config.json").write_text(json.dumps(config))
    return hf


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"num_key_value_heads": ..., "head_dim": ..., "architectures": ..., "mlp_bias": ...}, {"n_kv_heads": 6}),
        ({"rope_parameters": SCALED | {"rope_theta": 1e6}}, {"rope_theta": 1e6, "rope_factor": 32.0}),
        # As before transformers 5.
        ({"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": SCALED}, {"rope_theta": 1e6, "rope_factor": 32.0}),
        ({"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": None}, {"rope_theta": 1e6}),
        ({"rope_parameters": ...}, {"rope_theta": 10000.0}),
    ],
)
def test_a_config_of_hugging_face(changes, expected, hf):
    wanted = replace(SIZES, **expected)
    assert read_hf_config(write(hf, **changes)) == read_hf_config(hf / "config.json") == wanted
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig.from_pretrained(hf)
    assert config.num_key_value_heads == wanted.n_kv_heads and config.rms_norm_eps == wanted.norm_eps
    assert config.rope_parameters["rope_theta"] == wanted.rope_theta
    assert config.rope_parameters.get("factor", 1.0) == wanted.rope_factor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "model_type is 'mistral' and architectures ['MistralForCausalLM']; must be 'llama' and"),  # noqa: E501
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceClassification']"),
        ({"sliding_window": 4096}, "cannot have sliding_window=4096 (must be None)"),
        ({"tie_word_embeddings": True}, "cannot have tie_word_embeddings=True (must be False)"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "hidden_act='gelu' (must be 'silu'); attention_bias=True (mu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"head_dim": 32}, "head_dim=32 (must be hidden_size / num_attention_heads, 16)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' (must be 'default' or 'llama3')"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' (must be"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' without low_freq_factor, h"),
        ({"hidden_size": ..., "vocab_size": None}, "hidden_size, vocab_size must be there"),
        ({"num_key_value_heads": 4}, "llama.n_kv_heads=4: must divide n_heads=6; nearest valid value: 3"),
        ({"vocab_size": "many"}, "llama.vocab_size='many': must be a whole number"),
    ],
)  # fmt: skip
def test_what_our_llama_is_not_is_refused_by_name(changes, message, hf):
    with pytest.raises(Refused, match=f"^{re.escape(f'model.hf_config={str(hf)!r}: ')}[^\n]*{re.escape(message)}"):
        read_hf_config(write(hf, **changes))


def test_the_section_changes_what_the_file_says(hf):
    given = ["--model.flavor=custom", f"--model.hf_config={hf}"]
    assert complete(settings(*given)).llama == SIZES
    changed = complete(settings(*given, "--llama.rope_factor=8", "--llama.vocab_size=tokenizer"))
    assert changed.llama == replace(SIZES, rope_factor=8.0, vocab_size=384)
    (hf / "config.json").write_text("{")
    with pytest.raises(Refused, match=r"cannot be read"):
        complete(settings(*given))
    complete(changed)  # all of it is in the settings now


# A run


@pytest.fixture
def run(hf, tmp_path) -> Path:
    """What a run of the file's model leaves, and the file has gone since."""
    folder = tmp_path / "run"
    config = complete(
        settings("--model.flavor=custom", f"--model.hf_config={hf}", "--llama.rope_theta=1e5", "--training.seq_len=512")
    )
    config = replace(config, job=replace(config.job, dump_folder=str(folder)))
    args = model_arguments(config)
    torch.manual_seed(0)
    model = LighthouseTransformer(args)
    with torch.no_grad():
        model.init_weights()
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint/step-4", no_dist=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (hf / "config.json").unlink()
    hf.rmdir()
    return folder


def test_a_runs_own_settings_are_enough_for_every_command(run, capsys):
    there = read_settings(run / "checkpoint/step-4")
    assert there.llama == replace(SIZES, rope_theta=1e5) and model_arguments(there).sizes == there.llama
    evaluate.main([str(run), "--sequences", "1", "--dataset", "stdlib_validation"])
    check_causality.main([str(run), "--dense", "--positions", "2", "--tries", "1"])
    printed = capsys.readouterr().out
    assert "1 sequences of stdlib_validation" in printed and "Causal" in printed

    pytest.importorskip("transformers")
    from torchtitan.experiments.lighthouse import export_hf

    export_hf.main([str(run)])
    exported = read_hf_config(run / "hf-step-4")
    assert exported == replace(SIZES, rope_theta=1e5)


def test_the_trainer_too_goes_on_without_the_file(run, hf):
    """Its own settings name the file still. Another run's cannot be completed."""
    given = ["--model.flavor=custom", f"--model.hf_config={hf}"]
    assert complete(settings(*given, f"--job.dump_folder={run}")).llama == replace(SIZES, rope_theta=1e5)
    with pytest.raises(Refused, match=r"model.hf_config='.*': cannot be read"):
        complete(settings(*given, f"--job.dump_folder={run}2"))
