"""`hatchery upscale`: images through networks from weights files and registered models.

Weights and targets are checked before any work. A broken image in a folder is named and passed over.
"""

import errno
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data_prep.image import whole
from data_prep.image_files import PassedOver
from model import load
from model.alpha import has_alpha
from model.blocks import UpscalingNetwork
from model.compiling import compile_in_place
from model.files import WriteError
from model.inference import Upscaler
from model.limits import bound_threads
from model.picture import (
    Picture,
    read_picture,
    refuse_size,
    refuse_what_it_cannot_hold,
    write_picture,
)
from model.precision import emulation_note, resolve_precision
from model.tiles import Progress
from pipeline import device_workers
from pipeline.devices import choose
from pipeline.progress import Display
from pipeline.upscale_files import Job, Naming, plan, refuse_quality, without_finished
from pipeline.upscale_image import Wanted, enlarge

NOTHING_CAN_BE_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What says of the whole disk, not of one file, that it takes no more."""
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
        """A network that works so, compiled if asked for; ValueError for options that cannot be."""
        made = Upscaler(
            network,
            tile="auto" if self.tile is None else self.tile,
            overlap=self.overlap,
            batch=self.batch,
            ensemble=self.ensemble,
            precision=self.precision,
        )
        if self.compile:
            compile_in_place(network)
        return made


@dataclass(frozen=True)
class Task:
    """What the command is asked to do."""

    images: str
    """An image, or a folder of images."""
    target: str
    network: Source
    naming: Naming = field(default_factory=Naming)
    wanted: Wanted = field(default_factory=Wanted)
    options: Options = field(default_factory=Options)
    device: str = "auto"
    """See `pipeline.devices.choose`."""
    skip_existing: bool = False


def carry_out(task: Task, console: Console) -> list[str]:
    """Upscale an image or a folder; returns what went wrong with which image. ValueError where a single one failed.

    What cannot be, or is passed over, is said before any work.
    """
    passed_over = PassedOver()
    planned = plan(task.images, task.target, task.naming, passed_over)
    refuse_quality(planned.jobs, task.wanted)
    devices = choose(task.device)[: max(len(planned.jobs), 1)]
    display = Display(console)
    for note in (passed_over.describe(), *planned.notes):
        if note:
            display.say(f"{task.images}: {note}")
    jobs = planned.jobs
    if jobs:
        network, name = open_network(task.network, devices[0] if len(devices) == 1 else torch.device("cpu"))
    if jobs and task.skip_existing:
        jobs, notes = without_finished(jobs, task.wanted, network.scale)
        for note in notes:
            display.say(f"{task.target}: {note}")
    if not jobs:
        return planned.problems
    return planned.problems + run(jobs, network, name, task.options, console, task.wanted, devices)


def open_network(source: Source, device: torch.device | None = None) -> tuple[UpscalingNetwork, str]:
    """The network in eval mode on a device, the best by default, and what it is. ValueError where it cannot be had."""
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
    return network.to(device or choose()[0]), name


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


def run(
    jobs: Sequence[Job],
    network: UpscalingNetwork,
    name: str,
    options: Options,
    console: Console,
    wanted: Wanted | None = None,
    devices: Sequence[torch.device] = (),
) -> list[str]:
    """Upscale every image; returns what went wrong with which. A single image's error is raised instead.

    With several `devices` images are shared by as many processes, and `network` is on the CPU; else it is where it
    works. ValueError for options that cannot be, before any work, and where no more can be written.
    """
    wanted = wanted or Wanted()
    devices = list(devices)[: len(jobs)] or [network.conv_first.weight.device]
    precision = resolve_precision(options.precision, devices[0])
    upscaler = options.upscaler(network)  # refuses what cannot be, before any image
    bound_threads()
    with Display(console) as display:
        display.say(f"{name}: {network.arch} x{network.scale}, {precision} on {', '.join(map(_called, devices))}")
        if note := emulation_note(options.precision, devices[0]):
            display.say(f"      {note}")
        if len(devices) == 1:
            return _run_here(jobs, upscaler, wanted, display)
        return _run_shared(jobs, network, options, wanted, devices, display)


def _called(device: torch.device) -> str:
    """A device as the first line has it: the only GPU, or the CPU, by its kind alone."""
    return str(device) if device.index else device.type


def _run_here(jobs: Sequence[Job], upscaler: Upscaler, wanted: Wanted, display: Display) -> list[str]:
    """One image after the other in this process, with the progress of each."""
    problems: list[str] = []

    def progress(done: int, total: int) -> None:
        if total > 1:
            display.update(done, total, "tiles")

    for number, job in enumerate(jobs, start=1):
        display.begin_stage(number, len(jobs), job.source.name, f"-> {job.target}")
        try:
            done = _upscale(job, upscaler, wanted, display.say, progress)
            display.end_stage(done)
        except (ValueError, MemoryError, OSError) as error:
            if len(jobs) == 1:
                raise
            display.end_stage("failed")
            _refuse_to_go_on(error, number - 1 - len(problems), len(jobs))
            problems.append(_named(job, error))
    return problems


def _run_shared(
    jobs: Sequence[Job],
    network: UpscalingNetwork,
    options: Options,
    wanted: Wanted,
    devices: Sequence[torch.device],
    display: Display,
) -> list[str]:
    """A process for each device; what is said of each image comes in their order."""
    problems: list[str] = []
    results = device_workers.in_order(jobs, devices, network, partial(_upscale_there, options, wanted))
    with closing(results):
        for number, (job, result, device) in enumerate(results, start=1):
            display.say(f"[{number}/{len(jobs)}] {job.source.name}: -> {job.target}")
            if not isinstance(result, Exception):
                display.say(f"      {job.source.name}: done on {device}: {result}")
                continue
            if not isinstance(result, (ValueError, MemoryError, OSError)):
                raise result
            display.say(f"      {job.source.name}: failed on {device}")
            _refuse_to_go_on(result, number - 1 - len(problems), len(jobs))
            problems.append(_named(job, result))
    return problems


def _upscale_there(options: Options, wanted: Wanted, network: UpscalingNetwork, job: Job) -> str:
    """In a device's process: one image."""
    return _upscale(job, _upscaler_there(options, network), wanted, lambda text: None, lambda done, total: None)


