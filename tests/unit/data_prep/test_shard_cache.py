"""The node's cache of tars: what is passed goes, what is read stays, what the disk damages is had from the store."""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import shard_cache, storage
from data_prep.index import ShardSet, publish_index, summarise
from data_prep.loader import PairLoader, PairSettings
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.shard_cache import ShardReader
from data_prep.sources import list_items
from data_prep.storage import DamageError, StorageError
from data_prep.subimages import to_png

NUM_SHARDS, PER_SHARD, BATCH = 20, 8, 4
SETTINGS = PairSettings(scale=2, patch_px=16, num_streams=2, shuffle_block=4, seed=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """160 images of noise, eight in a shard."""
    folder, random = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for number in range(NUM_SHARDS * PER_SHARD):
        pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
        storage.write_bytes(f"{folder}/source/{number:03d}.png", to_png(pixels))
    settings, uri = ShardSettings(samples_per_shard=PER_SHARD, min_side_px=32), f"{folder}/shards"
    plans = plan_shards(list_items(f"{folder}/source"), settings)
    return publish_index(uri, "x", "0", settings, [summarise(write_shard(plan, uri)) for plan in plans])


@pytest.fixture
def cached(shards, as_if_remote, tmp_path):
    """A reader that has shard 0 in its cache, and the tar there."""
    reader = ShardReader(shards, str(tmp_path), 10**9)
    reader.prefetch([0])
    arrived(reader)
    as_if_remote.clear()
    yield reader, next(tmp_path.glob("*.tar"))
    reader.close()


def arrived(reader: ShardReader) -> None:
    while reader._wanted:
        time.sleep(0.001)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_set_larger_than_the_cache_is_read_from_it(shards, as_if_remote, tmp_path, monkeypatch, readers):
    """Three epochs of 20 shards through a cache of 6: each shard comes about once an epoch, samples hardly ever."""
    prefetch = ShardReader.prefetch

    def prefetch_and_wait(reader, soon):
        prefetch(reader, soon)
        arrived(reader)

    monkeypatch.setattr(ShardReader, "prefetch", prefetch_and_wait)
    monkeypatch.setattr(shard_cache, "_FULL_S", 0.0)
    room = 6 * max(shard.bytes for shard in shards.shards)
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path), "cache_bytes": room})
    ranks = [
        iter(PairLoader(shards.uri, settings, BATCH, BATCH // readers, rank, readers, 0)) for rank in range(readers)
    ]
    epochs, keys = 3, set()
    for _ in range(epochs * shards.num_samples // BATCH):
        keys.update(key for rank in ranks for key in next(rank).keys)
        assert sum(tar.stat().st_size for tar in tmp_path.glob("*.tar")) <= room
    assert len(keys) == shards.num_samples
    count = {name: sum(n for call, n in as_if_remote.items() if call[0] == name) for name in ("download", "read_range")}
    assert count["download"] <= 1.25 * epochs * NUM_SHARDS
    assert count["read_range"] <= 0.05 * epochs * shards.num_samples


def test_shards_that_were_passed_are_let_go_of(shards, as_if_remote, tmp_path):
    room = 2 * max(shard.bytes for shard in shards.shards)
    first, second = (ShardReader(shards, str(tmp_path), room) for _ in range(2))
    for reader, asked in ((first, [0, 1]), (second, [2]), (first, [1]), (second, [2])):
        reader.prefetch(asked)
        arrived(reader)
        reader._full_until = 0.0
    assert {tar.stem for tar in tmp_path.glob("*.tar")} == {shards.shards[number].sha256 for number in (1, 2)}
    for reader in (first, second):
        reader.close()


def test_the_longest_unused_tar_goes_first(shards, as_if_remote, tmp_path):
    """Opened first, but let go of last: its other readers may come to it again."""
    reader = ShardReader(shards, str(tmp_path), 2 * max(shard.bytes for shard in shards.shards))
    for asked in ([0], [0, 1], [0], [], [2], [2]):
        reader.prefetch(asked)
        arrived(reader)
        time.sleep(0.01)
    assert {tar.stem for tar in tmp_path.glob("*.tar")} == {shards.shards[number].sha256 for number in (0, 2)}
    reader.close()


@pytest.mark.parametrize("damage", ["altered", "cut"])
def test_a_tar_damaged_on_this_disk_is_deleted_and_the_store_is_asked(
    shards, as_if_remote, cached, tmp_path, caplog, damage
):
    reader, tar = cached
    expected = reader.read(0, 0), reader.read(0, 1)
    data, sample = bytearray(tar.read_bytes()), shards.samples(0)[1]
    data[sample.offset + 50] ^= 1
    with tar.open("r+b") as file:
        file.write(data)
        file.truncate(sample.offset + 60 if damage == "cut" else len(data))
    assert reader.read(0, 0) == expected[0]
    assert tar.exists()
    assert reader.read(0, 1) == expected[1]
    assert not tar.exists()
    assert f"{tar}: damaged on this disk: deleted, read from {shards.tar_uri(0)}" in caplog.text
    reader.prefetch([0])
    arrived(reader)
    as_if_remote.clear()
    assert reader.read(0, 1) == expected[1]
    assert not as_if_remote


def test_damage_in_the_store_too_is_named(shards, cached, monkeypatch):
    reader, tar = cached
    tar.write_bytes(bytes(tar.stat().st_size))
    monkeypatch.setattr(shard_cache, "read_range", lambda uri, offset, size: bytes(size))
    with pytest.raises(DamageError, match=r"shard-000000.tar: sample .* is not the one that was written"):
        reader.read(0, 1)


def test_what_replaced_a_damaged_tar_stays(cached):
    reader, tar = cached
    reader.read(0, 0)
    good = tar.read_bytes()
    tar.write_bytes(bytes(len(good)))
    other = tar.with_suffix(".new")
    other.write_bytes(good)
    other.replace(tar)
    assert reader.read(0, 1)
    assert tar.read_bytes() == good


@pytest.mark.parametrize("name", ["eviction.lock", "{}.lock", "{}.room", "{}.part", "{}.tar"])
def test_no_link_in_a_shared_folder_is_followed(shards, as_if_remote, tmp_path, name):
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    victim.write_bytes(b"precious")
    cache.mkdir()
    (cache / name.format(shards.shards[0].sha256)).symlink_to(victim)
    reader = ShardReader(shards, str(cache), 10**9)
    for _ in range(2):
        reader.prefetch([0])
        arrived(reader)
    assert reader.read(0, 0)[0]
    reader.close()
    assert victim.read_bytes() == b"precious"


def test_a_cache_folder_that_somebody_else_prepared_is_not_used(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usual = Path(shard_cache.default_cache())
    assert usual.stat().st_mode & 0o777 == 0o700
    usual.rmdir()
    usual.symlink_to(tmp_path)
    first, second = (ShardReader(shards, None, 0)._cache for _ in range(2))
    assert first == second != usual


def test_where_no_cache_can_be_made_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(StorageError, match=r"/proc/nowhere.*: no cache .* can be made .*; set compute.cache_dir"):
        shard_cache.default_cache()


def test_local_tars_are_not_touched(shards):
    tars = [Path(shards.tar_uri(number)) for number in range(NUM_SHARDS)]
    before = [tar.stat().st_mtime_ns for tar in tars]
    list(itertools.islice(PairLoader(shards.uri, SETTINGS, BATCH, BATCH, 0, 1, 0), 45))
    assert [tar.stat().st_mtime_ns for tar in tars] == before
