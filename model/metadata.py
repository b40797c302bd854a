"""What an image file says beside its pixels: EXIF with GPS, XMP, dots per inch; kept where the new file's kind can."""

import re
from dataclasses import dataclass, replace

from PIL import Image

from model import exif as tags
from model.exif import Exif
from model.png import Parts

EXIF_PREFIX = b"Exif\0\0"
LARGEST_EXIF_BYTES, LARGEST_XMP_BYTES = 65533, 65504
"""Of a JPEG's segments: EXIF with its prefix, XMP without."""
LARGEST_DPI = 65535
"""What JPEG can say; a damaged or careless file says more, and means nothing by it."""
ORIENTED = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)([1-8])")
SIZED = re.compile(rb"((?:tiff:Image|exif:Pixel)(Width|Length|XDimension|YDimension)(?:=[\"']|>)\s*)\d+")
THUMBNAILS = re.compile(rb"<(xmp|xap):Thumbnails\b.*?</\1:Thumbnails>", re.DOTALL)


@dataclass(frozen=True)
class Metadata:
    """What is kept of a picture, which is the right way up."""

    exif: Exif | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    """Dots per inch across and down. They stay what they are: a larger picture is printed larger."""
    lost: tuple[str, ...] = ()
    """What the file had and cannot be kept, for reasons of its own."""

    def sized(self, height: int, width: int) -> "Metadata":
        """With this size in px wherever a size is said."""
        exif = self.exif and self.exif.sized(height, width)
        sides = {b"Width": width, b"XDimension": width, b"Length": height, b"YDimension": height}
        xmp = self.xmp and SIZED.sub(lambda found: found[1] + b"%d" % sides[found[2]], self.xmp)
        return replace(self, exif=exif, xmp=xmp)

    def fitting(self, kind: str) -> "Metadata":
        """What a file of this kind (Pillow's name) can hold; the rest is in `lost`."""
        exif, xmp, lost = self.exif, self.xmp, list(self.lost)
        if kind == "BMP":
            lost += ["EXIF"] * (exif is not None) + ["XMP"] * (xmp is not None)
            exif = xmp = None
        if kind == "WEBP" and self.dpi:
            exif = (exif or Exif()).with_dpi(self.dpi)
        if kind == "JPEG" and exif and _is_too_long(exif):
            exif, what = exif.without_maker_note(), "the camera maker's note in EXIF"
            if _is_too_long(exif):
                exif, what = None, "EXIF"
            lost.append(f"{what} (JPEG holds {LARGEST_EXIF_BYTES} bytes of EXIF)")
        if kind == "JPEG" and xmp and len(xmp) > LARGEST_XMP_BYTES:
            xmp = None
            lost.append(f"XMP (JPEG holds {LARGEST_XMP_BYTES} bytes of it)")
        return Metadata(exif, xmp, self.dpi, tuple(lost))


def _is_too_long(exif: Exif) -> bool:
    return len(EXIF_PREFIX + exif.to_bytes()) > LARGEST_EXIF_BYTES


def of_image(image: Image.Image, data: bytes, png: Parts | None) -> tuple[Metadata, int]:
    """What a file says that Pillow has opened, and the orientation (1 to 8) that its stored pixels are to be turned by.

    `png`: of a PNG file, its parts.
    """
    if png:
        return upright(png.exif, png.xmp, png.dpi, png.unreadable)
    if image.format == "TIFF":
        return of_tiff(data)
    dpi = image.info.get("dpi")
    if image.format in ("JPEG", "MPO") and image.info.get("jfif_unit") not in (1, 2):
        dpi = None  # Pillow's guess from EXIF
    return upright(image.info.get("exif"), image.info.get("xmp"), dpi)


def of_tiff(data: bytes) -> tuple[Metadata, int]:
    """What a TIFF file says, and the orientation of its stored pixels."""
    try:
        exif, xmp = tags.parse_tiff(data)
    except ValueError:
        return Metadata(lost=("EXIF (damaged)",)), 1
    return _upright(exif, xmp, None, ())


def upright(
    exif: bytes | None, xmp: bytes | None, dpi: tuple[float, float] | None, lost: tuple[str, ...] = ()
) -> tuple[Metadata, int]:
    """As of the picture turned the right way up, and the orientation (1 to 8) that it is to be turned by."""
    try:
        parsed = tags.parse(exif) if exif else None
    except ValueError:
        parsed, lost = None, (*lost, "EXIF (damaged)")
    return _upright(parsed, xmp, dpi, lost)


def _upright(
    exif: Exif | None, xmp: bytes | None, dpi: tuple[float, float] | None, lost: tuple[str, ...]
) -> tuple[Metadata, int]:
    said = ORIENTED.search(xmp) if xmp else None
    has_own = exif is not None and tags.ORIENTATION in exif.main
    turns = exif.orientation if exif and has_own else int(said[2]) if said else 1
    if exif:
        dpi = dpi or exif.dpi
        exif = exif.upright(turns)
    if dpi and not all(0 < value <= LARGEST_DPI for value in dpi):
        dpi = None
    if dpi and turns > 4:
        dpi = dpi[1], dpi[0]
    if xmp:
        xmp = ORIENTED.sub(rb"\g<1>1", THUMBNAILS.sub(b"", xmp))
    return Metadata(None if exif is None or exif.is_empty else exif, xmp or None, dpi, lost), turns
