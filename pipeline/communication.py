"""Time spent in DeepSpeed's collectives, sampled: one step of each window is timed, the others run undisturbed."""

import time

from pipeline.deepspeed import comm


class _Stopwatch:
    """Stands in for DeepSpeed's timers and for its log of collectives: one sum for all, whatever they are called.

    Its own keep every call that they have timed, for ever, and tell the sum of all at each of them.
    """

    enabled, prof_all, prof_ops, debug = True, True, (), False  # what DeepSpeed asks its log

    def __init__(self) -> None:
        self.total_s = 0.0
        self.begin = 0.0
        self.depth = 0  # a collective may call another one, and counts once

    def __call__(self, name: str) -> "_Stopwatch":
        """The timer of a name."""
        return self

    def start(self) -> None:
        """A collective begins: what was queued on the device before is waited for, so that it does not count."""
        if self.depth == 0:
            comm.get_accelerator().synchronize()
            self.begin = time.perf_counter()
        self.depth += 1

    def stop(self) -> None:
        """It has ended; DeepSpeed has waited for the device."""
        self.depth -= 1
        if self.depth == 0:
            self.total_s += time.perf_counter() - self.begin

    def elapsed(self, reset: bool) -> float:
        """For the log, which here keeps nothing."""
        return 0.0

    def append(self, *call: object) -> None:
        """As the log; DeepSpeed's own ends the process at a collective that it does not know."""


class CommunicationProbe:
    """Times the collectives between `begin` and `end`; on a GPU each is waited for meanwhile."""

    def __init__(self) -> None:
        self.own = comm.timers, comm.comms_logger
        self.watch = _Stopwatch()

    def begin(self) -> None:
        """Start timing."""
        self.watch.total_s, self.watch.depth = 0.0, 0
        comm.timers = comm.comms_logger = self.watch

    def end(self) -> float:
        """Seconds in collectives since `begin`, waiting for slower ranks included."""
        comm.timers, comm.comms_logger = self.own
        return self.watch.total_s
