"""Folders that hold images in two resolutions, as benchmarks and training pairs are handed round: which file is which.

Low-resolution images lie in folders called LR, LR_bicubic, LRbicx2, LQ ..., or, as SelfExSR's sets have it, beside the
others: `image_SRF_2/img_001_SRF_2_HR.png` and `..._LR.png`, with the results of methods under other endings.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_prep.image_files import PassedOver
from data_prep.sources import Item, iter_items
from data_prep.storage import normalise

_LOW_RES = re.compile(r"(?i)(.*_)?lr([_-].*|bic.*|x?\d.*)?|lq")
_HIGH_RES = re.compile(r"(?i)(.*_)?hr|gt(mod\d+)?|hq")
_SELFEXSR = re.compile(r"(?P<name>.+)_SRF_(?P<scale>\d+)_(?P<kind>.+)")
_SIDE = re.compile(r"(?i).+[_-](?P<side>[hl])r(_?x?\d+)?")


class SelfExsrName(NamedTuple):
    """What a file of SelfExSR's sets is called: `kind` is HR, LR or a method's name."""

    name: str
    scale: int
    kind: str


def selfexsr_name(path: str) -> SelfExsrName | None:
    """The parts of a file's name where it is one of SelfExSR's."""
    found = _SELFEXSR.fullmatch(_stem(path))
    return SelfExsrName(found["name"], int(found["scale"]), found["kind"]) if found else None


def is_low_res_folder(name: str) -> bool:
    """Whether a folder of this name holds low-resolution images."""
    return bool(_LOW_RES.fullmatch(name))


def low_res_folder(path: str) -> str:
    """The path down to its first folder of low-resolution images; empty where there is none."""
    parts = path.split("/")
    for end, name in enumerate(parts[:-1], 1):
        if is_low_res_folder(name):
            return "/".join(parts[:end])
    return ""


def training_items(
    source: str, include: Sequence[str] = (), exclude: Sequence[str] = (), passed_over: PassedOver | None = None
) -> Iterator[Item]:
    """As `sources.iter_items`, for images that are to train as high-resolution ones.

    Raises ValueError where low-resolution ones are among them, by their folders' names or because files of one folder
    are called ..._HR and ..._LR; what `include` names by its folder is taken.
    """
    if not include and (name := _low_res_source(source)):
        raise ValueError(
            f"{source}: {name} holds low-resolution images, by its name: name the folder of the high-resolution ones, "
            f"or include '*' to train on these"
        )
    targets = _Targets(source, include)
    for item in iter_items(source, include, exclude, passed_over):
        targets.check(item.path)
        yield item


class _Targets:
    """What is known of the images that are to train as high-resolution ones, for `check` of the next."""

    def __init__(self, source: str, include: Sequence[str]) -> None:
        self._source = source
        self._is_list = source.lower().endswith(".txt")  # whose paths are whole: any folder above may be called LR
        self._named = any(low_res_folder(pattern.lstrip("/")) for pattern in include)
        self._high_res: dict[str, None] = {}
        self._low_res = ""
        self._sides: dict[str, set[str]] = {}

    def check(self, path: str) -> None:
        """ValueError where images of two resolutions are among those so far."""
        self._high_res |= dict.fromkeys(part for part in path.split("/")[:-1] if _HIGH_RES.fullmatch(part))
        self._low_res = self._low_res or ("" if self._named else low_res_folder(path))
        if self._low_res and (self._high_res or not self._is_list):
            other = f" (there is {next(iter(self._high_res))}/)" if self._high_res else ""
            raise ValueError(
                f"{self._source}: {self._low_res}/ holds low-resolution images, by its name, which would train as "
                f"high-resolution ones: name the folder of those{other}, or exclude '{self._low_res}/*'"
            )
        if (side := _SIDE.fullmatch(_stem(path))) is not None:
            seen = self._sides.setdefault(posixpath.dirname(path), set())
            seen.add(side["side"].lower())
            if len(seen) > 1:
                raise ValueError(
                    f"{self._source}: {posixpath.basename(path)} is one of images in two resolutions, ..._HR and "
                    f"..._LR: include '*_HR.*', so that low-resolution ones do not train"
                )


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _low_res_source(source: str) -> str:
    """The folder of low-resolution images that a source is, or lies in as X2 does; empty where it is none."""
    if "://" not in source and source.endswith(":"):
        return ""
    *_, above, name = ("", *normalise(source).split("/"))
    if is_low_res_folder(name):
        return name
    return f"{above}/{name}" if re.fullmatch(r"(?i)x\d+", name) and is_low_res_folder(above) else ""
