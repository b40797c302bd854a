"""Images of any size, depth and kind through a network; see `model.tiles` for how large ones are cut.

Axes in tensor names: b batch, c channels, h height, w width.
"""

import math
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.alpha import has_alpha, spread_colour
from model.blocks import UpscalingNetwork
from model.ensemble import ensemble as mean_of_turns
from model.ensemble import part
from model.memory import MEMORY_SHARE, fitting_tile, free_bytes, output_bytes
from model.tiles import Progress, Tiler

Level = TypeVar("Level", np.uint8, np.uint16)
LEVELS = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
"""Greatest value of the pixel types that are taken."""
Tile = int | Literal["auto"] | None
"""Side of tiles in low-resolution px; None: the whole image; auto: whole where it is likely to fit the free memory."""


class Upscaler:
    """A network and how images go through it. What one image taught about memory holds for those that follow."""

    def __init__(
        self,
        network: UpscalingNetwork,
        *,
        tile: Tile = None,
        overlap: int | None = None,
        batch: int = 1,
        ensemble: bool = False,
        precision: str = "fp32",
        may_shrink: bool = True,
        share: float | None = None,
    ) -> None:
        """Options as in `upscale`. `may_shrink` False: lack of memory is a MemoryError, reckoned before.

        `share`: of the free memory (None: `MEMORY_SHARE`, or all where tiles may not shrink) for the network.
        ValueError for a tile not above its overlap, no batch, or a network in fp16.
        """
        self.network, self.tile, self.overlap, self.batch = network, tile, overlap, batch
        self.ensemble, self.precision, self.may_shrink = ensemble, precision, may_shrink
        self.share = share or (MEMORY_SHARE if may_shrink else 1.0)
        self.most_px: int | None = None
        """The largest tile that may be tried, where memory ran out before; None: nothing is known."""
        self.tile_used: int | None = None
        """The side of the last image's tiles, px; None where it went through the network whole."""
        self._tiler(None if tile == "auto" else tile)

    @torch.inference_mode()
    def __call__(self, image: NDArray[Level], progress: Progress | None = None) -> NDArray[Level]:
        """An image as pixels; see `upscale`."""
        image = _checked(image)
        image = spread_colour(image) if image.ndim == 3 else image
        height, width = (side * self.network.scale for side in image.shape[:2])
        groups = _groups(image)
        tile = self.choose(image.shape[:2], np.atleast_3d(image).shape[2], image.dtype.itemsize)
        pixels = np.empty((height, width, *image.shape[2:]), image.dtype)
        for number, channels in enumerate(groups):
            plane_bchw = _planes(image, channels)
            out_bchw = self._upscaled(plane_bchw, tile, part(progress, number, len(groups)))
            _fill(np.atleast_3d(pixels)[..., channels], out_bchw[0])
            del out_bchw  # the next channels need its memory
        if has_alpha(np.atleast_3d(image).shape[2]) and len(groups) == 1:
            pixels[..., -1] = image[0, 0, -1]
        return pixels

    @torch.inference_mode()
    def of_tensor(self, low_res_bchw: Tensor, progress: Progress | None = None) -> Tensor:
        """(B, 3, H, W) in 0..1 -> (B, 3, scale H, scale W); see `upscale_tensor`."""
        images, _, height, width = low_res_bchw.shape
        tile = self.choose((images, height, width), 3, 0, low_res_bchw.device)
        return self._upscaled(low_res_bchw, tile, progress)

    def choose(
        self, size: tuple[int, ...], channels: int, pixel_bytes: int, place: torch.device | None = None
    ) -> int | None:
        """The tile for an image of this size, (H, W) or (B, H, W), or None for the whole.

        pixel_bytes: of a channel of the result; place: where the result lies (None: on the CPU). MemoryError where not
        even the smallest useful tiles fit, and where a tile that may not shrink does not.
        """
        most, tile = self.most_px, self.tile
        if tile == "auto" or not self.may_shrink:
            fitting = self._fitting(size, channels, pixel_bytes, place or torch.device("cpu"))
            if tile == "auto":
                tile = fitting
            elif fitting is not None and (tile is None or tile > fitting):
                raise MemoryError(_too_large(tile, size, fitting))
        assert tile is None or isinstance(tile, int)
        if most is not None and math.prod(size[-2:]) > most**2:
            tile = most if tile is None else min(tile, most)
        return tile

    def _fitting(self, size: tuple[int, ...], channels: int, pixel_bytes: int, place: torch.device) -> int | None:
        """The tile that fits the memory of the network's device, beside the result if that lies there as well."""
        device = self.network.conv_first.weight.device
        shape = (math.prod(size[:-1]), size[-1], channels)
        result_bytes = output_bytes(self.network.scale, shape, self.ensemble, pixel_bytes)
        if place.type != device.type:
            if result_bytes > (free := free_bytes(place)):
                raise MemoryError(
                    f"the result takes {result_bytes / 1e9:.3g} GB of memory, where {free / 1e9:.3g} GB are free: "
                    "free some, or cut the image into parts"
                )
            result_bytes = 0
        return fitting_tile(
            self.network,
            size,
            self._tiler(None).overlap,
            free_bytes(device),
            result_bytes,
            batch=self.batch,
            precision=self.precision,
            share=self.share,
        )

    def describe(self, tile: int) -> str:
        """Tiles of this side, and what they mean for the result."""
        return self._tiler(tile).describe()

    def _tiler(self, tile: int | None) -> Tiler:
        return Tiler(self.network, tile, self.overlap, self.batch, self.precision, self.may_shrink)

    def _upscaled(self, low_res_bchw: Tensor, tile: int | None, progress: Progress | None) -> Tensor:
        tiler = self._tiler(tile)
        asked = tiler.tile
        was_training = self.network.training
        self.network.eval()
        try:
            if self.ensemble:
                return mean_of_turns(tiler, low_res_bchw, progress)
            return tiler(low_res_bchw, progress)
        finally:
            self.network.train(was_training)
            self.batch = min(self.batch, tiler.batch)
            if tiler.tile != asked:
                self.most_px = tiler.tile
            is_cut = tiler.tile is not None and tiler.tile < max(low_res_bchw.shape[2:])
            self.tile_used = tiler.tile if is_cut else None


