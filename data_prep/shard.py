"""Images to WebDataset tars: the original bytes, checked by a full decode, equal on every machine.

`plan` decides, `write_shard` makes one tar, `make_shards` runs them as Ray tasks and publishes the index.
A stopped run continues: a shard whose sidecar matches its plan is kept.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from data_prep.duplicates import find_duplicates
from data_prep.grow import Growth, delete_indexes
from data_prep.image import Checked, check, decode
from data_prep.image_files import PassedOver
from data_prep.index import (
    Reject,
    Sample,
    ShardInfo,
    ShardSet,
    ShardSettings,
    Summary,
    publish_index,
    read_shard_set,
    seek_hash,
    summarise,
    to_json,
)
from data_prep.layouts import training_items
from data_prep.plan import Plan, ShardPlan, mark, plan_shards
from data_prep.read_ahead import read_ahead
from data_prep.shard_folder import MAKING_NAME, is_shard_file, take_folder
from data_prep.sources import Item
from data_prep.storage import (
    StorageError,
    delete,
    join,
    list_files,
    normalise,
    read_bytes,
    sweep,
    write_bytes,
    writing,
)
from data_prep.subimages import boxes, sub_key, to_png
from data_prep.tasks import in_order
from data_prep.uri import printable

__all__ = ["ShardPlan", "ShardSet", "ShardSettings", "make_shards", "plan_shards", "write_shard"]

_DUPLICATES_NAME = "duplicates.json"  # what a stopped run had found out
_NAMED_REJECTS = 5
_SEEK_EXT = "seek"

Progress = Callable[[int, int], None]


class _Hashing:
    """A file to write to that hashes and counts what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def write_shard(plan: ShardPlan, destination: str) -> ShardInfo:
    """Make one tar and, when it is stored, its sidecar.

    An image that does not decode or is too small is rejected with the reason. Raises StorageError where an item
    cannot be read or the destination cannot be written.
    """
    samples: list[Sample] = []
    rejects: list[Reject] = []
    num_of_several = 0
    with writing(join(destination, f"{plan.name}.tar")) as file, ExitStack() as stack:
        out = _Hashing(file)
        with tarfile.open(fileobj=out, mode="w|", bufsize=2**20, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
            for item, data in stack.enter_context(closing(read_ahead(plan.items))):
                if item.flaw:
                    rejects.append(_reject(item, item.flaw))
                    continue
                try:
                    checked = check(data, plan.settings.max_pixels)
                    entries = list(_entries(item, data, checked, plan.settings))
                except ValueError as error:
                    rejects.append(_reject(item, str(error)))
                    continue
                num_of_several += checked.num_pictures > 1
                samples.extend(_append(tar, entry) for entry in entries)
    info = ShardInfo(
        name=plan.name,
        plan=plan.digest,
        bytes=out.bytes,
        sha256=out.sha256.hexdigest(),
        num_images=len(plan.items),
        samples=tuple(samples),
        rejects=tuple(rejects),
        num_of_several=num_of_several,
        marks="".join(mark(item) for item in sorted(plan.items, key=lambda item: item.key)),
    )
    if not samples:
        delete(join(destination, f"{plan.name}.tar"))
    write_bytes(join(destination, f"{plan.name}.json"), to_json(info))
    return info


def make_shards(
    source: str,
    destination: str,
    settings: ShardSettings,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    grow: bool = False,
) -> ShardSet:
    """Make or complete the shards of a source at `destination`; Ray must be initialised.

    A complete set made from the same source and settings is returned as it is. `grow`: one that was made with these
    settings from some of the source's images is kept, and grows (see `grow`); else it is made anew. `progress` is
    called with the number of finished shards and of all, `say` with lines about what is passed over, and how the set
    grows. Raises ValueError where the source holds no images, images in two resolutions, or too many are rejected,
    StorageError where the storage fails.
    """
    passed_over = PassedOver()
    with Plan(training_items(source, include, exclude, passed_over), settings) as plan:
        if say and (said := passed_over.describe()):
            say(f"{source}: {said}")
        if (finished := _finished(destination, plan.fingerprint, settings)) is not None:
            return finished
        take_folder(destination, (info.path for info in list_files(destination)))
        growth = _growth(destination, plan, say) if grow else None
        if growth is None:
            delete_indexes(destination)  # from here on they are no longer true
        sweep(destination)
        duplicates = _duplicates(plan, destination) if settings.drop_duplicates else {}
        if growth is None:
            num_images, shards = plan.num_items - len(duplicates), plan.shards(duplicates)
        else:
            duplicates = growth.staying(duplicates)
            num_images, shards = growth.num_new(duplicates), growth.new_shards(duplicates)
            if say:
                say(f"{destination} grows: {num_images} new images, {growth.num_gone} no longer listed")
        total = -(-num_images // settings.samples_per_shard)
        sizes = {info.path: info.size for info in list_files(destination)}
        calls = ((shard, destination, sizes.get(f"{shard.name}.tar")) for shard in shards)
        summaries = _reported(in_order(complete_shard, _normalised(calls)), total, progress)
        if growth is not None:
            summaries = chain(growth.old_summaries(), summaries)
        first = growth.first if growth else 0
        made = _checked(source, summaries, settings, destination, plan.num_items - len(duplicates), first)
        if growth is not None:
            made = iter(list(made))  # all new shards are there before the index of before is put aside
            growth.keep_index()
        again = {"generation": growth.generation, "next_shard": first + total} if growth else {}
        published = publish_index(destination, source, plan.fingerprint, settings, made, duplicates, **again)
        if say and (number := published.index.num_of_several):
            say(f"{source}: {number} files hold several pictures; the first of each was taken")
        return published


def _growth(destination: str, plan: Plan, say: Callable[[str], None] | None) -> Growth | None:
    """How the finished set at the destination can grow to the plan's images; None where it has to be made anew."""
    try:
        before = read_shard_set(destination)
    except StorageError:
        return None
    why = "it was made with other settings"
    if before.index.settings.content() == plan.settings.content():
        growth = Growth(before, plan)
        if growth.is_possible:
            return growth
        why = "it holds none of these images, or was made before sets could grow"
    if say:
        say(f"{destination}: {why}; it is made anew")
    return None


def complete_shard(plan: ShardPlan, destination: str, tar_bytes: int | None) -> Summary:
    """Make a shard unless it is there: its sidecar matches the plan and its tar, `tar_bytes` long, the sidecar."""
    try:
        info = ShardInfo.model_validate_json(read_bytes(join(destination, f"{plan.name}.json")))
    except ValueError:  # none, or another program's or an older format's: made anew
        info = None
    if info and info.plan == plan.digest and (info.bytes == tar_bytes or not info.samples):
        return summarise(info)
    return summarise(write_shard(plan, destination))


def _normalised(calls: Iterator[tuple[ShardPlan, str, int | None]]) -> Iterator[tuple[Any, ...]]:
    """The calls for other machines and folders: a relative destination is the driver's."""
    for plan, destination, size in calls:
        yield plan, normalise(destination), size


def _reported(summaries: Iterator[Summary], total: int, progress: Progress | None) -> Iterator[Summary]:
    for done, summary in enumerate(summaries, 1):
        if progress:
            progress(done, total)
        yield summary


def _duplicates(plan: Plan, destination: str) -> dict[str, str]:
    """The keys to drop and those that stay for them, kept at the destination for a run that goes on."""
    uri = join(destination, _DUPLICATES_NAME)
    try:
        known = json.loads(read_bytes(uri))
        if known["source_fingerprint"] == plan.fingerprint:
            return known["duplicates"]
    except (ValueError, KeyError):
        pass  # none yet, or of another source
    found = find_duplicates(plan)
    write_bytes(uri, json.dumps({"source_fingerprint": plan.fingerprint, "duplicates": found}).encode())
    return found


def _finished(destination: str, fingerprint: str, settings: ShardSettings) -> ShardSet | None:
    """The complete set at the destination if it was made from this source and settings and its tars are there."""
    try:
        found = read_shard_set(destination)
    except StorageError:
        return None
    index = found.index
    if index.source_fingerprint != fingerprint or index.settings.content() != settings.content():
        return None
    if index.num_rejects > settings.max_reject_share * index.num_images:
        return None
    sizes = {info.path: info.size for info in list_files(destination)}
    whole = all(
        sizes.get(f"{shard.name}.tar") == shard.bytes and f"{shard.name}.json" in sizes for shard in found.shards
    )
    return found if whole else None


def _checked(
    source: str, summaries: Iterator[Summary], settings: ShardSettings, destination: str, num_images: int, first: int
) -> Iterator[Summary]:
    """The summaries; ValueError as soon as too many of num_images are rejected.

    At the end stale shards go, from number `first` on: those before it belong to an index of before.
    """
    names, rejects, num_rejects, seen = set(), list[Reject](), 0, 0
    for summary in summaries:
        seen += summary.num_images
        num_rejects += len(summary.rejects)
        rejects.extend(summary.rejects[: _NAMED_REJECTS - len(rejects)])
        if num_rejects > settings.max_reject_share * num_images or num_rejects == num_images:
            named = "; ".join(f"{reject.key}: {reject.reason}" for reject in rejects)
            raise ValueError(
                f"{source}: {num_rejects} of {seen} images ({num_rejects / seen:.1%}) were rejected, max_reject_share "
                f"is {settings.max_reject_share:.1%} of all {num_images} ({named}); repair or exclude them, lower "
                f"min_side_px or raise max_reject_share"
            )
        if summary.shard:
            names.add(summary.shard.name)
        yield summary
    _delete_stale(destination, names, f"shard-{first:06d}")


def _delete_stale(destination: str, names: set[str], first: str) -> None:
    """Delete shards of an earlier plan, which a reader of `*.tar` would take for part of the set."""
    for info in list_files(destination):
        name = info.path.rpartition(".")[0]
        if is_shard_file(info.path) and name not in names and name >= first:
            delete(info.uri)
    delete(join(destination, _DUPLICATES_NAME))
    delete(join(destination, MAKING_NAME))


class _Entry(NamedTuple):
    """What goes into the tar for an image, and what is known of it."""

    key: str
    ext: str
    data: bytes
    checked: Checked


def _entries(item: Item, data: bytes, checked: Checked, settings: ShardSettings) -> Iterator[_Entry]:
    """An image as it is, or cut into sub-images. Raises ValueError with the reason to reject it."""
    height, width = checked.height, checked.width
    if min(height, width) < settings.min_side_px:
        raise ValueError(f"{width}x{height} pixels: a side is below min_side_px={settings.min_side_px}")
    if settings.sub_image_px is None:
        yield _Entry(item.key, item.ext, data, checked)
        return
    pixels = decode(data)
    for number, box in enumerate(boxes(height, width, settings.sub_image_px, settings.sub_image_step_px), 1):
        crop = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        yield _Entry(sub_key(item.key, number), "png", to_png(crop), Checked(box.height, box.width, b"", 1))


def _reject(item: Item, reason: str) -> Reject:
    """The image as left out; bytes of its name that are no UTF-8 are written \\xNN, for JSON takes none."""
    return Reject(key=item.key, uri=printable(item.uri), reason=reason)


def _append(tar: tarfile.TarFile, entry: _Entry) -> Sample:
    """Add an image's bytes, and its seek points where it has some."""
    checked, seek = entry.checked, entry.checked.seek
    offset = _add(tar, f"{entry.key}.{entry.ext}", entry.data)
    sample = Sample(
        key=entry.key,
        ext=entry.ext,
        offset=offset,
        size=len(entry.data),
        height=checked.height,
        width=checked.width,
        sha256=hashlib.sha256(entry.data).hexdigest(),
        seek_size=len(seek),
        seek_hash=seek_hash(seek),
        by_pillow=checked.by_pillow,
    )
    if seek:
        at = _add(tar, f"{entry.key}.{_SEEK_EXT}", seek)
        if at != sample.seek_offset:  # a long name has a longer header
            return sample.model_copy(update={"seek_size": 0, "seek_hash": ""})
    return sample


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file under a header without times, owners or machine names; where its bytes begin."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    offset = tar.offset + len(header.tobuf(tarfile.GNU_FORMAT))
    tar.addfile(header, io.BytesIO(data))
    return offset
