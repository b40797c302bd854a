"""Mixed sets: exact shares, every sample once per epoch of its set, the same batches for any world size."""

import itertools
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch

from data_prep.index import ShardSettings
from data_prep.loader import PairLoader, PairSettings
from data_prep.mix import MIX_NAME, Mix, MixPart, read_set
from data_prep.order import MixedOrder, SampleOrder
from data_prep.sources import list_items
from data_prep.storage import StorageError, write_bytes
from tests.unit.data_prep.test_loader import shard_here

COUNTS = ([3, 4], [5, 1, 6])


def mixed(shares: tuple[float, ...] = (0.75, 0.25), seed: int = 3) -> MixedOrder:
    return MixedOrder([SampleOrder(counts, seed, num_streams=4) for counts in COUNTS], shares, [0, 2], seed)


@pytest.mark.parametrize(("shares", "quota"), [((0.75, 0.25), 64), ((3, 1), 64), ((0.9, 0.1), 26), ((1, 1e-6), 1)])
def test_every_block_holds_the_shares_exactly(shares: tuple[float, ...], quota: int) -> None:
    order = mixed(shares)
    for block in range(3):
        shards = [order.position(g).shard for g in range(256 * block, 256 * (block + 1))]
        assert sum(shard >= 2 for shard in shards) == quota
    firsts = ["".join("ab"[order.position(256 * block + i).shard >= 2] for i in range(256)) for block in range(2)]
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("num_streams", [1, 3, 4, 64, 300])
@pytest.mark.parametrize("shares", [(0.75, 0.25), (5, 2, 1), (0.9, 0.1)])
def test_each_block_of_the_streams_and_each_period_of_a_stream_hold_the_shares(
    shares: tuple[float, ...], num_streams: int
) -> None:
    order = MixedOrder([SampleOrder([9], 0, num_streams) for _ in shares], shares, range(len(shares)), 7)
    block, period = order.turns * num_streams, order.turns * num_streams**2
    assert 256 <= block < 256 + num_streams
    for start in (5 * block, period + 2 * block):
        served = Counter(order.position(g).shard for g in range(start, start + block))
        assert tuple(served[number] for number in range(len(shares))) == order.quotas
    for stream in {0, num_streams // 2, num_streams - 1}:
        served = Counter(order.position(g).shard for g in range(period + stream, 2 * period, num_streams))
        assert tuple(served[number] for number in range(len(shares))) == order.quotas


def test_each_stream_goes_through_the_same_stream_of_each_set() -> None:
    order, alone = mixed(), [SampleOrder(counts, 3, num_streams=4) for counts in COUNTS]
    places = [order.position(g) for g in range(2048)]
    for stream, (source, first) in itertools.product(range(4), enumerate((0, 2))):
        mine = [place for place in places[stream::4] if (place.shard >= 2) == bool(source)]
        there = [alone[source].position(turn * 4 + stream) for turn in range(len(mine))]
        assert mine == [place._replace(shard=place.shard + first) for place in there]


def test_every_epoch_of_each_set_serves_each_of_its_samples_once() -> None:
    places = [mixed().position(g) for g in range(4 * 2048)]
    for first, counts in zip((0, 2), COUNTS, strict=True):
        every = {(first + shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
        for epoch in range(0, 100, 10):
            served = [place[1:] for place in places if place.epoch == epoch and (place.shard >= 2) == bool(first)]
            assert len(served) == len(every)
            assert set(served) == every


@pytest.mark.parametrize("readers", [1, 8, 16])
def test_a_reader_walks_through_few_shards_of_each_set(readers: int) -> None:
    """400 shards of 1,024, three to one: over 640 samples, at most two shards for each of its streams and sets."""
    sets = [SampleOrder([1024] * number, 0) for number in (300, 100)]
    order = MixedOrder(sets, (0.75, 0.25), (0, 300), 0)
    read = {order.position(g).shard for g in range(100_000 * readers, 100_640 * readers, readers)}
    assert len(read) <= 2 * 2 * 64 // readers


def test_any_number_can_be_asked_for_directly() -> None:
    asked = [mixed().position(g) for g in range(600)]
    assert [mixed().position(g) for g in reversed(range(600))] == asked[::-1]
    assert asked != [mixed(seed=4).position(g) for g in range(600)]


def test_shares_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive: leave out"):
        mixed((1, 0))


def test_what_is_no_mix_says_so(tmp_path: Path) -> None:
    write_bytes(f"{tmp_path}/a/b/{MIX_NAME}", b"{}")
    with pytest.raises(StorageError, match="it is no mix"):
        read_set(f"{tmp_path}/a/b")
    for sets, words in (("shards-x", "no complete set"), ("s3://no-such-bucket/x", "s3://no-such-bucket")):
        mix = Mix(parts=(MixPart(sets=(sets,), share=1),))
        write_bytes(f"{tmp_path}/a/b/{MIX_NAME}", mix.model_dump_json().encode())
        with pytest.raises(StorageError, match=words):
            read_set(f"{tmp_path}/a/b")


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> str:
    """Two sets of real images and their mix, three to one, named by paths beside it."""
    root = tmp_path_factory.mktemp("mix")
    items = list_items(str(photographs))[:16]
    for name, chosen in (("old", items[:5]), ("new", items[5:])):
        shard_here(chosen, f"{root}/shards/{name}", ShardSettings(samples_per_shard=4))
    parts = (MixPart(sets=("shards/new",), share=3), MixPart(sets=("shards/old",), share=1))
    write_bytes(f"{root}/mix/one/{MIX_NAME}", Mix(parts=parts).model_dump_json().encode())
    return f"{root}/mix/one"


@pytest.mark.parametrize(("world_size", "workers", "start"), [(1, 0, 5), (2, 0, 0), (2, 1, 3), (4, 0, 2)])
def test_batches_are_the_same_for_any_world_workers_and_start(mix: str, world_size: int, workers: int, start: int):
    settings = PairSettings(scale=2, patch_px=16, num_streams=8, shuffle_block=3, seed=1)
    expected = list(itertools.islice(PairLoader(mix, settings, 8, 8, 0, 1, 0), 8))[start:]
    ranks = [
        list(
            itertools.islice(PairLoader(mix, settings, 8, 8 // world_size, rank, world_size, workers, start), 8 - start)
        )
        for rank in range(world_size)
    ]
    for step, whole in enumerate(expected):
        for rank in range(world_size):
            assert ranks[rank][step].keys == whole.keys[rank::world_size]
            assert torch.equal(ranks[rank][step].low_res, whole.low_res[rank::world_size])


def test_a_mix_serves_both_sets(mix: str) -> None:
    found = read_set(mix)
    assert (found.num_samples, len(found.shards)) == (16, 5)
    assert pickle.loads(pickle.dumps(found)).tar_uri(4) == found.tar_uri(4)
    assert found.tar_uri(4).endswith("shards/old/shard-000001.tar")
