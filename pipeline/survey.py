"""What can be known of a recipe before any work, and without Ray or MLflow: its stages, and what it reads from outside.

Both are slow to import, and a look at the plan needs neither.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep import sources, storage
from data_prep.layouts import training_items
from data_prep.sources import Item
from pipeline import plan
from pipeline.benchmark import set_fingerprint
from pipeline.config import Recipe
from pipeline.hold_out import with_held_out
from pipeline.lasting import check_lasting
from pipeline.objective import check_backbones
from pipeline.plan import Amount, Outside, Stage


@dataclass(frozen=True)
class Choice:
    """Which stages to run: names or groups."""

    stages: list[str] | None = None
    first: str | None = None
    last: str | None = None


def settled(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with all that is decided once: versions in place of aliases, and the images that judge; in words."""
    return with_held_out(_pinned(recipe))


def _pinned(recipe: Recipe) -> Recipe:
    """The recipe with a version's number for every `models:/NAME@alias` it starts from (see `cascade.pinned`)."""
    if not any((training.init_weights or "").startswith("models:/") for training in recipe.trainings.values()):
        return recipe
    from pipeline import cascade

    return cascade.pinned(recipe)


def survey(recipe: Recipe) -> Outside:
    """Fingerprints of what the recipe reads from outside; ValueError for what is not there."""
    used = {name: data for name, data in recipe.data.items() if name in recipe.used_data}
    for name in recipe.evaluate.sets:
        for scale in recipe.scales_judged(name):
            recipe.evaluate.images(name, scale)
    amounts = {name: Amount() for name in (*used, *recipe.evaluate.sets)}
    trained = {name: training_items(data.source, data.include, data.exclude) for name, data in used.items()}
    judged = {
        name: sources.iter_items(uri, recipe.evaluate.include.get(name, ()))
        for name, uri in recipe.evaluate.sets.items()
    }
    return Outside(
        {name: sources.fingerprint(_counted(items, amounts[name])) for name, items in trained.items()},
        {name: set_fingerprint(_counted(items, amounts[name])) for name, items in judged.items()},
        _weights(recipe),
        check_backbones(recipe),
        amounts,
    )


def _weights(recipe: Recipe) -> dict[str, str]:
    if not any(training.init_weights for training in recipe.trainings.values()):
        return {}
    from pipeline import cascade

    return cascade.check_published(recipe)


def _counted(items: Iterable[Item], amount: Amount) -> Iterator[Item]:
    for item in items:
        amount.images += 1
        amount.bytes += item.size
        yield item


def prepare(recipe: Recipe, choice: Choice) -> tuple[list[Stage], set[str], Outside]:
    """The stages, those that are chosen, and what they read. ValueError for faults of sources, storage and choice."""
    check_lasting(recipe)
    storage.check_writable(recipe.storage.uri)
    outside = survey(recipe)
    found = plan.stages_of(recipe, outside)
    return found, plan.select(found, choice.stages, choice.first, choice.last), outside
