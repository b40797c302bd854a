"""PSNR and SSIM against scikit-image and the published bicubic baselines on Set5."""

import math
from pathlib import Path

import numpy as np
import pytest

from data_prep.bicubic import imresize, to_uint8
from model.metrics import RESOLVED_DB, psnr_rgb, psnr_y, ssim_y
from tests.golden_crops import SET5, read_image
from tests.shared_data import shared

BASELINE = {2: (33.678, 0.9304), 3: (30.404, 0.8690), 4: (28.431, 0.8113), 8: (24.398, 0.6582)}
"""Of the published files, whole: dB and SSIM."""
CROPS = {2: (34.066, 0.9289), 3: (30.741, 0.8660), 4: (28.828, 0.8104), 8: (25.022, 0.6687)}
"""Of the crops of them in `tests/golden`, by the code that gives those figures."""


def noise(shape: tuple[int, ...] = (40, 50, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def luma(image: np.ndarray) -> np.ndarray:
    r, g, b = (image[..., channel].astype(np.float64) / 255 for channel in range(3))
    return 65.481 * r + 128.553 * g + 24.966 * b + 16


@pytest.mark.parametrize("scale", BASELINE)
def test_bicubic_baseline_of_crops_of_set5(scale: int) -> None:
    psnr, ssim = bicubic_figures(SET5, scale)
    assert psnr == pytest.approx(CROPS[scale][0], abs=6e-4)
    assert ssim == pytest.approx(CROPS[scale][1], abs=6e-5)


def test_bicubic_baseline_of_set5() -> None:
    for scale, expected in BASELINE.items():
        psnr, ssim = bicubic_figures(shared("data/benchmark/Set5"), scale)
        assert psnr == pytest.approx(expected[0], abs=6e-4)
        assert ssim == pytest.approx(expected[1], abs=6e-5)


def bicubic_figures(folder: Path, scale: int) -> tuple[float, float]:
    """Mean PSNR in dB and SSIM of the published low resolutions, enlarged."""
    figures = []
    for path in sorted((folder / "HR").iterdir()):
        high_res = read_image(path)
        low_res = read_image(folder / f"LR_bicubic/X{scale}/{path.stem}x{scale}.png")
        height, width = (side * scale for side in low_res.shape[:2])
        upscaled = to_uint8(imresize(low_res, scale, rounding="float"))
        figures.append(
            (psnr_y(upscaled, high_res[:height, :width], scale), ssim_y(upscaled, high_res[:height, :width], scale))
        )
    psnr, ssim = np.mean(figures, axis=0)
    return float(psnr), float(ssim)


def test_ssim_equals_scikit_image_in_the_valid_region() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = noise(), noise(seed=1) // 2
    _, ssim_map = metrics.structural_similarity(
        luma(a), luma(b), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True
    )
    assert ssim_y(a, b, 0) == pytest.approx(ssim_map[5:-5, 5:-5].mean(), abs=1e-10)


def test_psnr_is_that_of_the_cropped_values() -> None:
    a, b = noise(), noise(seed=1)
    inside = slice(3, -3), slice(3, -3)
    mse_y = np.mean((luma(a) - luma(b))[inside] ** 2)
    mse_rgb = np.mean((a.astype(float) - b.astype(float))[inside] ** 2)
    assert psnr_y(a, b, 3) == pytest.approx(10 * math.log10(255**2 / mse_y))
    assert psnr_rgb(a, b, 3) == pytest.approx(10 * math.log10(255**2 / mse_rgb))


def test_equal_images() -> None:
    a = noise()
    assert psnr_y(a, a, 2) == psnr_rgb(a, a, 2) == math.inf
    assert ssim_y(a, a, 2) == pytest.approx(1)


def test_what_uint8_resolves_is_the_luma_of_rounding() -> None:
    exact = np.random.default_rng(0).uniform(50, 200, (200, 200, 3))
    error = luma(np.rint(exact)) - luma(exact)
    assert pytest.approx(10 * math.log10(255**2 / np.mean(error**2)), abs=0.05) == RESOLVED_DB
    assert pytest.approx(63.74, abs=0.005) == RESOLVED_DB


@pytest.mark.parametrize("metric", [psnr_y, psnr_rgb, ssim_y])
def test_refusals(metric: object) -> None:
    assert callable(metric)
    a = noise()
    with pytest.raises(ValueError, match=r"expected a uint8 image .* float64"):
        metric(a, a / 255, 0)
    with pytest.raises(ValueError, match=r"expected a uint8 image .*\(40, 50\)"):
        metric(a[..., 0], a, 0)
    with pytest.raises(ValueError, match="differ in size"):
        metric(a, a[1:], 0)
    for crop in (-1, 20):
        with pytest.raises(ValueError, match=f"crop={crop} px leaves nothing of 40 x 50"):
            metric(a, a, crop)


def test_ssim_needs_a_whole_window() -> None:
    a = noise((14, 20, 3))
    with pytest.raises(ValueError, match="10 x 16 px after cropping"):
        ssim_y(a, a, 2)
