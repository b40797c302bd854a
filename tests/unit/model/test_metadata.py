"""EXIF, GPS, XMP and resolution from every format to every format, read back by Pillow and tifffile."""

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, TiffImagePlugin

import model.picture
from model import exif, png
from model.picture import Picture, read_picture, write_picture

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" exif:PixelXDimension="12" '
    b"xmp:Rating='4'><tiff:ImageLength>8</tiff:ImageLength><xmp:Thumbnails>AAAA</xmp:Thumbnails></rdf:Description>"
    b"</x:xmpmeta>"
)
DEEP, PLAIN = (".png", ".tif"), (".png", ".tif", ".jpg", ".webp")


def tags(orientation: int = 6, note_bytes: int = 50) -> Image.Exif:
    """Of a photograph of 12 x 8 px as it is stored."""
    made = Image.Exif()
    made[ExifTags.Base.Make], made[ExifTags.Base.Artist] = "Maker", "Müller"
    made[ExifTags.Base.Orientation] = orientation
    made[ExifTags.Base.XResolution], made[ExifTags.Base.YResolution] = 300.0, 150.0
    made[ExifTags.Base.ResolutionUnit] = 2
    made[ExifTags.Base.ImageWidth], made[ExifTags.Base.ImageLength] = 12, 8
    camera = made.get_ifd(ExifTags.IFD.Exif)
    camera[ExifTags.Base.ExifImageWidth], camera[ExifTags.Base.ExifImageHeight] = 12, 8
    camera[ExifTags.Base.FNumber] = TiffImagePlugin.IFDRational(28, 10)
    camera[ExifTags.Base.MakerNote] = bytes(range(50)) * (note_bytes // 50)
    gps = made.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef] = "N"
    gps[ExifTags.GPS.GPSLatitude] = (48.0, 51.0, 29.6)
    return made


def photograph(path: Path, deep: bool, order: str = "<", note_bytes: int = 50) -> None:
    """A file with all that is kept, 12 x 8 px as stored: JPEG and WebP by Pillow, TIFF by tifffile."""
    made = tags(note_bytes=note_bytes)
    made.endian = order
    levels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    pixels = levels.astype(np.uint16) * 257 if deep else levels
    if path.suffix == ".png":
        plain = bytes(imagecodecs.png_encode(pixels))
        path.write_bytes(png.put_together(plain, made.tobytes()[6:], XMP, None, (300, 150)))
    elif path.suffix == ".tif":
        path.write_bytes(tiff(pixels, order, exif.parse(made.tobytes())))
    else:
        Image.fromarray(levels).save(path, dpi=(300, 150), xmp=XMP, exif=made.tobytes())


def tiff(pixels: np.ndarray, order: Any, whole: exif.Exif) -> bytes:
    """The first directory's tags by tifffile, which knows no other directories."""
    extra = [(274, 3, 1, 6, True), (271, 2, 0, "Maker", True), (315, 2, 0, "Müller".encode(), True)]
    extra.append((700, 7, len(XMP), XMP, True))
    file = io.BytesIO()
    options: dict[str, Any] = {"resolution": (300, 150), "byteorder": order, "software": False, "metadata": None}
    tifffile.imwrite(file, pixels, photometric="rgb", extratags=extra, **options)
    return exif.add_to_tiff(file.getvalue(), exif.Exif(whole.order, {}, whole.camera, whole.gps), None)


