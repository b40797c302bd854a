"""What a person sees while stages run: a live bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from data_prep.uri import printable

PLAIN_INTERVAL_S = 10.0


class Display:
    """Stage by stage progress. On a terminal one live bar; otherwise a line at most every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Progress | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.begin = self.last_line = 0.0
        self.first_done: int | None = None

    def say(self, text: str) -> None:
        """A line of its own, not wrapped, without markup; names in it are escaped where they cannot be shown."""
        self.console.print(Text("\n".join(map(printable, text.split("\n")))), soft_wrap=True)

    def begin_stage(self, number: int, count: int, name: str, what: str) -> None:
        """Announce a stage that runs."""
        self.stage, self.begin, self.first_done = printable(name), time.monotonic(), None
        self.last_line = 0.0
        self.say(f"[{number}/{count}] {self.stage}: {printable(what)}")
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self.live = Progress(*columns, console=self.console, transient=True)
            self.task = self.live.add_task(self.stage, total=None, note="")
            self.live.start()

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Progress of the present stage; time left is reckoned from what was done in this process."""
        now = time.monotonic()
        if self.first_done is None:
            self.first_done, self.first_time = done, now
        left = _time_left(done - self.first_done, total - done, now - self.first_time)
        note = ", ".join(part for part in (note, left) if part)
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=done, total=total, note=note)
        elif now - self.last_line > PLAIN_INTERVAL_S or done == total:
            self.last_line = now
            self.say(f"      {self.stage}: {done}/{total} {unit}{', ' if note else ''}{note}")

    def end_stage(self, summary: str) -> None:
        """The present stage is finished."""
        self._stop_bar()
        self.say(f"      {self.stage}: done in {time.monotonic() - self.begin:.1f} s{summary and ': '}{summary}")

    def _stop_bar(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_bar()


def _time_left(done: int, left: int, elapsed_s: float) -> str:
    if done <= 0 or left <= 0:
        return ""
    seconds = int(elapsed_s / done * left)
    if seconds < 60:
        text = f"{seconds} s"
    elif seconds < 7200:
        text = f"{seconds // 60} min {seconds % 60} s"
    else:
        text = f"{seconds / 3600:.1f} h"
    return f"{text} left"
