"""`hatchery upscale` and `hatchery export`: images, and other runtimes, from weights files and registered models.

Weights and targets are checked before any work. A broken image in a folder is named and passed over.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_prep import jpeg, jpeg_header, jpeg_scans
from model import load
from model.blocks import UpscalingNetwork
from model.inference import Upscaler
from model.limits import bound_threads
from model.picture import FORMATS, Picture, check_target, read_picture, write_picture
from model.precision import emulation_note, resolve_precision
from pipeline.progress import Display

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
    """How images are worked on; see `model.inference.upscale`. `tile` None: chosen by the memory that is free."""

    tile: int | None = None
    overlap: int | None = None
    batch: int = 1
    ensemble: bool = False
    precision: str = "auto"
    compile: bool = False
    """By torch.compile: for tiles, or many images of one size, since each new size is compiled anew."""

    def upscaler(self, network: UpscalingNetwork) -> Upscaler:
        """A network that works so; ValueError for options that cannot be."""
        return Upscaler(
            network,
            tile="auto" if self.tile is None else self.tile,
            overlap=self.overlap,
            batch=self.batch,
            ensemble=self.ensemble,
            precision=self.precision,
        )


@dataclass(frozen=True)
class Job:
    """One image file and where its result goes."""

    source: Path
    target: Path


def plan(source: str, target: str) -> list[Job]:
    """The files to work on. ValueError for a source that is missing or empty, and for a target that cannot be.

    A folder's images keep their names and places below the target; a single one may be given a folder, too.
    """
    into = Path(target)
    if Path(source).is_dir():
        if into.exists() and not into.is_dir():
            raise ValueError(f"{target} is a file: name a folder for the images of {source}")
        found = [path for path in sorted(Path(source).rglob("*")) if path.suffix.lower() in FORMATS and path.is_file()]
        jobs = [Job(path, into / path.relative_to(source)) for path in found if not _is_below(path, into, source)]
        if not jobs:
            raise ValueError(f"{source} holds no images: their names end in {', '.join(FORMATS)}")
    elif Path(source).is_file():
        is_folder = into.is_dir() or target.endswith(os.sep)
        jobs = [Job(Path(source), into / Path(source).name if is_folder else into)]
        check_target(jobs[0].target)
    else:
        raise ValueError(f"{source} does not exist: name an image or a folder of images")
    _refuse_below_a_file(into)
    for job in jobs:
        if job.target.resolve() == job.source.resolve():
            raise ValueError(f"{target} would overwrite {job.source}: name another place for the result")
    return jobs


def _refuse_below_a_file(target: Path) -> None:
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
    upscaler = options.upscaler(network)
    bound_threads()
    if options.compile:
        network.compile(dynamic=False)
    problems = []
    with Display(console) as display:
        display.say(f"{name}: {network.arch} x{network.scale}, {precision} on {device.type}")
        if note := emulation_note(options.precision, device):
            display.say(f"      {note}")
        for number, job in enumerate(jobs, start=1):
            display.begin_stage(number, len(jobs), job.source.name, f"-> {job.target}")
            try:
                display.end_stage(_upscale(job, upscaler, display))
            except (ValueError, MemoryError, OSError) as error:
                if len(jobs) == 1:
                    raise
                display.end_stage("failed")
                problems.append(_named(job, error))
    return problems


def _upscale(job: Job, upscaler: Upscaler, display: Display) -> str:
    """One image; returns what it was and became."""
    picture = read_picture(job.source)
    _refuse_cut_off(job.source)
    check_target(job.target, picture, upscaler.network.scale)

    size = picture.pixels.shape[:2]
    tile = upscaler.choose(size, picture.pixels.shape[2], picture.pixels.dtype.itemsize)
    if tile and max(size) > tile:
        display.say(f"      {job.source.name}: {upscaler.describe(tile)}")

    def progress(done: int, total: int) -> None:
        if total > 1:
            display.update(done, total, "tiles")

    pixels = upscaler(picture.pixels, progress)
    write_picture(job.target, Picture(pixels, picture.profile))
    before, after = (f"{width} x {height}" for height, width in (size, pixels.shape[:2]))
    tiles = f", tiles of {upscaler.tile_used} px" if upscaler.tile_used else ""
    return f"{before} -> {after} px, {KINDS[pixels.shape[2]]}, {pixels.dtype.itemsize * 8} bits{tiles}"


def _refuse_cut_off(path: Path) -> None:
    """ValueError for a JPEG whose data ends before the image does, which libjpeg would fill with gray."""
    data = path.read_bytes()
    header = jpeg_header.parse(data)
    is_whole = jpeg_scans.is_whole(data) if header is None else jpeg.seek_points(data, header) is not None
    if is_whole is False:  # None: it cannot be told, as of other formats, which have checksums
        raise ValueError(f"{path} cannot be read: its compressed data is damaged or cut off")


def _named(job: Job, error: Exception) -> str:
    text = str(error)
    return text if str(job.source) in text or str(job.target) in text else f"{job.source}: {text}"


def export(source: Source, target: str) -> str:
    """Write a network as `.onnx` or `.pt2`; returns what was written. ValueError for another ending."""
    from model.export import export_onnx, require_onnx, save_program

    suffix = Path(target).suffix
    if suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{target}: choose an ending among .onnx, .pt2")
    _refuse_below_a_file(Path(target))
    if suffix == ".onnx":
        require_onnx()
    network, name = open_network(source)
    if suffix == ".onnx":
        difference = export_onnx(target, network)
        checked = f"differs from PyTorch by at most {difference:.1e} in onnxruntime, of a range of 1"
    else:
        save_program(target, network)
        checked = f"for sides of more than {network.multiple} px"
    return f"{target}: {name}, {network.arch} x{network.scale}, {checked}"
