"""Settings are checked as a whole before anything starts; what is refused is one line."""

import re
from dataclasses import replace

import pytest
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse.errors import Refused, exit_on_refusal
from torchtitan.experiments.lighthouse.seams.settings import CheckedConfigManager
from torchtitan.experiments.lighthouse.settings_rules import RANGES, _settings_of, check_settings
from torchtitan.experiments.lighthouse.train import check_tokenizer

from helpers.launch import CONFIG, command, run
from helpers.settings import parse


def refused(*settings: str) -> str:
    with pytest.raises(Refused) as error:
        check_settings(parse("debug.toml", *settings))
    return str(error.value)


@pytest.mark.parametrize(
    ("setting", "rule", "nearest"),
    [
        ("checkpoint.interval=0", "at least 1", "1"),
        ("metrics.log_freq=0", "at least 1", "1"),
        ("validation.freq=0", "at least 1", "1"),
        ("training.steps=0", "at least 1", "1"),
        ("training.steps=-5", "at least 1", "1"),
        ("training.max_norm=-1", "more than 0", "1.0"),
        ("training.global_batch_size=0", "at least 1, or -1", "1"),
        ("lr_scheduler.warmup_steps=-3", "at least 0", "0"),
        ("lr_scheduler.decay_ratio=2", "at least 0 and at most 1", "1"),
        ("optimizer.lr=0", "more than 0", "0.0008"),
        ("optimizer.beta2=1.0", "at least 0 and at most 0.9999", "0.9999"),
        ("checkpoint.load_step=-2", "at least 0, or -1", "0"),
        ("debug.seed=-1", "at least 0", "0"),
        ("comm.train_timeout_seconds=0", "at least 1", "1"),
    ],
)
def test_numbers_out_of_range(setting, rule, nearest):
    name, value = setting.split("=")
    message = refused(f"--{setting}")
    assert re.fullmatch(rf"{re.escape(name)}=[-.\d]+: must be {re.escape(rule)}; nearest valid value: (.+)", message)
    assert message.endswith(f": {nearest}") and float(re.search(r"=([-.\d]+):", message)[1]) == float(value)
    check_settings(parse("debug.toml", f"--{name}={nearest}", "--lr_scheduler.total_steps=1000"))


def test_a_schedule_shorter_than_its_run():
    message = refused("--training.steps=75", "--lr_scheduler.total_steps=5")
    assert "lr_scheduler.total_steps=5" in message and "nearest valid value: 75" in message


@pytest.mark.parametrize("words", [("--compile.no-enable",), ("--compile.enable", "--compile.components", "loss")])
def test_a_memory_budget_is_the_compilers(words):
    message = refused("--activation_checkpoint.mode=memory_budget", *words)
    assert "mode='memory_budget'" in message and "nearest valid value: 'selective'" in message
    check_settings(parse("debug.toml", "--activation_checkpoint.mode=memory_budget", "--compile.enable"))


@pytest.mark.parametrize(
    ("line", "changed", "rule"),
    [
        ("enable = true\nlayers", 'enable = "false"\nlayers', "lighthouse.enable='false': must be true or false"),
        ("log_freq = 1\n", 'log_freq = "1"\n', "metrics.log_freq='1': must be a whole number"),
        ("interval = 25", "interval = 25.5", "checkpoint.interval=25.5: must be a whole number"),
        ("max_norm = 1.0", "max_norm = nan", "training.max_norm=nan: must be a number"),
        ('mode = "none"', 'mode = "some"', "activation_checkpoint.mode='some': must be one of 'selective', 'full'"),
    ],
)  # fmt: skip
def test_types_of_the_file(line, changed, rule, tmp_path, recwarn):
    """Upstream takes what TOML holds: the text "false" turned Lighthouse on."""
    file, text = tmp_path / "run.toml", CONFIG.read_text()
    assert text.count(line) == 1
    file.write_text(text.replace(line, changed))
    with pytest.raises(Refused, match=re.escape(rule)):
        check_settings(ConfigManager().parse_args(["--job.config_file", str(file)]))


def test_every_number_that_training_reads_has_a_range():
    """But those of parts that are not used here, and those that others check with a rule of their own."""
    others = ("parallelism.", "quantize.", "fault_tolerance.", "lighthouse.", "llama.", "profiling.profiler_")
    numbers = {
        name for name, _, kind, _ in _settings_of(parse("debug.toml"))
        if ("int" in str(kind) or "float" in str(kind)) and "Literal" not in str(kind)
    }  # fmt: skip
    assert RANGES.keys() <= numbers
    assert {name for name in numbers - RANGES.keys() if not name.startswith(others)} == set()


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (None, "must name a module with the sections .*lighthouse"),
        ("nowhere.at_all", r"cannot be used \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("json", r"cannot be used .*'json' has no attribute 'JobConfig'\)"),
        ("torchtitan.config", "must name a module with the sections llama, lighthouse"),
    ],
)
def test_the_module_of_the_settings_is_named(module, why):
    nearest = "nearest valid value: 'torchtitan.experiments.lighthouse.job_config'"
    with pytest.raises(Refused, match=rf"^job\.custom_config_module {why}; {nearest}$"):
        CheckedConfigManager().parse_args([f"--job.custom_config_module={module}"] if module else [])


def test_a_vocabulary_smaller_than_the_tokenizer(monkeypatch):
    config = parse("debug.toml")
    check_tokenizer(config)
    monkeypatch.setattr(
        "torchtitan.experiments.lighthouse.train.model_arguments",
        lambda settings: replace(model_arguments(settings), vocab_size=250),
    )
    from torchtitan.experiments.lighthouse.runs.settings import model_arguments

    with pytest.raises(Refused, match=r"tokenizer has 258 tokens, but the model, 'debug', has rows for 250 only"):
        check_tokenizer(config)
    config.model.hf_assets_path = "/nowhere"
    with pytest.raises(Refused, match=r"hf_assets_path='/nowhere'"):
        check_tokenizer(config)


def test_a_refusal_is_one_line_of_one_rank(tmp_path):
    """No traceback of ours, nothing written, status 2; torchrun adds its own list of failed processes."""
    result = run(command(tmp_path / "run", 2, metrics__log_freq="0"), check=False)
    said = [line for line in result.stderr.splitlines() if "metrics.log_freq" in line]
    assert said == ["train: metrics.log_freq=0: must be at least 1; nearest valid value: 1"]
    assert "settings_rules.py" not in result.stderr and not (tmp_path / "run").exists()
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", result.stderr)


def test_the_traceback_comes_back_on_request(monkeypatch, capsys):
    def refuse():
        with exit_on_refusal("train"):
            raise Refused("no")

    with pytest.raises(SystemExit) as stop:
        refuse()
    assert stop.value.code == 2 and capsys.readouterr().err == "train: no\n"
    monkeypatch.setenv("LIGHTHOUSE_DEBUG", "1")
    with pytest.raises(Refused):
        refuse()
