"""The header of a baseline JPEG file: where its tables and its scan lie (ITU-T T.81, annex B).

Just the kind that photographs have is described: 8 bits, baseline Huffman coding, one scan, gray or YCbCr with
chroma at full size, half width, or half width and height. `parse` returns None for everything else.
"""

from dataclasses import dataclass

from data_prep.jpeg_markers import APP0, APP14, DHT, DQT, DRI, FRAMES, SOF0, SOF1, SOS, segments

_LUMA_SAMPLING = ((1, 1), (2, 1), (2, 2))
_KNOWN = frozenset((DHT, DQT, DRI, 0xFE, *range(APP0, APP0 + 16)))  # 0xFE: a comment
_VERSION_BYTES, _JFIF_BYTES, _ADOBE_BYTES = 7, 14, 12  # shorter segments are not taken for these by libjpeg


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Positions are offsets into the file.

    `luma_h` and `luma_v` are luma samples per chroma sample along each axis. Per component: `quantization` is where
    its 64 quantizers start, `dc` and `ac` are where its Huffman tables' 16 counts start.
    """

    height: int
    width: int
    luma_h: int
    luma_v: int
    quantization: tuple[int, ...]
    dc: tuple[int, ...]
    ac: tuple[int, ...]
    restart_interval: int
    scan: int


@dataclass(slots=True)
class _Tables:
    """What the marker segments so far have defined."""

    quantization: dict[int, int]
    huffman: dict[int, int]
    restart_interval: int = 0
    jfif: bool = False
    adobe_transform: int | None = None


def parse(data: bytes) -> JpegHeader | None:
    """The header of a file of the kind described above, else None; a damaged header is None, too."""
    try:
        return _parse(data)
    except (IndexError, KeyError):
        return None


def _parse(data: bytes) -> JpegHeader | None:
    tables, frame, position = _Tables({}, {}), -1, 2
    for segment in segments(data):
        if data[position : segment.at].strip(b"\xff"):  # bytes that are no segment; fill bytes are legal
            return None
        marker, start, position = segment.marker, segment.start, segment.stop
        if marker == SOS:
            return _header(data, tables, frame, start, position) if frame > 0 else None
        if marker in FRAMES:
            if marker not in (SOF0, SOF1) or frame > 0:
                return None
            frame = start
        elif marker not in _KNOWN or not _take(data, tables, marker, start, position):
            return None
    return None


def _take(data: bytes, tables: _Tables, marker: int, start: int, stop: int) -> bool:
    """Note a segment's tables; False for a table that is not of the kind described, or that libjpeg refuses."""
    if marker == DQT:
        while start < stop:
            if data[start] > 3:  # 16-bit quantizers
                return False
            tables.quantization[data[start]] = start + 1
            start += 65
    elif marker == DHT:
        while start < stop:
            num_codes = sum(data[start + 1 : start + 17])
            if data[start] & ~0x10 > 3 or num_codes > 256:
                return False
            tables.huffman[data[start]] = start + 1
            start += 17 + num_codes
    elif marker == DRI:
        tables.restart_interval = data[start] << 8 | data[start + 1]
        start += 2
    elif marker in (APP0, APP14) and data[start:stop].startswith((b"JFIF", b"Adobe")) and stop - start < _VERSION_BYTES:
        return False  # Pillow looks for their version
    elif marker == APP0 and data[start : start + 5] == b"JFIF\0":
        tables.jfif = tables.jfif or stop - start >= _JFIF_BYTES
    elif marker == APP14 and data[start : start + 5] == b"Adobe" and stop - start >= _ADOBE_BYTES:
        tables.adobe_transform = data[start + 11]
    return start == stop or marker not in (DQT, DHT, DRI)


def _header(data: bytes, tables: _Tables, frame: int, start: int, stop: int) -> JpegHeader | None:
    """The header, from the frame's and the scan's segments."""
    height, width = data[frame + 1] << 8 | data[frame + 2], data[frame + 3] << 8 | data[frame + 4]
    count = data[frame + 5]
    if data[frame] != 8 or not height or not width or count not in (1, 3) or data[start] != count:
        return None
    if int.from_bytes(data[frame - 2 : frame]) != 8 + 3 * count or stop - start != 4 + 2 * count:
        return None
    components = [data[frame + 6 + 3 * c : frame + 9 + 3 * c] for c in range(count)]
    selectors = [data[start + 1 + 2 * c : start + 3 + 2 * c] for c in range(count)]
    names = [component[0] for component in components]
    if [selector[0] for selector in selectors] != names or len(set(names)) < count:
        return None
    sampling = [(component[1] >> 4, component[1] & 15) for component in components]
    if data[stop - 3 : stop - 1] != b"\x00\x3f" or not all(0 < factor < 5 for pair in sampling for factor in pair):
        return None
    if count == 1:
        sampling = [(1, 1)]  # a lone component's blocks lie in plain order whatever it says
    elif not _is_ycbcr(tables, names) or sampling[0] not in _LUMA_SAMPLING or sampling[1:] != [(1, 1), (1, 1)]:
        return None
    return JpegHeader(
        height=height,
        width=width,
        luma_h=sampling[0][0],
        luma_v=sampling[0][1],
        quantization=tuple(tables.quantization[component[2]] for component in components),
        dc=tuple(tables.huffman[selector[1] >> 4] for selector in selectors),
        ac=tuple(tables.huffman[0x10 | selector[1] & 15] for selector in selectors),
        restart_interval=tables.restart_interval,
        scan=stop,
    )


def _is_ycbcr(tables: _Tables, names: list[int]) -> bool:
    """Whether libjpeg, too, takes three components for YCbCr."""
    if tables.jfif:
        return True
    return tables.adobe_transform == 1 or (tables.adobe_transform is None and names == [1, 2, 3])
