"""`hatchery evaluate`: anybody's HAT or HMANet weights on anybody's sets, with reports, and one against the other."""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from rich.console import Console

from data_prep.degrade import check
from data_prep.degrade_steps import Step
from data_prep.image_files import PassedOver
from data_prep.uri import printable
from model import load
from model.weights import read_weights, recognise
from pipeline import cluster, compare, pictures, registry, report, stages, tracking
from pipeline.actor_pool import ActorPool
from pipeline.benchmark import BenchmarkImage, Protocol, read_set, set_name
from pipeline.cascade import fetch_published
from pipeline.config import EVALUATION_SCALES, ComputeConfig
from pipeline.config_files import place_of
from pipeline.evaluate import SetResult, Weights, evaluate, judges, load_distance
from pipeline.published import preset_of
from pipeline.settings import Settings, explain


@dataclass(frozen=True)
class Given:
    """Weights as a user gave them, read and recognised; `content` is a .pth in the published layout."""

    title: str
    scale: int
    arch: str | None
    content: bytes
    options: dict[str, Any]


def read_given(uri: str, options: list[str], tracking_uri: str | None) -> Given:
    """Weights at a path, an s3:// URI or models:/NAME@alias. ValueError for what is not there or not known here."""
    given = dict(_option(option) for option in options)
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        if uri.startswith("models:/"):
            version = registry.resolve(tracking.connect_default(tracking_uri), uri)
            path, title = registry.fetch(version, "weights.pth", Path(folder)), f"{version.name}-v{version.version}"
            given = registry.read_options(version, Path(folder)) | given
        else:
            path, title = fetch_published(uri, Path(folder)), Path(uri).stem
        state = read_weights(path)
    try:
        scale = recognise(state)["scale"]
        load(state, **given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{uri}: {error}") from error
    if scale not in EVALUATION_SCALES:
        raise ValueError(f"{uri} upscales x{scale}: only {EVALUATION_SCALES} can be judged against bicubic")
    buffer = io.BytesIO()
    torch.save({"params_ema": state}, buffer)
    return Given(title, scale, preset_of(state), buffer.getvalue(), given)


def _option(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key, int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError as error:
        raise ValueError(f"option {text!r} is not of the form key=number, such as conv_scale=0.01") from error


@dataclass(frozen=True)
class Request:
    """What to judge, and where the reports go."""

    weights: list[str]
    sets: list[str]
    protocol: Protocol
    options: list[str]
    degrade: str | None = None
    pictures: int = 2
    out: str = "evaluation"
    tracking_uri: str | None = None


def run(request: Request, console: Console, address: str | None = None, debug: bool = False) -> None:
    """Judge every weights file on every set; print the tables and write the reports below `request.out`.

    The first weights are compared with each of the others, image by image.
    """
    given = [read_given(uri, request.options, request.tracking_uri) for uri in request.weights]
    given = [_renamed(found, number, given) for number, found in enumerate(given)]
    if len({found.scale for found in given}) > 1:
        scales = ", ".join(f"{found.title} x{found.scale}" for found in given)
        raise ValueError(f"weights of different scales cannot be compared: {scales}; judge each by itself")
    for name, config in request.protocol.distances.items():
        load_distance(name, config)  # what is wrong with it is said before work begins
    steps = _steps(request.degrade, given[0].scale) if request.degrade else ()
    passed_over = {uri: PassedOver() for uri in request.sets}
    sets = {set_name(uri): read_set(uri, given[0].scale, (), steps, left) for uri, left in passed_over.items()}
    if len(sets) < len(request.sets):
        raise ValueError(f"two of the sets {', '.join(request.sets)} have the same name: rename a folder")
    for uri, left in passed_over.items():
        if said := left.describe():
            console.print(printable(f"{uri}: {said}"), soft_wrap=True, markup=False, highlight=False)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    results: list[SetResult] = []
    compute = ComputeConfig()
    with cluster.connected(compute, address, debug), judges(compute) as pool:
        for found in given:
            weights = Weights.put(found.content, found.options)
            for name, images in sets.items():
                results.append(_judge(pool, request, found, weights, name, images, out))
                console.print(report.image_table(results[-1]))
    archs = {found.title: found.arch for found in given}
    compared = _comparisons(results, given)
    table = report.comparison_table(compared) if compared else None
    for shown in (report.table(results), report.published_table(results, archs), table):
        if shown is not None:
            console.print(shown)
    stages.write_reports(results, archs, out)
    if compared:
        (out / "comparisons.json").write_text(report.comparisons_json(given[0].title, compared))
        (out / "comparisons.csv").write_text(report.comparisons_csv(given[0].title, compared))
    console.print(f"reports: {out}", soft_wrap=True, markup=False, highlight=False)


class _Degrade(Settings):
    degrade: tuple[Step, ...]


def _steps(text: str, scale: int) -> tuple[Step, ...]:
    try:
        steps = _Degrade.model_validate({"degrade": yaml.safe_load(text)}).degrade
        check(steps, scale)
    except ValidationError as error:
        raise ValueError(explain(_Degrade, "--degrade", error)) from error
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"--degrade {text!r}: {place_of(error, text)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--degrade {text!r}: {' '.join(str(error).split())}") from error
    return steps


def _renamed(found: Given, number: int, given: list[Given]) -> Given:
    """Files of the same name in different folders get numbers."""
    if sum(other.title == found.title for other in given) < 2:
        return found
    return Given(f"{found.title}-{number + 1}", found.scale, found.arch, found.content, found.options)


def _judge(
    pool: ActorPool,
    request: Request,
    found: Given,
    weights: Weights,
    name: str,
    images: list[BenchmarkImage],
    out: Path,
) -> SetResult:
    judged = evaluate(pool, found.title, found.scale, weights, name, images, request.protocol)
    (out / "pictures").mkdir(exist_ok=True)
    pictures.write_pictures(judged, images, request.pictures, out / "pictures")
    return judged.result


def _comparisons(results: list[SetResult], given: list[Given]) -> list[compare.Comparison]:
    first, *others = (found.title for found in given)
    by_name = {(result.model, result.set): result for result in results}
    names = dict.fromkeys(result.set for result in results)
    return [compare.compare(by_name[first, name], by_name[other, name]) for other in others for name in names]
