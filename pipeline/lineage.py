"""Where a model comes from: the stages behind it, the data they saw, the versions it was started from."""

import json

from pipeline.artifact import Artifact
from pipeline.config import Recipe

PARENT_TAG = "hatchery.parent_version"


def ancestry(name: str, finished: dict[str, Artifact]) -> list[Artifact]:
    """A stage and all behind it, itself first, each once."""
    found = {name: finished[name]}
    for parent in finished[name].inputs:
        for artifact in ancestry(parent, finished):
            found.setdefault(artifact.stage, artifact)
    return list(found.values())


def tags(recipe: Recipe, name: str, finished: dict[str, Artifact]) -> dict[str, str]:
    """The ancestry of a training as tags of a model version."""
    behind = ancestry(name, finished)
    networks = [artifact.stage for artifact in behind if not artifact.stage.startswith(("shard-", "mix-"))]
    made = {
        "hatchery.ancestry": " <- ".join(networks),
        "hatchery.code": behind[0].code.get("git", "unknown"),
    }
    made |= {f"hatchery.data.{_data_name(artifact)}": artifact.digest for artifact in behind if _is_data(artifact)}
    for training in (artifact.stage for artifact in behind):
        start = recipe.trainings[training].init_weights if training in recipe.trainings else None
        if start:
            made[PARENT_TAG if start.startswith("models:/") else "hatchery.started_from"] = start
    return made


def as_json(name: str, finished: dict[str, Artifact]) -> str:
    """The ancestry in full, newest first."""
    kept = {"stage", "uri", "digest", "inputs", "created", "code"}
    return json.dumps(
        [artifact.model_dump(mode="json", include=kept) for artifact in ancestry(name, finished)], indent=1
    )


def data_behind(name: str, finished: dict[str, Artifact]) -> dict[str, Artifact]:
    """The sets of shards that a training and those before it saw, by name."""
    return {_data_name(artifact): artifact for artifact in ancestry(name, finished) if _is_data(artifact)}


def _is_data(artifact: Artifact) -> bool:
    return artifact.stage.startswith("shard-")


def _data_name(artifact: Artifact) -> str:
    return artifact.stage.removeprefix("shard-")
