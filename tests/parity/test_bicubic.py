"""The published low-resolution Set5 files against `imresize` of their originals: no pixel may differ."""

import numpy as np
import pytest
from PIL import Image

from data_prep.bicubic import imresize, imresize_crop, to_uint8
from tests.shared_data import shared

NAMES = ("baby", "bird", "butterfly", "head", "woman")


def load(relative):
    return np.asarray(Image.open(shared(f"data/benchmark/Set5/{relative}")).convert("RGB"))


def cropped(name, scale):
    image = load(f"HR/{name}.png")
    return image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_equals_published_low_res(name, scale):
    published = load(f"LR_bicubic/X{scale}/{name}x{scale}.png")
    np.testing.assert_array_equal(imresize(cropped(name, scale), 1 / scale), published)


@pytest.mark.parametrize("name", NAMES)
def test_equals_published_x8_which_was_rounded_once(name):
    published = load(f"LR_bicubic/X8/{name}x8.png")
    np.testing.assert_array_equal(to_uint8(imresize(cropped(name, 8), 1 / 8, rounding="float")), published)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crop_equals_published_low_res(scale):
    published = load(f"LR_bicubic/X{scale}/womanx{scale}.png")
    crop = imresize_crop(cropped("woman", scale), 1 / scale, 5, 7, 31, 20)
    np.testing.assert_array_equal(crop, published[5:36, 7:27])
