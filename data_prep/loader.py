"""Shards to batches of training pairs, in an exact order that no world size, worker or restart changes.

Sample number i of a global step belongs to rank i mod world_size, as its turn i // world_size of that step; worker k
of L makes those turns q, counted on through the steps, with q mod L = k. Where world_size x micro_batch does not
divide the global batch, the last micro-batches of a step are shorter, or empty. A worker delivers its share of each
micro-batch, the main process lays the shares back into order. Where num_streams is divisible by
world_size x num_workers, a worker serves whole streams and reads few shards at a time; other numbers give the same
batches and read more.
"""

import functools
import itertools
import logging
import multiprocessing
import multiprocessing.util
import os
import tempfile
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
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

_PREFETCH_BATCHES = 32  # how many micro-batches ahead the next shards are asked for
_FETCH_BATCHES = 2  # how many micro-batches ahead single samples are fetched where their shards are not here
_NEIGHBOURS = 8  # how many samples of a shard are tried in a damaged one's place, before other shards
_WORKER_QUEUE = 2  # shares that each worker has ready


_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One micro-batch of one rank.

    low_res (b, 3, p, p) and high_res (b, 3, p * scale, p * scale) are float32, about 0..1; `keys` are the samples'
    names, `step` is the global step.
    """

    low_res: torch.Tensor
    high_res: torch.Tensor
    keys: list[str]
    step: int


class _Share(NamedTuple):
    """One worker's part of a micro-batch; high_res stays uint8 on its way to the main process."""

    low_res: torch.Tensor
    high_res: torch.Tensor
    keys: list[str]


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
        ahead: deque[list[_Crop]] = deque()
        number = self.first_micro_batch
        try:
            while True:
                while len(ahead) < _PREFETCH_BATCHES:
                    ahead.append(self._crops(order, worker, num_workers, number + len(ahead)))
                reader.prefetch(crop.place.shard for crops in ahead for crop in crops)
                soon = [crop.where for crops in itertools.islice(ahead, _FETCH_BATCHES) for crop in crops]
                reader.fetch_ahead(where for where in soon if not images.holds(*where))
                yield self._share([images.pair(crop) for crop in ahead.popleft()])
                number += 1
        finally:
            reader.close()

    def _crops(self, order: SampleOrder | MixedOrder, worker: int, num_workers: int, number: int) -> list[_Crop]:
        """What this worker makes for micro-batch `number`."""
        turns = self.turns
        start = number * turns.micro_batch
        mine = range(start + (worker - start) % num_workers, start + turns.size(number), num_workers)
        crops = self.settings.crops_per_image
        return [_Crop(*crop_position(order, turns.sample(q), crops)) for q in mine]

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


def micro_batches_per_step(global_batch: int, micro_batch: int, world_size: int) -> int:
    """How many micro-batches each rank has in a global step: enough for the rank with the most samples."""
    return -(-global_batch // (world_size * micro_batch))


class PairLoader:
    """An endless iterator over this rank's micro-batches, from global step `start_step` on.

    `global_batch` samples make a global step; each rank serves its part in micro-batches of at most `micro_batch`,
    `micro_batches_per_step` of them in every step (the last may be empty where the numbers do not divide). The
    batches are bit-identical for every `num_workers`; all ranks' batches together, for every `world_size`.
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
    ) -> None:
        _check_numbers(global_batch, micro_batch, rank, world_size, num_workers, start_step)
        self.shard_set = read_set(shard_set_uri)
        _check_sizes(self.shard_set, settings)
        self._num_workers = num_workers
        self._turns = _Turns(global_batch, micro_batch, rank, world_size)
        self._first = start_step * self._turns.per_step
        self._shares = _Shares(self.shard_set, settings, self._turns, self._first)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.shard_set.num_samples

    def __iter__(self) -> Iterator[Batch]:
        shares = iter(self._shares) if self._num_workers == 0 else iter(self._data_loader())
        number = self._first
        while True:
            parts = [next(shares) for _ in range(max(1, self._num_workers))]
            yield self._batch(parts, number)
            number += 1

    def _batch(self, parts: list[_Share], number: int) -> Batch:
        """The micro-batch whose samples the parts hold in turn, beginning with the worker whose turn it is."""
        size, workers = self._turns.size(number), len(parts)
        low_res = parts[0].low_res.new_empty((size, *parts[0].low_res.shape[1:]))
        high_res = low_res.new_empty((size, *parts[0].high_res.shape[1:]))
        keys = [""] * size
        for worker, part in enumerate(parts):
            rows = slice((worker - number * self._turns.micro_batch) % workers, None, workers)
            low_res[rows] = part.low_res
            torch.div(part.high_res, 255, out=high_res[rows])
            keys[rows] = part.keys
        return Batch(low_res, high_res, keys, number // self._turns.per_step)

    def _data_loader(self) -> DataLoader[_Share]:
        """Worker processes from a fork server: a fork of this process would copy Ray's and gRPC's threads' locks."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        _shorten_sockets()
        return DataLoader(
            self._shares,
            batch_size=None,
            num_workers=self._num_workers,
            multiprocessing_context=context,
            prefetch_factor=_WORKER_QUEUE,
            worker_init_fn=functools.partial(_start_worker, s3.environment()),
            generator=torch.Generator(),  # else the workers' seed is drawn from the training's random numbers
        )


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
    """The fork server may be older than the present S3 credentials."""
    for name in s3.environment().keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


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
