"""pyarrow's face of `data_prep.s3`, for libraries that take a pyarrow file system, such as Ray Train.

pyarrow's own S3 is another client: it finds endpoint, profile, certificates and credentials by rules of its own, so
that a training could go to another server than the sharding before it. This one is boto3, as everywhere else. (s3fs
would share botocore's chain, but it tries again for two seconds where this waits for a minute, keeps listings, and
reads settings of fsspec's beside.) Paths are bucket/key, as pyarrow's.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from typing import Any

import pyarrow
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from data_prep import s3
from data_prep.ranged_file import RangedFile
from data_prep.uri import split_s3

_BUFFER_BYTES = 2**20


def file_system() -> fs.FileSystem:
    """A pyarrow file system of all buckets; travels to other processes, which find S3 as `s3` does there."""
    return fs.PyFileSystem(S3Handler())


class S3Handler(fs.FileSystemHandler):
    """What `pyarrow.fs.PyFileSystem` calls; waits for a server that is away for a minute.

    Raises FileNotFoundError for what is not there, else OSError: one line with the URI, the reason and the remedy.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler)

    def __hash__(self) -> int:
        return hash(S3Handler)

    def get_type_name(self) -> str:
        """The name that pyarrow shows."""
        return "s3-by-boto3"

    def normalize_path(self, path: str) -> str:
        """The path as it is: in an object store, `a//b` is another key than `a/b`."""
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """What is at each path; the beginning of some key, up to a slash, is a folder."""
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        uri = _uri(path)
        if not split_s3(uri)[1]:
            return fs.FileInfo(path, fs.FileType.Directory)
        with _naming(uri):
            try:
                return fs.FileInfo(path, fs.FileType.File, size=s3.head(uri, s3.PATIENT_ATTEMPTS)[0])
            except ClientError as error:
                if not s3.is_missing(error):
                    raise
            is_folder = next(_objects(uri), None) is not None
        return fs.FileInfo(path, fs.FileType.Directory if is_folder else fs.FileType.NotFound)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """The folders and files below `selector.base_dir`."""
        root, uri = selector.base_dir.rstrip("/"), _uri(selector.base_dir)
        folders, files = set[str](), dict[str, int]()
        with _naming(uri):
            found = list(_objects(uri))
        if not found and not selector.allow_not_found:
            raise FileNotFoundError(f"{uri}: there is no such folder")
        for path, size, _ in found:
            parts = path.split("/")
            deepest = len(parts) if selector.recursive else min(len(parts), 2)
            folders |= {"/".join(parts[:end]) for end in range(1, deepest)}
            if parts[-1] and (selector.recursive or len(parts) == 1):
                files[path] = size
        return [fs.FileInfo(f"{root}/{path}", fs.FileType.Directory) for path in sorted(folders)] + [
            fs.FileInfo(f"{root}/{path}", fs.FileType.File, size=size) for path, size in files.items()
        ]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: an object store has no folders."""

    def delete_dir(self, path: str) -> None:
        """Delete everything below a path."""
        self.delete_dir_contents(path, missing_dir_ok=True)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete everything below a path; never a whole bucket."""
        uri = _uri(path)
        if not split_s3(uri)[1]:
            raise OSError(f"{uri}: refusing to delete all of it; name a folder inside")
        with _naming(uri):
            if not missing_dir_ok and next(_objects(uri), None) is None:
                raise FileNotFoundError(f"{uri}: there is no such folder")
            s3.delete_below(uri, s3.PATIENT_ATTEMPTS)

    def delete_root_dir_contents(self) -> None:
        """Refused."""
        raise OSError("refusing to delete all buckets; name a folder inside one")

    def delete_file(self, path: str) -> None:
        """Delete an object."""
        uri = _uri(path)
        with _naming(uri):
            s3.delete([uri], s3.PATIENT_ATTEMPTS)

    def move(self, src: str, dest: str) -> None:
        """Copy an object and delete it."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy an object within the server."""
        with _naming(_uri(src)):
            s3.copy(_uri(src), _uri(dest), s3.PATIENT_ATTEMPTS)

    def open_input_stream(self, path: str) -> pyarrow.NativeFile:
        """The object's bytes, read in ranges as they are wanted."""
        return pyarrow.PythonFile(_reader(_uri(path)), mode="r")

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        """The same, at any place of it."""
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pyarrow.NativeFile:
        """What is written appears as the object, whole, when the stream is closed."""
        return pyarrow.PythonFile(_Writer(_uri(path)), mode="w")

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> pyarrow.NativeFile:
        """Refused: objects cannot grow."""
        raise OSError(f"{_uri(path)}: an object cannot be appended to; write it anew")


def _reader(uri: str) -> io.BufferedReader:
    with _naming(uri):
        size, _ = s3.head(uri, s3.PATIENT_ATTEMPTS)

    def read(offset: int, length: int) -> bytes:
        with _naming(uri):
            data = s3.read(uri, offset, length, s3.PATIENT_ATTEMPTS)
        if len(data) != length:
            raise OSError(f"{uri}: {len(data)} of {length} bytes at {offset}; it changed meanwhile")
        return data

    return io.BufferedReader(RangedFile(size, read), _BUFFER_BYTES)


class _Writer:
    """A file to write, uploaded when it is closed. Not an io class: these are closed when they are forgotten, too."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._spool = tempfile.TemporaryFile(prefix="hatchery-")  # noqa: SIM115 -- closed with the stream

    @property
    def closed(self) -> bool:
        """Whether the object is complete, or was given up."""
        return self._spool.closed

    def write(self, data: Any) -> int:
        """Add bytes."""
        return self._spool.write(data)

    def tell(self) -> int:
        """The number of bytes so far."""
        return self._spool.tell()

    def flush(self) -> None:
        """Nothing: the object appears as a whole."""

    def close(self) -> None:
        """Upload what was written."""
        if self.closed:
            return
        with self._spool, _naming(self._uri):
            self._spool.seek(0)
            s3.upload(self._spool, self._uri, s3.PATIENT_ATTEMPTS)


def _uri(path: str) -> str:
    return f"s3://{path.rstrip('/')}"


def _objects(uri: str) -> Iterator[tuple[str, int, str]]:
    return s3.objects(uri, s3.PATIENT_ATTEMPTS, markers=True)


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Turn what the server raises into the errors of a file system."""
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error, RecursionError) as error:
        gone = isinstance(error, ClientError) and s3.is_missing(error)
        raise (FileNotFoundError if gone else OSError)(f"{uri}: {s3.reason(error)}") from error
