"""Which images share a shard, and in which order: decided by the seed and the images' keys alone.

Images are sorted by sha256(seed/key) and cut into shards. A plan of millions is kept on disk, in buckets by the first
byte of that hash: the driver holds one bucket at a time, and numbers of a few bytes per image.
"""

import hashlib
import json
import marshal
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from data_prep.index import ShardSettings
from data_prep.sources import Item, describe, fingerprint
from data_prep.storage import hold, is_held

_FORMAT = 3  # part of a plan's digest: raise it when the tars' layout changes, or which images are rejected
_BUCKETS = 256  # by the hash's first byte
_PREFIX = "hatchery-plan-"


@dataclass(frozen=True)
class ShardPlan:
    """One shard to make: its items in the tar's order."""

    name: str
    items: tuple[Item, ...]
    settings: ShardSettings

    @property
    def digest(self) -> str:
        """sha256 of all that decides the shard's content."""
        how = json.dumps([_FORMAT, self.settings.content(), fingerprint(self.items)])
        return hashlib.sha256(how.encode()).hexdigest()


class Plan:
    """The items of a source in the order of their shards, on disk; a context manager that deletes them.

    Raises ValueError where two items have one key.
    """

    def __init__(self, items: Iterable[Item], settings: ShardSettings) -> None:
        self.settings = settings
        self.num_items = 0
        self.fingerprint = ""
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._held = os.open(self._folder, os.O_RDONLY)
        hold(self._held)
        try:
            self._spool(items)
        except BaseException:
            self._delete()
            raise

    def __enter__(self) -> "Plan":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._delete()

    def _delete(self) -> None:
        shutil.rmtree(self._folder)
        os.close(self._held)

    def items(self) -> Iterator[Item]:
        """Every item, in order."""
        for bucket in range(_BUCKETS):
            records = []
            with open(self._bucket(bucket), "rb") as file:
                while (record := _load(file)) is not None:
                    records.append(record)
            records.sort()
            before: Item | None = None
            for _, *fields in records:
                item = Item(*fields)
                if before and item.key == before.key:
                    raise ValueError(
                        f"two images have the key {item.key}: {_place(before)} and {_place(item)}; a list may name an "
                        f"image once, and a tar hold a path once: make it anew without the other"
                    )
                before = item
                yield item

    def shards(self, without: Container[str] = ()) -> Iterator[ShardPlan]:
        """The shards, in order, without the items of some keys."""
        return cut((item for item in self.items() if item.key not in without), self.settings)

    def _spool(self, items: Iterable[Item]) -> None:
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files = [stack.enter_context(open(self._bucket(number), "wb")) for number in range(_BUCKETS)]
            for item in items:
                self.num_items += 1
                digest.update(describe(item))
                order = _order(self.settings.seed, item.key)
                record = (order, item.key, item.uri, item.size, item.version, item.offset, item.flaw)
                files[order[0]].write(marshal.dumps(record))
        self.fingerprint = digest.hexdigest()

    def _bucket(self, number: int) -> Path:
        return self._folder / f"{number:03d}"


def plan_shards(items: Sequence[Item], settings: ShardSettings) -> list[ShardPlan]:
    """The shards of a few items: the same as `Plan`'s, in memory."""
    ordered = sorted(items, key=lambda item: _order(settings.seed, item.key))
    return list(cut(ordered, settings))


def mark(item: Item) -> str:
    """16 hexadecimal digits that tell an image, by key and version, from others of its set."""
    return hashlib.sha256(describe(item)).hexdigest()[:16]


def cut(items: Iterable[Item], settings: ShardSettings, first: int = 0) -> Iterator[ShardPlan]:
    """Items in order to shards, of which the first has this number."""
    number, batch = first, list[Item]()
    for item in items:
        batch.append(item)
        if len(batch) == settings.samples_per_shard:
            yield ShardPlan(f"shard-{number:06d}", tuple(batch), settings)
            number, batch = number + 1, []
    if batch:
        yield ShardPlan(f"shard-{number:06d}", tuple(batch), settings)


def _sweep() -> None:
    """Delete the plans of drivers that were killed on this host; those of other containers' drivers are held."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        with suppress(FileNotFoundError):  # another driver sweeps as well
            if not Path(f"/proc/{pid}").exists() and not is_held(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _place(item: Item) -> str:
    return item.uri if item.offset is None else f"byte {item.offset} of {item.uri}"


def _order(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()


def _load(file) -> tuple | None:  # type: ignore[no-untyped-def]
    """The next record of a bucket; None at its end."""
    try:
        return marshal.load(file)
    except EOFError:
        return None
