"""High resolution to low: the ways in which a training pair's low-resolution side is made.

Each way computes one crop of the degraded image from the pixels it needs: `bicubic` alone, or a sequence of steps
(`degrade_steps`). A crop made by steps has the values that it has in the whole image, noise and sizes on the way (both
drawn for what is worked on) aside: a window around it is worked on, wide enough for every kernel, whose corner lies
on the grid of JPEG's blocks.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Discriminator, Tag

from data_prep.bicubic import Rounding, shrink_planes, source_box, to_uint8
from data_prep.degrade_steps import GRID_PX, Noise, Resize, Scene, Shrink, Size, Step, ways
from data_prep.image import Box


def _form(value: object) -> str:
    return "literal['bicubic']" if isinstance(value, str) else "tuple[step]"


Kind = Annotated[
    Annotated[Literal["bicubic"], Tag("literal['bicubic']")] | Annotated[tuple[Step, ...], Tag("tuple[step]")],
    Discriminator(_form),  # so that a fault is told of the form that was meant
]
"""What the settings say: the published way by its name, or steps."""


class Crop(NamedTuple):
    """A square of the low-resolution image: which of them, in its pixels."""

    top: int
    left: int
    side: int


class Degradation(Protocol):
    """How low-resolution crops are made.

    `size` is the whole image's (height, width), divisible by the scale.
    """

    def needs(self, size: Size, scale: int, crop: Crop) -> Box:
        """The box of high-resolution pixels that a crop is made of; the crop's own are among them."""
        ...

    def make(
        self, pixels: np.ndarray, size: Size, scale: int, crop: Crop, rounding: Rounding, seed: bytes
    ) -> np.ndarray:
        """(3, h, w) uint8, the box's pixels -> the crop as (3, side, side) float32, about 0..1.

        `seed` decides all that is left to chance.
        """
        ...


class Bicubic:
    """MATLAB's bicubic, as published."""

    def needs(self, size: Size, scale: int, crop: Crop) -> Box:
        """The crop's own pixels and those under the kernel around them."""
        top, left, side = crop
        return Box(*source_box(size, 1 / scale, top, left, side, side))

    def make(
        self, pixels: np.ndarray, size: Size, scale: int, crop: Crop, rounding: Rounding, seed: bytes
    ) -> np.ndarray:
        """The crop of the image shrunk.

        Without rounding, bicubic overshoots at edges: values may leave 0..1 a little, as in the published recipe.
        """
        top, left, side = crop
        low_res = shrink_planes(pixels, size, 1 / scale, top, left, side, side, rounding)
        return (low_res / 255.0).astype(np.float32)


class Steps:
    """A sequence of steps on a window around the crop."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.margins_px: dict[int, int] = {}

    def needs(self, size: Size, scale: int, crop: Crop) -> Box:
        """The window in high-resolution pixels."""
        return Box(*(scale * side for side in self._window(size, scale, crop)))

    def make(
        self, pixels: np.ndarray, size: Size, scale: int, crop: Crop, rounding: Rounding, seed: bytes
    ) -> np.ndarray:
        """The middle of the degraded window."""
        window = self._window(size, scale, crop)
        made = run(self.steps, pixels, (window.height, window.width), seed)
        top, left = crop.top - window.top, crop.left - window.left
        low_res = made[:, top : top + crop.side, left : left + crop.side]
        return (to_uint8(low_res) if rounding == "uint8" else low_res) / np.float32(255)

    def _window(self, size: Size, scale: int, crop: Crop) -> Box:
        """In low-resolution pixels."""
        if scale not in self.margins_px:
            self.margins_px[scale] = max(self._margin_px(way, scale) for way in ways(self.steps))
        margin = self.margins_px[scale]
        spans = []
        for side, start in zip(size, (crop.top, crop.left), strict=True):
            first = max(0, start - margin) // GRID_PX * GRID_PX
            stop = -(-(start + crop.side + margin) // GRID_PX) * GRID_PX
            spans.append((first, min(stop, side // scale) - first))
        (top, height), (left, width) = spans
        return Box(top, left, height, width)

    @staticmethod
    def _margin_px(way: Sequence[Step], scale: int) -> int:
        """How far a pixel reaches: steps before the shrinking work at the high resolution."""
        shrinks = [number for number, step in enumerate(way) if isinstance(step, Shrink)]
        before = sum(step.reach_px for step in way[: shrinks[0]]) if shrinks else 0
        return -(-before // scale) + sum(step.reach_px for step in way[shrinks[0] if shrinks else 0 :])


BICUBIC = Bicubic()


def degradation(kind: Kind) -> Degradation:
    """The way that the settings say."""
    return BICUBIC if kind == "bicubic" else Steps(kind)


def degrade(high_res: np.ndarray, scale: int, steps: tuple[Step, ...], seed: str) -> np.ndarray:
    """A whole image degraded: (H, W, 3) uint8 -> (H / scale, W / scale, 3) uint8.

    Or float32, about 0..255, where the last step is noise that is not cut, whatever the sample.
    """
    height, width = (side // scale for side in high_res.shape[:2])
    made = run(steps, high_res.transpose(2, 0, 1), (height, width), hashlib.sha256(seed.encode()).digest())
    uncut = all(way and isinstance(way[-1], Noise) and not way[-1].clip for way in ways(steps))
    return np.ascontiguousarray((made if uncut else to_uint8(made)).transpose(1, 2, 0))


def run(steps: tuple[Step, ...], pixels: np.ndarray, low_res: Size, seed: bytes) -> np.ndarray:
    """(3, h, w) uint8 -> (3, *low_res) float32 in 0..255, by the steps in turn."""
    scene = Scene(low_res, np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little"))))
    image = pixels.astype(np.float32)
    for step in steps:
        image = step(image, scene)
    return image


def check(kind: Kind, scale: int) -> None:
    """ValueError where steps do not arrive at the low resolution's size, or leave high and low resolution equal."""
    if kind == "bicubic":
        if scale == 1:
            raise ValueError("degradation 'bicubic' changes nothing at scale 1: list steps, such as noise or jpeg")
        return
    if not kind:
        raise ValueError("degradation has no steps: list some, such as noise or jpeg, or leave it out")
    for way in ways(kind):
        shrinks = [number for number, step in enumerate(way) if isinstance(step, Shrink)]
        resizes = [number for number, step in enumerate(way) if isinstance(step, Resize)]
        names = f"[{', '.join(step.step for step in way)}]"
        if len(shrinks) > 1 or (not shrinks and (scale > 1 or resizes)):
            raise ValueError(
                f"degradation {names} has {len(shrinks)} steps `shrink`: at scale {scale} it needs one, which makes "
                f"the low resolution's size"
            )
        if shrinks and (way[shrinks[0]].probability < 1 or max(resizes, default=0) > shrinks[0]):
            raise ValueError(
                f"degradation {names} does not end at the low resolution's size: take `shrink` always, and after "
                f"every `resize`"
            )
