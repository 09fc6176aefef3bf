"""Every code block of the documentation does what it says.

A block is run exactly as it stands, in a process of its own. Where a command would install, download, or train for
hours, ``NOT_RUN`` says why, and its arguments are checked instead: the files exist, the options are those of the
command's own parser, the settings are the trainer's and fit together. A new block is run, unless a rule of that table
covers it.
"""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.experiments.lighthouse.job_config import check_degrees
from torchtitan.experiments.lighthouse.model.sizes import CUSTOM, FLAVORS
from torchtitan.hf_datasets.text_datasets import DATASETS

from helpers.settings import model_args

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PACKAGE = "torchtitan.experiments.lighthouse"

#: Languages of fenced blocks that are drawings or formulas.
NO_CODE = {"text", "math", "mermaid"}
#: A fence that does not name its language may hold a drawing, but no line like this.
LOOKS_LIKE_CODE = re.compile(
    r"^\s*(\$ |python |torchrun |make |pip |sbatch |hf |source |scripts/\w|import |from \w+ import )"
)
LIST_ITEM = re.compile(r"([-*+]|\d+[.)])\s")
FENCE = re.compile(r"\s*(```+|~~~+)\s*(\w*)")
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(document: str, text: str) -> Iterator[Block]:
    """Fenced blocks with their language, and indented ones, which are commands."""
    lines = [*text.splitlines(), ""]
    start, fence, language, in_list, blank_before = 0, "", "", False, True
    indented: list[str] = []
    for number, line in enumerate(lines, 1):
        found = FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2]:
                yield Block(document, start, language, "\n".join(lines[start : number - 1]) + "\n")
                fence = ""
            continue
        if line.startswith("    ") and not in_list and (blank_before or indented):
            if not indented:
                start = number
            indented.append(line[4:])
            continue
        if indented and line.strip():
            yield Block(document, start, "bash", "\n".join(indented).rstrip() + "\n")
            indented = []
        elif indented:
            indented.append("")
        if found:
            fence, language, start = found[1], found[2], number
        elif line.strip() and not line.startswith(" "):
            in_list = bool(LIST_ITEM.match(line))
        blank_before = not line.strip()
    if indented:
        yield Block(document, start, "bash", "\n".join(indented).rstrip() + "\n")
    assert not fence, f"{document}:{start}: a fence that does not end"


def all_blocks() -> list[Block]:
    return [
        block
        for path in DOCUMENTS
        for block in blocks_of(str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8"))
    ]


# Commands


def commands_of(text: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The words of each command; assignments are kept in ``variables``, and filled in."""
    unfinished = ""
    for line in text.splitlines():
        unfinished += line
        if unfinished.endswith("\\"):
            unfinished = unfinished[:-1]
            continue
        try:
            shlex.split(unfinished, comments=True)
        except ValueError:  # a quotation goes on in the next line
            unfinished += " "
            continue
        filled = re.sub(r"\$\{?(\w+)\}?", lambda found: variables[found[1]], unfinished)
        unfinished = ""
        lexer = shlex.shlex(filled, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in ("&&", ";"):
                words.append(word)
                continue
            while words and (found := re.fullmatch(r"(\w+)=(.*)", words[0])):
                variables[found[1]] = found[2]
                del words[0]
            if words:
                yield words
            words = []
    assert not unfinished, f"a command that does not end: {unfinished}"


@dataclass(frozen=True)
class Rule:
    reason: str
    covers: Callable[[list[str]], object]
    check: Callable[[list[str]], None]


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets), f"{shlex.join(words)}: the Makefile has {', '.join(targets)}"


def check_activation(words: list[str]) -> None:
    assert words == ["source", ".venv/bin/activate"], words
    assert "\nVENV := .venv\n" in (REPOSITORY / "Makefile").read_text()


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = [word for word in words[2:] if not word.startswith("-")]
    assert targets, words
    for target in targets:
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
        assert found, f"{target}: no folder with optional extras"
        assert set((found[1] or "").split(",")) <= {"", *extras}, f"{target}: the extras are {', '.join(extras)}"


def check_hf(words: list[str]) -> None:
    told = output_of([str(Path(sys.executable).with_name("hf")), *words[1:2], "--help"])
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", told), f"{shlex.join(words)}: no option {option}"


def check_slurm(words: list[str]) -> None:
    at = next(i for i, word in enumerate(words) if word.endswith(".slurm"))
    assert Path(words[at]).is_file(), words[at]
    options = argparse.ArgumentParser("sbatch")
    options.add_argument("--nodes", type=int, default=4)
    nodes = options.parse_args(words[1:at]).nodes
    program, arguments = words[at + 1], words[at + 2 :]
    if program.endswith(".toml"):
        check_settings(["--job.config_file", program, *arguments], nodes * GPUS_PER_NODE)
    else:
        check_python(["python", program, *arguments, "--torchrun", f"--nnodes {nodes}"])


def check_two_stage(words: list[str]) -> None:
    assert Path(words[0]).is_file() and len(words) > 2, words
    check_settings(["--job.config_file", words[1], "--job.dump_folder", words[2], *words[3:]])


def check_python(words: list[str]) -> None:
    """A Python program, with or without torchrun before it, as far as its arguments."""
    processes = None
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        processes = int(launch.nproc_per_node) * int(launch.nnodes.rpartition(":")[2])  # by default "1:1"
        words = [*(["-m"] if launch.module else []), launch.training_script, *launch.training_script_args]
    else:
        words = words[1:]
    if words[0] != "-m":
        program, arguments = Path(words[0]), words[1:]
    elif words[1] == "torchtitan.train":
        return check_settings(words[2:], processes)
    else:
        assert words[1].startswith(f"{PACKAGE}."), words[1]
        program, arguments = Path(words[1].replace(".", "/") + ".py"), words[2:]
    assert program.is_file(), program
    if program == Path(PACKAGE.replace(".", "/"), "train.py"):
        return check_settings(arguments, processes)
    if program.stem == "sweep":
        return run_here(program, ["show", *arguments[1:]])  # checks name and settings, and starts nothing
    if "--" in arguments:
        check_settings(["--job.config_file", "train_configs/debug.toml", *arguments[arguments.index("--") + 1 :]])
    with pytest.raises(Parsed):
        run_here(program, arguments, until_parsed=True)


def check_settings(arguments: list[str], processes: int | None = None) -> None:
    """The trainer's settings exist, parse, and fit together."""
    settings: JobConfig = ConfigManager().parse_args(arguments)
    assert settings.training.dataset in DATASETS, settings.training.dataset
    hf_config = getattr(settings.model, "hf_config", "")
    if hf_config and settings.model.flavor == CUSTOM:
        # A file of the reader's: whatever is in it.
        assert not Path(hf_config).exists(), hf_config
        settings.llama = settings.llama.over(FLAVORS["530m"])
    model_args(settings)  # refuses an invalid geometry
    if processes is not None:
        check_degrees(settings.parallelism, processes)


class Parsed(Exception):
    """Ends a program whose parser has accepted its arguments."""


def run_here(program: Path, arguments: list[str], until_parsed: bool = False) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **named) -> None:
        parse(*args, **named)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(program), *arguments])
        if until_parsed:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        runpy.run_path(str(program), run_name="__main__")


