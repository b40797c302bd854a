"""`imresize`: MATLAB's conventions, and crops that have the bits of the whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.bicubic import imresize, imresize_crop, output_size, scaled_length, to_uint8


def noise(*shape, dtype=np.float64, seed=0):
    values = np.random.default_rng(seed).uniform(0, 255, shape)
    return to_uint8(values) if dtype == np.uint8 else values.astype(dtype)


def test_values_of_a_ramp_worked_out_by_hand():
    # doubling puts output pixels a quarter beside the input's: weights (-9, 111, 29, -3) / 128 or reversed
    ramp = np.array([[0.0, 128.0, 256.0, 384.0]])
    result = imresize(ramp, None, size=(1, 8))
    assert result[0, 3] == pytest.approx(-9 * 0 + 111 * 1 + 29 * 2 - 3 * 3)
    assert result[0, 0] == pytest.approx(-3 * 1 + 29 * 0 + 111 * 0 - 9 * 1)  # mirrored: 128 0 | 0 128


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 0.5, 0.7, 1.0, 1.5, 2, 3, 4])
def test_a_flat_image_stays_flat(scale):
    flat = np.full((17, 23, 3), 201, np.uint8)
    result = imresize(flat, scale)
    assert result.shape == (scaled_length(17, scale), scaled_length(23, scale), 3)
    assert (result == 201).all()


def test_scale_one_changes_nothing():
    image = noise(9, 11, 3, dtype=np.uint8)
    np.testing.assert_array_equal(imresize(image, 1), image)


def test_output_side_is_rounded_up():
    assert imresize(noise(10, 11), 1 / 4).shape == (3, 3)
    assert imresize(noise(10, 11), 1.25).shape == (13, 14)


@pytest.mark.parametrize("divisor", range(2, 17))
def test_a_reciprocal_scale_adds_no_pixel(divisor):
    assert all(scaled_length(n * divisor, 1 / divisor) == n for n in range(1, 5000))


def test_uint8_is_rounded_between_the_passes():
    image = noise(16, 16, dtype=np.uint8)
    rows_first = imresize(imresize(image, None, size=(8, 16)), None, size=(8, 8))
    np.testing.assert_array_equal(imresize(image, 0.5), rows_first)
    assert (to_uint8(imresize(image, 0.5, "float")) != rows_first).any()


def test_the_smaller_scale_goes_first():
    image = noise(16, 16, dtype=np.uint8)
    columns_first = imresize(imresize(image, None, size=(16, 4)), None, size=(12, 4))
    np.testing.assert_array_equal(imresize(image, None, size=(12, 4)), columns_first)


def test_rounding_is_half_away_from_zero_and_saturates():
    values = np.array([0.5, 1.5, 2.5, -3.0, 300.0])
    np.testing.assert_array_equal(to_uint8(values), [1, 2, 3, 0, 255])
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(values)).numpy(), [1, 2, 3, 0, 255])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("scale", [1 / 3, 2.0])
def test_torch_and_numpy_agree_to_the_last_bit(dtype, scale):
    image = noise(20, 31, 3, dtype=dtype)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    result = imresize(tensor, scale)
    assert result.shape[0] == 3
    np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), imresize(image, scale))
    np.testing.assert_array_equal(imresize(tensor[None], scale)[0].numpy(), result.numpy())


def test_dtypes_of_the_result():
    image = noise(8, 8, dtype=np.uint8)
    assert imresize(image, 0.5).dtype == np.uint8
    assert imresize(image, 0.5, "float").dtype == np.float64
    assert imresize(image.astype(np.float32), 0.5).dtype == np.float32
    assert imresize(image.astype(np.float16), 0.5).dtype == np.float16
    assert imresize(torch.zeros(1, 8, 8, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16
    assert imresize(torch.zeros(1, 8, 8, dtype=torch.uint8), 0.5, "float").dtype == torch.float64


def test_gradients_pass_through():
    tensor = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 0.5), (tensor,))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(6, 40),
    st.integers(6, 40),
    st.sampled_from([0.25, 1 / 3, 0.5, 0.77, 1.3, 2.0, 3.0]),
    st.sampled_from([np.uint8, np.float32, np.float64]),
    st.data(),
)
def test_a_crop_has_the_bits_of_the_whole(rows, columns, scale, dtype, data):
    image = noise(rows, columns, 3, dtype=dtype)
    whole = imresize(image, scale)
    top = data.draw(st.integers(0, whole.shape[0] - 1))
    left = data.draw(st.integers(0, whole.shape[1] - 1))
    height = data.draw(st.integers(1, whole.shape[0] - top))
    width = data.draw(st.integers(1, whole.shape[1] - left))
    crop = imresize_crop(image, scale, top, left, height, width)
    np.testing.assert_array_equal(crop, whole[top : top + height, left : left + width])


@pytest.mark.parametrize(("scale", "dtype"), itertools.product([0.5, 2.0], [torch.float32, torch.uint8]))
def test_a_torch_crop_has_the_bits_of_the_whole(scale, dtype):
    image = torch.from_numpy(noise(2, 3, 37, 29)).to(dtype)
    whole = imresize(image, scale)
    crop = imresize_crop(image, scale, 3, 1, 13, 11)
    assert torch.equal(crop, whole[..., 3:16, 1:12])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: imresize(noise(4, 4), 0), "scale is 0; it must be a positive"),
        (lambda: imresize(noise(4, 4), float("nan")), "scale is nan"),
        (lambda: imresize(noise(4, 4), None), "neither scale nor size"),
        (lambda: imresize(noise(4, 4), None, size=(0, 4)), "4x4 pixels to 0x4"),
        (lambda: imresize(noise(0, 4), 2), "a side is empty"),
        (lambda: imresize(noise(4), 2), r"shape \(4,\)"),
        (lambda: imresize(torch.zeros(4, 4), 2), r"Tensor of shape \(4, 4\)"),
        (lambda: imresize(np.zeros((4, 4), np.int32), 2), "int32 pixels"),
        (lambda: imresize(noise(4, 4), 2, "int"), "rounding is 'int'"),
        (lambda: imresize(noise(4, 4), 2, "uint8"), "rounding='uint8' got float64"),
        (lambda: imresize_crop(noise(4, 4), 2, 5, 0, 4, 1), "leaves the 8x8 output"),
        (lambda: imresize_crop(noise(4, 4), 2, 0, 0, 0, 1), "leaves the 8x8 output"),
        (lambda: imresize_crop(noise(4, 4), 2, -1, 0, 1, 1), "leaves the 8x8 output"),
    ],
)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_output_size_of_both_layouts():
    assert output_size(noise(10, 20, 3), 0.5) == (5, 10)
    assert output_size(torch.zeros(3, 10, 20), 0.5) == (5, 10)
