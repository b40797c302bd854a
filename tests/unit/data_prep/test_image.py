"""Decoding: every mode to RGB by the stated rule, and reasons for what cannot be decoded."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.image import check, decode
from tests.unit.data_prep.odd_files import bad_files, good_files


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
