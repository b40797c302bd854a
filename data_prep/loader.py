"""Shards to batches of training pairs, in an exact order that no world size, worker or restart changes.

Sample number i of a global step belongs to rank i mod world_size, as its turn i // world_size of that step; worker k
of L makes those turns q, counted on through the steps, with q mod L = k. Where world_size x micro_batch does not
divide the global batch, the last micro-batches of a step are shorter, or empty. A worker delivers its share of so many
micro-batches that it has a sample in them, the main process lays the shares back into order. Where num_streams is
divisible by world_size x num_workers, a worker serves whole streams and reads few shards at a time; other numbers give
the same batches and read more.
"""

import functools
import itertools
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import sys
import tempfile
import threading
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_prep import s3
from data_prep.image import Picture, decode
from data_prep.index import ShardSet
from data_prep.mix import order_of, read_set
from data_prep.order import MixedOrder, Position, SampleOrder, crop_position
from data_prep.pairs import Pair, PairSettings, make_pair
from data_prep.private_folder import folder_for_sockets
from data_prep.shard_cache import ShardReader
from data_prep.storage import DamageError, StorageError

__all__ = ["Batch", "PairLoader", "PairSettings"]

_AHEAD_TURNS = 32  # how many samples of each stream ahead its next shard is asked for; half a shard at most
_AHEAD_SAMPLES = 8  # at least so many samples ahead are known, and fetched one by one where their shards are not here
_NEIGHBOURS = 8  # how many samples of a shard are tried in a damaged one's place, before other shards
_READY_SAMPLES = 4  # that each worker has ready at least
_READY_SHARES = 2


_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One micro-batch of one rank.

    low_res (b, 3, p, p) and high_res (b, 3, p * scale, p * scale) are float32, about 0..1, on the loader's device;
    `keys` are the samples' names, `step` is the global step.
    """

    low_res: torch.Tensor
    high_res: torch.Tensor
    keys: list[str]
    step: int


class _Share(NamedTuple):
    """One worker's part of one or more micro-batches; high_res stays uint8 on its way to the device."""

    low_res: torch.Tensor
    high_res: torch.Tensor
    keys: list[str]

    def rows(self, start: int, count: int) -> "_Share":
        """`count` of its samples."""
        rows = slice(start, start + count)
        return _Share(self.low_res[rows], self.high_res[rows], self.keys[rows])


class _Crop(NamedTuple):
    """Crop `number` of the sample at a place."""

    place: Position
    number: int

    @property
    def where(self) -> tuple[int, int]:
        """(shard, sample) in the set."""
        return self.place.shard, self.place.sample


