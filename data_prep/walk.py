"""A folder on a local disk, walked in a fixed order: links are followed, and no folder is gone into twice."""

import os
from collections.abc import Callable, Iterator

Note = Callable[[str, str], None]
"""Is told a path that is left out, and why."""


class Walk:
    """The files below a local folder, each folder once, however many links lead to it."""

    def __init__(self, root: str, skip: Callable[[str], bool], note: Note) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._skip = skip
        self._note = note
        self._seen: set[tuple[int, int]] = set()
        self._followed = False

    def below(self, below: str) -> Iterator[str]:
        """The paths of what is no folder below root/below, sorted by their bytes; one folder at a time is held."""
        try:
            with os.scandir(os.path.join(self._root, below)) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name) + b"/" * _is_folder(entry))
        except (FileNotFoundError, NotADirectoryError):
            if below:
                raise
            return
        self._seen.add(_identity(os.path.join(self._root, below)))
        for entry in listed:
            path = os.path.join(below, entry.name)
            if self._skip(path):
                self._note(path, "")
            elif _is_folder(entry):
                if reason := self._in_the_way(entry):
                    self._note(path, reason)
                else:
                    yield from self.below(path)
            else:
                yield path

    def _in_the_way(self, entry: os.DirEntry[str]) -> str:
        """Why a folder is not gone into; empty where it is. Without links none is seen twice."""
        if not entry.is_symlink():
            return (
                "a folder that a link leads to as well"
                if self._followed and _identity(entry.path) in self._seen
                else ""
            )
        target, here = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
        if _holds(target, here):
            return f"a loop: it leads back to {target}"
        if _holds(self._real_root, target) and not self._is_skipped(os.path.relpath(target, self._real_root)):
            return f"a link to {target}, which is listed where it lies"
        self._followed = True
        return f"a second link to {target}" if _identity(entry.path) in self._seen else ""

    def _is_skipped(self, path: str) -> bool:
        """Whether a path below the root lies in what is left out, so that only the link leads to it."""
        parts = path.split("/")
        return any(self._skip("/".join(parts[: end + 1])) for end in range(len(parts)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _holds(folder: str, path: str) -> bool:
    """Whether a path is a folder or lies below it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
