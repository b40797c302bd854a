"""The driver's side of a training: which failures end it, and which are waited for."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from data_prep.storage import DamageError, StorageError
from pipeline import checkpoint, launch, signals
from pipeline.config import ComputeConfig, ModelConfig, PhaseConfig, TrainingConfig
from pipeline.errors import Stopped
from pipeline.launch import TrainJob


def job(folder: Path, **compute: Any) -> TrainJob:
    return TrainJob(
        name="t",
        model=ModelConfig(arch="hat"),
        phase=PhaseConfig(data="d", steps=10),
        training=TrainingConfig(scale=2, phase="p"),
        compute=ComputeConfig(**compute),
        seed=0,
        shards_uri=str(folder / "shards"),
        init=None,
        checkpoints_uri=str(folder / "checkpoints"),
    )


class Script:
    """Stands in for Ray Train and the monitor: each `fit` reaches a step and fails as told, the last one succeeds."""

    def __init__(self, *failures: tuple[int, Exception]) -> None:
        self.failures = list(failures)
        self.last_step = -1
        self.told: list[str] = []

    def handle(self, record: dict[str, Any]) -> None:
        self.told.append(record["warning"])

    def fit(self) -> Any:
        if not self.failures:
            return SimpleNamespace(return_value={"kind": "done"})
        step, error = self.failures.pop(0)
        self.last_step = max(self.last_step, step)
        raise WorkerGroupError(str(error), {0: RuntimeError("connection reset"), 1: error})


class FakeMonitor:
    """Stands in for the monitor where there is no Ray."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> "FakeMonitor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def request_stop(self) -> None:
        pass


def fit(script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(launch, "_trainer", lambda job, monitor, references: monitor)
    return launch._fit(job(folder), script, {}, signals.Asked())  # type: ignore[arg-type]


def test_a_read_that_fails_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = StorageError("s3://b/shard-00001.tar: connection timed out")
    script = Script((5, away), (3, away))  # the second time before it got as far as the first
    assert fit(script, tmp_path, monkeypatch).return_value == {"kind": "done"}
    assert len(script.told) == 2
    assert "the storage was away, waited 0 s (s3://b/shard-00001.tar: connection timed out)" in script.told[0]


def test_the_drivers_own_reads_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [StorageError("s3://b: timed out"), StorageError("s3://b: timed out")]

    def begin_attempt(*told: object) -> tuple[str, None]:
        if failures:
            raise failures.pop()
        return "attempt-000001", None

    monkeypatch.setattr(launch.checkpoint, "begin_attempt", begin_attempt)
    assert fit(Script(), tmp_path, monkeypatch).return_value == {"kind": "done"}


def test_a_read_that_never_succeeds_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = StorageError("s3://b/shard-00001.tar: access denied")
    with pytest.raises(StorageError, match="access denied"):
        fit(Script(*[(5, denied)] * 9), tmp_path, monkeypatch)


@pytest.mark.parametrize("error", [DamageError("a.tar: truncated"), ValueError("not one sample fits")])
def test_what_waiting_does_not_mend_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ValueError
) -> None:
    with pytest.raises(type(error), match=str(error)):
        fit(Script((5, error)), tmp_path, monkeypatch)


def test_processes_that_are_lost_without_getting_further_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkerGroupError, match="killed"):
        fit(Script((5, OSError("killed")), (9, OSError("killed")), (9, OSError("killed"))), tmp_path, monkeypatch)


class Committing(Script):
    """A script in which Ray Train commits a checkpoint before each failure."""

    def __init__(self, folder: Path, *failures: tuple[int, Exception]) -> None:
        super().__init__(*failures)
        self.folder = folder / "checkpoints"

    def fit(self) -> Any:
        if self.failures:
            attempt = max(self.folder.glob("attempt-*"))
            made = attempt / f"step-{self.failures[0][0]:08d}-00000000-a"
            made.mkdir()
            (made / checkpoint.META).write_text(json.dumps({"files": [checkpoint.META]}))
        return super().fit()