def _too_large(tile: int | None, size: tuple[int, ...], fitting: int) -> str:
    what = f"tiles of {tile} px" if tile else f"the whole image ({size[-1]} x {size[-2]} px)"
    return f"{what}, as asked for, may not fit the free memory: ask for tiles of at most {fitting} px, or free some"


def upscale(
    network: UpscalingNetwork,
    image: NDArray[Level],
    *,
    tile: Tile = None,
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

    `tile`: side in low-resolution px of the squares to work on, for large images, or auto: as free memory asks;
    neighbours share `overlap` px (default: 4 of the network's windows), in whose middle one fades into the next; both
    are rounded up to windows. Out of memory, the tile is halved (from the whole image, too). Tiles of HMANet, which
    attends across the whole image, are another answer. `batch`: tiles worked on at once. `ensemble`: the mean over the
    image's 8 flips and turns. `precision`: fp32, bf16 or auto (bf16 where the device has it). `device`: where to work;
    the network is moved there, by default it stays where it is. `progress` is told the tiles done and their number.
    ValueError for another dtype or shape, a tile not above its overlap, or a network in fp16 (bf16 is good);
    MemoryError where no tile fits. For many images make an `Upscaler`, which remembers what fits.
    """
    if device is not None:
        network.to(device)
    options: dict[str, Any] = {"tile": tile, "overlap": overlap, "batch": batch, "ensemble": ensemble}
    return Upscaler(network, precision=precision, **options)(image, progress)


def upscale_tensor(
    network: UpscalingNetwork,
    low_res_bchw: Tensor,
    *,
    tile: Tile = None,
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
    options: dict[str, Any] = {"tile": tile, "overlap": overlap, "batch": batch, "ensemble": ensemble}
    return Upscaler(network, precision=precision, **options).of_tensor(low_res_bchw, progress)


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


def _fill(pixels_hwc: NDArray[Any], out_chw: Tensor) -> None:
    """Write what the network made as pixels; a single channel gets the mean of three. Overwrites `out_chw`."""
    greatest = LEVELS[pixels_hwc.dtype]
    levels_chw = out_chw if pixels_hwc.shape[2] == 3 else out_chw.mean(0, keepdim=True)
    levels_chw.mul_(greatest).round_().clamp_(0, greatest)
    for channel, levels_hw in enumerate(levels_chw):
        pixels_hwc[..., channel] = levels_hw.numpy()
