"""The main job: every stage of a recipe, in order, each skipped when its finished artifact still holds.

python pipeline/pretrain.py --recipe configs/recipe/demo.yaml    (or: python -m pipeline.pretrain, hatchery pretrain)
ray job submit --working-dir . -- python pipeline/pretrain.py --recipe hat_l --set storage.uri=s3://bucket/prefix
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    if sys.path[0] != str(ROOT):
        # Run as a script, Python looks for modules in pipeline/ itself: look in the project instead.
        sys.path[0] = str(ROOT)
    from pipeline.cli import main

    main(["pretrain", *sys.argv[1:]])  # ends the process, and imports what follows only for a run

import functools  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import TypeVar  # noqa: E402

from mlflow.exceptions import MlflowException  # noqa: E402
from rich.console import Console  # noqa: E402

from data_prep import storage  # noqa: E402
from data_prep.listing import listed_once  # noqa: E402
from pipeline import cluster, places, plan, report, signals, stages, survey, waiting  # noqa: E402
from pipeline.artifact import Artifact  # noqa: E402
from pipeline.config import Recipe  # noqa: E402
from pipeline.errors import describe_os_error  # noqa: E402
from pipeline.lock import StorageLock  # noqa: E402
from pipeline.plan import Stage  # noqa: E402
from pipeline.progress import Display  # noqa: E402
from pipeline.survey import Choice  # noqa: E402
from pipeline.tracking import Tracker  # noqa: E402

T = TypeVar("T")

SHARD_PATIENCE_S = 12 * 3600.0  # how long another run that makes the same shards is waited for


def prepare(recipe: Recipe, choice: Choice) -> tuple[list[Stage], set[str], Tracker]:
    """Everything that can be wrong before work begins is found here: sources, storage, MLflow, choice."""
    found, chosen, _ = survey.prepare(recipe, choice)
    return found, chosen, Tracker(recipe)


@listed_once()
def run(
    recipe: Recipe, choice: Choice, console: Console, address: str | None = None, debug: bool = False
) -> dict[str, Artifact]:
    """Run the chosen stages of a recipe, on a Ray cluster only if there is something to do; all that are finished."""
    recipe, said = survey.settled(recipe)
    for line in said:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    found, chosen, tracker = prepare(recipe, choice)
    tracker.say = lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False)
    tracker.end_left()
    planned = plan.make_plan(recipe.storage.uri, found, chosen, lambda s, a: stages.is_current(s, a, tracker))
    try:
        if any(entry.action == "run" for entry in planned):
            with cluster.connected(recipe.compute, address, debug), Display(console) as display:
                tracker.say = display.say
                places.check_shared(recipe.storage.uri)
                if (lack := cluster.shortage(recipe.compute)) is not None:
                    display.say(lack)
                artifacts = _run_stages(recipe, found, chosen, tracker, display)
        else:
            artifacts = {entry.stage.name: entry.artifact for entry in planned if entry.artifact}
            console.print(f"{len(artifacts)} of {len(found)} stages are done, nothing to run", highlight=False)
        if tracker.parent_id is not None:
            tracker.finish(tracker.parent_id)
        elif len(artifacts) == len(found):
            tracker.finish_left()
    except BaseException as error:
        if tracker.parent_id is not None:
            tracker.abandon(tracker.parent_id, error)
        if isinstance(error, MlflowException):
            raise tracker.refusal(tracker.parent_id, error) from error
        raise
    _conclude(recipe, artifacts, tracker, console)
    return artifacts


def _run_stages(
    recipe: Recipe, found: list[Stage], chosen: set[str], tracker: Tracker, display: Display
) -> dict[str, Artifact]:
    finished: dict[str, Artifact] = {}

    def is_current(stage: Stage, artifact: Artifact) -> bool:
        return stages.is_current(stage, artifact, tracker)

    for number, stage in enumerate(found, 1):
        signals.check()
        missing = [name for name in stage.inputs if name not in finished]
        if missing:
            if stage.name in chosen:
                raise ValueError(
                    f"stage {stage.name} needs {', '.join(missing)}, not done yet and not selected: "
                    f"widen --stages or --from"
                )
            continue
        digests = {name: finished[name].digest for name in stage.inputs}
        look_up = functools.partial(plan.look_up, recipe.storage.uri, stage, digests, is_current)
        artifact = _patiently(recipe, display, look_up)
        if artifact is not None:
            display.say(f"[{number}/{len(found)}] {stage.name}: done before")
        elif stage.name in chosen:
            what = stage.length or stage.kind
            display.begin_stage(number, len(found), stage.name, what)
            run_stage = functools.partial(_run_stage, recipe, stage, finished, digests, tracker, display)
            alone = functools.partial(_alone, recipe, stage, digests, display, look_up, run_stage)
            artifact = _patiently(recipe, display, alone)
            display.end_stage(_summary(artifact))
        if artifact is not None:
            finished[stage.name] = artifact
    return finished


def _alone(
    recipe: Recipe,
    stage: Stage,
    digests: dict[str, str],
    display: Display,
    look_up: Callable[[], Artifact | None],
    run_stage: Callable[[StorageLock], Artifact],
) -> Artifact:
    """The stage's artifact, made while no other run works at the stage, unless one has made it meanwhile.

    Recipes share sets of shards: one makes them, the others wait and take them; of other stages one refuses.
    """
    lock = storage.join(recipe.storage.uri, "locks", f"{stage.name}-{stage.fingerprint(digests)[:16]}.json")
    patience_s = SHARD_PATIENCE_S if stage.kind == "shard" else 0
    purpose = f"stage {stage.name} of recipe {recipe.name}"
    with StorageLock(lock, purpose, display.say, patience_s=patience_s) as held:
        return look_up() or run_stage(held)


def _patiently(recipe: Recipe, display: Display, work: Callable[[], T]) -> T:
    """What `work` gives; begun again, once the storage answers, where it fails because that was away.

    What waiting does not mend is raised, and so is everything where the storage stays away for `storage.patience_s`.
    """
    probe, stuck = storage.join(recipe.storage.uri, "any"), 0
    while True:
        try:
            return work()
        except storage.StorageError as error:
            waited_s, _ = waiting.until_it_answers(
                lambda: storage.exists(probe), recipe.storage.patience_s, say=lambda text: display.say(f"      {text}")
            )
            stuck = 0 if waited_s else stuck + 1
            may_pass = storage.may_pass(error) and not storage.is_local(recipe.storage.uri)  # a disk may be full
            if stuck > (waiting.RETRIES if may_pass else 0):
                raise
            display.say(f"      the storage was away, waited {waited_s:.0f} s ({error}): again")
            time.sleep(waiting.PAUSE_S)


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    finished: dict[str, Artifact],
    digests: dict[str, str],
    tracker: Tracker,
    display: Display,
    lock: StorageLock,
) -> Artifact:
    fingerprint = stage.fingerprint(digests)
    run_id = tracker.stage_run(stage.name, fingerprint, stage.config)
    inputs = {name: finished[name] for name in stage.inputs}
    try:
        with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
            work = stages.Work(
                recipe, stage, inputs, finished, fingerprint, run_id, tracker, display, Path(folder), lock
            )
            return stages.RUN[stage.kind](work)
    except BaseException as error:
        tracker.abandon(run_id, error)
        if isinstance(error, MlflowException):
            raise tracker.refusal(run_id, error) from error
        if isinstance(error, OSError):
            raise ValueError(describe_os_error(error, f"stage {stage.name}")) from error
        raise


def _summary(artifact: Artifact) -> str:
    """The few figures of an artifact that fit behind a stage's last line."""
    shown = ("images", "shards", "rejects", "duplicates", "copied", "loss", "images_per_s")
    return ", ".join(f"{key} {artifact.info[key]:.5g}" for key in shown if key in artifact.info)


def _conclude(recipe: Recipe, artifacts: dict[str, Artifact], tracker: Tracker, console: Console) -> None:
    """The table, the decisions, and where everything lies."""
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        if "evaluate" in artifacts:
            console.print(report.table(stages.read_results(artifacts["evaluate"], Path(folder))))
    lines = []
    if "promote" in artifacts:
        for decision in artifacts["promote"].info["decisions"].values():
            alias = "champion" if decision["promoted"] else "candidate only"
            lines.append(f"{decision['name']} version {decision['version']}: {alias} ({decision['reason']})")
    for name in recipe.final_trainings:
        if name in artifacts:
            lines.append(f"weights {name}: {artifacts[name].file_uri(stages.PTH)}")
    lines.append(f"MLflow: {tracker.how_to_look}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
