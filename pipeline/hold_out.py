"""Images of a recipe's own training set that judge it: chosen by their names, and left out of what it trains on."""

import glob
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from urllib.parse import unquote

from data_prep import sources
from data_prep.duplicates import same_content
from data_prep.image import decode
from data_prep.sources import Item
from pipeline.config import HoldOutConfig, Recipe


def with_held_out(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with every set of `evaluate.hold_out` among the sets that judge, and out of those that train.

    With it, in words, what is held out. ValueError where no image would be left to train on.
    """
    data, evaluate, said = dict(recipe.data), recipe.evaluate, []
    for name, asked in evaluate.hold_out.items():
        kept = data[asked.data]
        items = sources.list_items(kept.source, kept.include, kept.exclude)
        held = _held(name, asked, items)
        copies = same_content(items, held)
        if len(copies) == len(items):
            raise ValueError(f"evaluate.hold_out.{name} leaves no image of data.{asked.data} to train on: add images")
        data[asked.data] = kept.model_copy(update={"exclude": (*kept.exclude, *_patterns(copies))})
        sets, include = evaluate.sets | {name: kept.source}, evaluate.include | {name: _patterns(held)}
        evaluate = evaluate.model_copy(update={"sets": sets, "include": include})
        said.append(f"{name}: {len(held)} of the {len(items)} images of data.{asked.data} judge and never train")
    evaluate = evaluate.model_copy(update={"hold_out": {}})
    return recipe.model_copy(update={"data": data, "evaluate": evaluate}), said


def _held(name: str, asked: HoldOutConfig, items: list[Item]) -> list[Item]:
    """The images that judge. Their names decide, so that more images leave most of them what they are."""
    wanted = min(max(round(asked.share * len(items)), asked.min_images), asked.max_images)
    held = [item for item, _ in zip(_usable(items), range(wanted), strict=False)]
    if len(held) < wanted:
        raise ValueError(
            f"evaluate.hold_out.{name}: {len(held)} of the {len(items)} images of data.{asked.data} can judge, "
            f"{wanted} must: add images, or lower min_images"
        )
    return held


def _usable(items: Iterable[Item]) -> Iterator[Item]:
    """The images in the order of their names' hashes, without broken ones and those called as one before."""
    called = set()
    for item in sorted(items, key=lambda item: hashlib.sha256(item.key.encode()).digest()):
        stem = PurePosixPath(item.key).stem
        if stem not in called and _is_sound(item):
            called.add(stem)
            yield item


def _is_sound(item: Item) -> bool:
    try:
        return not item.flaw and min(decode(sources.read_item(item)).shape[:2]) > 0
    except ValueError:
        return False


def _patterns(items: Iterable[Item]) -> tuple[str, ...]:
    """Globs that each match one path and no other."""
    return tuple(sorted(f"/{glob.escape(unquote(item.key, errors='surrogateescape'))}" for item in items))
