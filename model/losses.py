"""Pixel losses by name, and the perceptual loss that may stand beside one.

Axes in tensor names: b batch, c channels, h height, w width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone import ALEXNET, IMAGENET_MEAN, IMAGENET_STD, Backbone

Loss = Callable[[Tensor, Tensor], Tensor]

STAGE_WEIGHTS = (0.1, 0.1, 1.0, 1.0, 1.0)
"""Of the last convolution of each of VGG's five stages, as Real-ESRGAN has them (arXiv 2107.10833)."""

CHARBONNIER_EPSILON = 1e-3
"""Where the Charbonnier loss turns from quadratic to linear, in image units of 0..1 (Lai et al., 2017)."""


def _charbonnier(pred: Tensor, target: Tensor) -> Tensor:
    return torch.sqrt((pred - target).square() + CHARBONNIER_EPSILON**2).mean()


LOSSES: dict[str, Loss] = {"l1": F.l1_loss, "l2": F.mse_loss, "charbonnier": _charbonnier}


def build_loss(name: str) -> Loss:
    """(pred, target) -> mean loss as a scalar tensor; ValueError for other names than in `LOSSES`."""
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is unknown: choose one of {', '.join(LOSSES)}")
    return LOSSES[name]


class Perceptual:
    """The mean absolute difference of VGG's features before their ReLU, summed over its stages.

    `backbone`: VGG-19 (as the papers have it) or VGG-16 in torchvision's layout. ValueError for another file, or for
    weights of stages that are not five.
    """

    def __init__(
        self, backbone: str | Path, device: torch.device, stage_weights: Sequence[float] = STAGE_WEIGHTS
    ) -> None:
        self.backbone = Backbone(backbone).to(device)
        if self.backbone.layers is ALEXNET:
            raise ValueError(f"{backbone} holds AlexNet: the perceptual loss is made of VGG-19 or VGG-16")
        if len(stage_weights) != len(self.backbone.channels):
            raise ValueError(f"stage_weights {list(stage_weights)} must be {len(self.backbone.channels)} numbers")
        self.stage_weights = tuple(stage_weights)
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
        )

    def __call__(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 twice -> a scalar; gradients reach the first only."""
        with torch.no_grad():
            wanted = self._features(target_bchw)
        pairs = zip(self._features(pred_bchw), wanted, self.stage_weights, strict=True)
        return torch.stack([weight * F.l1_loss(ours, theirs) for ours, theirs, weight in pairs if weight]).sum()

    def _features(self, x_bchw: Tensor) -> list[Tensor]:
        return self.backbone.activations((x_bchw - self.mean) / self.std, rectified=False)


def with_perceptual(pixel: Loss, perceptual: Perceptual, weight: float) -> Loss:
    """A pixel loss and `weight` times the perceptual one."""
    return lambda pred, target: pixel(pred, target) + weight * perceptual(pred, target)


def with_adversary(loss: Loss, adversary: Callable[[Tensor], Tensor]) -> Loss:
    """A loss and what a discriminator makes of the first image."""
    return lambda pred, target: loss(pred, target) + adversary(pred)
