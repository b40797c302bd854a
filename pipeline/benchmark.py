"""Benchmark sets: which images they hold, and each as a pair of low and high resolution, by the published protocol.

Ground truth is cut to a multiple of the scale. Low-resolution images are made by the steps that are given; without
any they are the set's published ones where it has them (LR_bicubic/X2 ..., LRbicx2 ..., LQ at scale 1), else
MATLAB-exact bicubic, as the published ones were made.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from pydantic import Field

from data_prep import sources
from data_prep.bicubic import imresize, to_uint8
from data_prep.degrade import degrade
from data_prep.degrade_steps import Step
from data_prep.image import decode, whole
from data_prep.image_files import PassedOver
from data_prep.layouts import is_low_res_folder, low_res_folder, selfexsr_name
from data_prep.sources import Item
from data_prep.uri import printable
from pipeline.settings import Settings, digest_of

METRICS = ("psnr_y", "ssim_y")
_CUT = re.compile(r"GTmod(\d+)/")  # BasicSR's: ground truth cut to a multiple
_TRUTH = re.compile(r"HR|GTmod\d+|image_SRF_\d+")


class LpipsConfig(Settings):
    """Where LPIPS finds its weights; they are not shipped."""

    backbone: str = Field(description="path or URI of AlexNet's or VGG-16's weights in torchvision's layout")
    calibration: str = Field(description="path or URI of the authors' linear weights (v0.1/alex.pth, vgg.pth)")


class DistsConfig(Settings):
    """Where DISTS finds its weights; they are not shipped."""

    backbone: str = Field(description="path or URI of VGG-16's weights in torchvision's layout")
    calibration: str = Field(description="path or URI of the authors' weights.pt")


class Protocol(Settings):
    """How images are judged; part of what makes figures comparable."""

    ensemble: bool = Field(False, description="average the outputs for the eight flips and rotations (self-ensemble)")
    rgb: bool = Field(False, description="PSNR over all channels as well")
    lpips: LpipsConfig | None = Field(None, description="LPIPS as well, by the weights named; null: without")
    dists: DistsConfig | None = Field(None, description="DISTS as well, by the weights named; null: without")
    tile: int | None = Field(None, ge=16, description="work on squares of this side in low-resolution px; null: whole")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures of each image."""
        return (*METRICS, *(["psnr_rgb"] if self.rgb else []), *self.distances)

    @property
    def distances(self) -> dict[str, LpipsConfig | DistsConfig]:
        """The distances of deep features that are asked for."""
        known: dict[str, LpipsConfig | DistsConfig | None] = {"lpips": self.lpips, "dists": self.dists}
        return {name: config for name, config in known.items() if config is not None}


@dataclass(frozen=True)
class BenchmarkImage:
    """One image of a benchmark; `low_res` is None where it is to be made: by `steps`, or by bicubic without any."""

    name: str
    high_res: Item
    low_res: Item | None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Pair:
    """uint8 HxWx3 images, the high-resolution one a multiple of the scale; `digest` names the files' content.

    The low-resolution one is float32, about 0..255, where noise was added that is not cut (see `degrade`).
    """

    low_res: np.ndarray
    high_res: np.ndarray
    digest: str


def set_name(uri: str) -> str:
    """What a set is called when only its folder is given: the folder's name, of .../Set5/HR that of its parent."""
    parts = [part for part in uri.rstrip("/").split("/") if part]
    return parts[-2] if len(parts) > 1 and _TRUTH.fullmatch(parts[-1]) else parts[-1].rstrip(":")


def set_fingerprint(images: Iterable[Item]) -> str:
    """Changes with a set's files, and with the rule by which they are paired: see `sources.fingerprint`."""
    items = list(images)
    of_files = sources.fingerprint(items)
    return digest_of([of_files, "SelfExSR"]) if any(selfexsr_name(item.path) for item in items) else of_files


def read_set(
    uri: str,
    scale: int,
    include: tuple[str, ...] = (),
    steps: tuple[Step, ...] = (),
    passed_over: PassedOver | None = None,
) -> list[BenchmarkImage]:
    """A benchmark's images. `uri`: a folder or prefix in one of the layouts that sets are published in.

    Truth is in HR/, or in GTmod2/, GTmod12/ ... (the one that the scale divides), else every image outside of folders
    of low-resolution images. Low resolution is in LR_bicubic/X{scale}/ or LRbicx{scale}/ (scale 1: LQ/), if there is
    any; its names carry the scale (`babyx2.png` for `baby.png`) or equal the high-resolution ones. In SelfExSR's layout
    the two lie side by side, as img_001_SRF_2_HR.png and img_001_SRF_2_LR.png. `steps` make all of the low resolution
    instead. What is no image is counted in `passed_over`.
    ValueError where there is no image, two have one name, some low-resolution image is missing, or none at scale 1.
    """
    items = {item.path: item for item in sources.list_items(uri, passed_over=passed_over)}
    wanted = {item.key for item in (sources.list_items(uri, include) if include else items.values())}
    truth, low_res = _sides(uri, items, scale)
    if steps:
        low_res = {}
    if scale == 1 and not (steps or low_res):
        raise ValueError(
            f"{uri}: nothing degrades it: list steps in evaluate.degrade (--degrade), or add LQ/ beside HR/"
        )
    chosen: dict[str, BenchmarkImage] = {}
    for path, name in truth.items():
        item = items[path]
        if item.key not in wanted:
            continue
        if name in chosen:
            raise ValueError(
                f"{uri}: {path} and {chosen[name].high_res.path} are both called {name}: rename one, or make "
                f"their folders sets of their own"
            )
        chosen[name] = BenchmarkImage(printable(name), item, low_res.get(f"{name}x{scale}", low_res.get(name)), steps)
    if not chosen:
        raise ValueError(f"{uri}: include {list(include)} takes none of its high-resolution images: correct it")
    missing = [image.name for image in chosen.values() if image.low_res is None]
    if low_res and missing:
        folder = posixpath.dirname(next(iter(low_res.values())).path)
        raise ValueError(
            f"{uri}/{folder} lacks the low-resolution images of {', '.join(missing[:5])}: add them or remove it"
        )
    return list(chosen.values())


