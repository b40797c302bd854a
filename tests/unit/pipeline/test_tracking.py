"""What becomes of the entries that MLflow does not take: kept where that may pass, else dropped, and said."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline import stages
from pipeline.config import ConfigError
from pipeline.tracking import Tracker, TrackingError, connect
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
    monkeypatch.setattr(tracker.client, "_patience_s", 0)
    monkeypatch.setattr(tracker.client, "_client", MlflowClient(NOBODY))
    with pytest.raises(TrackingError, match=f"MLflow at {tracker.uri}: API request to {NOBODY}"):
        tracker.client.get_run("0" * 32)


def test_every_ranks_warning_is_kept_whole(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "warning", {})
    work = SimpleNamespace(
        stage=SimpleNamespace(name="train"), tracker=tracker, run_id=run_id, display=SimpleNamespace(say=said.append)
    )
    handle = stages._training_records(work, {})
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


def test_a_bad_step_is_one_file_and_a_count(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "bad", {})
    work = SimpleNamespace(
        stage=SimpleNamespace(name="train"), tracker=tracker, run_id=run_id, display=SimpleNamespace(say=said.append)
    )
    handle = stages._training_records(work, {})
    for step in (7, 8):
        handle({"step": step, "bad_step": {"said": f"step {step} not applied", "ranks": [{}] * 64}})
    tracker.flush()
    run = tracker.client.get_run(run_id)
    assert run.data.metrics == {"bad_steps": 2}
    assert not any("warning" in tag for tag in run.data.tags)
    files = [file.path for file in tracker.client.list_artifacts(run_id, "bad-steps")]
    assert files == ["bad-steps/step-00000007.json", "bad-steps/step-00000008.json"]
    assert said == ["      train: step 7 not applied", "      train: step 8 not applied"]


@pytest.mark.parametrize("name", ["o'brien", '100% "sure" #1 & o\'x;y'])
def test_storage_of_any_name_finds_its_runs_again(tmp_path: Path, name: str) -> None:
    recipe = recipe_in(tmp_path / name)
    first = Tracker(recipe)
    parent, stage = first.begin(), first.stage_run("train", "f", {})
    first.log_bytes_later(stage, "a/b.txt", b"kept")
    first.finish(stage)
    again = Tracker(recipe)
    assert (again.begin(), again.stage_run("train", "f", {})) == (parent, stage)
    assert again.stage_run("train", "other", {}) != stage
    assert {path.name for path in (tmp_path / name / "runs").iterdir()} == {"mlflow.db", "mlflow-artifacts"}


@pytest.mark.parametrize("name", ["a%20b", "who?"])
def test_storage_whose_name_mlflow_reads_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="call the folder something else, or give"):
        Tracker(recipe_in(tmp_path / name))


def test_runs_of_another_storage_are_not_taken_for_its_own(folder: Path) -> None:
    """With an apostrophe, which MLflow's filters cannot quote beside a double one, the storage is compared here."""
    places = [f"tracking.uri=sqlite:///{folder}/runs/mlflow.db"]
    first = Tracker(recipe_in(folder / "o'neill", *places)).begin()
    second = Tracker(recipe_in(folder / "o'brien", *places)).begin()
    assert first != second
    assert Tracker(recipe_in(folder / "o'neill", *places)).begin() == first


def test_a_secret_reaches_no_run(folder: Path) -> None:
    recipe = recipe_in(
        folder,
        f"tracking.uri=sqlite:///{folder}/runs/mlflow.db?timeout=30",
        "evaluate.sets.elsewhere='https://u:SECRET@host/x?token=SECRET'",
        "evaluate.models=[]",
        "seed=17",
    )
    tracker = Tracker(recipe)
    tracker.log_params(tracker.begin(), {"a": "http://u:SECRET@host"})
    tracker.set_tags(tracker.begin(), {"b": "http://u:SECRET@host"})
    tracker.tag_later(tracker.begin(), {"c": "http://u:SECRET@host"})
    tracker.finish(tracker.begin())
    run = tracker.client.get_run(tracker.begin())
    assert run.data.params["evaluate.sets.elsewhere"] == "https://host/x"
    assert run.data.tags["b"] == run.data.tags["c"] == run.data.params["a"] == "http://host"
    assert left_with(b"SECRET", folder) == []


def left_with(secret: bytes, folder: Path) -> list[Path]:
    """The files below a folder that hold a secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.parametrize("content", [b"no database, surely, " * 100, None])
def test_a_database_that_cannot_be_used_is_one_line_at_once(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(content) if content else file.mkdir()
    begin = time.monotonic()
    with pytest.raises(TrackingError, match=f"MLflow database sqlite:///{file} cannot be used: .*; choose another"):
        connect(f"sqlite:///{file}")
    assert time.monotonic() - begin < 5  # MLflow itself would try for two minutes


def test_what_is_missed_arrives_though_the_run_is_killed_meanwhile(tracker: Tracker, said: list[str]) -> None:
    run_id = tracker.stage_run("train", "killed", {})
    tracker.flush()
    tracker.log_metrics(run_id, {"loss": 0.5}, 1)
    tracker.impatient = MlflowClient(NOBODY)
    tracker.last_flush = 0
    tracker.log_metrics(run_id, {"loss": 0.25}, 2)  # noticed here
    tracker.log_metrics(run_id, {"loss": 0.125}, 3)
    tracker.tag_later(run_id, {"kept": "http://u:SECRET@host"})
    tracker.log_bytes_later(run_id, "validation/a.png", b"picture")
    assert tracker.outbox.own is not None
    kept = Path(tracker.outbox.own.name)
    assert b"SECRET" not in kept.read_bytes()
    beside = Tracker(tracker.recipe)
    beside.begin()
    beside.flush()
    assert kept.exists()  # who keeps it lives
    tracker.outbox.own.write('{"run": "half writ')
    tracker.outbox.own.close()  # as the system does for one that is killed
    after = Tracker(tracker.recipe)
    after.say = said.append
    assert after.stage_run("train", "killed", {}) == run_id
    after.finish(run_id)
    assert [point.value for point in after.client.get_metric_history(run_id, "loss")] == [0.5, 0.25, 0.125]
    assert after.client.get_run(run_id).data.tags["kept"] == "http://host"
    assert [file.path for file in after.client.list_artifacts(run_id, "validation")] == ["validation/a.png"]
    assert list(kept.parent.iterdir()) == []
    assert "5 entries that MLflow missed in an earlier call are sent now" in said


def test_a_full_disk_leaves_it_in_memory(tracker: Tracker, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = tracker.stage_run("train", "full", {})
    working, tracker.impatient = tracker.impatient, MlflowClient(NOBODY)
    tracker.outbox.place = lambda: Path("/proc/nowhere")
    for step in (1, 2):
        tracker.log_metrics(run_id, {"loss": 0.5}, step)
        tracker._try_flush()
    assert sum("is kept in memory alone" in line for line in said) == 1
    tracker.impatient = working
    tracker.flush()
    assert len(working.get_metric_history(run_id, "loss")) == 2


def test_how_long_mlflow_is_waited_for_is_a_setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker(recipe_in(folder, "tracking.patience_s=0"))
    run_id = tracker.stage_run("train", "patience", {})
    tracker.impatient = MlflowClient(NOBODY)
    monkeypatch.setattr(tracker.client, "_client", tracker.impatient)
    tracker.log_metrics(run_id, {"loss": 0.5}, 1)
    with pytest.raises(TrackingError, match="did not take 1 metrics"):
        tracker.finish(run_id)
    with pytest.raises(TrackingError, match="API request to"):
        tracker.log_params(run_id, {"a": 1})
