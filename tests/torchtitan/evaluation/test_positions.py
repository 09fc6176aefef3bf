import copy
import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.experiments.lighthouse import evaluate
from torchtitan.experiments.lighthouse.data.tokenizer import BYTE_TOKENIZER_PATH, build_tokenizer, utf8_bytes
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.evaluation import positions, subjects
from torchtitan.experiments.lighthouse.runs import settings as run_settings

from helpers.checkpoints import save_settings
from helpers.launch import REPOSITORY, metrics, train
from helpers.launch import run as run_program

SEQUENCES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One dense step at 1,024 tokens, and its validation."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    validation = {
        "validation__enable": None, "validation__dataset": "stdlib_validation", "validation__seq_len": "1024",
        "validation__local_batch_size": "1", "validation__steps": str(SEQUENCES), "validation__freq": "1",
    }  # fmt: skip
    # One: a second validation would go on in the text where the first one ended.
    train(folder, training__steps="1", lr_scheduler__warmup_steps="0", lighthouse__no_enable=None, **validation)
    return folder


@pytest.fixture(scope="module")
def subject(run):
    checkpoint = run / "checkpoint/step-1"
    settings = run_settings.read_settings(checkpoint)
    model = positions.load(checkpoint, settings, dense=True, device=torch.device("cpu"))
    data = positions.held_out_data(checkpoint, None, None)
    tokenizer = build_tokenizer(settings)
    return model, settings, tokenizer, list(positions.read_sequences(settings, tokenizer, *data, SEQUENCES))


def test_every_position_has_its_float64_loss_whatever_the_chunk(subject, monkeypatch):
    model, _, _, sequences = subject
    inputs, labels = (torch.cat(parts) for parts in zip(*sequences[:2], strict=True))
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(inputs)
    want = -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    assert want.std() > 0.1  # positions differ
    for chunk in (positions.CHUNK_LOGITS, 320 * 2 * 300, 1):  # all at once; 300 positions; 128, the fewest
        monkeypatch.setattr(positions, "CHUNK_LOGITS", chunk)
        loss, hits = positions.losses_and_hits(model, inputs, labels)
        torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=2e-5)
        assert (hits == (logits.argmax(-1) == labels)).float().mean() > 0.999 and hits.any()


def test_logits_of_few_positions_live_at_a_time(subject, monkeypatch):
    model, _, _, sequences = subject
    monkeypatch.setattr(positions, "CHUNK_LOGITS", 1)
    rows = []
    handle = model.output.register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[1]))
    positions.losses_and_hits(model, *sequences[0])
    handle.remove()
    assert rows == [128] * 8


def test_buckets_add_up_to_the_validation_loss_and_to_single_positions(run, subject):
    model, _, tokenizer, sequences = subject
    edges = [0, 100, 500, 1024]
    buckets, count = positions.by_position(model, sequences, edges, tokenizer, torch.device("cpu"))
    assert count == SEQUENCES and [bucket.tokens for bucket in buckets] == [300, 1200, 1572]
    rows = torch.cat([positions.losses_and_hits(model, *sequence)[0] for sequence in sequences]).double()
    for bucket, (start, end) in zip(buckets, pairwise(edges), strict=True):
        assert bucket.loss == pytest.approx(rows[:, start:end].mean().item(), rel=1e-9)
    weighted = sum(bucket.loss * bucket.tokens for bucket in buckets) / sum(bucket.tokens for bucket in buckets)
    validation = [record["validation_loss"] for record in metrics(run) if "validation_loss" in record][-1]
    assert positions.total(buckets).loss == pytest.approx(weighted) == pytest.approx(validation, abs=2e-4)
    # All but begin and end of text are bytes.
    special = sum((labels >= 256).sum().item() for _, labels in sequences)
    whole = positions.total(buckets)
    assert whole.bytes == SEQUENCES * 1024 - special
    assert whole.bits_per_byte == pytest.approx(weighted * whole.tokens / whole.bytes / math.log(2))
    (record,) = (record for record in metrics(run) if "validation_loss" in record)  # the trainer counts the same bytes
    assert record["bits_per_byte"] / record["validation_loss"] == pytest.approx(whole.bits_per_byte / whole.loss)


def test_bytes_of_a_tokenizer_that_joins_them():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = "the thé then them " * 20
    inner.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))

    class Outer:
        bos_id, eos_id, tokenizer = 1000, 1001, inner

        def get_vocab_size(self):
            return inner.get_vocab_size() + 2

    tokens = inner.encode(text).ids
    assert len(tokens) < len(text)
    assert utf8_bytes([1000, *tokens, 1001], Outer()) == len(text.encode()) > len(text)


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [
        (98304, [0, 4096, 8192, 16384, 32768, 65536, 98304]),
        (32768, [0, 2048, 4096, 8192, 16384, 32768]),
        (2, [0, 1, 2]),
        (1, [0, 1]),
    ],
)
def test_default_buckets(seq_len, edges):
    assert positions.choose_edges(None, seq_len) == edges


