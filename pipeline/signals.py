"""How a training is asked to end: SIGTERM, Ctrl-C and a lost lock wait for a checkpoint, a second Ctrl-C does not."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_at_once = threading.Event()


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
def asking(ask: Callable[[], object]) -> Iterator[Asked]:
    """SIGTERM (a preempted node, `ray job stop`) and the first Ctrl-C call `ask` in a thread, a second one interrupts.

    Outside of the main thread, where signals cannot be caught, nothing changes.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and (_at_once.is_set() or asked.signal == signal.SIGINT):
            raise KeyboardInterrupt
        asked.signal = number
        # not from the handler itself: it may have interrupted Ray in the middle of a call
        threading.Thread(target=ask, daemon=True).start()

    _at_once.clear()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