def test_what_counts_as_getting_further_is_a_committed_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After going back all steps lie below the highest one of before."""
    script = Committing(tmp_path, *[(step, OSError("killed")) for step in (500, 600, 700, 800)])
    script.last_step = 1000
    assert fit(script, tmp_path, monkeypatch).return_value == {"kind": "done"}


def test_steps_without_a_checkpoint_are_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(*[(step, OSError("killed")) for step in (5, 6, 7, 8)])
    with pytest.raises(WorkerGroupError, match="killed"):
        fit(script, tmp_path, monkeypatch)
    assert script.last_step == 6


@pytest.mark.parametrize("ended", ["done", "failed"])
def test_a_stop_that_no_step_heeds_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str) -> None:
    """It arrives in the last step, or when the training was just lost."""

    def fit() -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        if ended == "failed":
            raise WorkerGroupError("killed", {0: OSError("killed")})
        return SimpleNamespace(return_value={"kind": "done"}, checkpoint="c")

    monkeypatch.setattr(launch.cluster, "has_gpus", lambda compute: False)
    monkeypatch.setattr(launch, "Monitor", FakeMonitor)
    monkeypatch.setattr(launch, "_trainer", lambda *arguments: SimpleNamespace(fit=fit))
    with pytest.raises(Stopped, match="t was asked to stop when it was") as stopped, signals.ending():
        launch.run_training(job(tmp_path), lambda record: None)
    assert stopped.value.exit_code == 143


def test_gpus_are_decided_once_for_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [True, False]  # a node goes down between two attempts
    monkeypatch.setattr(launch.cluster, "has_gpus", lambda compute: answers.pop(0))
    given = []

    def fit(job: TrainJob, monitor: Any, *more: Any) -> Any:
        given.append(job.compute.use_gpu)
        kind = "roll_back" if len(given) == 1 else "done"
        value = {"kind": kind, "step": 1, "data_offset": 1, "reason": "r", "checkpoint": None}
        return SimpleNamespace(return_value=value, checkpoint="c")

    monkeypatch.setattr(launch, "_fit", fit)
    monkeypatch.setattr(launch, "Monitor", FakeMonitor)
    launch.run_training(job(tmp_path), lambda record: None)
    assert given == [True, True]


def test_the_same_checkpoint_twice_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    monkeypatch.setattr(launch.cluster, "has_gpus", lambda compute: False)
    monkeypatch.setattr(launch, "Monitor", FakeMonitor)
    monkeypatch.setattr(launch.checkpoint, "discard", lambda place, name: passed.append(name) or True)
    ends: list[str | None] = [None, None, "step-4", "step-8", "step-8"]

    def fit(job: TrainJob, monitor: Any, *more: Any) -> Any:
        if not ends:
            return SimpleNamespace(return_value={"kind": "done"}, checkpoint="c")
        value = {"kind": "roll_back", "step": 9, "data_offset": 9, "reason": "r", "checkpoint": ends.pop(0)}
        return SimpleNamespace(return_value=value)

    monkeypatch.setattr(launch, "_fit", fit)
    told: list[str] = []
    launch.run_training(job(tmp_path, max_rollbacks=5), lambda record: told.append(record["warning"]))
    assert passed == ["step-8"]
    assert told[-1] == "r: going back to the checkpoint before step-8, which failed twice"
    assert told[:-1] == ["r: going back to the last checkpoint"] * 4


def test_what_came_to_its_end_before_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the last checkpoint and the artifact: the next attempt has nothing to do and reports nothing."""
    monkeypatch.setattr(launch.cluster, "has_gpus", lambda compute: False)
    monkeypatch.setattr(launch, "Monitor", FakeMonitor)
    monkeypatch.setattr(launch.checkpoint, "recover", lambda place: f"{place}/attempt-000001/step-00000010-00000010-a")
    ended = SimpleNamespace(return_value={"kind": "done"}, checkpoint=None)
    monkeypatch.setattr(launch, "_fit", lambda *told: ended)
    made = launch.run_training(job(tmp_path), lambda record: None)
    assert made.path == f"{tmp_path}/checkpoints/attempt-000001/step-00000010-00000010-a"


def test_every_attempt_has_a_folder_of_its_own_and_goes_on_from_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    script = Script((5, StorageError("away")))
    monkeypatch.setattr(launch, "_trainer", lambda job, *told: given.append((job.attempt, job.resume_from)) or script)
    launch._fit(job(tmp_path), script, {}, signals.Asked())  # type: ignore[arg-type]
    assert given == [("attempt-000001", None), ("attempt-000002", None)]
    assert job(tmp_path).digest == job(tmp_path).model_copy(update={"attempt": "attempt-000001"}).digest
