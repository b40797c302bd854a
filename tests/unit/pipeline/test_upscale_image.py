"""One picture enlarged: sizes, and what becomes of alpha."""

from typing import Any

import numpy as np
import pytest

from data_prep.bicubic import imresize
from pipeline.upscale_image import Wanted, enlarge


def image(channels: int = 3, dtype: Any = np.uint8, height: int = 10, width: int = 14) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)


def doubled(pixels: np.ndarray) -> np.ndarray:
    """In a network's place: every pixel four times, one level brighter, so that it is seen where it was."""
    return np.minimum(np.repeat(np.repeat(pixels, 2, 0), 2, 1).astype(np.int64) + 1, 65535).astype(pixels.dtype)


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        (Wanted(), (20, 28)),
        (Wanted(outscale=2), (20, 28)),
        (Wanted(outscale=1.5), (15, 21)),
        (Wanted(outscale=0.25), (3, 4)),  # 2.5 and 3.5, half upwards
        (Wanted(outscale=0.001), (1, 1)),
        (Wanted(outscale=3.3), (33, 46)),
        (Wanted(width=7), (5, 7)),
        (Wanted(height=35), (35, 49)),
        (Wanted(width=5, height=40), (40, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_network_comes_first_and_then_one_resize(wanted: Wanted, size: tuple[int, int], dtype: Any) -> None:
    low_res = image(3, dtype)
    out = enlarge(low_res, doubled, 2, wanted)
    by_network = doubled(low_res)
    if dtype == np.uint8:
        expected = imresize(by_network, None, size=size)
    else:
        exact = imresize(by_network.astype(np.float64), None, size=size)
        expected = np.clip(np.floor(exact + 0.5), 0, 65535).astype(np.uint16)
    assert (out.dtype, out.shape) == (dtype, (*size, 3))
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_by_bicubic_passes_the_network_by(channels: int, dtype: Any) -> None:
    low_res = image(channels, dtype) | 1
    out = enlarge(low_res, doubled, 2, Wanted(alpha="bicubic"))
    assert np.array_equal(out[..., :-1], doubled(low_res[..., :-1]))
    alpha = low_res[..., -1] if dtype == np.uint8 else low_res[..., -1].astype(np.float64)
    assert np.array_equal(out[..., -1], np.floor(imresize(alpha, 2).clip(0, np.iinfo(dtype).max) + 0.5))
    assert enlarge(low_res, doubled, 2, Wanted(5, alpha="bicubic")).shape == (50, 70, channels)


def test_alpha_by_bicubic_takes_the_colour_that_is_seen() -> None:
    low_res = image(4)
    low_res[..., 3] = 255
    low_res[0:5, :, 3] = 0
    out = enlarge(low_res, doubled, 2, Wanted(alpha="bicubic"))
    assert np.array_equal(out[0, ::2, :3], low_res[5, :, :3] + (low_res[5, :, :3] < 255))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_alpha_is_dropped_and_hidden_colours_stay(channels: int) -> None:
    low_res = image(channels)
    if channels in (2, 4):
        low_res[..., -1] = 0
    colours = low_res[..., : 3 if channels > 2 else 1]
    assert np.array_equal(enlarge(low_res, doubled, 2, Wanted(alpha="drop")), doubled(np.ascontiguousarray(colours)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outscale": 0}, "--outscale 0: it must be a positive number"),
        ({"outscale": float("nan")}, "--outscale nan"),
        ({"outscale": float("inf")}, "--outscale inf"),
        ({"outscale": 2, "width": 3}, "are two sizes"),
        ({"width": 0}, "--width 0: it must be at least 1 px"),
        ({"height": -5}, "--height -5"),
        ({"alpha": "none"}, "--alpha none: choose one of network, bicubic, drop"),
        ({"quality": 0}, "--quality 0: it goes from 1 to 100"),
        ({"quality": 101}, "--quality 101"),
    ],
)
def test_what_cannot_be_wanted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Wanted(**options)


def test_a_result_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the result would have 1000000 x 714286 px, .* choose a smaller size"):
        Wanted(width=1_000_000).size((10, 14), 2)
