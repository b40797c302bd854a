"""Image files to pixels and back, without losing depth, alpha, orientation, colour profile, EXIF, XMP or resolution.

Pillow reads and writes 8 bits a channel; 16-bit PNG goes through imagecodecs, TIFF with 16 bits through tifffile.
"""

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from model import exif, metadata, png
from model.alpha import has_alpha
from model.files import write_atomically
from model.metadata import EXIF_PREFIX, Metadata

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError),
    *(struct.error, zlib.error),
    RuntimeError,  # imagecodecs'
    MemoryError,  # a damaged header may name any size
)
"""What decoders raise where a file is damaged."""
LARGEST_PX = 2**30
"""Of a picture that is read. A damaged header may name more, and a small file may hold more than any memory."""
_LIMIT = threading.RLock()
BIG_TIFF_BYTES = 2**31
"""From so many bytes of pixels on a TIFF file is written with 64-bit positions: those of 32 end at 4 GiB."""


@dataclass(frozen=True)
class Format:
    """What a kind of file can hold, and how Pillow is to write it."""

    name: str
    """Pillow's."""
    deep: bool = False
    """16 bits a channel."""
    alpha: bool = False
    """An alpha channel."""
    largest_side_px: int | None = None
    """Longest side, where there is a limit that can be met."""
    options: tuple[tuple[str, Any], ...] = ()
    """For Pillow's `save`."""
    lossy: bool = False
    """Whether a quality can be asked for."""


PNG, TIFF = Format("PNG", deep=True, alpha=True), Format("TIFF", deep=True, alpha=True)
JPEG = Format("JPEG", largest_side_px=65500, options=(("quality", 95), ("subsampling", 0)), lossy=True)
FORMATS: dict[str, Format] = {
    ".png": PNG,
    ".tif": TIFF,
    ".tiff": TIFF,
    ".webp": Format("WEBP", alpha=True, largest_side_px=16383, options=(("lossless", True),), lossy=True),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".bmp": Format("BMP"),
    **dict.fromkeys((".jfif", ".jpe", ".jif", ".jfi", ".mpo"), JPEG),
    ".apng": PNG,
}
"""By the ending of the file's name, in lower case."""
PARSERS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Pillow's names of the formats that are read; no other parser is ever asked."""


@dataclass(frozen=True)
class Picture:
    """Pixels the right way up, and the colour profile that they are meant in."""

    pixels: NDArray[Any]
    """(H, W, C), uint8 or uint16; C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha)."""
    profile: bytes | None = None
    """ICC profile."""
    metadata: Metadata = field(default_factory=Metadata)
    """What else the file says; sizes in it are corrected when it is written."""
    num_pictures: int = 1
    """In the file that it was read from, of which it is the first."""


@dataclass(frozen=True)
class Outline:
    """What a file's header says, without its pixels."""

    size: tuple[int, int]
    """(height, width) as stored, px; an orientation may exchange them."""
    deep: bool
    """16 bits a channel."""
    alpha: bool


def read_picture(path: str | Path, prepare: Callable[[bytes], bytes] = bytes) -> Picture:
    """The picture in a file, turned as its EXIF orientation says; palettes, CMYK and the like become RGB.

    Of an animation, or a file of several pages, the first one. `prepare` is given the file's bytes, and what it gives
    back is decoded. ValueError, naming the file, where it is missing, broken, of none of `PARSERS`, has float pixels or
    more than `LARGEST_PX`, and for a ValueError of `prepare`.
    """
    with _naming(path):
        data = prepare(Path(path).read_bytes())
        deep_tiff = _deep_tiff(data) if data[:4] in TIFF_SIGNATURES else None
        with _own_limit():
            return deep_tiff or _picture(data)


