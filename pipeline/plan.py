"""The recipe's graph as a list of stages in order, and what is to be done about each. Pure but for look-ups."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from data_prep.image_files import MAX_PIXELS
from model import build
from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.config import Recipe, digest_of
from pipeline.suggest import did_you_mean

Kind = Literal["shard", "mix", "train", "cascade", "evaluate", "register", "promote"]

# Raise a kind's number when its code changes what it produces from the same config and inputs.
VERSIONS: dict[Kind, int] = {"shard": 3, "mix": 2, "train": 2, "cascade": 2, "evaluate": 4, "register": 3, "promote": 3}


@dataclass(frozen=True)
class Stage:
    """One step of a recipe. `config` and the inputs' digests decide whether a finished artifact still counts."""

    name: str
    kind: Kind
    group: str
    inputs: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    """Of a training whose phase says so; one with minutes finds out."""
    length: str = ""
    """Of a training, in words."""

    def fingerprint(self, digests: dict[str, str]) -> str:
        """sha256 over kind, code version, config and the digests of the inputs."""
        return digest_of([self.name, self.kind, VERSIONS[self.kind], self.config, digests])


@dataclass(frozen=True)
class Planned:
    """A stage with what is known about it before running: finished, to run, or not selected."""

    stage: Stage
    action: Literal["done", "run", "skip"]
    artifact: Artifact | None


@dataclass
class Amount:
    """How much a source holds."""

    images: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Outside:
    """Fingerprints of what a recipe reads from outside its storage, by name in the recipe."""

    sources: dict[str, str]
    sets: dict[str, str]
    weights: dict[str, str]
    backbones: dict[str, str] = field(default_factory=dict)
    """Of perceptual losses, by phase."""
    amounts: dict[str, Amount] = field(default_factory=dict)
    """Of data and benchmark sets; no fingerprint asks for them."""


def stages_of(recipe: Recipe, outside: Outside) -> list[Stage]:
    """All stages of a recipe in the order they run."""
    used = recipe.used_data
    stages = [_shard_stage(recipe, name, outside.sources[name]) for name in recipe.data if name in used]
    for name in dict.fromkeys(phase.data for phase in recipe.used_phases if phase.data in recipe.mixes):
        inputs = dict.fromkeys(f"shard-{data}" for data in recipe.data_of(name))
        parts = [part.model_dump(mode="json") for part in recipe.mixes[name]]
        stages.append(Stage(f"mix-{name}", "mix", "shard", tuple(inputs), {"parts": parts}))
    for name in recipe.trainings:
        stages += _training_stages(recipe, name, outside)
    finals = recipe.final_trainings
    # without steps as it was before there were any: evaluations of then still count
    unsaid = {"sets", "models", "hold_out"} | (set() if recipe.evaluate.degrade else {"degrade"})
    evaluate = recipe.evaluate.model_dump(mode="json", exclude=unsaid)
    stages.append(Stage("evaluate", "evaluate", "evaluate", tuple(finals), evaluate | {"sets": outside.sets}))
    registry = recipe.registry.model_dump(mode="json")
    model = recipe.model.model_dump(mode="json")
    stages.append(
        Stage(
            "register",
            "register",
            "register",
            (*finals, "evaluate"),
            {"name": registry["name"], "model": model},
        )
    )
    stages.append(Stage("promote", "promote", "promote", ("register", "evaluate"), registry))
    return stages


def _shard_stage(recipe: Recipe, name: str, source_version: str) -> Stage:
    data = recipe.data[name]
    unsaid = {"max_pixels"} if data.max_pixels == MAX_PIXELS else set()  # as it was before there was a choice
    config = data.model_dump(mode="json", exclude={"source"} | unsaid)
    return Stage(
        f"shard-{name}",
        "shard",
        "shard",
        (),
        config | {"seed": recipe.seed, "source_version": source_version},
    )


