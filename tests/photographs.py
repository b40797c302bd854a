"""Photographs for tests: parts of those that installed packages ship, as JPEG files in class folders."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources import key_of, list_items

_SUBSAMPLINGS = ("4:2:0", "4:2:0", "4:2:0", "4:4:4", "4:2:2")


def shipped(name: str) -> np.ndarray:
    """One of the photographs, (height, width, 3) uint8."""
    (item,) = (item for item in list_items("photographs:") if item.key == key_of(name))
    return _read(item.uri)


def write_photographs(folder: Path, count: int = 40, min_side_px: int = 256) -> list[Path]:
    """`count` different JPEG files of at most 120 kB, the same on every machine but for libjpeg's version.

    Two or more are gray; most have chroma of half the size, some have all of it, or half of the width's.
    """
    random, paths = np.random.default_rng(0), []
    wholes = [image for item in list_items("photographs:") if min((image := _read(item.uri)).shape[:2]) >= 400]
    for number in range(count):
        whole = wholes[number % len(wholes)]
        height, width = (int(side) for side in random.integers(min_side_px, 350, 2))
        top, left = (int(random.integers(0, whole.shape[axis] - side)) for axis, side in ((0, height), (1, width)))
        part = Image.fromarray(whole[top : top + height, left : left + width])
        path = folder / f"n{number % 7:08}" / f"n{number % 7:08}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        subsampling = _SUBSAMPLINGS[int(random.integers(len(_SUBSAMPLINGS)))]
        quality = int(random.integers(75, 91))
        if number % 9 == 5:
            part.convert("L").save(path, quality=quality)
        else:
            part.save(path, quality=quality, subsampling=subsampling)
        assert path.stat().st_size < 120_000
        paths.append(path)
    return sorted(paths)


def _read(uri: str) -> np.ndarray:
    with Image.open(uri) as file:
        return np.asarray(file.convert("RGB"))