def read_outline(path: str | Path) -> Outline:
    """What the header of an image file says. ValueError, naming the file, where it is missing or broken there."""
    with _naming(path), open(path, "rb") as file, _own_limit():
        start = file.read(len(png.SIGNATURE))
        file.seek(0)
        if start == png.SIGNATURE:
            height, width, bits, alpha = png.outline(file)
            return Outline((height, width), bits == 16, alpha)
        if start[:4] in TIFF_SIGNATURES:
            with tifffile.TiffFile(file) as tiff:
                page = tiff.pages.first
                if page.dtype is not None and page.dtype.itemsize > 1:
                    return Outline((page.imagelength, page.imagewidth), True, has_alpha(page.samplesperpixel))
            file.seek(0)
        with Image.open(file, formats=PARSERS) as image:
            return Outline((image.height, image.width), False, _is_transparent(image))


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """ValueError that names the file for whatever decoders raise."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read: it is no image, or of a kind that is not known here") from error
    except BROKEN as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason or type(error).__name__}") from error


@contextmanager
def _own_limit() -> Iterator[None]:
    """Without Pillow's limit, 179 Mpx, which cameras reach; one thread at a time, since the limit is the process's."""
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _refuse_larger(height: int, width: int) -> None:
    if height * width > LARGEST_PX:
        raise ValueError(f"it has {width} x {height} px, of at most {LARGEST_PX} that are read: cut it into parts")


def _picture(data: bytes) -> Picture:
    """A picture in any file but a TIFF of 16 bits."""
    parts = png.take_apart(data) if data.startswith(png.SIGNATURE) else None
    plain = parts.pixels if parts else data
    with Image.open(io.BytesIO(plain), formats=PARSERS) as image:
        _refuse_larger(image.height, image.width)
        num_pictures = _num_pictures(image)
        about, orientation = metadata.of_image(image, data, parts)
        profile = parts.profile if parts else image.info.get("icc_profile")
        pixels = _deep_pixels(plain, image)
        if pixels is None:
            converted = _cmyk_to_srgb(image)
            pixels = _eight_bit_pixels(converted)
            profile = converted.info.get("icc_profile") if converted is not image else profile
            orientation = 1 if image.format == "TIFF" else orientation  # Pillow turns those by itself
        picture = _with_fitting_profile(_turned(pixels, orientation), profile, about)
    return replace(picture, num_pictures=num_pictures)


def _num_pictures(image: Image.Image) -> int:
    """How many pictures a file holds; the previews that a camera adds to its JPEG do not count, nor damaged pages."""
    try:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except BROKEN:
        return 1


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    """A CMYK image in sRGB, as its profile says; as it is where it has none that can be used, and other images."""
    profile = image.info.get("icc_profile")
    if image.mode != "CMYK" or not profile:
        return image
    try:
        ours, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, ours, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    assert converted is not None
    return converted


def _with_fitting_profile(pixels: NDArray[Any], profile: bytes | None, about: Metadata) -> Picture:
    """A picture; a profile of another colour space than its pixels are in (the file's were converted) is dropped."""
    colour_space = b"GRAY" if pixels.shape[2] < 3 else b"RGB "
    return Picture(pixels, profile if profile and profile[16:20] == colour_space else None, about)


def _deep_pixels(data: bytes, image: Image.Image) -> NDArray[Any] | None:
    """Pixels (H, W, C) uint16 of a file with 16 bits a channel, as stored; None for 8 bits."""
    if data.startswith(png.SIGNATURE):
        return np.atleast_3d(imagecodecs.png_decode(data)) if data[24] == 16 else None
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range; convert it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return None
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; convert it to 16")
    return pixels.astype(np.uint16)[:, :, None]


def _deep_tiff(data: bytes) -> Picture | None:
    """The picture in a TIFF file of 16 bits a channel, some of which Pillow cannot even open; None for 8 bits."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        if page.dtype is None or page.dtype.itemsize == 1:
            return None
        if page.dtype != np.uint16:
            raise ValueError(f"its pixels are {page.dtype}; convert it to 8 or 16 bits")
        _refuse_larger(page.imagelength, page.imagewidth)
        pixels = page.asarray()
        profile = page.iccprofile
        num_pictures = len(tiff.pages)
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, 2)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        pixels = 65535 - pixels
    elif page.photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB):
        raise ValueError("16-bit pixels are known here as gray or RGB only; convert it to RGB")
    pixels = np.atleast_3d(pixels).astype(np.uint16, copy=False)
    if has_alpha(pixels.shape[2]) and page.extrasamples == (tifffile.EXTRASAMPLE.ASSOCALPHA,):
        pixels = _not_multiplied(pixels)
    about, orientation = metadata.of_tiff(data)
    picture = _with_fitting_profile(_turned(pixels, orientation), profile, about)
    return replace(picture, num_pictures=num_pictures)


def _not_multiplied(pixels: NDArray[Any]) -> NDArray[Any]:
    """Colours that a file has multiplied by alpha (H, W, C uint16) as they are without; black where alpha is 0."""
    alpha = pixels[..., -1:].astype(np.float64)
    colours = np.divide(pixels[..., :-1] * 65535.0, alpha, out=np.zeros(pixels[..., :-1].shape), where=alpha > 0)
    return np.concatenate([colours.round().clip(0, 65535).astype(np.uint16), pixels[..., -1:]], axis=2)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def _eight_bit_pixels(image: Image.Image) -> NDArray[Any]:
    transparent = _is_transparent(image)
    gray = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if transparent else "L") if gray else ("RGBA" if transparent else "RGB")
    # Pillow turns a transparent gray level into alpha only on the way through RGBA.
    through = "RGBA" if mode == "LA" and image.mode not in ("LA", "La") else mode
    return np.atleast_3d(np.asarray(image.convert(through).convert(mode)))


def _turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Stored pixels the right way up; orientations 1..8 as in EXIF (5..8 exchange rows and columns)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def check_target(path: str | Path, like: Picture | None = None, scale: int = 1) -> None:
    """ValueError where a file's ending is unknown, or cannot hold what the picture has, at `scale` times its size."""
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: choose an ending among {', '.join(FORMATS)}")
    if like is not None:
        refuse_what_it_cannot_hold(path, like.pixels.dtype == np.uint16, has_alpha(like.pixels.shape[2]))
        height, width = (side * scale for side in like.pixels.shape[:2])
        refuse_size(path, height, width)


def refuse_size(path: str | Path, height: int, width: int) -> None:
    """ValueError where the format of a file's known ending cannot hold so many px."""
    kind = FORMATS[Path(path).suffix.lower()]
    if kind.largest_side_px and max(height, width) > kind.largest_side_px:
        raise ValueError(
            f"{path} cannot hold {width} x {height} px, at most {kind.largest_side_px} a side: choose .png or .tif"
        )


def refuse_what_it_cannot_hold(path: str | Path, deep: bool, alpha: bool) -> None:
    """ValueError where the format of a file's known ending cannot hold 16 bits a channel, or an alpha channel."""
    kind = FORMATS[Path(path).suffix.lower()]
    if deep and not kind.deep:
        raise ValueError(f"{path} cannot hold 16 bits a channel: choose .png or .tif")
    if alpha and not kind.alpha:
        raise ValueError(f"{path} cannot hold an alpha channel: choose .png, .webp or .tif")


def write_picture(path: str | Path, picture: Picture, quality: int | None = None) -> tuple[str, ...]:
    """Write a file in the format that its ending names; it appears only when complete.

    JPEG with quality 95 and full colour resolution, everything else without loss; with a `quality` (1 to 100) WebP
    as well as JPEG loses as much. Returns what could not be kept, in words. ValueError as `check_target`, WriteError
    where the system refuses.
    """
    path = Path(path)
    check_target(path, picture)
    data, lost = encoded(picture, path.suffix.lower(), quality)
    write_atomically(path, lambda part: _write(part, data))
    return lost


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def encoded(picture: Picture, suffix: str, quality: int | None = None) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of an image file, and what could not be kept."""
    pixels = picture.pixels.squeeze(2) if picture.pixels.shape[2] == 1 else picture.pixels
    kind = FORMATS[suffix]
    about = picture.metadata.sized(*picture.pixels.shape[:2]).fitting(kind.name)
    lost = about.lost + (("colour profile",) if picture.profile and kind.name == "BMP" else ())
    if kind.name == "TIFF":
        return _tiff(pixels, picture, about), lost
    if kind.name == "PNG":
        plain = bytes(imagecodecs.png_encode(pixels)) if pixels.dtype == np.uint16 else _by_pillow(pixels, kind, {})
        tags = about.exif.to_bytes() if about.exif else None
        return png.put_together(plain, tags, about.xmp, picture.profile, about.dpi), lost
    options: dict[str, Any] = {"dpi": about.dpi} if about.dpi else {}
    if quality is not None and kind.lossy:
        options |= {"quality": quality, "lossless": False}
    if about.exif:
        options["exif"] = EXIF_PREFIX + about.exif.to_bytes()
    if about.xmp:
        options["xmp"] = about.xmp
    if picture.profile and kind.name != "BMP":
        options["icc_profile"] = picture.profile
    return _by_pillow(pixels, kind, options), lost


def _by_pillow(pixels: NDArray[Any], kind: Format, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind.name, **dict(kind.options) | options)
    return file.getvalue()


def _tiff(pixels: NDArray[Any], picture: Picture, about: Metadata) -> bytes:
    file = io.BytesIO()
    channels = picture.pixels.shape[2]
    tifffile.imwrite(
        file,
        pixels,
        photometric="rgb" if channels > 2 else "minisblack",
        extrasamples=["unassalpha"] if has_alpha(channels) else None,
        planarconfig="contig" if channels > 1 else None,
        compression="zlib",
        bigtiff=pixels.nbytes >= BIG_TIFF_BYTES,
        byteorder=about.exif.order if about.exif else None,
        resolution=about.dpi,
        iccprofile=picture.profile,
        software=False,
        metadata=None,
    )
    return exif.add_to_tiff(file.getvalue(), about.exif, about.xmp)
