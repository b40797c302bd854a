"""PSNR and SSIM as the super-resolution field reports them, in float64 on uint8 RGB images (H, W, 3).

Y is ITU-R BT.601 luma in 16..235, not rounded; `crop` px (usually the scale) are cut at each border first.
SSIM: Wang et al. 2004, 11 x 11 Gaussian of sigma 1.5, valid region only.
"""

import math

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Image = NDArray[np.uint8]

PEAK = 255.0
WINDOW_PX = 11
SIGMA_PX = 1.5
LUMA = (65.481, 128.553, 24.966)  # of RGB in 0..1

# A truth in uint8 is itself rounded: by a mean square of 1/12 in each channel, which as luma is 63.74 dB. An output
# nearer than that cannot be told from an exact one, and an exact one's PSNR is no number. In means and comparisons both
# count as this much, over RGB too (whose own rounding is 58.92 dB), so that no blank page outweighs all other images.
RESOLVED_DB = 10 * math.log10(12 * PEAK**4 / sum(weight**2 for weight in LUMA))


def psnr_y(a: Image, b: Image, crop: int) -> float:
    """PSNR of luma in dB; inf for equal images. ValueError for a wrong dtype, shape or crop."""
    a, b = _cropped(a, b, crop)
    return _psnr(_luma(a), _luma(b))


def psnr_rgb(a: Image, b: Image, crop: int) -> float:
    """PSNR over all channels in dB; inf for equal images. ValueError for a wrong dtype, shape or crop."""
    a, b = _cropped(a, b, crop)
    return _psnr(a.astype(np.float64), b.astype(np.float64))


def ssim_y(a: Image, b: Image, crop: int) -> float:
    """SSIM of luma. ValueError as `psnr_y`, and where less than 11 x 11 pixels are left."""
    a, b = _cropped(a, b, crop)
    if min(a.shape[:2]) < WINDOW_PX:
        raise ValueError(f"{a.shape[0]} x {a.shape[1]} px after cropping: SSIM needs {WINDOW_PX} x {WINDOW_PX}")
    return float(_ssim_map(_luma(a), _luma(b)).mean())


def _cropped(a: Image, b: Image, crop: int) -> tuple[Image, Image]:
    for image in (a, b):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 image (H, W, 3), got {image.dtype} {image.shape}")
    if a.shape != b.shape:
        raise ValueError(f"images differ in size: {a.shape} and {b.shape}; crop to a multiple of the scale first")
    height, width = a.shape[:2]
    if crop < 0 or 2 * crop >= min(height, width):
        raise ValueError(f"crop={crop} px leaves nothing of {height} x {width} px")
    inside = slice(crop, height - crop), slice(crop, width - crop)
    return a[inside], b[inside]


def _luma(image: Image) -> Float64:
    return image.astype(np.float64) @ np.array(LUMA) / PEAK + 16.0


def _psnr(a: Float64, b: Float64) -> float:
    mse = float(np.mean((a - b) ** 2))
    return 10 * math.log10(PEAK**2 / mse) if mse else math.inf


def _blur(image: Float64) -> Float64:
    """Gaussian blur, valid region: both sides shrink by WINDOW_PX - 1."""
    offsets = np.arange(WINDOW_PX) - WINDOW_PX // 2
    kernel = np.exp(-(offsets**2) / (2 * SIGMA_PX**2))
    kernel /= kernel.sum()
    for _axis in range(2):
        length = len(image) - WINDOW_PX + 1
        image = sum(weight * image[i : i + length] for i, weight in enumerate(kernel)).T
    return image


def _ssim_map(a: Float64, b: Float64) -> Float64:
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * covariance + c2) / (var_a + var_b + c2)
