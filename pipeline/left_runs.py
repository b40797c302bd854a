"""Which process works at an MLflow run: runs that a killed one has left RUNNING are ended by the next call.

A process writes into a tag of its runs who it is, and a number that it raises every minute. One that died on this
machine is known at once; of one on another machine, that its number no longer grows: clocks are never compared.
"""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.lock import died_here, this_process
from pipeline.mlflow_search import all_pages
from pipeline.patient import FAILURES

OWNER_TAG = "hatchery.owner"
BEAT_S = 60.0
SILENT_BEATS = 3
"""After so many without a sign of life a process on another machine counts as dead."""


class Owner:
    """This process as the owner of runs. client: gives the one to ask; say: told of runs that are ended."""

    def __init__(self, client: Callable[[], MlflowClient], say: Callable[[str], None], beat_s: float = BEAT_S) -> None:
        self.client = client
        self.say = say
        self.beat_s = beat_s
        self.record: dict[str, Any] = {**this_process(), "beat": 0}
        self.runs: set[str] = set()
        self.suspects: dict[str, str] = {}
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def tags(self) -> dict[str, str]:
        """What the runs of this process are marked with."""
        return {OWNER_TAG: json.dumps(self.record)}

    def hold(self, run_id: str) -> None:
        """Give signs of life for a run from now on."""
        self.runs.add(run_id)
        if self.thread is None:
            self.thread = threading.Thread(target=self._beat, name="hatchery-runs", daemon=True)
            self.thread.start()

    def release(self, run_id: str) -> None:
        """A run has ended."""
        self.runs.discard(run_id)
        if not self.runs:
            self.done.set()
            self.thread, self.done = None, threading.Event()

    def end_left(self, experiment_id: str) -> None:
        """End the runs of processes that died here; those of silent ones elsewhere some beats later."""
        search = self.client().search_runs
        for run in all_pages(lambda **page: search([experiment_id], "attributes.status = 'RUNNING'", **page)):
            owner = _owner_of(run)
            if owner is None or run.info.run_id in self.runs:
                continue
            if died_here(owner):
                self._end(run)
            elif owner["machine"] != self.record["machine"]:
                self.suspects[run.info.run_id] = run.data.tags[OWNER_TAG]

    def _end(self, run: Run) -> None:
        self.client().set_terminated(run.info.run_id, "KILLED")
        self.say(f"MLflow run {run.info.run_name} was left running by a process that died: marked as KILLED")

    def _beat(self) -> None:
        done, beats = self.done, 0
        while not done.wait(self.beat_s):
            beats += 1
            self.record["beat"] += 1
            with suppress(*FAILURES):
                for run_id in tuple(self.runs):
                    self.client().set_tag(run_id, OWNER_TAG, self.tags[OWNER_TAG])
                if beats == SILENT_BEATS:
                    self._end_silent()

    def _end_silent(self) -> None:
        while self.suspects:
            run_id, seen = self.suspects.popitem()
            run = self.client().get_run(run_id)
            if run.info.status == "RUNNING" and run.data.tags.get(OWNER_TAG) == seen:
                self._end(run)


def _owner_of(run: Run) -> dict[str, Any] | None:
    """Who works at a run; None where that was not kept."""
    try:
        owner = json.loads(run.data.tags.get(OWNER_TAG, ""))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"machine", "pid", "process_started"} <= owner.keys() else None
