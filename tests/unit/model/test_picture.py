"""Image files in and out: depth, alpha, orientation and colour profile."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

import model.picture
from model.picture import FORMATS, Picture, check_target, read_picture, write_picture

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GRAY_PROFILE = PROFILE[:16] + b"GRAY" + PROFILE[20:]


def pixels(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (7, 9, channels), dtype=dtype)


HELD = [
    (suffix, channels, dtype)
    for suffix, kind in FORMATS.items()
    for channels in ((1, 2, 3, 4) if kind.alpha else (1, 3))
    for dtype in ((np.uint8, np.uint16) if kind.deep else (np.uint8,))
    if not kind.options
]


@pytest.mark.parametrize(("suffix", "channels", "dtype"), HELD)
def test_what_is_written_is_read_again(suffix: str, channels: int, dtype: Any, tmp_path: Path) -> None:
    profile = PROFILE if channels > 2 else GRAY_PROFILE
    written = Picture(pixels(channels, dtype), profile if suffix != ".bmp" else None)
    write_picture(tmp_path / f"a{suffix}", written)
    read = read_picture(tmp_path / f"a{suffix}")
    assert read.pixels.dtype == dtype
    assert np.array_equal(read.pixels, written.pixels)
    assert read.profile == written.profile
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_webp_is_lossless_and_keeps_alpha(tmp_path: Path) -> None:
    levels = pixels(4)
    levels[..., 3] |= 1  # wholly transparent pixels lose their colour
    write_picture(tmp_path / "a.webp", Picture(levels, PROFILE))
    assert np.array_equal(read_picture(tmp_path / "a.webp").pixels, levels)


def test_jpeg_is_of_high_quality(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (32, 32, 3)).copy()
    write_picture(tmp_path / "a.JPG", Picture(smooth, PROFILE))
    read = read_picture(tmp_path / "a.JPG")
    assert np.abs(read.pixels.astype(int) - smooth).max() <= 6
    assert read.profile == PROFILE


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_orientation_is_applied(suffix: str, orientation: int, deep: bool, tmp_path: Path) -> None:
    """8 bits as Pillow turns them; 16 bits must turn the same way."""
    levels = np.broadcast_to(np.arange(16, dtype=np.uint8).reshape(2, 8)[:, :, None] * 16, (2, 8, 3)).copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(levels)
    expected = image.copy()
    expected.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(expected))
    path = tmp_path / f"a{suffix}"
    if not deep:
        image.save(path, exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
        assert np.abs(read_picture(path).pixels.astype(int) - expected).max() <= (8 if suffix == ".jpg" else 0)
    elif suffix == ".tif":
        tifffile.imwrite(
            path, levels.astype(np.uint16) * 257, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]
        )
        assert np.array_equal(read_picture(path).pixels, expected.astype(np.uint16) * 257)
    elif suffix == ".png":
        path.write_bytes(with_exif(imagecodecs.png_encode(levels.astype(np.uint16) * 257), exif))
        assert np.array_equal(read_picture(path).pixels, expected.astype(np.uint16) * 257)


def with_exif(png: bytes, exif: Image.Exif) -> bytes:
    """A PNG with the eXIf chunk that Pillow writes for it."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG", exif=exif)
    donor = file.getvalue()
    at = donor.index(b"eXIf") - 4
    length = int.from_bytes(donor[at : at + 4], "big") + 12
    return png[:33] + donor[at : at + length] + png[33:]


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("P", 3), ("CMYK", 3), ("YCbCr", 3), ("LA", 2), ("PA", 4), ("I;16", 1)]
)
def test_other_kinds_become_gray_or_rgb(mode: str, channels: int, tmp_path: Path) -> None:
    image = Image.fromarray(pixels(3)).convert("L" if mode == "I;16" else mode if mode != "PA" else "P")
    path = tmp_path / ("a.png" if mode in ("1", "P", "PA", "LA", "I;16") else "a.tif")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(path, **({"transparency": 0} if mode == "PA" else {}))
    read = read_picture(path)
    assert read.pixels.shape == (7, 9, channels)
    assert read.pixels.dtype == (np.uint16 if mode == "I;16" else np.uint8)


