"""A real S3 server that is away for a while: what a training uploads meanwhile arrives when it is back."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.store.artifact import s3_artifact_repo

from data_prep import storage
from pipeline import validate
from pipeline.tracking import Tracker, TrackingError
from pipeline.validate import Best
from tests.s3_server import S3Server
from tests.unit.pipeline.test_faults import recipe_in


def wait_until(reached: Callable[[], object], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.integration
def test_the_best_weights_arrive_after_an_outage(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, working = [], storage.upload

    def upload(*arguments: Any) -> None:
        try:
            working(*arguments)
        except storage.StorageError as error:
            failed.append(error)
            raise

    monkeypatch.setattr(storage, "upload", upload)
    best, place = Best(step=3, value=30.0, metric="psnr_y"), f"{s3.uri}/best"
    publishing = threading.Thread(target=validate._publish, args=({"a": torch.ones(2)}, best, place))
    with s3.away():
        publishing.start()
        wait_until(lambda: failed)
    publishing.join(timeout=60)
    found = validate.read_best(place, tmp_path)
    assert found is not None
    assert found[1] == best
    assert torch.equal(found[0]["a"], torch.ones(2))


def test_a_trace_that_cannot_be_uploaded_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import train

    monkeypatch.setattr(train, "TRACE_PATIENCE_S", 0)
    (tmp_path / "file").write_bytes(b"")
    job = SimpleNamespace(compute=SimpleNamespace(profile_steps=(1, 1)), checkpoints_uri=f"{tmp_path}/file/checkpoints")
    told: list[dict[str, Any]] = []
    trace = train._Trace(SimpleNamespace(job=job, rank=0, step=0, report=told.append))
    trace.before_step()
    trace.run.step = 1
    trace.after_step()
    (record,) = told
    assert record["warning"].startswith("the trace profile-steps-1-1.json.gz is lost: ")
    assert "a part of the path is a file" in record["warning"]


def forget_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow and boto3 keep them for minutes and for ever."""
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)


@pytest.fixture
def tracker(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    """Artifacts go straight to S3, as with `mlflow server --no-serve-artifacts`."""
    forget_credentials(monkeypatch)
    recipe = recipe_in(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    client.create_experiment(recipe.tracking.experiment, artifact_location=f"{s3.uri}/mlflow")
    yield Tracker(recipe)
    s3_artifact_repo._cached_get_s3_client.cache_clear()


@pytest.mark.integration
def test_pictures_and_weights_arrive_after_an_outage_and_metrics_during_it(
    s3: S3Server, tracker: Tracker, tmp_path: Path
) -> None:
    said: list[str] = []
    tracker.say = said.append
    run_id = tracker.stage_run("train", "f", {})
    storage.write_bytes(f"{s3.uri}/trace.json", b"trace")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    weights = {"weights.pth": tmp_path / "weights.pth"}
    with s3.away():
        for step in (1, 2):
            tracker.log_bytes_later(run_id, f"validation/{step}/a.png", b"picture")
            tracker.log_stored_later(run_id, "trace.json", f"{s3.uri}/trace.json")
            tracker.log_metrics(run_id, {"loss": 0.5}, step)
        tracker._try_flush()
        assert len(tracker.client.get_metric_history(run_id, "loss")) == 2
        uploading = threading.Thread(target=tracker.log_files, args=(run_id, weights))
        uploading.start()
        time.sleep(1)
    tracker.flush()
    uploading.join(timeout=120)
    found = {file.path for file in storage.list_files(f"{s3.uri}/mlflow/{run_id}/artifacts")}
    assert found == {"validation/1/a.png", "validation/2/a.png", "trace.json", "weights.pth"}
    assert f"the server at {s3.endpoint} does not answer" in said[0]
    assert said[-1].endswith("is back")


@pytest.mark.integration
def test_a_picture_that_s3_refuses_is_said_and_holds_up_nothing(
    s3: S3Server, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tracker.say = said.append
    run_id = tracker.stage_run("train", "f", {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_credentials(monkeypatch)
    tracker.log_bytes_later(run_id, "validation/1/a.png", b"picture")
    tracker.log_metrics(run_id, {"loss": 0.5}, 1)
    tracker.flush()
    assert len(tracker.client.get_metric_history(run_id, "loss")) == 1
    (line,) = said
    assert "does not take validation/1/a.png: the secret key is wrong" in line
    (tmp_path / "weights.pth").write_bytes(b"weights")
    with pytest.raises(TrackingError, match="the secret key is wrong"):
        tracker.log_files(run_id, {"weights.pth": tmp_path / "weights.pth"})
