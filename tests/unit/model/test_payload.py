"""What may be sent to a served model, what comes back, and what is refused in one line."""

import base64
import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from model.payload import RefusedError, answer


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def doubled(image: np.ndarray) -> np.ndarray:
    """Stands for a network: every pixel four times; takes and gives what `model.inference.upscale` does."""
    assert image.dtype in (np.uint8, np.uint16)
    assert image.ndim in (2, 3)
    return image.repeat(2, axis=0).repeat(2, axis=1)


def file(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (2, 5, 7, 3), (1, 5, 7, 1), (3, 4, 3), (1, 1)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_whole_numbers_of_any_shape_come_back_as_they_were_sent(dtype: Any, shape: tuple[int, ...]) -> None:
    sent = pixels(*shape).astype(dtype) * (257 if dtype == np.uint16 else 1)
    axes = (1, 2) if len(shape) == 4 else (0, 1)
    got = answer(sent, doubled)
    assert got.dtype == dtype
    assert np.array_equal(got, sent.repeat(2, axes[0]).repeat(2, axes[1]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("largest", "error"), [(1.0, 1e-5), (255.0, 2.5e-3)])
def test_floats_come_back_in_their_range(largest: float, error: float, dtype: Any) -> None:
    sent = (np.random.default_rng(0).random((2, 4, 5, 3)) * largest).astype(dtype)
    sent[0, 0, 0, 0] = largest
    got = answer(sent, doubled)
    assert got.dtype == dtype
    assert np.abs(got[:, ::2, ::2] - sent).max() <= error
    assert got.max() == pytest.approx(largest)


def test_what_json_makes_of_pixels_is_taken() -> None:
    """Lists of whole numbers, and of floats; a single image and several."""
    sent = pixels(2, 4, 5, 3)
    for parsed in (json.loads(json.dumps(sent.tolist())), np.array(sent.tolist())):
        assert np.array_equal(answer(parsed, doubled)[:, ::2, ::2], sent)
    assert np.array_equal(answer(sent[0].tolist(), doubled)[::2, ::2], sent[0])
    unit = answer(json.loads(json.dumps((sent[0] / 255).tolist())), doubled)
    assert np.abs(unit[::2, ::2] * 255 - sent[0]).max() < 0.01


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_png_files_come_back_as_png_files(prefix: str) -> None:
    sent = pixels(6, 5, 3)
    data = file(sent)
    assert np.array_equal(opened(answer(data, doubled)), doubled(sent))
    got = answer(prefix + base64_of(data), doubled)
    assert got.startswith(prefix)
    assert np.array_equal(opened(base64.b64decode(got.removeprefix(prefix))), doubled(sent))
    lines = base64.encodebytes(data).decode()
    assert answer(lines, doubled) == base64_of(answer(data, doubled))
    ascii_bytes = answer(lines.encode(), doubled)
    assert isinstance(ascii_bytes, bytes)
    assert ascii_bytes.decode() == answer(lines, doubled)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4)])
def test_gray_and_transparent_files_keep_their_channels(shape: tuple[int, ...]) -> None:
    sent = pixels(*shape)
    assert np.array_equal(opened(answer(file(sent), doubled)), doubled(sent))


def test_16_bits_stay_16_bits() -> None:
    sent = pixels(6, 5).astype(np.uint16) * 257 + 1
    assert np.array_equal(opened(answer(file(sent), doubled)), doubled(sent))


def test_jpeg_files_come_back_as_jpeg_files() -> None:
    smooth = np.full((16, 24, 3), (40, 90, 160), np.uint8)
    got = answer(file(smooth, "JPEG", quality=95), doubled)
    with Image.open(io.BytesIO(got)) as image:
        assert (image.format, image.size) == ("JPEG", (48, 32))
        assert np.abs(np.asarray(image).astype(int) - doubled(smooth)).max() <= 3


