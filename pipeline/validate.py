"""Validation while training: the averaged weights on a few images, spread over the ranks; the best are kept.

The best weights are uploaded by a thread while training goes on: `best/weights.pt`, then `best/best.json`, which
names their step and figure. Training never waits for it; where the storage is slow only the newest are uploaded next.
"""

import math
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep import storage
from data_prep.subimages import to_png
from model.blocks import UpscalingNetwork
from model.inference import Upscaler
from model.memory import MEMORY_SHARE
from model.metrics import RESOLVED_DB, psnr_y, ssim_y
from model.weights import load_parameters
from pipeline import checkpoint
from pipeline.benchmark import border_px
from pipeline.config import Settings
from pipeline.evaluate import restored

WEIGHTS, BEST = "weights.pt", "best.json"

ImagePair = tuple[str, np.ndarray, np.ndarray]  # name, low_res and high_res, as in `benchmark.Pair`


class Best(Settings):
    """The best validation so far; higher is better."""

    step: int
    value: float
    metric: str


Candidate = tuple[dict[str, Tensor], Best]


class NewestUpload:
    """Uploads in a thread, one at a time; of those that wait only the newest stays."""

    def __init__(self, upload: Callable[[Candidate], None]) -> None:
        self.upload = upload
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="hatchery-best")
        self.lock = threading.Lock()
        self.waiting: Candidate | None = None
        self.busy = False
        self.running: Future[None] | None = None

    def put(self, candidate: Candidate) -> None:
        """Upload it next, without waiting; raises what went wrong with one before."""
        with self.lock:
            self.waiting = candidate
            if self.busy:
                return
            if self.running is not None:
                self.running.result()
            self.busy, self.running = True, self.pool.submit(self._run)

    def _run(self) -> None:
        try:
            while (candidate := self._next()) is not None:
                self.upload(candidate)
        except BaseException:
            self.busy = False
            raise

    def _next(self) -> Candidate | None:
        with self.lock:
            candidate, self.waiting = self.waiting, None
            self.busy = candidate is not None
            return candidate

    def wait(self, alive: Callable[[], object]) -> None:
        """Until all is there, calling `alive` every second; raises what went wrong."""
        if self.running is None:
            return
        while not self.running.done():
            alive()
            wait([self.running], timeout=1)
        self.running.result()


class Validator:
    """Judges averaged weights and keeps the best of them at `place` (URI of a folder).

    best: the best there so far; patience_s: how long an upload waits for the storage.
    """

    def __init__(
        self,
        images: list[ImagePair],
        metric: str,
        place: str,
        best: Best | None,
        patience_s: float = checkpoint.UPLOAD_PATIENCE_S,
    ) -> None:
        self.images = images
        self.metric = metric
        self.best = best
        self.most_px: int | None = None
        self.tiles: list[int] = []
        """The sides of the last validation's tiles on any rank, px; none where all images went whole."""
        self.uploads = NewestUpload(lambda candidate: _publish(*candidate, place, patience_s))

    def judge(
        self,
        network: UpscalingNetwork,
        weights: dict[str, Tensor],
        step: int,
        pictures: int,
        alive: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Collective: a record with the means over all images, and rank 0's first pictures as PNG bytes.

        network: any of the architecture, on the device to work on; takes the weights and keeps them. alive: called
        before each image.
        """
        load_parameters(network, weights)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        figures: list[tuple[float, float]] = []
        tiles: set[int] = set()
        shown: dict[str, bytes] = {}
        upscaler = self._upscaler(network)
        for name, low_res, high_res in self.images[rank::world_size]:
            alive()
            output = restored(upscaler, low_res)
            tiles |= {upscaler.tile_used} if upscaler.tile_used else set()
            border = border_px(high_res.shape[0] // low_res.shape[0])
            psnr = min(psnr_y(output, high_res, border), RESOLVED_DB)
            figures.append((psnr, ssim_y(output, high_res, border)))
            if rank == 0 and len(shown) < pictures:
                shown[f"{name}.png"] = to_png(np.concatenate([output, high_res], axis=1))
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, (figures, tiles))
        psnr, ssim = np.mean([pair for part, _ in everyone for pair in part], axis=0).tolist()
        metrics = {"validation_psnr_y": psnr, "validation_ssim_y": ssim}
        self.most_px = upscaler.most_px
        notes = [
            self._keep_best(weights, Best(step=step, value=metrics[f"validation_{self.metric}"], metric=self.metric)),
            self._note(sorted(set().union(*(part for _, part in everyone)))),
        ]
        warning = "; ".join(filter(None, notes))
        return {"metrics": metrics, "pictures": shown} | ({"warning": warning} if warning else {})

    def _upscaler(self, network: UpscalingNetwork) -> Upscaler:
        """Takes tiles where memory asks for them, no larger than what has failed before; processes of a node share."""
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if network.conv_first.weight.device.type == "cpu" else 1
        upscaler = Upscaler(network, tile="auto", share=MEMORY_SHARE / beside)
        upscaler.most_px = self.most_px
        return upscaler

    def _note(self, tiles: list[int]) -> str | None:
        """A warning for the record where tiles are not those of the validation before."""
        if tiles == self.tiles:
            return None
        self.tiles = tiles
        sides = f"in tiles of {', '.join(map(str, tiles))} px" if tiles else "without tiles"
        return f"validation {sides}, as memory allows: its figures may differ slightly from those before"

    def _keep_best(self, weights: dict[str, Tensor], found: Best) -> str | None:
        """Have the weights uploaded where none were better; a warning where they cannot be compared."""
        if not math.isfinite(found.value):
            return f"validation {found.metric} is {found.value}: its weights are not kept as the best"
        if self.best is not None and found.value <= self.best.value:
            return None
        self.best = found
        if dist.get_rank() == 0:
            self.uploads.put(({name: value.to("cpu", copy=True) for name, value in weights.items()}, found))
        return None

    def wait(self, alive: Callable[[], object] = lambda: None) -> None:
        """Until the best weights are in the storage, calling `alive` every second; raises what went wrong."""
        self.uploads.wait(alive)


def _publish(
    weights: dict[str, Tensor], found: Best, place: str, patience_s: float = checkpoint.UPLOAD_PATIENCE_S
) -> None:
    with tempfile.TemporaryDirectory(prefix=storage.owned(checkpoint.FOLDER)) as folder:
        torch.save({"weights": weights, "best": found.model_dump()}, Path(folder, WEIGHTS))
        Path(folder, BEST).write_text(found.model_dump_json(indent=1))
        for name in (WEIGHTS, BEST):
            checkpoint.upload(Path(folder, name), storage.join(place, name), patience_s)


def published_best(place: str, metric: str) -> Best | None:
    """What the weights at a place reached; None where there are none, or they were chosen by another metric.

    A checkpoint cannot tell: the weights of its best may not have been uploaded when the run was killed.
    """
    if not storage.exists(storage.join(place, BEST)):
        return None
    found = Best.model_validate_json(storage.read_bytes(storage.join(place, BEST)))
    return found if found.metric == metric else None


def read_best(place: str, folder: Path) -> tuple[dict[str, Tensor], Best] | None:
    """The best weights at a place and what they reached; None where nothing was validated."""
    if not storage.exists(storage.join(place, BEST)):
        return None
    file = folder / WEIGHTS
    storage.download(storage.join(place, WEIGHTS), file)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    return saved["weights"], Best.model_validate(saved["best"])
