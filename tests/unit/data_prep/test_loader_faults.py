"""The loader where things break: networks, servers, tars. Also several crops of one image."""

import hashlib
import itertools
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter

import pytest
import torch

from data_prep import shard_cache, storage
from data_prep.index import ShardInfo, publish_index, read_shard_set, summarise, to_json
from data_prep.loader import PairLoader, PairSettings
from data_prep.order import SampleOrder, crop_position
from data_prep.plan import Plan
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.shard_cache import ShardReader
from data_prep.sources import list_items
from data_prep.storage import DamageError, StorageError, join
from tests.faulty_proxy import FAULTS, Faults, faulty_proxy
from tests.shared_data import ROOT
from tests.unit.data_prep.odd_files import encoded, photograph

SETTINGS = PairSettings(scale=2, patch_px=16, num_streams=4, shuffle_block=3, seed=1)
BATCH = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """20 photographs, four in a shard."""
    folder = tmp_path_factory.mktemp("set")
    for number in range(20):
        storage.write_bytes(str(folder / "source" / f"{number:02d}.JPEG"), encoded(photograph(seed=number), quality=95))
    plans = plan_shards(list_items(str(folder / "source")), ShardSettings(samples_per_shard=4))
    uri = str(folder / "shards")
    return publish_index(uri, "x", "0", ShardSettings(), [summarise(write_shard(plan, uri)) for plan in plans])


@pytest.fixture
def copy(shards, tmp_path):
    for info in storage.list_files(shards.uri):
        storage.download(info.uri, tmp_path / "copy" / info.path)
    return str(tmp_path / "copy")


@pytest.fixture
def remote(copy, s3, tmp_path):
    uri = join(s3.uri, tmp_path.name)
    for info in storage.list_files(copy):
        storage.upload(info.uri, join(uri, info.path))
    return uri


def take(uri, settings, count, rank=0, world_size=1, num_workers=0, start_step=0):
    loader = PairLoader(uri, settings, BATCH, BATCH // world_size, rank, world_size, num_workers, start_step)
    return list(itertools.islice(loader, count))


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def flip_byte(uri, at):
    data = bytearray(storage.read_bytes(uri))
    data[at] ^= 1
    storage.write_bytes(uri, bytes(data))


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(3))
def test_resets_busy_answers_and_short_bodies_change_no_batch(shards, remote, s3, tmp_path, seed):
    """A third of all answers broken, tars not cached in the first run and cached in the second."""
    expected, faults = take(shards.uri, SETTINGS, 10), Faults(0.33, seed)
    with faulty_proxy(s3.endpoint, faults):
        for cache_bytes in (0, 2**30):
            settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path / "cache"), "cache_bytes": cache_bytes})
            batches = take(remote, settings, 10)
            assert keys(batches) == keys(expected)
            assert all(torch.equal(a.low_res, b.low_res) for a, b in zip(batches, expected, strict=True))
    assert all(faults.seen[fault] > 0 for fault in FAULTS)
    assert not list((tmp_path / "cache").glob(".hatchery-tmp-*"))


@pytest.mark.integration
def test_a_server_that_stays_away_stops_the_loader_with_its_name(remote, s3, tmp_path, monkeypatch):
    """Not taken for damage: nothing is skipped."""
    monkeypatch.setattr("data_prep.s3._READ_ATTEMPTS", 2)
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path / "cache"), "on_damage": "skip"})
    loader = PairLoader(remote, settings, BATCH, BATCH, 0, 1, 0)
    with faulty_proxy(s3.endpoint, Faults(1.0)), pytest.raises(StorageError, match=f"{remote}/shard-") as caught:
        next(iter(loader))
    assert not isinstance(caught.value, DamageError)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def place(request, copy):
    """(uri, settings) of a set that a test may spoil."""
    if request.param == "local":
        return copy, SETTINGS
    cache = os.path.join(os.path.dirname(copy), "cache")
    return request.getfixturevalue("remote"), SETTINGS.model_copy(update={"cache_dir": cache})


def spoil(shards, uri, how):
    """Damage shard 2; the keys of its samples that are lost."""
    tar, samples = join(uri, "shard-000002.tar"), shards.samples(2)
    if how == "altered":
        flip_byte(tar, samples[1].offset + 50)
        return {samples[1].key}
    if how == "cut":
        storage.write_bytes(tar, storage.read_bytes(tar)[: samples[2].offset + 10])
        if storage.is_local(uri):
            return {sample.key for sample in samples}  # its size gives it away: nothing of it is used
        return {sample.key for sample in samples[2:]}
    storage.delete(tar)
    return {sample.key for sample in samples}