def test_several_come_back_in_a_list_whatever_holds_them() -> None:
    images = [pixels(4, 5, 3), pixels(6, 3, 3, seed=1)]
    texts = [base64_of(file(image)) for image in images]
    holders: list[Any] = [
        texts,
        tuple(texts),
        np.array(texts),
        {"image": texts},
        {"b64": np.array(texts)},
        [{"b64": text} for text in texts],
        pd.DataFrame({"image": texts}),
        pd.DataFrame({"image": [text.encode() for text in texts]}),
    ]
    for holder in holders:
        got = answer(holder, doubled)
        assert isinstance(got, list)
        for one, image in zip(got, images, strict=True):
            assert np.array_equal(opened(base64.b64decode(one)), doubled(image))


@pytest.mark.parametrize(
    "hold", [list, lambda images: pd.DataFrame({"image": images}), lambda images: {"image": images}]
)
@pytest.mark.parametrize("as_lists", [False, True])
def test_arrays_of_several_sizes_come_back_in_a_list(as_lists: bool, hold: Any) -> None:
    images: list[Any] = [pixels(4, 5, 3), pixels(6, 3, 3, seed=1), pixels(3, 4)]
    got = answer(hold([image.tolist() if as_lists else image for image in images]), doubled)
    assert isinstance(got, list)
    for one, image in zip(got, images, strict=True):
        assert np.array_equal(one, doubled(image))


PICTURE = pixels(4, 5, 3).tolist()
REFUSED: list[tuple[Any, str]] = [
    (np.zeros((2, 3, 4, 5), np.uint8), "shape (2, 3, 4, 5) is not of one or several images: put the channels last"),
    (np.zeros((3, 9, 9), np.uint8), "put the channels last"),
    (np.zeros((5, 9, 9), np.uint8), "shape (5, 9, 9) is not of one or several images: send arrays"),
    (np.zeros((9, 9, 2), np.uint8), "shape (9, 9, 2)"),
    (np.zeros(9, np.uint8), "shape (9,)"),
    (np.zeros((1, 1, 9, 9, 3), np.uint8), "shape (1, 1, 9, 9, 3)"),
    (np.zeros((0, 9, 9, 3), np.uint8), "shape (0, 9, 9, 3)"),
    (np.zeros((9, 9), bool), "values of type bool"),
    (np.zeros((9, 9), complex), "values of type complex128"),
    (np.full((9, 9), -1), "values from -1 to -1: send 0..255"),
    (np.full((9, 9), -0.5), "values from -0.5 to -0.5"),
    (np.full((9, 9), np.nan), "values from nan to nan"),
    (np.full((9, 9), np.inf), "values from inf to inf"),
    (np.full((9, 9), 4095), "whole numbers from 4095 to 4095: 16 bits come as uint16 or PNG"),
    (np.eye(9, dtype=int), "whole numbers from 0 to 1: is 1 white, or nearly black?"),
    (np.full((9, 9), 1.02), "floats from 1.02 to 1.02: clip them"),
    (np.full((9, 9), 256.5), "floats from 256.5 to 256.5: clip them"),
    (7, "shape ()"),
    (None, "values of type object"),
    ([], "there are no images"),
    ({}, "one entry must hold the images: there are 0"),
    ({"a": 1, "b": 2}, "one entry must hold the images: there are 2 (a, b)"),
    (pd.DataFrame({"a": [1], "b": [2]}), "a table must have one column, of images: this one has 2"),
    ("", "the image is no PNG or JPEG file in base64"),
    ("photo.png", "the image is no PNG or JPEG file in base64"),
    ("https://host/photo.png", "is no PNG or JPEG file in base64"),
    (b"GIF89a", "is no PNG or JPEG file in base64"),
    (base64_of(file(pixels(4, 4, 3), "BMP")), "is no PNG or JPEG file in base64"),
    (base64_of(file(pixels(4, 4, 3))[:60]), "the image cannot be read:"),
    ([base64_of(file(pixels(4, 4, 3))), "x"], "image 2 is no PNG or JPEG file in base64"),
    ([PICTURE, [[1, 2], [3]]], "image 2 is a list, not one image"),
    ([np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)], "image 1 is a ndarray, not one image"),
]


@pytest.mark.parametrize(("sent", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_may_mean_several_things_is_refused_in_one_short_line(sent: Any, message: str) -> None:
    with pytest.raises(RefusedError) as refused:
        answer(sent, doubled)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 320
