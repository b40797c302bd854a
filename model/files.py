"""Files that appear only when they are complete."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".hatchery-"
"""How the folder of a file that is being written begins. Short: a name of the file itself may fill the limit."""


class WriteError(ValueError):
    """A file cannot be written: a full or read-only disk, no rights, a file where a folder is needed."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message, errno)
        self.errno = errno
        """The system's number of the reason, as in the module `errno`."""

    def __str__(self) -> str:
        return str(self.args[0])


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a file elsewhere in the folder of `path`, then put it in its place; folders are made as needed.

    Where `write` raises, nothing is left behind and an older file stays as it was. WriteError, naming `path`, where
    the system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as folder:
            part = Path(folder) / path.name
            write(part)
            os.replace(part, path)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}", error.errno) from error
