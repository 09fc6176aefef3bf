"""Which layers look back: of models in which it is known."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torchtitan.experiments.lighthouse import look_back as command
from torchtitan.experiments.lighthouse.evaluation import look_back

from helpers.model import build, tokens

LAYER = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves whose layer 2 alone passes on what it attends to."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model, config = build("--lighthouse.no-enable")
    for layer, attention in enumerate(look_back.attentions(model)):
        attention.wo.weight.data.mul_(50 if layer == LAYER else 0)
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint/step-1", no_dist=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


def test_a_limited_layer_sees_its_last_tokens_and_no_others(run):
    from torchtitan.experiments.lighthouse.runs.settings import read_settings

    checkpoint = run / "checkpoint/step-1"
    model = look_back.load(checkpoint, read_settings(checkpoint), 128, torch.device("cpu"))
    before = tokens(batch=1)
    after = before.clone()
    after[0, :800] = (after[0, :800] + 1) % 256
    with torch.no_grad():
        assert not torch.allclose(model(before)[0, 927:], model(after)[0, 927:])
        with look_back.limited_to_window(model, [LAYER]):
            limited, other = model(before), model(after)
    assert torch.equal(limited[0, 927:], other[0, 927:])
    assert not torch.allclose(limited[0, 926], other[0, 926])


def test_find_names_the_layer_and_leaves_the_others_to_lighthouse(run):
    from torchtitan.experiments.lighthouse.runs.settings import read_settings

    checkpoint = run / "checkpoint/step-1"
    model = look_back.load(checkpoint, read_settings(checkpoint), 128, torch.device("cpu"))
    text = tokens(batch=1)
    with torch.no_grad():
        whole = model(text).log_softmax(-1)

    def loss_of():
        """How far the output is from the dense one: it cannot fall."""
        with torch.no_grad():
            return F.kl_div(model(text).log_softmax(-1), whole, log_target=True, reduction="batchmean").item() / 1024

    found = look_back.find(model, 128, 1e-6, loss_of)
    assert found.look_back == [LAYER] and found.dense == found.others_limited == 0
    assert [loss > 1e-3 for loss in found.limited] == [layer == LAYER for layer in range(len(model.layers))]
    assert look_back.as_setting(found.others) == f"0-1,3-{len(model.layers) - 1}"
    assert 'layers = "0-1,3-' in look_back.conclusion(found) and "Layer 2 looks back" in look_back.conclusion(found)
    assert look_back.table(found).count("looks back") == 1


@pytest.mark.parametrize(("layers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")])
def test_layers_as_a_setting(layers, text):
    assert look_back.as_setting(layers) == text


def test_the_command_writes_what_it_prints(run, tmp_path, capsys):
    file = tmp_path / "new/look_back.json"
    data = ["--dataset", "stdlib_validation", "--sequences", "1"]
    command.main([str(run), *data, "--least", "1e-7", "--output", str(file)])
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    assert f"dense {report['dense']:.4f} nats per token" in printed and "1 sequence of 1,024 tokens" in printed
    # Weights that were not trained may do better when they see less: then no layer looks back.
    changed = [layer for layer, loss in enumerate(report["limited"]) if loss != report["dense"]]
    assert changed == [LAYER] and set(report["look_back"]) <= {LAYER}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", "100"], "--window 100: must be a positive multiple of 128; nearest valid value: 128"),
        (["--window", "1024"], "--window 1024: must be shorter than the sequences of 1,024 tokens"),
        (["--least", "0"], "--least 0.0: must be positive"),
        (["--sequences", "0"], "--sequences 0: must be positive; nearest valid value: 1"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(run, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([str(run), *words])
    assert end.value.code == 2 and f"look_back: {message}" in capsys.readouterr().err
