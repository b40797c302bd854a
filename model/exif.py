"""EXIF: the tags of a picture, as they stand in the directories that TIFF files are made of.

Values stay the bytes they are, with their types and byte order, so that what no program here knows is kept as well.
A thumbnail, which lies in a second directory, is left out. Source: EXIF 2.32, TIFF 6.0, the BigTIFF design.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

ORIENTATION = 0x0112
"""EXIF's and TIFF's tag number."""
WIDTH, HEIGHT, PIXEL_WIDTH, PIXEL_HEIGHT = 0x0100, 0x0101, 0xA002, 0xA003
RESOLUTIONS, RESOLUTION_UNIT = (0x011A, 0x011B), 0x0128
DESCRIPTION, MAKER_NOTE, XMP = 0x010E, 0x927C, 0x02BC
CAMERA, GPS, INTEROP = 0x8769, 0x8825, 0xA005
"""Where other directories begin."""
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""By the number of a type."""
SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16
UNITS_PER_INCH = {2: 1.0, 3: 2.54}
"""By the value of RESOLUTION_UNIT: inches, centimetres."""
LAYOUT_TAGS = frozenset(
    (
        *(0x00FE, 0x00FF, 0x0102, 0x0103, 0x0106, 0x010A, 0x0111, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D, 0x0140),
        *range(0x0142, 0x0146),
        *(0x014A, 0x0152, 0x0153, 0x015B, *range(0x0200, 0x020A), 0x0212, 0x0214, XMP, 0x8773, CAMERA, GPS),
    )
)
"""Tags that say how pixels lie in a file, or where something else does: each file has its own."""
DESCRIBING_TAGS = frozenset(
    (
        *(0x010D, DESCRIPTION, 0x010F, 0x0110, *RESOLUTIONS, RESOLUTION_UNIT, 0x0131, 0x0132, 0x013B, 0x013C),
        *(ORIENTATION, 0x4746, 0x4749, 0x8298, 0x83BB, *range(0x9C9B, 0x9CA0)),
    )
)
"""Of a TIFF file's first directory: what is about the picture, whatever its size. Others may be about its pixels."""
SIZE_NOTES = (b'{"shape"', b"ImageJ=", b"<?xml", b"SCANIMAGE")
"""How descriptions begin that programs left for themselves: they say sizes that are no longer true."""


@dataclass(frozen=True)
class Entry:
    """A tag's value: the number of its type, how many there are, and their bytes."""

    kind: int
    count: int
    data: bytes


Directory = dict[int, Entry]
ByteOrder = Literal["<", ">"]
"""As `struct` has it: little or big endian."""
_ORDERS: dict[bytes, ByteOrder] = {b"II": "<", b"MM": ">"}


@dataclass(frozen=True)
class Layout:
    """How a file's numbers are written: byte order as `struct` has it, and whether positions have 64 bits."""

    order: ByteOrder
    big: bool = False

    @property
    def place_bytes(self) -> int:
        """Of a position in the file; a value of so many bytes stands in its place."""
        return 8 if self.big else 4

    def pack(self, classic: str, big: str, *values: int) -> bytes:
        """Numbers by the one form or the other of `struct`."""
        return struct.pack(self.order + (big if self.big else classic), *values)

    def unpack(self, classic: str, big: str, data: bytes, at: int) -> tuple[int, ...]:
        """Numbers at a position. struct.error beyond the end."""
        return struct.unpack_from(self.order + (big if self.big else classic), data, at)