def cmyk_profile() -> bytes:
    """Black ink alone counts: lightness falls in a straight line from 100 to 0. ICC version 2, one 8-bit table."""
    lightness = [255 * (1 - corner % 2) for corner in range(16)]  # black is the last ink, so it changes fastest
    colours = b"".join(bytes([level, 128, 128]) for level in lightness)
    identity = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    ramp = bytes(range(256))
    table = b"mft1" + bytes([0, 0, 0, 0, 4, 3, 2, 0]) + identity + 4 * ramp + colours + 3 * ramp
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    space = struct.pack(">I4s4s4s4s", 0x02100000, b"prtr", b"CMYK", b"Lab ", b"")
    white = struct.pack(">3i", 63190, 65536, 54061)
    header = (bytes(8) + space + bytes(8)).ljust(36, b"\0") + b"acsp" + bytes(28) + white
    return struct.pack(">I", 144 + len(table)) + header[4:].ljust(124, b"\0") + tags + table


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_becomes_srgb_as_its_profile_says(suffix: str, tmp_path: Path) -> None:
    """Half black ink is a lightness of 50, which is 119 in sRGB; without a profile it would be 127."""
    image = Image.fromarray(np.full((16, 8, 4), (200, 100, 0, 127), np.uint8), "CMYK")
    image.save(tmp_path / f"a{suffix}", icc_profile=cmyk_profile())
    read = read_picture(tmp_path / f"a{suffix}")
    assert read.pixels.shape == (16, 8, 3)
    assert np.abs(read.pixels.astype(int) - 119).max() <= 2
    assert read.profile is not None
    assert read.profile[16:20] == b"RGB "


def test_profiles_of_another_colour_space_are_dropped(tmp_path: Path) -> None:
    unusable = b"\0\0\1\0lcms\2\x10\0\0prtrCMYKLab " + bytes(200)
    Image.new("CMYK", (9, 7)).save(tmp_path / "cmyk.jpg", icc_profile=unusable)
    Image.new("L", (9, 7)).save(tmp_path / "gray.png", icc_profile=PROFILE)
    tifffile.imwrite(tmp_path / "gray.tif", pixels(1, np.uint16)[..., 0], iccprofile=PROFILE)
    for name in ("cmyk.jpg", "gray.png", "gray.tif"):
        assert read_picture(tmp_path / name).profile is None


def test_a_transparent_gray_level_becomes_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 9], [9, 255]], np.uint8)).save(tmp_path / "a.png", transparency=9)
    read = read_picture(tmp_path / "a.png").pixels
    assert read[..., 1].tolist() == [[255, 0], [0, 255]]
    assert read[0, 0, 0] == 0


