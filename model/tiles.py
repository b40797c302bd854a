"""An image in pieces that fit the memory, joined so that no seam shows.

The image is padded once and tiles begin at multiples of the window, so that windows lie in a tile as they lie in
the whole image: what differs is only what reaches beyond a tile, and near its border that is left out.

Axes in tensor names: b batch, c channels, h height, w width.
"""

import logging
from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from model.blocks import UpscalingNetwork
from model.memory import is_out_of_memory, smallest_tile
from model.precision import computing

OVERLAP_WINDOWS = 4
"""Default overlap of neighbouring tiles, in windows: attention hands on what it sees from window to window."""

Progress = Callable[[int, int], None]
"""Called with the tiles done and their number, which starts anew where memory asks for smaller tiles."""

log = logging.getLogger(__name__)


class Tiler:
    """Upscales images whole or in tiles; where memory runs out it goes on with smaller pieces, and stays there."""

    def __init__(
        self,
        network: UpscalingNetwork,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
        precision: str = "fp32",
        may_shrink: bool = True,
    ) -> None:
        """`tile`: side in low-resolution px, None for the whole image; `batch`: tiles worked on at once.

        `may_shrink` False: a tile smaller than asked for would be another answer, so that lack of memory is an error.
        Tile and overlap (None: `OVERLAP_WINDOWS`) are rounded up to windows. ValueError for a tile not above its
        overlap, no batch, or a network in fp16.
        """
        self.window = network.multiple
        self.tile = None if tile is None else _up(tile, self.window)
        overlap = OVERLAP_WINDOWS * self.window if overlap is None else overlap
        self.overlap = _up(overlap, self.window)
        if overlap < 0 or (self.tile is not None and self.tile <= self.overlap):
            raise ValueError(
                f"tile={tile} px with overlap={overlap} px, in windows of {self.window} px: "
                "the tile must be larger than its overlap"
            )
        if batch < 1:
            raise ValueError(f"batch={batch}: at least one tile must be worked on at once")
        self.network, self.batch, self.precision, self.may_shrink = network, batch, precision, may_shrink
        self.device, self.dtype = network.conv_first.weight.device, network.conv_first.weight.dtype
        if self.dtype == torch.float16:
            raise ValueError("the network is in float16, which its activations overflow: call .float() or .bfloat16()")

    def __call__(self, low_res_bchw: Tensor, progress: Progress | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 3, scale H, scale W) on the same device; MemoryError where no piece is small enough."""
        height, width = (side * self.network.scale for side in low_res_bchw.shape[2:])
        padded_bchw = padded(low_res_bchw, self.window)
        while True:
            try:
                return self._pieces(padded_bchw, progress)[:, :, :height, :width]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            # Beyond the `except`: there the error still holds the frames whose tensors filled the memory.
            self._shrink(max(padded_bchw.shape[2:]), reason)

    def _shrink(self, side: int, reason: str) -> None:
        """Halve the batch where there are several tiles, then the tile, down to the smallest that is useful."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tile, smallest = min(self.tile or side, side), smallest_tile(self.overlap, self.window)
        if self.batch > 1 and tile < side:
            self.batch //= 2
        elif not self.may_shrink:
            asked = f"tiles of {tile} px" if self.tile else "the whole image"
            raise MemoryError(f"out of memory with {asked}, as asked for: ask for smaller tiles ({reason})")
        elif tile > smallest:
            self.tile = max(_up(tile // 2, self.window), smallest)
        else:
            raise MemoryError(
                f"out of memory even with tiles of {tile} px that overlap by {self.overlap} px: "
                f"choose a smaller overlap, or free some memory ({reason})"
            )
        log.warning("out of memory: going on with %s, %d at once", self.describe(), self.batch)

    def describe(self) -> str:
        """The tiles, and what they mean for the result."""
        tiles = f"tiles of {self.tile} px that overlap by {self.overlap} px"
        if self.network.arch == "hmanet":
            return (
                f"{tiles} (WARNING: HMANet attends across the whole image, so tiles are ANOTHER ANSWER than the whole)"
            )
        return f"{tiles} (what is farther away than they overlap is not seen)"

    def _pieces(self, x_bchw: Tensor, progress: Progress | None) -> Tensor:
        """An image of whole windows: all tiles have one size, and are begun anew at every call."""
        scale = self.network.scale
        rows, columns = (_axis(side, self.tile or side, self.overlap, scale) for side in x_bchw.shape[2:])
        tiles = list(product(rows, columns))
        if len(tiles) == 1:
            out_bchw = self._run(x_bchw)
            _report(progress, 1, 1)
            return out_bchw
        images, _, height, width = x_bchw.shape
        total_bchw = x_bchw.new_zeros(images, 3, height * scale, width * scale)
        for first in range(0, len(tiles), self.batch):
            together = tiles[first : first + self.batch]
            out_bchw = self._run(torch.cat([x_bchw[:, :, row.low_res, column.low_res] for row, column in together]))
            for (row, column), piece_bchw in zip(together, out_bchw.split(images), strict=True):
                faded_bchw = piece_bchw * row.fade.to(piece_bchw)[:, None] * column.fade.to(piece_bchw)
                total_bchw[:, :, row.high_res, column.high_res] += faded_bchw
            _report(progress, first + len(together), len(tiles))
        return total_bchw

    def _run(self, x_bchw: Tensor) -> Tensor:
        with computing(self.precision, self.device):
            return self.network(x_bchw.to(self.device, self.dtype)).to(x_bchw)


class _Span:
    """A tile along one axis: its pixels, and the weights of its output."""

    def __init__(self, start: int, tile: int, scale: int, fade: Tensor) -> None:
        self.low_res = slice(start, start + tile)
        self.high_res = slice(start * scale, (start + tile) * scale)
        self.fade = fade


def _axis(length: int, tile: int, overlap: int, scale: int) -> list[_Span]:
    """Tiles along one axis, the last one ending with the image; their weights sum to 1 at every pixel."""
    tile = min(tile, length)
    last = length - tile
    starts = [*range(0, last, tile - overlap), last] if last else [0]
    fades = [_fade(start, tile, length, overlap, scale) for start in starts]
    total = torch.zeros(length * scale, dtype=torch.float64)
    for start, fade in zip(starts, fades, strict=True):
        total[start * scale : (start + tile) * scale] += fade
    return [
        _Span(start, tile, scale, fade / total[start * scale : (start + tile) * scale])
        for start, fade in zip(starts, fades, strict=True)
    ]


def _fade(start: int, tile: int, length: int, overlap: int, scale: int) -> Tensor:
    """Weights of a tile's output pixels along one axis, 0..1, before they are made to sum to 1.

    At an inner border 3/8 of the overlap are dropped, since convolutions and windows saw the tile's end there;
    over the middle quarter the weight rises to 1. At the image's own border it stays 1.
    """
    position = torch.arange(tile * scale, dtype=torch.float64)
    before = position if start > 0 else torch.full_like(position, torch.inf)
    after = position.flip(0) if start + tile < length else torch.full_like(position, torch.inf)
    dropped = overlap * scale * 3 // 8
    rise = overlap * scale - 2 * dropped + 1
    return ((torch.minimum(before, after) - dropped + 1) / rise).clamp(0, 1)


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def padded(x_bchw: Tensor, multiple: int) -> Tensor:
    """The image, reflected at the right and the bottom to the next multiples, as often as it takes."""
    rows, columns = (_reflected(side, multiple).to(x_bchw.device) for side in x_bchw.shape[2:])
    padded_bchw = x_bchw[:, :, rows]
    return padded_bchw[:, :, :, columns]


def _reflected(length: int, multiple: int) -> Tensor:
    """Indices 0 .. length - 1 and on by reflection to the next multiple."""
    return torch.from_numpy(np.pad(np.arange(length), (0, -length % multiple), mode="reflect"))
