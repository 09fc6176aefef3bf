import json

import pytest
from torchtitan.experiments.lighthouse import report
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.reporting import experiments, figure, tables


def write_run(folder, stage, losses, first_step=1, tps=100.0, **config):
    """``config``: what config.json says, where there is one: lighthouse, seq_len, origin."""
    folder.mkdir(parents=True)
    if config:
        section = {"enable": config["lighthouse"], "stage1_checkpoint": config.get("origin", "")}
        training = {"seq_len": config["seq_len"], "dataset": config.get("dataset", "c4_local"), "dataset_path": "books"}
        text = json.dumps({"lighthouse": section, "training": training})
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
    (_, *switches) = tables.tables(experiments.load_experiments(runs), 1)
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
    (_, (_, _, rows)) = tables.tables(experiments.load_experiments(runs), 2)
    assert dict(rows)["first below dense after"] == "not within 20"
    assert dict(rows)["last gap to dense"] == "+0.5000 at step 40"


def test_without_a_dense_run_stage_1_is_beside_stage_2(runs):
    (sentence,) = tables.headlines(experiments.load_experiments(runs[:2]))
    assert sentence == "Stage 1 ran 4.0 times as many tokens per second as dense attention."
    assert tables.headlines(experiments.load_experiments(runs[2:])) == []


def test_every_stage_looks_different(runs, tmp_path):
    """Two runs with two stages each, and two dense ones: no two curves share colour and dashes, and none a label."""
    more = [
        write_run(tmp_path / "more/stage1", "stage1", [5.0] * 20),
        write_run(tmp_path / "more/stage2", "stage2", [3.0] * 20, first_step=21),
        write_run(tmp_path / "more/dense_again", "dense", [3.0] * 40),
    ]
    loaded = experiments.load_experiments([*runs, *more])
    styles = [style for stages in figure._styles(loaded) for style in stages]
    assert len({style["color"] for style in styles}) == len({style["label"] for style in styles}) == 6
    figure.draw(loaded, 2, tmp_path / "loss.png")


def test_hours_and_time_add_up_over_the_stages(runs):
    (experiment, dense) = experiments.load_experiments(runs)
    assert experiment.hours[19] == pytest.approx(190 / 3600) and experiment.hours[-1] == pytest.approx(380 / 3600)
    assert dense.device_seconds(10_000) == pytest.approx(100)
    assert experiment.device_seconds(30_000) == pytest.approx(20_000 / 400 + 10_000 / 100)


