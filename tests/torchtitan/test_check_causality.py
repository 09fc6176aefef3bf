import json
import re
import sys
from dataclasses import asdict

import pytest
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse import check_causality

from helpers.launch import REPOSITORY, run
from helpers.model import build

SCRIPT = REPOSITORY / "scripts/check_causality.py"
QUICK = ["--positions", "5", "--tries", "1"]


def save_run(folder, *overrides):
    """What a run leaves that has not trained: its settings, and a checkpoint of its first weights."""
    model, config = build(*overrides)
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint/step-1", no_dist=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "published")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "dense", "--lighthouse.no-enable")


def check(*words):
    """The exit status."""
    try:
        check_causality.main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def test_a_published_run_fails_and_says_where(published, tmp_path):
    file = tmp_path / "new/causality.json"
    words = [sys.executable, str(SCRIPT), str(published), *QUICK, "--output", str(file)]
    process = run(words, check=False)
    report = json.loads(file.read_text())
    assert process.returncode == 1, process.stderr
    assert "\nNot causal: at 5 of 5 t" in process.stdout
    assert report["causal"] is report["exact"] is False and report["attention"] == "Lighthouse, published"
    assert report["lighthouse"]["top_k"] == 128 and report["largest"] > 100 * report["rounding"]
    for position in report["positions"]:
        assert position["verdict"] == "NOT CAUSAL" and f"| {position['t']:,} | {position['where']} |" in process.stdout


@pytest.mark.parametrize(("window", "combine"), [(0, "sum"), (128, "softmax")])
def test_a_causal_run_passes(window, combine, tmp_path, capsys):
    """Two tiles: one of the positions is the last before the border, one the first after it."""
    settings = ["--training.seq_len=2048", "--lighthouse.top_k=256", "--lighthouse.selection=causal"]
    settings += [f"--lighthouse.local_window={window}", f"--lighthouse.combine={combine}"]
    folder = save_run(tmp_path / "causal", *settings)
    assert check(folder, *QUICK, "--output", tmp_path / "causality.json") == 0
    report = json.loads((tmp_path / "causality.json").read_text())
    assert report["exact"] and {1023, 1024, 1025} < {position["t"] for position in report["positions"]}
    attention = "Lighthouse, causal" + (", window 128, softmax" if window else "")
    assert report["attention"] == attention and f"| {attention} | 1,024 | on the border of a tile | 0 |" in (
        capsys.readouterr().out
    )


def test_a_dense_run_passes(dense, capsys):
    assert check(dense, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "step-1, dense, 1,024 tokens: random tokens, seed 0" in printed
    assert "Causal, exactly: at 5 of 5 t" in printed and printed.count("| exact |") == 5


def test_the_weights_of_a_published_run_pass_in_dense_attention(published, tmp_path):
    file = tmp_path / "causality.json"
    assert check(published / "checkpoint/step-1", *QUICK, "--dense", "--output", file) == 0
    report = json.loads(file.read_text())
    assert report["exact"] and report["attention"] == "dense" and report["lighthouse"] is None


def test_text_and_length(published, dense, capsys):
    assert check(published, *QUICK, "--text") == 1
    assert "step-1, Lighthouse, published, 1,024 tokens: stdlib_validation" in capsys.readouterr().out
    assert check(dense, *QUICK, "--seq-len", "50") == 0
    assert "dense, 50 tokens" in capsys.readouterr().out


def test_the_seed_chooses_positions_and_tokens(dense, tmp_path):
    reports = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        check(dense, *QUICK, "--seed", seed, "--output", tmp_path / name)
        reports.append(json.loads((tmp_path / name).read_text()))
    assert reports[0]["positions"] == reports[1]["positions"] != reports[2]["positions"]
    assert reports[0]["rounding"] == reports[1]["rounding"] != reports[2]["rounding"]  # other tokens, other logits


def test_refusals_have_an_exit_status_of_their_own(published, tmp_path, capsys):
    for words, message in (
        ([tmp_path / "absent"], "no such folder"),
        ([published, "--positions", 0], "--positions 0: must be at least 1; nearest valid value: 1"),
        ([published, "--tries", -1], "--tries -1: must be at least 1; nearest valid value: 1"),
        ([published, "--seq-len", 1], "--seq-len 1: must be at least 2; nearest valid value: 2"),
        ([published, "--seq-len", 1022], "--seq-len 1022: .*nearest valid values .*1024"),
        ([published, "--text", "--tries", 10**6], "--text: stdlib_validation holds .* and needed are 1,000,001"),
    ):
        assert check(*words) == 2
        printed = capsys.readouterr()
        line = printed.err.splitlines()[-1]
        assert line.startswith("check_causality: ") and re.search(message, line), line
