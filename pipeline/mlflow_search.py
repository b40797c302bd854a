"""Searches in MLflow that find everything, whatever it is called."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def all_pages(search: Callable[..., Sequence[Any]]) -> Iterator[Any]:
    """Whatever a search of MLflow's finds, page after page; `search` takes `page_token`."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = getattr(page, "token", None)
        if not token:
            return


def quoted(text: str) -> str:
    """A text as MLflow's filters take it. ValueError where it has both kinds of quotes, for which they have no way."""
    if "'" in text and '"' in text:
        raise ValueError(f"{text!r} has both ' and \" in it, which MLflow cannot search for: choose another name")
    return f'"{text}"' if "'" in text else f"'{text}'"
