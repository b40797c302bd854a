"""What a set of shards holds: one `index.json` for the set, one sidecar `shard-000000.json` beside each tar.

The index is small and published last: where it is, the set is complete. The sidecars list the samples.
"""

import functools
import hashlib
import itertools
import json
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.image_files import MAX_PIXELS
from data_prep.storage import DamageError, StorageError, exists, join, normalise, read_bytes, write_bytes, writing
from data_prep.uri import printable

INDEX_NAME = "index.json"
LEFT_OUT_NAME = "left-out.jsonl"
_EARLIER = re.compile(r"(^|/)(index-\d{6}\.json|left-out-\d{6}\.jsonl)$")
_LISTED_REJECTS = 1000
_CACHED_SIDECARS = 128  # more than the streams that one reader of all reads at once


def _is_empty(value: object) -> bool:
    return not value


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardSettings(_Record):
    """How images become shards; all but `max_reject_share` decide the shards' content."""

    @model_validator(mode="after")
    def _steps_fit(self) -> "ShardSettings":
        if self.sub_image_px is not None and self.sub_image_step_px > self.sub_image_px:
            raise ValueError(
                f"sub_image_step_px={self.sub_image_step_px} is above sub_image_px={self.sub_image_px}: pixels between "
                f"the sub-images would be lost; choose a smaller step"
            )
        return self

    def content(self) -> dict[str, object]:
        """What decides the shards' content; without `max_pixels` as it was before there was a choice."""
        usual = {"max_pixels"} if self.max_pixels == MAX_PIXELS else set()
        return self.model_dump(exclude={"max_reject_share"} | usual)

    samples_per_shard: int = Field(512, ge=1, description="images per tar, the last one may hold fewer")
    seed: int = Field(0, ge=0, description="decides which images share a shard, and their order in it")
    min_side_px: int = Field(64, ge=1, description="an image with a shorter side, in pixels, is rejected")
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS, description="an image of more pixels is rejected")
    drop_duplicates: bool = Field(True, description="of files with the same bytes keep the one with the smallest key")
    sub_image_px: int | None = Field(
        None, ge=1, description="cut images into PNG crops of this side, in pixels; null keeps the files as they are"
    )
    sub_image_step_px: int = Field(240, ge=1, description="pixels from one such crop to the next")
    max_reject_share: float = Field(0.01, ge=0, le=1, description="more rejects than this share is an error")


def seek_hash(seek: bytes) -> str:
    """What a sidecar holds of a sample's seek points: 16 hexadecimal digits of their sha256; nothing of none."""
    return hashlib.sha256(seek).hexdigest()[:16] if seek else ""


