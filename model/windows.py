"""How an image is cut into windows, and the numbers that go with it: position indices and shift masks.

Axes in tensor names: b batch, h height, w width, c channels, y/x row/column of a window in the image, i/j row
and column inside a window, n tokens (queries) of a window, m keys a window sees, g kinds of mask.
Images are (B, H, W, C), windows (B, Y, X, I, J, C).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = -100.0
"""What the published shift mask adds to a forbidden score: finite, so the weights have felt it."""


def window_index(window_size: int) -> Tensor:
    """(N, N) int64: for query n and key m the row of the (2 window - 1)**2 bias table (as in Swin)."""
    return grid_rows(window_size, window_size, torch.device("cpu"), 0, window_size**2)


def grid_rows(height: int, width: int, device: torch.device, first: int, stop: int) -> Tensor:
    """(stop - first, N) int64: for queries of a height x width grid and key m the row of its table of offsets.

    The table has (2 height - 1) x (2 width - 1) rows, from the most negative offset on.
    """
    query = torch.arange(first, stop, device=device)[:, None]
    key = torch.arange(height * width, device=device)[None, :]
    row = query // width - key // width + height - 1
    column = query % width - key % width + width - 1
    return row * (2 * width - 1) + column


def overlap_index(window_size: int, overlap_size: int) -> Tensor:
    """(N, M) int64: the published rows of the (window + overlap - 1)**2 bias table of overlapping attention.

    The published formula shifts offsets by window - overlap + 1 instead of window - 1, so the rows start
    below zero and reach the end of the table by wrap-around. Published weights were trained with it: kept.
    """
    offset = torch.arange(overlap_size)[None, :] - torch.arange(window_size)[:, None]
    offset = offset + window_size - overlap_size + 1
    index_nynx = offset[:, None, :, None] * (window_size + overlap_size - 1) + offset[None, :, None, :]
    return index_nynx.flatten(2, 3).flatten(0, 1)


def shift_masks(window_size: int) -> Tensor:
    """(3, N, N) float32: added to the scores of shifted windows in the last row, the last column, the corner.

    After a cyclic shift by half a window only these windows hold tokens from opposite image borders, so
    three masks serve every image size. All other windows need none.
    """
    wrapped = torch.arange(window_size) >= window_size - window_size // 2
    row_n = wrapped.repeat_interleave(window_size)
    column_n = wrapped.repeat(window_size)
    row_nn = row_n[:, None] != row_n[None, :]
    column_nn = column_n[:, None] != column_n[None, :]
    return torch.stack([row_nn, column_nn, row_nn | column_nn]).float() * MASKED


class Cut(Protocol):
    """A way to cut an image (B, H, W, C) into windows (B, Y, X, I, J, C) without copying."""

    @property
    def rim(self) -> int:
        """Pixels by which the keys' windows reach over the queries' on every side; zeros beyond the image."""

    def windows(self, x_bhwc: Tensor) -> Tensor:
        """A view of the image's memory."""

    def key_windows(self, x_bhwc: Tensor) -> Tensor:
        """A view of the memory of an image that has `rim` more pixels on every side."""

    def join(self, x_byxijc: Tensor) -> Tensor:
        """The image (B, H, W, C) of given windows."""


@dataclass(frozen=True)
class Squares:
    """Squares of neighbouring pixels."""

    side: int
    """Side of a window, px."""
    rim: int = 0
    """See `Cut`."""

    def windows(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, Y, X, I, J, C); H and W must be multiples of the side."""
        x_byiwc = x_bhwc.unflatten(1, (-1, self.side))
        x_byixjc = x_byiwc.unflatten(3, (-1, self.side))
        return x_byixjc.permute(0, 1, 3, 2, 4, 5)

    def key_windows(self, x_bhwc: Tensor) -> Tensor:
        """(B, H + 2 rim, W + 2 rim, C) -> (B, Y, X, I + 2 rim, J + 2 rim, C)."""
        if not self.rim:
            return self.windows(x_bhwc)
        x_bywci = x_bhwc.unfold(1, self.side + 2 * self.rim, self.side)
        x_byxcij = x_bywci.unfold(2, self.side + 2 * self.rim, self.side)
        return x_byxcij.permute(0, 1, 2, 4, 5, 3)

    def join(self, x_byxijc: Tensor) -> Tensor:
        """(B, Y, X, I, J, C) -> (B, H, W, C)."""
        x_byixjc = x_byxijc.permute(0, 1, 3, 2, 4, 5)
        x_byiwc = x_byixjc.flatten(3, 4)
        return x_byiwc.flatten(1, 2)


@dataclass(frozen=True)
class Grids:
    """Pixels `interval` apart in both directions, all over the image: interval x interval grids."""

    interval: int
    """Distance of neighbours, px."""
    rim: int = 0
    """Always 0."""

    def windows(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, Y, X, I, J, C); H and W must be multiples of the interval."""
        x_biywc = x_bhwc.unflatten(1, (-1, self.interval))
        x_biyjxc = x_biywc.unflatten(3, (-1, self.interval))
        return x_biyjxc.permute(0, 2, 4, 1, 3, 5)

    def key_windows(self, x_bhwc: Tensor) -> Tensor:
        """As `windows`."""
        return self.windows(x_bhwc)

    def join(self, x_byxijc: Tensor) -> Tensor:
        """(B, Y, X, I, J, C) -> (B, H, W, C)."""
        x_biyjxc = x_byxijc.permute(0, 3, 1, 4, 2, 5)
        x_biywc = x_biyjxc.flatten(3, 4)
        return x_biywc.flatten(1, 2)


@dataclass(frozen=True)
class Runs:
    """Runs of side**2 pixels that follow each other along the rows (a quirk of HMANet, see there)."""

    side: int
    """Root of the number of pixels, px."""
    rim: int = 0
    """Always 0."""

    def windows(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, Y, X, I, J, C), Y and X as if they were squares; of contiguous images only a view."""
        rows, columns = x_bhwc.shape[1] // self.side, x_bhwc.shape[2] // self.side
        return x_bhwc.flatten(1, 2).unflatten(1, (rows, columns, self.side, self.side))

    def key_windows(self, x_bhwc: Tensor) -> Tensor:
        """As `windows`."""
        return self.windows(x_bhwc)

    def join(self, x_byxijc: Tensor) -> Tensor:
        """(B, Y, X, I, J, C) -> (B, H, W, C)."""
        height, width = x_byxijc.shape[1] * self.side, x_byxijc.shape[2] * self.side
        return x_byxijc.flatten(1, 4).unflatten(1, (height, width))


def key_image(x_bhwc: Tensor, cut: Cut) -> Tensor:
    """The image with the zeros around it that `cut.key_windows` asks for."""
    return F.pad(x_bhwc, (0, 0) + (cut.rim,) * 4) if cut.rim else x_bhwc
