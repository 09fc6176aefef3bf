import json
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict

import pytest
from torchtitan.experiments.lighthouse import lighthouse_args
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.job_config import Lighthouse, check_degrees
from torchtitan.experiments.lighthouse.runs import next_stage
from torchtitan.experiments.lighthouse.runs.settings import build_model
from torchtitan.experiments.lighthouse.settings_rules import check_settings
from torchtitan.experiments.lighthouse.train import LighthouseTrainer

from helpers.settings import REPOSITORY, model_args, parse
from lighthouse import causal_attention

CONFIGS = sorted((REPOSITORY / "train_configs").glob("*.toml"))
PARAMETERS = {"530m": 530_117_632, "268m": 268_104_704, "32m": 32_451_072, "debug": 1_361_536, "debug_gqa": 1_263_232}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_builds(config):
    job_config = parse(config.name)
    args = model_args(job_config)
    model = build_model(job_config)
    count, flops = args.get_nparams_and_flops(model, job_config.training.seq_len)
    assert count == PARAMETERS[job_config.model.flavor] and flops > 0
    # What Stage 2 rests on.
    checkpoint = job_config.checkpoint
    assert checkpoint.enable and checkpoint.async_mode == "disabled" and not checkpoint.last_save_model_only
    assert checkpoint.keep_latest_k == 0 and job_config.job.save_config_file == "config.json"
    assert job_config.lr_scheduler.total_steps >= job_config.training.steps


@pytest.mark.parametrize("flavor", PARAMETERS)
def test_parameter_counts(flavor):
    model = build_model(parse("debug.toml", "--model.flavor", flavor, "--lighthouse.no-enable"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[flavor]


def test_530m_is_the_papers():
    args = lighthouse_args["530m"]
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads) == (1024, 30, 8, 8)
    assert (args.vocab_size, args.rope_theta) == (128256, 10000)
    stage1, dense = parse("530m_stage1.toml"), parse("530m_dense.toml")
    assert build_model(dense).layers["0"].feed_forward.w1.weight.shape == (1536, 1024)
    for config, steps in ((stage1, 10_000), (dense, 16_000)):
        assert (config.training.steps, config.lr_scheduler.total_steps, config.lr_scheduler.warmup_steps) == (
            steps, 16_000, 2_000,
        )  # fmt: skip
        assert config.training.seq_len * config.training.global_batch_size * 16_000 == pytest.approx(50.3e9, rel=1e-3)
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.beta1, optimizer.beta2) == ("AdamW", 2e-3, 0.9, 0.95)
        assert (optimizer.eps, optimizer.weight_decay, config.training.max_norm) == (1e-8, 0.1, 1.0)
        assert config.lr_scheduler.decay_ratio == 0.0 and config.training.dataset == "c4"
    assert stage1.lighthouse.attention_config().selected_length(98304) == 18432
    assert not dense.lighthouse.enable


def test_layers_2_to_27_and_only_those_are_routed():
    model = build_model(parse("530m_stage1.toml"))
    attentions = {int(name): layer.attention for name, layer in model.layers.items()}
    routed = {layer for layer, attention in attentions.items() if attention.lighthouse is not None}
    assert routed == set(range(2, 28))
    # Around the very module that dense layers use, the one that context parallelism works on.
    assert all(attentions[layer].lighthouse.attention is attentions[layer].inner_attention for layer in routed)
    assert len({type(attention.inner_attention) for attention in attentions.values()}) == 1
    # But for the merge, whose attention returns log-sum-exps.
    merged = build_model(parse("debug.toml", "--lighthouse.combine=softmax")).layers["2"].attention
    assert merged.lighthouse.attention is causal_attention