@pytest.mark.parametrize("how", ["altered", "cut", "missing"])
def test_a_damaged_tar_is_named_and_stops_the_loader(shards, place, how):
    uri, settings = place
    spoil(shards, uri, how)
    with pytest.raises(DamageError, match=rf"^{uri}/shard-000002.tar: "):
        take(uri, settings, 5)


def test_an_image_that_cannot_be_decoded_is_named_with_its_shard(shards, copy):
    """As after a library's update: the bytes are the index's."""
    tar, info = (
        join(copy, "shard-000002.tar"),
        ShardInfo.model_validate_json(storage.read_bytes(join(copy, "shard-000002.json"))),
    )
    sample, whole = info.samples[1], bytearray(storage.read_bytes(tar))
    whole[sample.offset : sample.offset + sample.size] = bytes(sample.size)
    changed = sample.model_copy(update={"sha256": hashlib.sha256(bytes(sample.size)).hexdigest()})
    info = info.model_copy(update={"samples": (info.samples[0], changed, *info.samples[2:])})
    storage.write_bytes(tar, bytes(whole))
    storage.write_bytes(join(copy, "shard-000002.json"), to_json(info))
    summaries = [
        summarise(ShardInfo.model_validate_json(storage.read_bytes(join(copy, f"{shard.name}.json"))))
        for shard in shards.shards
    ]
    publish_index(copy, "x", "0", ShardSettings(), summaries)
    with pytest.raises(DamageError, match=rf"^{tar}: {sample.key} cannot be decoded: it is none of PNG.*shards anew$"):
        take(copy, SETTINGS, 5)


def test_seek_points_that_are_not_the_sidecars_are_not_used(shards, copy):
    """Their own checksum does not tell those of another image."""
    samples = shards.samples(1)
    sample = next(sample for sample in samples if sample.seek_size)
    tar = join(copy, "shard-000001.tar")
    whole = bytearray(storage.read_bytes(tar))
    begin, end = sample.seek_offset, sample.seek_offset + sample.seek_size
    good = ShardReader(shards, None, 0)
    assert good.read(1, samples.index(sample))[1] == whole[begin:end]
    whole[begin] ^= 8
    whole[end - 4 : end] = zlib.crc32(whole[begin : end - 4]).to_bytes(4, "little")
    storage.write_bytes(tar, bytes(whole))
    reader = ShardReader(read_shard_set(copy), None, 0)
    assert reader.read(1, samples.index(sample))[1] == b""
    good.close()
    reader.close()


@pytest.mark.parametrize("how", ["altered", "cut", "missing"])
def test_skipping_replaces_what_is_damaged_alike_for_every_world_size(shards, place, how, caplog):
    uri, settings = place
    settings = settings.model_copy(update={"on_damage": "skip"})
    lost = spoil(shards, uri, how)
    batches = take(uri, settings, 10)
    served, intact = keys(batches), keys(take(shards.uri, SETTINGS, 10))
    assert "shard-000002.tar" in caplog.text
    assert "skipped: another sample takes its place" in caplog.text
    assert not lost & set(served)
    for key, before in zip(served, intact, strict=True):
        assert key == before or before in lost
    ranks = [take(uri, settings, 10, rank, 2) for rank in range(2)]
    together = [
        key for pair in zip(*ranks, strict=True) for row in zip(*(b.keys for b in pair), strict=True) for key in row
    ]
    assert together == served
    assert keys(take(uri, settings, 6, start_step=4)) == served[4 * BATCH :]
    if how == "altered" and storage.is_local(uri):
        assert keys(take(uri, settings, 10, num_workers=2)) == served


def test_nothing_sound_at_all_is_an_error(shards, copy):
    for number in range(len(shards.shards)):
        storage.delete(join(copy, f"shard-{number:06d}.tar"))
    with pytest.raises(StorageError, match="no sound sample is left"):
        take(copy, SETTINGS.model_copy(update={"on_damage": "skip"}), 1)


@pytest.mark.parametrize("crops", [2, 3])
def test_several_crops_of_each_image(shards, crops):
    """Each image `crops` times an epoch, never twice in a batch, decoded once, each time elsewhere."""
    settings = SETTINGS.model_copy(update={"crops_per_image": crops})
    batches = take(shards.uri, settings, 5 * crops)
    assert set(Counter(keys(batches)).values()) == {crops}
    assert all(len(set(batch.keys)) == BATCH for batch in batches)
    by_key = {}
    for batch in batches:
        for key, low_res in zip(batch.keys, batch.low_res, strict=True):
            by_key.setdefault(key, []).append(low_res)
    assert any(not torch.equal(first, second) for first, second, *_ in by_key.values())
    ranks = [take(shards.uri, settings, 5 * crops, rank, 2) for rank in range(2)]
    together = [
        key for pair in zip(*ranks, strict=True) for row in zip(*(b.keys for b in pair), strict=True) for key in row
    ]
    assert together == keys(batches)
    assert keys(take(shards.uri, settings, 3, start_step=4)) == keys(batches)[4 * BATCH : 7 * BATCH]


