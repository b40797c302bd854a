"""Weights that start a training: of another scale (the cascade) or published ones, checked before they are used."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep import storage
from model import build
from model.blocks import UpscalingNetwork
from model.init import transfer
from model.weights import read_weights, recognise
from pipeline import registry, tracking
from pipeline.config import ModelConfig, Recipe, tracking_uri


def start_network(
    weights: dict[str, Tensor], origin: str, model: ModelConfig, scale: int, seed: int, tail: str
) -> tuple[UpscalingNetwork, dict[str, str]]:
    """A network of a scale started from weights of any scale, and what was done per key (model.init.transfer).

    ValueError, naming `origin` and the sizes that differ, where the weights belong to another architecture.
    """
    check_fits(weights, origin, model, scale)
    torch.manual_seed(seed)
    network = build(model.arch, scale, **model.options)
    return network, transfer(weights, network, tail=tail)


def check_fits(weights: dict[str, Tensor], origin: str, model: ModelConfig, scale: int) -> None:
    """ValueError unless the weights are of the recipe's architecture and sizes, whatever their scale."""
    with torch.device("meta"):
        wanted: dict[str, Any] = build(model.arch, scale, **model.options).config
    try:
        found = recognise(weights)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    differing = [
        f"{key} {value} (the recipe's: {wanted.get(key)})"
        for key, value in found.items()
        if key not in ("scale", "restoration_head") and wanted.get(key) != value  # transfer knows what to do with these
    ]
    if differing:
        raise ValueError(
            f"{origin} holds another architecture: {', '.join(differing)}; "
            f"choose the recipe's model to match, or other weights"
        )


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with a version's number for every `models:/NAME@alias` it starts from.

    Fingerprint, weights and lineage then speak of one version, wherever the alias is moved meanwhile.
    """
    trainings = dict(recipe.trainings)
    for name, training in recipe.trainings.items():
        if training.init_weights and training.init_weights.startswith("models:/"):
            version = registry.resolve(tracking.connect_default(tracking_uri(recipe)), training.init_weights)
            number = f"models:/{version.name}/{version.version}"
            trainings[name] = training.model_copy(update={"init_weights": number})
    return recipe.model_copy(update={"trainings": trainings})


def check_published(recipe: Recipe) -> dict[str, str]:
    """sha256 of every `init_weights` of a recipe, after checking that they fit; by training."""
    digests = {}
    for name, training in recipe.trainings.items():
        if training.init_weights:
            with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
                path = fetch_published(training.init_weights, Path(folder), recipe)
                check_fits(read_weights(path), training.init_weights, recipe.model, training.scale)
                digests[name] = storage.sha256_of(str(path))
    return digests


def fetch_published(uri: str, folder: Path, recipe: Recipe | None = None) -> Path:
    """Published or registered weights on the local disk; a recipe tells which registry."""
    if uri.startswith("models:/"):
        client = tracking.connect_default(tracking_uri(recipe) if recipe else None)
        return registry.fetch(registry.resolve(client, uri), "weights.pth", folder)
    return storage.local_copy(uri, folder)
