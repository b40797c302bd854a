"""Images read before they are asked for, side by side and in their order: a store's delay is waited for once."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from data_prep.sources import Item, read_item
from data_prep.storage import is_local

_AT_ONCE = 16
_AHEAD = 64  # images
_AHEAD_BYTES = 128 * 2**20  # of all of them; one alone may be larger


def read_ahead(items: Iterable[Item]) -> Generator[tuple[Item, bytes], None, None]:
    """Each item with its bytes; nothing is read ahead from a local disk, and nothing at all of items with a flaw.

    Raises StorageError where one cannot be read, when it is its turn.
    """
    waiting: deque[tuple[Item, Future[bytes] | None]] = deque()
    held, coming = 0, iter(items)
    following = next(coming, None)
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="read-ahead")
    try:
        while waiting or following:
            while following and (not waiting or (len(waiting) < _AHEAD and held + following.size <= _AHEAD_BYTES)):
                at_once = following.flaw or is_local(following.uri)
                waiting.append((following, None if at_once else pool.submit(read_item, following)))
                held += following.size
                following = next(coming, None)
            item, reading = waiting.popleft()
            held -= item.size
            yield item, reading.result() if reading else b"" if item.flaw else read_item(item)
    finally:
        pool.shutdown(cancel_futures=True)
