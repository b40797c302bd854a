"""The loader on real images: one sequence for every world size, number of workers and restart."""

import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep import storage
from data_prep.image import Picture, decode
from data_prep.index import ShardSet, publish_index, read_shard_set, summarise
from data_prep.loader import PairLoader, PairSettings, _Shares, _Turns, micro_batches_per_step
from data_prep.mix import order_of
from data_prep.pairs import make_pair
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.shard_cache import ShardReader
from data_prep.sources import Item, key_of, list_items
from data_prep.storage import StorageError, join
from tests.shared_data import ROOT

SETTINGS = PairSettings(scale=2, patch_px=16, num_streams=8, shuffle_block=3, seed=1, cache_decoded_bytes=2**26)
BATCH = 8


def shard_here(items, destination, settings):
    """The shards without Ray."""
    summaries = [summarise(write_shard(plan, destination)) for plan in plan_shards(items, settings)]
    return publish_index(destination, "test", "0", settings, summaries)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, photographs):
    """22 photographs, five in a shard."""
    return shard_here(
        list_items(str(photographs))[:22], str(tmp_path_factory.mktemp("shards")), ShardSettings(samples_per_shard=5)
    )


def take(loader, count):
    return list(itertools.islice(loader, count))


@pytest.fixture(scope="module")
def expected(shards):
    """The first 8 steps, almost 3 epochs, of one process."""
    return take(PairLoader(shards.uri, SETTINGS, BATCH, BATCH, 0, 1, 0), 8)


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys == other.keys
        assert batch.step == other.step
        assert torch.equal(batch.low_res, other.low_res)
        assert torch.equal(batch.high_res, other.high_res)


def test_shapes_ranges_and_steps(expected):
    assert [batch.step for batch in expected] == list(range(8))
    for batch in expected:
        assert batch.low_res.shape == (BATCH, 3, 16, 16)
        assert batch.high_res.shape == (BATCH, 3, 32, 32)
        assert batch.low_res.dtype == batch.high_res.dtype == torch.float32
        assert batch.high_res.min() >= 0
        assert 0.5 < batch.high_res.max() <= 1
        assert (batch.low_res - torch.nn.functional.avg_pool2d(batch.high_res, 2)).abs().mean() < 0.03


def test_each_epoch_serves_every_image_once(expected, shards):
    keys = [key for batch in expected for key in batch.keys]
    every = {sample.key for number in range(len(shards.shards)) for sample in shards.samples(number)}
    assert len(every) == 22
    for epoch in range(2):
        served = keys[epoch * 22 : epoch * 22 + 22]
        assert len(served) == len(set(served))
        assert set(served) == every
    assert keys[:22] != keys[22:44]


def test_pairs_are_those_of_the_images(expected, shards):
    places = {s.key: (n, i) for n in range(len(shards.shards)) for i, s in enumerate(shards.samples(n))}
    reader = ShardReader(shards, None, 0)
    for row, key in enumerate(expected[0].keys):
        pair = make_pair(Picture(decode(reader.read(*places[key])[0])), key, 0, SETTINGS)
        assert np.array_equal(expected[0].low_res[row].numpy(), pair.low_res)
        assert np.allclose(expected[0].high_res[row].numpy() * 255, pair.high_res, atol=1e-4)
    reader.close()


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 2), (2, 4), (4, 2), (1, 3), (3, 1), (3, 2), (5, 8), (9, 1)]
)
def test_world_size_and_micro_batch_change_nothing(expected, shards, world_size, micro_batch):
    per_step = micro_batches_per_step(BATCH, micro_batch, world_size)
    ranks = [
        take(PairLoader(shards.uri, SETTINGS, BATCH, micro_batch, rank, world_size, 0), 8 * per_step)
        for rank in range(world_size)
    ]
    for step, whole in enumerate(expected):
        for rank, batches in enumerate(ranks):
            mine = batches[step * per_step : (step + 1) * per_step]
            assert {batch.step for batch in mine} == {step}
            assert [key for batch in mine for key in batch.keys] == whole.keys[rank::world_size]
            assert torch.equal(torch.cat([batch.low_res for batch in mine]), whole.low_res[rank::world_size])
            assert torch.equal(torch.cat([batch.high_res for batch in mine]), whole.high_res[rank::world_size])


@pytest.mark.parametrize("start_step", [1, 3, 7])
def test_resuming_continues_the_sequence(expected, shards, start_step):
    resumed = PairLoader(shards.uri, SETTINGS, BATCH, BATCH, 0, 1, 0, start_step)
    assert_equal(take(resumed, 8 - start_step), expected[start_step:])


