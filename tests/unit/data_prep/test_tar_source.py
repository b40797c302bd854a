"""Tars as sources: ImageNet's tar of class tars read in place, on a disk and in an object store."""

import tarfile
from urllib.parse import unquote

import pytest

from data_prep import storage
from data_prep.index import summarise
from data_prep.shard import ShardSettings, make_shards, plan_shards, write_shard
from data_prep.sources import list_items, read_item
from data_prep.storage import DamageError, StorageError, join
from data_prep.tar_source import iter_members
from tests.faulty_proxy import Faults, faulty_proxy
from tests.unit.data_prep.odd_files import encoded, photograph, tar_of

CLASSES = {f"n0{number}": [f"n0{number}_{image}.JPEG" for image in range(3)] for number in range(3)}


@pytest.fixture(scope="module")
def images():
    """path -> bytes of nine photographs in three classes, one with a name that needs a long header."""
    made = {
        f"{name}/{file}": encoded(photograph(seed=3 * row + column))
        for row, (name, files) in enumerate(CLASSES.items())
        for column, file in enumerate(files)
    }
    made["n02/" + "long" * 40 + ".JPEG"] = made.pop("n02/n02_2.JPEG")
    return made


@pytest.fixture(scope="module")
def nested(images):
    """The bytes of a tar of class tars, and a text file that is no image."""
    classes = {}
    for path, data in images.items():
        folder, name = path.split("/")
        classes.setdefault(folder, {})[name] = data
    return tar_of({f"{name}.tar": tar_of(files) for name, files in classes.items()} | {"README.txt": b"hello"})


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else join(request.getfixturevalue("s3").uri, tmp_path.name)


def test_a_tar_of_class_tars_is_read_in_place(root, nested, images):
    uri = join(root, "ILSVRC2012_img_train.tar")
    storage.write_bytes(uri, nested)
    items = list_items(uri)
    assert {unquote(item.key): read_item(item) for item in items} == images
    assert {item.uri for item in items} == {uri}
    assert items == list_items(uri)
    assert [unquote(item.key) for item in list_items(uri, include=["n01/*"])] == [f"n01/{n}" for n in CLASSES["n01"]]


def test_a_plain_tar_of_images(root, images):
    uri = join(root, "flat.tar")
    storage.write_bytes(uri, tar_of({f"./{path}": data for path, data in images.items()}))
    assert {unquote(item.key): read_item(item) for item in list_items(uri)} == images


def test_shards_from_the_tar_hold_the_same_as_from_a_folder(nested, images, tmp_path):
    (tmp_path / "train.tar").write_bytes(nested)
    for path, data in images.items():
        storage.write_bytes(str(tmp_path / "folder" / path), data)
    settings = ShardSettings(samples_per_shard=4)
    digests = []
    for source in ("train.tar", "folder"):
        plans = plan_shards(list_items(str(tmp_path / source)), settings)
        made = [summarise(write_shard(plan, str(tmp_path / f"from-{source}"))) for plan in plans]
        digests.append([summary.shard.sha256 for summary in made])
    assert digests[0] == digests[1]


def test_a_changed_tar_is_another_source(nested, tmp_path, ray_local):
    (tmp_path / "train.tar").write_bytes(nested)
    destination = str(tmp_path / "set")
    first = make_shards(str(tmp_path / "train.tar"), destination, ShardSettings())
    (tmp_path / "train.tar").write_bytes(nested + bytes(10240))
    second = make_shards(str(tmp_path / "train.tar"), destination, ShardSettings())
    assert first.digest == second.digest
    assert first.index.source_fingerprint != second.index.source_fingerprint


@pytest.mark.parametrize(("cut", "name"), [(700, "n00.tar"), (40_000, "train.tar")])
def test_a_cut_tar_is_named(nested, tmp_path, cut, name):
    (tmp_path / "train.tar").write_bytes(nested[:cut])
    with pytest.raises(DamageError, match=r"train.tar.*: it is no sound, uncompressed tar \(.*cut off"):
        list(iter_members(str(tmp_path / "train.tar")))


def test_a_compressed_tar_is_explained(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w:gz") as tar:
        tar.add(__file__, "x.png")
    with pytest.raises(DamageError, match=r"train.tar: it is no sound, uncompressed tar"):
        list_items(str(tmp_path / "train.tar"))


@pytest.mark.integration
def test_a_tar_whose_server_breaks_off_is_listed_or_named(nested, images, s3, tmp_path, monkeypatch):
    uri = join(s3.uri, tmp_path.name, "train.tar")
    storage.write_bytes(uri, nested)
    with faulty_proxy(s3.endpoint, Faults(0.2, seed=1)):
        assert len(list_items(uri)) == len(images)
    monkeypatch.setattr("data_prep.s3._READ_ATTEMPTS", 2)
    with faulty_proxy(s3.endpoint, Faults(1.0)), pytest.raises(StorageError, match=f"^{uri}: ") as caught:
        list_items(uri)
    assert not isinstance(caught.value, DamageError)


def test_a_missing_tar_is_named(tmp_path):
    with pytest.raises(DamageError, match=r"gone.tar: it does not exist"):
        list_items(str(tmp_path / "gone.tar"))