@dataclass(frozen=True)
class Exif:
    """The tags of a picture by directory; all in one byte order."""

    order: ByteOrder = "<"
    main: Directory = field(default_factory=dict)
    camera: Directory = field(default_factory=dict)
    gps: Directory = field(default_factory=dict)
    interop: Directory = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is no tag at all."""
        return not (self.main or self.camera or self.gps)

    @property
    def orientation(self) -> int:
        """1 (as stored) to 8; 1 where the tag is missing or says something else."""
        found = self._number(ORIENTATION)
        return int(found) if found is not None and found in range(1, 9) else 1

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Dots per inch across and down."""
        across, down = (self._number(tag) for tag in RESOLUTIONS)
        per_inch = UNITS_PER_INCH.get(int(self._number(RESOLUTION_UNIT) or 2))
        return (across * per_inch, down * per_inch) if across and down and per_inch else None

    def _number(self, tag: int) -> float | None:
        entry = self.main.get(tag)
        if entry is None or entry.kind not in (SHORT, LONG, RATIONAL):
            return None
        values = struct.unpack_from(self.order + {SHORT: "H", LONG: "I", RATIONAL: "II"}[entry.kind], entry.data)
        if entry.kind != RATIONAL:
            return float(values[0])
        return values[0] / values[1] if values[1] else None

    def upright(self, turns: int) -> "Exif":
        """As of the picture turned by this orientation: resolutions exchanged where rows and columns were."""
        main = dict(self.main)
        if turns > 4:
            across, down = RESOLUTIONS
            exchanged = {across: self.main.get(down), down: self.main.get(across)}
            main = {tag: entry for tag, entry in main.items() if tag not in RESOLUTIONS}
            main |= {tag: entry for tag, entry in exchanged.items() if entry is not None}
        if ORIENTATION in main:
            main[ORIENTATION] = Entry(SHORT, 1, struct.pack(self.order + "H", 1))
        return replace(self, main=main)

    def sized(self, height: int, width: int) -> "Exif":
        """With this size in px where a size is said."""
        main, camera = dict(self.main), dict(self.camera)
        for directory, tag, side in (
            (main, WIDTH, width),
            (main, HEIGHT, height),
            (camera, PIXEL_WIDTH, width),
            (camera, PIXEL_HEIGHT, height),
        ):
            if tag in directory:
                directory[tag] = Entry(LONG, 1, struct.pack(self.order + "I", side))
        return replace(self, main=main, camera=camera)

    def with_dpi(self, dpi: tuple[float, float]) -> "Exif":
        """With a resolution where none is said."""
        if RESOLUTIONS[0] in self.main:
            return self
        main = dict(self.main)
        for tag, value in zip(RESOLUTIONS, dpi, strict=True):
            exact = Fraction(min(value, 1e5)).limit_denominator(10_000)
            main[tag] = Entry(RATIONAL, 1, struct.pack(self.order + "II", exact.numerator, exact.denominator))
        main[RESOLUTION_UNIT] = Entry(SHORT, 1, struct.pack(self.order + "H", 2))
        return replace(self, main=main)

    def without_maker_note(self) -> "Exif":
        """Without what the camera's maker keeps for itself, which may be large."""
        return replace(self, camera={tag: entry for tag, entry in self.camera.items() if tag != MAKER_NOTE})

    def to_bytes(self) -> bytes:
        """As PNG and WebP store it; JPEG has `Exif` and two zeros before it."""
        layout = Layout(self.order)
        head = (b"II" if self.order == "<" else b"MM") + struct.pack(self.order + "HI", 42, 8)
        return head + _written(self, layout, 8)


def parse(data: bytes) -> Exif:
    """EXIF as stored in JPEG, PNG and WebP files; values that lie outside are left out. ValueError where it is none."""
    data = re.sub(b"^(Exif\0\0)+", b"", data)
    layout, first = _header(data)
    return _gathered(data, layout, first, lambda tag: tag not in LAYOUT_TAGS)


def parse_tiff(data: bytes) -> tuple[Exif, bytes | None]:
    """What a TIFF file's first directory says about the picture, and its XMP. ValueError for a broken file."""
    layout, first = _header(data)
    exif = _gathered(data, layout, first, lambda tag: tag in DESCRIBING_TAGS)
    description = exif.main.get(DESCRIPTION)
    if description is not None and description.data.startswith(SIZE_NOTES):
        del exif.main[DESCRIPTION]
    xmp = _directory(data, layout, first).get(XMP)
    return exif, xmp.data if xmp else None


def add_to_tiff(tiff: bytes, exif: Exif | None, xmp: bytes | None) -> bytes:
    """A TIFF file, of the byte order of `exif`, with these tags as well; those that it has stay as they are.

    A new first directory is written at the end, and the header points to it.
    """
    if exif is None and xmp is None:
        return tiff
    layout, first = _header(tiff)
    exif = exif or Exif(layout.order)
    assert exif.order == layout.order, "values are kept as bytes"
    own = _directory(tiff, layout, first)
    main = exif.main | ({XMP: Entry(1, len(xmp), xmp)} if xmp else {}) | own
    start = len(tiff) + len(tiff) % 2
    at = 8 if layout.big else 4
    head = tiff[:at] + layout.pack("I", "Q", start) + tiff[at + layout.place_bytes :]
    return head.ljust(start, b"\0") + _written(replace(exif, main=main), layout, start)


