"""The paper's runs by name."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.lighthouse import sweep
from torchtitan.experiments.lighthouse.runs.settings import build_model

from helpers.launch import config_of, losses, run_here, run_ranks

#: Selected rows as the paper's table prints them.
PUBLISHED_ROWS = {
    "l3-p4-k1536-norm": 18432, "l3-p4-k2048-norm": 22528, "l3-p4-k1536-dilated": 18432, "l3-p4-k2048-dilated": 22528,
    "l3-p2-k1536-dilated": 30720, "l3-p8-k1536-dilated": 26112, "l3-p2-k2048-dilated": 32768,
    "l3-p2-k3072-dilated": 36864, "l3-p2-k4096-dilated": 40960, "l3-p2-k6144-dilated": 49152,
    "l4-p2-k1536-dilated": 21504, "l4-p2-k2048-dilated": 24576, "l5-p2-k1536-dilated": 18432,
    "l5-p2-k2048-dilated": 22528,
}  # fmt: skip


@pytest.mark.parametrize("name", sweep.RUNS)
def test_every_run_builds_with_the_published_geometry(name):
    settings = sweep.settings_of(sweep.RUNS[name])
    model = build_model(settings)
    assert sum(p.numel() for p in model.parameters()) == 530_117_632
    assert settings.lr_scheduler.total_steps == 16_000 and settings.checkpoint.enable
    if name in PUBLISHED_ROWS:
        config = settings.lighthouse.attention_config()
        assert config.selected_length(settings.training.seq_len) == PUBLISHED_ROWS[name]
    routed = [layer for layer in model.layers.values() if layer.attention.lighthouse is not None]
    assert len(routed) == {"dense": 0, "l4-p4-k4096-norm-1m-cp8": 30}.get(name, 26)


def test_runs_of_every_kind_start_at_their_full_size(tmp_path):
    """Up to their first step, FSDP and context parallelism included: of each settings file and scorer the first and
    the last. (Others of a kind differ in numbers only, which the test above has checked.)"""
    kinds: dict[tuple[str, bool], list[str]] = {}
    for name, run in sweep.RUNS.items():
        kinds.setdefault((run.config, "dilated" in name), []).append(name)
    names = {name for of_kind in kinds.values() for name in (of_kind[0], of_kind[-1])}
    started = run_ranks(Path(__file__).with_name("dry_runs.py"), 1, str(tmp_path), *sorted(names)).stdout
    assert names <= set(started.splitlines()) and len(kinds) == 6


def test_splits_share_one_schedule():
    splits = {name[-4:]: run for name, run in sweep.RUNS.items() if name.endswith(("10k6k", "11k5k", "12k4k"))}
    assert {name: run.stage1_steps for name, run in splits.items()} == {"0k6k": 10_000, "1k5k": 11_000, "2k4k": 12_000}


def test_list_and_show(tmp_path, capsys):
    sweep.main(["list", "--outputs", str(tmp_path)])
    listed, explanation = capsys.readouterr().out.split("\n\n")
    lines = listed.splitlines()
    assert len(lines) == 1 + len(sweep.RUNS) and "not started" in lines[1]
    assert "S pooled queries, keys and values, its rows" in explanation and "8 × NVIDIA H200" in explanation
    assert "1m-cp8 on 32" in explanation, "one run needs more GPUs than the others"
    # Its Stage 2 is too large for them: each GPU would keep the keys and values of all of a million tokens.
    assert [line.split()[0] for line in lines if "!" in line] == ["l4-p4-k4096-norm-1m-cp8"]
    assert "! A GPU has 139.8 GiB" in explanation
    # Hours follow from the speed: 6,000 dense steps of 32 sequences on 8 GPUs.
    cells = next(re.split(r"  +", line) for line in lines if line.startswith("l3-p4-k1536-norm "))
    speed, hours = (cells[at].split(" / ")[1] for at in (4, 5))
    expected = 6000 * 32 * 98304 / 8 / int(speed.replace(",", "")) / 3600
    assert cells[0] == "l3-p4-k1536-norm" and float(hours) == pytest.approx(expected, abs=0.06)
    sweep.main(["show", "l3-p2-k2048-dilated", "--outputs", str(tmp_path), "--", "--training.dataset=c4_local"])
    shown = capsys.readouterr().out
    assert "--lighthouse.top_k=2048" in shown and "32 tiles" not in shown and "S 32,768 of 98,304" in shown
    assert 'dataset = "c4_local"' in shown and "resume_dense" in shown and "published: loss 0.6880" in shown
    assert not list(tmp_path.iterdir())


def test_what_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["run", "l9-p4"])
    assert "name 'l9-p4': must be one of dense, l3-p4-k1536-norm" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="dense is dense from the start"):
        sweep.main(["stage2", "dense"])


def test_both_stages_of_a_run_made_small(tmp_path):
    """Started by name, interrupted by its own length, listed on the way."""
    small = shlex.split(
        "--model.flavor=debug --lighthouse.layers=2-3 --lighthouse.top_k=128 --training.seq_len=2048 "
        "--training.dataset=stdlib --training.steps=2 --lr_scheduler.total_steps=3 --training.global_batch_size=1 "
        "--compile.no-enable --training.mixed_precision_param=float32 --metrics.log_freq=1 "
        "--metrics.no-enable_tensorboard"
    )
    where = ["l3-p4-k1536-norm", "--outputs", str(tmp_path), "--torchrun", "--standalone --nproc_per_node 1"]
    run_here(sweep.main, "run", *where, "--", *small)
    run_here(sweep.main, "stage2", *where)
    stages = [tmp_path / "l3-p4-k1536-norm" / stage for stage in ("stage1", "stage2")]
    assert [list(losses(stage)) for stage in stages] == [[1, 2], [3]]
    assert [config_of(stage)["lighthouse"]["enable"] for stage in stages] == [True, False]
    listed = sweep.progress(sweep.RUNS["l3-p4-k1536-norm"], tmp_path)
    assert "stage 1: step 2" in listed and "stage 2: step 3" in listed and "saved at 3" in listed
    assert torch.isfinite(torch.tensor(list(losses(stages[1]).values()))).all()
