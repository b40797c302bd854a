"""Temporary folders of this user alone, also where no home is, and short ones for sockets.

Linux takes at most 107 bytes for the path of a socket; a $TMPDIR of a batch system or a deep build folder leaves too
few of them.
"""

import os
import stat
import tempfile

_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_SOCKET_BYTES = 107


def private_folder(name: str, parent: str | None = None) -> str:
    """A folder for files that only this user may write, such as compiled code: the same one for every process.

    parent: where it lies; the temporary folder by default. One that somebody else has made under this name, or could
    write into, is not used: then it is a fresh one. Raises OSError where neither can be made.
    """
    parent = parent or tempfile.gettempdir()
    path = os.path.join(parent, f"{name}-{os.getuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        writable = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or writable or not os.access(path, os.W_OK):
            return tempfile.mkdtemp(prefix=f"{name}-", dir=parent)
    return path


def folder_for_sockets(below: int, name: str) -> str | None:
    """A short folder for sockets whose paths reach `below` bytes further; None where the temporary folder is short.

    Raises ValueError where no folder is short and writable.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) + below <= _SOCKET_BYTES:
        return None
    for parent in _SHORT:
        if len(os.fsencode(parent)) + len(name) + 16 + below <= _SOCKET_BYTES:
            try:
                return private_folder(name, parent)
            except OSError:
                continue
    raise ValueError(
        f"TMPDIR {usual} is too long for sockets, whose paths have {_SOCKET_BYTES} bytes at most, and none of "
        f"{', '.join(_SHORT)} can be written: set TMPDIR to a folder of at most {_SOCKET_BYTES - below} bytes"
    )
