"""A PNG file without the chunks that say nothing about pixels: Pillow refuses whole files for their size."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"))


def without_text(data: bytes) -> bytes:
    """The file without text, colour profile and EXIF data; any other file as it is."""
    if not data.startswith(_SIGNATURE):
        return data
    kept, begin, position = [], 0, len(_SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        if data[position + 4 : position + 8] in _TEXT and end <= len(data):
            kept.append(data[begin:position])
            begin = end
        position = end
    return b"".join((*kept, data[begin:])) if kept else data
