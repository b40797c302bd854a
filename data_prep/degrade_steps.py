"""Steps that a degradation is put together of, as settings: blur, noise, JPEG, changes of size, and choices between.

A step works on an image of (3, h, w) float32 in 0..255 and draws what is left open from the generator it is given.
They are those of Real-ESRGAN (arXiv 2107.10833); `configs/recipe/real.yaml` follows its second-order degradation.
"""

import io
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from data_prep.bicubic import imresize, to_uint8

Size = tuple[int, int]
Range = float | tuple[float, float]
"""A number, or the lowest and highest of numbers that are drawn evenly."""

GRID_PX = 16
"""Side of what JPEG compresses together where chroma has half the size."""
MOST_SIDE = 101
"""Of a blur's kernel, in pixels."""
_FILTERS = {
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class Scene(NamedTuple):
    """What a step knows besides the image."""

    low_res: Size
    """(height, width) to arrive at."""
    rng: np.random.Generator


class _Step(BaseModel):
    """What all steps have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: float = Field(1.0, gt=0, le=1, description="share of the samples that take the step")

    def __call__(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        """The image after the step, or the image itself where chance leaves it out."""
        taken = self.probability == 1 or scene.rng.random() < self.probability
        return self._apply(image, scene) if taken else image

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        raise NotImplementedError

    @property
    def reach_px(self) -> int:
        """How many pixels away what a pixel becomes may depend on, at the size that the step works at."""
        return 0


def draw(of: Range, rng: np.random.Generator) -> float:
    """The number, or one between the two."""
    return float(of) if isinstance(of, (int, float)) else float(rng.uniform(*of))


def _between(least: float, most: float) -> AfterValidator:
    """Of a field: its number, or both of its numbers, must lie there."""

    def check(of: Any, info: ValidationInfo) -> Any:
        _check_range(str(info.field_name), of, least, most)
        return of

    return AfterValidator(check)


def _check_range(name: str, of: Range, least: float, most: float) -> None:
    low, high = (of, of) if isinstance(of, (int, float)) else of
    if not least <= low <= high <= most:
        shown = f"{low:g}" if low == high else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} {shown} must lie in {least:g}..{most:g}, the lower end first: correct it")


class _Grain(_Step):
    """Noise, of each channel or the same in all."""

    gray: float = Field(0.0, ge=0, le=1, description="share of the samples whose channels get the same noise")

    def _planes(self, image: np.ndarray, rng: np.random.Generator) -> int:
        """How many planes of noise the sample gets."""
        return 1 if self.gray and rng.random() < self.gray else image.shape[0]


class Noise(_Grain):
    """Gaussian noise."""

    step: Literal["noise"]
    sigma: Annotated[Range, _between(0, 255)] = Field(
        description="standard deviation, of 255; two numbers: drawn between them"
    )
    clip: bool = Field(
        False,
        description="cut to 0..255, as image files are; the last step's, uncut, is judged uncut and unrounded, as in "
        "the papers on denoising",
    )

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        sigma, planes = draw(self.sigma, scene.rng), self._planes(image, scene.rng)
        noisy = image + np.float32(sigma) * scene.rng.standard_normal((planes, *image.shape[1:]), np.float32)
        return noisy.clip(0, 255) if self.clip else noisy


class Poisson(_Grain):
    """Noise of counted light, whose variance is the pixel's value times the square of `scale`; cut to 0..255."""

    step: Literal["poisson"]
    scale: Annotated[Range, _between(0, 100)] = Field(
        description="factor on the noise; two numbers: drawn between them"
    )

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        scale, planes = draw(self.scale, scene.rng), self._planes(image, scene.rng)
        light = image.clip(0, 255) if planes == 3 else image.clip(0, 255).mean(axis=0, keepdims=True)
        noise = scene.rng.poisson(light).astype(np.float32) - light
        return (image + np.float32(scale) * noise).clip(0, 255)


class Jpeg(_Step):
    """Compression by libjpeg, chroma at half the size, as image files have it."""

    step: Literal["jpeg"]
    quality: Annotated[int | tuple[int, int], _between(1, 100)] = Field(
        description="libjpeg's quality; two numbers: drawn between them"
    )

    @property
    def reach_px(self) -> int:
        """What is compressed together."""
        return GRID_PX

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        of = self.quality
        quality = of if isinstance(of, int) else int(scene.rng.integers(of[0], of[1], endpoint=True))
        file = io.BytesIO()
        Image.fromarray(to_uint8(image).transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        with Image.open(file, formats=["JPEG"]) as decoded:
            return np.asarray(decoded, np.float32).transpose(2, 0, 1)


class _Blur(_Step):
    """A convolution; the image is mirrored at its borders, the edge pixel repeated."""

    side: Annotated[int | tuple[int, int], _between(3, MOST_SIDE)] = Field(
        21, description="of the kernel, odd; two numbers: drawn between them"
    )

    @model_validator(mode="after")
    def _odd_side(self) -> "_Blur":
        sides = (self.side,) if isinstance(self.side, int) else self.side
        if any(side % 2 == 0 for side in sides):
            raise ValueError(f"side {self.side} must be odd: a kernel has a middle")
        return self

    @property
    def reach_px(self) -> int:
        """Half the largest kernel."""
        return (self.side if isinstance(self.side, int) else self.side[1]) // 2

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        of = self.side
        side = of if isinstance(of, int) else 2 * int(scene.rng.integers(of[0] // 2, of[1] // 2, endpoint=True)) + 1
        return _convolved(image, self._kernel(side, scene.rng))

    def _kernel(self, side: int, rng: np.random.Generator) -> np.ndarray:
        """(side, side) float64, its sum 1."""
        raise NotImplementedError


class Blur(_Blur):
    """A bell-shaped kernel, round, or long with a random direction."""

    step: Literal["blur"]
    sigma: Annotated[Range, _between(0.05, MOST_SIDE)] = Field(
        description="width in pixels; two numbers: drawn between them"
    )
    sigma_across: Annotated[Range, _between(0.05, MOST_SIDE)] | None = Field(
        None, description="width across the first, of long kernels; null: round"
    )
    shape: Literal["gaussian", "generalized", "plateau"] = Field(
        "gaussian", description="exp(-d/2); exp(-d**beta / 2); 1 / (1 + d**beta), where d is the squared distance"
    )
    beta: Annotated[Range, _between(0.1, 10)] = Field(
        1.0, description="for the other shapes than gaussian; two numbers: drawn between them"
    )

    def _kernel(self, side: int, rng: np.random.Generator) -> np.ndarray:
        along = across = draw(self.sigma, rng)
        angle = 0.0
        if self.sigma_across is not None:
            across, angle = draw(self.sigma_across, rng), rng.uniform(0, math.pi)
        y, x = _grid(side)
        first, second = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        distance = (first / along) ** 2 + (second / across) ** 2
        if self.shape == "plateau":
            return _normed(1 / (1 + distance ** draw(self.beta, rng)))
        return _normed(np.exp(-0.5 * distance ** (1.0 if self.shape == "gaussian" else draw(self.beta, rng))))


class Motion(_Blur):
    """A straight move of the camera in a random direction, the kernel a line of this length."""

    step: Literal["motion"]
    length: Range = Field(description="pixels from end to end; two numbers: drawn between them")

    @model_validator(mode="after")
    def _fits(self) -> "Motion":
        least = self.side if isinstance(self.side, int) else self.side[0]
        _check_range("length", self.length, 1, least)
        return self

    def _kernel(self, side: int, rng: np.random.Generator) -> np.ndarray:
        length, angle = draw(self.length, rng), rng.uniform(0, math.pi)
        y, x = _grid(side)
        along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        # a line one pixel wide, with soft ends and sides
        return _normed(np.clip(length / 2 + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1))


class Sinc(_Blur):
    """A low-pass whose edges ring, as sharpened and resized images have it."""

    step: Literal["sinc"]
    cutoff: Annotated[Range, _between(0.1, math.pi)] = Field(
        (math.pi / 3, math.pi), description="radians per pixel; two numbers: drawn between them"
    )

    def _kernel(self, side: int, rng: np.random.Generator) -> np.ndarray:
        from scipy.special import j1

        cutoff = draw(self.cutoff, rng)
        radius = np.hypot(*_grid(side))
        radius[side // 2, side // 2] = 1  # replaced below, by the limit
        kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
        kernel[side // 2, side // 2] = cutoff**2 / (4 * math.pi)
        return _normed(kernel)


class Resize(_Step):
    """Another size on the way, by a random filter; `shrink` arrives at the low resolution in the end."""

    step: Literal["resize"]
    factor: Annotated[Range, _between(0.05, 8)] = Field(description="of the side; two numbers: drawn between them")
    of: Literal["current", "low_res"] = Field("current", description="what the factor is of")
    filters: tuple[Literal["area", "bilinear", "bicubic"], ...] = Field(
        ("area", "bilinear", "bicubic"), min_length=1, description="one is drawn"
    )

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        sides = scene.low_res if self.of == "low_res" else image.shape[1:]
        factor, method = draw(self.factor, scene.rng), self.filters[int(scene.rng.integers(len(self.filters)))]
        height, width = (max(8, round(side * factor)) for side in sides)
        planes = (Image.fromarray(plane).resize((width, height), _FILTERS[method]) for plane in image)
        return np.stack([np.asarray(plane) for plane in planes])


class Shrink(_Step):
    """To the low resolution's size, by MATLAB's bicubic in floating point."""

    step: Literal["shrink"]

    @property
    def reach_px(self) -> int:
        """Half the kernel, at the low resolution."""
        return 2

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        if image.shape[1:] == scene.low_res:
            return image
        hwc = imresize(image.transpose(1, 2, 0), None, rounding="float", size=scene.low_res)
        return np.ascontiguousarray(hwc.transpose(2, 0, 1))


class OneOf(_Step):
    """One of several sequences of steps; an empty one changes nothing."""

    step: Literal["one_of"]
    of: tuple[tuple["Step", ...], ...] = Field(min_length=1, description="sequences, one of which is drawn")
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="how often each is drawn, relative to the others; null: evenly"
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> "OneOf":
        if self.weights is not None and (len(self.weights) != len(self.of) or not sum(self.weights)):
            raise ValueError(f"weights {list(self.weights)} must be one number for each of the {len(self.of)} in `of`")
        return self

    @property
    def reach_px(self) -> int:
        """Of the sequence that reaches farthest."""
        return max(sum(step.reach_px for step in steps) for steps in self.of)

    def _apply(self, image: np.ndarray, scene: Scene) -> np.ndarray:
        shares = None if self.weights is None else np.array(self.weights) / sum(self.weights)
        for step in self.of[int(scene.rng.choice(len(self.of), p=shares))]:
            image = step(image, scene)
        return image


Step = Annotated[Noise | Poisson | Jpeg | Blur | Motion | Sinc | Resize | Shrink | OneOf, Field(discriminator="step")]


def ways(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """Every sequence of steps, choices resolved, that a sample may go; single steps left to chance count as taken."""
    if not steps:
        yield ()
        return
    first, rest = steps[0], steps[1:]
    heads: list[tuple[Step, ...]] = [(first,)]
    if isinstance(first, OneOf):
        heads = [way for of in first.of for way in ways(of)]
    if isinstance(first, OneOf) and first.probability < 1:
        heads.append(())
    tails = list(ways(rest))
    yield from ((*head, *tail) for head in heads for tail in tails)


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) counted from the middle."""
    middle = side // 2
    y, x = np.mgrid[-middle : middle + 1, -middle : middle + 1].astype(np.float64)
    return y, x


def _normed(kernel: np.ndarray) -> np.ndarray:
    return kernel / kernel.sum()


def _convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    from scipy.signal import fftconvolve  # half a second to import: what does not blur does without

    reach = len(kernel) // 2
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    whole: np.ndarray = fftconvolve(padded, kernel[None], "valid", axes=(1, 2))
    return whole.astype(np.float32)
