"""Image files inside tars, read in place: where each begins and how long it is, without unpacking anything.

Made for ImageNet as it is distributed, a tar of class tars; a tar of images is the simple case. Of a local tar just the
512-byte headers are read. From an object store they come in stretches of a megabyte where images are so small that
several lie in a stretch, else one by one; 16 class tars at once.
"""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from data_prep.ranged_file import RangedFile
from data_prep.storage import DamageError, file_info, is_local, read_range

_AT_ONCE = 16
_STRETCH_BYTES, _HEADER_BYTES = 2**20, 4096  # of one request


@dataclass(frozen=True)
class Member:
    """A file in a tar: `size` bytes at `offset`. `path` has a class tar's name as a folder."""

    path: str
    offset: int
    size: int


def iter_members(uri: str) -> Iterator[Member]:
    """The files of the tar at `uri` and of the tars in it, in the tar's order.

    Raises StorageError where the tar cannot be read or is damaged.
    """
    end = file_info(uri).size
    at_once = 1 if is_local(uri) else _AT_ONCE
    with ThreadPoolExecutor(at_once) as pool:
        outer = _headers(uri, uri, 0, end)
        while batch := list(islice(outer, at_once)):
            for found in pool.map(lambda member: _inside(uri, member), batch):
                yield from found


def _inside(uri: str, member: Member) -> list[Member]:
    """The member itself, or the files in it where it is a tar."""
    if not member.path.lower().endswith(".tar"):
        return [member]
    folder = member.path[: -len(".tar")]
    found = _headers(f"{uri}: {member.path}", uri, member.offset, member.offset + member.size)
    return [Member(f"{folder}/{inner.path}", inner.offset, inner.size) for inner in found]


def _headers(name: str, uri: str, start: int, end: int) -> Iterator[Member]:
    """The regular files of the tar that lies at start..end of `uri`. Raises DamageError where it breaks off."""
    try:
        with tarfile.open(fileobj=_part(uri, start, end), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                if start + member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if member.isreg():
                    yield Member(member.name, start + member.offset_data, member.size)
    except tarfile.TarError as error:
        raise DamageError(f"{name}: it is no sound, uncompressed tar ({error}); copy it anew") from error


def _part(uri: str, start: int, end: int) -> io.RawIOBase:
    """Bytes start..end of `uri` as a file."""
    if is_local(uri):
        return RangedFile(end - start, lambda offset, length: read_range(uri, start + offset, length))
    return RangedFile(end - start, _Stretches(uri, start, end).read)


class _Stretches:
    """Reads bytes start..end of a tar from front to back, few requests for many small reads."""

    def __init__(self, uri: str, start: int, end: int) -> None:
        self._uri, self._start, self._size = uri, start, end - start
        self._at, self._held = 0, b""
        self._before = 0  # where the last read began

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, or those that are left."""
        gap, self._before = offset - self._before, offset
        inside = offset - self._at
        if not 0 <= inside <= len(self._held) - length:
            sparse = gap > _STRETCH_BYTES // 4
            wanted = min(max(length, _HEADER_BYTES if sparse else _STRETCH_BYTES), self._size - offset)
            self._held, self._at, inside = read_range(self._uri, self._start + offset, wanted), offset, 0
        return self._held[inside : inside + length]
