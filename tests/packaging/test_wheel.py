"""The wheel, installed where nothing else is importable but what it declares.

Downloading torch for this would take minutes. The environment is an empty one, into which the declared requirements and
theirs, and only those, are linked from the environment that runs the tests.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from collections import defaultdict
from importlib.metadata import Distribution, PathDistribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = "lighthouse-attention"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, which leaves nothing behind here, and without torch, which an isolated build does not have."""
    folder = tmp_path_factory.mktemp("wheel")
    litter = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "wandb")
    shutil.copytree(REPOSITORY, folder / "source", ignore=litter)
    no_torch = folder / "no_torch" / "torch.py"
    no_torch.parent.mkdir()
    no_torch.write_text("raise ImportError('the build imports torch')")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."],
        cwd=folder / "source",
        env={**os.environ, "PYTHONPATH": str(no_torch.parent)},
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory) -> Path:
    return install(wheel, (), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def train(wheel, tmp_path_factory) -> Path:
    return install(wheel, ("train",), tmp_path_factory.mktemp("train"))


def install(wheel: Path, extras: tuple[str, ...], folder: Path) -> Path:
    """``pip install WHEEL[EXTRAS]`` into a new environment, with links in place of downloads."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (ours,) = (PathDistribution(path) for path in site.glob("*.dist-info"))
    installed = {canonicalize_name(x.metadata["Name"]): x for x in distributions()}
    link(required(ours, extras, installed), {**installed, OURS: ours}, site)
    return folder


def required(ours: Distribution, extras: tuple[str, ...], installed: dict[str, Distribution]) -> set[str]:
    """What ``ours`` requires here, and what that requires."""

    def direct(distribution, extras):
        requirements = map(Requirement, distribution.requires or [])
        return [x for x in requirements if not x.marker or any(x.marker.evaluate({"extra": e}) for e in ("", *extras))]

    found, left = set(), direct(ours, extras)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) not in found:
            found.add((name, *sorted(requirement.extras)))
            left += direct(installed[name], requirement.extras)
    return {name for name, *_ in found}


def link(names: set[str], installed: dict[str, Distribution], site: Path) -> None:
    """Link the files of ``names``: whole folders where one distribution owns all that is in it, single files in those
    that several share, as torchtitan's with ours or a namespace's."""
    owners = defaultdict(set)
    paths = {}
    for name, distribution in installed.items():
        paths[name] = [Path(file).parts for file in distribution.files or [] if file.parts[0] != ".."]
        for parts in paths[name]:
            for depth in range(1, len(parts) + 1):
                owners[parts[:depth]].add(name)
    for name in names:
        heads = ([parts[:depth] for depth in range(1, len(parts) + 1)] for parts in paths[name])
        roots = {next((head for head in chain if len(owners[head]) == 1), chain[-1]) for chain in heads}
        for parts in roots:
            target = Path(installed[name].locate_file(Path(*parts)))
            if target.exists():
                site.joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
                site.joinpath(*parts).symlink_to(target)


def run(environment: Path, *arguments: str) -> str:
    """Its interpreter on arguments, isolated from the checkout and from the variables of Python and of the tests."""
    process = subprocess.run(
        [environment / "bin" / "python", "-I", *arguments],
        cwd=environment,
        env={name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_code(environment: Path, code: str) -> str:
    return run(environment, "-c", textwrap.dedent(code))


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    def sources(package):
        return {
            str(path.relative_to(REPOSITORY))
            for path in (REPOSITORY / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources("lighthouse") | sources("torchtitan")
    assert "lighthouse/py.typed" in names
    assert sum("/byte_tokenizer/" in name for name in names) == 2


def test_importing_lighthouse_imports_torch_and_nothing_else(base):
    """No top-level module but those of the standard library and what ``import torch`` itself brings along."""
    code = """
        import sys, torch
        before = {name.partition(".")[0] for name in sys.modules}
        import lighthouse
        after = {name.partition(".")[0] for name in sys.modules}
        print(*after - before - sys.stdlib_module_names)
    """
    assert run_code(base, code).split() == ["lighthouse"]


def test_attention_runs_forward_and_backward_on_the_base_install(base):
    code = """
        import importlib.metadata, json, sys
        import lighthouse, torch
        assert lighthouse.__file__.startswith(sys.prefix), lighthouse.__file__
        assert lighthouse.__version__ == importlib.metadata.version("lighthouse-attention")
        config = lighthouse.LighthouseConfig(num_levels=3, pooling_factor=2, top_k=128)
        query, key, value = (torch.randn(1, heads, 1024, 8, requires_grad=True) for heads in (4, 2, 2))
        output = lighthouse.lighthouse_attention(query, key, value, config)
        output.square().sum().backward()
        assert output.shape == query.shape and output.isfinite().all() and output.any()
        for x in (query, key, value):
            assert x.grad.shape == x.shape and x.grad.isfinite().all() and x.grad.any()
        print(json.dumps([x.metadata["Name"] for x in importlib.metadata.distributions()]))
    """
    importable = {canonicalize_name(name) for name in json.loads(run_code(base, code))}
    assert {OURS, "torch"} <= importable
    assert not importable & {"numpy", "torchtitan", "transformers", "wandb", "pytest"}


@pytest.mark.parametrize("command", ["resume_dense", "eval_niah", "export_hf", "report", "sweep"])
def test_the_trainers_commands_run_on_the_train_extra(command, train):
    assert "usage:" in run(train, "-m", f"torchtitan.experiments.lighthouse.{command}", "--help")