def test_every_field_works_on_the_command_line():
    values = {
        "layers": "1,-2", "num_levels": 2, "pooling_factor": 2, "top_k": 256, "scorer": "gla", "dilation": 8,
        "rope": "after_gather", "cover_start": False, "selection": "causal", "local_window": 512, "backend": "torch",
        "dense_every": 8, "combine": "softmax", "inner_attention": "flash4",
    }  # fmt: skip
    flags = [
        word
        for name, value in values.items()
        for word in (
            [f"--lighthouse.{'' if value else 'no-'}{name}"] if isinstance(value, bool)
            else [f"--lighthouse.{name}={value}"]
        )
    ]  # fmt: skip
    section = parse("debug.toml", *flags, "--lighthouse.enable").lighthouse
    assert {name: getattr(section, name) for name in values} == values
    config = section.attention_config()
    of_model = ("layers", "rope", "dense_every", "inner_attention")  # the rest are the library's
    assert {name: getattr(config, name) for name in values if name not in of_model} == {
        name: value for name, value in values.items() if name not in of_model
    }
    assert parse("530m_stage1.toml", "--lighthouse.top_k", "2048").lighthouse.top_k == 2048


@pytest.mark.parametrize("value", [1, -1, 2.5, False])
def test_dense_every_counts_steps(value):
    message = f"dense_every={value}: must be 0 .* or an integer of at least 2 .*; nearest valid values: 0 or 2$"
    with pytest.raises(ValueError, match=message):
        Lighthouse(dense_every=value)


def test_dense_steps_are_the_multiples():
    every = Lighthouse(enable=True, dense_every=4)
    assert [step for step in range(1, 14) if every.is_dense_step(step)] == [4, 8, 12]
    assert not any(Lighthouse(enable=on, dense_every=n).is_dense_step(8) for on, n in ((True, 0), (False, 4)))