def test_the_first_of_several_crops_is_the_single_one(shards):
    first = {}
    for batch in take(shards.uri, SETTINGS.model_copy(update={"crops_per_image": 5}), 25):
        for key, low_res in zip(batch.keys, batch.low_res, strict=True):
            first.setdefault(key, low_res)
    for batch in take(shards.uri, SETTINGS, 5):
        for key, low_res in zip(batch.keys, batch.low_res, strict=True):
            assert torch.equal(first[key], low_res)


@pytest.mark.parametrize(("num_samples", "streams", "crops"), [(17, 4, 3), (64, 8, 2), (5, 8, 4)])
def test_each_crop_of_each_epoch_is_served_once(num_samples, streams, crops):
    order = SampleOrder([num_samples], 3, streams)
    rounds = 7 * streams * crops * num_samples  # whole groups of streams x crops numbers
    served = Counter(crop_position(order, g, crops) for g in range(rounds))
    assert set(served.values()) == {1}
    whole = Counter(place for place, _ in served)
    assert Counter(whole.values())[crops] == len(whole)


@pytest.mark.integration
def test_a_full_cache_serves_by_ranges_and_keeps_its_limit(shards, remote, tmp_path):
    limit = shards.shards[0].bytes * 2
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path / "cache"), "cache_bytes": limit})
    assert keys(take(remote, settings, 20)) == keys(take(shards.uri, SETTINGS, 20))
    assert sum(tar.stat().st_size for tar in (tmp_path / "cache").glob("*.tar")) <= limit


@pytest.mark.integration
def test_a_tar_that_is_being_read_is_not_evicted(shards, remote, tmp_path):
    first = ShardReader(read_shard_set(remote), str(tmp_path), 10**9)
    first.prefetch([0])
    first._downloads.shutdown(wait=True)
    first.read(0, 0)
    second = ShardReader(read_shard_set(remote), str(tmp_path), shards.shards[1].bytes + 10)
    second.prefetch([1])
    second.close()
    assert len(list(tmp_path.glob("*.tar"))) == 1
    assert first.read(0, 1)
    first.close()


def test_a_cache_that_another_user_filled_is_read(shards, as_if_remote, tmp_path, monkeypatch):
    first = ShardReader(shards, str(tmp_path), 10**9)
    first.prefetch([0])
    first.close()

    def not_the_owner(*_):
        raise PermissionError("not the owner")

    monkeypatch.setattr(os, "utime", not_the_owner)
    as_if_remote.clear()
    second = ShardReader(shards, str(tmp_path), 10**9)
    assert second.read(0, 0) == first.read(0, 0)
    monkeypatch.setattr(os, "open", not_the_owner)
    assert ShardReader(shards, str(tmp_path), 10**9).read(0, 0) == second.read(0, 0)
    assert sum(as_if_remote.values()) == 1  # what may not be opened comes as a range


def test_a_cache_that_may_not_be_written_is_named_and_done_without(shards, as_if_remote, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    reader = ShardReader(shards, str(tmp_path / "file" / "cache"), 10**9)
    for _ in range(2):
        reader.prefetch([0])
        while reader._wanted:
            time.sleep(0.01)
    assert reader.read(0, 0)[0]
    assert caplog.text.count("Not a directory") == 1


def test_a_damaged_tar_is_downloaded_once_and_named_once(shards, copy, as_if_remote, tmp_path, caplog):
    """The damage is behind the samples: these are sound, and read one by one."""
    tar = join(copy, "shard-000002.tar")
    flip_byte(tar, -1)
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    batches = []
    for batch in itertools.islice(PairLoader(copy, settings, BATCH, BATCH, 0, 1, 0), 30):
        batches.append(batch)
        time.sleep(0.01)  # time for the downloads
    sound = settings.model_copy(update={"cache_dir": str(tmp_path / "other cache")})
    assert keys(batches) == keys(take(shards.uri, sound, 30))
    assert as_if_remote["download", tar] == 1
    assert caplog.text.count("its samples are read one by one") == 1


def test_a_tar_that_could_not_be_had_is_asked_for_again(shards, as_if_remote, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_FAILED_S", 0.0)
    reader = ShardReader(shards, str(tmp_path), 10**9)
    working, failures = shard_cache.download, 0

    def fails(uri, local):
        nonlocal failures
        failures += 1
        raise StorageError(f"{uri}: the server does not answer")

    for download in (fails, fails, working):
        monkeypatch.setattr(shard_cache, "download", download)
        reader.prefetch([0])
        while reader._wanted:
            time.sleep(0.01)
    assert failures == 2
    assert len(list(tmp_path.glob("*.tar"))) == 1
    reader.close()


@pytest.mark.parametrize("option", [{}, {"crops_per_image": 2}, {"cache_decoded_bytes": 10 * 96 * 120 * 3}])
def test_samples_are_fetched_ahead_until_the_end_and_not_if_they_are_held(
    shards, as_if_remote, tmp_path, monkeypatch, option
):
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path), "cache_bytes": 0, **option})
    monkeypatch.setattr(shard_cache, "_RANGES_AHEAD", 2 * BATCH)
    ahead, read = [], ShardReader.read

    def noted(reader, shard, number):
        ahead.append((shard, number) in reader._ahead)
        return read(reader, shard, number)

    monkeypatch.setattr(ShardReader, "read", noted)
    batches = list(itertools.islice(PairLoader(shards.uri, settings, BATCH, BATCH, 0, 1, 0), 40))
    assert ahead.count(True) > 0.8 * len(ahead)  # not those that were held and given up before their turn
    ranges = sum(count for (name, *_), count in as_if_remote.items() if name == "read_range")
    assert len(ahead) <= ranges <= len(ahead) + 2 * BATCH
    assert len(batches) == 40


