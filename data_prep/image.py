"""Bytes of an image file to RGB pixels, by one rule for every reader of this project.

Gray, palette and CMYK images become RGB; an alpha channel is dropped, not blended; 16-bit gray is scaled to 8 bits.
Of an animation, or a file of several pages, the first picture is taken. An EXIF orientation is NOT applied: the pixels
are taken as stored, as the benchmarks' tools do. The content decides how a file is read, never its name: a PNG called
.JPEG is a PNG. Text, profiles and the like, however large, are no reason to refuse pixels.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep import jpeg, jpeg_header, jpeg_markers, jpeg_scans
from data_prep.image_files import FORMATS, MAX_PIXELS
from data_prep.jpeg_header import JpegHeader
from data_prep.png_chunks import without_text

_COMPARED_PX = 128  # side of the region that both decoders give when a file is checked
_STRIP_PX = 2**22  # pixels that are converted at once: a whole large image would be held three times
_ADDRESS = re.compile(r" (?:object )?at 0x[0-9a-f]+")  # of a Python object: another one in every process
_DAMAGED = "cannot be decoded: the compressed data is damaged or cut off"
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError),
    *(struct.error, zlib.error, RuntimeError, MemoryError),
)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Checked(NamedTuple):
    """What is known of an image that decodes to its end; most kinds of files have no seek points.

    `num_pictures` are those of the file, of which the first is taken. `by_pillow`: of this JPEG the region decoder gave
    other pixels than Pillow, so that it must never be asked for them.
    """

    height: int
    width: int
    seek: bytes
    num_pictures: int
    by_pillow: bool = False


class Picture:
    """An image of which single regions can be had: from a file's bytes, or from pixels (H, W, 3) uint8.

    From a JPEG file a region costs less than the whole and has the same pixels; still less with the file's `seek`
    points. `by_pillow` files are decoded by Pillow alone. Raises ValueError, also later from `region`, where the file
    is broken.
    """

    def __init__(self, source: bytes | np.ndarray, seek: bytes = b"", by_pillow: bool = False) -> None:
        self._seek = seek
        self._data = source if isinstance(source, bytes) else b""
        self._header = jpeg_header.parse(source) if isinstance(source, bytes) and not by_pillow else None
        self._whole: np.ndarray | Image.Image | None = None
        if isinstance(source, np.ndarray):
            self._whole, self.size = source, (source.shape[0], source.shape[1])
        elif self._header:
            self.size = (self._header.height, self._header.width)
        else:
            self._whole = _loaded(source)
            self.size = (self._whole.height, self._whole.width)

    def region(self, box: Box) -> np.ndarray:
        """The pixels of a box inside the image as (3, h, w) uint8."""
        if self._header and self._whole is None:
            pixels = jpeg.region(self._data, self._header, *box, self._seek)
            if pixels is not None:
                return pixels
            self._whole = _loaded(self._data)
        assert self._whole is not None
        if isinstance(self._whole, np.ndarray):
            part = self._whole[box.top : box.top + box.height, box.left : box.left + box.width]
        else:
            part = _rgb(self._whole, box)
        return np.ascontiguousarray(part.transpose(2, 0, 1))


def decode(data: bytes) -> np.ndarray:
    """The whole image as (height, width, 3) uint8 RGB. Raises ValueError with the reason where it is broken."""
    with _opened(_ended(data)) as image:
        height, width = image.height, image.width
        rows = max(1, _STRIP_PX // width)
        if rows >= height:
            return _rgb(image, Box(0, 0, height, width))
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            strip = Box(top, 0, min(rows, height - top), width)
            pixels[top : top + strip.height] = _rgb(image, strip)
        return pixels


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> Checked:
    """What is known of an image that decodes to its end. Raises ValueError with the reason where it does not.

    A JPEG's compressed data is parsed to its last block: see `whole`. Files of other formats have checksums or an end
    that Pillow checks. A region of a JPEG, at a place that follows from its bytes, is compared with Pillow's pixels.
    """
    with _opened(data, max_pixels) as image:
        height, width, num_pictures = image.height, image.width, _num_pictures(image)
    header = jpeg_header.parse(data)
    is_whole, seek = _soundness(data, header)
    if is_whole is False:
        raise ValueError(_DAMAGED)
    with _opened(_ended(data), max_pixels) as image:
        _rgb(image, Box(0, 0, 1, 1))  # decodes all of it, and knows what its colours mean
        by_pillow = header is not None and seek is not None and not _agree(image, data, header, seek)
    return Checked(height, width, b"" if by_pillow else seek or b"", num_pictures, by_pillow)


def _agree(image: Image.Image, data: bytes, header: JpegHeader, seek: bytes) -> bool:
    """Whether the region decoder sees the image that Pillow sees; what it leaves to Pillow is equal."""
    if (header.height, header.width) != (image.height, image.width):
        return False
    height, width, place = min(header.height, _COMPARED_PX), min(header.width, _COMPARED_PX), zlib.crc32(data)
    top, left = place % (header.height - height + 1), (place >> 16) % (header.width - width + 1)
    pixels = jpeg.region(data, header, top, left, height, width, seek)
    return pixels is None or np.array_equal(pixels.transpose(1, 2, 0), _rgb(image, Box(top, left, height, width)))


def whole(data: bytes) -> bytes:
    """A file's bytes as any decoder takes them to their end. Raises ValueError for a JPEG that is damaged or cut off.

    libjpeg, and so Pillow, shows a JPEG with a damaged or cut-off tail as a good one with gray below. Found so is a
    tail that is missing, zeros or other bytes, in all Huffman-coded files of 8 bits; see `jpeg_scans.is_whole` for what
    may pass. Where all blocks are there and only the end marker is missing, it is added. The rare others (arithmetic
    coding, lossless) and other formats are for their decoder to judge.
    """
    if _soundness(data, jpeg_header.parse(data))[0] is False:
        raise ValueError(_DAMAGED)
    return _ended(data)


def _soundness(data: bytes, header: JpegHeader | None) -> tuple[bool | None, bytes | None]:
    """(whether a JPEG's compressed data is whole, None where it cannot be told; seek points where regions decode)."""
    seek = jpeg.seek_points(data, header) if header else None
    return (jpeg_scans.is_whole(data) if seek is None else True), seek


def _ended(data: bytes) -> bytes:
    """The file with an end marker where it is a whole JPEG that lacks one."""
    if jpeg_markers.lacks_end(data) and _soundness(data, jpeg_header.parse(data))[0]:
        return data + jpeg_markers.END
    return data


def _loaded(data: bytes) -> Image.Image:
    """The decoded image, of which regions become RGB when they are asked for."""
    with _opened(_ended(data)) as image:
        image.load()
        return image


def _rgb(image: Image.Image, box: Box) -> np.ndarray:
    """A box of an image as (h, w, 3) uint8 RGB."""
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    if part.mode.startswith("I"):
        return np.repeat(_eight_bits(np.asarray(part))[:, :, None], 3, axis=2)
    return np.asarray(part.convert("RGB"))


@contextmanager
def _opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The first picture of a file, by the parsers of FORMATS alone; ValueError for whatever is wrong with it."""
    try:
        with Image.open(io.BytesIO(without_text(data)), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            if image.mode == "F":
                raise ValueError("float pixels have no fixed range; convert the file to 8 or 16 bits")
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more pixels than max_pixels={max_pixels}: cut it into parts") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ValueError(f"cannot be decoded: it is none of {known}, or its header is damaged") from error
    except _BROKEN as error:
        raise ValueError(f"cannot be decoded: {_words(error)}") from error


def _words(error: Exception) -> str:
    """What an error says, in one line that is the same on every machine."""
    return _ADDRESS.sub("", " ".join(str(error).split())) or type(error).__name__


def _num_pictures(image: Image.Image) -> int:
    """How many pictures a file holds; the previews that a camera adds to its JPEG do not count, nor damaged pages."""
    try:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except _BROKEN:
        return 1


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit gray to 8 bits, rounded; 65535 becomes 255."""
    return ((np.clip(pixels.astype(np.int64), 0, 65535) + 128) // 257).astype(np.uint8)