CP2 = ["--parallelism.context_parallel_degree", "2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--lighthouse.layers", "2-27"], "layer 27 is outside the model"),
        (["--lighthouse.top_k", "100"], "top_k=100"),
        (["--training.seq_len", "4100"], "seq_len=4100"),
        (["--lighthouse.backend", "triton"], "backend='triton' is not available on 'cpu'"),
        (
            [*CP2, "--lighthouse.top_k", "768"],
            "top_k=768: must be a multiple of 128 for each of the 4 chunks of context parallelism, 512; nearest valid "
            "values: 512 or 1024",
        ),
        ([*CP2, "--lighthouse.top_k", "512"], "nearest valid top_k: 256; nearest valid seq_len with top_k=512: 8192"),
        (
            [*CP2, "--parallelism.context_parallel_load_balancer", "None", "--lighthouse.top_k", "128"],
            "top_k=128: must be a multiple of 128 for each of the 2 chunks",
        ),
        ([*CP2, "--parallelism.context_parallel_load_balancer", "ptrr"], "load_balancer='ptrr': must be 'headtail'"),
        (
            ["--lighthouse.rope", "after_gather", "--lighthouse.scorer", "gla"],
            "lighthouse.rope='after_gather' with scorer='gla'",
        ),
        ([*CP2, "--lighthouse.scorer", "dilated"], "scorer='dilated': looks past the chunks"),
        ([*CP2, "--parallelism.tensor_parallel_degree", "2"], "Lighthouse runs under one of the two"),
        (
            [*CP2, "--parallelism.context_parallel_load_balancer", "None", "--compile.enable",
             "--activation_checkpoint.mode", "full"],
            "would hang with compile.enable=true and activation_checkpoint.mode='full'",
        ),
        (["--parallelism.tensor_parallel_degree", "3"], "tensor_parallel_degree=3: must divide the model's 4"),
        (
            ["--model.flavor", "debug_gqa", "--parallelism.tensor_parallel_degree", "4"],
            "must divide the model's 2 key/value heads; valid values: 1, 2",
        ),
        (["--validation.enable", "--validation.seq_len", "1000"], "validation.seq_len: seq_len=1000"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_is_built(overrides, message, monkeypatch):
    monkeypatch.setattr("lighthouse.config.INTERPRETED", False)
    monkeypatch.setattr("torchtitan.experiments.lighthouse.model.args.device_type", "cpu")
    with pytest.raises(ValueError, match=re.escape(message)):
        model_args(parse("debug.toml", *overrides))


@pytest.mark.parametrize(
    ("processes", "degrees", "message"),
    [
        (8, {"context_parallel": 4}, None),
        (8, {"context_parallel": 2, "data_parallel_shard": 4}, None),
        (1, {"context_parallel": 2}, "WORLD_SIZE=1: must be a multiple of 2 .*context_parallel_degree=2.*: 2$"),
        (6, {"context_parallel": 2, "data_parallel_replicate": 2}, "WORLD_SIZE=6: must be a multiple of 4 .*: 4 or 8$"),
        (8, {"data_parallel_shard": 4}, "WORLD_SIZE=8: must be 4 .*data_parallel_shard_degree=4.*: 4$"),
        (8, {"context_parallel": 0}, "context_parallel_degree=0: must be at least 1; nearest valid value: 1"),
    ],
)
def test_degrees_must_fill_the_processes(processes, degrees, message):
    settings = parse("debug.toml", *(f"--parallelism.{kind}_degree={degree}" for kind, degree in degrees.items()))
    if message is None:
        check_degrees(settings.parallelism, processes)
    else:
        with pytest.raises(ValueError, match=message):
            check_degrees(settings.parallelism, processes)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "flash4", CP2,
            "with parallelism.context_parallel_degree=2: the ring that attends to a split sequence runs torch's own "
            "kernels; nearest valid values: 'cudnn' or 'flash'",
        ),
        ("flash3", CP2, "nearest valid values: 'cudnn' or 'flash'"),
        (
            "flash", ["--lighthouse.combine", "softmax"],
            "with combine='softmax': that brings an attention of its own, which returns log-sum-exps; nearest valid "
            "value: 'auto' (or combine='sum')",
        ),
        (
            "cudnn", ["--debug.deterministic"],
            "with debug.deterministic=true: its backward is not deterministic; nearest valid value: 'flash'",
        ),
        (
            "cudnn", ["--training.mixed_precision_param", "float32"],
            "takes bfloat16 and float16, not torch.float32; nearest valid value: 'auto'",
        ),
        (
            "flash4", ["--model.flavor", "custom", "--llama.dim", "768", "--llama.n_heads", "4", "--llama.n_layers",
                       "6", "--llama.vocab_size", "256"],
            "takes heads of a multiple of 8 columns, at most 128, not 192; nearest valid value: 'flash'",
        ),
    ],
)  # fmt: skip
def test_kernels_that_do_not_go_with_other_settings_are_refused(name, overrides, message):
    """In a dense run too, but for the merge, which a dense run does not make."""
    for dense in ([], ["--lighthouse.no-enable"]):
        settings = parse("debug.toml", "--lighthouse.inner_attention", name, *overrides, *dense)
        if dense and "softmax" in overrides:
            assert model_args(settings).inner_attention == name
            continue
        with pytest.raises(ValueError, match=re.escape(message)) as refusal:
            model_args(settings)
        assert str(refusal.value).startswith(f"lighthouse.inner_attention={name!r}")
    for valid in ("auto", "flash"):  # what the messages name
        model_args(parse("debug.toml", "--lighthouse.inner_attention", valid, "--debug.deterministic"))
    for valid in ("cudnn", "flash"):
        model_args(parse("530m_cp.toml", "--lighthouse.inner_attention", valid))


def test_the_trainer_refuses_kernels_that_this_machine_does_not_have(monkeypatch):
    """Before anything is built. What only reads the settings does not."""
    settings = parse("debug.toml", "--lighthouse.inner_attention", "flash4")
    settings.job.dump_folder = "/nowhere"
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torchtitan.experiments.lighthouse.train.device_type", "cpu")
    with pytest.raises(Refused, match=r"^lighthouse\.inner_attention='flash4': needs a GPU, .* valid value: 'auto'$"):
        LighthouseTrainer(settings)
    build_model(settings)


