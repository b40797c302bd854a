"""Samples' bytes by shard and number: from local tars, from a cache of tars, or straight from an object store.

All readers of a node share one cache folder. A tar is stored there under its sha256, downloaded once and checked. A
reader holds the tars that its next samples come from and lets go of those that they have passed; when the folder
outgrows its limit, the tars that nobody holds are deleted, the longest unused first. So a set may be larger than the
cache by any factor: what must fit is what is being read, one or two shards for each stream of the order. Where even
that does not fit, and until a tar has arrived, samples come as ranges of the object, a few ahead: a training starts
before the first tar is there, and a cache that is too small costs requests, not correctness. A tar that was damaged on
this node's disk is deleted, and its samples come from the store again.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_prep.index import Sample, ShardSet, seek_hash
from data_prep.private_folder import private_folder
from data_prep.storage import DamageError, StorageError, download, is_local, read_range, sha256_of, sweep

_OPEN_FILES = 128
_DOWNLOADS = 2  # tars at once, of each reader
_QUEUED = 4  # tars asked for and not there; more are asked for when these have come: the store is not flooded
_RANGES = 8  # samples at once
_RANGES_AHEAD = 64  # samples in memory that nobody has read yet
_FULL_S = 1.0  # how long a cache that is full of tars being read is not asked again, unless one was let go of
_FAILED_S = 30.0  # how long a tar that could not be fetched is not asked for again; a damaged one never is

_log = logging.getLogger(__name__)


def default_cache() -> str:
    """The user's own cache folder on this node, into which nobody else can write."""
    try:
        return private_folder("hatchery-cache")
    except OSError as error:
        raise StorageError(
            f"{error.filename}: no cache for shards can be made ({error.strerror}); set compute.cache_dir"
        ) from error


