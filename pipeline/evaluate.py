"""Judgement by the published protocol: PSNR and SSIM on Y, borders of `scale` pixels left out, beside bicubic.

At scale 1 no border is left out, and what stands beside is the degraded image itself.

Images are spread over Ray actors, which hold the network once each: on GPUs where `compute.use_gpu` says so, one each.
Figures come at once; the upscaled image stays as a PNG in Ray's object store, so that pictures are made of the few that
are shown.
"""

import functools
import hashlib
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from data_prep import storage
from model import load
from model.blocks import UpscalingNetwork
from model.inference import Upscaler
from model.metrics import RESOLVED_DB, psnr_rgb, psnr_y, ssim_y
from model.perceptual import Distance, Dists, Lpips
from pipeline import cluster
from pipeline.actor_pool import ActorPool
from pipeline.benchmark import (
    BenchmarkImage,
    DistsConfig,
    LpipsConfig,
    Protocol,
    border_px,
    read_pair,
    upscale_bicubic,
)
from pipeline.config import ComputeConfig
from pipeline.settings import Settings

_DISTANCES: dict[str, Callable[..., Distance]] = {"lpips": Lpips, "dists": Dists}


class ImageResult(Settings):
    """Figures of one image: PSNR in dB (at most RESOLVED_DB), SSIM in 0..1, LPIPS and DISTS from 0 for equal ones on.

    `digest` names the image's content. It was worked on in squares of side `tile`, low-resolution px (null: whole), on
    `device` (empty in reports from before it was kept).
    """

    image: str
    digest: str = ""
    tile: int | None = None
    device: str = ""
    psnr_y: float
    ssim_y: float
    psnr_rgb: float | None = None
    lpips: float | None = None
    dists: float | None = None
    bicubic_psnr_y: float
    bicubic_ssim_y: float
    bicubic_psnr_rgb: float | None = None
    bicubic_lpips: float | None = None
    bicubic_dists: float | None = None


class SetResult(Settings):
    """One model on one set; means over images. `degraded`: by steps of ours, so that no published figure compares."""

    model: str
    scale: int
    set: str
    degraded: bool = False
    protocol: Protocol = Protocol()
    psnr_y: float
    ssim_y: float
    psnr_rgb: float | None = None
    lpips: float | None = None
    dists: float | None = None
    bicubic_psnr_y: float
    bicubic_ssim_y: float
    bicubic_psnr_rgb: float | None = None
    bicubic_lpips: float | None = None
    bicubic_dists: float | None = None
    images: tuple[ImageResult, ...]

    def what(self) -> dict[str, Any]:
        """What was found, whatever it was computed on."""
        return self.model_dump(mode="json", exclude={"images": {"__all__": {"tile", "device"}}})

    @property
    def tiles(self) -> str:
        """The sides of all images' tiles, px, smallest first; "whole" for images that were not cut."""
        sides = sorted({image.tile or 0 for image in self.images})
        return ", ".join(str(side) if side else "whole" for side in sides)

    @property
    def devices(self) -> str:
        """What all images were computed on."""
        return ", ".join(sorted({image.device for image in self.images}))


@dataclass(frozen=True)
class Judged:
    """A set's figures, and its upscaled images by name, fetched when asked for."""

    result: SetResult
    upscaled: dict[str, Callable[[], np.ndarray]]


def figures(output: np.ndarray, high_res: np.ndarray, scale: int, protocol: Protocol) -> dict[str, float]:
    """The protocol's metrics of one image against the truth, PSNR up to what uint8 resolves. uint8 HxWx3."""
    known: dict[str, Callable[..., float]] = {"psnr_y": psnr_y, "ssim_y": ssim_y, "psnr_rgb": psnr_rgb}
    known |= {name: load_distance(name, config) for name, config in protocol.distances.items()}
    found = {metric: known[metric](output, high_res, border_px(scale)) for metric in protocol.metrics}
    return {metric: min(value, RESOLVED_DB) if metric.startswith("psnr") else value for metric, value in found.items()}


@functools.lru_cache(maxsize=2)
def load_distance(name: str, config: LpipsConfig | DistsConfig) -> Distance:
    """LPIPS or DISTS from the weights named. ValueError where they are absent or of another layout."""
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        paths = []
        for number, uri in enumerate((config.backbone, config.calibration)):
            path = Path(folder, f"{number}-{uri.rsplit('/', 1)[-1]}")
            storage.download(uri, path)
            paths.append(path)
        try:
            return _DISTANCES[name](*paths)
        except ValueError as error:
            raise ValueError(f"{name.upper()} of {config.backbone} and {config.calibration}: {error}") from error


