"""How a run ends early on purpose, and the system's errors in words."""

import errno
import traceback


class Stopped(Exception):
    """The run was asked to end (SIGTERM, Ctrl-C), saved a checkpoint first, and is continued by the same command."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_REMEDIES = {
    errno.ENOENT: "it was removed, or the path is wrong: correct it, and run the same command again",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "it is a folder: name a file",
    errno.EEXIST: "it is there already: remove it or choose another path",
    errno.EACCES: "allow it, or choose another place",
    errno.EPERM: "allow it, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_PACKAGES = ("pipeline", "data_prep", "model")


def describe_os_error(error: OSError, doing: str) -> str:
    """What the system refused, in one line: the operation, the path, why, what may help. `doing`: command or stage."""
    where = _operation(error)
    paths = " -> ".join(repr(str(path)) for path in (error.filename, error.filename2) if path is not None)
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "--debug shows where")
    return f"{doing}{f' ({where})' if where else ''}: {f'{paths}: ' if paths else ''}{why}: {remedy}"


def _operation(error: BaseException) -> str:
    """The innermost function of this project that an error came through, as module.function."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in _PACKAGES:
            found = f"{module.rpartition('.')[2]}.{frame.f_code.co_name}"
    return found