def test_tiff_of_separate_planes_and_inverted_gray(tmp_path: Path) -> None:
    levels = pixels(3, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(levels, 2, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, levels)
    tifffile.imwrite(tmp_path / "b.tif", levels[..., 0], photometric="miniswhite")
    assert np.array_equal(read_picture(tmp_path / "b.tif").pixels[..., 0], 65535 - levels[..., 0])


def test_tiff_of_16_bits_with_colours_multiplied_by_alpha(tmp_path: Path) -> None:
    levels = pixels(4, np.uint16)
    levels[0, 0, 3], levels[..., 3] = 0, np.where(levels[..., 3] < 30_000, 0, levels[..., 3])
    multiplied = levels.copy()
    multiplied[..., :3] = (levels[..., :3] * (levels[..., 3:] / 65535)).round()
    tifffile.imwrite(tmp_path / "a.tif", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    read = read_picture(tmp_path / "a.tif").pixels
    assert np.array_equal(read[..., 3], levels[..., 3])
    seen = levels[..., 3] > 0
    assert np.abs(read[seen].astype(int) - levels[seen]).max() <= 2


def test_compressed_tiff(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(3, np.uint16), photometric="rgb", compression="lzw", predictor=True)
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, pixels(3, np.uint16))


def broken(name: str, folder: Path) -> Path:
    path = folder / name
    if name == "float.tif":
        tifffile.imwrite(path, pixels(1)[..., 0].astype(np.float32))
    elif name == "wide.tif":
        tifffile.imwrite(path, pixels(1)[..., 0].astype(np.uint32))
    elif name == "cmyk.tif":
        tifffile.imwrite(path, pixels(4, np.uint16), photometric="separated")
    elif name == "moving.gif":
        frames = [Image.fromarray(pixels(3)), Image.fromarray(255 - pixels(3))]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif name == "float.pfm":
        Image.fromarray(pixels(1)[..., 0].astype(np.float32)).save(path)
    elif name == "wide.pgm":
        path.write_bytes(b"P5 2 1 4294967295\n" + b"\xff" * 8)
    elif name.startswith("cut"):
        levels = pixels(3, np.uint16 if "deep" in name else np.uint8)
        write_picture(path, Picture(levels))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif name == "postscript.jpg":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n")
    elif name != "missing.png":
        path.write_bytes(b"" if name == "empty.png" else b"no image")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "No such file"),
        ("empty.png", "it is no image"),
        ("text.jpg", "it is no image"),
        ("cut.png", "cannot be read"),
        ("cut.jpg", "(?i)truncated"),
        ("cut-deep.png", "cannot be read"),
        ("cut-deep.tif", "cannot be read"),
        ("float.tif", "float32; convert it to 8 or 16 bits"),
        ("wide.tif", "uint32; convert it to 8 or 16 bits"),
        ("cmyk.tif", "gray or RGB only; convert it to RGB"),
        ("float.pfm", "it is no image, or of a kind that is not known here"),
        ("wide.pgm", "cannot be read"),
        ("moving.gif", "of a kind that is not known here"),
        ("postscript.jpg", "of a kind that is not known here"),
    ],
)
def test_files_that_cannot_be_read_are_named(name: str, message: str, tmp_path: Path) -> None:
    path = broken(name, tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        read_picture(path)
    assert str(raised.value).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("name", ["moving.png", "moving.webp", "pages.tif", "deep-pages.tif"])
def test_of_several_pictures_the_first_is_taken_and_they_are_counted(name: str, tmp_path: Path) -> None:
    first = pixels(3, np.uint16 if "deep" in name else np.uint8)
    if name.endswith("tif"):
        tifffile.imwrite(tmp_path / name, np.stack([first, first // 2, first // 3]), photometric="rgb")
    else:
        frames = [Image.fromarray(first // part) for part in (1, 2, 3)]
        lossless = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    picture = read_picture(tmp_path / name)
    assert picture.num_pictures == 3
    assert np.array_equal(picture.pixels[..., :3], first)


def test_the_bytes_can_be_looked_at_first(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", Picture(pixels(3)))

    def refuse(data: bytes) -> bytes:
        raise ValueError("it is not liked")

    with pytest.raises(ValueError, match=r"a.png cannot be read: it is not liked"):
        read_picture(tmp_path / "a.png", refuse)
    assert np.array_equal(read_picture(tmp_path / "a.png", lambda data: data).pixels, pixels(3))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_no_damaged_byte_is_more_than_a_named_error(compression: str | None, tmp_path: Path) -> None:
    """Single bytes of a TIFF's tags made tifffile raise TypeError, ZeroDivisionError, struct.error and others."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels(3, np.uint16), photometric="rgb", compression=compression)
    sound = path.read_bytes()
    refusals = []
    for position in range(4, 300):
        for value in (0, 255):
            path.write_bytes(sound[:position] + bytes([value]) + sound[position + 1 :])
            try:
                read_picture(path)
            except ValueError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert all(refusal.startswith(f"{path} cannot be read: ") for refusal in refusals)


@pytest.mark.parametrize("error", [MemoryError(), zlib.error("bad data"), IndexError("no tag"), struct.error("short")])
def test_what_decoders_raise_is_named(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "a.tif", Picture(pixels(3, np.uint16)))
    monkeypatch.setattr(tifffile.TiffPage, "asarray", Mock(side_effect=error))
    with pytest.raises(ValueError, match=rf"a\.tif cannot be read: {str(error) or 'MemoryError'}$"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("name", "channels", "dtype", "message"),
    [
        ("a.gif", 3, np.uint8, r"choose an ending among \.png"),
        ("a.jpg", 4, np.uint8, "cannot hold an alpha channel"),
        ("a.bmp", 2, np.uint8, "cannot hold an alpha channel"),
        ("a.webp", 3, np.uint16, "cannot hold 16 bits"),
    ],
)
def test_files_that_cannot_hold_the_picture(name: str, channels: int, dtype: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_picture(tmp_path / name, Picture(pixels(channels, dtype)))
    assert not list(tmp_path.iterdir())
    if name == "a.gif":
        with pytest.raises(ValueError, match=message):
            check_target(name)


@pytest.mark.parametrize(("name", "longest"), [("a.webp", 16383), ("a.jpg", 65500)])
def test_sides_that_a_format_cannot_hold_are_known_before(name: str, longest: int, tmp_path: Path) -> None:
    write_picture(tmp_path / name, Picture(np.zeros((1, longest, 1), np.uint8)))
    for picture, scale in (
        (Picture(np.zeros((1, longest + 1, 1), np.uint8)), 1),
        (Picture(np.zeros((longest // 4 + 1, 2, 1), np.uint8)), 4),
    ):
        height, width = (side * scale for side in picture.pixels.shape[:2])
        with pytest.raises(ValueError, match=rf"cannot hold {width} x {height} px, .*: choose \.png or \.tif"):
            check_target(name, picture, scale)
    check_target("a.png", picture, scale)


def test_large_pictures_are_read_without_pillows_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Pillow's limit were 9 px: twice as many are an error there, more than that many a warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    write_picture(tmp_path / "a.png", Picture(pixels(3)))
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, pixels(3))
    assert Image.MAX_IMAGE_PIXELS == 9


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint8), ("a.png", np.uint16), ("a.tif", np.uint16)])
def test_too_many_pixels_have_a_remedy(name: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.picture, "LARGEST_PX", 62)
    write_picture(tmp_path / name, Picture(pixels(3, dtype)))
    with pytest.raises(ValueError, match=rf"{name} cannot be read: it has 9 x 7 px, .*: cut it into parts"):
        read_picture(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_files_of_many_bytes_have_wide_positions(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.picture, "BIG_TIFF_BYTES", 9)
    write_picture(tmp_path / "a.tif", Picture(pixels(3, dtype)))
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, pixels(3, dtype))
