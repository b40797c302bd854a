"""What MLflow says of a run's state, and what a person is told, when a run only looks, is refused, or is ended."""

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from mlflow import MlflowClient
from mlflow.entities import ViewType
from rich.console import Console

from data_prep import storage
from pipeline import cluster, dry_run, pretrain, signals, stages, waiting
from pipeline.artifact import Artifact
from pipeline.config import Recipe
from pipeline.errors import Stopped
from pipeline.lock import LockedError, StorageLock
from pipeline.tracking import Tracker, TrackingError
from tests.unit.pipeline.test_faults import recipe_in

NOBODY = "http://127.0.0.1:9"
FIRST = pretrain.Choice(stages=["shard-photographs"])


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages here are stand-ins that need no cluster."""
    monkeypatch.setattr(cluster, "connected", lambda *arguments: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "shortage", lambda compute: None)
    monkeypatch.setattr(pretrain.places, "check_shared", lambda uri: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture
def recipe(folder: Path, request: pytest.FixtureRequest) -> Recipe:
    """Each test has an experiment and a place of its own, in one database: MLflow takes seconds to make one."""
    name = request.node.originalname
    places = [f"storage.uri={folder}/{name}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    return recipe_in(folder, *places, f"tracking.experiment={name}")


def states(recipe: Recipe) -> dict[str, str]:
    """State of every run of the recipe, by name."""
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return {run.info.run_name: run.info.status for run in found}


def console() -> Console:
    return Console(file=io.StringIO(), width=1000)


def stage(monkeypatch: pytest.MonkeyPatch, does: Callable[[stages.Work], Artifact]) -> None:
    monkeypatch.setitem(stages.RUN, "shard", does)


def test_a_dry_run_changes_no_run(recipe: Recipe) -> None:
    dry_run.run(recipe, pretrain.Choice(), console())
    assert states(recipe) == {}
    tracker = Tracker(recipe)
    tracker.finish(tracker.begin())
    dry_run.run(recipe, pretrain.Choice(), console())
    assert states(recipe) == {"tiny": "FINISHED"}


def test_a_run_that_is_refused_a_stage_changes_no_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "SHARD_PATIENCE_S", 0)  # else it would wait for the other's shards
    Tracker(recipe).begin()  # the run that works at it
    found, _, tracker = pretrain.prepare(recipe, FIRST)
    lock = storage.join(recipe.storage.uri, "locks", f"{found[0].name}-{found[0].fingerprint({})[:16]}.json")
    with StorageLock(lock, "another run", heartbeat_s=0.1), pytest.raises(LockedError):
        pretrain.run(recipe, FIRST, console())
    assert states(recipe) == {"tiny": "RUNNING"}
    assert tracker.parent_id is None


@pytest.mark.parametrize(
    ("error", "state"), [(Stopped("asked to stop", 143), "KILLED"), (RuntimeError("a worker failed"), "FAILED")]
)
def test_the_state_says_how_a_run_ended(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    def end(work: stages.Work) -> Artifact:
        raise error

    stage(monkeypatch, end)
    with pytest.raises(type(error), match=str(error)):
        pretrain.run(recipe, FIRST, console())
    assert states(recipe) == {"tiny": state, "shard-photographs": state}


def test_a_stop_ends_a_stage_and_all_that_would_follow(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library takes the interrupt for itself."""
    began = []

    def swallow(work: stages.Work) -> Artifact:
        began.append(work.stage.name)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        return work.publish({}, {})

    def wait(work: stages.Work) -> Artifact:
        began.append(work.stage.name)
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        time.sleep(20)
        return work.publish({}, {})

    begin = time.monotonic()
    for does in (swallow, wait):
        stage(monkeypatch, does)
        with pytest.raises(Stopped), signals.ending():
            pretrain.run(recipe, pretrain.Choice(stages=["shard"]), console())
    assert began == ["shard-photographs", "shard-sharp"]
    assert time.monotonic() - begin < 10
    assert states(recipe) == {"tiny": "KILLED", "shard-photographs": "FINISHED", "shard-sharp": "KILLED"}


