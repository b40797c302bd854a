"""Two runs that would write one place: one holds the lock, the other refuses, waits or takes over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep import s3 as objects
from data_prep import storage
from pipeline import lock
from pipeline.lock import LockedError, StorageLock
from tests.shared_data import ROOT

HOLD = """
import sys, time
from pipeline.lock import StorageLock
with StorageLock(sys.argv[1], "stage pretrain-x2", heartbeat_s=0.2):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "locks" / "pretrain-x2.json")


@pytest.fixture
def holder(place):
    process = subprocess.Popen([sys.executable, "-c", HOLD, place], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def edit(place, **changes):
    overwrite(place, json.dumps(json.loads(Path(place).read_text()) | changes).encode())


def overwrite(place, content):
    """Write until it stays: a sign of life of the lock's owner may have been on its way."""
    while Path(place).read_bytes() != content:
        storage.write_bytes(place, content)
        time.sleep(0.25)


def test_one_after_the_other(place):
    with StorageLock(place, "first"):
        assert Path(place).exists()
    assert not Path(place).exists()
    with StorageLock(place, "second"):
        assert json.loads(Path(place).read_text())["purpose"] == "second"


def test_a_living_owner_is_named(place, holder):
    with pytest.raises(LockedError, match=rf"stage pretrain-x2 is being run by .*process {holder.pid} since .*storage"):
        StorageLock(place, "mine").__enter__()
    assert json.loads(Path(place).read_text())["pid"] == holder.pid


def test_a_living_owner_is_waited_for_as_long_as_patience_lasts(place, holder):
    told = []
    begin = time.monotonic()
    with pytest.raises(LockedError, match="is being run by"):
        StorageLock(place, "mine", told.append, patience_s=1.5).__enter__()
    assert time.monotonic() - begin >= 1.5
    assert told[0].startswith("waiting for ")
    assert "to end stage pretrain-x2" in told[0]
    threading.Timer(1, Path(place).unlink).start()  # the owner ends
    with StorageLock(place, "mine", patience_s=60):
        assert json.loads(Path(place).read_text())["purpose"] == "mine"


def test_an_owner_that_dies_while_it_is_waited_for_is_followed(place, holder):
    told = []
    threading.Timer(1, holder.kill).start()
    waiter = threading.Thread(target=holder.wait)
    waiter.start()
    with StorageLock(place, "mine", told.append, patience_s=60):
        pass
    waiter.join()
    assert [line.split()[0] for line in told] == ["waiting", "taking"]


def test_an_owner_that_was_killed_on_this_machine_is_followed_at_once(place, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    told = []
    begin = time.monotonic()
    with StorageLock(place, "mine", told.append):
        assert time.monotonic() - begin < 5
    assert len(told) == 1
    assert "taking over the lock of" in told[0]


def test_a_silent_owner_elsewhere_is_waited_for_and_then_followed(place, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    edit(place, machine="another one")
    told = []
    begin = time.monotonic()
    with StorageLock(place, "mine", told.append, heartbeat_s=0.1, stale_after_s=1.0):
        assert time.monotonic() - begin >= 1.0
    assert "silent" in told[0]
    assert "taking over" in told[1]


def test_a_reused_process_number_is_not_the_owner(place, holder):
    holder.kill()
    holder.wait()
    edit(place, pid=os.getpid())
    with StorageLock(place, "mine"):
        pass


def test_of_many_takers_one_wins(place, holder):
    holder.kill()
    holder.wait()
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, place], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(3)
    ]
    try:
        end = time.monotonic() + 30
        while sum(taker.poll() is None for taker in takers) > 1:
            assert time.monotonic() < end, "two processes hold one lock"
            time.sleep(0.05)
        (winner,) = [taker for taker in takers if taker.poll() is None]
        assert winner.stdout.readline() == b"held\n"
    finally:
        for taker in takers:
            taker.kill()
            taker.wait()


def test_a_lost_lock_interrupts_its_owner(place):
    def lose() -> None:
        with StorageLock(place, "mine", heartbeat_s=0.1):
            edit(place, token="other", owner="somebody@else")
            time.sleep(10)

    with pytest.raises(LockedError, match="was taken over by somebody@else"):
        lose()
    assert json.loads(Path(place).read_text())["token"] == "other"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"5"])
def test_a_lock_that_was_overwritten_interrupts_its_owner(place, content):
    def lose() -> None:
        with StorageLock(place, "mine", heartbeat_s=0.1):
            overwrite(place, content)
            time.sleep(10)

    with pytest.raises(LockedError, match="is not a lock file: delete it"):
        lose()
    assert Path(place).read_bytes() == content


