"""One process at a time may move a registered model's aliases.

MLflow's one atomic operation that every server has is making a registered model: of two callers with the same name
one fails. The lock is such a name, `NAME.lock-G`, held for seconds. One older than `STALE_S` belongs to a process
that died: whoever makes the next generation has it, and of several again just one.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

STALE_S = 600.0
_OWNER, _SINCE = "hatchery.owner", "hatchery.since"


class Busy(ValueError):
    """Somebody else is moving the aliases; the message says who and since when."""


@contextlib.contextmanager
def promotion_lock(client: MlflowClient, name: str) -> Iterator[None]:
    """Held for the time of the block; raises Busy at once where another process holds it."""
    held = _locks(client, name)
    if held:
        owner, since = held[max(held)]
        if time.time() - since < STALE_S:
            raise _busy(name, owner, since)
    mine = f"{name}.lock-{max(held, default=-1) + 1}"
    owner = f"{socket.gethostname()} process {os.getpid()}"
    try:
        client.create_registered_model(mine, tags={_OWNER: owner, _SINCE: f"{time.time():.3f}"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        raise _busy(name, "another process", time.time()) from error
    try:
        for generation in held:
            _delete(client, f"{name}.lock-{generation}")
        yield
    finally:
        _delete(client, mine)


def _locks(client: MlflowClient, name: str) -> dict[int, tuple[str, float]]:
    """Generation -> (owner, since when in seconds since 1970) of every lock that is there."""
    prefix = f"{name}.lock-"
    found = {}
    for model in client.search_registered_models(filter_string=f"name LIKE '{prefix}%'"):
        number = model.name.removeprefix(prefix)
        if number.isdigit():
            found[int(number)] = model.tags.get(_OWNER, "?"), float(model.tags.get(_SINCE, 0))
    return found


def _delete(client: MlflowClient, lock: str) -> None:
    try:
        client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _busy(name: str, owner: str, since: float) -> Busy:
    return Busy(
        f"{name} is being promoted by {owner} since {max(0, time.time() - since):.0f} s: wait for it, then call again"
    )
