"""Images that judge never train: what any domain holds out, and the benchmarks, are found by content and left out."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from data_prep import sources, storage
from data_prep.duplicates import hash_all, same_content
from data_prep.layouts import training_items
from data_prep.sources import Item
from pipeline.config import EvaluateConfig
from pipeline.ledger import HOLD_OUT, NewImage, Round


def judging_images(storage_uri: str, evaluate: EvaluateConfig, round_: Round | None = None) -> list[Item]:
    """Every domain's hold-out in a storage, what a round that may not be open yet holds out, and the benchmarks.

    ValueError where a benchmark is not there.
    """
    domains = storage.iter_files(storage.join(storage_uri, "domains"))
    held = [Item(file.path, file.uri, file.size, file.version) for file in domains if f"/{HOLD_OUT}/" in file.path]
    known = {PurePosixPath(item.key).stem for item in held}
    new = [image for image in (round_.images if round_ else ()) if image.role == "hold-out"]
    benchmarks = [
        item for name, uri in evaluate.sets.items() for item in sources.iter_items(uri, evaluate.include.get(name, ()))
    ]
    return [*held, *(image.item for image in new if image.sha256 not in known), *benchmarks]


def judging_among(images: Iterable[NewImage], judging: Sequence[Item]) -> set[str]:
    """The sha256 of those images that judge."""
    images = list(images)
    sizes = {image.size for image in images}
    found = {digest.hex() for _, digest in hash_all([item for item in judging if item.size in sizes])}
    return found & {image.sha256 for image in images}


def patterns_of_judging(
    source: str, include: Sequence[str], exclude: Sequence[str], judging: Sequence[Item]
) -> tuple[str, ...]:
    """Globs that exclude a source's images that judge; none where it holds none: its shards stay what they are.

    A byte of a name that is no UTF-8, which no config may hold, is left open: at worst a namesake is left out as well.
    """
    found = same_content(training_items(source, include, exclude), judging)
    return tuple(sorted(re.sub("[\udc80-\udcff]", "?", f"/{glob.escape(item.path)}") for item in found))