def test_buckets_that_are_asked_for():
    assert positions.choose_edges([100, 200], 1024) == [0, 100, 200, 1024]
    for asked, message in (
        ([2000], "nearest valid value: 1024"),
        ([-1], "value: 0"),
        ([5, 5], "must ascend; valid: 5"),
    ):
        with pytest.raises(Refused, match=message):
            positions.choose_edges(asked, 1024)


def test_a_loss_that_is_not_finite_is_no_result(subject):
    model, _, _, sequences = subject
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.output.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        positions.losses_and_hits(damaged, *sequences[0])


def test_the_command_writes_a_table_and_a_file(run, capsys):
    evaluate.main([str(run), "--sequences", "2"])
    printed, report = capsys.readouterr().out, json.loads((run / "evaluate/evaluate.json").read_text())
    assert "512 - 1,024" in printed and "0 - 1,024" in printed and report["attention"] == "dense"
    assert report["settings"] | {"dataset_path": None} == {
        "dataset": "stdlib_validation", "dataset_path": None, "sequences": 2, "seq_len": 1024
    }  # fmt: skip
    assert [bucket["end"] for bucket in report["buckets"]] == [64, 128, 256, 512, 1024]
    evaluate.main([str(run / "checkpoint/step-1"), "--sequences", "1", "--seq-len", "512", "--buckets", "256"])
    report = json.loads((run / "evaluate-step-1/evaluate.json").read_text())
    assert [bucket["tokens"] for bucket in report["buckets"]] == [256, 256]


def test_as_trained_runs_through_lighthouse(run, tmp_path):
    """The same weights in a run that says it trained through Lighthouse."""
    folder = shutil.copytree(run, tmp_path / "stage1")
    config = json.loads((run / "config.json").read_text())
    config["lighthouse"]["enable"] = True
    config["validation"]["enable"] = False  # then it is the training set's twin
    save_settings(folder, config)
    losses = []
    for words in ([], ["--as-trained"]):
        evaluate.main([str(folder), "--sequences", "1", "--output", str(tmp_path / "out"), *words])
        report = json.loads((tmp_path / "out/evaluate.json").read_text())
        assert report["settings"]["dataset"] == "stdlib_validation"
        losses.append((report["attention"], report["loss"]))
    assert [name for name, _ in losses] == ["dense", "as trained, through Lighthouse"]
    assert losses[0][1] != losses[1][1]


def test_refusals(run, tmp_path):
    for words, message in (
        (["--sequences", "0"], "--sequences 0: must be positive; nearest valid value: 1"),
        (["--dataset", "nothing"], "--dataset 'nothing': must be one of .*stdlib_validation"),
        (["--dataset", "c4_local_validation", "--dataset-path", str(tmp_path)], "no data file here"),
        (["--buckets", "2000"], "nearest valid value: 1024"),
    ):
        with pytest.raises(SystemExit, match=f"^evaluate: .*{message}"):
            evaluate.main([str(run), *words])
    with pytest.raises(SystemExit, match="no such folder"):
        evaluate.main([str(tmp_path / "absent")])


def test_help_does_not_wait_for_torch():
    words = [sys.executable, "-X", "importtime", str(REPOSITORY / "scripts/evaluate.py"), "--help"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--as-trained" in result.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in result.stderr.splitlines())


def test_a_hugging_face_folder_must_be_given_data(tmp_path):
    """Its loss is that of the run that it was exported from: tests/docs/test_your_own_run.py."""
    pytest.importorskip("transformers", reason="needs transformers (the extra 'hf')")
    folder = shutil.copytree(BYTE_TOKENIZER_PATH, tmp_path / "hf")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for words, message in (
        ([], "names no data; say which with --dataset"),
        (["--as-trained"], "leave it out"),
        (["--", "--job.config_file", "no_such.toml"], "--job.config_file: cannot be read .*no_such.toml"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main([str(folder), *words])


def test_processes_share_the_sequences_and_find_the_same(run, tmp_path):
    evaluate.main([str(run), "--sequences", "3", "--output", str(tmp_path / "one")])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [str(REPOSITORY / "scripts/evaluate.py"), str(run), "--sequences", "3", "--output", str(tmp_path / "two")]
    result = run_program(words)
    assert result.stdout.count("nats/token") == 1
    one, two = (json.loads((tmp_path / name / "evaluate.json").read_text()) for name in ("one", "two"))
    assert two["settings"]["sequences"] == 3
    for a, b in zip(one["buckets"] + one["curve"], two["buckets"] + two["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_settings_after_the_dashes_replace_the_runs(run):
    settings = run_settings.read_settings(run / "checkpoint/step-1")
    before = settings.training.seq_len
    words = ["--validation.max_bad_records", "3", "--lighthouse.no-cover-start", "--training.dataset=c4_local"]
    changed = subjects.overridden(settings, words)
    assert changed.validation.max_bad_records == 3 and not changed.lighthouse.cover_start
    assert changed.training.dataset == "c4_local" and changed.training.seq_len == before


def test_a_curve_covers_every_position_once():
    losses = torch.rand(5000, dtype=torch.float64)
    points = positions.curve(losses)
    assert [point["start"] for point in points][1:] == [point["end"] for point in points][:-1]
    assert sum(point["loss"] * (point["end"] - point["start"]) for point in points) == pytest.approx(losses.sum())
