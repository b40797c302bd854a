"""LPIPS 0.1 (Zhang et al., CVPR 2018, arXiv 1801.03924): distance of deep features; lower is more alike.

Weights are the user's: a backbone in torchvision's layout (AlexNet or VGG-16, `features.0.weight` ...) and the
calibration in the authors' (`lin0.model.1.weight` ...). Which backbone it is shows in the shapes. Axes in tensor names:
b batch, c channels, h height, w width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.weights import read_weights

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in -1..1


@dataclass(frozen=True)
class _Layer:
    """A convolution of a backbone: its number in torchvision's file, and what is done before and after it."""

    number: int
    stride: int = 1
    padding: int = 1
    pool: tuple[int, int] | None = None  # (size, stride) of the max pooling before it
    is_tap: bool = False  # its activation is compared


_ALEXNET = (
    _Layer(0, stride=4, padding=2, is_tap=True),
    _Layer(3, padding=2, pool=(3, 2), is_tap=True),
    _Layer(6, pool=(3, 2), is_tap=True),
    _Layer(8, is_tap=True),
    _Layer(10, is_tap=True),
)
_VGG16 = tuple(
    _Layer(number, pool=(2, 2) if number in (5, 10, 17, 24) else None, is_tap=number in (2, 7, 14, 21, 28))
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
)


class Lpips:
    """The distance of two images, from weights files; ValueError for files of another layout."""

    def __init__(self, backbone: str | Path, calibration: str | Path) -> None:
        self.weights = read_weights(backbone)
        self.layers = _layers_of(self.weights, backbone)
        linear = read_weights(calibration)
        taps = [layer for layer in self.layers if layer.is_tap]
        self.linear = []
        for number, layer in enumerate(taps):
            found = linear.get(f"lin{number}.model.1.weight")
            channels = len(self.weights[f"features.{layer.number}.weight"])
            if found is None or found.numel() != channels:
                raise ValueError(
                    f"{calibration}: lin{number}.model.1.weight for {channels} channels is missing: give the "
                    f"calibration that belongs to {backbone}"
                )
            self.linear.append(found.flatten())

    @torch.inference_mode()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8], crop: int = 0) -> float:
        """LPIPS of two uint8 RGB images (H, W, 3), borders of `crop` px cut. ValueError for images of other shapes."""
        if a.shape != b.shape or a.ndim != 3:
            raise ValueError(f"images differ in size: {a.shape} and {b.shape}; crop to a multiple of the scale first")
        inside = slice(crop, a.shape[0] - crop), slice(crop, a.shape[1] - crop)
        x_bchw = torch.stack([_normalised(image[inside]) for image in (a, b)])
        total = 0.0
        for features_bchw, linear in zip(self._features(x_bchw), self.linear, strict=True):
            unit_bchw = features_bchw / (features_bchw.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference_chw = (unit_bchw[0] - unit_bchw[1]).square()
            total += float((difference_chw * linear[:, None, None]).sum(0).mean())
        return total

    def _features(self, x_bchw: Tensor) -> list[Tensor]:
        """The activations that are compared, first to last."""
        taps = []
        for layer in self.layers:
            if layer.pool is not None:
                x_bchw = F.max_pool2d(x_bchw, *layer.pool)
            weight, bias = (self.weights[f"features.{layer.number}.{name}"] for name in ("weight", "bias"))
            x_bchw = F.relu(F.conv2d(x_bchw, weight, bias, layer.stride, layer.padding))
            if layer.is_tap:
                taps.append(x_bchw)
        return taps


def _layers_of(weights: Mapping[str, Tensor], path: str | Path) -> tuple[_Layer, ...]:
    for layers in (_ALEXNET, _VGG16):
        first = weights.get("features.0.weight")
        side = 11 if layers is _ALEXNET else 3
        if (
            first is not None
            and first.shape[2] == side
            and all(f"features.{layer.number}.{name}" in weights for layer in layers for name in ("weight", "bias"))
        ):
            return layers
    raise ValueError(f"{path} holds neither AlexNet nor VGG-16 in torchvision's layout (features.0.weight ...)")


def _normalised(image: NDArray[np.uint8]) -> Tensor:
    x_chw = torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1
    return (x_chw - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]
