"""Decoding: every mode to RGB by the stated rule, and reasons for what cannot be decoded."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import image as images
from data_prep import jpeg
from data_prep.image import Box, Picture, check, decode
from data_prep.image_files import FORMATS
from tests.unit.data_prep.odd_files import bad_files, good_files, photograph


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8))


def test_rgb_png_is_exact():
    np.testing.assert_array_equal(decode(encoded(RGB)), np.asarray(RGB))


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG")])
def test_other_modes_become_rgb(mode, form):
    pixels = decode(encoded(RGB.convert(mode), form))
    assert pixels.shape == (12, 10, 3)
    assert pixels.dtype == np.uint8


def test_alpha_is_dropped_not_blended():
    image = RGB.convert("RGBA")
    image.putalpha(7)
    np.testing.assert_array_equal(decode(encoded(image)), np.asarray(RGB))


def test_sixteen_bit_gray_is_scaled():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = decode(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 1, 128, 255])
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(encoded(RGB, "JPEG", exif=exif)).shape == (12, 10, 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(RGB, "JPEG")[:-200], encoded(RGB)[:200], encoded(Image.new("F", (4, 4)), "TIFF")],
    ids=["empty", "text", "cut JPEG", "cut PNG", "float TIFF"],
)
def test_what_cannot_be_decoded_says_why(data):
    with pytest.raises(ValueError, match=r"cannot be decoded: .+"):
        decode(data)


def chunk(kind, body):
    content = kind + body
    return struct.pack(">I", len(body)) + content + struct.pack(">I", zlib.crc32(content))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"tEXt", b"Comment\0" + b"a" * 3_000_000) * 40,
        chunk(b"zTXt", b"Comment\0\7" + b"no known compression"),
    ],
    ids=["text", "XMP", "profile", "much text", "unknown compression"],
)
@pytest.mark.parametrize("place", ["in front", "behind"])
def test_what_a_png_says_beside_its_pixels_is_no_reason_to_refuse_it(extra, place):
    data = encoded(RGB)
    at = 33 if place == "in front" else len(data) - 12
    np.testing.assert_array_equal(decode(data[:at] + extra + data[at:]), np.asarray(RGB))
    assert check(data[:at] + extra + data[at:])[:2] == (12, 10)


def test_a_cut_png_with_text_is_still_cut():
    data = encoded(RGB)
    text = chunk(b"tEXt", b"Comment\0text")
    for damaged in (
        data[:33] + text + data[33:-30],
        data[:33] + text[:-6],
        data[:33] + b"\xff\xff\xff\xfftEXt" + data[41:],
    ):
        with pytest.raises(ValueError, match="cannot be decoded"):
            check(damaged)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first_is_taken(form):
    frames = [RGB, RGB.transpose(Image.Transpose.FLIP_LEFT_RIGHT), RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(RGB, form, save_all=True, append_images=frames[1:], **options)
    assert check(data) == (12, 10, b"", 3, False)
    np.testing.assert_array_equal(decode(data), np.asarray(RGB))


def test_a_cameras_preview_is_no_second_picture():
    data = encoded(RGB, "MPO", save_all=True, append_images=[RGB])
    assert check(data).num_pictures == 1


OTHER_FORMATS = ("GIF", "PPM", "TGA", "PCX", "ICO", "SGI", "EPS", "IM", "DDS", "JPEG2000")


@pytest.mark.parametrize("form", OTHER_FORMATS)
def test_no_other_parser_is_asked_whatever_a_file_is_called(form, monkeypatch):
    data = encoded(RGB, form)
    Image.init()
    for name in set(Image.OPEN) - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, name, (None, None))  # would fail if it was called
    with pytest.raises(ValueError, match="cannot be decoded: it is none of PNG, JPEG, WEBP, BMP, TIFF, or its header"):
        check(data)


@pytest.mark.parametrize("name", good_files())
def test_odd_but_good_files_pass(name):
    data = good_files()[name]
    assert check(data)[:2] == decode(data).shape[:2] == (96, 120)


@pytest.mark.parametrize("name", [name for name in bad_files() if name != "small.JPEG"])
def test_bad_files_are_rejected_with_the_reason(name):
    data, reason = bad_files()[name]
    with pytest.raises(ValueError, match=reason):
        check(data)


def test_a_cut_and_closed_jpeg_would_pass_for_good():
    """Why `check` looks closer than Pillow: gray below the cut, and no error."""
    data, _ = bad_files()["cut tail, closed.JPEG"]
    assert (decode(data)[-8:] == 128).all()


def test_float_pixels_are_rejected():
    with pytest.raises(ValueError, match="float pixels have no fixed range"):
        check(encoded(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize("name", good_files())
def test_an_image_that_is_converted_in_strips_is_the_same(name, monkeypatch):
    data = good_files()[name]
    whole = decode(data)
    monkeypatch.setattr(images, "_STRIP_PX", 7 * 120)
    np.testing.assert_array_equal(decode(data), whole)


def test_a_region_of_a_large_image_is_cut_before_it_is_converted():
    """It was held three times: 2.3 GB for a PNG of 0.5 MB."""
    data = encoded(Image.new("P", (6000, 5000), 7))
    picture = Picture(data)
    tracemalloc.start()  # numpy's memory is counted, Pillow's is not
    try:
        assert picture.region(Box(4000, 4000, 64, 64)).shape == (3, 64, 64)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})]
)
def test_a_sets_own_limit_of_pixels_holds_for_every_kind(form, options):
    data = encoded(RGB, form, **options)
    assert check(data, 120)[:2] == (12, 10)
    with pytest.raises(ValueError, match="has more pixels than max_pixels=119: cut it into parts"):
        check(data, 119)


def test_no_reason_names_an_object_in_memory():
    """Reasons go into the set: machines would disagree about it."""
    for error in (OSError(f"cannot read {io.BytesIO()!r}"), ValueError(f"{object()} is no image")):
        assert "0x" not in images._words(error)
    for data in (
        b"text",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"II*\0" + bytes(40),
        b"RIFF\0\0\0\0WEBP" + bytes(40),
        b"BM" + bytes(60),
    ):
        with pytest.raises(ValueError, match="cannot be decoded") as caught:
            check(data)
        assert "0x" not in str(caught.value)


def test_a_file_that_the_region_decoder_reads_otherwise_than_pillow_is_left_to_pillow(monkeypatch):
    data = encoded(photograph(160, 200), "JPEG")
    sound, whole = check(data), decode(data)
    assert not sound.by_pillow
    assert sound.seek

    region = jpeg.region
    monkeypatch.setattr(jpeg, "region", lambda *given: None if (got := region(*given)) is None else got ^ 1)
    found = check(data)
    assert found.by_pillow
    assert found.seek == b""
    pixels = Picture(data, found.seek, found.by_pillow).region(Box(3, 5, 60, 71)).transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels, whole[3:63, 5:76])
