"""Bytes of an image file to RGB pixels, by one rule for every reader of this project.

Gray, palette and CMYK images become RGB; an alpha channel is dropped, not blended; 16-bit gray is scaled to 8 bits.
An EXIF orientation is NOT applied: the pixels are taken as stored, as the benchmarks' tools do. The content decides
how a file is read, never its name: a PNG called .JPEG is a PNG.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep import jpeg, jpeg_header, jpeg_scans

_DAMAGED = "cannot be decoded: the compressed data is damaged or cut off"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Picture:
    """An image of which single regions can be had: from a file's bytes, or from pixels (H, W, 3) uint8.

    From a JPEG file a region costs less than the whole and has the same pixels; still less with the file's `seek`
    points. Raises ValueError, also later from `region`, where the file is broken.
    """

    def __init__(self, source: bytes | np.ndarray, seek: bytes = b"") -> None:
        self._seek = seek
        self._data = source if isinstance(source, bytes) else b""
        self._header = jpeg_header.parse(source) if isinstance(source, bytes) else None
        self._whole: np.ndarray | None = None
        if self._header:
            self.size = (self._header.height, self._header.width)
        else:
            self._whole = decode(source) if isinstance(source, bytes) else source
            self.size = (self._whole.shape[0], self._whole.shape[1])

    def region(self, box: Box) -> np.ndarray:
        """The pixels of a box inside the image as (3, h, w) uint8."""
        if self._header and self._whole is None:
            pixels = jpeg.region(self._data, self._header, *box, self._seek)
            if pixels is not None:
                return pixels
            self._whole = decode(self._data)
        assert self._whole is not None
        whole = self._whole[box.top : box.top + box.height, box.left : box.left + box.width]
        return np.ascontiguousarray(whole.transpose(2, 0, 1))


def decode(data: bytes) -> np.ndarray:
    """The whole image as (height, width, 3) uint8 RGB. Raises ValueError with the reason where it is broken."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "F":
                raise ValueError("float pixels have no fixed range; convert the file to 8 or 16 bits")
            if image.mode.startswith("I"):
                return np.repeat(_eight_bits(np.asarray(image))[:, :, None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except _BROKEN as error:
        raise ValueError(f"cannot be decoded: {' '.join(str(error).split())}") from error


def check(data: bytes) -> tuple[int, int, bytes]:
    """(height, width, seek points) of an image that decodes to its end; most kinds have no seek points.

    Raises ValueError with the reason where it does not.

    A JPEG's compressed data is parsed to its last block: libjpeg, and so Pillow, shows a file with a damaged or
    cut-off tail as a good one with gray below. Found so is a tail that is missing, zeros or other bytes, in all
    Huffman-coded files of 8 bits; see `jpeg_scans.is_whole` for what may pass. The rare others (arithmetic coding,
    lossless) are good where Pillow decodes them. Files of other formats have checksums or an end that Pillow checks.
    """
    header = jpeg_header.parse(data)
    if header:
        if (seek := jpeg.seek_points(data, header)) is None:
            raise ValueError(_DAMAGED)
        return header.height, header.width, seek
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "F":
                raise ValueError("float pixels have no fixed range; convert the file to 8 or 16 bits")
            image.load()
            height, width = image.height, image.width
    except _BROKEN as error:
        raise ValueError(f"cannot be decoded: {' '.join(str(error).split())}") from error
    if jpeg_scans.is_whole(data) is False:
        raise ValueError(_DAMAGED)
    return height, width, b""


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit gray to 8 bits, rounded; 65535 becomes 255."""
    return ((np.clip(pixels.astype(np.int64), 0, 65535) + 128) // 257).astype(np.uint8)
