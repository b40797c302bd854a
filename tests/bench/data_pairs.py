"""Pairs per second per core: the loader against the published way and against decoding alone, in one run.

    PYTHONPATH=. .venv/bin/python -m tests.bench.data_pairs
    PYTHONPATH=. .venv/bin/python -m tests.bench.data_pairs evicting  # only: a set of four times its cache

Sides take turns, one epoch each, on one thread; a side's time is the thread's CPU time, which other programs on the
machine disturb less than the clock. The ratios are medians over the rounds.
"""

import dataclasses
import functools
import io
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep import storage
from data_prep.index import publish_index, summarise
from data_prep.loader import PairLoader, PairSettings
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.sources import list_items
from tests.s3_server import s3_server
from tests.shared_data import shared

ROUNDS = 5
BATCH = 32
EVICTING_FLOOR = 0.9
SCALES = ((2, 64), (4, 64))  # high-resolution crops of 128 and 256 pixels


@functools.cache
def matlab_weights(in_side, out_side, scale):
    """Indices and weights of one axis: the usual port of MATLAB's imresize in training code, bicubic, antialiased."""
    width = 4 / scale
    centres = (np.arange(out_side) + 1) / scale + 0.5 * (1 - 1 / scale)
    left = np.floor(centres - width / 2)
    indices = left[:, None] + np.arange(int(np.ceil(width)) + 2)
    x = np.abs((centres[:, None] - indices) * scale)
    weights = (1.5 * x**3 - 2.5 * x**2 + 1) * (x <= 1) + (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * ((x > 1) & (x <= 2))
    weights /= weights.sum(1, keepdims=True)
    mirror = np.concatenate([np.arange(in_side), np.arange(in_side)[::-1]])
    return mirror[(indices.astype(int) - 1) % (2 * in_side)], weights


def published_resize(image, scale):
    """Whole-image bicubic of float pixels, row by row and column by column of the output, as published code does it."""
    for axis in (0, 1):
        side = image.shape[axis]
        indices, weights = matlab_weights(side, int(np.ceil(side * scale)), scale)
        image = np.moveaxis(image, axis, 0)
        image = np.stack([np.tensordot(w, image[i], 1) for i, w in zip(indices, weights, strict=True)])
        image = np.moveaxis(image, 0, axis)
    return image


def published_pair(data, scale, patch, random):
    """Decode all, make all of it float, shrink all of it, then crop, flip and rotate."""
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.float32) / 255
    height, width = image.shape[0] // scale * scale, image.shape[1] // scale * scale
    image = image[:height, :width]
    low_res = published_resize(image, 1 / scale)
    top = random.integers(0, low_res.shape[0] - patch + 1)
    left = random.integers(0, low_res.shape[1] - patch + 1)
    low_res = low_res[top : top + patch, left : left + patch]
    high_res = image[top * scale : (top + patch) * scale, left * scale : (left + patch) * scale]
    turns, flip = random.integers(0, 4), random.integers(0, 2)
    pair = [np.rot90(side, turns)[:, :: -1 if flip else 1] for side in (low_res, high_res)]
    return [torch.from_numpy(np.ascontiguousarray(side.transpose(2, 0, 1))).float() for side in pair]


def thread_seconds(call):
    start = time.thread_time()
    call()
    return time.thread_time() - start


