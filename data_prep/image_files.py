"""Which files are images, by name: the one rule of sharding, `upscale`, `evaluate` and `retrain`.

A file is an image where its name ends in one of EXTENSIONS. What systems and programs put beside images is none,
whatever its ending: hidden files and folders (`._photo.jpg`, `.ipynb_checkpoints`), thumbnails of file servers
(`@eaDir`), the shadows of a Mac's archives (`__MACOSX`), bins. What is passed over is counted, to be said.
"""

import posixpath
from collections import Counter

from data_prep.uri import printable

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "jfif", "jpe", "jif", "jfi", "mpo", "apng")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Pillow's names of the formats that are read; no other parser is ever asked. `model.picture` has the same."""
MAX_PIXELS = 178_956_970
"""Of an image that trains or judges, whatever its format: Pillow's own limit. A small file may hold many more."""

_CLUTTER = frozenset(
    (
        *("__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler"),
        *("system volume information", "lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
_NAMED = 3  # examples of each kind


def has_image_name(path: str) -> bool:
    """Whether the name's ending is an image's; clutter may have one as well."""
    return ending(path) in EXTENSIONS


def ending(path: str) -> str:
    """What follows the name's last dot, in lower case; nothing where there is no dot."""
    return posixpath.basename(path).rpartition(".")[2].lower() if "." in posixpath.basename(path) else ""


def clutter_in(path: str, hidden_folders: bool = True) -> str:
    """The path down to its first part that is a system's or a program's own; empty where there is none.

    Without `hidden_folders`, a folder that is merely hidden is none: that of a path that somebody wrote out.
    """
    parts = path.split("/")
    for number, part in enumerate(parts):
        is_hidden = part.startswith(".") and part not in (".", "..")
        last = number == len(parts) - 1
        if part.lower() in _CLUTTER or part.startswith("._") or (is_hidden and (hidden_folders or last)):
            return "/".join(parts[: number + 1])
    return ""


class PassedOver:
    """What a listing left out, and why: counted, with the first few names."""

    def __init__(self) -> None:
        self.clutter: list[str] = []
        self.num_clutter = 0
        self.endings: Counter[str] = Counter()
        self.links: list[str] = []
        self.num_links = 0
        self._last_clutter = ""

    def note(self, path: str, reason: str = "") -> None:
        """Count a path that `storage.iter_files` left out: clutter, or for a reason what cannot be followed.

        A folder of clutter counts once where its files follow each other.
        """
        if reason:
            self.num_links += 1
            self.links += [f"{printable(path)} ({printable(reason)})"][: _NAMED - len(self.links)]
        elif (found := clutter_in(path) or path) != self._last_clutter:
            self.num_clutter += 1
            self.clutter += [found][: _NAMED - len(self.clutter)]
            self._last_clutter = found

    def other(self, path: str) -> None:
        """Count a file that is no image."""
        self.endings[ending(path)] += 1

    def add(self, other: "PassedOver") -> None:
        """Count what another listing left out as well."""
        self.num_clutter += other.num_clutter
        self.clutter += other.clutter[: _NAMED - len(self.clutter)]
        self.endings += other.endings
        self.num_links += other.num_links
        self.links += other.links[: _NAMED - len(self.links)]

    def describe(self) -> str:
        """One line; empty where nothing was passed over."""
        said = []
        if self.num_clutter:
            said.append(_with_names(f"{self.num_clutter} of the system's or a program's own", self.clutter))
        if self.endings:
            kinds = [
                f".{name} {count}" if name else f"none {count}" for name, count in self.endings.most_common(_NAMED)
            ]
            said.append(_with_names(f"{self.endings.total()} with other endings", kinds))
        if self.num_links:
            said.append(f"{self.num_links} not followed: {'; '.join(self.links)}")
        return f"passed over: {'; '.join(said)}" if said else ""


def _with_names(what: str, names: list[str]) -> str:
    return f"{what} ({', '.join(printable(name) for name in names)})"
