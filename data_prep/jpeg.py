"""A region of a JPEG file, equal to the same region of the whole decoded image, for less than its price.

Nothing below the region is read, and what lies above and beside it is parsed but not transformed. Parsing is most of
the work; *seek points*, made when a file is checked, say where a row of blocks continues every 128 pixels, so that
decoding begins at the region. They are 2 % of the file and change no pixel.

Files of another kind than `jpeg_header` describes, and damaged ones, are left to Pillow: `region` returns None.
"""

import zlib
from typing import Any

import numpy as np

from data_prep.jpeg_header import JpegHeader
from data_prep.jpeg_markers import END

_SMALLEST_PX = 9  # libjpeg upsamples narrower chroma in another way
_SEEK_PX = 128  # from one seek point to the next
_LARGEST_BYTES = 2**28  # a point's position is a number of bits below 2**32
_POSITION, _VALUE, _CHECK = "<u4", "<i2", 4


def region(
    data: bytes, header: JpegHeader, top: int, left: int, height: int, width: int, seek: bytes = b""
) -> np.ndarray | None:
    """The region as (3, height, width) uint8 RGB; None where the file is damaged or of no kind for this decoder.

    `seek` are the file's seek points, or nothing.
    """
    assert min(height, width) > 0, "an empty region"
    assert 0 <= top <= header.height - height, "a region above or below the image"
    assert 0 <= left <= header.width - width, "a region beside the image"
    from data_prep import jpeg_kernels  # imports a compiler: what only lists or plans does without

    h, v, colours = header.luma_h, header.luma_v, len(header.dc) == 3
    if h > 1 and min(header.height, header.width) < _SMALLEST_PX:
        return None
    window, offset = _window(header, top, left, height, width)
    rows, columns = window[1] - window[0], window[3] - window[2]
    luma = np.empty((rows * v * 8, columns * h * 8), np.uint8)
    chroma = np.empty((2, rows * 8, columns * 8) if colours else (2, 0, 0), np.uint8)
    tables = _tables(data, header)
    sound = tables[0] and jpeg_kernels.decode_planes(
        *(np.frombuffer(data, np.uint8), header.scan, tables, h, v, _mcus(header)[1], header.restart_interval),
        *(window, luma, chroma, _step(header), *_unpacked(seek, header)),
    )
    if not sound:
        return None
    first_row, first_column = top - offset[0], left - offset[1]
    if not colours:
        gray = luma[first_row : first_row + height, first_column : first_column + width]
        return np.broadcast_to(gray, (3, height, width)).copy()
    rgb = np.empty((3, height, width), np.uint8)
    chroma_offset, full_chroma = (window[0] * 8, window[2] * 8), (-(-header.height // v), -(-header.width // h))
    jpeg_kernels.to_rgb(luma, chroma, offset, chroma_offset, full_chroma, h, v, top, left, rgb)
    return rgb


def seek_points(data: bytes, header: JpegHeader) -> bytes | None:
    """The file's seek points, nothing for a file that has none; None where the scan does not end with its last block.

    The whole scan is parsed: libjpeg fills what is missing with gray and lets it pass. A tail of zeros parses as well,
    for any bits may be a code; that bytes are left behind the last block gives it away. Of those that are left,
    `jpeg_scans.is_whole` knows whether they matter.
    """
    from data_prep import jpeg_kernels

    tables = _tables(data, header)
    if not tables[0]:
        return None
    rows, columns = _mcus(header)
    bits = np.empty(rows * -(-columns // _step(header)), _POSITION)
    values = np.empty((len(bits), len(header.dc)), _VALUE)
    end = jpeg_kernels.parse_scan(
        *(np.frombuffer(data, np.uint8), header.scan, tables, header.luma_h, header.luma_v, rows, columns),
        *(header.restart_interval, _step(header), bits, values),
    )
    if end < 0 or not _ends_at(data, int(end)):
        return None
    packed = bits.tobytes() + values.tobytes()
    return packed + zlib.crc32(packed).to_bytes(_CHECK, "little") if _has_points(data, header) else b""


def _ends_at(data: bytes, position: int) -> bool:
    """Whether a file's end, or its end marker, is there, perhaps after fill bytes."""
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] in (b"\xff", b""):
        position += 1
    return data[position : position + 2] in (b"", END)


def _has_points(data: bytes, header: JpegHeader) -> bool:
    return not header.restart_interval and len(data) < _LARGEST_BYTES


def _tables(data: bytes, header: JpegHeader) -> Any:
    """The file's decoding tables for the kernels, and first whether they are sound."""
    from data_prep import jpeg_kernels

    places = (np.array(header.quantization), np.array(header.dc), np.array(header.ac))
    return jpeg_kernels.read_tables(np.frombuffer(data, np.uint8), *places)


def _mcus(header: JpegHeader) -> tuple[int, int]:
    """Rows and columns of MCUs."""
    return -(-header.height // (8 * header.luma_v)), -(-header.width // (8 * header.luma_h))


def _step(header: JpegHeader) -> int:
    """MCUs from one seek point to the next."""
    return _SEEK_PX // (8 * header.luma_h)


def _unpacked(seek: bytes, header: JpegHeader) -> tuple[np.ndarray, np.ndarray]:
    """Positions and DC values of seek points; none where they are damaged."""
    rows, columns = _mcus(header)
    count, components = rows * -(-columns // _step(header)), len(header.dc)
    fits = len(seek) == count * (4 + 2 * components) + _CHECK
    if not fits or zlib.crc32(seek[:-_CHECK]) != int.from_bytes(seek[-_CHECK:], "little"):
        count, seek = 0, b""
    bits = np.frombuffer(seek, _POSITION, count)
    return bits, np.frombuffer(seek, _VALUE, count * components, bits.nbytes).reshape(count, components)


def _window(
    header: JpegHeader, top: int, left: int, height: int, width: int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(first row, end row, first column, end column) of the MCUs needed, and the first one's (row, column) in pixels.

    Upsampled chroma sees one sample beyond the region.
    """
    spans = []
    for start, length, full, factor in (
        (top, height, header.height, header.luma_v),
        (left, width, header.width, header.luma_h),
    ):
        reach = factor if factor > 1 else 0
        spans.append(max(0, start - reach) // (8 * factor))
        spans.append((min(full, start + length + reach) - 1) // (8 * factor) + 1)
    return tuple(spans), (spans[0] * 8 * header.luma_v, spans[2] * 8 * header.luma_h)
