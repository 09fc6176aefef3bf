import json

import pytest
from torchtitan.experiments.lighthouse import report
from torchtitan.experiments.lighthouse.errors import Refused


def write_run(folder, stage, losses, first_step=1, tps=100.0, **config):
    """``config``: what config.json says, where there is one: lighthouse, seq_len, origin."""
    folder.mkdir(parents=True)
    if config:
        section = {"enable": config["lighthouse"], "stage1_checkpoint": config.get("origin", "")}
        text = json.dumps({"lighthouse": section, "training": {"seq_len": config["seq_len"]}})
        (folder / "config.json").write_text(text)
    lines = [
        {
            "step": step, "stage": stage, "loss": loss, "tokens_per_second": 1.0 if step == first_step else tps,
            "tokens_seen": 1000 * step, "wall_clock_s": 10.0 * (step - first_step),
        }
        for step, loss in enumerate(losses, start=first_step)
    ]  # fmt: skip
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
    return {
        row[0]: row[1:] for row in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()) if row
    }


def test_tables_hold_every_figure(runs, tmp_path, capsys):
    report.main([*map(str, runs), "--output", str(tmp_path / "out")])
    table = cells((tmp_path / "out/summary.md").read_text())
    assert table["run"][2] == "loss, mean of last 2"  # a tenth of the shortest stage, for all alike
    assert table["Stage 1 (Lighthouse)"] == ["1–20", "20,000", "2.0000 ± 0.0000", "400"]
    assert table["Stage 2 (dense)"] == ["21–40", "40,000", "1.5000 ± 0.0000", "100"]
    assert table["dense"] == ["1–40", "40,000", "1.2500 ± 0.0000", "100"]
    assert table["spike, first dense step"] == ["3.5000 (+1.5000) at step 21"]
    assert table["dense steps until Stage 1's last level"] == ["3"]  # the mean of two steps is 2.5, then 1.5
    assert table["first below dense after"] == ["not within 20"]
    assert table["last gap to dense"] == ["+0.2500 at step 40"]
    # 20,000 tokens at 400/s and 20,000 at 100/s, against 40,000 at 100/s.
    assert table["speed-up over dense at 40,000 tokens"] == ["1.60"]
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    headline = "Stage 1 ran 4.0 times as many tokens per second as dense attention."
    page = (tmp_path / "out/report.html").read_text()
    assert headline in page and (tmp_path / "out/summary.md").read_text().startswith(headline)
    assert "data:image/png;base64," in page and 'src="http' not in page and "+0.2500 at step 40" in page
    printed = capsys.readouterr().out
    assert headline in printed and f"Figure: {tmp_path / 'out/loss.png'}" in printed


@pytest.mark.parametrize(
    "tail, said",
    [
        ([6.0] * 4 + [1.0] * 16, "5 dense steps, and stays below"),
        ([1.0] + [6.0] * 19, "1 dense step, but does not stay: below at 1 of 20 logged steps, above it at the last"),
        (
            [1.0] + [6.0] * 9 + [1.0] * 10,
            "1 dense step, but does not stay: below at 11 of 20 logged steps, below it at",
        ),
        ([4.5] * 20, "not within 20"),
    ],
)
def test_a_run_that_overtakes_the_dense_one_says_when_and_for_how_long(tmp_path, tail, said):
    runs = [
        write_run(tmp_path / "stage1", "stage1", [5.0] * 10, tps=400),
        write_run(tmp_path / "stage2", "stage2", tail, first_step=11),
        write_run(tmp_path / "dense", "dense", [4.0] * 30),
    ]
    (_, *switches) = report.tables(report.load_experiments(runs), 1)
    ((_, _, rows),) = switches
    assert dict(rows)["first below dense after"].startswith(said)
    if tail[0] == 6.0:
        assert ("dense steps until Stage 1's last level", "5") in rows


def test_the_gap_to_the_dense_run_is_that_on_the_same_data(tmp_path):
    """A hard batch just before the switch says nothing about the resumed model, which is 0.5 behind at every step."""
    dense = [4.0] * 19 + [9.0] + [4.0, 7.0] * 10
    runs = [
        write_run(tmp_path / "stage1", "stage1", dense[:20]),
        write_run(tmp_path / "stage2", "stage2", [loss + 0.5 for loss in dense[20:]], first_step=21),
        write_run(tmp_path / "dense", "dense", dense),
    ]
    (_, (_, _, rows)) = report.tables(report.load_experiments(runs), 2)
    assert dict(rows)["first below dense after"] == "not within 20"
    assert dict(rows)["last gap to dense"] == "+0.5000 at step 40"


def test_without_a_dense_run_stage_1_is_beside_stage_2(runs):
    (sentence,) = report.headlines(report.load_experiments(runs[:2]))
    assert sentence == "Stage 1 ran 4.0 times as many tokens per second as dense attention."
    assert report.headlines(report.load_experiments(runs[2:])) == []


