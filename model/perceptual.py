"""Distances of deep features, lower is more alike: LPIPS 0.1 and DISTS.

LPIPS: Zhang et al., CVPR 2018, arXiv 1801.03924; by AlexNet or VGG-16. DISTS: Ding et al., TPAMI 2020, arXiv
2004.07728; by VGG-16. Weights are the user's: the backbone in torchvision's layout and the authors' calibration.
Axes in tensor names: b batch, c channels, h height, w width.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.backbone import IMAGENET_MEAN, IMAGENET_STD, VGG16, VGG19, Backbone
from model.weights import read_weights

_LPIPS_MEAN, _LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in -1..1
_STABLE = 1e-6  # DISTS adds it above and below its fractions


class Distance(Protocol):
    """How unlike two images are; 0: not at all."""

    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8], crop: int = 0) -> float:
        """Of two uint8 RGB images (H, W, 3), borders of `crop` px cut. ValueError for images of other shapes."""


class Lpips:
    """LPIPS from weights files, the calibration's being `lin0.model.1.weight` ...; ValueError for other layouts."""

    def __init__(self, backbone: str | Path, calibration: str | Path) -> None:
        self.backbone = Backbone(backbone)
        if self.backbone.layers is VGG19:
            raise ValueError(f"{backbone} holds VGG-19: LPIPS is made of AlexNet or VGG-16")
        linear = read_weights(calibration)
        self.linear = []
        for number, channels in enumerate(self.backbone.channels):
            found = linear.get(f"lin{number}.model.1.weight")
            if found is None or found.numel() != channels:
                raise ValueError(
                    f"{calibration}: lin{number}.model.1.weight for {channels} channels is missing: give the "
                    f"calibration that belongs to {backbone}"
                )
            self.linear.append(found.flatten())

    @torch.inference_mode()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8], crop: int = 0) -> float:
        """See `Distance`."""
        x_bchw = _normalised(_pair(a, b, crop) * 2 - 1, _LPIPS_MEAN, _LPIPS_STD)
        total = 0.0
        for features_bchw, linear in zip(self.backbone.activations(x_bchw), self.linear, strict=True):
            unit_bchw = features_bchw / (features_bchw.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference_chw = (unit_bchw[0] - unit_bchw[1]).square()
            total += float((difference_chw * linear[:, None, None]).sum(0).mean())
        return total


class Dists:
    """DISTS from weights files, the calibration's being `alpha` and `beta`; ValueError for other layouts.

    Images are compared in their own size, as super-resolution papers do; the authors' own script first shrinks those
    whose short side is above 256 px.
    """

    def __init__(self, backbone: str | Path, calibration: str | Path) -> None:
        self.backbone = Backbone(backbone)
        if self.backbone.layers is not VGG16:
            raise ValueError(f"{backbone} holds another network than VGG-16, of which DISTS is made")
        found = read_weights(calibration)
        self.channels = [3, *self.backbone.channels]
        for name in ("alpha", "beta"):
            if name not in found or found[name].numel() != sum(self.channels):
                raise ValueError(
                    f"{calibration}: {name} for {sum(self.channels)} channels is missing: give the authors' weights.pt"
                )
        total = found["alpha"].sum() + found["beta"].sum()
        self.texture, self.structure = (found[name].flatten() / total for name in ("alpha", "beta"))

    @torch.inference_mode()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8], crop: int = 0) -> float:
        """See `Distance`."""
        x_bchw = _pair(a, b, crop)
        features = [x_bchw, *self.backbone.activations(_normalised(x_bchw, IMAGENET_MEAN, IMAGENET_STD), _l2_pool)]
        alike = 0.0
        shares = (self.texture.split(self.channels), self.structure.split(self.channels))
        for (one_chw, other_chw), texture, structure in zip(features, *shares, strict=True):
            means = [x_chw.mean((1, 2), keepdim=True) for x_chw in (one_chw, other_chw)]
            residues = (one_chw - means[0], other_chw - means[1])
            alike += float((texture * _agreement(*means) + structure * _agreement(*residues)).sum())
        return 1 - alike


def _pair(a: NDArray[np.uint8], b: NDArray[np.uint8], crop: int) -> Tensor:
    """(2, 3, H, W), 0..1."""
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"images differ in size: {a.shape} and {b.shape}; crop to a multiple of the scale first")
    inside = slice(crop, a.shape[0] - crop), slice(crop, a.shape[1] - crop)
    return torch.stack([torch.tensor(image[inside]).permute(2, 0, 1).float() / 255 for image in (a, b)])


def _normalised(x_bchw: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (x_bchw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _agreement(one_chw: Tensor, other_chw: Tensor) -> Tensor:
    """(C,): twice the mean product over the sum of mean squares, 1 where both are equal."""
    product, one, other = ((a * b).mean((1, 2)) for a, b in ((one_chw, other_chw), (one_chw,) * 2, (other_chw,) * 2))
    return (2 * product + _STABLE) / (one + other + _STABLE)


def _l2_pool(x_bchw: Tensor, size: int, stride: int) -> Tensor:
    """The root of the mean square around every second pixel, by a Hann window of three instead of `size`."""
    hann = torch.tensor([0.25, 0.5, 0.25])
    kernel = (hann[:, None] * hann[None, :]).expand(x_bchw.shape[1], 1, 3, 3)
    return (F.conv2d(x_bchw.square(), kernel, stride=stride, padding=1, groups=x_bchw.shape[1]) + 1e-12).sqrt()
