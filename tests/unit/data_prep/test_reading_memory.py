"""What a reader keeps: samples in columns, few lists of them, few weights of crops."""

import gc
import random
import tracemalloc

import numpy as np
import pytest

from data_prep import bicubic, reader_server, s3
from data_prep.index import Sample, Samples
from data_prep.loader import _in_hand, _Turns
from data_prep.order import SampleOrder


def sample(number: int, key: str = "n0/{}.JPEG", ext: str = "JPEG") -> Sample:
    return Sample(
        key=key.format(number),
        ext=ext,
        offset=number * 10**8,
        size=number,
        height=9,
        width=number,
        sha256=f"{number:064x}",
    )


@pytest.mark.parametrize("keys", [("a", "", "caf\u00e9", "\u4e16\u754c"), ("same", "same", "same", "same"), ()])
def test_samples_in_columns_are_the_samples(keys: tuple[str, ...]) -> None:
    samples = [sample(number, key, key) for number, key in enumerate(keys)]
    kept = Samples(samples)
    assert list(kept) == samples
    assert list(kept[1:]) == samples[1:]
    assert len(kept) == len(samples)
    with pytest.raises(IndexError):
        kept[len(keys)]


def test_samples_in_columns_take_an_eighth_of_the_memory() -> None:
    def kept_bytes(make: type) -> int:
        gc.collect()
        tracemalloc.start()
        kept = make([sample(number) for number in range(1024)])
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(kept) == 1024
        return size

    assert kept_bytes(Samples) < 150_000 < kept_bytes(tuple) / 8


@pytest.mark.parametrize(("per_shard", "streams", "expected"), [(1024, 4, 4 * 3 + 8), (64, 4, 32), (1024, 64, 200)])
def test_a_reader_keeps_the_lists_of_the_shards_in_hand(per_shard: int, streams: int, expected: int) -> None:
    class Set:
        shards, num_samples = range(1252), 1252 * per_shard

    assert _in_hand(SampleOrder([1], 0), Set, streams) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [(32, 4, 8, 6), (32, 4, 8, 1), (32, 1, 32, 3), (32, 4, 3, 2), (8, 3, 1, 2)])
def test_the_streams_that_a_worker_meets_are_counted(batches: tuple[int, int, int, int]) -> None:
    global_batch, micro_batch, world_size, num_workers = batches
    turns = _Turns(global_batch, micro_batch, 0, world_size)
    met = {turns.sample(q) % 64 for n in range(2000) for q in turns.of_worker(n, 0, num_workers)}
    counted = turns.num_streams(64, num_workers)
    assert len(met) == counted or (len(met) < counted and global_batch % (micro_batch * world_size))


def test_crops_of_many_sizes_keep_few_weights() -> None:
    """4,096 crops of photographs of mixed sizes kept up to 420 MB."""
    draw = random.Random(0)
    tracemalloc.start()
    for _ in range(500):
        side = draw.randrange(1200, 4000)
        bicubic.source_box((side, side + 1), 0.5, draw.randrange(500), draw.randrange(500), 64, 64)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 1e6


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4])
def test_weights_of_a_crop_are_those_of_the_whole(scale: float) -> None:
    for side in (97, 300, 501):
        indices, weights = bicubic._taps(side, bicubic.scaled_length(side, scale), scale)
        for start in range(0, len(indices) - 16, 5):
            crop, of_crop, first = bicubic._crop_taps(side, scale, start, 16)
            assert np.array_equal(crop + first, indices[start : start + 16])
            assert np.array_equal(of_crop, weights[start : start + 16])


def test_the_server_of_the_workers_can_use_the_compiled_loops() -> None:
    """Where it cannot, it says nothing, and each worker compiles for itself."""
    from data_prep import bicubic_kernels, jpeg_kernels

    reader_server._use_compiled_loops()
    assert bicubic_kernels.shrink.signatures
    assert jpeg_kernels.decode_planes.signatures
    assert jpeg_kernels.to_rgb.signatures


def test_clients_share_what_is_known_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "test-memory")
    s3.client("one")
    tracemalloc.start()
    s3.client("other", attempts=3)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 6e6
