"""Bicubic resizing that equals MATLAB's `imresize` pixel by pixel, whole or for one crop of the output.

Behaviour (MATLAB documentation of `imresize`; Keys 1981 for the kernel with a = -0.5):

- the kernel is widened by 1 / scale when shrinking (antialiasing) and normalised per output pixel;
- borders are mirrored with the edge pixel repeated (symmetric padding);
- the axis with the smaller scale goes first, rows before columns when they are equal;
- `uint8` pixels are rounded half away from zero and saturated **between the two passes** and at the end.

The published x2, x3 and x4 benchmark images were made that way. Published x8 images were made in floating
point with one rounding at the end: `to_uint8(imresize(image, 1 / 8, rounding="float"))`.

Every output pixel is one sum over its taps in a fixed order, made of separate multiplications and additions:
a crop has the same bits as the same region of the whole output.
"""

import functools
import math
from typing import Any, Literal, TypeVar

import numpy as np
import torch

Rounding = Literal["uint8", "float"]
Image = TypeVar("Image", np.ndarray, torch.Tensor)

_A = -0.5
_KERNEL_WIDTH = 4.0
_LENGTH_TOLERANCE = 1e-9  # 1 / 3 is not a binary number: its error must not add a pixel


def imresize(
    image: Image,
    scale: float | None,
    rounding: Rounding | None = None,
    size: tuple[int, int] | None = None,
) -> Image:
    """Resize as MATLAB does.

    `image` is a numpy array (H, W) or (H, W, C) or a torch tensor (C, H, W) or (B, C, H, W), uint8 or float.
    `scale` is output side over input side; the output side is ceil(input side x scale) unless `size`, the
    output's (height, width), says otherwise. With `scale=None` each axis' scale follows from `size`.

    `rounding="uint8"` takes and returns uint8. `rounding="float"` never rounds: a float image keeps its
    dtype, a uint8 image becomes float64 in 0..255. Default: by the image's dtype, as MATLAB does.

    Raises ValueError for a scale that is not positive, an empty output, an unknown layout, dtype or rounding.
    """
    height, width = output_size(image, scale, size)
    return imresize_crop(image, scale, 0, 0, height, width, rounding, size)


def imresize_crop(
    image: Image,
    scale: float | None,
    top: int,
    left: int,
    height: int,
    width: int,
    rounding: Rounding | None = None,
    size: tuple[int, int] | None = None,
) -> Image:
    """The crop [top : top + height, left : left + width] of `imresize(image, scale, rounding, size)`.

    Equal to it to the last bit, from just the input pixels that the crop needs. Raises ValueError as
    `imresize` does, and for a crop that leaves the output.
    """
    out_height, out_width = output_size(image, scale, size)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > out_height or left + width > out_width:
        raise ValueError(
            f"crop top={top} left={left} height={height} width={width} leaves the "
            f"{out_height}x{out_width} output; choose a smaller crop or a larger image"
        )
    rows, columns = _spatial_axes(image)
    rounding = _checked_rounding(image, rounding)
    passes = []
    for axis, out_side, start, count in ((rows, out_height, top, height), (columns, out_width, left, width)):
        in_side = image.shape[axis]
        axis_scale = out_side / in_side if scale is None else float(scale)
        indices, weights = _taps(in_side, out_side, axis_scale)
        indices, weights = indices[start : start + count], weights[start : start + count]
        first, last = int(indices.min()), int(indices.max())
        image = _slice(image, axis, first, last + 1)
        passes.append((axis_scale, axis, indices - first, weights))
    passes.sort(key=lambda entry: entry[0])  # stable: rows stay first where the scales are equal
    result: Any = image if rounding == "uint8" else _as_float(image)
    for _, axis, indices, weights in passes:
        result = _resample(result, axis, indices, weights)
        if rounding == "uint8":
            result = to_uint8(result)
    return _narrow(result, image) if rounding == "float" else result


def source_box(
    in_size: tuple[int, int], scale: float, top: int, left: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the input pixels that a crop of the output is made of."""
    spans = [
        _crop_taps(side, scale, start, count)
        for side, start, count in zip(in_size, (top, left), (height, width), strict=True)
    ]
    (rows, _, first_row), (columns, _, first_column) = spans
    return first_row, first_column, int(rows.max()) + 1, int(columns.max()) + 1


def shrink_planes(
    pixels: np.ndarray,
    in_size: tuple[int, int],
    scale: float,
    top: int,
    left: int,
    height: int,
    width: int,
    rounding: Rounding,
) -> np.ndarray:
    """A crop of a whole image's smaller version, from just the pixels of its `source_box`; compiled.

    `pixels` is (3, h, w) uint8, the box of an image of `in_size` (height, width). Returns (3, height, width) float64
    with the bits of `imresize_crop` for the whole image.
    """
    from data_prep import bicubic_kernels  # imports a compiler: plain resizing does without

    assert scale <= 1, "made for shrinking"
    assert pixels.dtype == np.uint8, "made for uint8 pixels"
    rows, row_weights, _ = _crop_taps(in_size[0], scale, top, height)
    columns, column_weights, _ = _crop_taps(in_size[1], scale, left, width)
    shrunk = bicubic_kernels.shrink(pixels, rows, row_weights, columns, column_weights, rounding == "uint8")
    return shrunk.transpose(0, 2, 1)


def output_size(image: Image, scale: float | None, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of `imresize`'s output. Raises ValueError where there is none."""
    if scale is None and size is None:
        raise ValueError("imresize got neither scale nor size; give one of them")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; it must be a positive number")
    sides = [image.shape[axis] for axis in _spatial_axes(image)]
    if size is None:
        assert scale is not None
        size = (scaled_length(sides[0], scale), scaled_length(sides[1], scale))
    if min(sides) < 1 or min(size) < 1:
        raise ValueError(f"cannot resize {sides[0]}x{sides[1]} pixels to {size[0]}x{size[1]}: a side is empty")
    return size


def scaled_length(length: int, scale: float) -> int:
    """ceil(length x scale), not led astray by the rounding error of a scale such as 1 / 3."""
    return math.ceil(length * scale - _LENGTH_TOLERANCE)


def to_uint8(image: Image) -> Image:
    """Round half away from zero and saturate to 0..255, as MATLAB's `uint8()` does."""
    if isinstance(image, torch.Tensor):
        return torch.floor(image + 0.5).clamp(0, 255).to(torch.uint8)
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    inner = ((_A + 2) * x - (_A + 3)) * x * x + 1
    outer = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0.0))


