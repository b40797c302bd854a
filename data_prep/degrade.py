"""High resolution to low: the ways in which a training pair's low-resolution side is made.

Each way computes one crop of the degraded image from the pixels it needs. `DEGRADATIONS` names them for the settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.bicubic import Rounding, shrink_planes, source_box
from data_prep.image import Box

Kind = Literal["bicubic"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Degradation:
    """`needs` tells the box of high-resolution pixels that a low-resolution crop is made of; `make` makes it.

    Both take the whole image's (height, width), divisible by the scale, the scale, and the crop's top, left and side
    in low-resolution pixels. `make` takes the box's pixels (3, h, w) uint8 first and the rounding last, and gives
    (3, side, side) float32 in 0..1.
    """

    needs: Callable[[Size, int, int, int, int], Box]
    make: Callable[[np.ndarray, Size, int, int, int, int, Rounding], np.ndarray]


def _bicubic_needs(size: Size, scale: int, top: int, left: int, side: int) -> Box:
    """The crop's own pixels and those under the kernel around them."""
    return Box(*source_box(size, 1 / scale, top, left, side, side))


def _bicubic(
    pixels: np.ndarray, size: Size, scale: int, top: int, left: int, side: int, rounding: Rounding
) -> np.ndarray:
    """The crop of the image shrunk by MATLAB's bicubic.

    Without rounding, bicubic overshoots at edges: values may leave 0..1 a little, as in the published recipe.
    """
    crop = shrink_planes(pixels, size, 1 / scale, top, left, side, side, rounding)
    return (crop / 255.0).astype(np.float32)


DEGRADATIONS: dict[Kind, Degradation] = {"bicubic": Degradation(_bicubic_needs, _bicubic)}
