import json

import pytest
import report


def write_run(folder, stage, losses, first_step=1, tps=100.0):
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "stage": stage, "loss": loss, "tokens_per_second": 1.0 if step == first_step else tps}
        for step, loss in enumerate(losses, start=first_step)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "stage1", "stage1", [5.0] * 10 + [2.0] * 10, tps=400),
        write_run(tmp_path / "stage2", "stage2", [3.5] + [1.5] * 19, first_step=21, tps=100),
        write_run(tmp_path / "dense", "dense", [4.0] * 20 + [1.25] * 20, tps=100),
    ]


def cells(table):
    return {row[0]: row[1:] for row in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())}


def test_table_holds_the_four_figures(runs, tmp_path, capsys):
    report.main([*map(str, runs), "--output", str(tmp_path / "out")])
    table = cells((tmp_path / "out/summary.md").read_text())
    assert table["Stage 1 (Lighthouse), at its end"] == ["1–20", "2.0000", "400"]
    assert table["spike at the switch, first dense step"] == ["21", "3.5000 (+1.5000)", ""]
    assert table["Stage 2 (dense), at its end"] == ["21–40", "1.5000", "100"]
    assert table["dense"] == ["1–40", "1.2500", "100"]
    assert table["run"][1] == "loss (last 2)"  # a tenth of the shortest stage, for all alike
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss.png" in capsys.readouterr().out


def test_stage_1_steps_after_the_switch_do_not_count(runs, tmp_path):
    """Stage 2 may start from an earlier checkpoint than Stage 1's last."""
    early = write_run(tmp_path / "early", "stage2", [1.0] * 10, first_step=16)
    (experiment,) = report.load_experiments([runs[0], early])
    assert experiment.steps == list(range(1, 26))
    assert experiment.losses[15:] == [1.0] * 10


def test_errors_name_the_run(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"absent/metrics\.jsonl does not exist"):
        report.main([str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="name its Stage 1 run just before"):
        report.main([str(runs[1]), str(runs[0])])
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no logged step"):
        report.main([str(runs[0])])
