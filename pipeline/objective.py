"""What a phase minimises, as its settings say it."""

import tempfile
from pathlib import Path

import torch

from data_prep import storage
from model.losses import Loss, Perceptual, build_loss, with_perceptual
from pipeline.config import PerceptualConfig, PhaseConfig, Recipe


def loss_of(phase: PhaseConfig, device: torch.device) -> Loss:
    """The loss, its weights on a device. ValueError or StorageError where the backbone is not usable."""
    pixel, asked = build_loss(phase.loss), phase.perceptual
    if asked is None:
        return pixel
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        return with_perceptual(pixel, _perceptual(asked, Path(folder), device), asked.weight)


def check_backbones(recipe: Recipe) -> dict[str, str]:
    """sha256 of the backbone of every phase that is trained with one, after reading it; by phase."""
    digests = {}
    for name in dict.fromkeys(training.phase for training in recipe.trainings.values()):
        asked = recipe.phases[name].perceptual
        if asked is not None:
            with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
                try:
                    _perceptual(asked, Path(folder), torch.device("cpu"))
                    digests[name] = storage.sha256_of(str(_fetched(asked.backbone, Path(folder))))
                except ValueError as error:
                    raise ValueError(f"phases.{name}.perceptual.backbone {asked.backbone}: {error}") from error
    return digests


def _perceptual(asked: PerceptualConfig, folder: Path, device: torch.device) -> Perceptual:
    return Perceptual(_fetched(asked.backbone, folder), device, asked.stage_weights)


def _fetched(uri: str, folder: Path) -> Path:
    """The file on the local disk."""
    if storage.is_local(uri):
        return Path(storage.normalise(uri))
    path = folder / uri.rsplit("/", 1)[-1]
    if not path.exists():
        storage.download(uri, path)
    return path