def assert_kept(path: Path, height: int, width: int) -> None:
    """By Pillow: of a picture that was turned by 90 degrees, so that resolutions are exchanged."""
    if path.suffix == ".tif" and read_picture(path).pixels.dtype == np.uint16:
        found = Image.Exif()  # Pillow does not open RGB of 16 bits
        found.load_from_fp(io.BytesIO(path.read_bytes()))
        xmp, dpi = found[700], (found[282], found[283])
    else:
        with Image.open(path) as image:
            image.load()
            found, xmp, dpi = image.getexif(), image.info.get("xmp"), image.info.get("dpi")
            assert image.size == (width, height)
    assert found[ExifTags.Base.Make] == "Maker"
    assert found[ExifTags.Base.Artist].encode("latin-1", "surrogateescape") in (
        "Müller".encode(),
        b"M\xfcller",
        b"M?ller",
    )
    assert found.get(ExifTags.Base.Orientation, 1) == 1
    camera, gps = found.get_ifd(ExifTags.IFD.Exif), found.get_ifd(ExifTags.IFD.GPSInfo)
    assert camera[ExifTags.Base.FNumber] == Fraction(28, 10)
    assert camera[ExifTags.Base.MakerNote] == bytes(range(50))
    assert (camera[ExifTags.Base.ExifImageWidth], camera[ExifTags.Base.ExifImageHeight]) == (width, height)
    assert gps[ExifTags.GPS.GPSLatitudeRef] == "N"
    assert [float(part) for part in gps[ExifTags.GPS.GPSLatitude]] == pytest.approx([48, 51, 29.6])
    assert not found.get_ifd(ExifTags.IFD.IFD1)
    assert b'tiff:Orientation="1"' in xmp
    assert b"Rating='4'" in xmp
    assert b"<tiff:ImageLength>%d<" % height in xmp
    assert b'exif:PixelXDimension="%d"' % width in xmp
    assert b"Thumbnails" not in xmp
    assert dpi is None or np.allclose([float(value) for value in dpi], (150, 300), rtol=1e-3)
    assert (float(found[282]), float(found[283])) == pytest.approx((150, 300), rel=1e-3)
    assert found[296] == 2


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("target", PLAIN)
@pytest.mark.parametrize("source", PLAIN)
def test_all_is_kept_from_8_bits_to_8_bits(source: str, target: str, order: str, tmp_path: Path) -> None:
    photograph(tmp_path / f"a{source}", False, order)
    picture = read_picture(tmp_path / f"a{source}")
    assert picture.pixels.shape == (12, 8, 3)
    large = np.repeat(np.repeat(picture.pixels, 2, 0), 2, 1)
    assert write_picture(tmp_path / f"b{target}", Picture(large, picture.profile, picture.metadata)) == ()
    assert_kept(tmp_path / f"b{target}", 24, 16)
    again = read_picture(tmp_path / f"b{target}")
    assert again.pixels.shape == (24, 16, 3)
    assert again.metadata.dpi is not None
    assert np.allclose(again.metadata.dpi, (150, 300), rtol=1e-3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("target", DEEP)
@pytest.mark.parametrize("source", DEEP)
def test_all_is_kept_from_16_bits_to_16_bits(
    source: str, target: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph(tmp_path / f"a{source}", True, order)
    picture = read_picture(tmp_path / f"a{source}")
    assert (picture.pixels.dtype, picture.pixels.shape) == (np.uint16, (12, 8, 3))
    assert write_picture(tmp_path / f"b{target}", picture) == ()
    assert_kept(tmp_path / f"b{target}", 12, 8)
    assert np.array_equal(read_picture(tmp_path / f"b{target}").pixels, picture.pixels)
    monkeypatch.setattr(model.picture, "BIG_TIFF_BYTES", 9)
    write_picture(tmp_path / "big.tif", picture)
    again = read_picture(tmp_path / "big.tif")
    assert np.array_equal(again.pixels, picture.pixels)
    assert again.metadata.exif is not None
    assert again.metadata.exif.gps == picture.metadata.exif.gps
    assert again.metadata.xmp == picture.metadata.sized(12, 8).xmp


def test_what_a_format_cannot_hold_is_said(tmp_path: Path) -> None:
    photograph(tmp_path / "a.png", False, note_bytes=70_000)
    picture = read_picture(tmp_path / "a.png")
    assert write_picture(tmp_path / "b.bmp", picture) == ("EXIF", "XMP")
    assert Image.open(tmp_path / "b.bmp").info["dpi"] == pytest.approx((150, 300), rel=1e-2)
    (lost,) = write_picture(tmp_path / "b.jpg", picture)
    assert "camera maker's note in EXIF (JPEG holds 65533 bytes" in lost
    assert Image.open(tmp_path / "b.jpg").getexif()[ExifTags.Base.Make] == "Maker"
    long = Picture(picture.pixels, None, type(picture.metadata)(xmp=XMP * 300))
    assert write_picture(tmp_path / "c.jpg", long) == ("XMP (JPEG holds 65504 bytes of it)",)
    assert write_picture(tmp_path / "c.webp", long) == ()
    assert read_picture(tmp_path / "c.webp").metadata.xmp is not None


def test_a_resolution_alone_is_kept_everywhere(tmp_path: Path) -> None:
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png", dpi=(200, 200))
    for name in ("b.jpg", "b.tif", "b.webp", "b.bmp", "b.png"):
        write_picture(tmp_path / name, read_picture(tmp_path / "a.png"))
        dpi = read_picture(tmp_path / name).metadata.dpi
        assert dpi == pytest.approx((200, 200), rel=1e-3), name
    Image.new("RGB", (9, 7)).save(tmp_path / "none.jpg")
    Image.new("RGB", (9, 7)).save(tmp_path / "many.png", dpi=(1e6, 1e6))
    assert read_picture(tmp_path / "many.png").metadata.dpi is None, "no format's business"
    assert read_picture(tmp_path / "none.jpg").metadata.dpi is None


def test_an_orientation_that_only_xmp_says_turns_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", xmp=XMP)
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (12, 8, 3)


def test_notes_of_programs_about_sizes_are_dropped(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 9), np.uint16))  # tifffile describes the shape
    assert b"shape" in (tmp_path / "a.tif").read_bytes()
    write_picture(tmp_path / "b.tif", read_picture(tmp_path / "a.tif"))
    assert b"shape" not in (tmp_path / "b.tif").read_bytes()


def test_damaged_exif_costs_itself_alone(tmp_path: Path) -> None:
    for number, block in enumerate((b"II", b"nonsense", b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0\xff\xff")):
        Image.new("RGB", (9, 7)).save(tmp_path / f"{number}.webp", exif=block)
        picture = read_picture(tmp_path / f"{number}.webp")
        assert picture.pixels.shape == (7, 9, 3)
        assert write_picture(tmp_path / "b.png", picture) == ("EXIF (damaged)",)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damaged_byte_of_exif_is_more_than_a_named_error(data: st.DataObject) -> None:
    block = bytearray(tags().tobytes()[6:])
    for _ in range(data.draw(st.integers(1, 4))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = exif.parse(bytes(block))
    except ValueError:
        return
    again = exif.parse(found.sized(5, 6).upright(found.orientation).to_bytes())
    assert again.gps == found.gps
    assert isinstance(found.dpi, tuple | None)


def test_pointers_that_lead_back_make_no_loop_and_no_bomb() -> None:
    entry = struct.pack("<HHII", exif.CAMERA, 4, 1, 8)
    assert not exif.parse(b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)).main
    bomb = b"".join(struct.pack("<HHII", 0x9000 + number, 7, 60_000, 0) for number in range(5_000))
    with pytest.raises(ValueError, match="its values are more than the file"):
        exif.parse(b"II*\0\x08\0\0\0" + struct.pack("<H", 5_000) + bomb + bytes(4))
