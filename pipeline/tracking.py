"""MLflow: one parent run per recipe run, one child run per stage, found again by tags when a run is resumed.

Metrics, tags and pictures are buffered: training goes on while the server, or the store of its artifacts, does not
answer, and what was missed arrives later. What MLflow refuses is dropped, and said.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from data_prep import storage
from pipeline import config
from pipeline.config import Recipe
from pipeline.errors import Stopped
from pipeline.patient import FAILURES, PATIENCE_S, Patient, may_pass, reason
from pipeline.patient import TrackingError as TrackingError

# A call to a dead server must fail in seconds: metrics are retried by the buffer below.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

RECIPE_TAG, STAGE_TAG, FINGERPRINT_TAG = "hatchery.recipe_digest", "hatchery.stage", "hatchery.fingerprint"
_AWAY_S = 10  # between two tries while the server is away
_BATCH, _PARAM_CHARS, _TAG_CHARS = 100, 6000, 5000  # MLflow's limits on entries per call and characters per value


class Tracker:
    """The runs of one recipe in one MLflow server. `say` is told, in words, what it is well to know at once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.say: Callable[[str], None] = lambda text: None
        self.away = False
        self.refused: set[str] = set()
        self.uri = config.tracking_uri(recipe)
        self.impatient = connect(self.uri)
        self.client = cast(MlflowClient, Patient(self.impatient, self.uri, self._notice))
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        self.experiment_id = self._find_experiment()
        self.parent_id: str | None = None  # the recipe's run, once work has begun
        self.pending: list[tuple[str, Metric]] = []
        self.later: list[tuple[str, Callable[[], None]]] = []
        self.lock = threading.RLock()  # records are handled in a thread, a stage's own in the main one
        self.last_flush = 0.0

    def _find_experiment(self) -> str | None:
        """The experiment's id, if there is one."""
        name = self.recipe.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow experiment {name!r} was deleted: restore it or choose another tracking.experiment"
            )
        return None if found is None else str(found.experiment_id)

    def _make_experiment(self) -> str:
        """In a local SQLite store it keeps its artifacts beside the database."""
        location = None
        if self.uri.startswith("sqlite:///"):
            location = str(Path(self.uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts")
        return str(self.client.create_experiment(self.recipe.tracking.experiment, artifact_location=location))

    def begin(self) -> str:
        """The recipe's run, marked as running: one of the same recipe and storage, else a new one with its config.

        Nothing is written before: who only looks, or is refused a stage that another run works at, changes no run.
        """
        if self.parent_id is None:
            self.experiment_id = self._find_experiment() or self._make_experiment()
            found = self._find(self._parent_tags)
            if found:
                self.client.update_run(found, status="RUNNING")
            self.parent_id = found or self._make_parent()
        return self.parent_id

    @property
    def _parent_tags(self) -> dict[str, str]:
        return {RECIPE_TAG: self.recipe.digest, "hatchery.storage": storage.normalise(self.recipe.storage.uri)}

    def _make_parent(self) -> str:
        run = self.client.create_run(self.experiment_id, run_name=self.recipe.name, tags=self._parent_tags)
        resolved = self.recipe.model_dump(mode="json")
        self.client.log_dict(run.info.run_id, resolved, "recipe.yaml")
        self.log_params(run.info.run_id, config.flatten(resolved))
        return str(run.info.run_id)

    def _find(self, tags: dict[str, str]) -> str | None:
        if self.experiment_id is None:
            return None
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs = self.client.search_runs(
            [self.experiment_id], query, max_results=1, order_by=["attributes.start_time DESC"]
        )
        return str(runs[0].info.run_id) if runs else None

    def stage_run(self, stage: str, fingerprint: str, params: dict[str, Any]) -> str:
        """The child run of a stage: the one begun earlier for the same fingerprint, else a new one."""
        tags = {"mlflow.parentRunId": self.begin(), STAGE_TAG: stage, FINGERPRINT_TAG: fingerprint}
        found = self._find(tags)
        if found:
            self.client.update_run(found, status="RUNNING")
            return found
        run = self.client.create_run(self.experiment_id, run_name=stage, tags=tags)
        self.log_params(run.info.run_id, config.flatten(params))
        return str(run.info.run_id)

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Parameters of a run; values are shortened to what MLflow takes."""
        entries = [Param(key, str(value)[:_PARAM_CHARS]) for key, value in params.items()]
        for begin in range(0, len(entries), _BATCH):
            self.client.log_batch(run_id, params=entries[begin : begin + _BATCH])

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Tags of a run."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int = 0) -> None:
        """Put metrics into the buffer, which is sent at most every two seconds."""
        now_ms = int(time.time() * 1000)
        with self.lock:
            self.pending += [(run_id, Metric(key, float(value), now_ms, step)) for key, value in metrics.items()]
            self._flush_if_due(2)

    def tag_later(self, run_id: str, tags: dict[str, str]) -> None:
        """Tags of a run, now or as soon as the server answers again."""
        entries = [RunTag(key, value) for key, value in tags.items()]
        self._later(f"tags {', '.join(tags)}", lambda: self.impatient.log_batch(run_id, tags=entries))

    def log_bytes_later(self, run_id: str, name: str, content: bytes) -> None:
        """A file among the run's artifacts, now or as soon as it can be sent."""
        self._later(name, lambda: self._log_bytes(run_id, name, content))

    def log_stored_later(self, run_id: str, name: str, uri: str) -> None:
        """A file of the storage among the run's artifacts, now or as soon as it can be read and sent."""
        self._later(name, lambda: self._log_bytes(run_id, name, storage.read_bytes(uri)))

    def _log_bytes(self, run_id: str, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
            file = Path(folder, Path(name).name)
            file.write_bytes(content)
            self.impatient.log_artifact(run_id, str(file), _folder_of(name))

    def _later(self, what: str, call: Callable[[], None]) -> None:
        with self.lock:
            self.later.append((what, call))
            self._flush_if_due(0)

    def _flush_if_due(self, interval_s: float) -> None:
        if time.monotonic() - self.last_flush > (_AWAY_S if self.away else interval_s):
            self._try_flush()

    def _try_flush(self) -> Exception | None:
        """Send what is buffered; the error where MLflow, or what its artifacts lie in, is out of reach."""
        found: Exception | None = None
        with self.lock:
            if self.pending or self.later:
                try:
                    self._send_metrics()
                    self._send_later()
                except FAILURES as error:
                    found = error
                self._notice(found)
            self.last_flush = time.monotonic()
        return found

    def _send_metrics(self) -> None:
        """Raises what may pass."""
        while self.pending:
            run_id = self.pending[0][0]
            batch = [metric for owner, metric in self.pending[:1000] if owner == run_id]
            self._send_batch(run_id, batch)
            sent = {id(metric) for metric in batch}
            self.pending = [entry for entry in self.pending if id(entry[1]) not in sent]

    def _send_batch(self, run_id: str, batch: list[Metric]) -> None:
        """MLflow refuses a batch for one metric in it: then each name is sent by itself."""
        names = sorted({metric.key for metric in batch})
        try:
            self.impatient.log_batch(run_id, metrics=batch)
        except FAILURES as error:
            if may_pass(error):
                raise
            if len(names) == 1:
                self._say_refused(f"metric {names[0]}", error)
                return
            for name in names:
                self._send_batch(run_id, [metric for metric in batch if metric.key == name])

    def _send_later(self) -> None:
        """Raises what may pass."""
        while self.later:
            what, call = self.later.pop(0)
            try:
                call()
            except FAILURES as error:
                if may_pass(error):
                    self.later.insert(0, (what, call))
                    raise
                self._say_refused(what, error)

    def _say_refused(self, what: str, error: Exception) -> None:
        if what not in self.refused:
            self.refused.add(what)
            self.say(f"MLflow at {self.uri} does not take {what}: {reason(error)}")

    def _notice(self, error: Exception | None) -> None:
        """Say once that MLflow is out of reach, and once that it is back."""
        if error is not None and not self.away:
            self.say(f"MLflow at {self.uri} is out of reach, what it misses is kept: {reason(error)}")
        elif error is None and self.away:
            self.say(f"MLflow at {self.uri} is back")
        self.away = error is not None

    def flush(self, patience_s: float = PATIENCE_S) -> None:
        """Send what is buffered, retrying for a while; TrackingError when the server stays away."""
        deadline = time.monotonic() + patience_s
        while (error := self._try_flush()) is not None:
            if time.monotonic() > deadline:
                kept = f"{len(self.pending)} metrics and {len(self.later)} tags and files"
                raise TrackingError(f"MLflow at {self.uri} did not take {kept}: {reason(error)}") from error
            time.sleep(2)

    def log_dataset(self, run_id: str, name: str, digest: str, uri: str) -> None:
        """A data set that the run's result was made from; MLflow keeps the digest's first 32 characters."""
        kind = "s3" if uri.startswith("s3://") else "local"
        source = json.dumps({"uri": uri, "digest": digest})
        found = DatasetInput(Dataset(name, digest[:32], kind, source), [InputTag("mlflow.data.context", "training")])
        self.client.log_inputs(run_id, [found])

    def log_files(self, run_id: str, files: dict[str, Path]) -> None:
        """Local files as artifacts of a run: path below the run's artifacts -> local file of the same base name."""
        for name, path in files.items():
            self.client.log_artifact(run_id, str(path), _folder_of(name))

    def finish(self, run_id: str) -> None:
        """End a run that did what it was to do, once everything has arrived."""
        self.flush()
        self.client.set_terminated(run_id)

    def finish_left(self) -> None:
        """End the recipe's run of a process that was killed when all its work was done, if there is one."""
        found = self._find(self._parent_tags)
        if found and self.client.get_run(found).info.status != "FINISHED":
            self.client.set_terminated(found)

    def abandon(self, run_id: str, error: BaseException) -> None:
        """End a run that an error ends. One attempt: what keeps MLflow from it is said and takes no error's place."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED"
        try:
            self.flush(patience_s=0)
            self.impatient.set_terminated(run_id, status)
        except FAILURES as failure:
            self.say(f"MLflow run {run_id} is not marked as {status}: {reason(failure)}")

    @property
    def how_to_look(self) -> str:
        """The address of the MLflow UI, or the command that starts it."""
        if self.uri.startswith(("http://", "https://")):
            run_id = self.parent_id or self._find(self._parent_tags)
            run = f"/#/experiments/{self.experiment_id}/runs/{run_id}" if run_id else ""
            return f"{self.uri}{run}"
        return f"mlflow ui --backend-store-uri {self.uri}"


def warning_tags(step: int, text: str) -> dict[str, str]:
    """A warning as tags of a run, as many as its length takes.

    Their names depend on the text: all ranks warn of the same step, and of one that is repeated after going back.
    """
    name = f"hatchery.warning.{step}.{config.digest_of(text)[:8]}"
    parts = [text[begin : begin + _TAG_CHARS] for begin in range(0, len(text), _TAG_CHARS)]
    return {f"{name}.{number}" if number else name: part for number, part in enumerate(parts)}


def _folder_of(name: str) -> str | None:
    folder = str(Path(name).parent)
    return None if folder == "." else folder


def connect_default(uri: str | None) -> MlflowClient:
    """A client of the server given, else of $MLFLOW_TRACKING_URI, else of the database below runs/.

    MLflow's own functions use it from then on. TrackingError where there is none of the three.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        database = Path("runs", "mlflow.db").absolute()
        if not database.is_file():
            raise TrackingError(
                f"no MLflow store: {database} is absent; give --tracking-uri, or set MLFLOW_TRACKING_URI"
            )
        uri = f"sqlite:///{database}"
    client = connect(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return client


def connect(uri: str) -> MlflowClient:
    """A client of the server or database at `uri`; TrackingError, with the remedy, where it does not answer."""
    if uri.startswith(("http://", "https://")):
        try:
            requests.get(f"{uri.rstrip('/')}/health", timeout=5).raise_for_status()
        except requests.RequestException as error:
            raise TrackingError(
                f"MLflow at {uri} does not answer ({type(error).__name__}): start the server or correct tracking.uri"
            ) from error
    elif uri.startswith("sqlite:///"):
        try:
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(
                f"MLflow database {uri} cannot be made: {error}; choose another tracking.uri"
            ) from error
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise TrackingError(f"MLflow at {uri} cannot be used ({reason}): correct tracking.uri") from error
    return client