def program_of(words: list[str]) -> str:
    """``scripts/X.py`` and ``python -m …lighthouse.X`` are ``X``; other programs keep their path."""
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", *(["-m"] if launch.module else []), launch.training_script]
    if words[0] != "python":
        return words[0]
    name = words[2] if words[1] == "-m" else words[1]
    return re.sub(rf"{re.escape(PACKAGE)}\.|scripts/(\w+)\.py", lambda found: found[1] or "", name)


def needs_a_run(words: list[str]) -> bool:
    reads_runs = {"resume_dense", "report", "evaluate", "check_causality", "look_back", "eval_niah", "export_hf"}
    return program_of(words) in reads_runs


def check_exported(words: list[str]) -> None:
    """A program of others, on the folder that the document's last ``export_hf`` writes."""
    page = (REPOSITORY / "docs/your_own_run.md").read_text(encoding="utf-8")
    (folder,) = re.findall(r"export_hf\.py \S+ --output (\S+)", page)
    assert any(re.search(rf"(^|=){re.escape(folder)}(,|$)", word) for word in words), f"{shlex.join(words)}: {folder}?"


def planned(words: list[str]) -> str | None:
    """The settings that a training takes from a document's ``plan``."""
    files = {file for path in DOCUMENTS for file in re.findall(r"plan\.py .*--toml (\S+)", path.read_text("utf-8"))}
    return next((word for word in words if word in files), None) if program_of(words) == "train" else None


def check_planned(words: list[str]) -> None:
    check_python(["train_configs/debug.toml" if word == planned(words) else word for word in words])


#: What is not run, why, and how it is checked instead. ``--help`` is always run.
NOT_RUN = [
    Rule("installs, trains or runs the tests", lambda words: words[0] == "make", check_make),
    Rule("changes the shell that reads it", lambda words: words[0] == "source", check_activation),
    Rule("installs", lambda words: words[:2] == ["pip", "install"], check_pip),
    Rule("downloads 305 GB", lambda words: words[:2] == ["hf", "download"], check_hf),
    Rule("needs a cluster", lambda words: words[0] == "sbatch", check_slurm),
    Rule("trains", lambda words: words[0] == "scripts/train_two_stage.sh", check_two_stage),
    Rule("trains; tests/docs/test_your_own_run.py runs it", planned, check_planned),
    Rule("trains", lambda words: program_of(words) in {"train", "torchtitan.train"}, check_python),
    Rule("trains", lambda words: program_of(words) == "sweep" and {"run", "stage2"} & {*words}, check_python),
    Rule("reads a run that was trained before", needs_a_run, check_python),
    Rule(
        "is slow for its imports; tests/torchtitan/test_plan.py runs it",
        lambda words: program_of(words) == "plan",
        check_python,
    ),
    Rule("trains; tests/examples runs it", lambda words: program_of(words).startswith("examples/"), check_python),
    Rule("needs GPUs", lambda words: program_of(words).startswith("benchmarks/"), check_python),
    Rule("trains for hours", lambda words: program_of(words).startswith("studies/"), check_python),
    Rule("is not installed here", lambda words: words[0] in {"lm_eval", "vllm"}, check_exported),
]


