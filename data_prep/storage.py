"""Files on local disks and in object stores behind one set of functions on URIs.

A URI is a path, `file://` or `s3://bucket/key` (see `uri`). Writes are atomic: a reader sees the whole old
file or the whole new one. Where the storage fails, every function raises StorageError: one line with the URI
and the remedy.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from data_prep import s3
from data_prep.uri import DamageError, StorageError, is_local, join, key_fault, normalise, refuse_secrets, split_s3
from data_prep.walk import Note, Walk

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "DANGLING",
    "ODD_KEY",
    "UNREADABLE",
    "DamageError",
    "FileInfo",
    "StorageError",
    "check_writable",
    "delete",
    "delete_tree",
    "delete_version",
    "download",
    "exists",
    "file_info",
    "filesystem",
    "hold",
    "is_abandoned",
    "is_held",
    "is_local",
    "iter_files",
    "join",
    "list_files",
    "may_pass",
    "normalise",
    "owned",
    "put_if_absent",
    "read_bytes",
    "read_range",
    "read_versioned",
    "replace",
    "sha256_of",
    "sweep",
    "upload",
    "write_bytes",
    "writing",
]

DANGLING = "a link to nothing"
ODD_KEY = "its key has the part . or .., which servers read as another key; rename the object"
UNREADABLE = (DANGLING, ODD_KEY)
"""What takes the place of the version of files that cannot be read."""
_TEMPORARY = ".hatchery-tmp-"
_ABANDONED_S = 24 * 3600  # a temporary file this old belongs to nobody, wherever its writer ran
_UNHELD_S = 60  # one that another container's process has made, and does not hold so long after
_BLOCK_BYTES = 2**20
# what `os.link` says on exFAT, on most FUSE file systems (gcsfuse) and on some servers' shares
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_REMEDIES = {
    errno.ENOENT: "it does not exist; check the path",
    errno.EACCES: "permission is denied; change the folder's permissions or choose another",
    errno.EPERM: "the operation is not permitted; change the folder's permissions or choose another",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the quota is used up; free some space or choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder, not a file; name a file",
}


@dataclass(frozen=True)
class FileInfo:
    """One listed file: `path` relative to the listed folder, `size` in bytes.

    `version` changes with the content: the ETag in an object store, the modification time in ns on a disk,
    DANGLING for a link to nothing, ODD_KEY for a key that servers disagree about.
    """

    path: str
    uri: str
    size: int
    version: str


def read_bytes(uri: str, version: str = "") -> bytes:
    """The whole file. Raises StorageError where a `version` is given that is no longer the file's (see FileInfo)."""
    with _naming(uri):
        if not is_local(uri):
            return s3.read(uri, version=version)
        with open(normalise(uri), "rb") as file:
            _check_version(file, uri, version)
            return file.read()


def read_range(uri: str, offset: int, size: int, version: str = "") -> bytes:
    """`size` bytes from `offset`. Raises DamageError where the file ends before that or is gone.

    StorageError where a `version` is given that is no longer the file's.
    """
    if size == 0:
        return b""
    with _naming(uri):
        if is_local(uri):
            with open(normalise(uri), "rb") as file:
                _check_version(file, uri, version)
                data = os.pread(file.fileno(), size, offset)
        else:
            data = s3.read(uri, offset, size, version=version)
    if len(data) != size:
        raise DamageError(f"{normalise(uri)}: {len(data)} of {size} bytes at {offset}; it is truncated, make it anew")
    return data


def _check_version(file: BinaryIO, uri: str, version: str) -> None:
    if version and str(os.fstat(file.fileno()).st_mtime_ns) != version:
        raise StorageError(f"{normalise(uri)}: it has changed since it was listed; run the command again")


