"""Files with the same bytes: found without reading everything, whatever the number of images and workers.

Of files that are as long as another one, a few kilobytes are read and hashed; of those that agree in this, all bytes.
Objects' ETags stand for these kilobytes where they are MD5 sums (as of plain uploads without KMS's encryption; a few
objects are read to see it), so that a bucket's listing tells what need not be read. Of equal files the one with the
smallest key stays. The driver holds 17 bytes per image.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from data_prep.plan import Plan
from data_prep.sources import Item, read_item
from data_prep.storage import is_local, read_range
from data_prep.tasks import in_order

_PROBE_BYTES = 4096
_PER_TASK = 2048
_AT_ONCE = 16  # reads of a task that wait for the storage side by side
_MD5 = re.compile("[0-9a-f]{32}")  # an upload in parts has another form
_COMPARED = 16  # objects whose ETag is compared with the MD5 sum of their bytes


def find_duplicates(plan: Plan) -> dict[str, str]:
    """The keys of the items to drop, each with the key of the equal item that stays. Ray must be initialised."""
    sizes = np.fromiter((item.size for item in _readable(plan)), np.int64)
    has_twin = _has_twin(sizes)
    tagged = np.fromiter((_has_md5(item) for item in _readable(plan)), np.bool_)
    tagged &= ~np.isin(sizes, np.unique(sizes[~tagged]))  # in a size with other files all are read
    if not _are_md5(item for item, told in zip(_readable(plan), tagged & has_twin, strict=True) if told):
        tagged[:] = False
    alike = (item for item, twin, told in zip(_readable(plan), has_twin, tagged, strict=True) if twin and not told)
    read = iter(np.concatenate([np.empty(0, np.uint64), *in_order(probe, _batches(alike))]))
    probes = np.fromiter(
        (
            _of_tag(item) if told else next(read)
            for item, twin, told in zip(_readable(plan), has_twin, tagged, strict=True)
            if twin
        ),
        np.uint64,
    )
    twins, by_size = iter(_has_twin(probes)), iter(has_twin)
    candidates = (item for item in _readable(plan) if next(by_size) and next(twins))
    return same_bytes(candidates)


def _readable(plan: Plan) -> Iterator[Item]:
    return (item for item in plan.items() if not item.flaw)


def _has_md5(item: Item) -> bool:
    """Whether an item's version looks like the MD5 sum of its bytes."""
    return item.offset is None and not is_local(item.uri) and _MD5.fullmatch(item.version) is not None


def _are_md5(items: Iterable[Item]) -> bool:
    """Whether ETags are MD5 sums, as far as the first few of these tell, which come in no order of the source."""
    few = list(islice(items, _COMPARED))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return all(pool.map(lambda item: hashlib.md5(read_item(item)).hexdigest() == item.version, few))


def _of_tag(item: Item) -> int:
    return int(item.version[:16], 16)


def same_bytes(candidates: Iterable[Item]) -> dict[str, str]:
    """As `find_duplicates`, by the hash of all bytes."""
    groups: defaultdict[bytes, list[str]] = defaultdict(list)
    for named in in_order(hash_all, _batches(candidates)):
        for key, digest in named:
            groups[digest].append(key)
    return {key: min(keys) for keys in groups.values() for key in keys if key != min(keys)}


def same_content(items: Iterable[Item], others: Sequence[Item]) -> list[Item]:
    """Those of `items` that have the same bytes as one of `others`; what differs in size or in a probe is not read."""
    sizes = {item.size for item in others}
    alike = [item for item in items if item.size in sizes]
    sizes = {item.size for item in alike}
    others = [item for item in others if item.size in sizes]
    for read in (_probes, _digests):
        known = set(read(others))
        alike = [item for item, value in zip(alike, read(alike), strict=True) if value in known]
    return alike


def _probes(items: Sequence[Item]) -> list[int]:
    return list(map(int, probe(items)))


def _digests(items: Sequence[Item]) -> list[bytes]:
    return [digest for _, digest in hash_all(items)]


def probe(items: Sequence[Item]) -> np.ndarray:
    """A uint64 for each item: a hash of its size and of some bytes in its middle."""

    def one(item: Item) -> int:
        size = min(item.size, _PROBE_BYTES)
        data = read_range(item.uri, (item.offset or 0) + (item.size - size) // 2, size)
        digest = hashlib.blake2b(data, digest_size=8, key=item.size.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return np.fromiter(pool.map(one, items), np.uint64, len(items))


def hash_all(items: Sequence[Item]) -> list[tuple[str, bytes]]:
    """(key, sha256 of all bytes) of each item."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda item: (item.key, hashlib.sha256(read_item(item)).digest()), items))


def _has_twin(values: np.ndarray) -> np.ndarray:
    """Whether each value occurs more than once."""
    ordered = np.sort(values)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.isin(values, repeated)


def _batches(items: Iterable[Item]) -> Iterator[tuple[list[Item]]]:
    coming = iter(items)
    while batch := list(islice(coming, _PER_TASK)):
        yield (batch,)