def check_command(words: list[str]) -> None:
    for rule in [] if "--help" in words else NOT_RUN:
        if rule.covers(words):
            return rule.check(words)
    output_of(words)


def output_of(words: list[str], folder: Path = REPOSITORY) -> str:
    return _output_of(tuple(words), folder)


@cache
def _output_of(words: tuple[str, ...], folder: Path) -> str:
    # TRITON_INTERPRET belongs to this test session, not to a reader.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        words, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, f"{shlex.join(words)}\n{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
    return process.stdout


# Blocks


def check_block(block: Block, variables: dict[str, str], scratch: Path) -> None:
    if block.language == "bash":
        for words in commands_of(block.text, variables):
            check_command(words)
    elif block.language == "python":
        output_of([sys.executable, "-c", block.text], scratch)
    elif block.language == "toml":
        file = scratch / "block.toml"
        file.write_text(block.text, encoding="utf-8")
        ConfigManager().parse_args(["--job.config_file", str(file), f"--job.custom_config_module={PACKAGE}.job_config"])
    elif block.language == "":
        assert not any(LOOKS_LIKE_CODE.match(line) for line in block.text.splitlines()), (
            f"{block.name}: name the language of this block"
        )
    else:
        assert block.language in NO_CODE, f"{block.name}: {block.language}: must be bash, python, toml or of {NO_CODE}"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: block.name)
def test_block(block, tmp_path):
    if "transformers" in block.text and block.language == "python":
        pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")
    variables: dict[str, str] = {}
    for earlier in all_blocks():  # a document sets a variable once and uses it later on
        if earlier.document == block.document and earlier.line < block.line and earlier.language == "bash":
            list(commands_of(earlier.text, variables))
    check_block(block, variables, tmp_path)


def test_blocks_are_found():
    text = 'a\n\n    one \\\n      two   # comment\n    X="a\n       b"\n\n    three $X\n\n- item\n\n    no code\n\nb\n'
    text += "\n    four && five\n\n```python\nsix\n```\n"
    found = list(blocks_of("name", text))
    assert [(block.line, block.language) for block in found] == [(3, "bash"), (16, "bash"), (18, "python")]
    variables: dict[str, str] = {}
    assert [words for block in found[:2] for words in commands_of(block.text, variables)] == [
        ["one", "two"],
        ["three", "a", "b"],
        ["four"],
        ["five"],
    ]
    assert found[2].text == "six\n"


TRAIN = f"torchrun --standalone --nproc_per_node 8 -m {PACKAGE}.train --job.config_file "
BROKEN = {
    "a target": "make no_such_target",
    "an extra": 'pip install -e ".[no_such_extra]"',
    "torchrun's option": TRAIN.replace("--standalone", "--no_such_option") + "train_configs/debug.toml",
    "a config": TRAIN + "train_configs/no_such.toml",
    "a setting": TRAIN + "train_configs/debug.toml --lighthouse.no_such 1",
    "a value": TRAIN + "train_configs/debug.toml --lighthouse.top_k many",
    "a geometry": TRAIN + "train_configs/debug.toml --lighthouse.top_k 129",
    "a dataset": TRAIN + "train_configs/debug.toml --training.dataset no_such",
    "a degree": TRAIN + "train_configs/debug.toml --parallelism.data_parallel_replicate_degree 3",
    "a run of the sweep": "python scripts/sweep.py run no_such",
    "a setting of the sweep": "python scripts/sweep.py run dense -- --training.no_such 1",
    "a script": "python scripts/no_such.py",
    "an option": "python scripts/report.py RUN --no-such-option",
    "a missing argument": f"python -m {PACKAGE}.resume_dense",
    "an override": "python scripts/resume_dense.py RUN -- --no.such 1",
    "a study's arm": "python studies/recoverability.py run --arms no_such",
    "a benchmark's run": "python benchmarks/bench_train.py --runs no_such",
    "a job": "sbatch scripts/no_such.slurm train_configs/debug.toml",
    "a program": "no_such_program",
    "a variable": "python scripts/report.py $NO_SUCH",
}


@pytest.mark.parametrize("command", BROKEN.values(), ids=BROKEN)
def test_a_broken_command_fails(command, tmp_path):
    with pytest.raises((Exception, SystemExit)) as failure:
        check_block(Block("name", 1, "bash", command), {}, tmp_path)
    assert not (isinstance(failure.value, SystemExit) and failure.value.code in (None, 0))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "import lighthouse\nlighthouse.no_such"),
        ("toml", "[lighthouse]\nno_such = 1"),
        ("", "make demo"),
        ("c", ""),
    ],
)
def test_a_broken_block_fails(language, text, tmp_path):
    with pytest.raises((AssertionError, TypeError, ValueError)):
        check_block(Block("name", 1, language, text), {}, tmp_path)