def test_dense_runs_are_not_bound_by_the_geometry():
    args = model_args(parse("debug.toml", "--lighthouse.no-enable", "--training.seq_len", "1000"))
    assert args.lighthouse is None and args.lighthouse_layers == ()


def test_an_unknown_flavor_is_named():
    with pytest.raises(ValueError, match=r"model\.flavor='33m': must be one of '530m', .*'32m'"):
        model_args(parse("debug.toml", "--model.flavor", "33m"))


def test_a_missing_section_is_named():
    from torchtitan.config import JobConfig

    with pytest.raises(ValueError, match="custom_config_module"):
        lighthouse_args["debug"].update_from_config(JobConfig())


def test_flops_count_what_each_layer_attends():
    """MFU per layer: a Lighthouse layer pays S² / N per token where a dense one pays N."""

    def flops(*overrides):
        config = parse("530m_stage1.toml", *overrides)
        return model_args(config).get_nparams_and_flops(build_model(config), 98304)[1]

    dense, stage1 = flops("--lighthouse.no-enable"), flops()
    per_key = 6 * 8 * 256  # heads, and query-key plus value dimensions
    assert dense - stage1 == round(26 * per_key * (98304 - 18432**2 / 98304))
    assert flops("--lighthouse.layers", "5") - stage1 == round(25 * per_key * (98304 - 18432**2 / 98304))
    assert flops("--lighthouse.dense_every", "8") == pytest.approx(stage1 + (dense - stage1) / 8, rel=1e-9)
    dilated = flops("--lighthouse.scorer", "dilated")
    assert dilated - stage1 == 26 * 4 * 8 * 256 * 98304 // 4  # two forward passes over N/δ keys
    assert stage1 < flops("--lighthouse.scorer", "gla") < dilated < dense


def test_upstreams_own_entry_point_finds_everything_through_the_config(tmp_path):
    """What `-m torchtitan.train` does with the file before it needs a GPU; benchmarks/reports has such a run on one."""
    code = f"""
        import importlib, sys
        from torchtitan.config import ConfigManager
        from torchtitan.protocols.train_spec import get_train_spec
        config = ConfigManager().parse_args(["--job.config_file", {str(REPOSITORY / "train_configs/debug.toml")!r}])
        importlib.import_module(config.experimental.custom_import)
        assert get_train_spec(config.model.name).model_cls.__name__ == "LighthouseTransformer"
        assert config.lighthouse.enable
        assert "torchtitan.experiments.lighthouse.train" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)


def test_a_mixture_is_a_list_of_tables_in_a_file_and_json_on_the_command_line(tmp_path):
    """And comes unchanged through what the next stage is started with."""
    file = tmp_path / "run.toml"
    job = '[job]\ncustom_config_module = "torchtitan.experiments.lighthouse.job_config"\n'
    table = '[[training.mixture]]\ndataset_path = "{}"\nweight = {}\n'
    file.write_text(f'{job}[training]\ndataset = "mixture"\n{table.format("a", 0.5)}{table.format("b", 2)}')
    tables = [{"dataset_path": "a", "weight": 0.5}, {"dataset_path": "b", "weight": 2}]
    settings = parse(str(file))
    assert settings.training.mixture == tables and settings.training.dataset == "mixture"
    assert parse(str(file), "--training.mixture", json.dumps(tables[:1])).training.mixture == tables[:1]
    check_settings(settings)
    settings.training.held_out_share = 0.01
    saved = json.loads(json.dumps(asdict(settings)))
    again = next_stage.merge(next_stage.as_toml(saved), ["--training.steps=3"])
    assert again.training.mixture == tables and again.training.held_out_share == 0.01
    with pytest.raises(Refused, match=r"training\.held_out_share=0\.6: must be at least 0 and at most 0\.5; .*: 0\.5"):
        check_settings(parse(str(file), "--training.held_out_share=0.6"))