@lru_cache(maxsize=1)
def _upscaler_there(options: Options, network: UpscalingNetwork) -> Upscaler:
    """In a device's process: the same for all its images, so that what one taught about memory holds for the next."""
    return options.upscaler(network)


def _refuse_to_go_on(error: Exception, done: int, count: int) -> None:
    """ValueError where no further image could be written either."""
    if isinstance(error, WriteError) and error.errno in NOTHING_CAN_BE_WRITTEN:
        raise ValueError(
            f"{error}; {done} of {count} images are done, and the same command with --skip-existing goes on from there"
        ) from error


def _upscale(job: Job, upscaler: Upscaler, wanted: Wanted, say: Callable[[str], None], progress: Progress) -> str:
    """One image; returns what it was and became."""
    picture = read_picture(job.source, whole)
    if picture.num_pictures > 1:
        say(f"      {job.source.name}: the first of its {picture.num_pictures} pictures")
    size, scale = picture.pixels.shape[:2], upscaler.network.scale
    has_result_alpha = has_alpha(picture.pixels.shape[2]) and wanted.alpha != "drop"
    refuse_what_it_cannot_hold(job.target, picture.pixels.dtype == np.uint16, has_result_alpha)
    refuse_size(job.target, *wanted.size(size, scale))

    tile = upscaler.choose(size, picture.pixels.shape[2], picture.pixels.dtype.itemsize)
    if tile and max(size) > tile:
        say(f"      {job.source.name}: {upscaler.describe(tile)}")

    pixels = enlarge(picture.pixels, partial(upscaler, progress=progress), scale, wanted)
    lost = write_picture(job.target, Picture(pixels, picture.profile, picture.metadata), wanted.quality)
    before, after = (f"{width} x {height}" for height, width in (size, pixels.shape[:2]))
    tiles = f", tiles of {upscaler.tile_used} px" if upscaler.tile_used else ""
    without = f"; without {', '.join(lost)}" if lost else ""
    return f"{before} -> {after} px, {KINDS[pixels.shape[2]]}, {pixels.dtype.itemsize * 8} bits{tiles}{without}"


def _named(job: Job, error: Exception) -> str:
    text = str(error)
    return text if str(job.source) in text or str(job.target) in text else f"{job.source}: {text}"
