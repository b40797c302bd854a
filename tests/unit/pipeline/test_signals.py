"""Asking a training to end: first by a checkpoint, then at once."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray.train

from pipeline import cluster, lock, signals
from pipeline.config import ComputeConfig
from pipeline.errors import Stopped
from pipeline.launch import _Trainer
from pipeline.lock import LockedError, StorageLock
from tests.unit.pipeline.test_lock import edit


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks(number: int, code: int) -> None:
    before = signal.getsignal(number)
    called = threading.Event()
    with signals.asking(called.set) as asked:
        assert asked.signal is None
        send(number)
        assert called.wait(5)
        assert asked.exit_code == code
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_ends_at_once() -> None:
    calls: list[int] = []
    with signals.asking(lambda: calls.append(1)):
        send(signal.SIGTERM)
        send(signal.SIGINT)  # asks as well: whoever sits there has not been told yet
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert len(calls) == 2


def test_an_interrupt_does_not_wait_for_a_checkpoint() -> None:
    calls: list[int] = []

    def interrupted() -> None:
        signals.interrupt()
        time.sleep(5)

    with signals.asking(lambda: calls.append(1)), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_a_run_waits_for(number: int, code: int) -> None:
    before, begin = signal.getsignal(number), time.monotonic()
    threading.Timer(0.5, os.kill, [os.getpid(), number]).start()
    with pytest.raises(Stopped, match="was asked to stop") as stopped, signals.ending():
        time.sleep(20)
    assert stopped.value.exit_code == code
    assert time.monotonic() - begin < 5
    assert signal.getsignal(number) is before


def test_a_wish_to_stop_outlives_the_training_and_who_swallows_it() -> None:
    with signals.ending() as run:
        with signals.asking(lambda: None) as asked:
            send(signal.SIGTERM)
        assert (run.signal, asked.signal) == (signal.SIGTERM, signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            signals.check()
        assert stopped.value.exit_code == 143
    with signals.ending():
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # nothing more: it is ending already
        with pytest.raises(Stopped):
            signals.check()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    signals.check()


def test_ray_leaves_signals_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` would end the process by sys.exit(15) from then on."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    with pytest.raises(Stopped), signals.ending(), cluster.connected(ComputeConfig(), "local", debug=False):
        send(signal.SIGTERM)


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside: list[Any] = []

    def work() -> None:
        with signals.asking(lambda: None):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def trainer(folder: Path, work: Any) -> _Trainer:
    config = ray.train.RunConfig(name="t", storage_path=str(folder))
    return _Trainer(work, scaling_config=ray.train.ScalingConfig(num_workers=1), run_config=config)


def lose(place: Path) -> None:
    edit(str(place), token="other", owner="somebody@else")


def test_a_lock_lost_in_a_training_asks_for_a_checkpoint(tmp_path: Path) -> None:
    place, asked, told = tmp_path / "lock.json", threading.Event(), []

    def train() -> None:
        with StorageLock(str(place), "mine", told.append, heartbeat_s=0.1), signals.asking(asked.set):
            lose(place)
            assert asked.wait(10)  # and goes on to save, undisturbed
            time.sleep(0.5)
            told.append("saved")

    with pytest.raises(LockedError, match="was taken over by somebody@else"):
        train()
    assert "was taken over by somebody@else" in told[0]
    assert told[1:] == ["saved"]


def test_a_lock_lost_in_a_training_and_after_it_ends_the_run(
    ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that does not stop when it is asked to is interrupted later."""
    monkeypatch.setattr(lock, "END_WITHIN_S", 1)
    before = signal.getsignal(signal.SIGINT)
    place = tmp_path / "lock.json"

    def after() -> None:
        with StorageLock(str(place), "mine", heartbeat_s=0.1):
            with signals.asking(lambda: None):
                trainer(tmp_path / "runs", lambda: None).fit()
            assert signal.getsignal(signal.SIGINT) is before
            lose(place)
            time.sleep(20)

    def during() -> None:
        with StorageLock(str(place), "mine", heartbeat_s=0.1), signals.asking(lambda: None):
            threading.Timer(6, lose, [place]).start()
            trainer(tmp_path / "more", lambda: time.sleep(600)).fit()

    for work in (after, during):
        place.unlink(missing_ok=True)
        with pytest.raises(LockedError, match="was taken over by somebody@else"):
            work()
