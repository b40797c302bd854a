"""The figures of a candidate's rival: from the report its version carries, or judged again where that does not fit."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline import registry
from pipeline.actor_pool import ActorPool
from pipeline.config import ComputeConfig, EvaluateConfig
from pipeline.costs import measure_costs
from pipeline.evaluate import SetResult, Weights, evaluate, judges, load_bytes
from pipeline.gate import Anchor, Costs, Verdict, decide
from pipeline.lineage import PARENT_TAG
from pipeline.rule import GateConfig


def judge_candidate(
    mine: list[SetResult],
    candidate: ModelVersion,
    champion: ModelVersion | None,
    rule: GateConfig,
    asked: EvaluateConfig,
    anchor_uri: str | None = None,
    compute: ComputeConfig | None = None,
) -> Verdict:
    """The gate's verdict on a candidate with results `mine`; Ray must be initialised. asked: the sets.

    The rival is the champion; where there is none, the version that the candidate was started from, else bicubic.
    anchor_uri: models:/NAME/VERSION that the rule's `not_worse` is asked about as well. compute: what is judged on.
    """
    rival = champion or parent_of(candidate)
    if rival is None:
        return decide(mine, None, "bicubic" if any(result.scale > 1 for result in mine) else "the input", rule)
    title = f"champion version {rival.version}" if champion else f"{rival.name} version {rival.version}, its start"
    anchor = registry.resolve(MlflowClient(), anchor_uri) if anchor_uri else None
    with judges(compute or ComputeConfig()) as pool, tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        theirs = rival_results(pool, rival, mine, rule.sets, asked, Path(folder))
        # a set may have grown since
        mine = rival_results(pool, candidate, theirs, rule.sets, asked, Path(folder), mine)
        since, costs = None, None
        if anchor is not None and (anchor.name, str(anchor.version)) != (rival.name, str(rival.version)):
            (place := Path(folder, "anchor")).mkdir()
            results = rival_results(pool, anchor, mine, list(rule.not_worse), asked, place)
            since = Anchor(f"{anchor.name} version {anchor.version}, where the domain started", results)
        if rule.max_slowdown is not None or rule.max_growth is not None:
            costs = compare_costs(candidate, rival, Path(folder))
    return decide(mine, theirs, title, rule, costs, since)


def parent_of(version: ModelVersion) -> ModelVersion | None:
    """The registered version that a version was started from, if it was."""
    uri = version.tags.get(PARENT_TAG)
    return registry.resolve(MlflowClient(), uri) if uri else None


def rival_results(
    pool: ActorPool,
    rival: ModelVersion,
    mine: list[SetResult],
    names: Sequence[str],
    asked: EvaluateConfig,
    folder: Path,
    known: list[SetResult] | None = None,
) -> list[SetResult]:
    """The rival's results on the sets of some names, on the same images and by the same protocol as `mine`.

    known: results to be used again where they fit; None: those that the version carries.
    """
    carried = {result.set: result for result in (registry.read_report(rival, folder) if known is None else known)}
    found, weights = [], None
    for result in mine:
        if result.set not in names:
            continue
        if result.set in carried and _comparable(carried[result.set], result):
            found.append(carried[result.set])
            continue
        (place := folder / f"{rival.name}-{rival.version}").mkdir(exist_ok=True)
        weights = weights or Weights.put(*registry.read_weights(rival, place))
        images = asked.images(result.set, result.scale)
        name = f"{rival.name} version {rival.version}"
        found.append(evaluate(pool, name, result.scale, weights, result.set, images, result.protocol).result)
    return found


def _comparable(theirs: SetResult, mine: SetResult) -> bool:
    same_images = {image.digest for image in theirs.images} == {image.digest for image in mine.images}
    return same_images and theirs.protocol == mine.protocol and theirs.scale == mine.scale


def compare_costs(candidate: ModelVersion, rival: ModelVersion, folder: Path) -> Costs:
    """Time and size of two versions, measured here and now."""
    networks = []
    for version in (candidate, rival):
        (place := folder / f"{version.name}-{version.version}").mkdir(exist_ok=True)
        networks.append(load_bytes(*registry.read_weights(version, place)))
    return measure_costs(*networks)
