"""`hatchery upscale`: images through networks from weights files and registered models.

Weights and targets are checked before any work. A broken image in a folder is named and passed over.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from data_prep.image import whole
from data_prep.image_files import EXTENSIONS, PassedOver
from data_prep.sources import iter_images
from model import load
from model.blocks import NUM_FEAT, UpscalingNetwork
from model.inference import upscale
from model.picture import Picture, check_target, read_picture, write_picture
from model.precision import resolve_precision
from model.tiles import Tiler, smallest_tile
from pipeline.progress import Display

BODY_TENSORS = {"hat": 13, "hmanet": 40, "hat_unet": 20}
HEAD_TENSORS = 3
"""How many tensors of embed_dim channels, or of NUM_FEAT channels in high resolution, exist at once. Measured for
HAT in fp32: 8.6 kB a pixel at x2, where the body weighs most, 11.8 kB at x4, where the head does; HMANet: 17.9 kB
at 224 px, growing with the size, since its grids do: hence 40; the U of 48 channels: 3.5 kB at 512 px."""
OUTPUT_TENSORS = 3
"""How many float RGB images of the result's size exist at once, one more with --ensemble, two more with alpha. Measured
at x4, where one takes 192 bytes a low-resolution pixel: 560 bytes, with --ensemble 763, with alpha 937."""
MEMORY_SHARE = 0.6
"""Of the memory that the result leaves free, for the network."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container (version 2) of its limits."""
KINDS = {1: "gray", 2: "gray and alpha", 3: "RGB", 4: "RGB and alpha"}


@dataclass(frozen=True)
class Source:
    """Where the network comes from: a weights file, a registered model, or the champion of a scale."""

    weights: str | None = None
    """Path or s3:// URI of a `.pth` or `.safetensors` file."""
    model: str | None = None
    """`models:/name@alias` or `models:/name/version`."""
    scale: int | None = None
    """What the network must upscale by; alone: the only champion of this scale in the registry."""
    tracking_uri: str | None = None
    """MLflow; default $MLFLOW_TRACKING_URI, else `runs/mlflow.db`, as the recipes leave it."""
    interval_size: int | None = None
    """HMANet's, where a `.pth` file's is not the published 4."""


@dataclass(frozen=True)
class Options:
    """How images are worked on; see `model.inference.upscale`."""

    tile: int | None = None
    overlap: int | None = None
    batch: int = 1
    ensemble: bool = False
    precision: str = "auto"
    compile: bool = False
    """By torch.compile: for tiles, or many images of one size, since each new size is compiled anew."""


@dataclass(frozen=True)
class Job:
    """One image file and where its result goes."""

    source: Path
    target: Path


def plan(source: str, target: str, passed_over: PassedOver | None = None) -> list[Job]:
    """The files to work on. ValueError for a source that is missing or empty, and for a target that cannot be.

    A folder's images keep their names and places below the target; a single one may be given a folder, too. What is no
    image is counted in `passed_over`.
    """
    into = Path(target)
    if Path(source).is_dir():
        if into.exists() and not into.is_dir():
            raise ValueError(f"{target} is a file: name a folder for the images of {source}")
        passed_over = PassedOver() if passed_over is None else passed_over
        found = [Path(source, info.path) for info in iter_images(source, passed_over)]
        jobs = [Job(path, into / path.relative_to(source)) for path in found if not _is_below(path, into, source)]
        if not jobs:
            besides = f" ({said})" if (said := passed_over.describe()) else ""
            raise ValueError(f"{source} holds no images: their names end in .{', .'.join(EXTENSIONS)}{besides}")
    elif Path(source).is_file():
        is_folder = into.is_dir() or target.endswith(os.sep)
        jobs = [Job(Path(source), into / Path(source).name if is_folder else into)]
        check_target(jobs[0].target)
    else:
        raise ValueError(f"{source} does not exist: name an image or a folder of images")
    refuse_below_a_file(into)
    for job in jobs:
        if job.target.resolve() == job.source.resolve():
            raise ValueError(f"{target} would overwrite {job.source}: name another place for the result")
    return jobs


def refuse_below_a_file(target: Path) -> None:
    """ValueError where a folder that the target needs is a file."""
    for folder in target.parents:
        if folder.is_file():
            raise ValueError(f"{target} cannot be written: {folder} is a file, no folder")


def _is_below(path: Path, target: Path, source: str) -> bool:
    """Whether an image lies in a target folder inside the source: the result of an earlier run."""
    inside = target.resolve() != Path(source).resolve()
    return inside and path.resolve().is_relative_to(target.resolve())


def open_network(source: Source) -> tuple[UpscalingNetwork, str]:
    """The network in eval mode on the best device, and what it is. ValueError where it cannot be had."""
    if source.weights and source.model:
        raise ValueError("--weights and --model are two networks: give one of them")
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        name, path, options = _weights(source, Path(folder))
        overrides = {} if source.interval_size is None else {"interval_size": source.interval_size}
        network = load(path, **(options | overrides))
    if source.scale is not None and network.scale != source.scale:
        raise ValueError(
            f"{name} upscales by {network.scale}, not by --scale {source.scale}: leave it out, or choose others"
        )
    return network.to("cuda" if torch.cuda.is_available() else "cpu"), name


def _weights(source: Source, folder: Path) -> tuple[str, Path, dict[str, Any]]:
    """Name, local file, and what the file does not show."""
    if source.weights:
        from pipeline.cascade import fetch_published

        return source.weights, fetch_published(source.weights, folder), {}
    if not source.model and source.scale is None:
        raise ValueError(
            "which network? Give --weights FILE, --model models:/NAME@champion, or --scale N for its champion"
        )
    from pipeline import registry, tracking

    client = tracking.connect_default(source.tracking_uri)
    uri = source.model or registry.champion_of(client, source.scale or 0)
    return uri, *registry.fetch_model(client, uri, folder)


