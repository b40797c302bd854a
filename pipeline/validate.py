"""Validation while training: the averaged weights on a few images, spread over the ranks; the best are kept.

The best weights are uploaded by a thread while training goes on: `best/weights.pt`, then `best/best.json`, which
names their step and figure.
"""

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
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


class Validator:
    """Judges averaged weights and keeps the best of them at `place` (URI of a folder)."""

    def __init__(self, images: list[ImagePair], metric: str, place: str, best: Best | None) -> None:
        self.images = images
        self.metric = metric
        self.place = place
        self.best = best
        self.most_px: int | None = None
        self.tiles: list[int] = []
        """The sides of the last validation's tiles on any rank, px; none where all images went whole."""
        self.uploads = ThreadPoolExecutor(1, thread_name_prefix="hatchery-best")
        self.upload: Future[None] | None = None

    def judge(self, network: UpscalingNetwork, weights: dict[str, Tensor], step: int, pictures: int) -> dict[str, Any]:
        """Collective: a record with the means over all images, and rank 0's first pictures as PNG bytes.

        network: any of the architecture, on the device to work on; takes the weights and keeps them.
        """
        load_parameters(network, weights)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        figures: list[tuple[float, float]] = []
        tiles: set[int] = set()
        shown: dict[str, bytes] = {}
        upscaler = self._upscaler(network)
        for name, low_res, high_res in self.images[rank::world_size]:
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
        self._keep_best(weights, Best(step=step, value=metrics[f"validation_{self.metric}"], metric=self.metric))
        self.most_px = upscaler.most_px
        return {"metrics": metrics, "pictures": shown} | self._note(
            sorted(set().union(*(part for _, part in everyone)))
        )

    def _upscaler(self, network: UpscalingNetwork) -> Upscaler:
        """Takes tiles where memory asks for them, no larger than what has failed before; processes of a node share."""
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if network.conv_first.weight.device.type == "cpu" else 1
        upscaler = Upscaler(network, tile="auto", share=MEMORY_SHARE / beside)
        upscaler.most_px = self.most_px
        return upscaler

    def _note(self, tiles: list[int]) -> dict[str, str]:
        """A warning for the record where tiles are not those of the validation before."""
        if tiles == self.tiles:
            return {}
        self.tiles = tiles
        sides = f"in tiles of {', '.join(map(str, tiles))} px" if tiles else "without tiles"
        return {"warning": f"validation {sides}, as memory allows: its figures may differ slightly from those before"}

    def _keep_best(self, weights: dict[str, Tensor], found: Best) -> None:
        if self.best is not None and found.value <= self.best.value:
            return
        self.best = found
        if dist.get_rank() == 0:
            self.wait()
            here = {name: value.to("cpu", copy=True) for name, value in weights.items()}
            self.upload = self.uploads.submit(_publish, here, found, self.place)

    def wait(self) -> None:
        """Until the best weights are in the storage; raises what went wrong."""
        if self.upload is not None:
            self.upload.result()


def _publish(weights: dict[str, Tensor], found: Best, place: str) -> None:
    with tempfile.TemporaryDirectory(prefix=storage.owned(checkpoint.FOLDER)) as folder:
        torch.save({"weights": weights, "best": found.model_dump()}, Path(folder, WEIGHTS))
        Path(folder, BEST).write_text(found.model_dump_json(indent=1))
        for name in (WEIGHTS, BEST):
            checkpoint.upload(Path(folder, name), storage.join(place, name))


def read_best(place: str, folder: Path) -> tuple[dict[str, Tensor], Best] | None:
    """The best weights at a place and what they reached; None where nothing was validated."""
    if not storage.exists(storage.join(place, BEST)):
        return None
    file = folder / WEIGHTS
    storage.download(storage.join(place, WEIGHTS), file)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    return saved["weights"], Best.model_validate(saved["best"])
