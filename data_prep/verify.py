"""Is a set of shards what its index says, byte by byte, and what is in it? Functions for `hatchery shards`."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from data_prep.index import LEFT_OUT_NAME, Sample, ShardSet, earlier, is_earlier, read_shard_set
from data_prep.storage import StorageError, file_info, join, list_files, read_range, sha256_of

_BLOCK_BYTES = 16 * 2**20
_AT_ONCE = 4

Progress = Callable[[int, int], None]


class Report(NamedTuple):
    """What was read, and a line for everything that is not as the index says."""

    uri: str
    num_shards: int
    num_samples: int
    num_bytes: int
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


class Row(NamedTuple):
    """One shard for a listing; `min_side_px` is the shortest side of any of its images, in pixels."""

    name: str
    num_samples: int
    bytes: int
    min_side_px: int
    sha256: str


def verify(uri: str, progress: Progress | None = None) -> Report:
    """Re-read every shard, sidecar and sample of a set and check every hash.

    `progress` is called with the number of finished shards and of all. Raises StorageError where there is no set.
    """
    shards, problems = read_shard_set(uri), list[str]()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, found in enumerate(
            pool.map(lambda number: list(_problems(shards, number)), range(len(shards.shards))), 1
        ):
            problems.extend(found)
            if progress:
                progress(done, len(shards.shards))
    problems.extend(_left_out_problems(shards, is_earlier(uri)))
    listed = list_files(shards.uri)
    indexes = [shards, read_shard_set(shards.uri)] if is_earlier(uri) else [shards]
    indexes += [read_shard_set(info.uri) for info in listed if is_earlier(info.path) and info.path.startswith("index")]
    known = {f"{shard.name}.tar" for index in indexes for shard in index.shards}
    for info in listed:
        if info.path.endswith(".tar") and info.path not in known:
            problems.append(f"{info.uri}: it is not in the index; a reader of *.tar would take it for part of the set")
    return Report(shards.uri, len(shards.shards), shards.num_samples, shards.index.num_bytes, tuple(problems))


def describe(uri: str) -> list[Row]:
    """A row for each shard of a set, from the index alone. Raises StorageError where there is no set."""
    return [
        Row(shard.name, shard.count, shard.bytes, shard.min_side_px, shard.sha256)
        for shard in read_shard_set(uri).shards
    ]


def _problems(shards: ShardSet, number: int) -> Iterator[str]:
    """What is wrong with one shard."""
    entry, uri = shards.shards[number], shards.tar_uri(number)
    try:
        samples = shards.samples(number)
        size = file_info(uri).size
        if size != entry.bytes:
            yield f"{uri}: it has {size} bytes, the index says {entry.bytes}"
            return
        if len(samples) != entry.count:
            yield f"{uri}: the sidecar lists {len(samples)} samples, the index says {entry.count}"
        digest = hashlib.sha256()
        for sample, found in _hash_samples(uri, size, samples, digest):
            if found != sample.sha256:
                yield f"{uri}: sample {sample.key} is not the one that was written"
        if digest.hexdigest() != entry.sha256:
            yield f"{uri}: its sha256 is not the index's"
    except StorageError as error:
        yield str(error)


def _hash_samples(
    uri: str, size: int, samples: Sequence[Sample], whole: "hashlib._Hash"
) -> Iterator[tuple[Sample, str]]:
    """Each sample with the sha256 of its bytes; the tar is read once, in blocks, and all of it goes to `whole`."""
    block, start = b"", 0
    for sample in samples:
        stop = sample.offset + sample.size
        digest = hashlib.sha256()
        position = sample.offset
        while position < stop:
            while position >= start + len(block):
                start += len(block)
                block = read_range(uri, start, min(_BLOCK_BYTES, size - start))
                whole.update(block)
            part = block[position - start : stop - start]
            digest.update(part)
            position += len(part)
        yield sample, digest.hexdigest()
    start += len(block)
    while start < size:
        block = read_range(uri, start, min(_BLOCK_BYTES, size - start))
        whole.update(block)
        start += len(block)


def _left_out_problems(shards: ShardSet, before: bool) -> Iterator[str]:
    uri = join(shards.uri, earlier(LEFT_OUT_NAME, shards.index.generation) if before else LEFT_OUT_NAME)
    try:
        if sha256_of(uri) != shards.index.left_out_sha256:
            yield f"{uri}: its sha256 is not the index's"
    except StorageError as error:
        yield str(error)
