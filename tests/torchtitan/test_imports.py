"""What an import, or a command's help, does not do: load the trainer, register models, wait for torch."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helpers.launch import REPOSITORY

PACKAGE = REPOSITORY / "torchtitan/experiments/lighthouse"
COMMANDS = [
    "resume_dense",
    "eval_niah",
    "export_hf",
    "report",
    "sweep",
    "evaluate",
    "check_causality",
    "look_back",
    "plan",
]

#: Modules that cannot do their work without the models: they build or train one, or list the flavors.
NEED_MODELS = {"train", "train_spec", "hugging_face", "runs.settings", "runs.contract"}
NEED_MODELS |= {"evaluation.needle", "evaluation.positions", "evaluation.subjects", "evaluation.causality"}
NEED_MODELS |= {"evaluation.look_back"}
NEED_MODELS |= {f"planning.{name}" for name in ("workload", "memory", "step", "choices", "draft", "measure", "tables")}


def modules() -> list[str]:
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    return [name.removesuffix("__init__").rstrip(".") for name in names]


@pytest.fixture(scope="module")
def imported() -> dict[str, dict]:
    """For every module of the package: what had been loaded and registered after importing it, each in a fork of a
    process that has imported nothing but upstream's own packages."""
    code = """
        import importlib, json, multiprocessing, sys
        import torchtitan.protocols.train_spec as specs

        def look(name):
            importlib.import_module("torchtitan.experiments.lighthouse" + (name and "." + name))
            return name, {"trainer": "torchtitan.train" in sys.modules, "models": list(specs._extra_train_specs)}

        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            print(json.dumps(dict(pool.map(look, json.loads(sys.argv[1]), chunksize=1))))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(modules())], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_only_what_needs_models_registers_them(imported):
    assert len(imported) > 20
    registered = {name for name, found in imported.items() if found["models"]}
    assert registered == NEED_MODELS & imported.keys()
    assert all(imported[name]["models"] == ["lighthouse"] for name in registered)


def test_only_the_trainer_loads_the_trainer(imported):
    found = {name for name, found in imported.items() if found["trainer"]}
    assert found == {"train", "seams.trainer", "seams.settings"}


def test_help_does_not_wait_for_torch():
    """Every command, from its script; all in one process, so that what one loads is seen at the next."""
    code = """
        import contextlib, io, runpy, sys
        for script in sys.argv[1:]:
            sys.argv = [script, "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name="__main__")
            assert "usage:" in printed.getvalue(), script
            for heavy in ("torch", "torchtitan", "matplotlib"):
                assert heavy not in sys.modules, f"{script} --help imports {heavy}"
    """
    scripts = [str(REPOSITORY / f"scripts/{name}.py") for name in COMMANDS]
    assert all(Path(script).is_file() for script in scripts)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), *scripts], check=True)


def test_public_names_are_found_where_they_were():
    import torchtitan.experiments.lighthouse as package

    for name in package.__all__:
        assert (
            getattr(package, name).__name__ == name if name != "lighthouse_args" else "debug" in package.lighthouse_args
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
