"""AlexNet, VGG-16 and VGG-19 as distances of images use them: from torchvision's files, giving inner activations.

Axes in tensor names: b batch, c channels, h height, w width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.weights import read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images in 0..1 that these networks were trained on."""


@dataclass(frozen=True)
class Layer:
    """A convolution: its number in torchvision's file, and what is done before and after it."""

    number: int
    stride: int = 1
    padding: int = 1
    pool: tuple[int, int] | None = None
    """(size, stride) of the max pooling before it."""
    is_tap: bool = False
    """Whether its activation is compared."""


ALEXNET = (
    Layer(0, stride=4, padding=2, is_tap=True),
    Layer(3, padding=2, pool=(3, 2), is_tap=True),
    Layer(6, pool=(3, 2), is_tap=True),
    Layer(8, is_tap=True),
    Layer(10, is_tap=True),
)
VGG16 = tuple(
    Layer(number, pool=(2, 2) if number in (5, 10, 17, 24) else None, is_tap=number in (2, 7, 14, 21, 28))
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
)
VGG19 = tuple(
    Layer(number, pool=(2, 2) if number in (5, 10, 19, 28) else None, is_tap=number in (2, 7, 16, 25, 34))
    for number in (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
)


class Backbone:
    """The convolutions of a weights file; ValueError for files of another layout. Which network shows in the shapes."""

    def __init__(self, path: str | Path) -> None:
        weights = read_weights(path)
        self.layers = _layers_of(weights, path)
        names = [f"features.{layer.number}.{name}" for layer in self.layers for name in ("weight", "bias")]
        self.weights = {name: weights[name] for name in names}  # without the classifier, most of the file

    @property
    def channels(self) -> list[int]:
        """Of each activation that is compared, first to last."""
        return [len(self.weights[f"features.{layer.number}.weight"]) for layer in self.layers if layer.is_tap]

    def to(self, device: torch.device) -> "Backbone":
        """Itself, its weights on a device."""
        self.weights = {name: value.to(device) for name, value in self.weights.items()}
        return self

    def activations(
        self, x_bchw: Tensor, pool: Callable[..., Tensor] = F.max_pool2d, *, rectified: bool = True
    ) -> list[Tensor]:
        """What is compared, first to last: after its ReLU, or before. `pool(x, size, stride)` stands between stages."""
        taps = []
        for layer in self.layers:
            if layer.pool is not None:
                x_bchw = pool(x_bchw, *layer.pool)
            weight, bias = (self.weights[f"features.{layer.number}.{name}"] for name in ("weight", "bias"))
            raw_bchw = F.conv2d(x_bchw, weight, bias, layer.stride, layer.padding)
            x_bchw = F.relu(raw_bchw)
            if layer.is_tap:
                taps.append(x_bchw if rectified else raw_bchw)
        return taps


def _layers_of(weights: Mapping[str, Tensor], path: str | Path) -> tuple[Layer, ...]:
    for layers in (ALEXNET, VGG16, VGG19):
        first = weights.get("features.0.weight")
        side = 11 if layers is ALEXNET else 3
        if (
            first is not None
            and first.shape[2] == side
            and all(f"features.{layer.number}.{name}" in weights for layer in layers for name in ("weight", "bias"))
        ):
            return layers
    raise ValueError(f"{path} holds neither AlexNet, VGG-16 nor VGG-19 in torchvision's layout (features.0.weight ...)")
