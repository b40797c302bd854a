"""What lies under full transparency."""

from typing import Any

import numpy as np
import pytest

from model.alpha import spread_colour
from model.inference import upscale
from model.init import bicubic_start
from tests.unit.model.tiny import tiny


def disc(colour: int, hidden: int, dtype: Any = np.uint8, channels: int = 4) -> np.ndarray:
    """A disc of one level, whose surroundings hide another."""
    y, x = np.mgrid[0:40, 0:40]
    inside = (y - 20) ** 2 + (x - 20) ** 2 < 100
    greatest = np.iinfo(dtype).max
    levels = np.where(inside, colour, hidden).astype(dtype)
    return np.dstack([levels] * (channels - 1) + [(inside * greatest).astype(dtype)])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_hidden_colours_do_not_reach_what_is_seen(dtype: Any, channels: int) -> None:
    network = tiny(2)
    bicubic_start(network)
    greatest = np.iinfo(dtype).max
    out = upscale(network, disc(0, greatest, dtype, channels))
    inner = out[8:-8, 8:-8]  # the start is not bicubic at the image's own border
    seen = inner[..., -1] > 0
    assert 0.2 < seen.mean() < 0.6
    assert inner[seen, :-1].max() <= greatest // 255
    other = upscale(network, disc(0, greatest // 3, dtype, channels))
    assert np.array_equal(out, other), "what is hidden makes no difference"


def test_each_hidden_pixel_takes_the_nearest_colour() -> None:
    image = np.zeros((1, 6, 4), np.uint8)
    image[0, 1], image[0, 5] = (10, 20, 30, 1), (40, 50, 60, 255)
    image[0, 3, :3] = 99
    spread = spread_colour(image)
    assert spread[0, :, 0].tolist() == [10, 10, 10, spread[0, 3, 0], 40, 40]
    assert spread[0, 3, 0] in (10, 40)
    assert np.array_equal(spread[..., 3], image[..., 3])
    assert image[0, 3, 0] == 99, "the input stays as it is"


def test_images_that_have_nothing_to_spread_stay_as_they_are() -> None:
    for image in (disc(1, 2)[..., :3], np.ones((3, 3, 4), np.uint8), np.zeros((3, 3, 2), np.uint8)):
        assert spread_colour(image) is image
