"""The order in which samples are served: exact, shuffled, and a function of nothing but the settings.

Every sample that is ever served has a number g = 0, 1, 2, ... (global step t serves g = t x batch to
(t + 1) x batch - 1). With N samples, g lies in epoch e = g // N. In each epoch

1. the shards are permuted, and the samples inside each shard; laid end to end they are N places;
2. the places are cut into C contiguous ranges, the streams; stream c serves the g with g mod C = c, in sequence,
   so a stream walks through whole shards, and a reader that serves whole streams needs few shards at a time;
3. inside a stream, places are permuted within fixed blocks, which mixes the shards that meet there.

All permutations are keyed by (seed, epoch, which). Each epoch serves every sample once. World size, workers and
resuming do not enter: who serves g is decided elsewhere, and any g can be asked for directly. As the stream follows
from g and not from the place in the epoch, a rank keeps its streams across epochs even where C does not divide N.
"""

import bisect
import functools
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_SHARDS, _INSIDE, _BLOCK, _MIX, _MIX_STREAMS, _MIX_BLOCKS = range(6)
_MIX_BLOCK = 256


class Position(NamedTuple):
    """Where a sample comes from: `sample` counts inside `shard`."""

    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class _Epoch:
    """One epoch: the order of the shards, the place where each starts, the place where each stream starts."""

    shards: list[int]
    shard_starts: list[int]
    stream_starts: list[int]


class SampleOrder:
    """The order over shards with `counts` samples each, cut into `num_streams` with blocks of `shuffle_block`.

    Raises ValueError where a count, the number of streams or the block is below 1.
    """

    def __init__(self, counts: Sequence[int], seed: int, num_streams: int = 64, shuffle_block: int = 256) -> None:
        if not counts or min(counts) < 1:
            raise ValueError(f"shard counts {list(counts)[:8]} must be positive; leave empty shards out")
        if num_streams < 1 or shuffle_block < 1:
            raise ValueError(f"num_streams={num_streams} and shuffle_block={shuffle_block} must be at least 1")
        self.counts = tuple(counts)
        self.num_samples = sum(counts)
        self.seed = seed
        self.num_streams = num_streams
        self.shuffle_block = shuffle_block
        self._epoch = functools.lru_cache(maxsize=4)(self._lay_out)
        # a worker has one block and one or two shards of each of its streams in hand
        self._permutation = functools.lru_cache(maxsize=4 * num_streams + 64)(self._permute)

    def __reduce__(self) -> tuple[type["SampleOrder"], tuple[tuple[int, ...], int, int, int]]:
        return SampleOrder, (self.counts, self.seed, self.num_streams, self.shuffle_block)

    def position(self, g: int) -> Position:
        """Where sample number `g` comes from."""
        epoch = g // self.num_samples
        layout = self._epoch(epoch)
        stream = g % self.num_streams
        turn = (g % self.num_samples) // self.num_streams  # of this stream in this epoch
        start, stop = layout.stream_starts[stream : stream + 2]
        block = turn // self.shuffle_block
        block_start = start + block * self.shuffle_block
        block_size = min(self.shuffle_block, stop - block_start)
        inside = self._permutation(block_size, epoch, _BLOCK, stream, block)[turn % self.shuffle_block]
        return self._sample_at(epoch, layout, block_start + inside)

    def _sample_at(self, epoch: int, layout: _Epoch, place: int) -> Position:
        rank = bisect.bisect_right(layout.shard_starts, place) - 1
        shard = layout.shards[rank]
        inside = self._permutation(self.counts[shard], epoch, _INSIDE, shard, 0)
        return Position(epoch, shard, inside[place - layout.shard_starts[rank]])

    def _lay_out(self, epoch: int) -> _Epoch:
        shards = permutation(len(self.counts), self.seed, epoch, _SHARDS)
        starts = np.concatenate([[0], np.cumsum([self.counts[shard] for shard in shards])])
        # the epoch's first sample falls to this stream; the remainder of N / C goes to it and those after it
        first = epoch * self.num_samples % self.num_streams
        base, extra = divmod(self.num_samples, self.num_streams)
        lengths = [base + ((stream - first) % self.num_streams < extra) for stream in range(self.num_streams)]
        stream_starts = np.concatenate([[0], np.cumsum(lengths)])
        return _Epoch(shards, starts.tolist(), stream_starts.tolist())

    def _permute(self, size: int, *key: int) -> "array[int]":
        return array("I", permutation(size, self.seed, *key))  # a list takes nine times the memory