def sides(files, uri, scale, patch):
    """name -> one epoch over all images on this thread."""
    random = np.random.default_rng(0)
    batches = iter(PairLoader(uri, PairSettings(scale=scale, patch_px=patch, num_streams=8), BATCH, BATCH, 0, 1, 0))

    def decode_all():
        for data in files:
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def published():
        for data in files[:: len(files) // 60]:
            published_pair(data, scale, patch, random)

    def loader():
        for _ in itertools.islice(batches, len(files) // BATCH):
            pass

    return {
        "published": (published, len(files[:: len(files) // 60])),
        "decode": (decode_all, len(files)),
        "loader": (loader, len(files) // BATCH * BATCH),
    }


def measure(scale, patch, folder):
    """One scale: (a) published, (b) decoding alone, the loader; a line with the medians."""
    side = scale * patch
    items = list_items(str(shared("data/imagenet-sample/train")))
    settings = ShardSettings(samples_per_shard=32, min_side_px=side, max_reject_share=1)
    made = [summarise(write_shard(plan, folder)) for plan in plan_shards(items, settings)]
    found = publish_index(folder, "imagenet-sample", "0", settings, made)
    keys = {sample.key for number in range(len(found.shards)) for sample in found.samples(number)}
    files = [storage.read_bytes(item.uri) for item in items if item.key in keys]
    calls = sides(files, folder, scale, patch)
    calls["loader"][0]()  # compiles, opens files
    rates = {name: [] for name in calls}
    for _, (name, (call, count)) in itertools.product(range(ROUNDS), calls.items()):
        rates[name].append(count / thread_seconds(call))
    to_published = statistics.median(a / b for a, b in zip(rates["loader"], rates["published"], strict=True))
    to_decode = statistics.median(a / b for a, b in zip(rates["loader"], rates["decode"], strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"x{scale}, {side} px, {len(files)} images: published {medians['published']:.0f}/s, "
        f"decode {medians['decode']:.0f}/s, loader {medians['loader']:.0f}/s: "
        f"{to_published:.1f} x published, {to_decode:.2f} x decode",
        flush=True,
    )
    return to_published, to_decode


def measure_s3(scale, patch, folder):
    """The loader from a real S3 server: the first epoch with an empty cache, the second with a full one."""
    with tempfile.TemporaryDirectory() as server_folder, s3_server(Path(server_folder)) as server:
        for info in storage.list_files(folder):
            storage.upload(info.uri, storage.join(server.uri, info.path))
        for cache_bytes, name in ((2**30, "cached"), (0, "never cached")):
            settings = PairSettings(
                scale=scale, patch_px=patch, num_streams=8, cache_bytes=cache_bytes, cache_dir=f"{server_folder}/{name}"
            )
            batches = iter(PairLoader(server.uri, settings, BATCH, BATCH, 0, 1, 0))
            for epoch in ("cold", "warm"):
                start, start_cpu, count = time.monotonic(), time.process_time(), 0
                for _ in range(10):
                    count += len(next(batches).keys)
                clock, cpu = time.monotonic() - start, time.process_time() - start_cpu
                print(
                    f"x{scale} from S3, {name}, {epoch}: {count / clock:.0f}/s by the clock, {count / cpu:.0f}/s of CPU"
                )


def evicting_rates(folder):
    """Pairs per second from S3, a rate for each epoch in turn: with a cache for the whole set, and for a quarter."""
    items = list_items(str(shared("data/imagenet-sample/train")))
    items = [dataclasses.replace(item, key=f"{item.key}-{again}") for again in range(4) for item in items]
    settings = ShardSettings(samples_per_shard=64, min_side_px=128, max_reject_share=1)
    made = [summarise(write_shard(plan, f"{folder}/set")) for plan in plan_shards(items, settings)]
    found = publish_index(f"{folder}/set", "imagenet-sample", "0", settings, made)
    with s3_server(Path(folder)) as server:
        for info in storage.list_files(found.uri):
            storage.upload(info.uri, storage.join(server.uri, info.path))
        loaders = {}
        for name, share in (("whole", 1), ("quarter", 4)):
            cache = {"cache_dir": f"{folder}/{name}", "cache_bytes": found.index.num_bytes // share}
            pairs = PairSettings(scale=2, patch_px=64, num_streams=2, shuffle_block=32, **cache)
            loaders[name] = iter(PairLoader(server.uri, pairs, BATCH, BATCH, 0, 1, 1))
        epoch, rates = found.num_samples // BATCH, {name: [] for name in loaders}
        for batches in loaders.values():
            next(batches)
        for _, (name, batches) in itertools.product(range(ROUNDS), loaders.items()):
            start = time.monotonic()
            for _ in range(epoch):
                next(batches)
            rates[name].append(epoch * BATCH / (time.monotonic() - start))
    return rates


def measure_evicting(folder):
    """A set of four times its cache against one that fits: the second and later epochs."""
    rates = evicting_rates(folder)
    ratio = statistics.median(a / b for a, b in zip(rates["quarter"][1:], rates["whole"][1:], strict=True))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    both = f"{medians['quarter']:.0f}/s, for all of it {medians['whole']:.0f}/s"
    print(f"x2 from S3, cache for a quarter of the set {both}: {ratio:.2f} (floor {EVICTING_FLOOR})", flush=True)
    return ratio >= EVICTING_FLOOR


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        held = measure_evicting(folder)
    if sys.argv[1:] == ["evicting"]:
        return int(not held)
    for scale, patch in SCALES:
        with tempfile.TemporaryDirectory() as folder:
            measure(scale, patch, folder)
            measure_s3(scale, patch, folder)
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