class _Turns(NamedTuple):
    """Which samples fall to a rank: its turns q = 0, 1, 2, ..., `micro_batch` to a micro-batch, empty ones included."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def per_step(self) -> int:
        """Micro-batches of each rank in a global step."""
        return micro_batches_per_step(self.global_batch, self.micro_batch, self.world_size)

    def size(self, number: int) -> int:
        """Samples in the rank's micro-batch `number`: those of its turns that are not past the global step's end."""
        before = number % self.per_step * self.micro_batch
        mine = -(-(self.global_batch - self.rank) // self.world_size)
        return min(max(mine - before, 0), self.micro_batch)

    def of_worker(self, number: int, worker: int, num_workers: int) -> range:
        """The turns q of micro-batch `number` that fall to a worker."""
        start = number * self.micro_batch
        return range(start + (worker - start) % num_workers, start + self.size(number), num_workers)

    def num_streams(self, all_streams: int, num_workers: int) -> int:
        """How many of all streams a worker meets: few where its numbers g keep their remainder."""
        divides = self.global_batch == self.per_step * self.micro_batch * self.world_size
        return all_streams // math.gcd(all_streams, self.world_size * num_workers) if divides else all_streams

    def span(self, num_workers: int) -> int:
        """How many micro-batches hold a turn for every worker."""
        return -(-num_workers // self.micro_batch)

    def sample(self, q: int) -> int:
        """The number g of the sample that turn q serves."""
        step, turn = divmod(q, self.per_step * self.micro_batch)
        return step * self.global_batch + turn * self.world_size + self.rank


class _Shares(IterableDataset[_Share]):
    """The shares of one worker, or of the only reader where there are no workers; endless."""

    def __init__(
        self,
        shard_set: ShardSet,
        settings: PairSettings,
        turns: "_Turns",
        first_micro_batch: int,
    ) -> None:
        self.shard_set = shard_set
        self.settings = settings
        self.turns = turns
        self.first_micro_batch = first_micro_batch

    def __iter__(self) -> Iterator[_Share]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        settings = self.settings
        order = order_of(self.shard_set, settings)
        reader = ShardReader(self.shard_set, settings.cache_dir, settings.cache_bytes)
        images = _Images(self.shard_set, reader, settings)
        horizon = _horizon(order, self.shard_set, self.turns.world_size * num_workers)
        self.shard_set.remember(_in_hand(order, self.shard_set, self.turns.num_streams(order.num_streams, num_workers)))
        ahead: deque[list[_Crop]] = deque()  # of each share, from the next one on
        due: Counter[int] = Counter()  # how many of these crops come from each shard
        share = 0
        try:
            while True:
                while len(ahead) < 2 or (due.total() < horizon and len(ahead) < horizon):
                    ahead.append(self._crops(order, worker, num_workers, share + len(ahead)))
                    due.update(crop.place.shard for crop in ahead[-1])
                reader.prefetch(due)
                crops = ahead.popleft()
                soon = itertools.islice(itertools.chain(*ahead), max(len(ahead[0]), _AHEAD_SAMPLES))
                reader.fetch_ahead(*([c.where for c in some if not images.holds(*c.where)] for some in (crops, soon)))
                yield self._share([images.pair(crop) for crop in crops])
                share += 1
                due.subtract(crop.place.shard for crop in crops)
                due += Counter()  # without those that were passed
        finally:
            reader.close()

    def _crops(self, order: SampleOrder | MixedOrder, worker: int, num_workers: int, share: int) -> list[_Crop]:
        """What this worker makes for its share number `share`."""
        span, crops = self.turns.span(num_workers), self.settings.crops_per_image
        first = self.first_micro_batch + share * span
        mine = itertools.chain(*(self.turns.of_worker(n, worker, num_workers) for n in range(first, first + span)))
        return [_Crop(*crop_position(order, self.turns.sample(q), crops)) for q in mine]

    def _share(self, named_pairs: list[tuple[str, Pair]]) -> _Share:
        patch, side = self.settings.patch_px, self.settings.min_side_px
        low_res = np.empty((len(named_pairs), 3, patch, patch), np.float32)
        high_res = np.empty((len(named_pairs), 3, side, side), np.uint8)
        for row, (_, pair) in enumerate(named_pairs):
            low_res[row] = pair.low_res
            high_res[row] = pair.high_res
        return _Share(torch.from_numpy(low_res), torch.from_numpy(high_res), [key for key, _ in named_pairs])


class _Images:
    """Pictures by place. Decoded ones are kept as `cache_decoded_bytes` allows, and while crops of them are due."""

    def __init__(self, shard_set: ShardSet, reader: ShardReader, settings: PairSettings) -> None:
        self._set = shard_set
        self._reader = reader
        self._settings = settings
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._kept_bytes = 0
        self._due: OrderedDict[tuple[int, int], tuple[str, Picture]] = OrderedDict()
        self._named: set[str] = set()

    def pair(self, crop: _Crop) -> tuple[str, Pair]:
        """The key and the pair of a crop."""
        key, picture = self._picture(crop)
        with self._naming(key, crop.place.shard):
            return key, make_pair(picture, key, crop.place.epoch, self._settings, crop.number)

    def holds(self, shard: int, number: int) -> bool:
        """Whether the sample's picture is here and need not be read."""
        return (shard, number) in self._due or (shard, number) in self._kept

    def _picture(self, crop: _Crop) -> tuple[str, Picture]:
        """The key and the picture; of several crops, the last one releases it."""
        crops, place = self._settings.crops_per_image, crop.where
        if crops == 1:
            return self._sound(*place)
        if place not in self._due:
            self._due[place] = self._sound(*place)
            if len(self._due) > 2 * self._settings.num_streams:  # streams that others go on with
                self._due.popitem(last=False)
        return self._due.pop(place) if crop.number == crops - 1 else self._due[place]

    def _sound(self, shard: int, number: int) -> tuple[str, Picture]:
        """The sample, or what takes its place: see `_substitutes`."""
        if self._settings.on_damage == "stop":
            return self._read(shard, number)
        for place in _substitutes(self._set, shard, number):
            try:
                return self._read(*place)
            except DamageError as error:
                if str(error) not in self._named:
                    self._named.add(str(error))
                    _log.warning("%s; skipped: another sample takes its place", error)
        raise StorageError(f"{self._set.uri}: no sound sample is left; make the shards anew")

    def _read(self, shard: int, number: int) -> tuple[str, Picture]:
        sample = self._set.samples(shard)[number]
        key = sample.key
        if (shard, number) in self._kept:
            self._kept.move_to_end((shard, number))
            return key, Picture(self._kept[shard, number])
        data, seek = self._reader.read(shard, number)
        with self._naming(key, shard):
            if not self._settings.cache_decoded_bytes and self._settings.crops_per_image == 1:
                return key, Picture(data, seek, sample.by_pillow)
            image = decode(data)
        if image.nbytes <= self._settings.cache_decoded_bytes:
            self._kept[shard, number] = image
            self._kept_bytes += image.nbytes
            while self._kept_bytes > self._settings.cache_decoded_bytes:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return key, Picture(image)

    @contextmanager
    def _naming(self, key: str, shard: int) -> Iterator[None]:
        """Say which image of which shard cannot be decoded: sharded before what is wrong with it was looked for."""
        try:
            yield
        except StorageError:
            raise
        except ValueError as error:
            raise DamageError(f"{self._set.tar_uri(shard)}: {key} {error}; make the shards anew") from error