class ShardReader:
    """Reads samples of one shard set; `cache_dir` and `cache_bytes` matter for sets in an object store only."""

    def __init__(self, shard_set: ShardSet, cache_dir: str | None, cache_bytes: int) -> None:
        self._set = shard_set
        self._local = is_local(shard_set.uri)
        self._cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, most recent last
        self._wanted: set[int] = set()
        self._full_until = 0.0
        self._failed_until: dict[int, float] = {}
        self._ahead: dict[tuple[int, int], Future[bytes]] = {}
        self._downloads = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="shard-download")
        self._ranges = ThreadPoolExecutor(_RANGES, thread_name_prefix="sample-range")
        if not self._local:
            sweep(str(self._cache))

    @functools.cached_property
    def _cache(self) -> Path:
        """The cache folder; a local set needs none."""
        return Path(self._cache_dir or default_cache())

    def read(self, shard: int, number: int) -> tuple[bytes, bytes]:
        """The original bytes of sample `number`, and its seek points; none where these are not the sidecar's.

        Raises DamageError where the bytes are not what the index promises, in the store itself, too: no pixel depends
        on seek points.
        """
        sample = self._set.samples(shard)[number]
        descriptor = self._descriptor(shard)
        ahead = self._ahead.pop((shard, number), None)
        if descriptor is not None:
            both = _read_at(descriptor, sample)
        else:
            both = ahead.result() if ahead else self._range(shard, number)
        sound = _is_sound(both, sample)
        if not sound and descriptor is not None and not self._local:
            self._discard(shard)
            both = self._range(shard, number)
            sound = _is_sound(both, sample)
        if not sound:
            raise DamageError(
                f"{self._set.tar_uri(shard)}: sample {sample.key} is not the one that was written; make the shard anew"
            )
        return both[: sample.size], _seek_points(both, sample)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Say which shards will be read soon, the next one first; let go of all others.

        They are held if they are here, else their download is started as far as the queue has room.
        """
        if self._local:
            return
        soon = list(itertools.islice(dict.fromkeys(shards), _OPEN_FILES))
        for shard in self._files.keys() - set(soon):
            self._let_go(self._files.pop(shard))
            self._full_until = 0.0
        now = time.monotonic()
        for shard in soon:
            if shard in self._wanted or self._descriptor(shard) is not None:
                continue
            waits = now < max(self._full_until, self._failed_until.get(shard, 0.0))
            if not waits and len(self._wanted) < _QUEUED:
                self._wanted.add(shard)
                self._downloads.submit(self._fetch, shard)

    def fetch_ahead(self, now: Iterable[tuple[int, int]], soon: Iterable[tuple[int, int]] = ()) -> None:
        """Start to fetch the next samples (shard, number) of those tars that are not here; forget all others.

        For those of `soon` a tar that is on its way may still come in time.
        """
        if self._local:
            return
        wanted = list(dict.fromkeys([*now, *(place for place in soon if place[0] not in self._wanted)]))
        for place in self._ahead.keys() - set(wanted):
            self._ahead.pop(place).cancel()
        for place in wanted:
            if len(self._ahead) >= _RANGES_AHEAD:
                return
            if place not in self._ahead and self._descriptor(place[0]) is None:
                self._ahead[place] = self._ranges.submit(self._range, *place)

    def close(self) -> None:
        """Close the files and stop fetching."""
        self._ranges.shutdown(wait=True, cancel_futures=True)
        self._downloads.shutdown(wait=True, cancel_futures=True)
        while self._files:
            self._let_go(self._files.popitem()[1])

    def _range(self, shard: int, number: int) -> bytes:
        sample = self._set.samples(shard)[number]
        size, offset = _extent(sample)
        return read_range(self._set.tar_uri(shard), offset, size)

    def _descriptor(self, shard: int) -> int | None:
        """An open file of the shard, None where its tar is not on this node."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        opened = self._open_local(shard) if self._local else _open_cached(self._path(shard))
        if opened is not None:
            if len(self._files) >= _OPEN_FILES:
                self._let_go(self._files.popitem(last=False)[1])
            self._files[shard] = opened
        return opened

    def _let_go(self, opened: int) -> None:
        """Close a tar; of the cache's, what was let go of last is deleted last."""
        if not self._local:
            _mark_used(opened)
        os.close(opened)

    def _discard(self, shard: int) -> None:
        """Delete a cached tar that this node's disk has damaged, unless somebody has replaced it."""
        opened, path = self._files.pop(shard), self._path(shard)
        _log.warning("%s: damaged on this disk: deleted, read from %s", path, self._set.tar_uri(shard))
        with contextlib.suppress(OSError):  # gone, or another user's
            if os.path.samestat(os.fstat(opened), os.lstat(path)):
                path.unlink()
        os.close(opened)

    def _open_local(self, shard: int) -> int:
        path, entry = self._set.tar_uri(shard), self._set.shards[shard]
        try:
            opened = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DamageError(f"{path}: {error.strerror}; make the shards anew") from error
        size = os.fstat(opened).st_size
        if size != entry.bytes:
            os.close(opened)
            raise DamageError(f"{path}: it has {size} bytes, the index says {entry.bytes}; make the shards anew")
        return opened

    def _path(self, shard: int) -> Path:
        return self._cache / f"{self._set.shards[shard].sha256}.tar"

    def _fetch(self, shard: int) -> None:
        """Download a shard unless it is there.

        If this fails its samples are read as ranges, and judged one by one.
        """
        try:
            with _locked(self._path(shard).with_suffix(".lock")):
                if not self._path(shard).exists():
                    self._download(shard)
        except (StorageError, OSError) as error:
            if shard not in self._failed_until:
                _log.warning("%s; its samples are read one by one", error)
            again_s = math.inf if isinstance(error, DamageError) else _FAILED_S
            self._failed_until[shard] = time.monotonic() + again_s
        finally:
            self._wanted.discard(shard)

    def _download(self, shard: int) -> None:
        """The shard's lock must be held."""
        entry, path = self._set.shards[shard], self._path(shard)
        room, arriving = path.with_suffix(".room"), path.with_suffix(".part")
        if not self._reserve(room, entry.bytes):
            self._full_until = time.monotonic() + _FULL_S
            return
        try:
            download(self._set.tar_uri(shard), arriving)
            if arriving.stat().st_size != entry.bytes or sha256_of(str(arriving)) != entry.sha256:
                raise DamageError(f"{self._set.tar_uri(shard)}: its sha256 is not the index's; make the shards anew")
            os.replace(arriving, path)
        finally:
            arriving.unlink(missing_ok=True)
            room.unlink()

    def _reserve(self, room: Path, needed: int) -> bool:
        """Delete tars that nobody holds, the longest unused first, until `needed` bytes fit, and reserve these.

        False where they do not fit. A reservation is a file without blocks, as long as what is to come.
        """
        with _locked(self._cache / "eviction.lock"):
            # reservations first: one that becomes a tar meanwhile is counted twice rather than not at all
            reserved = sum(map(_reserved, self._cache.glob("*.room")))
            tars = sorted(_tars(self._cache))
            total = needed + reserved + sum(size for _, size, _ in tars)
            for _, size, tar in tars:
                if total <= self._cache_bytes:
                    break
                if _delete_unread(tar):
                    total -= size
            if total > self._cache_bytes:
                return False
            with open(room, "ab", opener=_no_link) as file:
                file.truncate(needed)
            return True


