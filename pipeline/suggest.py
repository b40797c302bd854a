"""What somebody may have meant by a name that is not there."""

import difflib
from collections.abc import Iterable

_SHOWN = 12


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a word, or None where none is; case does not count."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean steps?`, to be put behind a message; empty where no known name is like the word."""
    found = closest(word, known)
    return f": did you mean {found}?" if found else ""


def some_of(names: Iterable[str]) -> str:
    """The first names, and how many more there are; `none` where there are none."""
    listed = list(names)
    more = len(listed) - _SHOWN
    return (", ".join(listed[:_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")
