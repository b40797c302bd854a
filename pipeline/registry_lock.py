"""One process at a time may move a registered model's aliases.

MLflow's one atomic operation that every server has is making a registered model: of two callers with the same name
one fails. The lock is such a name, `NAME.lock-G`, held for seconds; judging is done outside of it. One whose process
died on this machine, or elsewhere is older than `STALE_S`, is dead: whoever makes the next generation has it, and of
several again just one.
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.lock import died_here, this_process
from pipeline.mlflow_search import all_pages, quoted

STALE_S = 60.0
_HOLDER = "hatchery.holder"


class Busy(ValueError):
    """Somebody else is moving the aliases; the message says who and since when."""


@contextlib.contextmanager
def promotion_lock(client: MlflowClient, name: str) -> Iterator[None]:
    """Held for the time of the block; raises Busy at once where another process holds it."""
    held = _locks(client, name)
    if held:
        last = held[max(held)]
        if not died_here(last) and time.time() - last["since"] < STALE_S:
            raise _busy(name, last)
    mine = f"{name}.lock-{max(held, default=-1) + 1}"
    me = this_process() | {"since": time.time()}
    try:
        client.create_registered_model(mine, tags={_HOLDER: json.dumps(me)})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        raise _busy(name, {"owner": "another process", "since": time.time()}) from error
    try:
        for generation in held:
            _delete(client, f"{name}.lock-{generation}")
        yield
    finally:
        _delete(client, mine)


def is_lock(name: str) -> bool:
    """Whether a registered model is a lock rather than a model."""
    return re.search(r"\.lock-\d+$", name) is not None


def _locks(client: MlflowClient, name: str) -> dict[int, dict[str, Any]]:
    """Generation -> who holds it, and `since` when in seconds since 1970, of every lock that is there."""
    prefix = f"{name}.lock-"
    found = {}
    search = functools.partial(client.search_registered_models, f"name LIKE {quoted(prefix + '%')}")
    for model in all_pages(search):
        if is_lock(model.name) and model.name.startswith(prefix):
            unknown = {"owner": "?", "machine": "?", "since": 0}
            found[int(model.name.removeprefix(prefix))] = unknown | json.loads(model.tags.get(_HOLDER, "{}"))
    return found


def _delete(client: MlflowClient, lock: str) -> None:
    try:
        client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _busy(name: str, holder: dict[str, Any]) -> Busy:
    waited_s = max(0, time.time() - holder["since"])
    return Busy(f"{name} is being promoted by {holder['owner']} since {waited_s:.0f} s: wait for it, then call again")
