"""Megabytes per second per core of sharding, against the plain limit, into a folder and into a real S3 server.

    PYTHONPATH=. .venv/bin/python -m tests.bench.data_sharding

The plain limit does with each image just what must be done: read it, decode it whole with Pillow, hash it, write it
into a tar, hash the tar. Both sides run on one thread and take turns; CPU seconds of the process are compared, since
other programs share the machine, and the server's are not in them. For S3 the clock is given as well.
"""

import hashlib
import io
import itertools
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from data_prep import storage
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.sources import list_items
from tests.faulty_proxy import Faults, faulty_proxy
from tests.s3_server import s3_server
from tests.shared_data import shared

ROUNDS = 5
DELAY_S, DELAY_FLOOR = 0.03, 0.8
SETTINGS = ShardSettings(samples_per_shard=167)


def plain(plan, destination):
    path = Path(tempfile.mkdtemp()) / "plain.tar"
    with tarfile.open(path, "w") as tar:
        for item in plan.items:
            data = storage.read_bytes(item.uri)
            Image.open(io.BytesIO(data)).load()
            hashlib.sha256(data).hexdigest()
            header = tarfile.TarInfo(item.key)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    storage.sha256_of(str(path))
    storage.upload(path, storage.join(destination, "plain.tar"))
    path.unlink()


def measure(name, destination):
    plans = plan_shards(list_items(str(shared("data/imagenet-sample/train"))), SETTINGS)
    megabytes = sum(item.size for plan in plans for item in plan.items) / 1e6
    sides = {"plain": plain, "sharding": write_shard}
    write_shard(plans[0], destination)  # compiles
    cpu, clock = {side: [] for side in sides}, {side: [] for side in sides}
    for _, (side, call) in itertools.product(range(ROUNDS), sides.items()):
        start, start_cpu = time.monotonic(), time.process_time()
        for plan in plans:
            call(plan, destination)
        cpu[side].append(megabytes / (time.process_time() - start_cpu))
        clock[side].append(megabytes / (time.monotonic() - start))
    ratio = statistics.median(a / b for a, b in zip(cpu["sharding"], cpu["plain"], strict=True))
    print(
        f"{name}: plain {statistics.median(cpu['plain']):.0f} MB/s, sharding {statistics.median(cpu['sharding']):.0f} "
        f"MB/s of CPU time: {ratio:.2f} x plain; by the clock {statistics.median(clock['plain']):.0f} and "
        f"{statistics.median(clock['sharding']):.0f} MB/s",
        flush=True,
    )


def measure_delay(server):
    """Sharding from S3 into a folder, by the clock, through a proxy with and without a delay."""
    images = list_items(str(shared("data/imagenet-sample/train")))[:192]
    for item in images:
        storage.upload(item.uri, storage.join(server.uri, "source", item.path))
    (plan,) = plan_shards(list_items(storage.join(server.uri, "source")), ShardSettings())
    clock = {0.0: [], DELAY_S: []}
    for _, delay_s in itertools.product(range(ROUNDS), clock):
        with tempfile.TemporaryDirectory() as folder, faulty_proxy(server.endpoint, Faults(0, delay_s=delay_s)):
            storage.exists(storage.join(server.uri, "x"))  # connects
            start = time.monotonic()
            write_shard(plan, folder)
            clock[delay_s].append(time.monotonic() - start)
    ratio = statistics.median(near / far for near, far in zip(*clock.values(), strict=True))
    near, far = map(statistics.median, clock.values())
    print(
        f"from S3, {len(images)} images: {near:.2f} s, with {DELAY_S * 1e3:.0f} ms before every answer {far:.2f} s: "
        f"{ratio:.2f} of the speed (floor {DELAY_FLOOR})",
        flush=True,
    )
    return ratio >= DELAY_FLOOR


def main():
    with tempfile.TemporaryDirectory() as folder:
        measure("folder", folder)
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as server:
        measure("S3 server", server.uri)
        return 0 if measure_delay(server) else 1


if __name__ == "__main__":
    sys.exit(main())