def _substitutes(shard_set: ShardSet, shard: int, number: int) -> Iterator[tuple[int, int]]:
    """A place, and those whose samples take its place in turn where it is damaged.

    First the next few of its shard, then the same number in the shards after it. As this follows from the place
    alone, a damaged set has one sequence, too, whatever the number of nodes and workers.
    """
    count = shard_set.shards[shard].count
    yield from ((shard, (number + step) % count) for step in range(min(count, _NEIGHBOURS + 1)))
    for step in range(1, len(shard_set.shards)):
        other = (shard + step) % len(shard_set.shards)
        yield other, number % shard_set.shards[other].count


def _horizon(order: SampleOrder | MixedOrder, shard_set: ShardSet, num_readers: int) -> int:
    """How many of its samples one of `num_readers` looks ahead: so that its streams' next shards are known in time.

    Shards are held from then on until they are passed, so of small ones only the next is asked for.
    """
    per_shard = shard_set.num_samples // len(shard_set.shards)
    turns = max(1, min(_AHEAD_TURNS, per_shard // 2))
    return max(_AHEAD_SAMPLES, -(-turns * order.num_streams // num_readers))


def _in_hand(order: SampleOrder | MixedOrder, shard_set: ShardSet, num_streams: int) -> int:
    """About as many shards as a reader of some streams reads from at a time: those of a block, and the next."""
    orders = order.orders if isinstance(order, MixedOrder) else (order,)
    per_shard = shard_set.num_samples // len(shard_set.shards)
    in_block = -(-orders[0].shuffle_block // per_shard) + 2
    return min(len(shard_set.shards), len(orders) * num_streams * in_block + _NEIGHBOURS)


def micro_batches_per_step(global_batch: int, micro_batch: int, world_size: int) -> int:
    """How many micro-batches each rank has in a global step: enough for the rank with the most samples."""
    return -(-global_batch // (world_size * micro_batch))


class PairLoader:
    """An endless iterator over this rank's micro-batches, from global step `start_step` on.

    `global_batch` samples make a global step; each rank serves its part in micro-batches of at most `micro_batch`,
    `micro_batches_per_step` of them in every step (the last may be empty where the numbers do not divide). The
    batches are bit-identical for every `num_workers`; all ranks' batches together, for every `world_size`. They lie on
    `device`; to a GPU they are copied from pinned memory, while it goes on with what it has.
    Raises ValueError where the numbers do not fit or an image is smaller than a crop, StorageError where the shards
    are absent or damaged.
    """

    def __init__(
        self,
        shard_set_uri: str,
        settings: PairSettings,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_workers: int,
        start_step: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_numbers(global_batch, micro_batch, rank, world_size, num_workers, start_step)
        self.shard_set = read_set(shard_set_uri)
        _check_sizes(self.shard_set, settings)
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._turns = _Turns(global_batch, micro_batch, rank, world_size)
        self._first = start_step * self._turns.per_step
        self._shares = _Shares(self.shard_set, settings, self._turns, self._first)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.shard_set.num_samples

    def __iter__(self) -> Iterator[Batch]:
        shares = iter(self._shares) if self._num_workers == 0 else self._start_workers()
        workers = max(1, self._num_workers)
        span = self._turns.span(workers)
        for first in itertools.count(self._first, span):
            parts, taken = [next(shares) for _ in range(workers)], [0] * workers
            for number in range(first, first + span):
                counts = [len(self._turns.of_worker(number, worker, workers)) for worker in range(workers)]
                yield self._batch([part.rows(*rows) for part, *rows in zip(parts, taken, counts, strict=True)], number)
                taken = [start + count for start, count in zip(taken, counts, strict=True)]

    def _batch(self, parts: list[_Share], number: int) -> Batch:
        """The micro-batch whose samples the parts hold in turn, beginning with the worker whose turn it is."""
        size, workers = self._turns.size(number), len(parts)
        pinned = self._device.type == "cuda"
        low_res, high_res = (
            torch.empty((size, *part.shape[1:]), dtype=part.dtype, pin_memory=pinned) for part in parts[0][:2]
        )
        keys = [""] * size
        for worker, part in enumerate(parts):
            rows = slice((worker - number * self._turns.micro_batch) % workers, None, workers)
            low_res[rows], high_res[rows], keys[rows] = part
        low_res, high_res = (side.to(self._device, non_blocking=True) for side in (low_res, high_res))
        high_res = high_res / torch.full((), 255.0, device=self._device)  # by a number CUDA would multiply: other bits
        return Batch(low_res, high_res, keys, number // self._turns.per_step)

    def _start_workers(self) -> Iterator[_Share]:
        """Worker processes from a fork server: a fork of this process would copy Ray's and gRPC's threads' locks."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.reader_server"])
        _shorten_sockets()
        per_share = max(1, self._turns.micro_batch * self._turns.span(self._num_workers) // self._num_workers)
        loader = DataLoader(
            self._shares,
            batch_size=None,
            num_workers=self._num_workers,
            multiprocessing_context=context,
            prefetch_factor=max(_READY_SHARES, -(-_READY_SAMPLES // per_share)),
            worker_init_fn=functools.partial(_start_worker, s3.environment()),
            generator=torch.Generator(),  # else the workers' seed is drawn from the training's random numbers
        )
        with _without_main():
            return iter(loader)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile do not import the main module again, which in a Ray worker is Ray's."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _shorten_sockets() -> None:
    """Where the temporary folder is too long for the sockets of worker processes, give them another."""
    folder = folder_for_sockets(len("/pymp-01234567/listener-01234567"), "hatchery-sockets")
    if folder:
        usual = tempfile.tempdir
        try:
            tempfile.tempdir = folder
            multiprocessing.util.get_temp_dir()  # makes it, remembers it for this process and its workers, deletes it
        finally:
            tempfile.tempdir = usual


def _start_worker(environment: dict[str, str], _: int) -> None:
    """Take the present S3 credentials, which the fork server may be older than, and end with the training process."""
    if training := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(training,), daemon=True).start()
    for name in s3.environment().keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _end_with(training: BaseProcess) -> None:
    """End this process when the one that it reads for is gone, killed or not; its own parent is the fork server."""
    training.join()
    os._exit(1)


def _check_numbers(
    global_batch: int, micro_batch: int, rank: int, world_size: int, num_workers: int, start_step: int
) -> None:
    if min(global_batch, micro_batch, world_size) < 1:
        raise ValueError(f"{global_batch=}, {micro_batch=} and {world_size=} must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in 0..{world_size - 1}, the ranks of world_size={world_size}")
    if num_workers < 0 or start_step < 0:
        raise ValueError(f"num_workers={num_workers} and start_step={start_step} must not be negative")


def _check_sizes(shard_set: ShardSet, settings: PairSettings) -> None:
    """Raise ValueError that names an image too small for a crop."""
    needed = settings.min_side_px
    for number, shard in enumerate(shard_set.shards):
        if shard.min_side_px < needed:
            sample = min(shard_set.samples(number), key=lambda entry: entry.side_px)
            raise ValueError(
                f"{shard_set.tar_uri(number)}: {sample.key} has {sample.width}x{sample.height} pixels, a crop of "
                f"patch_px={settings.patch_px} at scale {settings.scale} needs {needed}; make the shards with "
                f"min_side_px={needed} or choose a smaller patch_px"
            )
