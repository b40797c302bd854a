"""Benchmark sets: which images they hold, and each as a pair of low and high resolution, by the published protocol.

Ground truth is cut to a multiple of the scale. Low-resolution images are the set's published ones where it has
them (LR_bicubic/X2 ...), else MATLAB-exact bicubic, as the published ones were made.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from pydantic import Field

from data_prep import sources, storage
from data_prep.bicubic import imresize, to_uint8
from data_prep.sources import Item
from pipeline.settings import Settings

METRICS = ("psnr_y", "ssim_y")


class LpipsConfig(Settings):
    """Where LPIPS finds its weights; they are not shipped."""

    backbone: str = Field(description="path or URI of AlexNet's or VGG-16's weights in torchvision's layout")
    calibration: str = Field(description="path or URI of the authors' linear weights (v0.1/alex.pth, vgg.pth)")


class Protocol(Settings):
    """How images are judged; part of what makes figures comparable."""

    ensemble: bool = Field(False, description="average the outputs for the eight flips and rotations (self-ensemble)")
    rgb: bool = Field(False, description="PSNR over all channels as well")
    lpips: LpipsConfig | None = Field(None, description="LPIPS as well, by the weights named; null: without")
    tile: int | None = Field(None, ge=16, description="work on squares of this side in low-resolution px; null: whole")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures of each image."""
        return (*METRICS, *(["psnr_rgb"] if self.rgb else []), *(["lpips"] if self.lpips else []))


@dataclass(frozen=True)
class BenchmarkImage:
    """One image of a benchmark; `low_res` is None where the set has no published one for the scale."""

    name: str
    high_res: Item
    low_res: Item | None


@dataclass(frozen=True)
class Pair:
    """uint8 HxWx3 images, the high-resolution one a multiple of the scale; `digest` names the files' content."""

    low_res: np.ndarray
    high_res: np.ndarray
    digest: str


def set_name(uri: str) -> str:
    """What a set is called when only its folder is given: the folder's name, of .../Set5/HR that of its parent."""
    parts = [part for part in uri.rstrip("/").split("/") if part]
    return parts[-2] if len(parts) > 1 and parts[-1] == "HR" else parts[-1].rstrip(":")


def read_set(uri: str, scale: int, include: tuple[str, ...] = ()) -> list[BenchmarkImage]:
    """A benchmark's images. `uri`: a folder or prefix with HR/ and perhaps LR_bicubic/X{scale}/, or just images.

    Published low-resolution names carry the scale (`babyx2.png` for `baby.png`) or equal the high-resolution ones.
    ValueError where there is no image, or some low-resolution image is missing.
    """
    items = [(_relative(uri, item), item) for item in sources.list_items(uri)]
    folder = f"LR_bicubic/X{scale}/"
    low_res = {PurePosixPath(path).stem: item for path, item in items if path.startswith(folder)}
    wanted = {(item.uri, item.offset) for item in sources.list_items(uri, include)}
    nested = any(path.startswith("HR/") for path, _ in items)
    chosen = []
    for path, item in items:
        if (item.uri, item.offset) in wanted and (path.startswith("HR/") or not nested):
            stem = PurePosixPath(path).stem
            chosen.append(BenchmarkImage(stem, item, low_res.get(f"{stem}x{scale}", low_res.get(stem))))
    if low_res and any(image.low_res is None for image in chosen):
        missing = [image.name for image in chosen if image.low_res is None]
        raise ValueError(
            f"{uri}/{folder} lacks the low-resolution images of {', '.join(missing[:5])}: add them or remove it"
        )
    return chosen


def _relative(uri: str, item: Item) -> str:
    """An item's path below the set's folder (a packaged photograph's own path where there is no folder)."""
    base = uri if uri == sources.PHOTOGRAPHS else storage.normalise(uri)
    return item.uri.removeprefix(f"{base}/")


def read_pair(image: BenchmarkImage, scale: int) -> Pair:
    """The two sides of a benchmark image. ValueError where they do not fit or an image cannot be read."""
    data = sources.read_item(image.high_res)
    high_res = _decode(data, image.high_res)
    height, width = (side // scale * scale for side in high_res.shape[:2])
    high_res = high_res[:height, :width]
    if image.low_res is None:
        return Pair(shrink_bicubic(high_res, scale), high_res, _digest(data))
    low_data = sources.read_item(image.low_res)
    low_res = _decode(low_data, image.low_res)
    expected = (height // scale, width // scale)
    if low_res.shape[:2] != expected:
        raise ValueError(
            f"{image.low_res.uri} has height and width {low_res.shape[:2]}, expected {expected} "
            f"for {image.high_res.uri} at x{scale}: replace it"
        )
    return Pair(low_res, high_res, _digest(data, low_data))


def _decode(data: bytes, item: Item) -> np.ndarray:
    """uint8 RGB, shape (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{item.uri} cannot be read as an image ({error}): replace it or leave it out") from error


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in contents)).hexdigest()[:16]


def shrink_bicubic(high_res: np.ndarray, scale: int) -> np.ndarray:
    """What the published low-resolution files hold: x8 rounded once, the others between the passes too. uint8 HxWx3."""
    if scale == 8:
        return to_uint8(imresize(high_res, 1 / scale, rounding="float"))
    return imresize(high_res, 1 / scale)


def upscale_bicubic(low_res: np.ndarray, scale: int) -> np.ndarray:
    """What the published bicubic rows were made with: both passes in floating point, rounded once. uint8 HxWx3."""
    return np.clip(np.rint(imresize(low_res, scale, rounding="float")), 0, 255).astype(np.uint8)
