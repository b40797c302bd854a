"""The sample order: every epoch a permutation, and nothing but the settings decides it."""

import itertools
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.order import SampleOrder, permutation

GOLDEN = ([3, 2, 1, 6, 0, 7, 4, 5], [4, 1, 6, 3, 5, 7, 2, 0], [(0, 1, 1), (0, 0, 0), (0, 0, 1), (1, 2, 1), (58, 0, 2)])
COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.integers(1, 70), st.integers(1, 20), st.integers(0, 3))
def test_every_epoch_serves_every_sample_once(counts, num_streams, block, seed):
    order = SampleOrder(counts, seed, num_streams, block)
    every = {(shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
    for epoch in range(3):
        places = [order.position(g) for g in range(epoch * len(every), (epoch + 1) * len(every))]
        assert {place.epoch for place in places} == {epoch}
        assert len(places) == len(every)
        assert {(place.shard, place.sample) for place in places} == every


@pytest.mark.parametrize(("num_samples", "num_streams", "batch"), itertools.product([17, 64, 334], [1, 8, 64], [4, 32]))
def test_ranks_and_workers_together_serve_the_global_order(num_samples, num_streams, batch):
    order = SampleOrder([num_samples // 2, num_samples - num_samples // 2], 5, num_streams)
    steps, resume = 2 * num_samples // batch + 2, 3
    expected = [order.position(g) for g in range(resume * batch, steps * batch)]
    for world_size, workers in itertools.product([1, 2, 4], [1, 3]):
        fresh = SampleOrder(order.counts, 5, num_streams)
        served = {}
        for rank, worker in itertools.product(range(world_size), range(workers)):
            for q in range(resume * batch // world_size, steps * batch // world_size):
                if q % workers == worker:
                    served[q * world_size + rank] = fresh.position(q * world_size + rank)
        assert [served[g] for g in sorted(served)] == expected


@given(COUNTS, st.integers(1, 70), st.integers(0, 10**12))
def test_any_number_can_be_asked_for_directly(counts, num_streams, g):
    first = SampleOrder(counts, 1, num_streams).position(g)
    warm = SampleOrder(counts, 1, num_streams)
    for other in (0, g + 1, g // 2):
        warm.position(other)
    assert warm.position(g) == first
    assert first.epoch == g // sum(counts)


def test_a_stream_walks_through_whole_shards():
    """Serving 4 of 16 streams over one epoch of 64 shards needs a quarter of them, and each for one stretch."""
    order = SampleOrder([50] * 64, 0, num_streams=16, shuffle_block=25)
    numbers = [g for g in range(order.num_samples) if g % 16 in (0, 4, 8, 12)]
    read = Counter(order.position(g).shard for g in numbers)
    assert len(read) == 16
    for stream in (0, 4):
        shards = [order.position(g).shard for g in numbers if g % 16 == stream]
        assert len([shard for shard, _ in itertools.groupby(shards)]) == 4


def test_epochs_seeds_and_neighbours_differ():
    counts = [100, 100]
    first = [SampleOrder(counts, 0, 4).position(g)[1:] for g in range(200)]
    second_epoch = [SampleOrder(counts, 0, 4).position(g)[1:] for g in range(200, 400)]
    other_seed = [SampleOrder(counts, 1, 4).position(g)[1:] for g in range(200)]
    assert first != second_epoch
    assert first != other_seed
    in_order = sum(after[1] == before[1] + 1 for before, after in itertools.pairwise(first))
    assert in_order < 10


def test_a_small_set_mixes_its_batches_anew_each_epoch():
    """17 samples in one shard with 64 streams: who meets whom must not be fixed."""
    order = SampleOrder([17], 0)
    batches = {frozenset(order.position(17 * epoch + j).sample for j in range(4)) for epoch in range(50)}
    assert len(batches) > 40


def test_the_permutation_is_fixed_for_ever():
    """A change here changes every training's data: golden values."""
    assert permutation(8, 0, 0, 0) == GOLDEN[0]
    assert permutation(8, 7, 3, 2, 1, 5) == GOLDEN[1]
    order = SampleOrder([5, 3, 9], 42, 4, 3)
    assert [tuple(order.position(g)) for g in (0, 5, 16, 17, 1000)] == GOLDEN[2]


def test_pickling_keeps_the_order():
    order = SampleOrder([7, 9], 3, 5, 2)
    copy = pickle.loads(pickle.dumps(order))
    assert [copy.position(g) for g in range(40)] == [order.position(g) for g in range(40)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0), r"shard counts \[\] must be positive"),
        (([3, 0], 0), r"shard counts \[3, 0\] must be positive"),
        (([3], 0, 0), "num_streams=0"),
        (([3], 0, 1, 0), "shuffle_block=0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(*arguments)
