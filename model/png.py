"""PNG files as chunks: what lies beside the pixels is taken out before a decoder sees it, and put into new files.

Decoders refuse long texts, which are no fault of the pixels. Source: PNG, third edition; ImageMagick's raw profiles.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_END = len(SIGNATURE) + 25
LARGEST_BYTES = 2**26
"""Of what a chunk may unpack to."""
XMP_KEYWORD = b"XML:com.adobe.xmp"
BESIDES = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP")
"""Chunks that are taken out: texts, EXIF, a colour profile."""
INCHES_PER_METRE = 1 / 0.0254


@dataclass
class Parts:
    """A PNG file's pixels, as a file of their own, and what lay beside them."""

    pixels: bytes
    exif: bytes | None = None
    xmp: bytes | None = None
    profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    unreadable: tuple[str, ...] = ()
    """What is there but damaged, or unpacks to more than `LARGEST_BYTES`."""


def take_apart(data: bytes) -> Parts:
    """A file without its texts, EXIF and profile, and those; a file that ends too early is left to the decoder."""
    kept, end, parts = [], len(SIGNATURE), Parts(data)
    for kind, begin, end in _chunks(data):
        content = data[begin + 8 : end - 4]
        if kind not in BESIDES:
            kept.append(data[begin:end])
            if kind == b"pHYs" and len(content) == 9 and content[8] == 1:
                across, down = struct.unpack(">II", content[:8])
                parts.dpi = (across / INCHES_PER_METRE, down / INCHES_PER_METRE) if across and down else None
        elif zlib.crc32(data[begin + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
            _note(parts, kind, content)
        elif kind in (b"eXIf", b"iCCP"):
            parts.unreadable += ({b"eXIf": "EXIF", b"iCCP": "colour profile"}[kind],)
    parts.pixels = SIGNATURE + b"".join(kept) + data[end:]
    return parts


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of the chunks that are whole, up to the last one."""
    begin, kind = len(SIGNATURE), b""
    while kind != b"IEND" and begin + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, begin)
        end = begin + 12 + length
        if end > len(data):
            return
        yield kind, begin, end
        begin = end


def _note(parts: Parts, kind: bytes, content: bytes) -> None:
    """Take what a chunk beside the pixels says."""
    name, value = "EXIF", content
    try:
        if kind == b"iCCP":
            name = "colour profile"
            value = _unpacked(content.partition(b"\0")[2][1:])
        elif kind != b"eXIf":
            name, value = _text(kind, content)
    except (zlib.error, ValueError):
        parts.unreadable += (name,)
        return
    if name == "EXIF":
        parts.exif = parts.exif or value
    elif name == "XMP":
        parts.xmp = parts.xmp or value
    elif name == "colour profile":
        parts.profile = parts.profile or value


def _text(kind: bytes, content: bytes) -> tuple[str, bytes]:
    """What a text chunk holds (EXIF, XMP, or nothing of these) and its bytes."""
    keyword, _, rest = content.partition(b"\0")
    if keyword == XMP_KEYWORD and kind == b"iTXt":
        packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        return "XMP", _unpacked(text) if packed else text
    raw = re.fullmatch(rb"Raw profile type (exif|app1|xmp)", keyword, re.IGNORECASE)
    if raw is None or kind == b"iTXt":
        return "", b""
    text = _unpacked(rest[1:]) if kind == b"zTXt" else rest
    value = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))  # a line each: nothing, name, length
    is_exif = raw[1].lower() == b"exif" or value.startswith(b"Exif")
    return ("EXIF", value) if is_exif else ("XMP" if raw[1].lower() == b"xmp" else "", value)


def _unpacked(data: bytes) -> bytes:
    """ValueError where it is more than `LARGEST_BYTES`, zlib.error where it is damaged."""
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data, LARGEST_BYTES)
    if not unpacker.eof:
        raise ValueError("it is cut off, or too large")
    return unpacked


def put_together(
    png: bytes, exif: bytes | None, xmp: bytes | None, profile: bytes | None, dpi: tuple[float, float] | None
) -> bytes:
    """A file with these chunks right after its header, where the standard wants some of them."""
    chunks = []
    if profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
    if dpi:
        per_metre = (min(round(value * INCHES_PER_METRE), 2**31 - 1) for value in dpi)
        chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if exif:
        chunks.append((b"eXIf", exif))
    if xmp:
        chunks.append((b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + xmp))
    added = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return png[:HEADER_END] + added + png[HEADER_END:]


def outline(file: BinaryIO) -> tuple[int, int, int, bool]:
    """(height, width, bits a channel, whether there is alpha) of an open file, from what stands before the pixels.

    ValueError where it is cut off there.
    """
    head = file.read(HEADER_END)
    if len(head) < HEADER_END:
        raise ValueError("it ends within its header")
    width, height, bits, colour = struct.unpack_from(">IIBB", head, 16)
    alpha = colour in (4, 6)
    while not alpha and len(chunk := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", chunk)
        if kind == b"IDAT":
            break
        alpha = kind == b"tRNS"
        file.seek(length + 4, 1)
    return height, width, bits, alpha
