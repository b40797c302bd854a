"""A lock in the storage: two runs that would write the same place refuse or await each other, on whatever machines.

The lock is a small file that its owner rewrites every few seconds. Whether an owner is alive is judged by watching
that file change, never by comparing clocks of two machines; one that died on this machine is known at once.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import psutil

from data_prep import storage
from pipeline import signals

HEARTBEAT_S = 5.0
STALE_AFTER_S = 30.0
_BEING_WRITTEN_S = 2.0  # how long an empty file may still be a lock that is being written


class LockedError(ValueError):
    """Another run holds the lock, or has taken it over; the message says who."""


class StorageLock:
    """`with StorageLock(uri, purpose):` holds the lock file at `uri`; LockedError where a living run holds it.

    say: told, in words, of waiting for an owner and of taking over the lock of a dead one.
    heartbeat_s: time between two signs of life; stale_after_s: silence after which an owner counts as dead.
    patience_s: how long a living owner is waited for before it is LockedError; 0: not at all.
    If the lock is lost all the same (this process slept longer than stale_after_s and another run took it over, or
    something else was written to `uri`), the main thread is interrupted and the block ends with LockedError.
    """

    def __init__(
        self,
        uri: str,
        purpose: str,
        say: Callable[[str], None] = lambda text: None,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        stale_after_s: float = STALE_AFTER_S,
        patience_s: float = 0,
    ) -> None:
        self.uri = uri
        self.say = say
        self.heartbeat_s = heartbeat_s
        self.stale_after_s = stale_after_s
        self.patience_s = patience_s
        self.record: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "purpose": purpose,
            **this_process(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "beat": 0,
        }
        self.lost: LockedError | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="hatchery-lock", daemon=True)

    def __enter__(self) -> "StorageLock":
        until = time.monotonic() + self.patience_s
        while not storage.put_if_absent(self.uri, self._content()):
            self._take_over_or_refuse(until)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        if self.lost is not None:
            raise self.lost
        held = self._read()
        if held is not None and held["token"] == self.record["token"]:
            storage.delete(self.uri)

    def _content(self) -> bytes:
        return json.dumps(self.record, indent=1).encode()

    def _read(self) -> dict[str, Any] | None:
        """What the lock file says; None where there is none."""
        content = self._read_bytes()
        if content is None:
            return None
        try:
            record = json.loads(content)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not self.record.keys() <= record.keys():
            raise LockedError(f"{self.uri} is not a lock file: delete it if no run uses this storage")
        return record

    def _read_bytes(self) -> bytes | None:
        """The lock file; where there are no hard links, it is empty for a moment before its owner has written it."""
        until = time.monotonic() + _BEING_WRITTEN_S
        while True:
            try:
                content = storage.read_bytes(self.uri)
            except storage.StorageError:
                if storage.exists(self.uri):
                    raise
                return None
            if content or time.monotonic() > until:
                return content
            time.sleep(0.05)

    def _take_over_or_refuse(self, until: float) -> None:
        """Return where the lock is free to be tried again; LockedError where its owner lives beyond `until`."""
        seen = self._read()
        if seen is None:
            return
        if self.patience_s and not died_here(seen):
            hours = f"{self.patience_s / 3600:.2g} h"
            self.say(f"waiting for {seen['owner']} to end {seen['purpose']}, for {hours} at most")
        while seen is not None and not died_here(seen):
            heard = self._watch(seen)
            if heard == seen:
                break
            if heard is not None and time.monotonic() >= until:
                raise LockedError(
                    f"{heard['purpose']} is being run by {heard['owner']} since {heard['since']} ({self.uri}): "
                    f"wait until it ends, or give this run another storage.uri"
                )
            seen = heard
        found = self._read()
        if seen is not None and found is not None and _life(found) == _life(seen):
            self.say(f"taking over the lock of {seen['owner']} ({seen['purpose']}, since {seen['since']}): it is dead")
            storage.delete(self.uri)

    def _watch(self, seen: dict[str, Any]) -> dict[str, Any] | None:
        """The lock's record as soon as it changes, None where it is gone; the same one where its owner is dead."""
        begin, told = time.monotonic(), False
        while time.monotonic() - begin < self.stale_after_s:
            time.sleep(min(self.heartbeat_s, 1.0) / 4)
            now = self._read()
            if now is None or _life(now) != _life(seen):
                return now
            if died_here(now):
                break
            if not told and time.monotonic() - begin > 2 * self.heartbeat_s:
                told = True
                self.say(f"{seen['owner']} holds {self.uri} but is silent: waiting {self.stale_after_s:.0f} s")
        return seen

    def _beat(self) -> None:
        while not self.done.wait(self.heartbeat_s):
            try:
                found = self._read()
                if found is not None and found["token"] != self.record["token"]:
                    raise LockedError(
                        f"{self.uri} was taken over by {found['owner']} while this run was silent: stop one of both"
                    )
                self.record["beat"] += 1
                storage.write_bytes(self.uri, self._content())
            except storage.StorageError:
                continue  # the storage is away for now; what writes results says so if it stays away
            except LockedError as error:
                self.lost = error
                signals.interrupt()
                return


def _life(record: dict[str, Any]) -> tuple[str, int]:
    """What changes with every sign of life and every owner."""
    return record["token"], record["beat"]


def this_process() -> dict[str, Any]:
    """What a lock's record says of its owner: for people, and for `died_here`."""
    return {
        "owner": f"{os.environ.get('USER', 'root')}@{socket.gethostname()}, process {os.getpid()}",
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }


def died_here(record: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if record["machine"] != _machine():
        return False
    try:
        return bool(abs(psutil.Process(record["pid"]).create_time() - record["process_started"]) > 1)
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Names this boot of this machine and its process numbers: containers may share a host name, but not this."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
