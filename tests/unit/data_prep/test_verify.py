"""`verify` finds what was altered, and where; `describe` tells what is there."""

import pytest

from data_prep import storage
from data_prep.index import publish_index, read_shard_set, summarise
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.sources import list_items
from data_prep.storage import StorageError, join
from data_prep.verify import describe, verify
from tests.unit.data_prep.odd_files import encoded, photograph


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def made(request, tmp_path):
    """Seven photographs in three shards."""
    for number in range(7):
        storage.write_bytes(str(tmp_path / "source" / f"{number}.JPEG"), encoded(photograph(seed=number)))
    s3 = request.param == "s3"
    uri = join(request.getfixturevalue("s3").uri, tmp_path.name) if s3 else str(tmp_path / "set")
    settings = ShardSettings(samples_per_shard=3)
    plans = plan_shards(list_items(str(tmp_path / "source")), settings)
    return publish_index(uri, "source", "0", settings, [summarise(write_shard(plan, uri)) for plan in plans])


def change(uri, at, by=1):
    data = bytearray(storage.read_bytes(uri))
    data[at] ^= by
    storage.write_bytes(uri, bytes(data))


def test_a_sound_set(made):
    steps = []
    report = verify(made.uri, lambda done, total: steps.append((done, total)))
    assert report.is_sound
    assert (report.num_shards, report.num_samples, report.num_bytes) == (3, 7, sum(s.bytes for s in made.shards))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_every_kind_of_damage_is_named(made):
    sample = made.samples(1)[2]
    change(made.tar_uri(1), sample.offset + 9)
    change(made.tar_uri(2), made.shards[2].bytes - 1)  # padding: no sample's byte
    cut = storage.read_bytes(made.tar_uri(0))[:-5]
    storage.write_bytes(made.tar_uri(0), cut)
    storage.write_bytes(join(made.uri, "left-out.jsonl"), b"x")
    storage.write_bytes(join(made.uri, "shard-000007.tar"), b"stray")
    problems = verify(made.uri).problems
    assert problems == (
        f"{made.tar_uri(0)}: it has {len(cut)} bytes, the index says {made.shards[0].bytes}",
        f"{made.tar_uri(1)}: sample {sample.key} is not the one that was written",
        f"{made.tar_uri(1)}: its sha256 is not the index's",
        f"{made.tar_uri(2)}: its sha256 is not the index's",
        f"{join(made.uri, 'left-out.jsonl')}: its sha256 is not the index's",
        f"{join(made.uri, 'shard-000007.tar')}: it is not in the index; a reader of *.tar would take it for part of "
        "the set",
    )


def test_missing_and_altered_files_are_named(made):
    storage.delete(made.tar_uri(0))
    change(join(made.uri, "shard-000001.json"), 20)
    storage.delete(join(made.uri, "left-out.jsonl"))
    found = verify(made.uri)
    assert not found.is_sound
    assert [problem.split(": ")[0].rpartition("/")[2] for problem in found.problems] == [
        "shard-000000.tar",
        "shard-000001.json",
        "left-out.jsonl",
    ]


def test_describe(made):
    rows = describe(made.uri)
    assert [row.name for row in rows] == ["shard-000000", "shard-000001", "shard-000002"]
    assert [row.num_samples for row in rows] == [3, 3, 1]
    assert all(row.min_side_px == 96 for row in rows)
    assert rows[0].sha256 == read_shard_set(made.uri).shards[0].sha256


def test_no_set_is_an_error(tmp_path):
    for function in (verify, describe):
        with pytest.raises(StorageError, match="there is no complete set of shards"):
            function(str(tmp_path))