@pytest.mark.parametrize(("num_workers", "micro_batch"), [(1, 8), (3, 8), (3, 3)])
def test_workers_change_nothing(expected, shards, num_workers, micro_batch):
    before = torch.random.get_rng_state()
    plain = take(PairLoader(shards.uri, SETTINGS, BATCH, micro_batch, 0, 1, 0, 2), 9)
    assert_equal(take(PairLoader(shards.uri, SETTINGS, BATCH, micro_batch, 0, 1, num_workers, 2), 9), plain)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [key for batch in plain for key in batch.keys][:BATCH] == expected[2].keys


def test_the_cache_of_decoded_images_changes_nothing(expected, shards):
    for size in (0, 700_000):  # nothing, or a few images that push each other out
        settings = SETTINGS.model_copy(update={"cache_decoded_bytes": size})
        assert_equal(take(PairLoader(shards.uri, settings, BATCH, BATCH, 0, 1, 0), 3), expected[:3])


@pytest.fixture
def copy(shards, tmp_path):
    """A copy of the shards that a test may spoil."""
    for info in storage.list_files(shards.uri):
        storage.download(info.uri, tmp_path / info.path)
    return str(tmp_path)


@pytest.fixture
def damaged(shards, copy):
    """One wrong byte in an image of the first shard."""
    sample = shards.samples(0)[2]
    with open(join(copy, "shard-000000.tar"), "r+b") as tar:
        tar.seek(sample.offset + sample.size // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 1]))
    return copy


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_named_from_a_worker_too(damaged, num_workers):
    with pytest.raises(StorageError, match=r"shard-000000.tar: sample n.* is not the one that was written"):
        take(PairLoader(damaged, SETTINGS, BATCH, BATCH, 0, 1, num_workers), 3)


def test_a_missing_tar_is_named(copy):
    storage.delete(join(copy, "shard-000001.tar"))
    with pytest.raises(StorageError, match=r"shard-000001.tar: No such file"):
        take(PairLoader(copy, SETTINGS, BATCH, BATCH, 0, 1, 0), 3)


def test_an_image_smaller_than_the_crop_is_named_at_set_up(shards):
    with pytest.raises(ValueError, match=r"shard-0.*: n.*JPEG has \d+x\d+ pixels, a crop .* needs 2000; make the"):
        PairLoader(shards.uri, PairSettings(scale=4, patch_px=500), BATCH, BATCH, 0, 1, 0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 0, 1, 0), "global_batch=0, micro_batch=1 and world_size=1 must be at least 1"),
        ((8, 1, 2, 2, 0), r"rank=2 is not in 0\.\.1"),
        ((8, 1, 0, 1, -1), "num_workers=-1"),
        ((8, 1, 0, 1, 0, -5), "start_step=-5"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(shards, numbers, message):
    with pytest.raises(ValueError, match=message):
        PairLoader(shards.uri, SETTINGS, *numbers)


def test_absent_shards_are_refused(tmp_path):
    with pytest.raises(StorageError, match=r"index.json: there is no complete set of shards"):
        PairLoader(str(tmp_path), SETTINGS, BATCH, BATCH, 0, 1, 0)


@pytest.fixture(scope="module")
def remote(shards, s3):
    uri = join(s3.uri, "loader")
    for info in storage.list_files(shards.uri):
        storage.upload(info.uri, join(uri, info.path))
    return uri


@pytest.mark.integration
@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_in_an_object_store_give_the_same_batches(expected, remote, tmp_path, num_workers):
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path)})
    assert_equal(take(PairLoader(remote, settings, BATCH, BATCH, 0, 1, num_workers), 8), expected)
    assert len(list(tmp_path.glob("*.tar"))) == 5


@pytest.mark.integration
def test_a_small_cache_evicts_and_still_serves(expected, remote, shards, tmp_path):
    largest = max(shard.bytes for shard in shards.shards)
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path), "cache_bytes": 2 * largest})
    assert_equal(take(PairLoader(remote, settings, BATCH, BATCH, 0, 1, 0), 8), expected)
    assert sum(tar.stat().st_size for tar in tmp_path.glob("*.tar")) <= 2 * largest
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.integration
def test_the_next_shards_are_fetched_before_they_are_read(remote, tmp_path):
    reader = ShardReader(read_shard_set(remote), str(tmp_path), 2**30)
    reader.prefetch([3, 1, 3])
    reader._downloads.shutdown(wait=True)
    assert len(list(tmp_path.glob("*.tar"))) == 2


@pytest.mark.integration
def test_a_download_that_is_not_the_indexs_is_named_and_not_kept(remote, shards, tmp_path, caplog):
    wrong = shards.index.shards[0].model_copy(update={"sha256": "0" * 64})
    index = shards.index.model_copy(update={"shards": (wrong, *shards.index.shards[1:])})
    reader = ShardReader(ShardSet(remote, index), str(tmp_path), 2**30)
    reader.prefetch([0])
    reader.close()
    assert "loader/shard-000000.tar: its sha256 is not the index's" in caplog.text
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"]


