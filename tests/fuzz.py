"""Mutated JPEGs, seek points, tars and indexes: whatever they hold, the answer is right, or a ValueError.

    python -m tests.fuzz [--seconds 60] [--seed 0]

Compiled loops check every index here, which they do not in use, and the process may take no more than `_MEMORY_BYTES`.
A failure prints its kind and seed, by which `--seed` shows it again, and leaves the files in the temporary folder; one
that hangs leaves them in `hatchery-fuzz-*`, with its kind and seed in `turn`.
"""

import argparse
import faulthandler
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

_MEMORY_BYTES = 6 * 2**30
_SLOW_S = 60.0  # of the processor; the first ones of a kind compile
_HANG_S = 600.0


def jpegs(random, folder):
    """A mutated file: pixels are Pillow's, or there are none."""
    import numpy as np

    from data_prep import jpeg, jpeg_header
    from data_prep.image import Box, Picture, check, decode
    from data_prep.jpeg_scans import is_whole
    from tests.unit.data_prep.odd_jpegs import MUTATIONS, boundaries, pillows, source

    data = source(random)
    for name in random.choice(list(MUTATIONS), random.integers(1, 5)):
        if len(boundaries(data)) > 1:
            data = MUTATIONS[name](data, random)
    (folder / "input").write_bytes(data)
    assert is_whole(data) in (True, False, None)
    reference, header = pillows(data), jpeg_header.parse(data)
    if header and header.height * header.width < 10**6:
        seek = jpeg.seek_points(data, header) or b""
        for points in (b"", seek, _forged(seek, random)):
            region = jpeg.region(data, header, 0, 0, header.height, header.width, points)
            if points in (b"", seek) and region is not None and reference is not None:
                assert np.array_equal(region.transpose(1, 2, 0), reference), "other pixels than Pillow's"
    try:
        found = check(data)
        pixels = decode(data)
    except ValueError:
        return
    assert pixels.shape[:2] == (found.height, found.width)
    assert not found.by_pillow, "the decoders differ"
    whole = Picture(data, found.seek).region(Box(0, 0, found.height, found.width))
    assert np.array_equal(whole.transpose(1, 2, 0), pixels), "a region has other pixels than the whole"


def _forged(seek, random):
    """Seek points with some bytes changed and a checksum that fits."""
    if not seek:
        return seek
    out = bytearray(seek[:-4])
    for at in random.integers(len(out), size=random.integers(1, 5)):
        out[at] = random.integers(256)
    return bytes(out) + zlib.crc32(out).to_bytes(4, "little")


def tars(random, folder):
    """A mutated tar of tars is read, or named."""
    from data_prep.sources import NoImagesError, list_items, read_item
    from data_prep.storage import StorageError
    from tests.unit.data_prep.odd_files import tar_of

    place = folder / "input.tar"
    place.write_bytes(_mutated(tar_of({"a.tar": tar_of({"x.png": b"1" * 700}), "b/c.jpg": b"2" * 90}), random))
    try:
        for item in list_items(str(place)):
            assert len(read_item(item)) == item.size
    except StorageError as error:
        assert str(place) in str(error)  # noqa: PT017 -- no test function
    except NoImagesError:
        pass


def indexes(random, folder):
    """A mutated index, sidecar or tar of a set: every sample that is given out is the one that was written."""
    from data_prep.index import publish_index, read_shard_set, summarise
    from data_prep.shard import ShardSettings, plan_shards, write_shard
    from data_prep.shard_cache import ShardReader
    from data_prep.sources import list_items
    from data_prep.storage import StorageError
    from tests.unit.data_prep.odd_files import encoded, photograph

    source, uri = folder / "source", folder / "set"
    if not uri.exists():
        source.mkdir()
        for number in range(3):
            (source / f"{number}.jpg").write_bytes(encoded(photograph(seed=number)))
        settings = ShardSettings()
        (plan,) = plan_shards(list_items(str(source)), settings)
        publish_index(str(uri), "x", "0", settings, [summarise(write_shard(plan, str(uri)))])
    written = {path.name.replace(".", "%2E"): path.read_bytes() for path in source.iterdir()}
    place = uri / str(random.choice(["index.json", "shard-000000.json", "shard-000000.tar"]))
    sound = place.read_bytes()
    place.write_bytes(_mutated(sound, random))
    try:
        shards = read_shard_set(str(uri))
        reader = ShardReader(shards, None, 0)
        for shard in range(len(shards.shards)):
            for number, sample in enumerate(shards.samples(shard)):
                data, _ = reader.read(shard, number)
                assert data == written[sample.key], "another image than was written"
        reader.close()
    except StorageError:
        pass
    finally:
        place.write_bytes(sound)


def _mutated(data, random):
    """Some bytes changed, cut out or put in."""
    out = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at, kind = int(random.integers(len(out))), random.integers(4)
        if kind < 2:
            out[at] = random.choice([0, 32, 48, 57, 255, int(random.integers(256))])
        elif kind == 2:
            out[at : at + int(random.integers(1, 600))] = b""
        else:
            out[at:at] = random.bytes(int(random.integers(1, 20)))
        out = out or bytearray(1)
    return bytes(out)


KINDS = {"jpegs": (jpegs, 20), "tars": (tars, 3), "indexes": (indexes, 1)}
"""Each with how often it is drawn."""


def fuzz(seconds, first):
    import numpy as np

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    faulthandler.enable()
    counts, begin = dict.fromkeys(KINDS, 0), None
    with tempfile.TemporaryDirectory(prefix="hatchery-fuzz-") as name:
        turns = [kind for kind, (_, share) in KINDS.items() for _ in range(share)]
        for seed in itertools.count(first):
            kind, folder = turns[seed % len(turns)], Path(name)
            (folder / "turn").write_text(f"{kind}, --seed {seed}")
            faulthandler.dump_traceback_later(_HANG_S, exit=True)  # leaves the folder
            started = time.process_time()
            try:
                KINDS[kind][0](np.random.default_rng(seed), folder)
                if seed - first >= 2 * len(turns):  # those before compile the loops
                    begin = begin or time.monotonic()
                took = time.process_time() - started
                assert took < _SLOW_S, f"it took {took:.0f} s"
            except BaseException:
                kept = tempfile.mkdtemp(prefix="hatchery-fuzz-failure-")
                subprocess.run(["cp", "-r", f"{name}/.", kept], check=True)
                print(f"{kind}, --seed {seed}, files in {kept}", file=sys.stderr)
                raise
            counts[kind] += 1
            if begin is not None and time.monotonic() - begin > seconds:
                break
    faulthandler.cancel_dump_traceback_later()
    print(f"seeds {first} to {seed}, no fault: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if os.environ.get("NUMBA_BOUNDSCHECK") != "1":  # numba reads it when it is imported, and caches code without it
        cache = tempfile.mkdtemp(prefix="hatchery-fuzz-numba-")
        environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": cache}
        try:
            code = subprocess.run([sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], env=environment).returncode
        finally:
            subprocess.run(["rm", "-rf", cache], check=True)
        sys.exit(code)
    fuzz(asked.seconds, asked.seed)


if __name__ == "__main__":
    main()