def test_what_is_not_wanted_any_more_makes_room_for_what_is(shards, as_if_remote, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_RANGES_AHEAD", 2)
    reader = ShardReader(shards, str(tmp_path), 0)
    reader.fetch_ahead([(0, 0), (0, 0), (0, 1), (0, 2)])
    assert list(reader._ahead) == [(0, 0), (0, 1)]
    reader.fetch_ahead([(0, 1), (0, 2), (0, 3)])
    assert list(reader._ahead) == [(0, 1), (0, 2)]
    reader.close()


def test_each_user_has_a_cache_folder_of_ones_own(shards, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = ShardReader(shards, None, 0)._cache
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert ShardReader(shards, None, 0)._cache != ours


def test_temporary_files_of_killed_writers_are_swept_and_others_kept(tmp_path):
    code = f"""
import os, signal
from data_prep.storage import writing
with writing({str(tmp_path / "x")!r}) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    [left] = tmp_path.iterdir()
    with storage.writing(str(tmp_path / "y")) as file:
        file.write(b"mine")
        assert storage.sweep(str(tmp_path)) == 1
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["y"]
    old = tmp_path / ".hatchery-tmp-elsewhere-1-abc"
    old.write_bytes(b"")
    assert storage.sweep(str(tmp_path)) == 0
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert storage.sweep(str(tmp_path)) == 1


def test_files_of_another_container_are_kept_while_they_are_held(tmp_path):
    """It has this host's name and /tmp, but numbers of processes of its own: these say nothing here."""
    pid = subprocess.Popen(["true"])
    pid.wait()
    file, folder = (
        tmp_path / f".hatchery-tmp-{socket.gethostname()}.1-{pid.pid}-{name}" for name in ("file", "folder")
    )
    folder.mkdir()
    with file.open("xb") as writer:
        storage.hold(writer.fileno())
        os.utime(file, (time.time() - 2 * 86400,) * 2)
        assert not storage.is_abandoned(file, ".hatchery-tmp-")
        assert not storage.is_abandoned(folder, ".hatchery-tmp-")
    assert storage.is_abandoned(file, ".hatchery-tmp-")
    os.utime(file)
    assert not storage.is_abandoned(file, ".hatchery-tmp-")  # being made, perhaps


def test_what_is_written_and_planned_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with storage.writing(str(tmp_path / "set" / "x")):
        [file] = (tmp_path / "set").iterdir()
        assert storage.is_held(file)
    with Plan([], ShardSettings()):
        [folder] = tmp_path.glob("hatchery-plan-*")
        elsewhere = folder.rename(tmp_path / "hatchery-plan-999999999-elsewhere")
        with Plan([], ShardSettings()):
            assert elsewhere.exists()
        elsewhere.rename(folder)
    assert not list(tmp_path.glob("hatchery-plan-*"))


def test_the_default_window_mixes_almost_as_a_full_shuffle_does():
    """ImageNet's shape: 1,251 shards of 1,024. Measured: see tests/bench/README-data.md."""
    order = SampleOrder([1024] * 1251, 0)
    random.seed(0)
    starts = [random.randrange(1251 * 1024 // 32 - 1) * 32 for _ in range(60)]
    shards_in_batch = [len({order.position(g).shard for g in range(start, start + 32)}) for start in starts]
    assert min(shards_in_batch) >= 29  # a full shuffle: 31.6 of 32 on average
    neighbours = [
        abs(order.position(g).sample - order.position(g + 64).sample)
        for start in starts
        for g in range(start, start + 4)
    ]
    assert sum(neighbours) / len(neighbours) > 250  # of samples that follow one another in a stream; at random 341
