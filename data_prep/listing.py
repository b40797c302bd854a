"""Listings that are kept: within a command a source is listed once, however often it is asked for.

A plan, its fingerprint, what is held out and the shards ask for the same source; of a bucket with millions of objects
each listing takes minutes. What was listed lies in a temporary file without a name, not in memory. After an hour a
source is listed anew: a training that ran for days judges what is there then.
"""

import contextlib
import marshal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

from data_prep.image_files import PassedOver

_KEPT_S = 3600.0

Entry = tuple[Any, ...]
"""What marshal can write of an image."""


class _Listing(NamedTuple):
    file: IO[bytes]
    passed_over: PassedOver
    at: float


_kept: dict[str, _Listing] | None = None


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """During the block, or the function that it decorates, each source is listed once."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        if before is None:
            for listing in _kept.values():
                listing.file.close()
            _kept = None


def kept(source: str, passed_over: PassedOver, fresh: Callable[[PassedOver], Iterable[Entry]]) -> Iterator[Entry]:
    """The entries of a source, from `fresh` or from what it gave before."""
    if _kept is None:
        yield from fresh(passed_over)
        return
    listing = _kept.get(source)
    if listing is None or time.monotonic() - listing.at > _KEPT_S:
        file, passed = tempfile.TemporaryFile(prefix="hatchery-listing-"), PassedOver()  # noqa: SIM115 -- kept open
        for entry in fresh(passed):
            marshal.dump(entry, file)
            yield entry
        file.flush()
        listing = _kept[source] = _Listing(file, passed, time.monotonic())
    else:
        yield from _read(listing)
    passed_over.add(listing.passed_over)


def _read(listing: _Listing) -> Iterator[Entry]:
    with open(f"/proc/self/fd/{listing.file.fileno()}", "rb") as file:  # a place of its own in it, for each reader
        while True:
            try:
                yield marshal.load(file)
            except EOFError:
                return