def test_stage_1_steps_after_the_switch_do_not_count(runs, tmp_path):
    """Stage 2 may start from an earlier checkpoint than Stage 1's last."""
    early = write_run(tmp_path / "early", "stage2", [1.0] * 10, first_step=16)
    (experiment,) = experiments.load_experiments([runs[0], early])
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
    (one,) = experiments.load_experiments(chain)
    assert one.name == "dense at 512, then Lighthouse at 2,048, then dense at 2,048" and len(one.parts) == 3
    assert experiments.baseline_of([one]) is None
    (sentence,) = tables.headlines([one])
    assert sentence == "Stage 2 ran 4.0 times as many tokens per second as dense attention."
    (_, _, rows), (second, _, to_second), (third, _, to_third) = tables.tables([one], 1)
    assert [row[0] for row in rows] == [
        "Stage 1 (dense at 512)", "Stage 2 (Lighthouse at 2,048)", "Stage 3 (dense at 2,048)",
    ]  # fmt: skip
    assert second.endswith("to Stage 2") and third.endswith("to Stage 3")
    assert to_second[0] == ("spike, first Lighthouse step", "3.0000 (-2.0000) at step 11")
    assert to_third[0] == ("spike, first dense step", "4.0000 (+2.0000) at step 21")
    assert to_third[1] == ("dense steps until Stage 2's last level", "2")
    (styles,) = figure._styles([one])
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 3
    assert one.device_seconds(30_000) == pytest.approx(10_000 / 900 + 10_000 / 400 + 10_000 / 100)
    # A dense run for the whole of it is one; and a dense stage that says nothing of it does not continue it.
    whole = write_run(tmp_path / "whole", "dense", [4.0] * 30, lighthouse=False, seq_len=2048)
    both = experiments.load_experiments([*chain, whole])
    assert experiments.baseline_of(both) is both[1]
    *_, (_, _, rows) = tables.tables(both, 1)
    assert dict(rows)["last gap to whole"] == "-2.5000 at step 30"
    figure.draw(both, 1, tmp_path / "loss.png")
    elsewhere = write_run(tmp_path / "elsewhere", "dense", [4.0] * 30, tps=50, lighthouse=False, seq_len=512)
    assert tables.headlines(experiments.load_experiments([*chain, elsewhere])) == [sentence]
    with pytest.raises(Refused, match="middle holds Stage 2: name its Stage 1 run just before it"):
        experiments.load_experiments([whole, chain[1]])
    with pytest.raises(Refused, match="long holds Stage 3: name its Stage 2 run just before it"):
        experiments.load_experiments([chain[0], chain[2]])


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
    line = experiments.Experiment("line", [{"step": step, "loss": float(step)} for step in range(20)])
    drawn = line.centred(window)
    shift = 0.5 if window % 2 == 0 else 0.0
    assert drawn[5:15] == pytest.approx([step + shift for step in range(5, 15)])
    assert len(drawn) == 20 and drawn[0] == pytest.approx(window // 2 / 2)


def test_runs_keep_their_names_apart(runs, tmp_path):
    """By the labels that they are given, or by their folders; and no row of the table is there twice."""
    more = [
        write_run(tmp_path / "more/stage1", "stage1", [5.0] * 20),
        write_run(tmp_path / "more/stage2", "stage2", [3.0] * 20, first_step=21),
        write_run(tmp_path / "more/dense", "dense", [3.0] * 40),
    ]
    loaded = experiments.load_experiments([*runs, *more])
    where = tmp_path.name
    assert [one.name for one in loaded] == [
        f"Lighthouse, then dense ({where}/stage1)", f"{where}/dense",
        "Lighthouse, then dense (more/stage1)", "more/dense",
    ]  # fmt: skip
    labelled = experiments.load_experiments([*runs, *more], ["k 512", "dense", "k 1536", "dense, wide"])
    assert [one.name for one in labelled] == ["k 512", "dense", "k 1536", "dense, wide"]
    for curves in (loaded, labelled):
        (_, _, rows), *_ = tables.tables(curves, 2)
        assert len({row[0] for row in rows}) == len(rows) == 6
    assert rows[0][0] == "k 512: Stage 1 (Lighthouse)"
    for labels in (["one"], ["one", "one"]):
        with pytest.raises(Refused, match=r"must be 2 different names, one for each curve .*value: stage1,dense"):
            experiments.load_experiments(runs, labels)


def test_one_step_gives_no_noise(tmp_path):
    runs = [write_run(tmp_path / name, "dense", [4.0, 3.0]) for name in ("a", "b")]
    (_, header, rows), *_ = tables.tables(experiments.load_experiments(runs), 1)
    assert header[3] == "loss of the last step" and [row[3] for row in rows] == ["3.0000", "3.0000"]


def test_a_warning_says_what_differs(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a", "dense", [4.0] * 2, lighthouse=False, seq_len=512),
        write_run(tmp_path / "b", "dense", [4.0] * 2, lighthouse=False, seq_len=512, dataset="c4"),
        write_run(tmp_path / "c", "dense", [4.0] * 2, lighthouse=False, seq_len=2048),
    ]
    loaded = experiments.load_experiments(runs)
    assert experiments.differing(loaded[:1]) == []
    context, data = experiments.differing(loaded)
    assert context.startswith("Warning: these runs have different contexts") and "b: 512, c: 2,048" in context
    assert data.startswith("Warning: these runs have different data") and "a: c4_local books, b: c4 books" in data
    report.main([str(run) for run in runs])  # beside them by default
    assert "Warning: these runs have different data" in capsys.readouterr().out
    assert "different contexts" in (tmp_path / "report/report.html").read_text()
    assert report.default_output(runs[:1]) == tmp_path / "a/report"


def test_the_first_step_alone_is_not_below_the_dense_run(tmp_path):
    """An easy batch for the resumed model: one step below says nothing, and the last gap is a mean over more."""
    runs = [
        write_run(tmp_path / "stage1", "stage1", [5.0] * 20),
        write_run(tmp_path / "stage2", "stage2", [3.9] + [4.2] * 19, first_step=21),
        write_run(tmp_path / "dense", "dense", [4.0] * 40),
    ]
    (_, (_, _, rows)) = tables.tables(experiments.load_experiments(runs), 2)
    assert dict(rows)["first below dense after"] == "not within 20"
    assert dict(rows)["last gap to dense"] == "+0.2000 at step 40"
