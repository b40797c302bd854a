"""How a run is asked to end: SIGTERM, the first Ctrl-C and a lost lock end it cleanly, in a training by a checkpoint.

A second Ctrl-C does not wait for one.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import Stopped

_at_once = threading.Event()
_runs: list["Asked"] = []  # the one of the `ending` that the main thread is in


class Asked:
    """Which signal has asked to end, if any."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that this signal ended: 143 or 130."""
        return 128 + (self.signal or signal.SIGTERM)


def ask() -> None:
    """Ask the main thread to end as a first Ctrl-C does: a training saves a checkpoint, all else is interrupted."""
    os.kill(os.getpid(), signal.SIGINT)


def interrupt() -> None:
    """End what the main thread does by KeyboardInterrupt, at once also where Ctrl-C would save a checkpoint first."""
    _at_once.set()
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def ending() -> Iterator[Asked]:
    """SIGTERM (a preempted node, `ray job stop`) and Ctrl-C interrupt the block wherever it is, and it ends by Stopped.

    Inside `asking` they do what that says; what they wish for holds afterwards. Outside of the main thread, where
    signals cannot be caught, nothing changes.
    """
    asked = Asked()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (_at_once.is_set() or asked.signal is not None):
            raise KeyboardInterrupt
        if asked.signal is None:
            asked.signal = number
            raise KeyboardInterrupt  # as such: what waits in Ray passes on no other

    with _handled_by(handle) as is_main:
        if not is_main:
            yield asked
            return
        _runs.append(asked)
        try:
            yield asked
        except KeyboardInterrupt:
            if asked.signal is None:
                raise
            raise _stopped(asked) from None
        finally:
            _runs.remove(asked)


def check() -> None:
    """Stopped where the run was asked to end but goes on: some libraries swallow interrupts."""
    if _runs and _runs[-1].signal is not None:
        raise _stopped(_runs[-1])


def _stopped(asked: Asked) -> Stopped:
    return Stopped("was asked to stop; what is finished is kept", asked.exit_code)


@contextmanager
def asking(ask: Callable[[], object]) -> Iterator[Asked]:
    """SIGTERM and the first Ctrl-C call `ask` in a thread, a second one interrupts.

    Who leaves the block with a signal that it did not answer is to end the run. Outside of the main thread nothing
    changes.
    """
    asked = _runs[-1] if _runs else Asked()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (_at_once.is_set() or asked.signal == signal.SIGINT):
            raise KeyboardInterrupt
        asked.signal = number
        # not from the handler itself: it may have interrupted Ray in the middle of a call
        threading.Thread(target=ask, daemon=True).start()

    with _handled_by(handle) as is_main:
        yield asked if is_main else Asked()


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[bool]:
    """Signals that ask to end are handled so inside; False where this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    _at_once.clear()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def kept() -> Iterator[None]:
    """What handles SIGTERM does so afterwards, too: `ray.init` puts a handler of its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
