"""What a phase minimises, as its settings say it."""

import tempfile
from pathlib import Path

import torch

from data_prep import storage
from model.losses import Loss, Perceptual, build_loss, with_perceptual
from pipeline.config import PhaseConfig, Recipe


def loss_of(phase: PhaseConfig, device: torch.device) -> Loss:
    """The loss, its weights on a device. ValueError or StorageError where the backbone is not usable."""
    pixel, asked = build_loss(phase.loss), phase.perceptual
    if asked is None:
        return pixel
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        path = storage.local_copy(asked.backbone, Path(folder))
        return with_perceptual(pixel, Perceptual(path, device, asked.stage_weights), asked.weight)


def check_backbones(recipe: Recipe) -> dict[str, str]:
    """sha256 of the backbone of every phase that is trained with one, after reading it; by phase."""
    digests = {}
    for name in dict.fromkeys(training.phase for training in recipe.trainings.values()):
        asked = recipe.phases[name].perceptual
        if asked is not None:
            with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
                try:
                    path = storage.local_copy(asked.backbone, Path(folder))
                    Perceptual(path, torch.device("cpu"), asked.stage_weights)
                    digests[name] = storage.sha256_of(str(path))
                except ValueError as error:
                    raise ValueError(f"phases.{name}.perceptual.backbone {asked.backbone}: {error}") from error
    return digests