@functools.lru_cache(maxsize=32)
def _taps(in_side: int, out_side: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Input indices (out_side, taps) int64 and their weights (out_side, taps) float64 along one axis."""
    return _taps_of(np.arange(out_side), in_side, scale)


@functools.lru_cache(maxsize=32)  # a pair asks twice for its rows and its columns, and hardly ever for another's
def _crop_taps(in_side: int, scale: float, start: int, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(indices from the first pixel needed, weights, that pixel) for `count` output pixels from `start`."""
    indices, weights = _taps_of(np.arange(start, start + count), in_side, scale)
    first = int(indices.min())
    return indices - first, weights, first


def _taps_of(outputs: np.ndarray, in_side: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Input indices (outputs, taps) int64 and their weights (outputs, taps) float64 of some output pixels."""
    stretch = min(scale, 1.0)
    width = _KERNEL_WIDTH / stretch
    # the centre of output pixel i in input coordinates, both counted from the first pixel's centre at 0
    centres = (outputs + 0.5) / scale - 0.5
    leftmost = np.floor(centres - width / 2).astype(np.int64)
    indices = leftmost[:, None] + np.arange(math.ceil(width) + 2)
    weights = stretch * _cubic(stretch * (centres[:, None] - indices))
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = indices % (2 * in_side)
    indices = np.where(mirrored < in_side, mirrored, 2 * in_side - 1 - mirrored)
    used = weights.any(axis=0)
    indices, weights = indices[:, used], weights[:, used]
    indices.setflags(write=False)
    weights.setflags(write=False)
    return indices, weights


def _resample(image: Any, axis: int, indices: np.ndarray, weights: np.ndarray) -> Any:
    """Sum of weights[o, t] * image[indices[o, t]] along `axis`, tap by tap; uint8 is summed in float64."""
    if isinstance(image, torch.Tensor):
        dtype = image.dtype if image.is_floating_point() else torch.float64
        lines: Any = image.to(dtype).swapaxes(0, axis).contiguous()
        all_weights: Any = torch.from_numpy(weights.T.copy()).to(lines.device, dtype)
        all_indices: Any = torch.from_numpy(indices.T.copy()).to(lines.device)
    else:
        lines = np.ascontiguousarray(image.swapaxes(0, axis))
        all_weights = weights.T.astype(image.dtype if image.dtype.kind == "f" else np.float64)
        all_indices = indices.T
    total: Any = None
    per_line = (-1,) + (1,) * (lines.ndim - 1)
    for tap_indices, tap_weights in zip(all_indices, all_weights, strict=True):
        term = lines[tap_indices] * tap_weights.reshape(per_line)
        total = term if total is None else total.__iadd__(term)
    return total.swapaxes(0, axis)


def _spatial_axes(image: np.ndarray | torch.Tensor) -> tuple[int, int]:
    """The (row, column) axes. Raises ValueError for a layout that is not an image's."""
    if isinstance(image, torch.Tensor) and image.ndim in (3, 4):
        return image.ndim - 2, image.ndim - 1
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        return 0, 1
    raise ValueError(
        f"imresize got {type(image).__name__} of shape {tuple(np.shape(image))}; it takes numpy (H, W) or "
        f"(H, W, C) and torch (C, H, W) or (B, C, H, W)"
    )


def _checked_rounding(image: np.ndarray | torch.Tensor, rounding: str | None) -> Rounding:
    """The rounding to use for this image's dtype. Raises ValueError where the two do not fit."""
    name = _dtype_name(image)
    if name != "uint8" and not name.removeprefix("b").startswith("float"):
        raise ValueError(f"imresize got {name} pixels; convert them to uint8 or float first")
    if rounding not in (None, "uint8", "float"):
        raise ValueError(f"rounding is {rounding!r}; choose 'uint8' or 'float'")
    if rounding == "uint8" and name != "uint8":
        raise ValueError(f"rounding='uint8' got {name} pixels; give uint8 pixels (see to_uint8) or rounding='float'")
    return "uint8" if (rounding or name) == "uint8" else "float"


def _as_float(image: Any) -> Any:
    """The image in the dtype to sum in: float32 and float64 stay, half precision and uint8 widen."""
    dtype = {"uint8": "float64", "float16": "float32", "bfloat16": "float32"}.get(_dtype_name(image))
    if dtype is None:
        return image
    return image.to(getattr(torch, dtype)) if isinstance(image, torch.Tensor) else image.astype(dtype)


def _narrow(result: Any, image: Any) -> Any:
    """Half precision in, half precision out."""
    if "float16" not in _dtype_name(image):
        return result
    return result.to(image.dtype) if isinstance(image, torch.Tensor) else result.astype(image.dtype)


def _dtype_name(image: np.ndarray | torch.Tensor) -> str:
    return str(image.dtype).removeprefix("torch.")


def _slice(image: Image, axis: int, start: int, stop: int) -> Image:
    """image[..., start:stop, ...] along `axis`."""
    return image[(slice(None),) * axis + (slice(start, stop),)]
