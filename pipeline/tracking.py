"""MLflow: one parent run per recipe run, one child run per stage, found again by tags when a run is resumed.

Metrics, tags and pictures are buffered: training goes on while the server, or the store of its artifacts, does not
answer, and what was missed arrives later, from the disk where the run is killed meanwhile (pipeline.outbox). What
MLflow refuses is dropped, and said.
"""

import base64
import functools
import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from data_prep import storage
from data_prep.private_folder import private_folder
from data_prep.redact import without_secrets
from pipeline import config
from pipeline.config import Recipe
from pipeline.errors import Stopped
from pipeline.left_runs import Owner
from pipeline.mlflow_search import all_pages
from pipeline.mlflow_server import check_answers, is_server, sign_in
from pipeline.outbox import Entry, Outbox
from pipeline.patient import FAILURES, Patient, may_pass, reason
from pipeline.patient import TrackingError as TrackingError

# A call to a dead server is not to go on for minutes: metrics are retried by the buffer below.
# Its time-out stays MLflow's own: it holds for artifacts as well, which a server may take long to put away.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
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
        self.impatient = _connect_all(config.tracking_uri(recipe))
        self.uri = without_secrets(self.impatient.tracking_uri)  # to show and to store
        self.patience_s = recipe.tracking.patience_s
        self.client = cast(MlflowClient, Patient(self.impatient, self.uri, self._notice, self.patience_s))
        self.experiment_id = self._find_experiment()
        self.parent_id: str | None = None  # the recipe's run, once work has begun
        self.pending: list[tuple[str, Metric]] = []
        self.later: list[Entry] = []  # tags and files, with their run
        self.outbox = Outbox(
            functools.partial(_outbox_folder, recipe), config.digest_of([self.uri, self._parent_tags])[:16]
        )
        self.owner = Owner(lambda: self.impatient, lambda text: self.say(text))
        self.begun: set[str] = set()  # runs that this process makes or goes on with
        self.gone: set[str] = set()  # of these, those that were found to be deleted
        self.lock = threading.RLock()  # records are handled in a thread, a stage's own in the main one
        self.last_flush = 0.0

    def _find_experiment(self) -> str | None:
        """The experiment's id, if there is one."""
        name = self.recipe.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise TrackingError(self._experiment_deleted)
        return None if found is None else str(found.experiment_id)

    @property
    def _experiment_deleted(self) -> str:
        name = self.recipe.tracking.experiment
        return f"MLflow experiment {name!r} was deleted: restore it or choose another tracking.experiment"

    def _make_experiment(self) -> str:
        """In a local SQLite store it keeps its artifacts beside the database."""
        location = None
        if self.uri.startswith("sqlite:///"):
            location = str(database_file(self.uri).parent / "mlflow-artifacts")
        return str(self.client.create_experiment(self.recipe.tracking.experiment, artifact_location=location))

    def begin(self) -> str:
        """The recipe's run, marked as running: one of the same recipe and storage, else a new one with its config.

        Nothing is written before: who only looks, or is refused a stage that another run works at, changes no run.
        """
        if self.parent_id is None:
            self.experiment_id = self._find_experiment() or self._make_experiment()
            found = self._find(self._parent_tags)
            if found:
                self._take_up(found)
            self.parent_id = found or self._make_parent()
            self._hold(self.parent_id)
            self._take_over(self.outbox.adopt())
        return self.parent_id

    def _take_up(self, run_id: str) -> None:
        self.client.update_run(run_id, status="RUNNING")
        self.set_tags(run_id, self.owner.tags)

    def _hold(self, run_id: str) -> None:
        self.begun.add(run_id)
        self.owner.hold(run_id)

    def end_left(self) -> None:
        """Mark as KILLED what killed processes have left RUNNING in the recipe's experiment, and say so."""
        if self.experiment_id is not None:
            with suppress(*FAILURES):  # no work depends on it
                self.owner.end_left(self.experiment_id)

    @property
    def _parent_tags(self) -> dict[str, str]:
        return {RECIPE_TAG: self.recipe.digest, "hatchery.storage": storage.normalise(self.recipe.storage.uri)}

    def _make_parent(self) -> str:
        tags = self._parent_tags | self.owner.tags
        run = self.client.create_run(self.experiment_id, run_name=self.recipe.name, tags=tags)
        resolved = self.recipe.model_dump(mode="json")
        self.client.log_dict(run.info.run_id, resolved, "recipe.yaml")
        self.log_params(run.info.run_id, config.flatten(resolved))
        return str(run.info.run_id)

    def _find(self, tags: dict[str, str]) -> str | None:
        """The newest run with all of these tags; MLflow is asked for those that its filters can quote, digests say."""
        if self.experiment_id is None:
            return None
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items() if "'" not in value)
        search = functools.partial(
            self.client.search_runs, [self.experiment_id], query, order_by=["attributes.start_time DESC"]
        )
        for run in all_pages(search):
            if all(run.data.tags.get(key) == value for key, value in tags.items()):
                return str(run.info.run_id)
        return None

    def stage_run(self, stage: str, fingerprint: str, params: dict[str, Any]) -> str:
        """The child run of a stage: the one begun earlier for the same fingerprint, else a new one."""
        tags = {"mlflow.parentRunId": self.begin(), STAGE_TAG: stage, FINGERPRINT_TAG: fingerprint}
        found = self._find(tags)
        if found:
            self._take_up(found)
        else:
            tags |= self.owner.tags
            found = str(self.client.create_run(self.experiment_id, run_name=stage, tags=tags).info.run_id)
            self.log_params(found, config.flatten(params))
        self._hold(found)
        return found

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Parameters of a run; values are shortened to what MLflow takes."""
        entries = [Param(key, without_secrets(str(value))[:_PARAM_CHARS]) for key, value in params.items()]
        for begin in range(0, len(entries), _BATCH):
            self.client.log_batch(run_id, params=entries[begin : begin + _BATCH])

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Tags of a run."""
        self.client.log_batch(run_id, tags=_run_tags(tags))

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int = 0) -> None:
        """Put metrics into the buffer, which is sent at most every two seconds."""
        now_ms = int(time.time() * 1000)
        with self.lock:
            new = [(run_id, Metric(key, float(value), now_ms, step)) for key, value in metrics.items()]
            self.pending += new
            if self.away:
                self._keep(map(_entry_of, new))
            self._flush_if_due(2)

    def tag_later(self, run_id: str, tags: dict[str, str]) -> None:
        """Tags of a run, now or as soon as the server answers again."""
        self._later({"run": run_id, "tags": {tag.key: tag.value for tag in _run_tags(tags)}})

    def log_bytes_later(self, run_id: str, name: str, content: bytes) -> None:
        """A file among the run's artifacts, now or as soon as it can be sent."""
        self._later({"run": run_id, "file": name, "content": base64.b64encode(content).decode()})

    def log_stored_later(self, run_id: str, name: str, uri: str) -> None:
        """A file of the storage among the run's artifacts, now or as soon as it can be read and sent."""
        self._later({"run": run_id, "file": name, "stored": uri})

    def _send(self, entry: Entry) -> None:
        if "tags" in entry:
            self.impatient.log_batch(entry["run"], tags=_run_tags(entry["tags"]))
            return
        content = base64.b64decode(entry["content"]) if "content" in entry else storage.read_bytes(entry["stored"])
        with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
            file = Path(folder, Path(entry["file"]).name)
            file.write_bytes(content)
            self.impatient.log_artifact(entry["run"], str(file), _folder_of(entry["file"]))

    def _later(self, entry: Entry) -> None:
        with self.lock:
            self.later.append(entry)
            if self.away:
                self._keep([entry])
            self._flush_if_due(0)

    def _keep(self, entries: Iterable[Entry]) -> None:
        """Put what MLflow misses on the disk as well; what that does not take stays in memory, which is said once."""
        try:
            self.outbox.keep(entries)
        except OSError as error:
            self._say_once("outbox", f"what MLflow misses is kept in memory alone: {error}")

    def _take_over(self, left: list[Entry]) -> None:
        """Send what an earlier process could not."""
        with self.lock:
            for entry in left:
                if "metric" in entry:
                    self.pending.append((entry["run"], Metric(*entry["metric"])))
                else:
                    self.later.append(entry)
        if left:
            self.say(f"{len(left)} entries that MLflow missed in an earlier call are sent now")

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
            if found is None:
                self.outbox.clear()
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
            if self._was_deleted(run_id):
                return
            if len(names) == 1:
                self._say_refused(f"metric {names[0]}", error)
                return
            for name in names:
                self._send_batch(run_id, [metric for metric in batch if metric.key == name])

    def _send_later(self) -> None:
        """Raises what may pass."""
        while self.later:
            entry = self.later.pop(0)
            try:
                self._send(entry)
            except FAILURES as error:
                if may_pass(error):
                    self.later.insert(0, entry)
                    raise
                if not self._was_deleted(entry["run"]):
                    self._say_refused(entry.get("file") or f"tags {', '.join(entry['tags'])}", error)

    def _was_deleted(self, run_id: str) -> bool:
        """Whether somebody deleted a run meanwhile, which is said once; what it would be told from then on is lost."""
        if run_id in self.gone:
            return True
        try:
            deleted = self.impatient.get_run(run_id).info.lifecycle_stage == "deleted"
        except MlflowException as error:
            deleted = error.error_code == "RESOURCE_DOES_NOT_EXIST" and run_id in self.begun
        if deleted:
            self.gone.add(run_id)
            self.say(f"MLflow run {run_id} was deleted meanwhile: it is told no more")
        return deleted

    def _say_refused(self, what: str, error: Exception) -> None:
        self._say_once(what, f"MLflow at {self.uri} does not take {what}: {reason(error)}")

    def _say_once(self, what: str, text: str) -> None:
        if what not in self.refused:
            self.refused.add(what)
            self.say(text)

    def _notice(self, error: Exception | None) -> None:
        """Say once that MLflow is out of reach, and once that it is back."""
        if error is not None and not self.away:
            with self.lock:
                self._keep([*map(_entry_of, self.pending), *self.later])
            self.say(f"MLflow at {self.uri} is out of reach, what it misses is kept: {reason(error)}")
        elif error is None and self.away:
            self.say(f"MLflow at {self.uri} is back")
        self.away = error is not None

    def flush(self, patience_s: float | None = None) -> None:
        """Send what is buffered, retrying for `tracking.patience_s`; TrackingError when the server stays away."""
        deadline = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
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
        self.owner.release(run_id)

    def finish_left(self) -> None:
        """End the recipe's run of a process that was killed when all its work was done, if there is one."""
        found = self._find(self._parent_tags)
        if found and self.client.get_run(found).info.status != "FINISHED":
            self.client.set_terminated(found)

    def abandon(self, run_id: str, error: BaseException) -> None:
        """End a run that an error ends. One attempt: what keeps MLflow from it is said and takes no error's place."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED"
        self.owner.release(run_id)
        try:
            if is_server(self.uri):
                check_answers(self.uri)  # within seconds: who pressed Ctrl-C waits for it
            self.flush(patience_s=0)
            self._end(run_id, status)
        except FAILURES as failure:
            self.say(f"MLflow run {run_id} is not marked as {status}: {reason(failure)}")

    def _end(self, run_id: str, status: str) -> None:
        """Mark a run as ended; one that was deleted meanwhile stays so, but not as one that is running."""
        try:
            self.impatient.set_terminated(run_id, status)
        except MlflowException:
            if not self._was_deleted(run_id):
                raise
            self.impatient.restore_run(run_id)
            self.impatient.set_terminated(run_id, status)
            self.impatient.delete_run(run_id)

    def refusal(self, run_id: str | None, error: MlflowException) -> TrackingError:
        """What to say, in one line with the remedy, where MLflow refuses what the work on a run cannot do without."""
        with suppress(*FAILURES):
            if self.experiment_id and self.impatient.get_experiment(self.experiment_id).lifecycle_stage == "deleted":
                return TrackingError(self._experiment_deleted)
        if run_id is not None and self._was_deleted(run_id):
            return TrackingError(
                f"MLflow run {run_id} was deleted meanwhile: call again, which makes another and takes up the work"
            )
        return TrackingError(f"MLflow at {self.uri} refuses: {reason(error)}")

    @property
    def how_to_look(self) -> str:
        """The address of the MLflow UI, or the command that starts it."""
        if is_server(self.uri):
            run_id = self.parent_id or self._find(self._parent_tags)
            run = f"/#/experiments/{self.experiment_id}/runs/{run_id}" if run_id else ""
            return f"{self.uri.rstrip('/')}{run}"
        return f"mlflow ui --backend-store-uri {self.uri}"


def warning_tags(step: int, text: str) -> dict[str, str]:
    """A warning as tags of a run, as many as its length takes.

    Their names depend on the text: all ranks warn of the same step, and of one that is repeated after going back.
    """
    name = f"hatchery.warning.{step}.{config.digest_of(text)[:8]}"
    parts = [text[begin : begin + _TAG_CHARS] for begin in range(0, len(text), _TAG_CHARS)]
    return {f"{name}.{number}" if number else name: part for number, part in enumerate(parts)}


def _entry_of(owned: tuple[str, Metric]) -> Entry:
    run_id, metric = owned
    return {"run": run_id, "metric": [metric.key, metric.value, metric.timestamp, metric.step]}


def _outbox_folder(recipe: Recipe) -> Path:
    """Beside the results where they lie in a folder, which the next call sees wherever it runs."""
    if storage.is_local(recipe.storage.uri):
        return Path(storage.normalise(recipe.storage.uri), "mlflow-outbox")
    return Path(private_folder("hatchery-outbox"))


def _run_tags(tags: dict[str, str]) -> list[RunTag]:
    return [RunTag(key, without_secrets(str(value))) for key, value in tags.items()]


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
    return _connect_all(uri)


def _connect_all(uri: str) -> MlflowClient:
    """A client as `connect`; MLflow's own functions use its server from then on."""
    client = connect(uri)
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_registry_uri(client.tracking_uri)
    return client


def connect(uri: str) -> MlflowClient:
    """A client of the server or database at `uri`; TrackingError, with the remedy, where it does not answer.

    A login in the address of a server goes from there into the environment, where MLflow looks for one.
    """
    if is_server(uri):
        uri = sign_in(uri)
        check_answers(uri)
    elif uri.startswith("sqlite:///"):
        _check_database(uri)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        raise TrackingError(
            f"MLflow at {without_secrets(uri)} cannot be used ({reason(error) or type(error).__name__}): correct "
            f"tracking.uri"
        ) from error
    return client


def database_file(uri: str) -> Path:
    """Where the database of a sqlite:/// URI lies."""
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def _check_database(uri: str) -> None:
    """TrackingError where a SQLite database cannot be opened or made; MLflow would try again for minutes."""
    file = database_file(uri)
    if str(file) in (".", ":memory:") or str(file).startswith("file:"):
        return  # SQLite's other forms
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA schema_version")
        if not os.access(file, os.W_OK):
            raise PermissionError(f"{file} is not for you to write to")
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"MLflow database {without_secrets(uri)} cannot be used: {error}; choose another tracking.uri"
        ) from error
