"""What asks a run to stop, on one rank and on two; `tests/faults` asks whole runs."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from torchtitan.experiments.lighthouse.runs.stopping import STOP_FILE, Requests

CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The one that asks a run to stop, not there yet."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    # Where a signal is not caught, a test is to fail, not to end.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in CAUGHT}
    yield tmp_path / "stop"
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_stops_after_the_step_and_one_more_and_a_second_one_at_once(number, file):
    requests = Requests(1)
    assert requests.exchange() == (False, False)
    os.kill(os.getpid(), number)
    assert requests.exchange() == (False, False)
    assert requests.exchange() == (True, False)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert all(signal.getsignal(other) == signal.SIG_DFL for other in (signal.SIGTERM, signal.SIGUSR1))


def test_so_does_a_file_and_a_save_is_asked_for_alike(file):
    requests = Requests(1)
    requests.exchange(save=True)
    file.touch()
    assert requests.exchange() == (False, True)
    assert requests.exchange() == (True, False)


def _exchange_twice(rank: int, folder: Path, patience: float, late: float) -> list[tuple[bool, bool]]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    requests = Requests(patience)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(late)
    return [requests.exchange(), requests.exchange()]


def on_two_ranks(*arguments: Path | float) -> list[Future]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as ranks:
        return [ranks.submit(_exchange_twice, rank, *arguments) for rank in range(2)]


def test_both_ranks_stop_after_the_same_step_however_late_one_of_them_is(tmp_path):
    assert [rank.result() for rank in on_two_ranks(tmp_path, 60.0, 0.5)] == [[(False, False), (True, False)]] * 2


def test_a_rank_that_does_not_answer_is_waited_for_as_long_as_was_said(tmp_path):
    first, _ = on_two_ranks(tmp_path, 0.3, 2.0)
    assert isinstance(first.exception(), RuntimeError)
