"""Temporary folders of this user alone, also where no home is, and short ones for sockets.

Linux takes at most 107 bytes for the path of a socket; a $TMPDIR of a batch system or a deep build folder leaves too
few of them.
"""

import os
import stat
import tempfile

_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_SOCKET_BYTES = 107
_NAMES = 10  # that are tried


def private_folder(name: str, parent: str | None = None) -> str:
    """A folder for files that only this user may write, such as compiled code: the same one for every process.

    parent: where it lies; the temporary folder by default. One that somebody else has made under this name, or could
    write into, is not used, but the first of some others that is not such a one; were all of them so, a fresh one of
    this process. Raises OSError where none can be made.
    """
    parent = parent or tempfile.gettempdir()
    usual = os.path.join(parent, f"{name}-{os.getuid()}")
    for path in (usual, *(f"{usual}-{number}" for number in range(2, _NAMES + 1))):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not _is_private(path):
                continue
        return path
    return tempfile.mkdtemp(prefix=f"{name}-", dir=parent)


def _is_private(path: str) -> bool:
    """Whether it is a folder, no link to one, into which this user may write and nobody else."""
    found = os.lstat(path)
    writable = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not writable and os.access(path, os.W_OK)


def folder_for_sockets(below: int, name: str, usual: str | None = None) -> str | None:
    """A short folder for sockets whose paths reach `below` bytes further; None where the usual one will do.

    usual: where they would lie; the temporary folder by default. Raises ValueError where no folder is short and can be
    written.
    """
    usual = usual or tempfile.gettempdir()
    if len(os.fsencode(usual)) + below <= _SOCKET_BYTES and _can_be_written(usual):
        return None
    for parent in _SHORT:
        try:
            folder = private_folder(name, parent)
        except OSError:
            continue
        if len(os.fsencode(folder)) + below <= _SOCKET_BYTES:
            return folder
    raise ValueError(
        f"TMPDIR {usual} is too long for sockets (of {_SOCKET_BYTES} bytes at most) or cannot be written, "
        f"nor can {', '.join(_SHORT)}: set TMPDIR to a folder of at most {_SOCKET_BYTES - below} bytes"
    )


def _can_be_written(folder: str) -> bool:
    """Whether files can be made in it; one that is not there yet counts, if it can be made."""
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
