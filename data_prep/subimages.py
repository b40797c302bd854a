"""Sub-images: overlapping crops of large images, as the super-resolution field cuts DIV2K and Flickr2K.

A training crop from a 2K photograph costs decoding 2K; from a 480 x 480 piece a tenth. Crops begin every `step`
pixels; where more than `threshold` pixels are left at the end of a row or column, one more crop ends at the border.
"""

import io

import numpy as np
from PIL import Image

from data_prep.image import Box

_PNG_LEVEL = 3  # the field's; higher ones take twice the time for 3 % less
_THRESHOLD_PX = 0


def boxes(height: int, width: int, crop_px: int, step_px: int) -> list[Box]:
    """The crops of an image, row by row. An image that is smaller than the crop along an axis is whole along it."""
    side_y, side_x = min(crop_px, height), min(crop_px, width)
    return [
        Box(top, left, side_y, side_x)
        for top in starts(height, side_y, step_px)
        for left in starts(width, side_x, step_px)
    ]


def starts(length: int, crop_px: int, step_px: int) -> list[int]:
    """Where crops begin along one axis."""
    begins = list(range(0, length - crop_px + 1, step_px))
    if length - (begins[-1] + crop_px) > _THRESHOLD_PX:
        begins.append(length - crop_px)
    return begins


def sub_key(key: str, number: int) -> str:
    """The key of an image's crop number 1, 2, ...; `source_key` gives the image's back."""
    return f"{key}_s{number:03d}"


def source_key(key: str) -> str:
    """The key of the image that a crop is of."""
    source, separator, number = key.rpartition("_s")
    return source if separator and number.isdigit() else key


def to_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()
