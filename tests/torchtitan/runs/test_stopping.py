"""What asks a run to stop, on one rank; `tests/faults` asks whole runs."""

import os
import signal

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
