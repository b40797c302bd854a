"""Images of any size, depth and kind through a network; see `model.tiles` for how large ones are cut.

Axes in tensor names: b batch, c channels, h height, w width.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.alpha import has_alpha, spread_colour
from model.blocks import UpscalingNetwork
from model.ensemble import ensemble as mean_of_turns
from model.ensemble import part
from model.tiles import Progress, Tiler

Level = TypeVar("Level", np.uint8, np.uint16)
LEVELS = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
"""Greatest value of the pixel types that are taken."""


def upscale(
    network: UpscalingNetwork,
    image: NDArray[Level],
    *,
    tile: int | None = None,
    overlap: int | None = None,
    batch: int = 1,
    ensemble: bool = False,
    precision: str = "fp32",
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> NDArray[Level]:
    """An image (H, W) or (H, W, C) -> (scale H, scale W) or (scale H, scale W, C), of the same type.

    uint8 or uint16; C is 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGB and alpha). Values are rounded half to
    even and clipped. Gray goes through the network as three equal channels, whose mean is taken; so does alpha.
    Wholly transparent pixels take the colour of the nearest that is seen, or their own would reach the rim of it.

    `tile`: side in low-resolution px of the squares to work on, for large images; neighbours share `overlap` px
    (default: 4 of the network's windows), in whose middle one fades into the next; both are rounded up to windows.
    Out of memory, the tile is halved (from the whole image, too). Tiles of HMANet, which attends across the whole
    image, are another answer. `batch`: tiles worked on at once. `ensemble`: the mean over the image's
    8 flips and turns. `precision`: fp32, bf16 or auto (bf16 where the device has it). `device`: where to work; the
    network is moved there, by default it stays where it is. `progress` is told the tiles done and their number.
    ValueError for another dtype or shape, a tile not above its overlap, or a network in fp16 (bf16 is good);
    MemoryError where no tile fits.
    """
    image = _checked(image)
    image = spread_colour(image) if image.ndim == 3 else image
    if device is not None:
        network.to(device)
    planes = [_planes(image, channels) for channels in _groups(image)]
    outputs = []
    for number, plane_bchw in enumerate(planes):
        options: dict[str, Any] = {"tile": tile, "overlap": overlap, "batch": batch, "ensemble": ensemble}
        options |= {"precision": precision, "progress": part(progress, number, len(planes))}
        outputs.append(upscale_tensor(network, plane_bchw, **options))
    return _pixels(outputs, image)


@torch.inference_mode()
def upscale_tensor(
    network: UpscalingNetwork,
    low_res_bchw: Tensor,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    batch: int = 1,
    ensemble: bool = False,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Tensor:
    """(B, 3, H, W) in 0..1 -> (B, 3, scale H, scale W), not clipped; any H and W, also below a window.

    Options as in `upscale`. The result is where the input is; only tiles go to the network's device. Works in
    eval mode and puts the network back in the mode it was in.
    """
    tiler = Tiler(network, tile, overlap, batch, precision)
    was_training = network.training
    network.eval()
    try:
        return mean_of_turns(tiler, low_res_bchw, progress) if ensemble else tiler(low_res_bchw, progress)
    finally:
        network.train(was_training)


def _checked(image: NDArray[Any]) -> NDArray[Any]:
    """The image as (H, W, C) in native byte order."""
    dtype = image.dtype.newbyteorder("=")
    if dtype not in LEVELS or image.ndim not in (2, 3) or not image.size or image.shape[2:] > (4,):
        raise ValueError(
            f"expected a uint8 or uint16 image (H, W) or (H, W, 1 to 4 channels), got {image.dtype} {image.shape}"
        )
    return image.astype(dtype, copy=False)


def _groups(image: NDArray[Any]) -> list[slice]:
    """Channels that go through the network together: the colour, then alpha unless it is the same everywhere."""
    channels = 1 if image.ndim == 2 else image.shape[2]
    colour = slice(0, 3 if channels >= 3 else 1)
    alpha = slice(channels - 1, channels)
    return [colour, alpha] if has_alpha(channels) and np.ptp(image[..., -1]) else [colour]


def _planes(image: NDArray[Any], channels: slice) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    x_hwc = torch.from_numpy(np.atleast_3d(image)[..., channels].astype(np.float32)) / LEVELS[image.dtype]
    return x_hwc.permute(2, 0, 1).expand(3, -1, -1)[None]


def _pixels(outputs: list[Tensor], image: NDArray[Any]) -> NDArray[Any]:
    """What came of the colour, and of alpha if it went through, as pixels like the image's."""
    greatest = LEVELS[image.dtype]
    channels = 1 if image.ndim == 2 else image.shape[2]
    colour_chw = outputs[0][0] if channels >= 3 else outputs[0][0].mean(0, keepdim=True)
    parts = [colour_chw, *(alpha[0].mean(0, keepdim=True) for alpha in outputs[1:])]
    levels_chw = (torch.cat(parts) * greatest).round().clamp(0, greatest)
    pixels = np.ascontiguousarray(levels_chw.permute(1, 2, 0).numpy().astype(image.dtype))
    if has_alpha(channels) and len(outputs) == 1:
        constant = np.full_like(pixels[..., :1], image[0, 0, -1])
        pixels = np.concatenate([pixels, constant], axis=2)
    return pixels.reshape(pixels.shape[:2] + image.shape[2:])