def test_an_empty_file_is_a_lock_that_is_being_written(place, holder):
    """Where there are no hard links the file is there before its record."""
    record = Path(place).read_bytes()
    holder.send_signal(signal.SIGSTOP)
    Path(place).write_bytes(b"")

    def goes_on() -> None:
        Path(place).write_bytes(record)
        holder.send_signal(signal.SIGCONT)

    threading.Timer(0.5, goes_on).start()
    with pytest.raises(LockedError, match="stage pretrain-x2 is being run by"):
        StorageLock(place, "mine").__enter__()


def test_what_is_no_lock_file_is_left_alone(place):
    Path(place).parent.mkdir()
    Path(place).write_text("hello")
    with pytest.raises(LockedError, match="is not a lock file: delete it"):
        StorageLock(place, "mine").__enter__()
    assert Path(place).read_text() == "hello"


@pytest.fixture(params=["disk", "S3", "S3 without ETags"])
def anywhere(request, tmp_path):
    """A place for a lock; the third server takes every put, as older ones do."""
    if request.param == "disk":
        yield str(tmp_path / "lock.json")
        return
    place = f"{request.getfixturevalue('s3').uri}/{request.node.name}/lock.json"
    events = objects._short_client("test").meta.events
    operations = ("before-sign.s3.PutObject", "before-sign.s3.DeleteObject") if request.param != "S3" else ()
    for operation in operations:
        events.register(operation, ignore_tags, unique_id=operation)
    objects._compares_tags.cache_clear()
    yield place
    known = (*place.removeprefix("s3://").split("/", 1), os.getpid(), tuple(objects.environment().items()))
    assert objects._compares_tags(*known) == (request.param == "S3")
    objects._compares_tags.cache_clear()
    for operation in operations:
        events.unregister(operation, unique_id=operation)


def ignore_tags(request, **_):
    del request.headers["If-Match"]


def silenced(place, **options):
    """A lock that is held, and rewritten no more."""
    held = StorageLock(place, "the first", heartbeat_s=60, **options)
    return held.__enter__()


def test_a_sign_of_life_that_arrives_late_overwrites_nobody(anywhere):
    """The owner was out of reach for long; what it sends then must not look as if it still had the lock."""
    first = silenced(anywhere)
    said = []
    with StorageLock(anywhere, "the second", said.append, heartbeat_s=0.2, stale_after_s=1.0) as second:
        assert "taking over the lock of" in said[-1]
        with pytest.raises(LockedError, match=r"was taken over by .* while this run was silent"):
            first.check()
        with pytest.raises(LockedError, match="was taken over by"):
            first.__exit__(None, None, None)
        second.check()
        assert json.loads(storage.read_bytes(anywhere))["purpose"] == "the second"
    assert not storage.exists(anywhere)
    assert [file.path for file in storage.list_files(anywhere.rpartition("/")[0])] == []  # no probe either


def test_an_answer_that_was_lost_loses_no_lock(anywhere):
    """The request was done all the same: the file has a version that its owner does not know."""
    with StorageLock(anywhere, "mine", heartbeat_s=60) as held:
        held.record["beat"] += 1
        assert storage.replace(anywhere, held._content(), held.version)
        held.check()
        held.check()


def test_a_lock_that_was_deleted_is_made_again_unless_another_may_have_had_it(place):
    with StorageLock(place, "mine", heartbeat_s=60) as held:
        storage.delete(place)
        held.check()
        assert json.loads(Path(place).read_text())["token"] == held.record["token"]
        storage.delete(place)
        held.seen_at -= held.stale_after_s
        with pytest.raises(LockedError, match="was deleted while this run was silent"):
            held.check()
        held.lost = None


def test_a_storage_that_is_away_at_the_end_leaves_a_lock_and_says_so(place, monkeypatch):
    def away(*told):
        raise storage.StorageError("away")

    said = []
    monkeypatch.setattr(storage, "delete_version", away)
    with StorageLock(place, "mine", said.append, heartbeat_s=0.01):
        pass
    assert said == [f"{place} stays behind: the storage is out of reach"]


def test_of_two_that_have_seen_the_same_one_replaces_it(anywhere):
    storage.write_bytes(anywhere, b"one")
    content, version = storage.read_versioned(anywhere)
    assert content == b"one"
    made = storage.replace(anywhere, b"two", version)
    assert made == storage.read_versioned(anywhere)[1] != version
    assert storage.replace(anywhere, b"three", version) is None
    storage.delete_version(anywhere, version)
    assert storage.read_bytes(anywhere) == b"two"
    storage.delete_version(anywhere, made)
    assert storage.replace(anywhere, b"three", made) is None
    assert storage.read_versioned(anywhere) is None


def test_an_owner_counts_as_dead_after_more_than_the_longest_sign_of_life(s3):
    config = objects._short_client("test").meta.config
    tries = config.retries["total_max_attempts"]
    assert tries * (config.connect_timeout + config.read_timeout) < objects.SHORT_REQUEST_S
    assert 2 * (lock.HEARTBEAT_S + objects.SHORT_REQUEST_S) < lock.STALE_AFTER_S  # one that fails, and the next
