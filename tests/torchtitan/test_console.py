"""What a run says of itself, and which log lines reach its console."""

import ast
import logging
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torchtitan
from torchtitan.experiments.lighthouse import console, export_hf, resume_dense
from torchtitan.experiments.lighthouse.seams import console as seam
from torchtitan.tools.logging import logger

from helpers.settings import parse

UPSTREAM = Path(torchtitan.__file__).parent
OURS = Path(console.__file__)


def shown(filter_, path: Path, function: str, level: int = logging.INFO, text: str = "text", **extra) -> bool:
    record = logging.LogRecord("root", level, str(path), 1, text, None, None, func=function)
    record.__dict__.update(extra)
    return filter_.filter(record)


def test_lines_for_the_user_pass_on_the_first_rank_alone():
    metrics, libraries = UPSTREAM / "components/metrics.py", UPSTREAM.parent / "httpx/_client.py"
    first, other = seam.Essentials(0), seam.Essentials(1)
    for path, function, passes in [
        (metrics, "log", True), (metrics, "build_device_memory_monitor", False), (libraries, "log", False),
        (UPSTREAM / "train.py", "train", False), (UPSTREAM / "tools/utils.py", "collect", False),
        (OURS.parent / "train.py", "log_start", True), (OURS, "log", True),
    ]:  # fmt: skip
        assert (shown(first, path, function), shown(other, path, function)) == (passes, False), (path, function)
    assert not shown(first, OURS, "log", **seam.DETAIL)
    # The losses of a pipeline are on its last stage.
    assert not shown(first, metrics, "log", here=False) and shown(other, metrics, "log", here=True)


def test_no_warning_is_hidden():
    """But for its copies, where upstream says the same on every rank or twice, and one that is not true here."""
    flops = UPSTREAM / "tools/utils.py", "get_peak_flops", logging.WARNING
    first, other = seam.Essentials(0), seam.Essentials(1)
    for path, level in [(UPSTREAM / "train.py", logging.WARNING), (Path("any.py"), logging.ERROR), (OURS, 50)]:
        for _ in range(2):
            assert shown(first, path, "any", level) and shown(other, path, "any", level, **seam.DETAIL, here=False)
    assert [shown(first, *flops), shown(first, *flops), shown(first, *flops, "other text")] == [True, False, True]
    assert not shown(other, *flops)
    assert not shown(first, UPSTREAM / "components/validate.py", "__init__", logging.WARNING)
    assert shown(first, OURS.with_name("validate.py"), "__init__", logging.WARNING)


def test_the_functions_that_are_named_are_upstreams():
    folders = ("components", "tools", "distributed", "protocols")
    files = [path for folder in folders for path in (UPSTREAM / folder).glob("*.py")]
    logging_functions = {
        (path.stem, node.name)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "logger." in ast.unparse(node)
    }
    assert logging_functions >= seam._FOR_USERS | seam._WARNED_BY_ALL | seam._NOT_SO


@pytest.mark.parametrize("debug", [False, True])
def test_all_lines_are_there_in_debug_mode(debug, monkeypatch, capsys):
    handlers, level = logger.handlers[:], logger.level
    monkeypatch.setenv("LIGHTHOUSE_DEBUG", "1") if debug else monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    monkeypatch.setenv("RANK", "3")
    try:
        seam.quiet_logger()
        logger.info("of a library")
        logger.warning("look")
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
    lines = capsys.readouterr().out.splitlines()
    if debug:
        assert [line.partition(" - root - ")[2] for line in lines] == ["INFO - of a library", "WARNING - look"]
    else:
        (line,) = lines
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING of rank 3: look", line)


@pytest.mark.parametrize(("rank", "seen"), [("0", 1), ("1", 0)])
def test_a_warning_of_python_is_shown_once(rank, seen, monkeypatch):
    handlers = logger.handlers[:]
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        try:
            seam.quiet_logger()
        finally:
            logger.handlers[:] = handlers
        warnings.warn("every rank gives it", stacklevel=1)
    assert len(shown) == seen


RECORDS = [
    {"step": 70, "loss": 2.5, "wall_clock_s": 3000.0},
    {"step": 75, "validation_loss": 2.25, "bits_per_byte": 1.125, "wall_clock_s": 7500.0},
]


def ending(*overrides: str) -> list[str]:
    return console.completion_lines(parse("debug.toml", "--job.dump_folder", "runs/a b", *overrides), RECORDS, 307_200)


def test_a_complete_run_names_its_figures():
    complete, checkpoint, _ = ending()
    assert complete == (
        "Stage 1 is complete: 75 of 75 steps; 307,200 tokens; 2 h 05 min in this stage; loss 2.5000 (step 70); held "
        "out 2.2500 nats per token, 1.1250 bits per byte"
    )
    assert checkpoint == "Checkpoint: runs/a b/checkpoint/step-75"
    assert len(ending("--checkpoint.no-enable")) == 1


def test_the_next_command_is_one_that_can_be_given():
    def words(*overrides: str) -> tuple[str, list[str]]:
        introduction, _, command = ending(*overrides)[2].partition(": ")
        _, flag, module, *arguments = shlex.split(command)
        assert flag == "-m"
        return f"{introduction}, {module.rpartition('.')[2]}", arguments

    assert words()[0] == "Next, Stage 2 (its 50 steps), resume_dense"
    options, _ = resume_dense._parse(words()[1])
    assert options.before == Path("runs/a b") and options.total_steps is None
    # Nothing is left of the schedule.
    what, arguments = words("--lr_scheduler.total_steps", "75")
    assert "more than 75" in what and arguments[1:] == ["--total-steps", "STEPS"]
    what, arguments = words("--lighthouse.no-enable", "--lighthouse.stage", "2", "--lr_scheduler.total_steps", "75")
    assert what == "Next, to Hugging Face, export_hf" and export_hf._parse(arguments).checkpoint == Path("runs/a b")
    # Weights alone cannot be continued.
    assert len(ending("--checkpoint.last_save_model_only")) == 2
