"""The MLflow model registry: one registered model per scale, and what each version of it carries.

Aliases `candidate`, `champion` and `previous` name versions; `promotion` moves the latter two.
"""

import functools
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from data_prep.redact import without_secrets
from pipeline import report
from pipeline.config import RegistryConfig
from pipeline.errors import describe_os_error
from pipeline.evaluate import SetResult
from pipeline.mlflow_search import all_pages, quoted
from pipeline.patient import reason
from pipeline.registry_lock import is_lock
from pipeline.suggest import did_you_mean, some_of

ROOT = Path(__file__).resolve().parents[1]
CONTENT_TAG, SCALE_TAG = "hatchery.content", "hatchery.scale"
EVALUATION, RECIPE = "evaluation.json", "recipe.json"
_NO_SUCH_NAME = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # none that there is, none that there can be


def model_name(registry: RegistryConfig, scale: int) -> str:
    """The registered model of a scale."""
    return f"{registry.name}-x{scale}"


def register(
    client: MlflowClient, run_id: str, name: str, files: dict[str, Path], options: dict[str, Any], tags: dict[str, str]
) -> ModelVersion:
    """Log the model below a run, register it as the next version of `name` and call it `candidate`.

    files: what the version carries, by name: weights.pth (which the model loads) and whatever else; options: what
    `model.load` must be told beside; tags must hold CONTENT_TAG: a version with the same content is used again.
    """
    found = find_version(client, name, tags[CONTENT_TAG])
    if found is None:
        with tempfile.TemporaryDirectory(prefix="hatchery-model-") as folder:
            options_file = Path(folder, "options.json")
            options_file.write_text(json.dumps(options))
            carried = {"weights": files["weights.pth"], "options": options_file}
            carried |= {file: path for file, path in files.items() if file != "weights.pth"}
            with mlflow.start_run(run_id=run_id, log_system_metrics=False):
                logged = mlflow.pyfunc.log_model(
                    name=name,
                    python_model=str(ROOT / "pipeline" / "pyfunc_model.py"),
                    artifacts={key: str(path) for key, path in carried.items()},
                    code_paths=[str(ROOT / "model")],
                    signature=False,  # arrays of several kinds and base64 text: the model itself checks what it gets
                    input_example=np.zeros((1, 8, 8, 3), np.uint8),
                    pip_requirements=requirements(),
                )
        found = mlflow.register_model(logged.model_uri, name, tags=tags)
    client.set_registered_model_alias(name, "candidate", found.version)
    return found


def requirements() -> list[str]:
    """What the package `model` imports, at the versions that the model was made with."""
    packages = ("mlflow", "torch", "numpy", "pillow", "safetensors", "imagecodecs", "tifffile", "scipy")
    return [f"{package}=={version(package).split('+')[0]}" for package in packages]


