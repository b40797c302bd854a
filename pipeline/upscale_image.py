"""One picture enlarged: colour by the network, alpha as asked, and at the end to the size that is wanted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_prep.bicubic import imresize
from model.alpha import has_alpha, spread_colour
from model.picture import LARGEST_PX

LARGEST_OUTSCALE = 1000
Alpha = Literal["network", "bicubic", "drop"]
Network = Callable[[NDArray[Any]], NDArray[Any]]
"""Pixels (H, W, C) -> (scale H, scale W, C) of the same type."""


@dataclass(frozen=True)
class Wanted:
    """What results are to be like: size, where it is not the network's scale times the image's, alpha, quality."""

    outscale: float | None = None
    """Times the image's sides."""
    width: int | None = None
    height: int | None = None
    """px; the other side follows where one is given alone."""
    alpha: str = "network"
    """Enlarged by the network or by bicubic, or dropped: the colours stay, as if everything were opaque."""
    quality: int | None = None
    """1 to 100, of JPEG and WebP; see `model.picture.write_picture`."""

    def __post_init__(self) -> None:
        if self.alpha not in get_args(Alpha):
            raise ValueError(f"--alpha {self.alpha}: choose one of {', '.join(get_args(Alpha))}")
        if self.outscale is not None and (self.width or self.height):
            raise ValueError("--outscale and --width or --height are two sizes: give one of them")
        if self.outscale is not None and not 0 < self.outscale <= LARGEST_OUTSCALE:
            raise ValueError(f"--outscale {self.outscale}: it must be a positive number, at most {LARGEST_OUTSCALE}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: it goes from 1 to 100")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side < 1:
                raise ValueError(f"--{name} {side}: it must be at least 1 px")

    def size(self, size: tuple[int, int], scale: int) -> tuple[int, int]:
        """(height, width) of the result of an image of this size. ValueError where it is too large."""
        height, width = size
        if self.width is not None or self.height is not None:
            wide = self.width or _rounded(width * (self.height or 0) / height)
            high = self.height or _rounded(height * (self.width or 0) / width)
        else:
            factor = scale if self.outscale is None else self.outscale
            high, wide = _rounded(height * factor), _rounded(width * factor)
        if high * wide > LARGEST_PX:
            raise ValueError(
                f"the result would have {wide} x {high} px, of at most {LARGEST_PX}: choose a smaller size"
            )
        return high, wide


def _rounded(length: float) -> int:
    """To whole px, half upwards; at least one."""
    return max(math.floor(length + 0.5), 1)


def enlarge(pixels: NDArray[Any], network: Network, scale: int, wanted: Wanted) -> NDArray[Any]:
    """Pixels (H, W, C), uint8 or uint16, in the size that is wanted: by the network, then by one resize if need be.

    That is MATLAB's bicubic. With `alpha="bicubic"` alpha goes to the end in one resize, past the network.
    """
    size = wanted.size(pixels.shape[:2], scale)
    alpha = pixels[..., -1:] if has_alpha(pixels.shape[2]) else None
    if alpha is None or wanted.alpha == "network":
        return resized(network(pixels), size)
    colour = pixels[..., :-1] if wanted.alpha == "drop" else spread_colour(pixels)[..., :-1]
    large = resized(network(np.ascontiguousarray(colour)), size)
    return large if wanted.alpha == "drop" else np.concatenate([large, resized(alpha, size)], axis=2)


def resized(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Pixels (H, W, C), uint8 or uint16, by MATLAB's bicubic, which rounds 8 bits between its passes, as (h, w, C)."""
    if pixels.shape[:2] == size:
        return pixels
    planes = np.moveaxis(pixels, 2, 0)  # one by one: sums are in float64
    return np.stack([_plane_resized(np.ascontiguousarray(plane), size) for plane in planes], axis=2)


def _plane_resized(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    if plane.dtype == np.uint8:
        return imresize(plane, None, size=size)
    exact = imresize(plane.astype(np.float64), None, rounding="float", size=size)
    return np.clip(np.floor(exact + 0.5), 0, np.iinfo(plane.dtype).max).astype(plane.dtype)