def _header(data: bytes) -> tuple[Layout, int]:
    """Byte order and kind of a file, and where its first directory is."""
    order = _ORDERS.get(data[:2])
    if order is None:
        raise ValueError("it does not begin as EXIF does")
    try:
        version = struct.unpack_from(order + "H", data, 2)[0]
        if version == 42:
            return Layout(order), Layout(order).unpack("I", "", data, 4)[0]
        if version == 43:
            return Layout(order, big=True), Layout(order, big=True).unpack("", "Q", data, 8)[0]
    except struct.error as error:
        raise ValueError("it ends within its header") from error
    raise ValueError("it does not begin as EXIF does")


def _gathered(data: bytes, layout: Layout, first: int, is_kept: Callable[[int], bool]) -> Exif:
    """The directories that the first one leads to; of it only the tags that are kept."""
    main = _directory(data, layout, first)
    camera = _below(data, layout, main, CAMERA)
    gps, interop = _below(data, layout, main, GPS), _below(data, layout, camera, INTEROP)
    camera.pop(INTEROP, None)
    return Exif(layout.order, {tag: entry for tag, entry in main.items() if is_kept(tag)}, camera, gps, interop)


def _below(data: bytes, layout: Layout, directory: Directory, pointer: int) -> Directory:
    """The directory that a tag points to; empty where there is none."""
    entry = directory.get(pointer)
    form = {2: "H", 4: "I", 8: "Q"}.get(len(entry.data)) if entry else None
    if entry is None or form is None:
        return {}
    (place,) = struct.unpack(layout.order + form, entry.data)
    try:
        return _directory(data, layout, place)
    except ValueError:
        return {}


def _directory(data: bytes, layout: Layout, at: int) -> Directory:
    """The tags of a directory; values beyond the end are left out. ValueError where the directory itself is."""
    found, total, entry_bytes, value_at = {}, 0, 12 + layout.big * 8, 8 + layout.big * 4
    try:
        (count,) = layout.unpack("H", "Q", data, at)
        at += 8 if layout.big else 2
        for begin in range(at, at + count * entry_bytes, entry_bytes):
            tag, kind, number = layout.unpack("HHI", "HHQ", data, begin)
            length, place = BYTES.get(kind, 0) * number, begin + value_at
            if length > layout.place_bytes:
                (place,) = layout.unpack("I", "Q", data, place)
            if 0 < length <= len(data) - place:
                found[tag] = Entry(kind, number, data[place : place + length])
                total += length
            if total > 2 * len(data):
                raise ValueError("its values are more than the file")
    except (struct.error, OverflowError) as error:
        raise ValueError("it ends within a directory") from error
    return found


def _written(exif: Exif, layout: Layout, start: int) -> bytes:
    """The directories one after the other, the first at this position of a file."""
    camera = exif.camera | ({INTEROP: _pointer(layout, 0)} if exif.interop else {})
    pointers = {tag: _pointer(layout, 0) for tag, below in ((CAMERA, camera), (GPS, exif.gps)) if below}
    camera_at = start + len(_one_written(exif.main | pointers, layout, 0))
    gps_at = camera_at + len(_one_written(camera, layout, 0)) * bool(camera)
    interop_at = gps_at + len(_one_written(exif.gps, layout, 0)) * bool(exif.gps)
    places = {CAMERA: camera_at, GPS: gps_at}
    main = exif.main | {tag: _pointer(layout, places[tag]) for tag in pointers}
    camera |= {INTEROP: _pointer(layout, interop_at)} if exif.interop else {}
    parts = [(main, start), (camera, camera_at), (exif.gps, gps_at), (exif.interop, interop_at)]
    return b"".join(_one_written(part, layout, at) for part, at in parts if part or part is main)


def _pointer(layout: Layout, place: int) -> Entry:
    return Entry(LONG8 if layout.big else LONG, 1, layout.pack("I", "Q", place))


def _one_written(directory: Directory, layout: Layout, start: int) -> bytes:
    """A directory and its values, of an even number of bytes."""
    if not layout.big:
        directory = {tag: entry for tag, entry in directory.items() if entry.kind < LONG8}
    entries, values = b"", b""
    values_at = start + (8 if layout.big else 2) + len(directory) * (20 if layout.big else 12) + layout.place_bytes
    for tag, entry in sorted(directory.items()):
        inline = entry.data.ljust(layout.place_bytes, b"\0")
        if len(entry.data) > layout.place_bytes:
            inline = layout.pack("I", "Q", values_at + len(values))
            values += entry.data + b"\0" * (len(entry.data) % 2)
        entries += layout.pack("HHI", "HHQ", tag, entry.kind, entry.count) + inline
    return layout.pack("H", "Q", len(directory)) + entries + layout.pack("I", "Q", 0) + values
