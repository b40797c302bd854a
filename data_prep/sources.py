"""Raw images as items: a folder, an `s3://` prefix, a tar, a list of these, or photographs that packages ship.

Rules for odd files, the same for every source. Good files are never re-encoded: their bytes go to the shards as they
are. Which files are images the name decides (see `image_files`), and how they are read the content: a PNG called
.JPEG is read as PNG and keeps its name. Gray, palette
and CMYK images are good and become RGB when they are read (see `image`). EXIF rotation is not applied. Files that do
not decode to their end, images smaller than `min_side_px` and links to nothing are rejected with the reason (see
`shard`). A name may be any bytes, as on a disk.
"""

import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from data_prep.image_files import EXTENSIONS, PassedOver, clutter_in, ending, has_image_name
from data_prep.listing import kept
from data_prep.storage import UNREADABLE, FileInfo, file_info, is_local, iter_files, normalise, read_bytes, read_range
from data_prep.tar_source import iter_members

PHOTOGRAPHS = "photographs:"
_AT_ONCE = 16  # looks at listed images that wait for the storage side by side
_LOOKED_AHEAD = 1024  # lines of a list

# package to install, module, folder in it, files: photographs only, no charts, drawings, texts or near-duplicates
_SHIPPED = (
    (
        "scikit-image",
        "skimage",
        "data",
        (
            *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
            *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
            "rocket.jpg",
        ),
    ),
    ("scikit-learn", "sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("matplotlib", "matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",)),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One source image.

    `key` names it in the shards and leads back to it: unquoted, it is the path below the source. `size` is in
    bytes; `version` changes with the content. `offset` is where it begins in the tar at `uri`, None for a plain file.
    `flaw` is the reason to reject an image that need not be read for it.
    """

    key: str
    uri: str
    size: int
    version: str
    offset: int | None = None
    flaw: str = ""

    @property
    def ext(self) -> str:
        """The file name's extension in lower case, without the dot."""
        return ending(self.path)

    @property
    def path(self) -> str:
        """The path below the source; bytes that are no UTF-8 are in it as Python has them in file names."""
        return unquote(self.key, errors="surrogateescape")


class NoImagesError(ValueError):
    """A source holds no image, or none that is wanted."""


def list_items(
    source: str, include: Sequence[str] = (), exclude: Sequence[str] = (), passed_over: PassedOver | None = None
) -> list[Item]:
    """The images of a source, in its order: see `iter_items`, which does not hold them all."""
    return list(iter_items(source, include, exclude, passed_over))


def iter_items(
    source: str, include: Sequence[str] = (), exclude: Sequence[str] = (), passed_over: PassedOver | None = None
) -> Iterator[Item]:
    """The images of a source, one by one, in an order that is the same every time.

    `source` is a folder, an `s3://` prefix, a `.tar` (of images, or of class tars), a `.txt` with a source or an
    image in each line, or "photographs:". `include` and `exclude` are globs on the path below the source or on the
    bare file name, on the path alone where they begin with "/"; without `include` every image is taken. What is no
    image is counted in `passed_over`. Raises NoImagesError where no image is left, ValueError where a line of a list
    names none, StorageError (a ValueError) where a source does not exist.
    """
    seen = taken = 0
    passed_over = PassedOver() if passed_over is None else passed_over
    for path, item in _kept(source, passed_over):
        seen += 1
        if _wanted(path, include, exclude):
            taken += 1
            yield item
    if not taken:
        filtered = f" with include={list(include)} exclude={list(exclude)}" if include or exclude else ""
        besides = f" ({said})" if (said := passed_over.describe()) else ""
        raise NoImagesError(
            f"{source}: no images{filtered} among {seen} found; accepted extensions are {' '.join(EXTENSIONS)}{besides}"
        )


def read_item(item: Item) -> bytes:
    """The image file's bytes. Raises StorageError where they cannot be read, or are others than were listed."""
    version = item.version if item.offset is None else item.version.rpartition("@")[0]  # the tar's
    if " " in version:  # a package's, of which the disk knows nothing
        version = ""
    if item.offset is None:
        return read_bytes(item.uri, version)
    return read_range(item.uri, item.offset, item.size, version)


def fingerprint(items: Iterable[Item]) -> str:
    """sha256 over every item's key, size and version: equal for equal sources."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(describe(item))
    return digest.hexdigest()


def describe(item: Item) -> bytes:
    """What the fingerprint is made of."""
    return json.dumps([item.key, item.size, item.version]).encode()


def key_of(path: str) -> str:
    """A WebDataset key for a relative path; `urllib.parse.unquote` gives the path back (bytes that are no UTF-8 with
    errors="surrogateescape").

    WebDataset ends a key at the base name's first dot, and skips names between double underscores. A tar knows no
    empty parts, which keys in an object store may have.
    """
    quoted = quote(path, safe="/", errors="surrogateescape").replace(".", "%2E")
    return re.sub("_(?=_)", "%5F", re.sub("(^|(?<=/))/", "%2F", quoted))


def _kept(source: str, passed_over: PassedOver) -> Iterator[tuple[str, Item]]:
    """As `_named`, from the listing that was made before where listings are kept."""

    def fresh(passed_over: PassedOver) -> Iterator[tuple[Any, ...]]:
        for path, item in _named(source, passed_over):
            yield path, item.key, item.uri, item.size, item.version, item.offset, item.flaw

    for path, *fields in kept(source, passed_over, fresh):
        yield path, Item(*fields)


def _named(source: str, passed_over: PassedOver) -> Iterable[tuple[str, Item]]:
    """(path, item) of every image file of a source."""
    if source == PHOTOGRAPHS:
        return _photographs()
    if source.lower().endswith(".txt"):
        return _listed(source, passed_over)
    return _in_tar(source, passed_over) if source.lower().endswith(".tar") else _stored(source, passed_over)


def _stored(source: str, passed_over: PassedOver) -> Iterator[tuple[str, Item]]:
    """The image files below a folder or prefix."""
    if is_local(source) and not os.path.isdir(normalise(source)):
        place = file_info(source).uri  # or StorageError: it does not exist
        raise ValueError(f"{place}: it is a file, no .tar or .txt; name its folder")
    for info in iter_images(source, passed_over):
        flaw = info.version if info.version in UNREADABLE else ""
        yield info.path, Item(key_of(info.path), info.uri, info.size, info.version, flaw=flaw)


def iter_images(source: str, passed_over: PassedOver) -> Iterator[FileInfo]:
    """The image files below a folder or prefix, in the order of `storage.iter_files`; a dangling link may be one."""
    for info in iter_files(source, lambda path: bool(clutter_in(path)), passed_over.note):
        if has_image_name(info.path):
            yield info
        else:
            passed_over.other(info.path)


def _in_tar(source: str, passed_over: PassedOver) -> Iterator[tuple[str, Item]]:
    """The image files inside a tar and the tars in it."""
    tar = file_info(source)
    for member in iter_members(tar.uri):
        path, version = posixpath.normpath(member.path), f"{tar.version}@{member.offset}"
        if clutter_in(path):
            passed_over.note(path)
        elif has_image_name(path):
            yield path, Item(key_of(path), tar.uri, member.size, version, member.offset)
        else:
            passed_over.other(path)


def _listed(source: str, passed_over: PassedOver) -> Iterator[tuple[str, Item]]:
    """The images that a list names, by whole address; a relative line is below the list's folder, # is a comment."""
    lines = _without_clutter(_lines(source), passed_over)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while batch := list(islice(lines, _LOOKED_AHEAD)):
            for (entry, uri), info in zip(batch, pool.map(lambda line: _image_info(line[1]), batch), strict=True):
                found = False
                for path, item in _of_line(uri, info, passed_over):
                    found = True
                    yield path, item
                if not found:
                    raise ValueError(f"{source}: it lists {entry}, which holds no image; correct or remove the line")


def _lines(source: str) -> Iterator[tuple[str, str]]:
    """(as it is written, URI) of every entry of a list. Raises ValueError for a list in a list."""
    folder = normalise(source).rpartition("/")[0]
    for line in read_bytes(source).decode("utf-8-sig", "surrogateescape").split("\n"):  # names may hold other breaks
        entry = line.strip(" \t\r")
        if not entry or entry.startswith("#"):
            continue
        if entry.lower().endswith(".txt"):
            raise ValueError(f"{source}: it lists {entry}, another list; name its lines here")
        yield entry, normalise(entry if "://" in entry or entry.startswith(("/", "~")) else f"{folder}/{entry}")


def _without_clutter(lines: Iterable[tuple[str, str]], passed_over: PassedOver) -> Iterator[tuple[str, str]]:
    """The entries but those that a search for names puts into a list: clutter. Hidden folders somebody wrote out."""
    for entry, uri in lines:
        if has_image_name(entry) and clutter_in(entry, hidden_folders=False):
            passed_over.note(entry)
        else:
            yield entry, uri


def _image_info(uri: str) -> FileInfo | None:
    """Size and version of a listed image; None for a folder or tar."""
    return file_info(uri) if has_image_name(uri) and not (is_local(uri) and os.path.isdir(uri)) else None


def _of_line(uri: str, info: FileInfo | None, passed_over: PassedOver) -> Iterator[tuple[str, Item]]:
    """(path, item) of the images of a list's line."""
    base = uri.removeprefix("s3://").lstrip("/")
    if info:
        yield base, Item(key_of(base), uri, info.size, info.version)
        return
    for path, item in _named(uri, passed_over):
        yield f"{base}/{path}", replace(item, key=f"{key_of(base)}/{item.key}")


def _photographs() -> list[tuple[str, Item]]:
    """(file name, item) of the shipped photographs; the package's version stands for their content."""
    found = []
    for package, module, folder, names in _SHIPPED:
        root = _package_folder(package, module) / folder
        version = f"{package} {importlib.metadata.version(package)}"
        for name in names:
            path = root / name
            if not path.is_file():
                raise ValueError(f"{PHOTOGRAPHS} {version} lacks {path}; pip install --force-reinstall {package}")
            found.append((name, Item(key_of(name), str(path), path.stat().st_size, version)))
    return sorted(found, key=lambda entry: entry[0])


def _package_folder(package: str, module: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{PHOTOGRAPHS} needs the package {package}; pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        name, rooted = posixpath.basename(path), f"/{path}"
        return any(
            fnmatch.fnmatchcase(rooted, glob)
            if glob.startswith("/")
            else fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(name, glob)
            for glob in patterns
        )

    return (not include or matches(include)) and not matches(exclude)
