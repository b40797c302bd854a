"""Training pairs: aligned crops of the whole image's low-resolution version, decided by the sample's name."""

import itertools

import numpy as np
import pytest

from data_prep.bicubic import imresize
from data_prep.image import Picture
from data_prep.pairs import PairSettings
from data_prep.pairs import make_pair as make_planar_pair

IMAGE = np.random.default_rng(0).integers(0, 256, (47, 62, 3), dtype=np.uint8)


def make_pair(image, key, epoch, settings, crop=0):
    """The pair as (H, W, 3)."""
    pair = make_planar_pair(Picture(image), key, epoch, settings, crop)
    return type(pair)(pair.low_res.transpose(1, 2, 0), pair.high_res.transpose(1, 2, 0))


def whole_low_res(scale, rounding):
    height, width = IMAGE.shape[0] // scale, IMAGE.shape[1] // scale
    return (imresize(IMAGE[: height * scale, : width * scale], 1 / scale, rounding) / 255.0).astype(np.float32)


def places(haystack, needle):
    """Where `needle` lies in `haystack`."""
    windows = np.lib.stride_tricks.sliding_window_view(haystack, needle.shape)[:, :, 0]
    return list(zip(*np.nonzero((windows == needle).all(axis=(2, 3, 4))), strict=True))


@pytest.mark.parametrize(("scale", "rounding"), itertools.product([2, 3, 4], ["float", "uint8"]))
def test_the_crop_is_a_crop_of_the_whole_low_res_image_and_aligned(scale, rounding):
    settings = PairSettings(scale=scale, patch_px=6, rounding=rounding, flip=False, rotate=False)
    for key in "abcd":
        pair = make_pair(IMAGE, key, 0, settings)
        assert pair.low_res.dtype == np.float32
        [(top, left)] = places(whole_low_res(scale, rounding), pair.low_res)
        high_res = IMAGE[top * scale : (top + 6) * scale, left * scale : (left + 6) * scale]
        np.testing.assert_array_equal(pair.high_res, high_res)


def test_flips_and_rotations_move_both_sides_alike_and_all_eight_occur():
    plain = PairSettings(scale=2, patch_px=8, flip=False, rotate=False)
    moved = PairSettings(scale=2, patch_px=8)
    seen = set()
    for number in range(100):
        before, after = (make_pair(IMAGE, f"key{number}", 0, settings) for settings in (plain, moved))
        ways = [
            (turns, mirror)
            for turns, mirror in itertools.product(range(4), [1, -1])
            if np.array_equal(np.rot90(before.low_res, turns)[:, ::mirror], after.low_res)
        ]
        [(turns, mirror)] = ways
        np.testing.assert_array_equal(np.rot90(before.high_res, turns)[:, ::mirror], after.high_res)
        seen.add((turns, mirror))
    assert len(seen) == 8


def test_choices_follow_from_seed_epoch_and_key_alone():
    settings = PairSettings(scale=2, patch_px=4)
    first = make_pair(IMAGE, "a", 0, settings).low_res
    np.testing.assert_array_equal(make_pair(IMAGE, "a", 0, settings).low_res, first)
    for key, epoch, seed in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        other = make_pair(IMAGE, key, epoch, settings.model_copy(update={"seed": seed})).low_res
        assert not np.array_equal(other, first)


def test_every_place_can_be_cropped_to_the_last_pixel():
    settings = PairSettings(scale=2, patch_px=22, flip=False, rotate=False)
    low_res = whole_low_res(2, "float")
    seen = {places(low_res, make_pair(IMAGE, str(n), 0, settings).low_res)[0] for n in range(200)}
    assert seen == set(itertools.product(range(23 - 22 + 1), range(31 - 22 + 1)))
