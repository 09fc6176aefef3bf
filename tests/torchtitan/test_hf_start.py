"""Continued pre-training: a run that starts from the weights of a Hugging Face Llama."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.runs.settings import complete, load_model, read_settings

from helpers.launch import SMALL, config_of, flags, train
from helpers.settings import parse

transformers = pytest.importorskip("transformers")

from torchtitan.experiments.lighthouse import export_hf, resume_dense  # noqa: E402
from torchtitan.experiments.lighthouse.hugging_face import check_start  # noqa: E402

SEQ_LEN = 1024


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A small Llama as transformers writes it, with a sharp attention and a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=96, intermediate_size=200, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 2000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            random = torch.randn(weight.shape)
            weight.copy_(1 + random / 4 if weight.dim() == 1 else 2 * random * weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for file in Path(BYTE_TOKENIZER_PATH).iterdir():
        shutil.copy(file, folder)
    return folder


def start(hf: Path) -> dict[str, str | None]:
    return {
        "model.flavor": "custom", "model.hf_config": str(hf), "model.hf_assets_path": str(hf),
        "checkpoint.initial_load_path": str(hf), "checkpoint.initial_load_in_hf": None,
    }  # fmt: skip


CHANGED = {
    "llama.rope_theta": "30000", "llama.rope_factor": "4", "llama.rope_original_max_position_embeddings": "256",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(hf, tmp_path_factory) -> Path:
    """One step through Lighthouse, too small to change a weight, with another rotary embedding."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = start(hf) | CHANGED | {"lighthouse.layers": "1--2", "training.steps": "1", "optimizer.lr": "1e-30"}
    printed = train(folder, **{name.replace(".", "__"): value for name, value in settings.items()})
    said = printed.stdout + printed.stderr
    assert f"starts from the weights of {hf}" in said
    assert f"Not as in {hf}: llama.rope_theta 2000.0 → 30000.0" in said
    assert f"Not as in {hf}: llama.rope_factor 1.0 → 4.0" in said and "norm_eps 1e" not in said
    return folder


@torch.no_grad()
def theirs(hf: Path, tokens: torch.Tensor, dtype: torch.dtype, **rope) -> torch.Tensor:
    config = transformers.AutoConfig.from_pretrained(hf)
    config.rope_parameters |= rope
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, config=config, dtype=dtype)
    return model.eval()(tokens).logits.double()


def assert_equal(ours: torch.Tensor, hf: Path, tokens: torch.Tensor, **rope) -> None:
    """As near to float64 as transformers' own float32 is, up to a factor of four.

    Two for the same sums in another order. Two more for the angles: in float64 too transformers takes them from
    float32, so its own rounding of position times frequency is in both of its results, and ours is another.
    """
    exact, single = (theirs(hf, tokens, dtype, **rope) for dtype in (torch.float64, torch.float32))
    rounding = (single - exact).abs().max()
    assert 0 < rounding < 1e-3 * exact.std()
    assert (ours - exact).abs().max() <= 4 * rounding


@torch.no_grad()
def test_logits_are_transformers_before_the_change_and_after_it(hf, run):
    checkpoint = run / "checkpoint/step-1"
    settings, tokens = (
        read_settings(checkpoint),
        torch.randint(256, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1)),
    )
    assert settings.lighthouse.enable  # it was trained through Lighthouse
    after = load_model(checkpoint, settings, dense=True, device="cpu")(tokens).double()
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    assert_equal(after, hf, tokens, rope_type="llama3", rope_theta=30000.0, factor=4.0, **scaling)
    settings.llama = replace(settings.llama, rope_theta=2000.0, rope_factor=1.0)
    before = load_model(checkpoint, settings, dense=True, device="cpu")(tokens).double()
    assert_equal(before, hf, tokens)
    assert (after - before).abs().max() > 0.1 * before.std()  # the change is one


def test_the_next_stage_and_the_export_have_the_changed_embedding(hf, run, tmp_path, capsys):
    gone = {"hf_config": "/gone", "hf_assets_path": BYTE_TOKENIZER_PATH}
    moved = shutil.copytree(run, tmp_path / "run")
    config = config_of(moved)
    (moved / "config.json").write_text(json.dumps(config | {"model": config["model"] | gone}))
    export_hf.main([str(moved), "--output", str(tmp_path / "out")])
    rope = transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert (rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]) == (30000.0, 4.0, 256)
    resume_dense.main([str(run), "--dry-run"])
    printed = capsys.readouterr().out
    assert "Stage 2 from" in printed and "rope_theta = 30000.0" in printed and "initial_load_in_hf = false" in printed


def check(hf: Path, **changed: str) -> list[str]:
    settings = SMALL | start(hf) | {name.replace("__", "."): value for name, value in changed.items()}
    return check_start(complete(parse("debug.toml", *flags(settings))))


def test_what_is_not_the_models_is_refused_before_anything_is_built(hf, tmp_path):
    assert check(hf) == []
    other = shutil.copytree(hf, tmp_path / "other")
    start_of_line = re.escape(f"checkpoint.initial_load_path={str(other)!r}: ")
    wrong = rf"^{start_of_line}its weights are of another model: [^\n]*{{}}[^\n]*model.hf_config={str(other)!r}, which"
    with pytest.raises(Refused, match=wrong.format("llama.dim 96 → 48; ")):
        check(other, llama__dim="48")
    with pytest.raises(Refused, match=wrong.format("llama.vocab_size 258 → 384;")):
        check(other, llama__vocab_size="tokenizer")
    # Another file, though it says the same: what it changes was not changed on purpose.
    with pytest.raises(Refused, match=wrong.format("llama.rope_theta 2000.0 → 3000.0;")):
        check(other, model__hf_config=str(hf), llama__rope_theta="3000")
    assert check(other, model__hf_config=str(hf)) == []
    assert check(other, model__hf_config=str(other / "config.json"), llama__norm_eps="1e-5") == [
        f"Not as in {other}: llama.norm_eps 1e-06 → 1e-05"
    ]
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(Refused, match=rf"^{start_of_line}its tensors are not those of its config: [^\n]*200, 96"):
        check(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(Refused, match=rf"^{start_of_line}is no Hugging Face model"):
        check(other)