class MixedOrder:
    """Several orders served in turn by their shares; exact, elastic and local as each of them is.

    Numbers come in blocks of `_MIX_BLOCK`, rounded up to whole turns of the C streams; each block serves the same
    number of samples of every order, by its share. The mixing is done inside each stream: stream c of the mix serves
    stream c of every order, in sequence, so a reader of whole streams walks through whole shards of each. Over C blocks
    (a period) every stream gets every order's share exactly: in each block the slots, sorted by order, are dealt round
    the streams, which begin at another slot in each block of the period; which stream begins where, and in which turn
    of the block a stream's slots come, are permutations keyed by (seed, period). So where number g comes from follows
    from g alone, and each order goes through its own epochs, in which it serves every sample once. `first_shards`: what
    is added to each order's shard numbers. Raises ValueError for shares that are not positive.
    """

    def __init__(
        self, orders: Sequence[SampleOrder], shares: Sequence[float], first_shards: Sequence[int], seed: int
    ) -> None:
        if not orders or min(shares) <= 0:
            raise ValueError(f"shares {list(shares)} of a mix must be positive: leave out what has no share")
        self.orders = tuple(orders)
        self.num_streams = orders[0].num_streams
        self.first_shards = tuple(first_shards)
        self.seed = seed
        self.turns = -(-_MIX_BLOCK // self.num_streams)  # of each stream in a block
        self.quotas = _quotas(shares, self.turns * self.num_streams)
        self._period = functools.lru_cache(maxsize=2 * self.num_streams + 16)(self._lay_out)

    def position(self, g: int) -> Position:
        """Where sample number `g` comes from."""
        turn, stream = divmod(g, self.num_streams)
        period, inside = divmod(turn, self.turns * self.num_streams)
        source, served = self._period(period, stream)[inside]
        number = (period * self.quotas[source] + served) * self.num_streams + stream
        place = self.orders[source].position(number)
        return place._replace(shard=place.shard + self.first_shards[source])

    def _lay_out(self, period: int, stream: int) -> list[tuple[int, int]]:
        """(order, how many of its samples the stream has had in this period) for each turn of a stream's period."""
        blocks = self.num_streams
        starts = (
            permutation(blocks, self.seed, period, _MIX_STREAMS),
            permutation(blocks, self.seed, period, _MIX_BLOCKS),
        )
        first = (starts[0][stream] + np.array(starts[1])) % blocks
        slots = first[:, None] + np.arange(self.turns) * blocks
        shuffled = _bits(slots.size, self.seed, period, _MIX, stream).reshape(slots.shape).argsort(kind="stable")
        slots = np.take_along_axis(slots, shuffled, axis=1)
        sources = np.searchsorted(np.cumsum(self.quotas), slots.ravel(), side="right").tolist()
        counts = [itertools.count() for _ in self.quotas]
        return [(source, next(counts[source])) for source in sources]


def _quotas(shares: Sequence[float], block: int) -> tuple[int, ...]:
    """Samples of each order in a block, nearest to its share, at least one; they add up to the block."""
    exact = [share / sum(shares) * block for share in shares]
    quotas = [max(1, int(value)) for value in exact]
    while sum(quotas) < block:
        behind = max(range(len(exact)), key=lambda source: exact[source] - quotas[source])
        quotas[behind] += 1
    while sum(quotas) > block:
        quotas[quotas.index(max(quotas))] -= 1
    return tuple(quotas)


def crop_position(order: SampleOrder | MixedOrder, g: int, crops: int) -> tuple[Position, int]:
    """Where number `g` comes from, and which of its sample's `crops` it is, where each sample is served that often.

    A sample's crops follow one another in its stream, C = num_streams numbers apart: whoever serves the stream decodes
    the image once, and a batch of at most C pairs shows no image twice. Where C does not divide the number of samples,
    epochs overlap by less than C x crops numbers; every sample still has its crops once in each.
    """
    turn, stream = divmod(g, order.num_streams)
    return order.position(turn // crops * order.num_streams + stream), turn % crops


def permutation(size: int, *key: int) -> list[int]:
    """A permutation of range(size) for a key of non-negative numbers.

    Made from a bit generator's raw output, which numpy keeps fixed for ever; its `permutation` may change.
    """
    return np.argsort(_bits(size, *key), kind="stable").tolist()


def _bits(size: int, *key: int) -> np.ndarray:
    """`size` random numbers below 2**64 for a key."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