class Sample(_Record):
    """One image in a tar: `size` bytes at `offset`, decoding to `height` x `width` pixels.

    `seek_size` bytes of seek points (see `jpeg`) are the tar's next member, `key`.seek; 0 where there are none. Where
    their `seek_hash` is missing, as in older sidecars, their own checksum alone is asked. `by_pillow`: the region
    decoder gave other pixels than Pillow, and is not asked.
    """

    key: str
    ext: str
    offset: int
    size: int
    height: int
    width: int
    sha256: str
    seek_size: int = 0
    seek_hash: str = Field("", exclude_if=_is_empty)
    by_pillow: bool = Field(False, exclude_if=_is_empty)

    @property
    def seek_offset(self) -> int:
        """Where the seek points begin: behind the image's last block of 512 bytes and the next member's header."""
        return self.offset + -(-self.size // 512) * 512 + 512

    @property
    def side_px(self) -> int:
        """The shorter side."""
        return min(self.height, self.width)


class Samples(Sequence[Sample]):
    """The samples of a shard in columns: records take eight times the memory, and a node's readers hold hundreds."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._count = len(samples)
        self._columns = {name: _column([getattr(sample, name) for sample in samples]) for name in Sample.model_fields}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(self._count))]
        index = range(self._count)[number]
        return Sample.model_construct(**{name: column[index] for name, column in self._columns.items()})


class _Same(Sequence[Any]):
    """One value, as often as there are samples."""

    def __init__(self, value: Any, count: int) -> None:
        self._value, self._count = value, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """The value, at any place."""
        return self._value


class _Texts(Sequence[str]):
    """Strings as one: a string of its own takes 50 bytes more."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._joined = "".join(texts).encode()
        self._ends = array("L", itertools.accumulate(len(text.encode()) for text in texts))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._joined[self._ends[index - 1] if index else 0 : self._ends[index]].decode()


def _column(values: list[Any]) -> Sequence[Any]:
    """A field of all samples."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return array("q", values)
    if kinds <= {str, bool} and len(set(values)) == 1:
        return _Same(values[0], len(values))
    return _Texts(values) if kinds == {str} else values


class Reject(_Record):
    """One image that was left out, and why."""

    key: str
    uri: str
    reason: str


class ShardInfo(_Record):
    """A sidecar: the marker that its tar is complete, and what is in it. `plan` is the digest of what was asked.

    `num_of_several` images were the first of several pictures in their files. `marks` are those of its images (see
    `plan.mark`), by key.
    """

    name: str
    plan: str
    bytes: int
    sha256: str
    num_images: int
    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...]
    num_of_several: int = Field(0, exclude_if=_is_empty)  # as it was before where there is none
    marks: str = Field("", exclude_if=_is_empty)


class Shard(_Record):
    """A shard's line in the index; `min_side_px` is the shortest side of any of its images.

    `removed` samples of the sidecar, by number, no longer belong to the set, nor to `count` (see `grow`).
    """

    name: str
    count: int
    bytes: int
    sha256: str
    sidecar_sha256: str
    min_side_px: int
    removed: tuple[int, ...] = Field((), exclude_if=_is_empty)


class Summary(_Record):
    """What the set needs to know of one finished shard; `shard` is None where every image was rejected."""

    shard: Shard | None
    num_images: int
    rejects: tuple[Reject, ...]
    num_of_several: int = 0


class ShardIndex(_Record):
    """`index.json`; `source_fingerprint` and `settings` say what it was made from.

    `num_images` counts the source's images, of which `num_rejects` were rejected and `num_duplicates` dropped. The
    first of the rejects are here, all of them and the duplicates in `left-out.jsonl`, whose hash is
    `left_out_sha256`: millions of images have many. A set that grew says how often, and which number its next new shard
    would have.
    """

    format: Literal[2] = 2
    source: str
    source_fingerprint: str
    settings: ShardSettings
    num_images: int
    num_samples: int
    num_bytes: int
    num_rejects: int
    num_duplicates: int
    left_out_sha256: str
    shards: tuple[Shard, ...]
    rejects: tuple[Reject, ...]
    num_of_several: int = Field(0, exclude_if=_is_empty)
    generation: int = Field(0, exclude_if=_is_empty)
    next_shard: int = Field(0, exclude_if=_is_empty)


class ShardSet:
    """A complete set of shards at `uri`."""

    def __init__(self, uri: str, index: ShardIndex) -> None:
        self.uri = normalise(uri)
        self.index = index
        self.remember(_CACHED_SIDECARS)

    def __reduce__(self) -> tuple[type["ShardSet"], tuple[str, ShardIndex]]:
        return ShardSet, (self.uri, self.index)

    def remember(self, num_shards: int) -> None:
        """Keep the samples' lists of so many shards, those that were asked for last."""
        self.samples = functools.lru_cache(maxsize=num_shards)(self._samples)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards in order."""
        return self.index.shards

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return self.index.num_samples

    @property
    def digest(self) -> str:
        """sha256 of the content alone: wherever and whenever equal shards are made, it is equal."""
        told = (f"{shard.sha256} without {shard.removed}" if shard.removed else shard.sha256 for shard in self.shards)
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def tar_uri(self, shard: int) -> str:
        """Where the shard's tar lies."""
        return join(self.uri, f"{self.shards[shard].name}.tar")

    def sidecar(self, shard: int) -> ShardInfo:
        """What is known of a shard's images, also of those that were taken off the index.

        Raises StorageError where it cannot be read, DamageError where it is not the one that the index names.
        """
        entry = self.shards[shard]
        uri = join(self.uri, f"{entry.name}.json")
        data = read_bytes(uri)
        if hashlib.sha256(data).hexdigest() != entry.sidecar_sha256:
            raise DamageError(f"{uri}: it is not the sidecar that {INDEX_NAME} names; make the shards anew")
        return ShardInfo.model_validate_json(data)

    def _samples(self, shard: int) -> Sequence[Sample]:
        """The samples of one shard, in the tar's order. Raises StorageError where the sidecar is not the index's."""
        samples, removed = self.sidecar(shard).samples, set(self.shards[shard].removed)
        return Samples([sample for number, sample in enumerate(samples) if number not in removed])


def earlier(name: str, generation: int) -> str:
    """What a file of a set is called once the set has grown."""
    stem, _, ext = name.rpartition(".")
    return f"{stem}-{generation:06d}.{ext}"


def is_earlier(path: str) -> bool:
    """Whether a path or URI is that of a set's file of before it grew."""
    return _EARLIER.search(path) is not None


def read_shard_set(uri: str) -> ShardSet:
    """The set of shards at `uri`, or of an index of before it grew: `uri`/index-000000.json.

    Raises StorageError where there is none, or another program's.
    """
    index_uri = uri if is_earlier(uri) else join(uri, INDEX_NAME)
    uri = _EARLIER.sub("", uri)
    if not exists(index_uri):
        raise StorageError(f"{index_uri}: there is no complete set of shards; make it with `hatchery shards make`")
    try:
        return ShardSet(uri, ShardIndex.model_validate_json(read_bytes(index_uri)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(f"{index_uri}: {where}: {first['msg']}; make the shards anew") from error


def publish_index(
    uri: str,
    source: str,
    fingerprint: str,
    settings: ShardSettings,
    summaries: Iterable[Summary],
    duplicates: Mapping[str, str] | None = None,
    generation: int = 0,
    next_shard: int = 0,
) -> ShardSet:
    """Write `left-out.jsonl` and, last, `index.json` over finished shards, whose summaries are consumed in order.

    Shards without samples are left out, their rejects are kept. `duplicates` are dropped keys and the keys kept for
    them.
    """
    shards, rejects = list[Shard](), list[Reject]()
    num_images, num_rejects, num_of_several, digest = 0, 0, 0, hashlib.sha256()
    with tempfile.TemporaryFile() as spool:

        def leave_out(**line: str) -> None:
            data = json.dumps(line).encode() + b"\n"
            digest.update(data)
            spool.write(data)

        for summary in summaries:
            num_images += summary.num_images
            num_rejects += len(summary.rejects)
            num_of_several += summary.num_of_several
            shards.extend([summary.shard] if summary.shard else [])
            rejects.extend(summary.rejects[: _LISTED_REJECTS - len(rejects)])
            for reject in summary.rejects:
                leave_out(**reject.model_dump())
        for key, kept in sorted((duplicates or {}).items()):
            leave_out(key=key, reason=f"the same bytes as {kept}")
        spool.seek(0)
        with writing(join(uri, LEFT_OUT_NAME)) as file:
            shutil.copyfileobj(spool, file)
    index = ShardIndex(
        source=printable(source),
        source_fingerprint=fingerprint,
        settings=settings,
        num_images=num_images + len(duplicates or {}),
        num_samples=sum(shard.count for shard in shards),
        num_bytes=sum(shard.bytes for shard in shards),
        num_rejects=num_rejects,
        num_duplicates=len(duplicates or {}),
        left_out_sha256=digest.hexdigest(),
        shards=tuple(shards),
        rejects=tuple(rejects),
        num_of_several=num_of_several,
        generation=generation,
        next_shard=next_shard,
    )
    write_bytes(join(uri, INDEX_NAME), to_json(index))
    return ShardSet(uri, index)


def summarise(info: ShardInfo) -> Summary:
    """A shard's lines in the index."""
    shard = Shard(
        name=info.name,
        count=len(info.samples),
        bytes=info.bytes,
        sha256=info.sha256,
        sidecar_sha256=hashlib.sha256(to_json(info)).hexdigest(),
        min_side_px=min((sample.side_px for sample in info.samples), default=0),
    )
    return Summary(
        shard=shard if info.samples else None,
        num_images=info.num_images,
        rejects=info.rejects,
        num_of_several=info.num_of_several,
    )


def to_json(record: BaseModel) -> bytes:
    """The one spelling in which records are stored and hashed."""
    return record.model_dump_json(indent=1).encode()
