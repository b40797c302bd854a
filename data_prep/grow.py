"""A finished set of shards that grows: new images become new shards, and a new index lists old and new ones.

No shard is ever changed. An image that is gone from the source, or has other bytes there, is taken off the new index by
its number; its bytes stay in the tar. The index of before stays beside the new one as `index-000000.json`,
`index-000001.json` ..., and can be named wherever a set is asked for. What a grown set holds follows from its history:
the same images sharded at once lie in other shards.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_prep.index import (
    INDEX_NAME,
    LEFT_OUT_NAME,
    Shard,
    ShardInfo,
    ShardSet,
    Summary,
    earlier,
    is_earlier,
    summarise,
)
from data_prep.plan import Plan, ShardPlan, cut, mark
from data_prep.sources import Item
from data_prep.storage import delete, join, list_files, read_bytes, write_bytes
from data_prep.subimages import source_key

_AT_ONCE = 16  # sidecars


class Growth:
    """A finished set beside the plan of its source as it is now; numbers of 8 bytes per image."""

    def __init__(self, before: ShardSet, plan: Plan) -> None:
        self._before = before
        self._plan = plan
        marks = [_marks(info) for info in _sidecars(before)]
        self._can = all(marked is not None for marked in marks)
        known = np.concatenate([np.empty(0, np.uint64), *(found for found in marks if found is not None)])
        source = np.fromiter((int(mark(item), 16) for item in plan.items()), np.uint64)
        self._is_old = np.isin(source, known)
        self._gone = np.setdiff1d(known, source)

    @property
    def is_possible(self) -> bool:
        """Whether the set has images of the source, and says which: a set made before there was growth does not."""
        return self._can and bool(self._is_old.any())

    @property
    def first(self) -> int:
        """The number of the first new shard."""
        made = max(int(shard.name.rpartition("-")[2]) for shard in self._before.shards) + 1
        return max(made, self._before.index.next_shard)

    @property
    def num_gone(self) -> int:
        """Images that were in some shard and are not in the source, or not as they were."""
        return len(self._gone)

    @property
    def generation(self) -> int:
        """How often the set will have grown."""
        return self._before.index.generation + 1

    def staying(self, duplicates: Mapping[str, str]) -> dict[str, str]:
        """The duplicates to leave out, and what stays for them: where one is in the set, all that are in it."""
        groups = defaultdict[str, list[str]](list)
        for key, kept in duplicates.items():
            groups[kept].append(key)
        asked = {*groups, *duplicates}
        old = {item.key for item, is_old in self._items() if is_old and item.key in asked}
        left_out = dict[str, str]()
        for kept, others in groups.items():
            stay = [key for key in (kept, *others) if key in old] or [kept]
            left_out |= {key: stay[0] for key in (kept, *others) if key not in stay}
        return left_out

    def new_shards(self, duplicates: Mapping[str, str]) -> Iterator[ShardPlan]:
        """The shards to add, of what is not in the set and no duplicate."""
        fresh = (item for item, is_old in self._items() if not is_old and item.key not in duplicates)
        return cut(fresh, self._plan.settings, self.first)

    def num_new(self, duplicates: Mapping[str, str]) -> int:
        """The images of these shards."""
        return sum(not is_old and item.key not in duplicates for item, is_old in self._items())

    def old_summaries(self) -> Iterator[Summary]:
        """The set's shards without what is gone; those of which nothing is left are not listed."""
        gone = set(self._gone.tolist())
        for shard, info in zip(self._before.shards, _sidecars(self._before), strict=True):
            alive = {key for key, number in zip(_keys(info), _numbers(info), strict=True) if number not in gone}
            yield _without(info, shard, alive)

    def keep_index(self) -> None:
        """Copy the index and what it left out under the names that they have from now on."""
        number = self._before.index.generation
        for name in (LEFT_OUT_NAME, INDEX_NAME):
            data = read_bytes(join(self._before.uri, name))
            # a call that was killed here may have written the next one already
            if name == INDEX_NAME or hashlib.sha256(data).hexdigest() == self._before.index.left_out_sha256:
                write_bytes(join(self._before.uri, earlier(name, number)), data)

    def _items(self) -> Iterator[tuple[Item, bool]]:
        return zip(self._plan.items(), self._is_old.tolist(), strict=True)


def delete_indexes(uri: str) -> None:
    """Delete the index of a set and those of before it grew: it is made anew."""
    delete(join(uri, INDEX_NAME))
    for info in list_files(uri):
        if is_earlier(info.path):
            delete(info.uri)


def _sidecars(shards: ShardSet) -> Iterator[ShardInfo]:
    """All sidecars, in the shards' order. Raises DamageError for one that is not the index's."""
    numbers = range(len(shards.shards))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for begin in numbers[::_AT_ONCE]:
            yield from pool.map(shards.sidecar, numbers[begin : begin + _AT_ONCE])


def _keys(info: ShardInfo) -> list[str]:
    """The keys of a shard's images, sorted, as its marks are."""
    return sorted({source_key(sample.key) for sample in info.samples} | {reject.key for reject in info.rejects})


def _numbers(info: ShardInfo) -> list[int]:
    return [int(info.marks[begin : begin + 16], 16) for begin in range(0, len(info.marks), 16)]


def _marks(info: ShardInfo) -> np.ndarray | None:
    """The marks of a shard's images; None where its sidecar has none."""
    numbers = _numbers(info)
    return np.array(numbers, np.uint64) if len(numbers) == len(_keys(info)) else None


def _without(info: ShardInfo, shard: Shard, alive: set[str]) -> Summary:
    """A shard's summary with the images of these keys alone."""
    removed = tuple(number for number, sample in enumerate(info.samples) if source_key(sample.key) not in alive)
    left = [sample for sample in info.samples if source_key(sample.key) in alive]
    summary = summarise(info)
    kept = shard.model_copy(
        update={
            "count": len(left),
            "removed": removed,
            "min_side_px": min((sample.side_px for sample in left), default=0),
        }
    )
    rejects = tuple(reject for reject in info.rejects if reject.key in alive)
    return summary.model_copy(update={"shard": kept if left else None, "num_images": len(alive), "rejects": rejects})
