"""Files that appear only when they are complete."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".hatchery-"
"""How the folder of a file that is being written begins. Short: a name of the file itself may fill the limit."""


class WriteError(ValueError):
    """A file cannot be written: a full or read-only disk, no rights, a file where a folder is needed."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} cannot be written: {error.strerror or error}")
        self.errno = error.errno
        """The system's number of the reason, as in `errno`."""


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
        raise WriteError(path, error) from error
