import copy
import json
import logging.handlers
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse import LighthouseTransformer, lighthouse_args
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer
from torchtitan.experiments.lighthouse.runs.settings import load_model, read_settings
from torchtitan.models.llama3.model.model import precompute_freqs_cis
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec

from helpers.launch import CONFIG, SMALL, flags, losses, train

transformers = pytest.importorskip("transformers")

from torchtitan.experiments.lighthouse import export_hf, hugging_face  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

SEQ_LEN = 3072  # rotary scaling changes what is further apart than 8192/4, and these weights see that far


def save_run(folder: Path, flavor: str = "debug", **settings: str | None) -> Path:
    """What a finished run leaves: settings, and a checkpoint of random weights with a sharp attention."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    settings = SMALL | {"model.flavor": flavor, "training.seq_len": str(SEQ_LEN)} | named
    config = ConfigManager().parse_args(["--job.config_file", str(CONFIG), *flags(settings)])
    model = LighthouseTransformer(copy.deepcopy(lighthouse_args[flavor]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            random = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + random / 4 if weight.dim() == 1 else 2 * random * weight.shape[1] ** -0.5)
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint/step-4", no_dist=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


@pytest.fixture(scope="module", params=["debug", "debug_gqa"])
def dense(request, tmp_path_factory) -> Path:
    """A dense run of either flavor, exported."""
    run = save_run(tmp_path_factory.mktemp("runs") / request.param, request.param, **{"lighthouse.no-enable": None})
    export_hf.main([str(run)])
    return run


@pytest.fixture(scope="module")
def debug(tmp_path_factory) -> Path:
    """A dense run of flavor debug, exported."""
    run = save_run(tmp_path_factory.mktemp("runs") / "debug", **{"lighthouse.no-enable": None})
    export_hf.main([str(run)])
    return run


def trained(run: Path) -> LighthouseTransformer:
    checkpoint = run / "checkpoint/step-4"
    return load_model(checkpoint, read_settings(checkpoint), dense=True, device="cpu")


def exported(run: Path, **options) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(run / "hf-step-4", **options).eval()


def test_a_run_is_read_where_its_attention_kernels_cannot_run(tmp_path):
    """Here, on a CPU, and in float32."""
    runs = [save_run(tmp_path / name, **{"lighthouse.inner_attention": name}) for name in ("auto", "flash4")]
    tokens = torch.randint(256, (1, 512))
    assert torch.equal(*(trained(run)(tokens) for run in runs))


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as stop:
        export_hf.main(list(map(str, words)))
    assert stop.value.code == 2 and str(stop.value).startswith("export_hf: ")
    return str(stop.value)


def meta_model(flavor: str) -> LighthouseTransformer:
    with torch.device("meta"):
        return LighthouseTransformer(copy.deepcopy(lighthouse_args[flavor]))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_logits_are_the_trainers_also_where_rotary_scaling_matters(dense):
    tokens = torch.randint(256, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    ours, theirs = trained(dense)(tokens), exported(dense)(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.std().item())
    unscaled = exported(dense, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})(tokens).logits
    far = slice(SEQ_LEN // 2, None)
    assert difference(unscaled[:, far], ours[:, far]) > 0.01 > 1e-4 > difference(theirs[:, far], ours[:, far])


@torch.no_grad()
def test_generate_with_its_cache_writes_what_a_greedy_loop_over_the_trainers_model_writes(dense):
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense / "hf-step-4")
    prompt = tokenizer("def main():", return_tensors="pt")
    written = exported(dense).generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    model, tokens = trained(dense), prompt.input_ids
    while tokens.shape[1] < prompt.input_ids.shape[1] + 24 and tokens[0, -1] != tokenizer.eos_token_id:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == tokens.tolist()
    assert tokenizer.decode(written[0]) == tokenizer.decode(tokens[0])
    assert len(set(tokens[0, -24:].tolist())) > 4  # and not one token over and over


def test_config(dense):
    config = json.loads((dense / "hf-step-4/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert config["intermediate_size"] == 384 and config["max_position_embeddings"] == SEQ_LEN
    assert config["num_key_value_heads"] == (2 if dense.name == "debug_gqa" else 4) and config["head_dim"] == 32
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert config["rope_parameters"] == scaling | {"rope_theta": 10000.0}
    assert config["rope_scaling"] == scaling and config["rope_theta"] == 10000.0  # as before transformers 5
    loaded = transformers.AutoConfig.from_pretrained(dense / "hf-step-4")
    assert loaded.rope_parameters == scaling | {"rope_theta": 10000.0}


def test_530m_has_its_width_its_parameters_and_its_frequencies():
    model = meta_model("530m")
    config = hugging_face.hf_config(model)
    assert config.intermediate_size == 1536 and config.head_dim == 128
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config)
    assert sum(weight.numel() for weight in llama.parameters()) == 530_117_632
    args = model.model_args
    ours = precompute_freqs_cis(args.dim // args.n_heads, 2, args.rope_theta, args.rope_scaling_args)[1].angle()
    theirs = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    plain = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert (theirs < 0.9 * plain).sum() > 10  # scaled; Llama's own base would not be


def test_the_tokenizer_gives_the_trainers_ids(dense):
    folder = dense / "hf-step-4"
    trainers = build_tokenizer(read_settings(dense / "checkpoint/step-4"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    again = HuggingFaceTokenizer(str(folder))  # training from the exported folder
    for text in ("", "def f():\n\treturn 1", "  zwölf  日本語 🙂\r\n", "x" * 1000):
        ids = trainers.encode(text)
        assert ids[0] == 256 and theirs.encode(text) == theirs(text).input_ids == again.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
        assert again.encode(text, add_bos=True, add_eos=True) == trainers.encode(text, add_bos=True, add_eos=True)
    # Special tokens that a text spells out are plain characters to the trainer, and to transformers when asked.
    text = "a <|end_of_text|> b"
    assert theirs.encode(text, split_special_tokens=True) == trainers.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)


def test_stage_1_is_exported_with_a_warning_and_stage_2_without(debug, tmp_path, capsys, recwarn):
    stage1 = save_run(tmp_path / "stage1")
    export_hf.main([str(stage1 / "checkpoint/step-4")])
    printed = capsys.readouterr()
    assert f"WARNING: {stage1}/checkpoint/step-4 is Stage 1's" in printed.err
    assert f"python scripts/resume_dense.py {stage1}/checkpoint/step-4" in printed.err
    assert (stage1 / "hf-step-4/model.safetensors").is_file()

    recwarn.clear()
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("transformers").addHandler(said)
    export_hf.main([str(debug), "--output", str(tmp_path / "dense")])
    back = ["--import", str(tmp_path / "dense"), "--flavor", "debug", "--output", str(tmp_path / "back")]
    export_hf.main(back)
    logging.getLogger("transformers").removeHandler(said)
    printed = capsys.readouterr()
    assert printed.err == "" and "WARNING" not in printed.out
    assert [record.getMessage() for record in said.buffer] == [str(warning.message) for warning in recwarn] == []
    size = sum(file.stat().st_size for file in (tmp_path / "dense").iterdir())
    parameters = sum(weight.numel() for weight in meta_model("debug").parameters())
    assert (
        f"-> {tmp_path}/dense: LlamaForCausalLM, {parameters:,} parameters, torch.float32, {size:,} by" in printed.out
    )


def test_overwrites_when_told_to_and_only_what_it_wrote(debug, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty folder is free
    export_hf.main([str(debug), "--output", str(output), "--dtype", "bfloat16"])
    before = (output / "model.safetensors").stat().st_size
    assert "is not empty; --overwrite" in refusal(debug, "--output", output)
    assert (output / "model.safetensors").stat().st_size == before
    export_hf.main([str(debug), "--output", str(output), "--overwrite"])
    assert (output / "model.safetensors").stat().st_size > 1.9 * before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    for folder in (debug, debug / "checkpoint", tmp_path / "mine"):
        assert "leaves it alone" in refusal(debug, "--output", folder, "--overwrite")
    assert (tmp_path / "mine/thesis.tex").exists() and (debug / "checkpoint/step-4/.metadata").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_an_interrupted_export_leaves_what_was_there(debug, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export_hf.main([str(debug), "--output", str(output)])
    (output / "note").touch()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hugging_face, "copy_tokenizer", interrupt)
    for words in (["--output", str(output), "--overwrite"], ["--output", str(tmp_path / "new")]):
        with pytest.raises(KeyboardInterrupt):
            export_hf.main([str(debug), *words])
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (output / "note").exists()


def test_errors_before_anything_is_written(debug, tmp_path, monkeypatch, capsys):
    assert "no such folder" in refusal(tmp_path / "none")
    moved = shutil.copytree(debug, tmp_path / "moved", ignore=lambda *_: ["hf-step-4"])
    config = json.loads((moved / "config.json").read_text())
    config["model"]["hf_assets_path"] = "/elsewhere/tokenizer"
    (moved / "config.json").write_text(json.dumps(config))
    assert "/elsewhere/tokenizer, the run's model.hf_assets_path, is not here" in refusal(moved)
    assert not (moved / "hf-step-4").exists()
    export_hf.main([str(moved), "--tokenizer", BYTE_TOKENIZER_PATH])
    for words in ([], ["--import", "x"], [str(debug), "--import", "x", "--flavor", "debug", "--output", "y"]):
        with pytest.raises(SystemExit) as stop:
            export_hf.main(words)
        assert stop.value.code == 2
    # Not `transformers` itself: it puts another module in its place while it is used.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    assert "needs transformers 5, found 4.57.1: pip install" in refusal(moved)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'lighthouse-attention[hf]'" in refusal(moved)


def test_training_starts_from_an_imported_folder(debug, tmp_path, capsys):
    capsys.readouterr()
    output = tmp_path / "start"
    export_hf.main(["--import", str(debug / "hf-step-4"), "--flavor", "debug", "--output", str(output)])
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed[:2] == ["--checkpoint.initial_load_path", str(output)]
    assert printed[2:] == ["--model.hf_assets_path", str(debug / "hf-step-4")]

    settings = {name[2:].replace(".", "__"): value for name, value in zip(printed[::2], printed[1::2], strict=True)}
    dump = tmp_path / "run"
    train(dump, training__steps="1", lighthouse__no_enable=None, checkpoint__load_only=None, **settings)
    settings = read_settings(debug / "checkpoint/step-4")
    settings.training.seq_len, settings.training.local_batch_size = 1024, 1
    loader = get_train_spec("lighthouse").build_dataloader_fn(
        dp_world_size=1, dp_rank=0, tokenizer=build_tokenizer(settings), job_config=settings
    )
    inputs, labels = next(iter(loader))
    with torch.no_grad():
        logits = exported(debug)(inputs["input"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert losses(dump) == {1: pytest.approx(loss, rel=1e-4)}
    assert abs(loss - torch.tensor(320.0).log()) > 0.5  # a model with random small weights starts elsewhere


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_survive_the_round_trip(dense, dtype, tmp_path):
    folder, output = tmp_path / "hf", tmp_path / "start"
    export_hf.main([str(dense), "--output", str(folder), "--dtype", dtype])
    export_hf.main(["--import", str(folder), "--flavor", dense.name, "--output", str(output)])
    expected = {name: w.to(getattr(torch, dtype)).float() for name, w in trained(dense).state_dict().items()}
    found = {name: torch.empty_like(weight) for name, weight in expected.items()}
    dcp.load(found, checkpoint_id=output, no_dist=True)
    assert len(dcp.FileSystemReader(output).read_metadata().state_dict_metadata) == len(expected) == 57
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name

    # Upstream's checkpoint.initial_load_in_hf reads the same folder.
    adapter = Llama3StateDictAdapter(lighthouse_args[dense.name], str(folder))
    weights = adapter.to_hf({name: torch.empty_like(weight) for name, weight in expected.items()})
    dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(str(folder)), no_dist=True)
    for name, weight in adapter.from_hf(weights).items():
        assert torch.equal(expected[name], weight), name


def test_refuses_to_import_another_model_naming_each_difference(debug, tmp_path):
    folder, output = debug / "hf-step-4", tmp_path / "start"
    message = refusal("--import", folder, "--flavor", "530m", "--output", output)
    assert f"{folder} is not the model of flavor 530m:" in message
    for line in ("hidden_size: 128 there, 1024 in 530m", "intermediate_size: 384 there, 1536 in", "head_dim: 32 there"):
        assert f"\n  {line}" in message
    assert "max_position" not in message and "rms_norm_eps" not in message

    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())

    def refused(**changes) -> list[str]:
        (other / "config.json").write_text(json.dumps(config | changes))
        return refusal("--import", other, "--flavor", "debug", "--output", output).splitlines()[1:]

    scaling = config["rope_scaling"] | {"factor": 32.0}
    assert refused(rope_scaling=scaling, rms_norm_eps=1e-6) == [
        "  rms_norm_eps: 1e-06 there, 1e-05 in debug",
        "  factor: 32.0 there, 8.0 in debug",
    ]
    assert "  rope_type: default there, llama3 in debug" in refused(rope_scaling=None, rope_parameters=None)
    refusal_of_type = refusal("--import", tmp_path, "--flavor", "debug", "--output", output)
    assert "is no Hugging Face model" in refusal_of_type
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    assert "'mistral'; must be 'llama'" in refusal("--import", other, "--flavor", "debug", "--output", output)

    # Settings that agree, and tensors that do not.
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.norm.bias"] = weights.pop("lm_head.weight")
    save_file(weights, other / "model.safetensors")
    assert refused() == [
        "  lm_head.weight: None there, (320, 128) in debug",
        "  model.norm.bias: (320, 128) there, None in debug",
    ]
    assert not output.exists()
