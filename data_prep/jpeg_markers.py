"""The marker segments of a JPEG file, found as libjpeg finds them (ITU-T T.81, annex B); one walker for all that ask.

Bytes that are no marker, fill bytes and restart markers between segments are passed over, whatever they look like. What
is hidden in another segment is never taken for one.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

SOF0, SOF1, SOF2, DHT, SOI, EOI, SOS, DQT, DRI, APP0, APP14 = (
    *(0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9),
    *(0xDA, 0xDB, 0xDD, 0xE0, 0xEE),
)
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
"""0xC8 is reserved, 0xCC sets arithmetic coding."""
END = b"\xff\xd9"
_TEM = 0x01
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # no restart marker, no fill byte, no stuffed one


class Segment(NamedTuple):
    """A marker at `at` (its 0xFF), and the bytes start..stop that belong to it, without their length."""

    marker: int
    at: int
    start: int
    stop: int


def is_jpeg(data: bytes) -> bool:
    """Whether a file begins as a JPEG file does."""
    return data[:3] == b"\xff\xd8\xff"


def segments(data: bytes) -> Iterator[Segment]:
    """The segments after the first marker, to the end marker with it, or as far as they are whole.

    A scan's compressed data lies between its own segment and the next.
    """
    position = 2 if is_jpeg(data) else len(data)
    while (found := _MARKER.search(data, position)) is not None:
        marker, start = found[1][0], found.end()
        if marker in (SOI, EOI):
            yield Segment(marker, found.start(), start, start)
            if marker == EOI:
                return
        elif marker != _TEM:
            start, stop = start + 2, start + int.from_bytes(data[start : start + 2])
            if stop < start or stop > len(data):
                return
            yield Segment(marker, found.start(), start, stop)
            start = stop
        position = start


def lacks_end(data: bytes) -> bool:
    """Whether a JPEG file's scan has no end marker behind it; that of a thumbnail in its header is none."""
    scan = next((segment.stop for segment in segments(data) if segment.marker == SOS), None)
    return scan is not None and data.rfind(END, scan) < 0
