"""Time and memory of the driver when it plans 1,281,167 and 14 million images; listings are synthetic.

    PYTHONPATH=. .venv/bin/python -m tests.bench.data_planning [NUMBER ...]

Each size runs in a process of its own, which does all that the driver of a sharding does but run tasks: list, spool,
hash, look for twins among sizes and probes, cut into shards, and gather the shards' lines of the index.
"""

import resource
import subprocess
import sys
import time

import numpy as np

from data_prep.duplicates import _has_twin
from data_prep.index import Shard, ShardSettings
from data_prep.plan import Plan
from data_prep.sources import Item

SIZES = (1_281_167, 14_000_000)


def listing(count):
    """Items as ImageNet's: 1,300 images a class, about 110 kB each, in a bucket."""
    for number in range(count):
        path = f"n{number // 1300:08d}/n{number // 1300:08d}_{number % 1300}.JPEG"
        version = f"{number * 2654435761 % 2**128:032x}"
        yield Item(path.replace(".", "%2E"), f"s3://datasets/imagenet/train/{path}", 60_000 + number % 100_003, version)


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plan(count):
    before, start = peak_mb(), time.monotonic()
    with Plan(listing(count), ShardSettings(samples_per_shard=1024)) as made:
        listed = time.monotonic() - start
        sizes = np.fromiter((item.size for item in made.items()), np.int64, count)
        twins = int(_has_twin(sizes).sum())
        probes = np.random.default_rng(0).integers(0, 2**64, twins, np.uint64)
        _has_twin(probes)
        lines = []
        for shard in made.shards():
            digest = shard.digest
            lines.append(
                Shard(name=shard.name, count=1024, bytes=1, sha256=digest, sidecar_sha256=digest[::-1], min_side_px=256)
            )
    total = time.monotonic() - start
    print(
        f"{count} images: listed and spooled in {listed:.0f} s, all in {total:.0f} s ({total / count * 1e6:.1f} us an "
        f"image), {len(lines)} shards, peak {peak_mb():.0f} MB, of which {before:.0f} MB before",
        flush=True,
    )


def main():
    if sys.argv[1:2] == ["--one"]:
        plan(int(sys.argv[2]))
        return
    for count in [int(argument) for argument in sys.argv[1:]] or SIZES:
        subprocess.run([sys.executable, "-m", "tests.bench.data_planning", "--one", str(count)], check=True)


if __name__ == "__main__":
    main()