def _sides(uri: str, items: dict[str, Item], scale: int) -> tuple[dict[str, str], dict[str, Item]]:
    """(name by path of the high-resolution images, low-resolution ones by name) of a set at a scale."""
    named = {path: found for path in items if (found := selfexsr_name(path))}
    truth = {path: found.name for path, found in named.items() if found[1:] == (scale, "HR")}
    if truth:
        return truth, {found.name: items[path] for path, found in named.items() if found[1:] == (scale, "LR")}
    if scales := sorted({found.scale for found in named.values() if found.kind == "HR"}):
        known = ", ".join(f"x{found}" for found in scales)
        raise ValueError(f"{uri} has images for {known}, none for x{scale}: add image_SRF_{scale}/ or choose a scale")
    low_res = {path: item for path, item in items.items() if _is_low_res_of(path, scale)}
    by_stem = {PurePosixPath(path).stem: item for path, item in low_res.items()}
    return {path: PurePosixPath(path).stem for path in _truth(uri, list(items), scale)}, by_stem


def _truth(uri: str, paths: list[str], scale: int) -> list[str]:
    """The paths of the high-resolution images. ValueError where there are only others."""
    if is_low_res_folder(re.sub(r"/X\d+$", "", uri.rstrip("/")).rpartition("/")[2]):
        raise ValueError(f"{uri} holds low-resolution images: name the folder of the whole set")
    cut = {path.split("/")[0]: int(match[1]) for path in paths if (match := _CUT.match(path))}
    fitting = sorted((multiple != scale, multiple, name) for name, multiple in cut.items() if multiple % scale == 0)
    for folder in ("HR", *(name for _, _, name in fitting)):
        if found := [path for path in paths if path.startswith(f"{folder}/")]:
            return found
    if cut:
        raise ValueError(f"{uri} has {', '.join(sorted(cut))}, none of them cut for x{scale}: add GTmod{scale}/ or HR/")
    found = [path for path in paths if not low_res_folder(path)]
    if not found:
        raise ValueError(f"{uri} holds only low-resolution images: add HR/ with the high-resolution ones")
    return found


def _is_low_res_of(path: str, scale: int) -> bool:
    return path.startswith(("LQ/", "lq/") if scale == 1 else (f"LR_bicubic/X{scale}/", f"LRbicx{scale}/"))


def read_pair(image: BenchmarkImage, scale: int) -> Pair:
    """The two sides of a benchmark image. ValueError where they do not fit or an image cannot be read."""
    data = sources.read_item(image.high_res)
    high_res = _decode(data, image.high_res)
    height, width = (side // scale * scale for side in high_res.shape[:2])
    high_res = high_res[:height, :width]
    if image.steps:
        said = digest_of([step.model_dump(mode="json") for step in image.steps]).encode()
        return Pair(degrade(high_res, scale, image.steps, image.name), high_res, _digest(data, said))
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
    """uint8 RGB, shape (height, width, 3), read as training reads it; a damaged JPEG is none."""
    try:
        return decode(whole(data))
    except ValueError as error:
        raise ValueError(f"{item.uri} {error}: replace it or leave it out") from error


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in contents)).hexdigest()[:16]


def border_px(scale: int) -> int:
    """Pixels at each border that no figure looks at: as many as the scale, none without upscaling."""
    return scale if scale > 1 else 0


def baseline(scale: int) -> str:
    """What the figures named bicubic are of, in words: without upscaling, it leaves the degraded image as it is."""
    return f"bicubic x{scale}" if scale > 1 else "input"


def shrink_bicubic(high_res: np.ndarray, scale: int) -> np.ndarray:
    """What the published low-resolution files hold: x8 rounded once, the others between the passes too. uint8 HxWx3."""
    if scale == 8:
        return to_uint8(imresize(high_res, 1 / scale, rounding="float"))
    return imresize(high_res, 1 / scale)


def upscale_bicubic(low_res: np.ndarray, scale: int) -> np.ndarray:
    """What the published bicubic rows were made with: both passes in floating point, rounded once. uint8 HxWx3.

    low_res: uint8, or float32 in 0..255.
    """
    return np.clip(np.rint(imresize(low_res, scale, rounding="float")), 0, 255).astype(np.uint8)
