"""Errors are one line, from one rank, and the last one: those of data too, wherever they come up."""

import json
import os
import signal
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper
from torchtitan.experiments.lighthouse.errors import DataError, Refused
from torchtitan.experiments.lighthouse.seams import settings

from helpers.launch import command, losses, run


def raised_in_a_worker(message: str) -> Refused:
    try:
        try:
            raise OSError(f"OSError: {message}")
        except OSError as error:
            raise DataError(message) from error
    except DataError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 3")
    with pytest.raises(DataError) as caught:
        wrapper.reraise()
    return caught.value


def test_a_data_workers_error_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch puts the worker's traceback into the message."""
    message = "/data/a.jsonl: record 1 is no JSON (JSONDecodeError: Expecting value: line 1)"
    assert str(raised_in_a_worker(message)) == message
    monkeypatch.setenv("LIGHTHOUSE_DEBUG", "1")
    assert "Original Traceback" in str(raised_in_a_worker(message)) and str(DataError(message)) == message


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the entry point on a rank of two with a trainer that raises: what it waited for, and its error file."""

    def fail(rank: int, error: Exception, kills: bool = False) -> tuple[list[float], Path]:
        file, waited = tmp_path / "error.json", []

        def upstreams_main(_trainer) -> None:
            file.write_text("a traceback")
            raise error

        def sleep(seconds: float) -> None:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert not file.exists(), "torchrun would show the traceback"
            waited.append(seconds)
            if kills:
                raise KeyboardInterrupt

        for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(file)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.setattr(settings.upstream, "main", upstreams_main)
        monkeypatch.setattr(settings.time, "sleep", sleep)
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with pytest.raises(BaseException) as caught:
                settings.main(settings.HookedTrainer)
        finally:
            signal.signal(signal.SIGTERM, before)
        fail.raised = caught.value
        return waited, file

    return fail


def test_rank_0_says_it_at_once(fails, capsys: pytest.CaptureFixture) -> None:
    waited, file = fails(0, DataError("no data"))
    assert waited == [] and not file.exists()
    assert isinstance(fails.raised, SystemExit) and fails.raised.code == 2
    assert capsys.readouterr().err == "train: no data\n"


def test_another_rank_says_it_only_where_rank_0_does_not(fails, capsys: pytest.CaptureFixture) -> None:
    """Torchrun ends it while it waits, or it has found something that rank 0 has not."""
    waited, _ = fails(1, DataError("no data"), kills=True)
    assert len(waited) == 1 and capsys.readouterr().err == ""
    waited, file = fails(1, DataError("no data"))
    assert len(waited) == 1 and waited[0] > 10 and fails.raised.code == 2 and not file.exists()
    assert capsys.readouterr().err == f"train, rank 1 on {os.uname().nodename}: no data\n"


def test_a_rank_that_fails_because_another_has_gone_says_nothing(fails, capsys: pytest.CaptureFixture) -> None:
    """Where it is not ended, it has failed by itself: then there is a traceback, for torchrun too."""
    waited, file = fails(1, RuntimeError("Connection closed by peer"), kills=True)
    assert len(waited) == 1 and capsys.readouterr().err == ""
    waited, file = fails(0, RuntimeError("out of memory"))
    assert len(waited) == 1 and isinstance(fails.raised, RuntimeError) and file.read_text() == "a traceback"


def test_debugging_shows_every_traceback_at_once(fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTHOUSE_DEBUG", "1")
    waited, file = fails(1, DataError("no data"))
    assert waited == [] and isinstance(fails.raised, DataError) and file.exists()


def test_a_bad_record_ends_a_run_of_two_ranks_with_one_line(tmp_path: Path) -> None:
    """In the middle of training, in a data worker of each."""
    texts = [{"text": f"{number} " + "some text " * 100} for number in range(12)]
    (tmp_path / "data").mkdir()
    lines = [*map(json.dumps, texts), '{"text": "cut sho', *map(json.dumps, texts)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    words = {"training__steps": "20", "training__dataset": "c4_local", "training__dataloader__num_workers": "1"}
    result = run(command(tmp_path / "run", 2, training__dataset_path=str(tmp_path / "data"), **words), check=False)
    said = (result.stdout + result.stderr).splitlines()
    ours = [line for line in said if "record 13 is no JSON" in line]
    assert len(ours) == 1 and ours[0].startswith(
        f"train: {tmp_path}/data/train.jsonl: record 13 is no JSON (JSONDecode"
    )
    assert losses(tmp_path / "run") and max(losses(tmp_path / "run")) < 20
    assert "exitcode  : 2" in result.stderr and "DataError" not in result.stderr
    after = result.stderr[result.stderr.index(ours[0]) :]
    assert after.count("Traceback (most recent call last)") == 1, "torchrun's own"
