"""From the training processes to the driver: a mailbox actor, and a thread that empties it.

Only the driver talks to MLflow and the terminal; workers need neither credentials nor a route to the server.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Record = dict[str, Any]
_LAST_TRIES = 10  # to get the last records


@ray.remote(num_cpus=0, max_task_retries=-1)  # a call that gets lost on its way is made again
class Mailbox:
    """Holds records (`{"step": int, "metrics": {...}, ...}`) until the driver says that it has them."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.forgotten = 0
        self.stop = False

    def post(self, record: Record) -> None:
        """Add one record; called by rank 0 without waiting."""
        self.records.append(record)

    def after(self, received: int) -> list[Record]:
        """All records but the first `received` ones, which are forgotten."""
        del self.records[: received - self.forgotten]
        self.forgotten = received
        return self.records

    def request_stop(self) -> None:
        """Ask the training to save a checkpoint and end."""
        self.stop = True

    def stop_requested(self) -> bool:
        """Whether the training is to end."""
        return self.stop


class StopWatch:
    """Asks the mailbox about once a second whether to stop, and never waits for the answer."""

    def __init__(self, mailbox: Any, interval_s: float = 1.0) -> None:
        self.mailbox = mailbox
        self.interval_s = interval_s
        self.asked_at = 0.0
        self.question: Any = None

    def poll(self) -> bool:
        """True once the driver has asked to stop."""
        now = time.monotonic()
        if self.question is None and now - self.asked_at > self.interval_s:
            self.question, self.asked_at = self.mailbox.stop_requested.remote(), now
        if self.question is not None and ray.wait([self.question], timeout=0)[0]:
            answer, self.question = ray.get(self.question), None
            return bool(answer)
        return False


class Monitor:
    """`with Monitor(handle) as monitor:` calls `handle(record)` in a thread for every record posted."""

    def __init__(self, handle: Callable[[Record], None], interval_s: float = 0.5) -> None:
        self.handle = handle
        self.interval_s = interval_s
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # beside the driver: on another node it would be lost with that node, and the run with it
        self.mailbox: Any = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="hatchery-monitor", daemon=True)
        self.error: Exception | None = None
        self.received = 0
        self.last_step = -1

    def __enter__(self) -> "Monitor":
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stopped.set()
        self.thread.join()
        if exc_info[0] is None and self.error is not None:
            raise self.error

    def request_stop(self) -> None:
        """Ask the training to save a checkpoint and end."""
        self.mailbox.request_stop.remote()
        note = "asked to stop: saving a checkpoint first (Ctrl-C, once more, ends at once)"
        self.handle({"step": max(self.last_step, 0), "warning": note})

    def _run(self) -> None:
        while not self.stopped.wait(self.interval_s):
            self._drain()
        for _ in range(_LAST_TRIES):
            self._drain()  # what was posted before the end
            if self.error is None or isinstance(self.error, ray.exceptions.ActorDiedError):
                return
            time.sleep(self.interval_s)

    def _drain(self) -> None:
        try:
            records = ray.get(self.mailbox.after.remote(self.received))
        except Exception as error:  # noqa: BLE001 - raised in the driver's thread at the end, unless it passes
            if self.error is None:
                self._warn(max(self.last_step, 0), f"the training's records cannot be had: {error}")
            self.error = error
            return
        self.error = None
        self.received += len(records)
        for record in records:
            self.last_step = max(self.last_step, record["step"])
            try:
                self.handle(record)
            except Exception as error:  # noqa: BLE001 - one record must not take others with it, nor end the training
                self._warn(record["step"], f"a record of step {record['step']} got lost: {error!r}")

    def _warn(self, step: int, text: str) -> None:
        """Show what went wrong here as any warning, at once."""
        with suppress(Exception):
            self.handle({"step": step, "warning": text})