def _extent(sample: Sample) -> tuple[int, int]:
    """(size, offset) of a sample's bytes and its seek points together."""
    end = sample.seek_offset + sample.seek_size if sample.seek_size else sample.offset + sample.size
    return end - sample.offset, sample.offset


def _read_at(descriptor: int, sample: Sample) -> bytes:
    """A sample's bytes and seek points; nothing where the disk cannot read them."""
    try:
        return os.pread(descriptor, *_extent(sample))
    except OSError:
        return b""


def _is_sound(both: bytes, sample: Sample) -> bool:
    return hashlib.sha256(memoryview(both)[: sample.size]).hexdigest() == sample.sha256


def _seek_points(both: bytes, sample: Sample) -> bytes:
    """The seek points behind a sample's bytes, if they are those that the sidecar names; older ones name none."""
    seek = both[sample.seek_offset - sample.offset :] if sample.seek_size else b""
    return seek if not sample.seek_hash or seek_hash(seek) == sample.seek_hash else b""


def _open_cached(path: Path) -> int | None:
    """An open tar of the cache, held by this reader; None where it is not there or may not be opened."""
    try:
        opened = _no_link(path, os.O_RDONLY)
    except OSError:
        return None
    fcntl.flock(opened, fcntl.LOCK_SH)
    _mark_used(opened)
    return opened


def _mark_used(opened: int) -> None:
    with contextlib.suppress(OSError):  # another user's: its owner's use alone counts
        os.utime(opened)


def _tars(cache: Path) -> Iterator[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of each tar of the cache."""
    for tar in cache.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # found to be damaged meanwhile
            found = tar.lstat()
            yield found.st_mtime_ns, found.st_size, tar


def _reserved(room: Path) -> int:
    """The bytes of a reservation; one that a killed reader left, whose lock is free, is deleted."""
    with open(room.with_suffix(".lock"), "ab", opener=_no_link) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError):
                return room.stat().st_size
            return 0
        room.unlink(missing_ok=True)
        return 0


def _delete_unread(tar: Path) -> bool:
    """Delete a tar of the cache unless some reader holds it."""
    with contextlib.suppress(FileNotFoundError), open(tar, "rb", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        tar.unlink()
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that every process and thread of this node respects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", opener=_no_link) as file:  # not emptied, whatever it is
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _no_link(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file, but nothing that a link leads to: others may write into a folder that several users share."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
