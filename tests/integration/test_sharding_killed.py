"""Sharding killed anywhere goes on with the same command, keeps what was finished, and ends with the same bytes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from data_prep import storage
from data_prep.index import read_shard_set
from data_prep.storage import join
from tests.integration.servers import session_of
from tests.shared_data import ROOT
from tests.unit.data_prep.odd_files import encoded, photograph

pytestmark = pytest.mark.integration
NUM_SHARDS = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(4 * NUM_SHARDS):
        data = encoded(photograph(400, 400, seed=number), quality=95)
        storage.write_bytes(str(folder / f"{number:03d}.JPEG"), data)
    return str(folder)


def command(source, destination, cpus=1):
    code = f"""
import ray
from data_prep.shard import ShardSettings, make_shards
ray.init(num_cpus={cpus}, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
made = make_shards({source!r}, {destination!r}, ShardSettings(samples_per_shard=4))
print(made.digest)"""
    return [sys.executable, "-c", code]


def started(source, destination, **options):
    return subprocess.Popen(
        command(source, destination, **options),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )


def tars(destination):
    return {info.path: info.version for info in storage.list_files(destination) if info.path.endswith(".tar")}


def wait_for_tars(destination, count, process):
    end = time.monotonic() + 90
    while len(tars(destination)) < count and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert len(tars(destination)) >= count


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    destination = str(tmp_path_factory.mktemp("whole"))
    process = started(source, destination, cpus=2)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip().splitlines()[-1]


def finish(source, destination):
    process = started(source, destination)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip().splitlines()[-1]


def test_the_whole_node_dies(source, expected, tmp_path):
    """SIGKILL for the driver, Ray's servers and the workers, at once."""
    destination = str(tmp_path / "set")
    process = started(source, destination)
    wait_for_tars(destination, 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = tars(destination)
    assert not storage.exists(join(destination, "index.json"))
    assert finish(source, destination) == expected
    after = tars(destination)
    redone = [name for name, version in done.items() if after[name] != version]
    assert len(redone) <= 2  # a tar that was there without its sidecar: those in flight
    left = [path for path in os.listdir(destination) if path.startswith(".hatchery-tmp-")]
    assert left == []


def test_a_worker_dies(source, expected, tmp_path):
    """Ray runs its task again; the command itself does not fail."""
    destination = str(tmp_path / "set")
    process = started(source, destination)
    wait_for_tars(destination, 3, process)
    for pid in _running("complete_shard", process):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.strip().splitlines()[-1] == expected
    assert read_shard_set(destination).num_samples == 4 * NUM_SHARDS


def _running(word, process):
    """The processes of this driver's session that are at work on `word`, as soon as there are any."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if found := [pid for pid in session_of(process.pid) if word in _title(pid)]:
            return found
    raise AssertionError(f"no process of the driver ran {word}")


def _title(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""