def fetch_model(client: MlflowClient, uri: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Download a registered version's weights and what `model.load` must be told beside.

    uri: `models:/name@alias` or `models:/name/version`. ValueError for one that is not there or not Hatchery's.
    """
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_registry_uri(client.tracking_uri)
    if not re.fullmatch(r"models:/[^/@]+(@[^/@]+|/\d+)", uri):
        raise ValueError(f"{uri!r} is no registered model: write models:/NAME@champion or models:/NAME/VERSION")
    try:
        version = resolve(client, uri)
        mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder))
    except MlflowException as error:
        where = without_secrets(client.tracking_uri)
        raise ValueError(f"{uri} cannot be had from {where}: {reason(error)}") from error
    except OSError as error:
        raise ValueError(f"{uri} cannot be had: {describe_os_error(error, 'its files are gone')}") from error
    weights, options = folder / "artifacts" / "weights.pth", folder / "artifacts" / "options.json"
    if not weights.is_file() or not options.is_file():
        raise ValueError(
            f"{uri} was not registered by Hatchery, or its files are gone: no weights.pth and options.json"
        )
    return weights, json.loads(options.read_text())


def champion_of(client: MlflowClient, scale: int) -> str:
    """The URI of the only champion that upscales by `scale`; ValueError where there is none, or several."""
    held = [
        f"models:/{model.name}@champion"
        for model in all_pages(client.search_registered_models)
        if "champion" in model.aliases
        and client.get_model_version_by_alias(model.name, "champion").tags.get(SCALE_TAG) == str(scale)
    ]
    if len(held) != 1:
        found = f"several champions for x{scale}: choose one, --model" if held else f"no champion for x{scale}"
        where = without_secrets(client.tracking_uri)
        raise ValueError(f"{where} holds {' '.join([found, ', '.join(held)])}".rstrip())
    return held[0]


def find_version(client: MlflowClient, name: str, content: str) -> ModelVersion | None:
    """The newest version of a registered model that holds this content, or None."""
    held = [
        found
        for found in versions_of(client, name)
        if found.tags.get(CONTENT_TAG) == content and found.status == "READY"
    ]
    return max(held, key=lambda found: int(found.version), default=None)


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a registered model, none where there is no such model."""
    return list(all_pages(functools.partial(client.search_model_versions, f"name = {quoted(name)}")))


def by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to, or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in _NO_SUCH_NAME:
            return None
        raise


def registered(client: MlflowClient, name: str) -> RegisteredModel:
    """A registered model; ValueError, naming some that there are, where it is unknown."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in _NO_SUCH_NAME:
            raise
        known = [model.name for model in all_pages(client.search_registered_models) if not is_lock(model.name)]
        shown = some_of(known) if known else "none yet"
        raise ValueError(f"no registered model {name!r}; registered are: {shown}{did_you_mean(name, known)}") from error


def resolve(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that `models:/NAME@alias` or `models:/NAME/version` names; ValueError where there is none."""
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if found is None:
        raise ValueError(f"{uri!r} is not of the form models:/NAME@alias or models:/NAME/version")
    name, alias, version = found.groups()
    model = registered(client, name)
    if alias:
        by_name = by_alias(client, name, alias)
        if by_name is None:
            raise ValueError(f"{uri}: {name} has no version called {alias}{_called(model, alias)}")
        return by_name
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        held = [int(found.version) for found in versions_of(client, name)]
        known = "nor any other: register one"
        if held:
            known = f"its newest is {max(held)}; there are {some_of(map(str, sorted(held, reverse=True)))}"
        raise ValueError(f"{uri}: {name} has no version {version}, {known}") from error


def _called(model: RegisteredModel, alias: str) -> str:
    """What a model's versions are called, for the message about an alias that it lacks."""
    aliases = [f"{name} (version {number})" for name, number in sorted(model.aliases.items())]
    remedy = f"{'promote' if alias == 'champion' else 'register'} one, or name a version by number"
    meant = did_you_mean(alias, model.aliases)
    return f"{meant or f': {remedy}'}{f'; it has {some_of(aliases)}' if aliases else ''}"


def fetch(version: ModelVersion, file: str, folder: Path) -> Path:
    """A file that a version carries on the local disk; ValueError where it does not carry it."""
    uri = f"models:/{version.name}/{version.version}/artifacts/{file}"
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        raise ValueError(f"{version.name} version {version.version} carries no {file}: register it again") from error


def read_weights(version: ModelVersion, folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The .pth of a version, and the options that belong to it."""
    return fetch(version, "weights.pth", folder).read_bytes(), read_options(version, folder)


def read_options(version: ModelVersion, folder: Path) -> dict[str, Any]:
    """What `model.load` must be told beside a version's weights."""
    return dict(json.loads(fetch(version, "options.json", folder).read_text()))


def read_report(version: ModelVersion, folder: Path) -> list[SetResult]:
    """The evaluation that a version was registered with; empty where it carries none."""
    try:
        return report.from_json(fetch(version, EVALUATION, folder).read_text())
    except ValueError:
        return []


def metric_tags(results: list[SetResult]) -> dict[str, str]:
    """A model's figures as tags of its version: `psnr_y.Set5` and so on, `tile.Set5` and `device.Set5` beside them."""
    tags = {
        f"{metric}.{result.set}": f"{getattr(result, metric):.6f}"
        for result in results
        for metric in result.protocol.metrics
    }
    for result in results:
        if result.devices:  # reports from before it was kept have none
            tags |= {f"tile.{result.set}": result.tiles, f"device.{result.set}": result.devices}
    return tags
