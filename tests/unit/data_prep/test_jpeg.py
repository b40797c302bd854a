"""Regions of JPEG files: bit for bit those of Pillow's decoding of the whole file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import jpeg, jpeg_header
from data_prep.image import Box, Picture, decode
from data_prep.sources import list_items
from tests.shared_data import shared
from tests.unit.data_prep.odd_files import encoded, good_files, photograph


def assert_region(data, header, box):
    whole = decode(data)[box.top : box.top + box.height, box.left : box.left + box.width]
    for seek in (b"", jpeg.seek_points(data, header)):
        region = jpeg.region(data, header, *box, seek)
        np.testing.assert_array_equal(region.transpose(1, 2, 0), whole)


def random_box(random, header, longest=150):
    height = int(random.integers(1, min(header.height, longest) + 1))
    width = int(random.integers(1, min(header.width, longest) + 1))
    top = int(random.integers(0, header.height - height + 1))
    return Box(top, int(random.integers(0, header.width - width + 1)), height, width)


def test_photographs_whole_and_in_parts(photographs):
    files, kinds, seek_share = compare_with_pillow(photographs)
    assert files == 40
    assert 0.01 < seek_share < 0.05  # of some 22 kB a file
    assert kinds == {(1, 1, 3), (2, 2, 3), (2, 1, 3), (1, 1, 1)}


def test_all_imagenet_files_whole_and_in_parts():
    folder = shared("data/imagenet-sample/train")
    assert len(list_items(str(folder))) == 334
    files, kinds, seek_share = compare_with_pillow(folder)
    assert files == 333  # one has chroma of half height alone
    assert 0.01 < seek_share < 0.025
    assert kinds == {(1, 1, 3), (2, 2, 3), (2, 1, 3), (1, 1, 1)}


def compare_with_pillow(folder):
    """Every region equals Pillow's. (Files read, their kinds of chroma, bytes of seek points per byte of JPEG)."""
    random, kinds, files, sizes = np.random.default_rng(0), set(), 0, []
    for path in sorted(folder.rglob("*.JPEG")):
        data = path.read_bytes()
        header = jpeg_header.parse(data)
        if header is None:
            continue
        files += 1
        kinds.add((header.luma_h, header.luma_v, len(header.dc)))
        whole, seek = decode(data), jpeg.seek_points(data, header)
        sizes.append((len(data), len(seek)))
        for box in (Box(0, 0, header.height, header.width), random_box(random, header), random_box(random, header, 9)):
            part = whole[box.top : box.top + box.height, box.left : box.left + box.width]
            for points in (b"", seek):
                region = jpeg.region(data, header, *box, points)
                assert region is not None, path
                np.testing.assert_array_equal(region.transpose(1, 2, 0), part, err_msg=str(path))
    total, seeks = map(sum, zip(*sizes, strict=True))
    return files, kinds, seeks / total


@settings(max_examples=80, deadline=None)
@given(
    st.integers(9, 70),
    st.integers(9, 70),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "L"]),
    st.sampled_from([30, 75, 92, 100]),
    st.booleans(),
    st.sampled_from([0, 1, 5]),
    st.integers(0, 2**32),
)
def test_all_sizes_samplings_qualities_and_restarts(height, width, sampling, quality, optimize, restart, seed):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8) // int(random.integers(1, 9))
    image = Image.fromarray(pixels.astype(np.uint8)).convert("L" if sampling == "L" else "RGB")
    options = {} if sampling == "L" else {"subsampling": sampling}
    data = encoded(image, quality=quality, optimize=optimize, restart_marker_blocks=restart, **options)
    header = jpeg_header.parse(data)
    assert header is not None
    region = jpeg.region(data, header, 0, 0, height, width)
    if region is None:  # noise of the strongest kind: left to Pillow
        assert quality >= 92
        return
    for _ in range(3):
        assert_region(data, header, random_box(random, header))


@pytest.mark.parametrize("size", [(4, 40), (40, 4), (8, 8), (1, 1)])
def test_tiny_images_are_left_to_pillow_or_right(size):
    data = encoded(photograph().crop((0, 0, *size)), subsampling="4:2:0")
    whole = decode(data)
    region = Picture(data).region(Box(0, 0, size[1], size[0]))
    np.testing.assert_array_equal(region.transpose(1, 2, 0), whole)


@pytest.mark.parametrize("name", good_files())
def test_a_picture_of_any_file_is_pillows(name):
    data = good_files()[name]
    picture, whole = Picture(data), decode(data)
    assert picture.size == whole.shape[:2]
    region = picture.region(Box(3, 5, 60, 71))
    np.testing.assert_array_equal(region.transpose(1, 2, 0), whole[3:63, 5:76])


def test_a_picture_of_pixels():
    pixels = np.asarray(photograph())
    np.testing.assert_array_equal(Picture(pixels).region(Box(1, 2, 3, 4)).transpose(1, 2, 0), pixels[1:4, 2:6])


@pytest.mark.parametrize(
    "name", ["cmyk.JPEG", "progressive.JPEG", "png called.JPEG", "palette.png"], ids=lambda name: name.split(".")[0]
)
def test_other_kinds_are_not_claimed(name):
    assert jpeg_header.parse(good_files()[name]) is None


def test_rgb_without_colour_transform_is_not_claimed():
    assert jpeg_header.parse(encoded(photograph(), keep_rgb=True)) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_crashes_and_what_is_given_out_is_as_pillow_has_it(data):
    """Any bytes may be wrong: a region is None, or what Pillow's decoding gives."""
    whole = bytearray(encoded(photograph(64, 80), quality=90))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(2, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(10, len(whole)))])
    header = jpeg_header.parse(damaged)
    if header is None or header.height * header.width > 10**6:
        return
    region = jpeg.region(damaged, header, 0, 0, header.height, header.width)
    try:
        expected = decode(damaged)
    except ValueError:
        return
    if region is not None:
        np.testing.assert_array_equal(region.transpose(1, 2, 0), expected)


def test_damaged_seek_points_are_not_used():
    data = encoded(photograph(200, 300))
    header = jpeg_header.parse(data)
    seek = jpeg.seek_points(data, header)
    expected = jpeg.region(data, header, 120, 150, 50, 60)
    for position in range(0, len(seek), 7):
        damaged = bytearray(seek)
        damaged[position] ^= 4
        np.testing.assert_array_equal(jpeg.region(data, header, 120, 150, 50, 60, bytes(damaged)), expected)
    np.testing.assert_array_equal(jpeg.region(data, header, 120, 150, 50, 60, seek[:-9]), expected)


def test_files_with_restarts_have_no_seek_points():
    data = encoded(photograph(), restart_marker_blocks=2)
    assert jpeg.seek_points(data, jpeg_header.parse(data)) == b""
