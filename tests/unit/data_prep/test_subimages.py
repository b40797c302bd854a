"""Sub-images: the field's grid, no loss, names that lead back."""

import numpy as np
import pytest

from data_prep import storage
from data_prep.image import Box, decode
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.sources import list_items
from data_prep.subimages import boxes, source_key, starts, sub_key
from tests.unit.data_prep.odd_files import encoded, photograph


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (480, [0]),
        (481, [0, 1]),
        (720, [0, 240]),
        (1356, [0, 240, 480, 720, 876]),
        (2040, [0, 240, 480, 720, 960, 1200, 1440, 1560]),
    ],
)
def test_the_fields_grid(length, expected):
    assert starts(length, 480, 240) == expected


def test_every_pixel_is_in_some_crop_and_none_outside():
    for height, width in ((480, 480), (1356, 2040), (700, 481)):
        seen = np.zeros((height, width), bool)
        for box in boxes(height, width, 480, 240):
            assert box.height == box.width == 480
            seen[box.top : box.top + 480, box.left : box.left + 480] = True
        assert seen.all()


def test_an_image_smaller_than_the_crop_is_whole():
    assert boxes(300, 600, 480, 240) == [Box(0, 0, 300, 480), Box(0, 120, 300, 480)]


@pytest.mark.parametrize("key", ["0001%2Epng", "a_s/b_s1%2Ejpg", "x_s12%2Epng"])
def test_names_lead_back(key):
    assert source_key(sub_key(key, 7)) == key
    assert source_key(sub_key(key, 1234)) == key
    assert source_key(key) == key


def test_shards_of_sub_images_are_lossless(tmp_path):
    image = photograph(150, 210)
    storage.write_bytes(str(tmp_path / "source" / "big.JPEG"), encoded(image))
    settings = ShardSettings(sub_image_px=96, sub_image_step_px=48, min_side_px=32)
    [plan] = plan_shards(list_items(str(tmp_path / "source")), settings)
    info = write_shard(plan, str(tmp_path / "set"))
    whole = decode(encoded(image))
    tar = (tmp_path / "set" / "shard-000000.tar").read_bytes()
    grid = boxes(150, 210, 96, 48)
    assert len(info.samples) == len(grid) == 3 * 4
    for number, (sample, box) in enumerate(zip(info.samples, grid, strict=True), 1):
        assert sample.key == sub_key("big%2EJPEG", number)
        assert (sample.ext, sample.height, sample.width) == ("png", 96, 96)
        pixels = decode(tar[sample.offset : sample.offset + sample.size])
        np.testing.assert_array_equal(pixels, whole[box.top : box.top + 96, box.left : box.left + 96])


def test_a_cut_file_gives_no_gray_sub_images(tmp_path):
    data = encoded(photograph(150, 210))
    storage.write_bytes(str(tmp_path / "source" / "cut.JPEG"), data[: len(data) // 2] + b"\xff\xd9")
    [plan] = plan_shards(list_items(str(tmp_path / "source")), ShardSettings(sub_image_px=96, sub_image_step_px=48))
    info = write_shard(plan, str(tmp_path / "set"))
    assert [reject.reason for reject in info.rejects] == [
        "cannot be decoded: the compressed data is damaged or cut off"
    ]


def test_a_step_that_would_lose_pixels_is_refused():
    with pytest.raises(ValueError, match="sub_image_step_px=481 is above sub_image_px=480"):
        ShardSettings(sub_image_px=480, sub_image_step_px=481)
