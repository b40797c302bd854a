"""LPIPS and DISTS against figures that the authors' packages gave for the same made-up weights and images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.perceptual import Dists, Lpips

ALEXNET = ((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3))
VGG_WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, **dict.fromkeys((17, 19, 21, 24, 26, 28), 512)}
VGG16 = tuple(
    (number, before, after, 3)
    for (number, after), before in zip(VGG_WIDTHS.items(), [3, *VGG_WIDTHS.values()], strict=False)
)
TAPS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def ramp(*shape: int) -> torch.Tensor:
    """Weights that any program can make again, of about a trained layer's size."""
    count = int(np.prod(shape))
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898) * (2.0 / np.prod(shape[1:])) ** 0.5
    return values.reshape(shape).float()


def write(folder: Path, net: str) -> tuple[Path, Path]:
    layers = ALEXNET if net == "alex" else VGG16
    backbone = {}
    for number, before, after, side in layers:
        backbone[f"features.{number}.weight"] = ramp(after, before, side, side)
        backbone[f"features.{number}.bias"] = ramp(after, 1)[:, 0] * 0.1
    linear = {f"lin{n}.model.1.weight": ramp(1, c, 1, 1).abs() for n, c in enumerate(TAPS[net])}
    torch.save(backbone, folder / f"{net}.pth")
    torch.save(linear, folder / f"{net}-linear.pth")
    shares = {"alpha": ramp(1, 1475, 1, 1).abs(), "beta": ramp(1, 1475, 1, 1).flip(1).square() * 9}
    torch.save(shares, folder / "weights.pt")
    return folder / f"{net}.pth", folder / f"{net}-linear.pth"


def images() -> tuple[np.ndarray, np.ndarray]:
    y, x, c = np.mgrid[0:72, 0:80, 0:3]
    a = ((x * 3 + y * 5 + c * 40) % 256).astype(np.uint8)
    return a, ((a.astype(int) + (x * y) % 61) % 256).astype(np.uint8)


@pytest.mark.parametrize(("net", "expected"), [("alex", 0.18891567), ("vgg", 0.07906414)])
def test_figures_equal_the_authors_packages(tmp_path: Path, net: str, expected: float) -> None:
    """lpips 0.1.4, LPIPS(net=..., pretrained weights replaced by the ones above)."""
    assert Lpips(*write(tmp_path, net))(*images()) == pytest.approx(expected, rel=1e-4)


def test_dists_equals_the_authors_package(tmp_path: Path) -> None:
    """DISTS_pytorch 0.1, its VGG-16, alpha and beta replaced by the ones above."""
    backbone, _ = write(tmp_path, "vgg")
    found = Dists(backbone, tmp_path / "weights.pt")(*images())
    assert found == pytest.approx(0.01827043, rel=1e-3)  # what is left of 1 by a sum in float32


@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (lambda alex, vgg, own: (alex[0], own), "holds another network than VGG-16, of which DISTS is made"),
        (lambda alex, vgg, own: vgg, "alpha for 1475 channels is missing"),
    ],
)
def test_other_files_than_dists_needs_are_refused(tmp_path: Path, swap: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Dists(*swap(write(tmp_path, "alex"), write(tmp_path, "vgg"), tmp_path / "weights.pt"))


def test_equal_images_and_crops(tmp_path: Path) -> None:
    distance = Lpips(*write(tmp_path, "alex"))
    a, b = images()
    assert distance(a, a) == 0
    framed = a.copy()
    framed[:2] = 0
    assert distance(a, framed) > 0
    assert distance(a, framed, crop=2) == 0
    with pytest.raises(ValueError, match="images differ in size"):
        distance(a, b[:-1])


def test_equal_images_and_crops_by_dists(tmp_path: Path) -> None:
    distance = Dists(write(tmp_path, "vgg")[0], tmp_path / "weights.pt")
    a, b = images()
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    framed = a.copy()
    framed[:2] = 0
    assert distance(a, framed) > 1e-4
    assert distance(a, framed, crop=2) == distance(a, a, crop=2)
    with pytest.raises(ValueError, match="images differ in size"):
        distance(a, b[:-1])


@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (lambda alex, vgg: (vgg[0], alex[1]), "lin1.model.1.weight for 128 channels is missing"),
        (lambda alex, vgg: (alex[1], alex[1]), "neither AlexNet, VGG-16 nor VGG-19"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, swap: Callable[..., tuple[Path, Path]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Lpips(*swap(write(tmp_path, "alex"), write(tmp_path, "vgg")))
