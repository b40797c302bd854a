"""JPEG files as odd encoders, editors and transfers leave them: mutations of sound ones, drawn from a generator."""

import io

import numpy as np
from PIL import Image

from data_prep.jpeg_markers import segments
from tests.unit.data_prep.odd_files import encoded, photograph

SOURCES = (
    *(("RGB", {"subsampling": subsampling}) for subsampling in ("4:4:4", "4:2:2", "4:2:0")),
    *(
        ("L", {}),
        ("RGB", {"restart_marker_blocks": 3}),
        ("L", {"restart_marker_blocks": 1}),
        ("RGB", {"optimize": True}),
    ),
    *(("RGB", {"keep_rgb": True}), ("RGB", {"progressive": True}), ("CMYK", {}), ("L", {"progressive": True})),
)


def source(random):
    """A sound file of any kind."""
    mode, options = SOURCES[random.integers(len(SOURCES))]
    height, width = (int(side) for side in random.integers(1, 50, 2))
    image = photograph(height, width, int(random.integers(1000))).convert(mode)
    return encoded(image, quality=int(random.choice([50, 90, 100])), **options)


def separate(height=40, width=56):
    """Three components in three scans, as scanners write them: gray files' scans under one header."""
    channels = photograph(height, width).convert("YCbCr").split()
    files = [encoded(channel, quality=85) for channel in channels]
    found = list(segments(files[0]))
    head = b"\xff\xd8" + b"".join(files[0][part.at : part.stop] for part in found if part.marker in (0xDB, 0xC4))
    size = height.to_bytes(2) + width.to_bytes(2)
    frame = segment(0xC0, b"\x08" + size + b"\x03" + b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3)))
    scans = []
    for number, data in enumerate(files, 1):
        *_, begin, end = segments(data)
        scans.append(segment(0xDA, bytes((1, number, 0, 0, 63, 0))) + data[begin.stop : end.at])
    return head + frame + b"".join(scans) + b"\xff\xd9"


def segment(marker, body):
    """A marker segment of a JPEG file."""
    return bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2) + body


def inserted(data, at, content):
    return data[:at] + content + data[at:]


def boundaries(data):
    return [part.at for part in segments(data)]


def fill(data, random):
    """Fill bytes before a marker, which are legal."""
    return inserted(data, random.choice(boundaries(data)), b"\xff" * int(random.integers(1, 4)))


def fill_before_restarts(data, random):
    out = bytearray()
    for at, byte in enumerate(data):
        if byte == 0xFF and at + 1 < len(data) and 0xD0 <= data[at + 1] <= 0xD7:
            out += b"\xff" * int(random.integers(0, 3))
        out.append(byte)
    return bytes(out)


def stray(data, random):
    """Bytes or markers that belong nowhere, between two segments."""
    kinds = (
        b"\x00",
        b"\x00\x00",
        b"\xff\xd0",
        b"\xff\x01",
        b"\xff\xd0\x00\x06\xff\xe1\x00\x04ab",
        random.bytes(3),
        b"\xff\x00",
    )
    return inserted(data, random.choice(boundaries(data)), kinds[random.integers(len(kinds))])


def padded(data, random):
    """Padding before the end marker."""
    return inserted(
        data, data.rfind(b"\xff\xd9"), bytes((int(random.choice([0, 0x20, 0xFF])),)) * int(random.integers(1, 40))
    )


def without_end(data, random):
    return data[: data.rfind(b"\xff\xd9") + int(random.integers(0, 2))]


def trailing(data, random):
    return data + (b"\xff\xd8\xff\xe0" if random.integers(2) else b"") + random.bytes(int(random.integers(1, 60)))


def application(data, random):
    """JFIF and Adobe segments of any length and transform; later ones come behind those of the file."""
    jfif = b"JFIF\0\1\1\0\0\1\0\1\0\0\0"[: int(random.integers(5, 16))]
    adobe = (b"Adobe\0\x64\0\0\0\0" + bytes((int(random.integers(0, 4)),)) + b"\0")[: int(random.integers(5, 14))]
    exif = b"Exif\0\0" * int(random.integers(1, 3)) + b"II*\0\x08\0\0\0\0\0\0\0\0\0"
    new = [segment(0xE0, jfif), segment(0xEE, adobe), segment(0xE1, exif)]
    chosen = b"".join(part for part in new if random.integers(2))
    data = inserted(data, int(random.choice([2, boundaries(data)[1]])), chosen)
    if random.integers(2):  # without the file's own JFIF
        first = next((part for part in segments(data) if part.marker == 0xE0), None)
        data = data[: first.at] + data[first.stop :] if first else data
    return data


def changed(data, random, markers):
    """One byte of one segment of these markers, or its length, is another."""
    found = [part for part in segments(data) if part.marker in markers]
    if not found:
        return data
    part, out = found[random.integers(len(found))], bytearray(data)
    at = int(random.integers(part.at + 1, min(part.stop, part.start + 24)))
    out[at] = int(random.choice([0, 1, 2, 3, 0x10, 0x11, 0x12, 0x21, 0x22, 0x52, 0xFF, int(random.integers(256))]))
    return bytes(out)


def repeated(data, random):
    """A segment twice."""
    found = [part for part in segments(data) if part.stop > part.start]
    part = found[random.integers(len(found))]
    return inserted(data, part.at, data[part.at : part.stop])


def restart_interval(data, random):
    body = (b"\0\0", b"\0\1", b"\0\x07", b"\0", b"\0\0\0")[random.integers(5)]
    return inserted(data, boundaries(data)[1], segment(0xDD, body))


def bytes_changed(data, random):
    out = bytearray(data)
    for at in random.integers(2, len(out), int(random.integers(1, 4))):
        out[at] = int(random.integers(256))
    return bytes(out)


def cut(data, random):
    return data[: int(random.integers(len(data) // 2, len(data)))] + (b"\xff\xd9" if random.integers(2) else b"")


MUTATIONS = {
    "fill": fill,
    "fill before restarts": fill_before_restarts,
    "stray": stray,
    "padded": padded,
    "without end": without_end,
    "trailing": trailing,
    "application": application,
    "frame": lambda data, random: changed(data, random, (0xC0, 0xC1, 0xC2)),
    "scan": lambda data, random: changed(data, random, (0xDA,)),
    "tables": lambda data, random: changed(data, random, (0xDB, 0xC4)),
    "other kind": lambda data, random: data.replace(b"\xff\xc0", bytes((0xFF, 0xC0 + int(random.integers(16)))), 1),
    "repeated": repeated,
    "restart interval": restart_interval,
    "bytes changed": bytes_changed,
    "cut": cut,
}
HARMLESS = ("fill", "fill before restarts", "trailing", "padded", "without end")
"""These change no pixel."""


def wide_quantizers(data):
    """The same quantizers, as numbers of 16 bits."""
    out = data
    for part in segments(data):
        if part.marker == 0xDB and part.stop - part.start == 65:
            table = data[part.start : part.stop]
            wide = bytes((0x10 | table[0],)) + b"".join(bytes((0, value)) for value in table[1:])
            out = out.replace(data[part.at : part.stop], segment(0xDB, wide))
    return out


def pillows(data):
    """What Pillow makes of a file, (H, W, 3); None where it refuses it."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
