"""Which images of a domain were seen, and what became of each: by content, never by name. Files in the storage.

{storage}/domains/{name}/
    known-files.json      files looked at: where, size and version -> sha256 and shorter side; spares reading them again
    waiting.json          sha256 of new images -> when they were first seen
    hold-out/{sha}.png    copies of the images that judge, of all rounds
    rounds/0001/train/{sha}.png   copies of the images that a round added to training
    rounds/0001/round.json        written when the copies are complete: the round is open, its images are decided on
    rounds/0001/done.json         written when it is finished: what was decided
An image's role is decided by its content when it is first seen, and never again.
"""

import hashlib
import json
import re
import time
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from data_prep import storage
from data_prep.image import check
from data_prep.sources import Item, read_item
from pipeline.settings import Settings

HOLD_OUT = "hold-out"
_AT_ONCE = 8
Role = Literal["train", "hold-out"]


class NewImage(Settings):
    """An image whose content was not seen in any round."""

    sha256: str
    item_key: str
    uri: Annotated[str, PlainValidator(str)]  # any bytes, as on a disk, which pydantic's own text may not have
    offset: int | None
    size: int
    ext: str
    role: Role = "train"

    @property
    def item(self) -> Item:
        """Where it arrived."""
        return Item(self.item_key, self.uri, self.size, "", self.offset)


class Round(Settings):
    """One retraining: the images it added and the model version it starts from."""

    number: int
    start: str
    opened: str
    images: tuple[NewImage, ...]


class Ledger:
    """The files of one domain."""

    def __init__(self, storage_uri: str, domain: str) -> None:
        self.uri = storage.join(storage_uri, "domains", domain)
        self.hold_out_uri = storage.join(self.uri, HOLD_OUT)

    def rounds(self) -> list[Round]:
        """Every round that was opened, in order."""
        found = []
        for info in storage.list_files(storage.join(self.uri, "rounds")):
            if re.fullmatch(r"\d+/round\.json", info.path):
                found.append(Round.model_validate(json.loads(storage.read_bytes(info.uri))))
        return sorted(found, key=lambda entry: entry.number)

    def outcome(self, number: int) -> dict[str, Any] | None:
        """What a finished round decided; None where it is not finished."""
        uri = self._place(number, "done.json")
        return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None

    def close(self, number: int, outcome: dict[str, Any]) -> None:
        """Finish a round."""
        storage.write_bytes(self._place(number, "done.json"), json.dumps(outcome, indent=1).encode())

    def train_uri(self, number: int) -> str:
        """The folder of the images that a round added to training."""
        return self._place(number, "train")

    def open(self, round_: Round) -> None:
        """Copy a round's images and write it down; done again after a kill, it copies what is missing."""

        def copy(image: NewImage) -> None:
            folder = self.hold_out_uri if image.role == "hold-out" else self.train_uri(round_.number)
            target = storage.join(folder, f"{image.sha256}.{image.ext}")
            if storage.exists(target):
                return
            data = read_item(image.item)
            if hashlib.sha256(data).hexdigest() != image.sha256:
                raise ValueError(f"{image.uri} changed while it was being read: call again when it is complete")
            storage.write_bytes(target, data)

        self._sweep(round_)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(copy, round_.images))
        written = json.dumps(round_.model_dump(), indent=1)  # escapes bytes of names that are no UTF-8
        storage.write_bytes(self._place(round_.number, "round.json"), written.encode())

    def _sweep(self, round_: Round) -> None:
        """Delete copies that a killed call made for a round that was never opened: roles may be others now."""
        held = {
            image.sha256 for entry in [*self.rounds(), round_] for image in entry.images if image.role == "hold-out"
        }
        trained = {image.sha256 for image in round_.images if image.role == "train"}
        for folder, kept in ((self.hold_out_uri, held), (self.train_uri(round_.number), trained)):
            for info in storage.list_files(folder):
                if info.path.partition(".")[0] not in kept:
                    storage.delete(info.uri)

    def new_images(self, items: Sequence[Item], min_side_px: int) -> tuple[list[NewImage], int]:
        """Images among `items` that no round has, each content once, and how many of them cannot be used."""
        known = self._read("known-files.json")
        seen = {image.sha256 for entry in self.rounds() for image in entry.images}
        fresh = [item for item in items if _name(item) not in known]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            known |= dict(pool.map(lambda item: (_name(item), _examine(item)), fresh))
        if fresh:
            storage.write_bytes(storage.join(self.uri, "known-files.json"), json.dumps(known).encode())
        found: dict[str, NewImage] = {}
        unusable = 0
        for item in items:
            sha256, side_px = known[_name(item)]
            unusable += side_px < min_side_px
            if side_px >= min_side_px and sha256 not in seen:
                found.setdefault(sha256, _new_image(item, sha256))
        return [found[sha] for sha in sorted(found)], unusable

    def waited_s(self, images: Sequence[NewImage]) -> float:
        """How long the oldest of the new images has been waiting, in seconds; remembers when each was first seen."""
        before = self._read("waiting.json")
        now = {image.sha256: before.get(image.sha256, time.time()) for image in images}
        if now != before:
            storage.write_bytes(storage.join(self.uri, "waiting.json"), json.dumps(now).encode())
        return time.time() - min(now.values(), default=time.time())

    def _read(self, name: str) -> dict[str, Any]:
        uri = storage.join(self.uri, name)
        return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else {}

    def _place(self, number: int, name: str) -> str:
        return storage.join(self.uri, "rounds", f"{number:04}", name)


def with_roles(images: Sequence[NewImage], share: float, missing: int, judging: Container[str] = ()) -> list[NewImage]:
    """Images with their roles: held out by their content's hash, and at least `missing` of them.

    judging: sha256 of images that other domains or benchmarks judge by: they are held out here as well.
    """
    ordered = sorted(images, key=lambda image: image.sha256)
    held = {image.sha256 for image in ordered if image.sha256 in judging}
    held |= {image.sha256 for image in ordered if int(image.sha256[:13], 16) / 16**13 < share}
    held |= {image.sha256 for image in ordered[: max(0, missing)]}
    return [image.model_copy(update={"role": "hold-out" if image.sha256 in held else "train"}) for image in ordered]


def _name(item: Item) -> str:
    return json.dumps([item.uri, item.offset, item.size, item.version])


def _examine(item: Item) -> tuple[str, int]:
    """The sha256 of an image's bytes and its shorter side in pixels, 0 where it does not decode."""
    if item.flaw:
        return "", 0
    data = read_item(item)
    try:
        side_px = min(check(data)[:2])
    except ValueError:
        side_px = 0
    return hashlib.sha256(data).hexdigest(), side_px


def _new_image(item: Item, sha256: str) -> NewImage:
    return NewImage(sha256=sha256, item_key=item.key, uri=item.uri, offset=item.offset, size=item.size, ext=item.ext)
