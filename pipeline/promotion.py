"""Who is champion: promotion, going back, and the journal of both, kept as tags of the registered model.

Every change is an event, written before the aliases are moved and marked done after: a process that died in between
left an event that the next call completes. One process at a time may move aliases (`registry_lock`).
"""

import datetime
from collections.abc import Callable
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline import registry
from pipeline.gate import Verdict
from pipeline.registry_lock import promotion_lock
from pipeline.settings import Settings

EVENT_TAG = "hatchery.event."
DECISION_TAG = "hatchery.decision"
_TAG_CHARS = 4500  # MLflow takes 5000


class Event(Settings):
    """One line of a registered model's history; versions are numbers as MLflow writes them."""

    number: int
    time: str
    action: Literal["promote", "rollback"]
    version: str
    before: str | None
    reason: str
    done: bool = False


class Decision(Settings):
    """What became of one candidate."""

    name: str
    version: str
    promoted: bool
    reason: str


def promote(
    client: MlflowClient,
    name: str,
    candidate: ModelVersion,
    judge: Callable[[ModelVersion | None], Verdict],
) -> Decision:
    """Ask `judge` about the present champion (None: there is none) and move the aliases if it says so.

    The decision is kept with the version either way. ValueError where somebody else is promoting, or has promoted
    since the verdict was made.
    """
    with promotion_lock(client, name):
        repair(client, name)
    champion = registry.by_alias(client, name, "champion")
    if champion is not None and champion.version == candidate.version:
        return _decision(name, candidate, True, candidate.tags.get(DECISION_TAG, "is champion already"))
    verdict = judge(champion)
    if verdict.promoted:
        _promote_unless_outrun(client, name, candidate, champion, verdict)
    _keep(client, name, candidate, verdict)
    return _decision(name, candidate, verdict.promoted, verdict.reason)


def _promote_unless_outrun(
    client: MlflowClient, name: str, candidate: ModelVersion, judged: ModelVersion | None, verdict: Verdict
) -> None:
    """Move the aliases if the champion is still the one that was judged against; ValueError, kept as well, if not."""
    with promotion_lock(client, name):
        now = registry.by_alias(client, name, "champion")
        if (now and now.version) == (judged and judged.version):
            _record(client, name, "promote", str(candidate.version), verdict.reason)
            return
    if now is not None and now.version == candidate.version:
        return  # another call with the same candidate was quicker
    outrun = f"version {now.version if now else 'none'} became champion meanwhile; call again to compare with it"
    _keep(client, name, candidate, Verdict(promoted=False, reason=f"not promoted: {outrun}", rival=verdict.rival))
    raise ValueError(f"{name} version {candidate.version} is not promoted: {outrun}")


def rollback(client: MlflowClient, name: str, reason: str) -> Event:
    """Make the previous champion champion again, and the present one `previous`. ValueError where there is none."""
    with promotion_lock(client, name):
        repair(client, name)
        previous = registry.by_alias(client, name, "previous")
        if previous is None:
            raise ValueError(
                f"{name} has no previous champion to go back to: hatchery promote {name} --version N --force "
                f"makes another version champion"
            )
        return _record(client, name, "rollback", str(previous.version), reason)


def history(client: MlflowClient, name: str) -> list[Event]:
    """Every change of champion, oldest first. ValueError for a model that is not registered."""
    tags = registry.registered(client, name).tags
    found = [Event.model_validate_json(value) for key, value in tags.items() if key.startswith(EVENT_TAG)]
    return sorted(found, key=lambda event: event.number)


def repair(client: MlflowClient, name: str) -> Event | None:
    """Complete the last event where its process died before the aliases were moved; the lock must be held."""
    events = history(client, name)
    if not events or events[-1].done:
        return None
    return _complete(client, name, events[-1])


def _record(
    client: MlflowClient, name: str, action: Literal["promote", "rollback"], version: str, reason: str
) -> Event:
    champion = registry.by_alias(client, name, "champion")
    events = history(client, name)
    event = Event(
        number=events[-1].number + 1 if events else 1,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        action=action,
        version=version,
        before=str(champion.version) if champion else None,
        reason=reason[: _TAG_CHARS - 500],
    )
    _write(client, name, event)
    return _complete(client, name, event)


def _complete(client: MlflowClient, name: str, event: Event) -> Event:
    """Move the aliases as the event says; doing it twice does no harm."""
    if event.before is not None:
        client.set_registered_model_alias(name, "previous", event.before)
    client.set_registered_model_alias(name, "champion", event.version)
    if event.action == "promote":
        _tell(client, name, event.version, True, event.reason)
    done = event.model_copy(update={"done": True})
    _write(client, name, done)
    return done


def _write(client: MlflowClient, name: str, event: Event) -> None:
    client.set_registered_model_tag(name, f"{EVENT_TAG}{event.number:06d}", event.model_dump_json())


def _keep(client: MlflowClient, name: str, candidate: ModelVersion, verdict: Verdict) -> None:
    """The verdict as tags of the version and, whole, as an artifact of its run."""
    _tell(client, name, candidate.version, verdict.promoted, verdict.reason)
    for condition in verdict.conditions:
        if (found := condition.figures) is not None:
            kind = "gain" if condition.against == "rival" else "since_start"
            gain = f"{found.difference:+.6f} ({found.low:+.6f} .. {found.high:+.6f})"
            client.set_model_version_tag(name, candidate.version, f"hatchery.{kind}.{found.metric}.{found.set}", gain)
    if candidate.run_id:
        client.log_dict(
            candidate.run_id, verdict.model_dump(mode="json"), f"decisions/{name}-version-{candidate.version}.json"
        )


def _tell(client: MlflowClient, name: str, version: str, promoted: bool, reason: str) -> None:
    """The decision in short as tags of a version, which lists of versions show."""
    client.set_model_version_tag(name, version, "hatchery.promoted", str(promoted).lower())
    client.set_model_version_tag(name, version, DECISION_TAG, reason[:_TAG_CHARS])


def _decision(name: str, candidate: ModelVersion, promoted: bool, reason: str) -> Decision:
    return Decision(name=name, version=str(candidate.version), promoted=promoted, reason=reason)
