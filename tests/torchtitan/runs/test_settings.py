"""A run's settings as the commands read them: modules of the user's own. No trainer is started."""

import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse import (
    LighthouseModelArgs,
    LighthouseTransformer,
    check_causality,
    eval_niah,
    evaluate,
    lighthouse_args,
    resume_dense,
)
from torchtitan.experiments.lighthouse.errors import REFUSED, Refused
from torchtitan.experiments.lighthouse.runs import manifest
from torchtitan.experiments.lighthouse.runs.checkpoints import settings_of
from torchtitan.experiments.lighthouse.runs.settings import complete, model_arguments, read_settings

from helpers.launch import SMALL, flags
from helpers.settings import parse

MODULE = """
from torchtitan.experiments.lighthouse import LighthouseModelArgs, lighthouse_args
lighthouse_args["mine"] = LighthouseModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=320)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of a flavor that a module in the current folder adds; nothing has imported that module."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    settings = parse(
        "debug.toml", *flags(SMALL), "--model.flavor=mine", "--lighthouse.layers=1", "--training.seq_len=512",
        "--experimental.custom_import=my_models", f"--job.dump_folder={tmp_path}/run",
    )  # fmt: skip
    args = LighthouseModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=320)
    torch.manual_seed(0)
    with torch.no_grad():
        model = LighthouseTransformer(args)
        model.init_weights()
    state = model.state_dict() | {
        f"{part}.x": torch.zeros(1) for part in ("optimizer", "lr_scheduler", "dataloader", "train_state")
    }
    dcp.save(state, checkpoint_id=tmp_path / "run/checkpoint/step-4", no_dist=True)
    (tmp_path / "run/config.json").write_text(json.dumps(asdict(settings)))
    yield tmp_path / "run"
    lighthouse_args.pop("mine", None)
    sys.modules.pop("my_models", None)


def test_a_command_imports_what_the_run_named(run, capsys):
    args = model_arguments(read_settings(run / "checkpoint/step-4"))
    assert (args.dim, args.n_layers, args.n_kv_heads) == (48, 3, 2)
    check_causality.main([str(run), "--dense", "--positions", "2", "--tries", "1"])
    assert "Causal" in capsys.readouterr().out


def test_so_does_the_trainer_and_its_settings_hold_the_sizes(run):
    settings = parse("debug.toml", *flags(SMALL), "--model.flavor=mine", "--experimental.custom_import=my_models")
    assert (complete(settings).llama.dim, settings.llama.n_layers) == (48, 3)


def commands() -> dict:
    found = {"evaluate": evaluate, "check_causality": check_causality, "eval_niah": eval_niah}
    return found | {"resume_dense": resume_dense}


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_it_cannot_import(command, run, capsys):
    (run.parent / "my_models.py").unlink()
    with pytest.raises(SystemExit) as stop:
        commands()[command].main([str(run)])
    assert stop.value.code == REFUSED
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"{command}: experimental.custom_import='my_models' in {run}/"), said
    assert "cannot be imported (ModuleNotFoundError: No module named 'my_models'); start where" in said


def test_a_module_that_fails_is_named_with_its_error(run):
    (run.parent / "my_models.py").write_text("1 / 0")
    settings = copy.copy(parse("debug.toml"))
    settings.experimental = replace(settings.experimental, custom_import="my_models")
    with pytest.raises(Refused, match=r"^experimental.custom_import='my_models' in the settings .*\(ZeroDivisionError"):
        complete(settings)


def test_a_checkpoints_own_settings_count_and_the_runs_where_it_has_none_or_its_files_have_moved(run, tmp_path):
    """The run's file is of its last start, and the checkpoint may be of an earlier one."""
    checkpoint, now = run / "checkpoint/step-4", json.loads((run / "config.json").read_text())
    assert settings_of(checkpoint) == now
    manifest.write(checkpoint, {}, {"settings": {}, "versions": {}, "fingerprints": {}}, step=4, last_of_stage=True)
    assert settings_of(checkpoint) == now  # imported weights
    before = copy.deepcopy(now)
    before["lighthouse"]["top_k"] = 384
    before["model"]["hf_assets_path"] = str(tmp_path / "where/it/was")
    about = {"settings": before, "versions": {}, "fingerprints": {}}
    manifest.write(checkpoint, {}, about, step=4, last_of_stage=True)
    settings = read_settings(checkpoint)
    assert settings.lighthouse.top_k == 384 != now["lighthouse"]["top_k"]
    assert settings.model.hf_assets_path == now["model"]["hf_assets_path"]
    (run / "config.json").unlink()
    assert read_settings(checkpoint).model.hf_assets_path == before["model"]["hf_assets_path"]
    assert settings_of(checkpoint)["lighthouse"]["top_k"] == 384
    (checkpoint / manifest.MANIFEST_FILE).unlink()
    with pytest.raises(Refused, match=r"config\.json is missing"):
        settings_of(checkpoint)
