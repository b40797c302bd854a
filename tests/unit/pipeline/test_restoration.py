"""Images degraded by steps to judge restoration by, with and without upscaling."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import build
from model.init import bicubic_start
from model.metrics import psnr_y
from pipeline.benchmark import Protocol, read_pair, read_set
from pipeline.config import EvaluateConfig
from pipeline.evaluate import judge
from tests.unit.model.tiny import TINY


def save_image(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_steps_make_the_low_resolution_even_where_there_is_a_published_one(tmp_path: Path) -> None:
    save_image(tmp_path / "HR" / "a.png", 32, 40)
    save_image(tmp_path / "LR_bicubic" / "X2" / "ax2.png", 16, 20)
    steps = EvaluateConfig.model_validate(
        {"sets": {"s": str(tmp_path)}, "degrade": {"s": [{"step": "shrink"}, {"step": "jpeg", "quality": 20}]}}
    )
    (image,), (published,) = steps.images("s", 2), read_set(str(tmp_path), 2)
    made = read_pair(image, 2)
    assert made.low_res.shape == (16, 20, 3)
    assert made.low_res.dtype == np.uint8
    assert not np.array_equal(made.low_res, read_pair(published, 2).low_res)
    np.testing.assert_array_equal(made.low_res, read_pair(image, 2).low_res)
    assert made.digest != read_pair(published, 2).digest  # figures of the two are never compared


def test_without_upscaling_something_must_degrade(tmp_path: Path) -> None:
    save_image(tmp_path / "HR" / "a.png", 32, 40)
    with pytest.raises(ValueError, match=r"list steps in evaluate\.degrade .*, or add LQ/ beside HR/"):
        read_set(str(tmp_path), 1)
    noise = EvaluateConfig.model_validate(
        {"sets": {"s": str(tmp_path)}, "degrade": {"s": [{"step": "noise", "sigma": 60}]}}
    )
    pair = read_pair(noise.images("s", 1)[0], 1)
    assert pair.low_res.dtype == np.float32  # not cut, as the papers have it
    assert (pair.low_res - pair.high_res).std() == pytest.approx(60, rel=0.1)
    save_image(tmp_path / "LQ" / "a.png", 32, 40)
    (image,) = read_set(str(tmp_path), 1)
    assert image.low_res is not None
    assert image.low_res.uri.endswith("/LQ/a.png")
    assert image.high_res.uri.endswith("/HR/a.png")


@pytest.mark.parametrize("clip", [False, True])
def test_an_identity_restores_what_it_is_given_and_no_border_is_cut(tmp_path: Path, clip: bool) -> None:
    Image.fromarray(np.full((32, 40, 3), 128, np.uint8)).save(tmp_path / "a.png")
    steps = {"s": [{"step": "noise", "sigma": 10, "clip": clip}]}
    (image,) = EvaluateConfig.model_validate({"sets": {"s": str(tmp_path)}, "degrade": steps}).images("s", 1)
    network = build("hat", 1, **TINY).eval()
    bicubic_start(network)
    result, output = judge(image, 1, network, Protocol(rgb=True))
    expected = np.clip(np.rint(read_pair(image, 1).low_res.astype(np.float64)), 0, 255)
    assert np.abs(output - expected).max() <= 1
    assert result.psnr_rgb == pytest.approx(20 * np.log10(255 / 10), abs=0.3)
    assert result.bicubic_psnr_rgb == pytest.approx(result.psnr_rgb, abs=0.05)
    assert psnr_y(output, read_pair(image, 1).high_res, 0) == result.psnr_y
