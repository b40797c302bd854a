"""`--dry-run`: which stages are done, which would run, and how long they would take; changes nothing.

Imports neither Ray nor MLflow unless a registered model has to be asked about, so that it answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from rich.console import Console

from data_prep.listing import listed_once
from pipeline import estimate, plan, survey
from pipeline.artifact import Artifact
from pipeline.config import Recipe, tracking_uri
from pipeline.plan import Planned, Stage
from pipeline.survey import Choice, prepare

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

_SQLITE = "sqlite:///"


@listed_once()
def run(recipe: Recipe, choice: Choice, console: Console) -> None:
    """Print the plan: a line for each stage, with steps and time, and the sums."""
    recipe, said = survey.settled(recipe)
    found, chosen, outside = prepare(recipe, choice)
    asked = _Registry(recipe)
    planned = plan.make_plan(recipe.storage.uri, found, chosen, asked.is_current)
    running = [entry.stage for entry in planned if entry.action == "run"]
    estimated = estimate.of_stages(recipe, running, outside)
    width = max(len(entry.stage.name) for entry in planned)
    lines = said + [_line(entry, width, estimated.seconds.get(entry.stage.name)) for entry in planned]
    steps = sum(stage.steps for stage in running)
    total = f", {estimate.in_words(sum(estimated.seconds.values()))} in all" if running else ""
    lines.append(f"{len(running)} of {len(planned)} stages to run, {steps} training steps{total}")
    lines += [f"  {note}" for note in estimated.notes]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _line(entry: Planned, width: int, seconds: float | None) -> str:
    what = {"done": "done", "run": "run ", "skip": "not selected"}[entry.action]
    length = f"  {entry.stage.length}" if entry.stage.length else ""
    time = f"  {estimate.in_words(seconds)}" if seconds is not None else ""
    after = f"  after {', '.join(entry.stage.inputs)}" if entry.stage.inputs and not entry.artifact else ""
    where = f"  {entry.artifact.uri}" if entry.artifact else ""
    return f"{entry.stage.name:{width}}  {what}{length}{time}{where}{after}"


class _Registry:
    """Whether what is registered still holds. A server is asked at once; a database only where it has to be."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        uri = tracking_uri(recipe)
        self.absent = uri.startswith(_SQLITE) and not Path(unquote(uri.removeprefix(_SQLITE))).exists()
        self.tracker: Tracker | None = None
        if not uri.startswith(_SQLITE):
            self._connect()

    def _connect(self) -> "Tracker":
        from pipeline.tracking import Tracker

        self.tracker = self.tracker or Tracker(self.recipe)
        return self.tracker

    def is_current(self, stage: Stage, found: Artifact) -> bool:
        """As `stages.is_current`."""
        if stage.kind != "register":
            return True
        if self.absent:
            return False
        from pipeline import stages

        return stages.is_current(stage, found, self._connect())
