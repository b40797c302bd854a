"""Several sets of shards served as one by shares: new images beside a replay of old ones.

A mix is a small file, `mix.json`, that names its sets; nothing is copied. Whatever reads shards takes its folder.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.index import Sample, Shard, ShardSet, read_shard_set
from data_prep.order import MixedOrder, SampleOrder
from data_prep.pairs import PairSettings
from data_prep.storage import StorageError, exists, is_local, join, read_bytes

MIX_NAME = "mix.json"


class MixPart(BaseModel):
    """Sets that are served as one, and the share of all samples that comes from them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sets: tuple[str, ...] = Field(min_length=1, description="folders of sets: URIs, or paths two levels above the mix")
    share: float = Field(gt=0, description="relative to the other parts' shares")


class Mix(BaseModel):
    """`mix.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    parts: tuple[MixPart, ...] = Field(min_length=1)


class MixedSet(ShardSet):
    """The sets of a mix as one: their shards end to end, part by part."""

    def __init__(self, uri: str, parts: Sequence[Sequence[ShardSet]], shares: Sequence[float]) -> None:
        super().__init__(uri, parts[0][0].index)
        self.parts = tuple(tuple(part) for part in parts)
        self.shares = tuple(shares)
        self._places = [(found, number) for part in parts for found in part for number in range(len(found.shards))]
        self._shards = tuple(found.shards[number] for found, number in self._places)

    def __reduce__(self) -> tuple[type["MixedSet"], tuple[object, ...]]:  # type: ignore[override]
        return MixedSet, (self.uri, self.parts, self.shares)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of all sets, in order."""
        return self._shards

    @property
    def num_samples(self) -> int:
        """Samples in all sets."""
        return sum(found.num_samples for part in self.parts for found in part)

    def tar_uri(self, shard: int) -> str:
        """Where the shard's tar lies."""
        found, number = self._places[shard]
        return found.tar_uri(number)

    def _samples(self, shard: int) -> Sequence[Sample]:
        found, number = self._places[shard]
        return found._samples(number)  # kept here alone


def read_set(uri: str) -> ShardSet:
    """The set of shards or the mix at `uri`. Raises StorageError where there is neither, or a set of it is gone."""
    mix_uri = join(uri, MIX_NAME)
    if not exists(mix_uri):
        return read_shard_set(uri)
    try:
        mix = Mix.model_validate_json(read_bytes(mix_uri))
    except ValidationError as error:
        raise StorageError(f"{mix_uri}: it is no mix ({error.errors()[0]['msg']}); make it anew") from error
    root = join(uri).rsplit("/", 2)[0]
    parts = [[read_shard_set(_place(root, name)) for name in part.sets] for part in mix.parts]
    elsewhere = [found.uri for part in parts for found in part if is_local(found.uri) != is_local(uri)]
    if elsewhere:
        raise StorageError(f"{mix_uri}: {elsewhere[0]} lies in another kind of storage; copy it beside the mix")
    return MixedSet(uri, parts, [part.share for part in mix.parts])


def _place(root: str, name: str) -> str:
    return name if "://" in name or name.startswith("/") else join(root, name)


def order_of(shard_set: ShardSet, settings: PairSettings) -> SampleOrder | MixedOrder:
    """The order in which a set's samples are served."""

    def order(shards: Sequence[Shard]) -> SampleOrder:
        counts = [shard.count for shard in shards]
        return SampleOrder(counts, settings.seed, settings.num_streams, settings.shuffle_block)

    if not isinstance(shard_set, MixedSet):
        return order(shard_set.shards)
    parts = [[shard for found in part for shard in found.shards] for part in shard_set.parts]
    starts = [sum(len(part) for part in parts[:number]) for number in range(len(parts))]
    return MixedOrder([order(part) for part in parts], shard_set.shares, starts, settings.seed)