def test_every_stage_looks_different(runs, tmp_path):
    """Two runs with two stages each, and two dense ones: no two curves share colour and dashes, and none a label."""
    more = [
        write_run(tmp_path / "more/stage1", "stage1", [5.0] * 20),
        write_run(tmp_path / "more/stage2", "stage2", [3.0] * 20, first_step=21),
        write_run(tmp_path / "more/dense_again", "dense", [3.0] * 40),
    ]
    experiments = report.load_experiments([*runs, *more])
    experiments[2].name = "another"
    styles = [style for stages in report._styles(experiments) for style in stages]
    assert len({style["color"] for style in styles}) == len({style["label"] for style in styles}) == 6
    report.draw(experiments, 2, tmp_path / "loss.png")


def test_hours_and_time_add_up_over_the_stages(runs):
    (experiment, dense) = report.load_experiments(runs)
    assert experiment.hours[19] == pytest.approx(190 / 3600) and experiment.hours[-1] == pytest.approx(380 / 3600)
    assert dense.device_seconds(10_000) == pytest.approx(100)
    assert experiment.device_seconds(30_000) == pytest.approx(20_000 / 400 + 10_000 / 100)


def test_stage_1_steps_after_the_switch_do_not_count(runs, tmp_path):
    """Stage 2 may start from an earlier checkpoint than Stage 1's last."""
    early = write_run(tmp_path / "early", "stage2", [1.0] * 10, first_step=16)
    (experiment,) = report.load_experiments([runs[0], early])
    assert experiment.steps == list(range(1, 26))
    assert experiment.losses[15:] == [1.0] * 10


def test_a_chain_is_one_curve_whose_stages_say_what_they_are(tmp_path):
    """Dense and short, through Lighthouse, dense; the short stage is no baseline, and Lighthouse is beside the dense
    stage of its own context."""
    origin = str(tmp_path / "{}/checkpoint/step-{}")
    chain = [
        write_run(tmp_path / "short", "dense", [5.0] * 10, tps=900, lighthouse=False, seq_len=512),
        write_run(tmp_path / "middle", "stage2", [3.0] + [2.0] * 9, 11, 400, lighthouse=True, seq_len=2048,
                  origin=origin.format("short", 10)),
        write_run(tmp_path / "long", "stage3", [4.0] + [1.5] * 9, 21, 100, lighthouse=False, seq_len=2048,
                  origin=origin.format("middle", 20)),
    ]  # fmt: skip
    (one,) = report.load_experiments(chain)
    assert one.name == "dense at 512, then Lighthouse at 2,048, then dense at 2,048" and len(one.parts) == 3
    assert report.baseline_of([one]) is None
    (sentence,) = report.headlines([one])
    assert sentence == "Stage 2 ran 4.0 times as many tokens per second as dense attention."
    (_, _, rows), (second, _, to_second), (third, _, to_third) = report.tables([one], 1)
    assert [row[0] for row in rows] == [
        "Stage 1 (dense at 512)", "Stage 2 (Lighthouse at 2,048)", "Stage 3 (dense at 2,048)",
    ]  # fmt: skip
    assert second.endswith("to Stage 2") and third.endswith("to Stage 3")
    assert to_second[0] == ("spike, first Lighthouse step", "3.0000 (-2.0000) at step 11")
    assert to_third[0] == ("spike, first dense step", "4.0000 (+2.0000) at step 21")
    assert to_third[1] == ("dense steps until Stage 2's last level", "2")
    (styles,) = report._styles([one])
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 3
    assert one.device_seconds(30_000) == pytest.approx(10_000 / 900 + 10_000 / 400 + 10_000 / 100)
    # A dense run for the whole of it is one; and a dense stage that says nothing of it does not continue it.
    whole = write_run(tmp_path / "whole", "dense", [4.0] * 30, lighthouse=False, seq_len=2048)
    both = report.load_experiments([*chain, whole])
    assert report.baseline_of(both) is both[1]
    *_, (_, _, rows) = report.tables(both, 1)
    assert dict(rows)["last gap to whole"] == "-2.5000 at step 30"
    report.draw(both, 1, tmp_path / "loss.png")
    elsewhere = write_run(tmp_path / "elsewhere", "dense", [4.0] * 30, tps=50, lighthouse=False, seq_len=512)
    assert report.headlines(report.load_experiments([*chain, elsewhere])) == [sentence]
    with pytest.raises(Refused, match="middle holds Stage 2: name its Stage 1 run just before it"):
        report.load_experiments([whole, chain[1]])
    with pytest.raises(Refused, match="long holds Stage 3: name its Stage 2 run just before it"):
        report.load_experiments([chain[0], chain[2]])


def test_errors_name_the_run(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"absent/metrics\.jsonl does not exist"):
        report.main([str(tmp_path / "absent")])
    for words in ([runs[1], runs[0]], [runs[2], runs[1]]):  # a dense run that nothing says it continues
        with pytest.raises(SystemExit, match="name its Stage 1 run just before"):
            report.main([*map(str, words)])
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no logged step"):
        report.main([str(runs[0])])


@pytest.mark.parametrize("window", [1, 4, 5])
def test_the_curve_for_the_eye_does_not_lag(window):
    """A straight line stays where it is, half a step for even windows, but where the window is cut off."""
    line = report.Experiment("line", [{"step": step, "loss": float(step)} for step in range(20)])
    drawn = line.centred(window)
    shift = 0.5 if window % 2 == 0 else 0.0
    assert drawn[5:15] == pytest.approx([step + shift for step in range(5, 15)])
    assert len(drawn) == 20 and drawn[0] == pytest.approx(window // 2 / 2)
