"""Files that are complete or absent, on real file systems that refuse."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.files import WriteError, write_atomically


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """What a full disk does to a file, by a limit of the system's own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [b"x" * 255, "写".encode() * 85, b"caf\xe9.png", "line\u2028sep.png".encode()])
def test_any_name_that_the_file_system_has_room_for(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    write_atomically(path, lambda part: _write(part, b"whole"))
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert path.read_bytes() == b"whole"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def test_a_refusal_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with file_size_limit(10_000), pytest.raises(WriteError) as raised:
        write_atomically(path, lambda part: _write(part, bytes(20_000)))
    assert str(raised.value) == f"{path} cannot be written: File too large"
    assert raised.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("place", ["a.png/b.png", "folder", "x" * 256, "/proc/a.png", "/dev/null/a.png"])
def test_places_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a file")
    (tmp_path / "folder").mkdir()
    path = tmp_path / place
    with pytest.raises(WriteError) as raised:
        write_atomically(path, lambda part: _write(part, b"whole"))
    assert str(raised.value).startswith(f"{path} cannot be written: ")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder"]
