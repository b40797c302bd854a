"""Crops of the published Set5 files, 144 px a side in high resolution, in `tests/golden/Set5` as a set of `HR` and
`LR_bicubic`: their low resolutions equal bicubic of the high resolution but at the edges that were cut."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.shared_data import ROOT

SET5 = ROOT / "tests" / "golden" / "Set5"
SCALES = (2, 3, 4, 8)
SIDE_PX = 144
MARGIN_PX = 3
"""In low resolution: how far the kernel reaches over an edge that was cut."""
_CORNERS = {"baby": (120, 144), "bird": (0, 0), "butterfly": (72, 48), "head": (96, 0), "woman": (0, 48)}
"""Top and left in high resolution, multiples of every scale; a zero is the image's own edge."""
NAMES = tuple(_CORNERS)


def read_image(path: Path) -> np.ndarray:
    """(height, width, 3) uint8."""
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def crop(image: np.ndarray, name: str, scale: int) -> np.ndarray:
    """The crop's place in a whole image; `scale` is 1 for the high resolution."""
    top, left, side = _CORNERS[name][0] // scale, _CORNERS[name][1] // scale, SIDE_PX // scale
    return image[top : top + side, left : left + side]


def kept_crop(name: str, scale: int) -> np.ndarray:
    """The crop as it is kept; `scale` is 1 for the high resolution."""
    return read_image(SET5 / ("HR" if scale == 1 else f"LR_bicubic/X{scale}") / file_name(name, scale))


def file_name(name: str, scale: int) -> str:
    """As the benchmark calls its files."""
    return f"{name}.png" if scale == 1 else f"{name}x{scale}.png"


def exact(name: str, scale: int) -> tuple[slice, slice]:
    """Rows and columns of the low resolution that no cut edge reaches."""
    ends = [slice(MARGIN_PX if start else 0, SIDE_PX // scale - MARGIN_PX) for start in _CORNERS[name]]
    return ends[0], ends[1]
