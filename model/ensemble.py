"""The x8 self-ensemble: the mean over an image's flips and turns, each turned back (Timofte et al., 2016).

Axes in tensor names: b batch, c channels, h height, w width.
"""

from collections.abc import Callable
from itertools import product

from torch import Tensor

from model.tiles import Progress

NUM_TURNS = 8

Upscale = Callable[[Tensor, Progress | None], Tensor]


def ensemble(upscale: Upscale, low_res_bchw: Tensor, progress: Progress | None = None) -> Tensor:
    """The mean of `upscale` over the 8 flips and transpositions of (B, 3, H, W)."""
    total_bchw: Tensor | None = None
    for number, turn in enumerate(product((False, True), repeat=3)):
        out_bchw = _turned_back(upscale(_turned(low_res_bchw, turn), part(progress, number, NUM_TURNS)), turn)
        total_bchw = out_bchw if total_bchw is None else total_bchw.add_(out_bchw)
        del out_bchw  # the next turn needs its memory
    assert total_bchw is not None
    return total_bchw.div_(NUM_TURNS)


def _turned(x_bchw: Tensor, turn: tuple[bool, ...]) -> Tensor:
    transposed, vertical, horizontal = turn
    x_bchw = x_bchw.transpose(2, 3) if transposed else x_bchw
    return x_bchw.flip([axis for axis, flipped in ((2, vertical), (3, horizontal)) if flipped])


def _turned_back(x_bchw: Tensor, turn: tuple[bool, ...]) -> Tensor:
    transposed, vertical, horizontal = turn
    x_bchw = x_bchw.flip([axis for axis, flipped in ((2, vertical), (3, horizontal)) if flipped])
    return x_bchw.transpose(2, 3) if transposed else x_bchw


def part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one of `count` equal parts, in terms of all of them."""
    if progress is None:
        return None
    whole = progress
    return lambda done, total: whole(number * total + done, count * total)
