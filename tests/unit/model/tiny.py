"""Networks small enough for unit tests."""

from typing import Any

import torch

from model import build
from model.blocks import UpscalingNetwork

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "depths": (2,),
    "num_heads": (2,),
    "window_size": 8,
    "squeeze_factor": 6,
    "drop_path_rate": 0.0,
}


TINY_HMANET: dict[str, Any] = {
    "embed_dim": 32,
    "depths": (2,),
    "num_heads": (2,),
    "window_size": 8,
    "interval_size": 2,
    "drop_path_rate": 0.0,
}


TINY_UNET: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "window_size": 4,
    "refinement": 1,
    "drop_path_rate": 0.0,
}


def tiny(scale: int = 2, seed: int = 0, **overrides: Any) -> UpscalingNetwork:
    torch.manual_seed(seed)
    return build("hat", scale, **(TINY | overrides)).eval()


def tiny_hmanet(scale: int = 2, seed: int = 0, **overrides: Any) -> UpscalingNetwork:
    torch.manual_seed(seed)
    return build("hmanet", scale, **(TINY_HMANET | overrides)).eval()


def tiny_unet(scale: int = 1, seed: int = 0, **overrides: Any) -> UpscalingNetwork:
    torch.manual_seed(seed)
    return build("hat_unet", scale, **(TINY_UNET | overrides)).eval()
