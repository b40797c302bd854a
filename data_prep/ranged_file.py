"""Bytes that lie elsewhere, as a file to read: just what is read is fetched."""

import io
from collections.abc import Callable
from typing import Any


class RangedFile(io.RawIOBase):
    """A file of `size` bytes; `read(offset, length)` gives those that it is asked for, or fewer."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; see `io.IOBase`."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns how many bytes there were, 0 at the end."""
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = self._read(self._at, wanted) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