def left(recipe: Recipe, **owner: object) -> Tracker:
    """A recipe's run and a stage's, left RUNNING by another process."""
    tracker = Tracker(recipe)
    tracker.owner.record |= owner
    tracker.stage_run("gone", "f", {})
    return tracker


def test_what_a_killed_run_left_running_is_ended_by_the_next_call(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(recipe, process_started=1.0)
    stage(monkeypatch, lambda work: work.publish({}, {}))
    told = console()
    pretrain.run(recipe, FIRST, told)
    assert states(recipe) == {"tiny": "FINISHED", "gone": "KILLED", "shard-photographs": "FINISHED"}
    said = told.file.getvalue()  # type: ignore[attr-defined]
    assert "MLflow run gone was left running by a process that died: marked as KILLED" in said


def test_who_is_silent_on_another_machine_is_dead_and_who_is_not_lives(recipe: Recipe) -> None:
    left(recipe, machine="another", pid=1).owner.done.set()
    other = recipe.model_copy(update={"seed": 5, "name": "other"})
    living = Tracker(other)
    living.owner.record |= {"machine": "a third"}
    living.owner.beat_s = 0.02
    living.begin()
    mine = Tracker(recipe.model_copy(update={"seed": 6, "name": "mine"}))
    mine.owner.beat_s = 0.3
    mine.end_left()
    mine.begin()
    until = time.monotonic() + 20
    while states(recipe)["gone"] == "RUNNING" and time.monotonic() < until:
        time.sleep(0.1)
    assert states(recipe) == {"tiny": "KILLED", "gone": "KILLED", "other": "RUNNING", "mine": "RUNNING"}
    for tracker in (living, mine):
        tracker.finish(tracker.begin())


def test_an_absent_mlflow_takes_no_errors_place(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(work: stages.Work) -> Artifact:
        work.tracker.impatient = MlflowClient(NOBODY)
        work.tracker.log_metrics(work.run_id, {"loss": 0.5}, 1)
        raise Stopped("asked to stop", 143)

    stage(monkeypatch, stop)
    told, begin = console(), time.monotonic()
    with pytest.raises(Stopped):
        pretrain.run(recipe, FIRST, told)
    assert time.monotonic() - begin < 60
    lines = told.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sum("is not marked as KILLED: " in line for line in lines) == 2
    assert sum("is out of reach, what it misses is kept" in line for line in lines) == 1


def everything(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """State and stage of life of every run of the recipe, deleted ones as well, by name."""
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    return {run.info.run_name: (run.info.status, run.info.lifecycle_stage) for run in found}


@pytest.mark.parametrize("when", ["stage", "recipe", "experiment"])
def test_what_is_deleted_meanwhile_is_one_line_and_nothing_is_left_running(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    recipe = recipe.model_copy(
        update={"tracking": recipe.tracking.model_copy(update={"experiment": f"deleted-{when}"}), "seed": len(when)}
    )

    def deleted(work: stages.Work) -> Artifact:
        client = MlflowClient(recipe.tracking.uri)
        if when == "experiment":
            client.delete_experiment(work.tracker.experiment_id)
        else:
            client.delete_run(work.run_id if when == "stage" else work.tracker.parent_id)
        work.tracker.log_metrics(work.run_id, {"loss": 0.5, "rate": 0.1}, 1)
        work.tracker.tag_later(work.run_id, {"a": "b"})
        return work.publish({}, {})

    stage(monkeypatch, deleted)
    told = console()
    words = (
        f"MLflow experiment 'deleted-{when}' was deleted: restore it" if when == "experiment" else "call again, which"
    )
    with pytest.raises(TrackingError, match=words):
        pretrain.run(recipe, FIRST, told)
    found = everything(recipe)
    assert "RUNNING" not in {status for status, _ in found.values()}
    assert ("FAILED", "deleted") in found.values()
    lines = told.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all("was deleted meanwhile" in line for line in lines if "MLflow" in line), lines
    if when != "experiment":
        stage(monkeypatch, lambda work: work.publish({}, {}))
        pretrain.run(recipe, FIRST, console())  # takes up the work in runs of its own
        assert set(states(recipe).values()) <= {"FINISHED"}


def test_a_run_killed_after_its_last_stage_is_marked_by_the_next(recipe: Recipe) -> None:
    tracker = Tracker(recipe)
    tracker.finish_left()
    assert states(recipe) == {}
    tracker.begin()
    Tracker(recipe).finish_left()
    assert states(recipe) == {"tiny": "FINISHED"}


@pytest.mark.parametrize("lost", ["log_files", "set_tags", "finish"])
def test_a_stage_counts_as_done_only_when_mlflow_has_all_of_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def publish(work: stages.Work) -> Artifact:
        (work.folder / "weights.pth").write_text(lost)
        work.tracker.log_metrics(work.run_id, {"loss": 0.5}, 1)
        return work.publish({"weights.pth": work.folder / "weights.pth"}, {})

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    stage(monkeypatch, publish)
    recipe = recipe.model_copy(update={"seed": len(lost)})  # a stage of its own
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, lost, killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(recipe, FIRST, console())
    made = pretrain.run(recipe, FIRST, console())["shard-photographs"]
    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    found = f"tags.`hatchery.digest` = '{made.digest}'"
    (run,) = client.search_runs([experiment.experiment_id], found)
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 0.5)
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["weights.pth"]
    again = console()
    pretrain.run(recipe, FIRST, again)
    assert "nothing to run" in again.file.getvalue()  # type: ignore[attr-defined]


def away() -> storage.StorageError:
    """What a storage that does not answer is told by."""
    error = storage.StorageError("s3://bucket/key: the server does not answer")
    error.__cause__ = EndpointConnectionError(endpoint_url="http://s3")
    return error


def test_a_storage_that_says_no_is_asked_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PAUSE_S", 0.02)
    monkeypatch.setattr(waiting, "REFUSED_S", 0.1)
    errors, said = [away()] * 20 + [storage.StorageError("access denied")] * 2, []

    def ask() -> str:
        if errors:
            raise errors.pop()
        return "answer"

    waited_s, answer = waiting.until_it_answers(ask, 100, say=said.append)
    assert answer == "answer"
    assert waited_s > 0.4
    assert said == ["access denied: trying again for 0 minutes"]
    errors += [storage.StorageError("access denied")] * 50
    with pytest.raises(storage.StorageError, match="access denied"):
        waiting.until_it_answers(ask, 100)
    assert waiting.until_it_answers(ask, 100, lambda: False)[1] is None


def test_a_stage_waits_for_a_storage_that_is_away_and_is_begun_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, asked, working = [], [], storage.exists

    def lose(work: stages.Work) -> Artifact:
        tries.append(work.stage.name)
        if len(tries) == 1:
            monkeypatch.setattr(storage, "exists", exists)
            raise storage.StorageError("s3://bucket/key: told by a task, without what caused it")
        return work.publish({}, {})

    def exists(uri: str) -> bool:
        asked.append(uri)
        if len(asked) < 3:
            raise away()
        return working(uri)

    monkeypatch.setattr(waiting, "PAUSE_S", 0.01)
    stage(monkeypatch, lose)
    pretrain.run(recipe, FIRST, console())
    assert len(tries) == 2
    assert states(recipe) == {"tiny": "FINISHED", "shard-photographs": "FINISHED"}


@pytest.mark.parametrize(
    ("error", "is_away"), [(away(), True), (storage.StorageError("access denied"), False), (away(), False)]
)
def test_what_waiting_does_not_mend_ends_a_stage(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, error: Exception, is_away: bool
) -> None:
    """A storage that stays away, one that refuses, and a local disk that is full."""
    recipe = recipe.model_copy(
        update={"storage": recipe.storage.model_copy(update={"patience_s": 0.1}), "seed": len(str(error))}
    )
    tries = []

    def lose(work: stages.Work) -> Artifact:
        tries.append(1)
        if is_away:
            monkeypatch.setattr(storage, "exists", refuse)
        raise error

    def refuse(uri: str) -> bool:
        raise away()

    monkeypatch.setattr(waiting, "PAUSE_S", 0.05)
    stage(monkeypatch, lose)
    with pytest.raises(storage.StorageError):
        pretrain.run(recipe, FIRST, console())
    assert len(tries) == 1