def write_bytes(uri: str, data: bytes) -> None:
    """Write or replace the whole file; folders are made as needed."""
    with _naming(uri):
        if not is_local(uri):
            s3.write(uri, data)
            return
        with _replacing(Path(normalise(uri))) as file:
            file.write(data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write the file unless it exists; False, and no change, where it does. Of many callers one gets True."""
    with _naming(uri):
        if not is_local(uri):
            return s3.put_if_absent(uri, data)
        target = Path(normalise(uri))
        with _temporary(target) as file:
            file.write(data)
            _flush(file)
            try:
                os.link(file.name, target)  # unlike a rename, it refuses to replace
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                return _create(target, data)
        return True


def exists(uri: str) -> bool:
    """Whether a file is there; a folder is none."""
    with _naming(uri):
        return os.path.isfile(normalise(uri)) if is_local(uri) else s3.exists(uri)


def list_files(uri: str) -> list[FileInfo]:
    """Every file below a folder or prefix, sorted by the bytes of its path; empty where there is none."""
    return sorted(iter_files(uri), key=lambda info: os.fsencode(info.path))


def iter_files(
    uri: str, skip: Callable[[str], bool] = lambda _: False, note: Note = lambda *_: None
) -> Iterator[FileInfo]:
    """Every file below a folder or prefix, one by one: sorted on a disk, in the server's order in an object store.

    Links are followed; a folder that is reached a second time, by a loop or another link, is passed over. `skip`
    says which paths are left out, on a disk with all that is below them. `note` is told each path that was left out
    and why: nothing for those of `skip`.
    """
    root = normalise(uri)
    with _naming(root):
        if is_local(root):
            for path in Walk(root, skip, note).below(""):
                is_ours = os.path.basename(path).startswith(_TEMPORARY)
                if not is_ours and (info := _local_file(root, path, note)) is not None:
                    yield info
            return
        for path, size, tag in s3.objects(root):
            if skip(path):
                note(path, "")
            else:
                yield FileInfo(path, f"{root}/{path}", size, ODD_KEY if key_fault(path) else tag)


def file_info(uri: str) -> FileInfo:
    """Size and version of one file; its path is the base name. Raises DamageError where it is not there."""
    place = normalise(uri)
    with _naming(place):
        if is_local(place):
            status = os.stat(place)
            return FileInfo(os.path.basename(place), place, status.st_size, str(status.st_mtime_ns))
        size, tag = s3.head(place)
    return FileInfo(place.rpartition("/")[2], place, size, tag)


def upload(local: str | os.PathLike[str], uri: str) -> None:
    """Copy a local file to `uri`."""
    with _naming(os.fspath(local)):
        source = open(local, "rb")  # noqa: SIM115 -- closed below; only opening it is named after the local file
    with source, _naming(uri):
        if is_local(uri):
            with _replacing(Path(normalise(uri))) as file:
                shutil.copyfileobj(source, file, _BLOCK_BYTES)
        else:
            s3.upload(source, uri)


def download(uri: str, local: str | os.PathLike[str]) -> None:
    """Copy the file at `uri` to a local path; it appears there when complete."""
    with _naming(uri):
        if is_local(uri):
            with open(normalise(uri), "rb") as source, _replacing(Path(local)) as file:
                shutil.copyfileobj(source, file, _BLOCK_BYTES)
            return
        with _replacing(Path(local)) as file:
            s3.download(uri, file)


def local_copy(uri: str, folder: Path) -> Path:
    """The file at `uri` on the local disk: where it lies, or downloaded into a folder under its own name."""
    if is_local(uri):
        return Path(normalise(uri))
    path = folder / uri.rsplit("/", 1)[-1]
    download(uri, path)
    return path


def delete(uri: str) -> None:
    """Delete the file; nothing happens where there is none."""
    with _naming(uri):
        if is_local(uri):
            Path(normalise(uri)).unlink(missing_ok=True)
        else:
            s3.delete([uri])


def delete_tree(uri: str) -> None:
    """Delete everything below a folder or prefix. Raises StorageError for a whole bucket or file system."""
    root = normalise(uri)
    if root == "/" or (not is_local(root) and not split_s3(root)[1]):
        raise StorageError(f"{root}: refusing to delete all of it; name a folder or prefix inside")
    with _naming(root):
        if not is_local(root):
            s3.delete_below(root)
        elif os.path.isdir(root):
            shutil.rmtree(root)


def sweep(uri: str) -> int:
    """Delete temporary files in a local folder whose writers were killed; their number.

    A file is abandoned when its writer ran on this host and is gone, or after a day. An object store keeps none.
    """
    if not is_local(uri):
        return 0
    swept = 0
    for path in Path(normalise(uri)).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # gone, or another user's
            if is_abandoned(path, _TEMPORARY):
                path.unlink()
                swept += 1
    return swept


def owned(prefix: str) -> str:
    """`prefix` with this host and process, by which `is_abandoned` knows a name's owner."""
    return f"{prefix}{_host()}-{os.getpid()}-"


def is_abandoned(path: Path, prefix: str) -> bool:
    """Whether the process that gave a file or folder a name of `owned(prefix)` ran on this host and is gone.

    Containers may share a folder and a host's name, but not the numbers of their processes: another's file is abandoned
    when nobody holds it, its folder, as any other host's, when it has not been written to for a day.
    """
    host, _, pid = path.name.removeprefix(prefix).rpartition("-")[0].rpartition("-")
    if is_held(path):
        return False
    if host == _host():
        return not Path(f"/proc/{pid}").exists()
    age_s = time.time() - path.stat().st_mtime
    beside = host.rpartition(".")[0] == socket.gethostname() and path.is_file()
    return age_s > (_UNHELD_S if beside else _ABANDONED_S)


def hold(file: int) -> None:
    """Let other processes of this machine know that an open file or folder is in use, until it is closed."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether some process of this machine holds a file or folder. Raises FileNotFoundError where it is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError:  # another user's, or a link
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(file)
    return False


def _host() -> str:
    """This host and, as containers may share its name, the number of their space of process numbers."""
    return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}"


@contextlib.contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """An open file that appears at `uri`, whole, when the block ends without an error; nothing of it stays else."""
    if is_local(uri):
        with _naming(uri), _replacing(Path(normalise(uri))) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="hatchery-") as spool:  # has no name: a kill leaves nothing
        yield spool
        spool.seek(0)
        with _naming(uri):
            s3.upload(spool, uri)


def check_writable(uri: str) -> None:
    """Write, read back and delete a small probe below `uri`. Raises StorageError with the remedy."""
    refuse_secrets(uri)
    probe, data = join(uri, f".hatchery-probe-{uuid.uuid4().hex}"), uuid.uuid4().bytes
    with _naming(uri):
        if is_local(uri):
            with _replacing(Path(probe)) as file:
                file.write(data)
        else:
            s3.write(probe, data, attempts=2)  # a person is waiting for the answer
    seen = read_bytes(probe)
    delete(probe)
    if seen != data:
        raise StorageError(f"{normalise(uri)}: a probe read back differs from what was written; check the storage")


def sha256_of(uri: str) -> str:
    """The file's sha256 in hexadecimal; an object is read in ranges, never whole."""
    digest = hashlib.sha256()
    with _naming(uri):
        if is_local(uri):
            with open(normalise(uri), "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        size, _ = s3.head(uri)
    for offset in range(0, size, 16 * _BLOCK_BYTES):
        digest.update(read_range(uri, offset, min(16 * _BLOCK_BYTES, size - offset)))
    return digest.hexdigest()


def filesystem(uri: str) -> tuple["FileSystem", str]:
    """(pyarrow file system, path in it) for libraries that take these, such as Ray Train's RunConfig."""
    from pyarrow import fs  # slow to import, and only drivers need it

    if is_local(uri):
        return fs.LocalFileSystem(), normalise(uri)
    from data_prep import arrow_s3  # imports pyarrow

    return arrow_s3.file_system(), normalise(uri).removeprefix("s3://")


def may_pass(error: StorageError) -> bool:
    """Whether the same call may succeed later: the storage is away, busy or full, rather than that it said no."""
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(cause, BotoCoreError):  # some of which are both
        return cause.errno not in _REMEDIES or cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(cause, Exception) and not isinstance(error, DamageError) and s3.may_pass(cause)


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Turn what the disk or the server raises into a StorageError that names the URI."""
    try:
        yield
    except StorageError:
        raise
    except ClientError as error:
        kind = DamageError if s3.is_missing(error) else StorageError
        raise kind(f"{normalise(uri)}: {s3.reason(error)}") from error
    except (BotoCoreError, Boto3Error, RecursionError) as error:
        raise StorageError(f"{normalise(uri)}: {s3.reason(error)}") from error
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0) or f"{error.strerror or error}; check the path"
        kind = DamageError if error.errno == errno.ENOENT else StorageError
        raise kind(f"{normalise(uri)}: {remedy}") from error
    except ValueError as error:  # botocore's word for an endpoint that is no URL
        if is_local(uri):  # somebody else's: of whoever writes to a file, say
            raise
        raise StorageError(f"{normalise(uri)}: {s3.reason(error)}") from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[BufferedWriter]:
    """An open file in the target's folder, gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f"{owned(_TEMPORARY)}{uuid.uuid4().hex}"
    with open(target.parent / name, "xb") as file:
        hold(file.fileno())
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BufferedWriter]:
    """An open file that takes the target's place, durably, when the block ends without an error."""
    with _temporary(target) as file:
        yield file
        _flush(file)
        os.replace(file.name, target)


def _create(target: Path, data: bytes) -> bool:
    """Write a new file where there are no hard links, empty for a moment; False where it exists."""
    try:
        with open(target, "xb") as file:
            try:
                file.write(data)
                _flush(file)
            except OSError:
                target.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    return True


def _flush(file: BinaryIO) -> None:
    """Bring the content to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def _local_file(root: str, path: str, note: Note) -> FileInfo | None:
    """A file that was found below a folder; None, and noted, where it is a pipe or the like: no read of it ends."""
    place = os.path.join(root, path)
    if os.path.islink(place) and not os.path.exists(place):
        return FileInfo(path, place, 0, DANGLING)
    with _naming(place):
        status = os.stat(place)
    if not stat.S_ISREG(status.st_mode):
        note(path, "neither a file nor a folder")
        return None
    return FileInfo(path, place, status.st_size, str(status.st_mtime_ns))


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """A small file and a version for `replace`, which changes with every write; None where there is no file.

    In an object store this and the functions below take s3.SHORT_REQUEST_S at most, or twice that.
    """
    with _naming(uri):
        if not is_local(uri):
            return s3.read_tagged(uri)
        try:
            content = Path(normalise(uri)).read_bytes()
        except FileNotFoundError:
            return None
        return content, hashlib.sha256(content).hexdigest()


def replace(uri: str, data: bytes, version: str) -> str | None:
    """Write the file if it has this version; the new one, None where it has another, or is gone.

    Of several callers with one version one succeeds, where the storage can do it: an object store by ETags, a disk by
    `flock` of the folder. `data` must never have been written there before.
    """
    with _naming(uri):
        if not is_local(uri):
            return s3.replace(uri, data, version)
        with _alone_in(Path(normalise(uri)).parent):
            found = read_versioned(uri)
            if found is None or found[1] != version:
                return None
            write_bytes(uri, data)
            return hashlib.sha256(data).hexdigest()


def delete_version(uri: str, version: str) -> None:
    """Delete the file if it has this version; nothing happens where it has another, or is gone."""
    with _naming(uri):
        if not is_local(uri):
            s3.delete_tagged(uri, version)
            return
        with _alone_in(Path(normalise(uri)).parent):
            found = read_versioned(uri)
            if found is not None and found[1] == version:
                delete(uri)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process is in such a block for the folder; not where the file system has no locks, or after 2 s."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder_fd = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, folder_fd)  # ends the lock as well
            deadline = time.monotonic() + 2
            while True:
                try:
                    fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # for long only by a process that was stopped
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.01)
        yield
