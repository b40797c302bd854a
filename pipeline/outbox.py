"""What MLflow misses while it is away, on this machine's disk: it arrives although the run is killed meanwhile.

Each process appends to a file of its own and holds a lock on it; the next run of the same recipe takes up the files
of those that are no more. An entry may be sent twice, which MLflow takes as once.
"""

import fcntl
import json
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Outbox:
    """Entries of one recipe, by its key, in the folder that `place` gives when it is needed."""

    def __init__(self, place: Callable[[], Path], key: str) -> None:
        self.place = place
        self.key = key
        self.own: TextIOWrapper | None = None
        self.adopted: list[TextIOWrapper] = []

    def keep(self, entries: Iterable[Entry]) -> None:
        """Append entries; OSError where the disk does not take them."""
        if self.own is None:
            folder = self.place()
            folder.mkdir(parents=True, exist_ok=True)
            self.own = (folder / f"{self.key}-{uuid.uuid4().hex}.jsonl").open("a+")
            fcntl.flock(self.own, fcntl.LOCK_EX)
        self.own.writelines(f"{json.dumps(entry)}\n" for entry in entries)
        self.own.flush()

    def adopt(self) -> list[Entry]:
        """What processes have left that are no more; it stays on the disk until `clear`."""
        found: list[Entry] = []
        for path in sorted(self.place().glob(f"{self.key}-*.jsonl")):
            with suppress(OSError):  # it is in use, or was taken just now
                file = path.open("a+")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    file.close()
                    continue
                self.adopted.append(file)
                file.seek(0)
                found += _entries(file)
        return found

    def clear(self) -> None:
        """All was sent."""
        for file in (*self.adopted, *([self.own] if self.own else [])):
            with suppress(OSError):
                Path(file.name).unlink(missing_ok=True)
            with suppress(OSError):
                file.close()
        self.adopted, self.own = [], None


def _entries(lines: Iterable[str]) -> Iterable[Entry]:
    """The entries of a file; the last one may be half written."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)
