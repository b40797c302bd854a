"""What becomes of the entries that MLflow does not take: kept where that may pass, else dropped, and said."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline import stages
from pipeline.tracking import Tracker, TrackingError
from tests.unit.pipeline.test_faults import recipe_in

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests: MLflow takes seconds to make one."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def tracker(folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = Tracker(recipe_in(folder))
    found.say = said.append
    return found


def test_one_refused_metric_holds_up_no_other(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "metric", {})
    for step in (1, 2):
        tracker.log_metrics(run_id, {"loss": 0.5 / step, "what?!": 1.0, "rate": 0.1}, step)
    tracker.flush()
    assert [point.value for point in tracker.client.get_metric_history(run_id, "loss")] == [0.5, 0.25]
    assert len(tracker.client.get_metric_history(run_id, "rate")) == 2
    assert tracker.pending == []
    (line,) = said
    assert line.startswith(f"MLflow at {tracker.uri} does not take metric what?!: ")


def test_a_refused_tag_holds_up_no_metric(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "tag", {})
    tracker.tag_later("0" * 32, {"a": "to a run that is not there"})
    tracker.log_stored_later(run_id, "trace.json", "/absent/trace.json")
    tracker.tag_later(run_id, {"b": "kept"})
    tracker.log_metrics(run_id, {"loss": 0.5}, 1)
    tracker.flush()
    run = tracker.client.get_run(run_id)
    assert (run.data.metrics["loss"], run.data.tags["b"]) == (0.5, "kept")
    assert [line.split(" does not take ")[1].split(":")[0] for line in said] == ["tags a", "trace.json"]


def test_an_absent_server_is_said_once_and_so_is_its_return(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "absent", {})
    working, tracker.impatient = tracker.impatient, MlflowClient(NOBODY)
    for step in range(3):
        tracker.log_metrics(run_id, {"loss": 0.5}, step)
        tracker.tag_later(run_id, {f"tag{step}": "x"})
        tracker._try_flush()
    (line,) = said
    assert "is out of reach, what it misses is kept" in line
    with pytest.raises(TrackingError, match="did not take 3 metrics and 3 tags and files: API request to"):
        tracker.flush(patience_s=0)
    tracker.impatient = working
    tracker.flush()
    assert said[1:] == [f"MLflow at {tracker.uri} is back"]
    assert len(working.get_metric_history(run_id, "loss")) == 3
    assert {"tag0", "tag1", "tag2"} <= set(working.get_run(run_id).data.tags)


def test_what_cannot_wait_ends_in_one_line(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MlflowException, match="not found"):  # as code that looks for something expects
        tracker.client.get_run("0" * 32)
    monkeypatch.setattr("pipeline.patient.PATIENCE_S", 0)
    monkeypatch.setattr(tracker.client, "_client", MlflowClient(NOBODY))
    with pytest.raises(TrackingError, match=f"MLflow at {tracker.uri}: API request to {NOBODY}"):
        tracker.client.get_run("0" * 32)


def test_every_ranks_warning_is_kept_whole(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "warning", {})
    work = SimpleNamespace(
        stage=SimpleNamespace(name="train"), tracker=tracker, run_id=run_id, display=SimpleNamespace(say=said.append)
    )
    handle = stages._training_records(work, 10, {})
    long = f"rank 2 had {', '.join(f'n0{number}' for number in range(2000))}"
    warnings = ["rank 0 had a", "rank 1 had b", long, "6 steps in a row: going back", "rank 0 had c"]
    for warning in warnings:
        handle({"step": 7, "warning": warning})
    tracker.flush()
    tags = tracker.client.get_run(run_id).data.tags
    kept = {key: value for key, value in sorted(tags.items()) if key.startswith("hatchery.warning.7.")}
    whole: dict[str, str] = {}
    for key, value in kept.items():
        name = ".".join(key.split(".")[:4])
        whole[name] = whole.get(name, "") + value
    assert sorted(whole.values()) == sorted(warnings)
    assert said == [f"      train: {warning}" for warning in warnings]
