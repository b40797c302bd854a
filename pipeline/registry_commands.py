"""What `hatchery promote`, `rollback` and `history` do: a registered model's champion, changed and explained."""

import tempfile
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from rich.table import Table

from pipeline import cluster, promotion, registry, tracking
from pipeline.config import ComputeConfig, Recipe
from pipeline.gate import Verdict
from pipeline.promotion import Decision, Event
from pipeline.rivals import judge_candidate
from pipeline.rule import GateConfig
from pipeline.settings import load_settings


def promote(
    name: str,
    version: str | None,
    rule_file: str | None,
    force: str | None,
    tracking_uri: str | None,
    address: str | None = None,
    debug: bool = False,
) -> Decision:
    """Put a version (default: the candidate) to the gate; force: a reason to promote it without asking.

    rule_file: YAML with a promotion rule in place of the one that the version was registered with.
    """
    client = tracking.connect_default(tracking_uri)
    candidate = registry.resolve(client, f"models:/{name}/{version}" if version else f"models:/{name}@candidate")
    if force is not None:
        forced = Verdict(promoted=True, reason=f"by hand: {force}", rival="none asked")
        return promotion.promote(client, name, candidate, lambda champion: forced)
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        mine = registry.read_report(candidate, Path(folder))
        recipe = _recipe_of(candidate, Path(folder))
    rule = load_settings(GateConfig, Path(rule_file), []) if rule_file else recipe.registry.gate
    asked = recipe.evaluate

    def judge(champion: ModelVersion | None) -> Verdict:
        with cluster.connected(ComputeConfig(), address, debug):
            anchor = recipe.registry.anchor
            return judge_candidate(mine, candidate, champion, rule, asked, anchor)

    return promotion.promote(client, name, candidate, judge)


def _recipe_of(version: ModelVersion, folder: Path) -> Recipe:
    return Recipe.model_validate_json(registry.fetch(version, registry.RECIPE, folder).read_text())


def rollback(name: str, reason: str, tracking_uri: str | None) -> Event:
    """Make the previous champion champion again."""
    return promotion.rollback(tracking.connect_default(tracking_uri), name, reason)


def history(name: str, tracking_uri: str | None) -> Table:
    """Who was champion since when, and why; and what became of the other versions."""
    client = tracking.connect_default(tracking_uri)
    events = promotion.history(client, name)
    aliases: dict[str, list[str]] = {}
    for alias, number in registry.registered(client, name).aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    table = Table(title=f"{name}: champions, oldest first", title_justify="left")
    for heading in ("since (UTC)", "version", "instead of", "how", "now", "why"):
        table.add_column(heading)
    for event in events:
        how = event.action if event.done else f"{event.action} (interrupted: the next promotion completes it)"
        now = ", ".join(sorted(aliases.get(event.version, [])))
        table.add_row(event.time[:19], event.version, event.before or "", how, now, event.reason)
    ever = {event.version for event in events}
    for version in sorted(registry.versions_of(client, name), key=lambda found: int(found.version)):
        if str(version.version) not in ever:
            why = version.tags.get(promotion.DECISION_TAG, "not judged yet: hatchery promote")
            now = ", ".join(sorted(aliases.get(str(version.version), [])))
            table.add_row("", str(version.version), "", "never champion", now, why)
    return table