def restored(upscaler: Upscaler, low_res: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, or float32 in 0..255 -> what the network makes of it, uint8."""
    if low_res.dtype == np.uint8:
        return upscaler(low_res)
    x_bchw = torch.from_numpy(low_res).permute(2, 0, 1)[None] / 255
    levels_hwc = (upscaler.of_tensor(x_bchw)[0] * 255).permute(1, 2, 0)
    return levels_hwc.round().clamp(0, 255).to(torch.uint8).numpy()


def judge(
    image: BenchmarkImage, scale: int, network: UpscalingNetwork, protocol: Protocol
) -> tuple[ImageResult, np.ndarray]:
    """The figures of one image, and the upscaled image that they were computed from.

    ValueError where it does not fit the memory as the protocol has it: smaller tiles would be another answer.
    """
    pair = read_pair(image, scale)
    upscaler = Upscaler(network, tile=protocol.tile, ensemble=protocol.ensemble, may_shrink=False)
    try:
        output = restored(upscaler, pair.low_res)
    except MemoryError as error:
        raise ValueError(f"{image.name}: {error}; tiles are evaluate.tile in a recipe, --tile of a command") from error
    bicubic = figures(upscale_bicubic(pair.low_res, scale), pair.high_res, scale, protocol)
    found: dict[str, Any] = figures(output, pair.high_res, scale, protocol)
    found |= {f"bicubic_{metric}": value for metric, value in bicubic.items()}
    found |= {"tile": upscaler.tile_used, "device": _called(network.conv_first.weight.device)}
    return ImageResult(image=image.name, digest=pair.digest, **found), output


def _called(device: torch.device) -> str:
    """A device as reports have it: `cpu`, or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class Weights:
    """Weights on their way to the workers: bytes of a .pth in Ray's object store, fetched once by each process.

    options: what `model.load` cannot read off the tensors.
    """

    digest: str
    stored: tuple[Any, ...]  # in a tuple Ray passes the reference on instead of the bytes
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def put(cls, content: bytes, options: dict[str, Any]) -> "Weights":
        """Into the object store. Ray must be initialised."""
        frozen = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in sorted(options.items()))
        return cls(hashlib.sha256(content).hexdigest(), (ray.put(content),), frozen)

    def network(self) -> UpscalingNetwork:
        """The network, in eval mode."""
        return load_bytes(ray.get(self.stored[0]), dict(self.options))


@ray.remote(num_cpus=1)
class _Judge:
    """A process that judges images, one after another; the last network stays on its device."""

    def __init__(self, on_gpu: bool) -> None:
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if not on_gpu:
            torch.set_num_threads(1)
        self.held: tuple[Weights, UpscalingNetwork] | None = None

    @ray.method(num_returns=2)
    def judge(
        self, image: BenchmarkImage, scale: int, weights: Weights, protocol: Protocol
    ) -> tuple[ImageResult, bytes]:
        """See `judge`; the upscaled image as a PNG."""
        if self.held is None or self.held[0] != weights:
            self.held = None  # its memory is wanted
            self.held = weights, weights.network().to(self.device)
        result, output = judge(image, scale, self.held[1], protocol)
        return result, to_png(output)


@contextmanager
def judges(compute: ComputeConfig) -> Iterator[ActorPool]:
    """Processes that `evaluate` spreads images over, on a GPU each where `compute` says so; Ray must be initialised."""
    on_gpu = functools.cache(functools.partial(cluster.has_gpus, compute))  # decided once, when there is an image

    def make() -> Any:
        return _Judge.options(num_gpus=int(on_gpu())).remote(on_gpu())  # type: ignore[attr-defined]

    def most() -> int:
        return max(1, int(ray.cluster_resources().get("GPU" if on_gpu() else "CPU", 0)))

    pool = ActorPool(make, most)
    try:
        yield pool
    finally:
        pool.close()


def load_bytes(weights: bytes, options: dict[str, Any]) -> UpscalingNetwork:
    """A network in eval mode from the bytes of a published .pth file."""
    state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)["params_ema"]
    return load(state, **options)


def evaluate(
    pool: ActorPool,
    model: str,
    scale: int,
    weights: Weights,
    name: str,
    images: list[BenchmarkImage],
    protocol: Protocol,
) -> Judged:
    """One model on one set; pool: of `judges`."""
    answers = pool.run(lambda judge, image: judge.judge.remote(image, scale, weights, protocol), images)
    results = tuple(ray.get([result for result, _ in answers]))
    keys = [*protocol.metrics, *(f"bicubic_{metric}" for metric in protocol.metrics)]
    means: dict[str, Any] = {key: statistics.fmean(getattr(result, key) for result in results) for key in keys}
    pictures: dict[str, Callable[[], np.ndarray]] = {}
    for result, (_, png) in zip(results, answers, strict=True):
        pictures[result.image] = functools.partial(_fetch, png)
    means |= {"degraded": any(image.steps for image in images)}
    return Judged(SetResult(model=model, scale=scale, set=name, protocol=protocol, images=results, **means), pictures)


def to_png(image: np.ndarray) -> bytes:
    """uint8 HxWx3 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _fetch(reference: Any) -> np.ndarray:
    with Image.open(io.BytesIO(ray.get(reference)), formats=["PNG"]) as image:
        return np.asarray(image)