def _training_stages(recipe: Recipe, name: str, outside: Outside) -> list[Stage]:
    """A training, after the cascade that turns its source's weights (of another scale, or published) to its own."""
    training = recipe.trainings[name]
    phase = recipe.phases[training.phase]
    stages = []
    start = training.init_from
    if training.init_weights or (start and recipe.trainings[start].scale != training.scale):
        begin: dict[str, Any] = {
            "model": recipe.model.model_dump(mode="json"),
            "scale": training.scale,
            "seed": training.seed,
        }
        begin |= recipe.cascade.model_dump(mode="json") | {"weights": outside.weights.get(name)}
        begin |= _head_of(recipe, training.scale)
        cascade = f"cascade-{start or 'published'}-to-{name}"
        stages.append(Stage(cascade, "cascade", "cascade", (start,) if start else (), begin))
        start = cascade
    data = f"{'mix' if phase.data in recipe.mixes else 'shard'}-{phase.data}"
    inputs = (data, *([start] if start else []))
    config: dict[str, Any] = {
        "model": recipe.model.model_dump(mode="json"),
        "phase": phase.what(),
        "training": training.model_dump(mode="json", exclude={"init_from", "init_weights", "phase"}),
        "seed": recipe.seed,
        **_head_of(recipe, training.scale),
    }
    if training.phase in outside.backbones:
        config["backbone"] = outside.backbones[training.phase]
    if recipe.validation.export == "best":  # else validation only looks
        chooser = recipe.validation.model_dump(mode="json", include={"every", "max_images"})
        gate = recipe.registry.gate
        config["best"] = chooser | {"set": gate.validation_set, "metric": gate.validation_metric}
        if steps := recipe.evaluate.degrade.get(gate.validation_set):
            config["best"]["degrade"] = [step.model_dump(mode="json") for step in steps]
    stages.append(Stage(name, "train", training.phase, inputs, config, phase.steps or 0, phase.length))
    return stages


def _head_of(recipe: Recipe, scale: int) -> dict[str, str]:
    """How a network of scale 1 ends, unless as all did when fingerprints had no word for it: those still count."""
    if scale > 1:
        return {}
    with torch.device("meta"):
        network = build(recipe.model.arch, scale, **recipe.model.options)
    return {} if network.is_residual else {"restoration_head": "reconstruction"}


def select(stages: list[Stage], names: list[str] | None, first: str | None, last: str | None) -> set[str]:
    """The names of the stages that --stages, --from and --until leave; each may name a stage or a group."""
    chosen = {stage.name for stage in stages}
    if names:
        chosen = {stage.name for name in names for stage in _named(stages, name)}
    order = [stage.name for stage in stages]
    if first:
        begin = min(order.index(stage.name) for stage in _named(stages, first))
        chosen &= set(order[begin:])
    if last:
        end = max(order.index(stage.name) for stage in _named(stages, last))
        chosen &= set(order[: end + 1])
    if not chosen:
        raise ValueError(f"no stage is left of --stages {names}, --from {first}, --until {last}: widen the choice")
    return chosen


def _named(stages: list[Stage], name: str) -> list[Stage]:
    found = [stage for stage in stages if name in (stage.name, stage.group)]
    if not found:
        groups, names = list(dict.fromkeys(stage.group for stage in stages)), [stage.name for stage in stages]
        meant = did_you_mean(name, [*groups, *names])
        raise ValueError(f"stage {name!r} is unknown{meant}; groups: {', '.join(groups)}; stages: {', '.join(names)}")
    return found


def make_plan(
    storage_uri: str, stages: list[Stage], chosen: set[str], is_current: Callable[[Stage, Artifact], bool]
) -> list[Planned]:
    """What each stage needs, as far as can be told now: a stage behind one that has to run is to run as well."""
    digests: dict[str, str] = {}
    planned = []
    for stage in stages:
        known = all(name in digests for name in stage.inputs)
        found = None
        if known:
            found = look_up(storage_uri, stage, digests, is_current)
        if found:
            digests[stage.name] = found.digest
        action: Literal["done", "run", "skip"] = "done" if found else "run" if stage.name in chosen else "skip"
        planned.append(Planned(stage, action, found))
    return planned


def look_up(
    storage_uri: str, stage: Stage, digests: dict[str, str], is_current: Callable[[Stage, Artifact], bool]
) -> Artifact | None:
    """The stage's finished artifact if there is one and it still holds (a registry may have lost it)."""
    fingerprint = stage.fingerprint({name: digests[name] for name in stage.inputs})
    found = artifacts.find(storage_uri, stage.name, fingerprint)
    return found if found and is_current(stage, found) else None