@pytest.mark.integration
def test_batches_inside_a_ray_worker_are_the_same(expected, shards, ray_local):
    """Worker processes under Ray: its threads must not be forked, and its main module must not run again."""

    @ray_local.remote
    def first_keys():
        batches = itertools.islice(PairLoader(shards.uri, SETTINGS, BATCH, BATCH, 0, 1, 2), 3)
        return [batch.keys for batch in batches]

    assert ray_local.get(first_keys.remote(), timeout=90) == [batch.keys for batch in expected[:3]]


class Copies(TorchDispatchMode):
    """Notes the dtypes of what is copied to another device."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("device"):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_batches_come_to_the_device_as_bytes(expected, shards):
    """A stand-in for a GPU: the same shapes and dtypes, of which the larger side travels as uint8."""
    loader = PairLoader(shards.uri, SETTINGS, BATCH, BATCH, 0, 1, 0, device="meta")
    with Copies() as copies:
        batch = next(iter(loader))
    assert copies.dtypes == [torch.float32, torch.uint8]
    for side, other in zip(batch[:2], expected[0][:2], strict=True):
        assert (side.device.type, side.dtype, side.shape) == ("meta", other.dtype, other.shape)
    assert batch.keys == expected[0].keys


def test_bytes_become_what_they_are_of_255():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        values / torch.full((), 255.0), torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255))
    )


@pytest.mark.parametrize(("micro_batch", "num_workers"), [(1, 6), (4, 6), (3, 2), (32, 6), (1, 1)])
def test_every_share_of_every_worker_has_samples(shards, micro_batch, num_workers):
    """At one sample per rank, five of the six workers used to make shares of nothing, two at most ahead of time."""
    turns = _Turns(8 * micro_batch, micro_batch, 0, 8)
    shares, order = _Shares(shards, SETTINGS, turns, 0), order_of(shards, SETTINGS)
    sizes = [len(shares._crops(order, worker, num_workers, n)) for worker in range(num_workers) for n in range(12)]
    assert min(sizes) >= max(1, micro_batch // num_workers)
    assert max(sizes) <= max(2, micro_batch // num_workers + 1)


WITH_WORKERS = """
import itertools, multiprocessing.util, sys
print("main")
from data_prep.loader import PairLoader, PairSettings
if __name__ == "__main__":
    settings = PairSettings(scale=2, patch_px=16, num_streams=8, shuffle_block=3, seed=1)
    batches = itertools.islice(PairLoader(sys.argv[1], settings, 8, 8, 0, 1, 2), 2)
    print(*[key for batch in batches for key in batch.keys])
    print(multiprocessing.util.get_temp_dir())
"""


def test_workers_start_where_the_temporary_folder_is_too_long_for_sockets(expected, shards, tmp_path):
    folder = tmp_path / ("deep-" * 18)
    folder.mkdir()
    (tmp_path / "train.py").write_text(WITH_WORKERS)
    env = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "train.py"), shards.uri]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    main, keys, sockets = done.stdout.splitlines()  # the main module runs once: in a Ray worker it is all of Ray
    assert main == "main"
    assert keys.split() == [key for batch in expected[:2] for key in batch.keys]
    assert not os.path.exists(sockets)
    assert not sockets.startswith(str(folder))


KILLED = """
import itertools, multiprocessing, os, signal, sys
from data_prep.loader import PairLoader, PairSettings
batches = iter(PairLoader(sys.argv[1], PairSettings(scale=2, patch_px=16), 8, 8, 0, 1, 2))
next(batches)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_training(shards, tmp_path):
    """Else they would stay for ever, and hold the tars that they read in the node's cache."""
    (tmp_path / "train.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "train.py"), shards.uri]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as running:
        output, _ = running.communicate(timeout=60)  # returns when no worker holds the pipe any more
    assert running.returncode == -signal.SIGKILL
    assert len(output.split()) == 2


def test_item_keys_survive_the_way_through_a_tar(tmp_path):
    path = tmp_path / "odd name.v2.png"
    source = list_items("photographs:", include=["rocket.jpg"])[0]
    path.write_bytes(storage.read_bytes(source.uri))
    item = Item(key_of(path.name), str(path), path.stat().st_size, str(path.stat().st_mtime_ns))
    made = shard_here([item], str(tmp_path / "set"), ShardSettings())
    [batch] = take(PairLoader(made.uri, SETTINGS, 1, 1, 0, 1, 0), 1)
    assert batch.keys == ["odd%20name%2Ev2%2Epng"]