def run(jobs: Sequence[Job], network: UpscalingNetwork, name: str, options: Options, console: Console) -> list[str]:
    """Upscale every image; returns what went wrong with which. A single image's error is raised instead.

    ValueError for options that cannot be, before any work.
    """
    device = network.conv_first.weight.device
    precision = resolve_precision(options.precision, device)
    Tiler(network, options.tile, options.overlap, options.batch)  # refuses what cannot be, before any image
    if options.compile:
        network.compile(dynamic=False)
    problems = []
    with Display(console) as display:
        display.say(f"{name}: {network.arch} x{network.scale}, {precision} on {device.type}")
        for number, job in enumerate(jobs, start=1):
            display.begin_stage(number, len(jobs), job.source.name, f"-> {job.target}")
            try:
                display.end_stage(_upscale(job, network, options, display))
            except (ValueError, MemoryError, OSError) as error:
                if len(jobs) == 1:
                    raise
                display.end_stage("failed")
                problems.append(_named(job, error))
    return problems


def _upscale(job: Job, network: UpscalingNetwork, options: Options, display: Display) -> str:
    """One image; returns what it was and became."""
    picture = read_picture(job.source, whole)
    if picture.num_pictures > 1:
        display.say(f"      {job.source.name}: the first of its {picture.num_pictures} pictures")
    check_target(job.target, picture, network.scale)

    size = picture.pixels.shape[:2]
    overlap = Tiler(network, overlap=options.overlap).overlap
    tile = options.tile
    if tile is None:
        result_bytes = output_bytes(network.scale, picture.pixels.shape, options.ensemble)
        tile = fitting_tile(network, size, overlap, _free_bytes(network), result_bytes)
    if tile and max(size) > tile:
        display.say(f"      {job.source.name}: {Tiler(network, tile, overlap).describe()}")

    def progress(done: int, total: int) -> None:
        if total > 1:
            display.update(done, total, "tiles")

    how = {name: value for name, value in asdict(options).items() if name != "compile"}
    pixels = upscale(network, picture.pixels, **(how | {"tile": tile}), progress=progress)
    write_picture(job.target, Picture(pixels, picture.profile))
    before, after = (f"{width} x {height}" for height, width in (size, pixels.shape[:2]))
    tiles = f", tiles of {tile} px" if tile else ""
    return f"{before} -> {after} px, {KINDS[pixels.shape[2]]}, {pixels.dtype.itemsize * 8} bits{tiles}"


def fitting_tile(
    network: UpscalingNetwork, size: tuple[int, ...], overlap: int, free_bytes: int, result_bytes: int = 0
) -> int | None:
    """None where a whole image is likely to fit the memory beside its result, else the side of tiles that are, px.

    Linux kills a process that takes too much rather than refusing it memory, so on CPUs it is reckoned before.
    MemoryError where not even the smallest useful tiles fit.
    """
    left_bytes = free_bytes - result_bytes
    px = left_bytes * MEMORY_SHARE / bytes_per_px(network)
    if math.prod(size) <= px:
        return None
    smallest = smallest_tile(overlap, network.multiple)
    needed_bytes = min(smallest**2, math.prod(size)) * bytes_per_px(network)
    if needed_bytes > left_bytes:
        raise MemoryError(
            f"the result takes {result_bytes / 1e9:.3g} GB of memory and tiles of {smallest} px take "
            f"{needed_bytes / 1e9:.3g} GB, where {free_bytes / 1e9:.3g} GB are free: free some, "
            "cut the image into parts, or say --tile and --tile-overlap yourself"
        )
    return max(int(px**0.5) // network.multiple * network.multiple, smallest) if px > 0 else smallest


def output_bytes(scale: int, shape: tuple[int, ...], ensemble: bool) -> int:
    """What the result of an image (H, W, C) takes on the way to pixels (see `OUTPUT_TENSORS`)."""
    height, width, channels = shape
    tensors = OUTPUT_TENSORS + ensemble + (2 if channels in (2, 4) else 0)
    return tensors * 4 * 3 * height * width * scale**2


def bytes_per_px(network: UpscalingNetwork) -> int:
    """What a pixel of the low-resolution image takes in fp32 (see `BODY_TENSORS`)."""
    body = BODY_TENSORS[network.arch] * network.config["embed_dim"]
    return 4 * int(max(body, HEAD_TENSORS * NUM_FEAT * network.scale**2))


def _free_bytes(network: UpscalingNetwork) -> int:
    """What may be taken: on a GPU as much as one likes, since there an error says when it was too much."""
    if network.conv_first.weight.device.type != "cpu":
        return 1 << 62
    return max(min(psutil.virtual_memory().available, _container_free_bytes()), 0)


def _container_free_bytes() -> int:
    """What the container leaves; cached files that nobody used lately count as free, since Linux drops them."""
    limit, used, parts = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and used.is_file()) or (text := limit.read_text().strip()) == "max":
        return 1 << 62
    stat = dict(line.split() for line in parts.read_text().splitlines()) if parts.is_file() else {}
    return int(text) - int(used.read_text()) + int(stat.get("inactive_file", 0))


def _named(job: Job, error: Exception) -> str:
    text = str(error)
    return text if str(job.source) in text or str(job.target) in text else f"{job.source}: {text}"
