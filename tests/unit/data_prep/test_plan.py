"""Plans and duplicates: the same whatever the order and number of workers, on disk for millions."""

import dataclasses
import hashlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import duplicates, storage
from data_prep.duplicates import find_duplicates
from data_prep.plan import Plan, plan_shards
from data_prep.shard import ShardSettings, make_shards
from data_prep.sources import Item, fingerprint, list_items
from data_prep.storage import join
from tests.unit.data_prep.odd_files import encoded, photograph

SETTINGS = ShardSettings(samples_per_shard=7, seed=3)


def items(count):
    return [Item(f"key-{number}%2Epng", f"/data/{number}.png", number, "1") for number in range(count)]


def test_a_plan_on_disk_is_the_plan_in_memory():
    with Plan(iter(items(300)), SETTINGS) as plan:
        assert list(plan.shards()) == plan_shards(items(300), SETTINGS)
        assert plan.num_items == 300
        assert plan.fingerprint == fingerprint(items(300))


def test_a_plan_does_not_depend_on_the_order_of_the_listing():
    shuffled = items(300)
    random.Random(1).shuffle(shuffled)
    with Plan(shuffled, SETTINGS) as plan:
        assert list(plan.shards()) == plan_shards(items(300), SETTINGS)


def test_items_left_out_are_not_in_the_plan():
    dropped = {item.key: "x" for item in items(30)[::3]}
    kept = [item for item in items(30) if item.key not in dropped]
    with Plan(items(30), SETTINGS) as plan:
        assert list(plan.shards(dropped)) == plan_shards(kept, SETTINGS)


def test_two_images_with_one_key_are_refused():
    twice = [*items(5), dataclasses.replace(items(5)[2], uri="/elsewhere/2.png")]
    with Plan(twice, SETTINGS) as plan, pytest.raises(ValueError, match=r"two images have the key key-2%2Epng"):
        list(plan.items())


def test_a_path_that_is_in_a_tar_twice_is_placed(tmp_path):
    tar = str(tmp_path / "t.tar")
    twice = [Item("a%2Epng", tar, 5, f"1@{offset}", offset) for offset in (512, 1536)]
    with Plan(twice, SETTINGS) as plan, pytest.raises(ValueError, match="make it anew without the other") as caught:
        list(plan.items())
    assert f"two images have the key a%2Epng: byte 1536 of {tar} and byte 512 of {tar}; " in str(caught.value)


def test_a_plan_leaves_no_files(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Plan(items(5), SETTINGS):
        assert list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        Plan((1 // 0 for _ in range(3)), SETTINGS)
    assert not list(tmp_path.iterdir())
    (tmp_path / "hatchery-plan-999999999-killed").mkdir()
    with Plan(items(5), SETTINGS):
        assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def source(tmp_path):
    """Four photographs; one of them three times; a file as long as another one with one other byte at its end."""
    folder = tmp_path / "source"
    for number in range(4):
        data = encoded(photograph(seed=number), quality=97)
        storage.write_bytes(str(folder / f"{number}.JPEG"), data)
        if number == 2:
            storage.write_bytes(str(folder / "deeper" / "again.JPEG"), data)
            storage.write_bytes(str(folder / "1 copy.JPEG"), data)
        if number == 3:
            storage.write_bytes(str(folder / "3 longer.JPEG"), data + b"a" * 9000)
            storage.write_bytes(str(folder / "3 other.JPEG"), data + b"a" * 8999 + b"b")
    return str(folder)


def test_equal_files_are_dropped_counted_and_listed(source, tmp_path, ray_local):
    made = make_shards(source, str(tmp_path / "set"), SETTINGS)
    assert (made.index.num_images, made.num_samples, made.index.num_duplicates) == (8, 6, 2)
    kept = {sample.key for number in range(len(made.shards)) for sample in made.samples(number)}
    assert "1%20copy%2EJPEG" in kept  # the smallest key of the three
    listed = storage.read_bytes(join(made.uri, "left-out.jsonl")).decode().splitlines()
    assert listed == [
        '{"key": "2%2EJPEG", "reason": "the same bytes as 1%20copy%2EJPEG"}',
        '{"key": "deeper/again%2EJPEG", "reason": "the same bytes as 1%20copy%2EJPEG"}',
    ]
    every = make_shards(source, str(tmp_path / "all"), SETTINGS.model_copy(update={"drop_duplicates": False}))
    assert (every.num_samples, every.index.num_duplicates) == (8, 0)


def test_what_differs_only_outside_the_probe_is_not_dropped(source, ray_local):
    with Plan(list_items(source), SETTINGS) as plan:
        assert sorted(find_duplicates(plan)) == ["2%2EJPEG", "deeper/again%2EJPEG"]
    same = [item for item in list_items(source) if item.key.startswith("3%20")]
    assert len(set(duplicates.probe(same))) == 1


def test_a_run_that_goes_on_does_not_look_again(source, tmp_path, ray_local, monkeypatch):
    destination = str(tmp_path / "set")
    with Plan(list_items(source), SETTINGS) as plan:
        known = {"source_fingerprint": plan.fingerprint, "duplicates": {"3%2EJPEG": "0%2EJPEG"}}
    storage.write_bytes(join(destination, "duplicates.json"), str(known).replace("'", '"').encode())
    made = make_shards(source, destination, SETTINGS)
    assert made.index.num_duplicates == 1
    assert not storage.exists(join(destination, "duplicates.json"))


@pytest.mark.parametrize("values", [[], [1], [1, 2, 1, 3, 1, 3], [5, 5]])
def test_twins(values):
    expected = [values.count(value) > 1 for value in values]
    assert duplicates._has_twin(np.array(values, np.uint64)).tolist() == expected


def test_shards_do_not_depend_on_where_the_source_lies(source, tmp_path, ray_local):
    """The same files elsewhere, listed by a text file in another order: the same tars."""
    copy = Path(shutil.copytree(source, tmp_path / "elsewhere" / "source"))
    first = make_shards(source, str(tmp_path / "a"), SETTINGS)
    second = make_shards(str(copy), str(tmp_path / "b"), SETTINGS)
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    tar = storage.read_bytes(first.tar_uri(0))
    assert hashlib.sha256(tar).hexdigest() == first.shards[0].sha256
