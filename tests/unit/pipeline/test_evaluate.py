"""Judgement of one image: in the tiles that were asked for or not at all, and where it was computed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import build
from model.init import bicubic_start
from pipeline.benchmark import BenchmarkImage, Protocol, read_set
from pipeline.evaluate import SetResult, judge
from pipeline.registry import metric_tags
from tests.unit.pipeline.figures import judged

SIZES = {"embed_dim": 12, "depths": (1,), "num_heads": (3,), "window_size": 8, "squeeze_factor": 6}


@pytest.fixture
def benchmark_image(tmp_path: Path) -> BenchmarkImage:
    """192 x 160 px, so that its low resolution has 96 x 80."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (image,) = read_set(str(tmp_path), 2)
    return image


def test_tile_and_device_stand_with_each_figure(benchmark_image: BenchmarkImage) -> None:
    network = build("hat", 2, **SIZES).eval()
    bicubic_start(network)
    whole, _ = judge(benchmark_image, 2, network, Protocol())
    assert (whole.tile, whole.device) == (None, "cpu")
    tiled, _ = judge(benchmark_image, 2, network, Protocol(tile=72))
    assert (tiled.tile, tiled.device) == (72, "cpu")
    assert tiled.psnr_y == pytest.approx(whole.psnr_y, abs=0.01)
    covered, _ = judge(benchmark_image, 2, network, Protocol(tile=128))
    assert covered == whole


def test_smaller_tiles_than_asked_for_are_refused(
    benchmark_image: BenchmarkImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be another answer, beside others that were not so."""
    network = build("hat", 2, **SIZES).eval()
    monkeypatch.setattr("model.inference.free_bytes", lambda device: 16 * 10**6)
    for protocol, asked in ((Protocol(), r"the whole image \(96 x 80 px\)"), (Protocol(tile=88), "tiles of 88 px")):
        with pytest.raises(ValueError, match=f"^one: {asked}, as asked for, may not fit .*; tiles are evaluate.tile"):
            judge(benchmark_image, 2, network, protocol)


def with_places(result: SetResult, *places: tuple[int | None, str]) -> SetResult:
    images = zip(result.images, places, strict=True)
    return result.model_copy(
        update={"images": tuple(i.model_copy(update={"tile": tile, "device": name}) for i, (tile, name) in images)}
    )


def test_a_versions_tags_name_tiles_and_devices() -> None:
    result = with_places(judged([30.0, 31.0, 32.0]), (1024, "cpu"), (None, "cpu"), (512, "NVIDIA H100"))
    tags = metric_tags([result])
    assert (tags["tile.Set5"], tags["device.Set5"]) == ("whole, 512, 1024", "NVIDIA H100, cpu")
    assert "tile.Set5" not in metric_tags([judged([30.0])])  # of a report from before they were kept


def test_what_was_found_does_not_depend_on_where() -> None:
    here, there = (with_places(judged([30.0]), place) for place in ((None, "cpu"), (512, "NVIDIA H100")))
    assert here.what() == there.what()
    assert here.what() != judged([31.0]).what()
