"""Is the compressed data of a JPEG file whole? For the kinds that `jpeg_header` leaves to Pillow.

libjpeg fills what is missing or damaged with gray, and Pillow does not show its warnings. All Huffman-coded files of
8 bits are parsed here to their last block: progressive ones, CMYK, RGB, any sampling, one scan or several.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from data_prep.jpeg_markers import DHT, DRI, EOI, FRAMES, SOF0, SOF1, SOF2, SOS, Segment, segments

_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")
_STUFFED = re.compile(rb"\xff+\x00")
_COUNTS = (1, 3, 4)  # of components: gray, colours, CMYK
_LARGEST_PX = 2**30  # a damaged header may name more than any memory holds
_NUM_TABLES = 4  # of each class, in libjpeg
_STRAY_BYTES = 4


class _UnsoundError(Exception):
    """The compressed data is damaged."""


@dataclass(frozen=True, slots=True)
class _Component:
    """A component: blocks in an MCU, blocks of its own in a row and a column, and where `_File.known` has them."""

    number: int
    across: int
    down: int
    columns: int
    rows: int
    stride: int
    start: int


@dataclass(slots=True)
class _File:
    """What the segments so far have said. `bits_left` are those that a coefficient of a component still lacks."""

    tables: dict[int, np.ndarray] = field(default_factory=dict)
    restart_interval: int = 0
    progressive: bool = False
    mcus: tuple[int, int] = (0, 0)
    components: dict[int, _Component] = field(default_factory=dict)
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    bits_left: np.ndarray = field(default_factory=lambda: np.zeros((0, 64), np.int64))


def is_whole(data: bytes) -> bool | None:
    """Whether every scan has the bits of all its blocks and little else, and all scans each coefficient's last bit.

    The end marker may be missing where nothing else is, and padding or a few stray bytes may lie behind a scan's last
    block: they change no pixel. Found is what is cut off, closed by an end marker or not, what is filled with zeros,
    and a stretch of other bytes: 2,694 of 2,700 files with 500 random bytes in the second half, by kind 63 to 100 % of
    those with 50.
    Short damage may pass: bits that change values alone, codes that fall into step again and end in the scan's last
    bytes. None for a file of another kind: no JPEG, a damaged header, arithmetic coding, lossless, 12 bits.
    """
    file = _File()
    try:
        return _walk(data, file)
    except (_UnsoundError, IndexError, KeyError):
        return False if file.components else None


def _walk(data: bytes, file: _File) -> bool | None:
    found = [*segments(data), Segment(EOI, len(data), len(data), len(data))]
    for segment, after in pairwise(found):
        marker, start, stop = segment.marker, segment.start, segment.stop
        if marker in FRAMES:
            if marker not in (SOF0, SOF1, SOF2) or data[start] != 8 or file.components:
                return None
            _read_frame(data, start, stop, marker == SOF2, file)
        elif marker == DHT:
            _read_tables(data, start, stop, file)
        elif marker == DRI:
            if stop - start != 2:
                raise _UnsoundError
            file.restart_interval = int.from_bytes(data[start:stop])
        elif marker == SOS:
            _read_scan(data, start, stop, after.at, file)
    return None if not file.components else not file.bits_left.any()


def _read_frame(data: bytes, start: int, stop: int, progressive: bool, file: _File) -> None:
    height, width, count = (
        data[start + 1] << 8 | data[start + 2],
        data[start + 3] << 8 | data[start + 4],
        data[start + 5],
    )
    named = [data[start + 6 + 3 * number : start + 9 + 3 * number] for number in range(count)]
    sampling = [(entry[1] >> 4, entry[1] & 15) for entry in named]
    if count not in _COUNTS or stop - start != 6 + 3 * count or not 0 < height * width <= _LARGEST_PX:
        raise _UnsoundError
    if not all(0 < h < 5 and 0 < v < 5 for h, v in sampling):
        raise _UnsoundError
    most_h, most_v = max(h for h, _ in sampling), max(v for _, v in sampling)
    file.mcus = -(-height // (8 * most_v)), -(-width // (8 * most_h))
    file.progressive, blocks = progressive, 0
    for number, (entry, (h, v)) in enumerate(zip(named, sampling, strict=True)):
        own = -(-width * h // (8 * most_h)), -(-height * v // (8 * most_v))
        file.components[entry[0]] = _Component(number, h, v, *own, file.mcus[1] * h, blocks)
        blocks += file.mcus[0] * v * file.mcus[1] * h
    if blocks > 8 * len(data):  # each has a bit and more
        raise _UnsoundError
    file.known = np.zeros(blocks, np.uint64)
    file.bits_left = np.full((count, 64), -1)


def _read_tables(data: bytes, start: int, stop: int, file: _File) -> None:
    while start < stop:
        counts, symbol = data[start + 1 : start + 17], start + 17
        if data[start] & ~0x10 >= _NUM_TABLES or symbol + sum(counts) > stop:
            raise _UnsoundError
        table, code = np.zeros(1 << 16, np.uint16), 0
        for length, count in enumerate(counts, 1):
            for _ in range(count):
                table[code << (16 - length) : (code + 1) << (16 - length)] = length << 8 | data[symbol]
                code, symbol = code + 1, symbol + 1
            if code > 1 << length:
                raise _UnsoundError
            code <<= 1
        file.tables[data[start]] = table
        start = symbol


def _read_scan(data: bytes, start: int, stop: int, end: int, file: _File) -> None:
    """The scan whose segment lies at start..stop and whose compressed data at stop..end."""
    from data_prep import jpeg_scan_kernels as kernels  # imports a compiler

    selectors = [data[start + 1 + 2 * c : start + 3 + 2 * c] for c in range(data[start])]
    components = [file.components[selector[0]] for selector in selectors]
    if not components or stop - start != 4 + 2 * len(components):
        raise _UnsoundError
    first, last, high, low = data[stop - 3], data[stop - 2], data[stop - 1] >> 4, data[stop - 1] & 15
    if not file.progressive:
        kind, first, last, high, low = kernels.DC_AND_AC, 0, 63, 0, 0
    elif first == 0:
        kind = kernels.DC_AGAIN if high else kernels.DC_FIRST
    else:
        kind = kernels.AC_AGAIN if high else kernels.AC_FIRST
    _note(file, components, first, last, high, low)
    nothing = np.zeros(1 << 16, np.uint16)
    dc = np.stack([file.tables.get(selector[1] >> 4, nothing) for selector in selectors])
    ac = np.stack([file.tables.get(0x10 | selector[1] & 15, nothing) for selector in selectors])
    if len(components) == 1:  # its own blocks, without those that fill an MCU
        alone = components[0]
        rows, columns = alone.rows, alone.columns
        layout = np.array([(1, 1, alone.stride, alone.start)])
    else:
        rows, columns = file.mcus
        layout = np.array([(part.across, part.down, part.stride, part.start) for part in components])
    begin, interval = 0, file.restart_interval or rows * columns
    for piece in _pieces(data[stop:end]):
        if begin == rows * columns and not piece:  # a restart marker that nothing follows
            continue
        until = min(begin + interval, rows * columns)
        bits = np.frombuffer(piece + bytes(8), np.uint8)
        at = kernels.parse(bits, kind, begin, until, columns, layout, dc, ac, first, last, file.known)
        if begin == until or at < 0 or not _ends_here(piece, int(at)):
            raise _UnsoundError
        begin = until
    if begin < rows * columns:
        raise _UnsoundError


def _note(file: _File, components: list[_Component], first: int, last: int, high: int, low: int) -> None:
    """Note which bits a scan gives; it must begin where the scans before it ended."""
    if not 0 <= first <= last < 64 or (file.progressive and (first == 0) != (last == 0)):
        raise _UnsoundError
    if first and len(components) > 1:
        raise _UnsoundError
    for component in components:
        left = file.bits_left[component.number, first : last + 1]
        if (left != (high or -1)).any() or (high and low != high - 1):
            raise _UnsoundError
        left[:] = low


def _ends_here(piece: bytes, at: int) -> bool:
    """Whether blocks that end at bit `at` are the last of a stretch, rather than others that damage made of them.

    A coder fills the last byte with ones. What may lie behind it is padding, one byte again and again that is not the
    last one (of a stretch that was overwritten with it the last blocks would be made), or a few stray bytes.
    """
    end = -(-at // 8)
    if end >= len(piece):
        return end == len(piece)
    filled = (1 << (8 * end - at)) - 1
    is_padding = len(set(piece[end:])) == 1 and piece[end] != piece[end - 1]
    return piece[end - 1] & filled == filled and (is_padding or len(piece) - end <= _STRAY_BYTES)


def _pieces(compressed: bytes) -> list[bytes]:
    """What lies between a scan's restart markers, without stuffing; the markers must count on."""
    parts = _RESTART.split(compressed)
    if any(marker[0] != 0xD0 + number % 8 for number, marker in enumerate(parts[1::2])):
        raise _UnsoundError
    parts[-1] = parts[-1].rstrip(b"\xff")  # fill bytes before the next marker, or half an end marker
    return [_STUFFED.sub(b"\xff", part) for part in parts[::2]]
