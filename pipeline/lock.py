"""A lock in the storage: two runs that would write the same place refuse or await each other, on whatever machines.

The lock is a small file that its owner rewrites every few seconds. Whether an owner is alive is judged by watching
that file change, never by comparing clocks of two machines; one that died on this machine is known at once. It is
rewritten and taken over by whoever has seen what it holds, and by nobody else where the storage compares ETags: a
request that hung and arrives late does nothing. Elsewhere two may own it for a while. Then what they write is apart
(`pipeline.checkpoint`, `pipeline.artifact`), and the one that lost the lock ends.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import psutil

from data_prep import storage
from pipeline import signals

HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0  # longer than a sign of life that fails and the one after it: each is a heartbeat and a request
CHECK_PATIENCE_S = 600.0
END_WITHIN_S = 900.0
_RELEASE_ATTEMPTS = 5
_BEING_WRITTEN_S = 2.0  # how long an empty file may still be a lock that is being written


class LockedError(ValueError):
    """Another run holds the lock, or has taken it over; the message says who."""


class StorageLock:
    """`with StorageLock(uri, purpose):` holds the lock file at `uri`; LockedError where a living run holds it.

    say: told, in words, of waiting for an owner and of taking over the lock of a dead one.
    heartbeat_s: time between two signs of life; stale_after_s: silence after which an owner counts as dead.
    patience_s: how long a living owner is waited for before it is LockedError; 0: not at all.
    If the lock is lost all the same (this process slept longer than stale_after_s and another run took it over, or
    something else was written to `uri`), the main thread is asked to end as by Ctrl-C (a training saves a checkpoint
    first), after END_WITHIN_S it is interrupted, and the block ends with LockedError.
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
        self.version = ""
        self.seen_at = time.monotonic()  # when the storage last said that the lock is ours
        self.renewing = threading.Lock()
        self.lost: LockedError | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="hatchery-lock", daemon=True)

    def __enter__(self) -> "StorageLock":
        until = time.monotonic() + self.patience_s
        while not self.version:
            self.version = (self._create() or self._take_over_or_refuse(until)) or ""
        self.seen_at = time.monotonic()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.done.set()
        self.thread.join()
        if self.lost is not None:
            raise self.lost
        self._release()

    def _release(self) -> None:
        """Delete the file; where it cannot be, it is a dead owner's lock when this process has ended."""
        for _ in range(_RELEASE_ATTEMPTS):
            with suppress(storage.StorageError):
                return storage.delete_version(self.uri, self.version)
            time.sleep(self.heartbeat_s)
        return self.say(f"{self.uri} stays behind: the storage is out of reach")

    @property
    def token(self) -> str:
        """A word of this holding of the lock alone, for names of what its owner writes."""
        return str(self.record["token"])[:8]

    def check(self) -> None:
        """LockedError unless the lock is this run's at this moment; StorageError where that cannot be known."""
        deadline = time.monotonic() + CHECK_PATIENCE_S
        while True:
            if self.lost is not None:
                raise self.lost
            try:
                return self._renew()
            except LockedError as error:
                self.lost = error
                raise
            except storage.StorageError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(self.heartbeat_s)

    def _content(self) -> bytes:
        return json.dumps(self.record, indent=1).encode()

    def _create(self) -> str | None:
        """The lock's version where there was no file, else None."""
        if not storage.put_if_absent(self.uri, self._content()):
            return None
        found = self._read_file()
        return found[1] if found is not None and found[0] == self._content() else None

    def _read(self) -> dict[str, Any] | None:
        """What the lock file says; None where there is none."""
        found = self._read_file()
        return None if found is None else self._parsed(found[0])

    def _parsed(self, content: bytes) -> dict[str, Any]:
        try:
            record = json.loads(content)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not self.record.keys() <= record.keys():
            raise LockedError(f"{self.uri} is not a lock file: delete it if no run uses this storage")
        return record

    def _read_file(self) -> tuple[bytes, str] | None:
        """Content and version; where there are no hard links, it is empty for a moment before its owner has written."""
        until = time.monotonic() + _BEING_WRITTEN_S
        while True:
            found = storage.read_versioned(self.uri)
            if found is None or found[0] or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def _take_over_or_refuse(self, until: float) -> str | None:
        """The lock's version where it was a dead one's and is ours, None where it is free to be tried again.

        LockedError where its owner lives beyond `until`.
        """
        seen = self._read()
        if seen is None:
            return None
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
        found = self._read_file()
        if seen is None or found is None or _life(self._parsed(found[0])) != _life(seen):
            return None
        version = storage.replace(self.uri, self._content(), found[1])
        if version is not None:
            self.say(f"taking over the lock of {seen['owner']} ({seen['purpose']}, since {seen['since']}): it is dead")
        return version

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
                self._renew()
            except storage.StorageError:
                continue  # the storage is away for now; what writes results says so if it stays away
            except LockedError as error:
                self._lose(error)
                return

    def _renew(self) -> None:
        """A sign of life. LockedError where the lock is another's."""
        with self.renewing:
            self.record["beat"] += 1
            begin = time.monotonic()
            version = storage.replace(self.uri, self._content(), self.version)
            self.version = version or self._found_again()
            self.seen_at = begin

    def _found_again(self) -> str:
        """The version of the file where it is ours all the same; LockedError where it is not."""
        found = self._read_file()
        if found is None and time.monotonic() - self.seen_at < self.stale_after_s:  # nobody can have had it since
            return self._create() or self._found_again()
        if found is None:
            raise LockedError(f"{self.uri} was deleted while this run was silent: another may have had it")
        record = self._parsed(found[0])
        if record["token"] != self.record["token"]:
            raise LockedError(
                f"{self.uri} was taken over by {record['owner']} while this run was silent: stop one of both"
            )
        return found[1]  # by a request whose answer was lost

    def _lose(self, error: LockedError) -> None:
        self.lost = error
        if self.done.is_set():
            return
        self.say(str(error))
        signals.ask()
        if not self.done.wait(END_WITHIN_S):
            signals.interrupt()


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
