"""Pixel losses by name."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]

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
