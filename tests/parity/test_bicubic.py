"""Crops of the published low-resolution Set5 files against `imresize` of their originals: no pixel may differ."""

import numpy as np
import pytest

from data_prep.bicubic import imresize, imresize_crop, to_uint8
from tests.golden_crops import NAMES, SCALES, exact, kept_crop


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_published_low_res(name, scale):
    published, place = kept_crop(name, scale), exact(name, scale)
    np.testing.assert_array_equal(imresize(kept_crop(name, 1), 1 / scale)[place], published[place])


@pytest.mark.parametrize("name", NAMES)
def test_equals_published_x8_which_was_rounded_once(name):
    published, place = kept_crop(name, 8), exact(name, 8)
    made = to_uint8(imresize(kept_crop(name, 1), 1 / 8, rounding="float"))
    np.testing.assert_array_equal(made[place], published[place])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crop_equals_published_low_res(scale):
    published = kept_crop("bird", scale)  # from its image's upper left corner
    for top, left in ((0, 0), (5, 7)):
        crop = imresize_crop(kept_crop("bird", 1), 1 / scale, top, left, 26, 20)
        np.testing.assert_array_equal(crop, published[top : top + 26, left : left + 20])


def test_most_of_each_crop_is_compared():
    for scale in SCALES:
        for name in NAMES:
            assert kept_crop(name, scale)[exact(name, scale)].size >= 12 * 12 * 3
