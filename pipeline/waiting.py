"""Patience with the storage: a call is repeated until the storage answers."""

import time
from collections.abc import Callable
from typing import TypeVar

from data_prep import storage

T = TypeVar("T")

RETRIES = 5
"""Times that work is begun again without getting further though the storage answers, and reading from it fails."""
REFUSED_S = 600.0
"""How long a storage is asked again that says no: credentials may be renewed, but none trains for hours on that."""
PAUSE_S = 5.0


def until_it_answers(
    ask: Callable[[], T],
    patience_s: float,
    is_wanted: Callable[[], bool] = lambda: True,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[float, T | None]:
    """How long the storage was away, in s, and what `ask` gives; None where the answer was wanted no longer.

    say: told once that it is waited for. StorageError where it stays away for `patience_s`.
    """
    begin = time.monotonic()
    away_s = 0.0
    while True:
        try:
            return away_s, ask()
        except storage.StorageError as error:
            longest_s = patience_s if storage.may_pass(error) else min(patience_s, REFUSED_S)
            if time.monotonic() - begin > longest_s:
                raise
            if not away_s:
                say(f"{error}: trying again for {longest_s / 60:.0f} minutes")
        if not is_wanted():
            return away_s, None
        time.sleep(PAUSE_S)
        away_s = time.monotonic() - begin
