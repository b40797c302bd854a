"""Shards: byte-equal on every machine, checked, resumable, readable by the WebDataset library."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from urllib.parse import unquote

import pytest
import webdataset
from PIL import Image

from data_prep import storage
from data_prep.grow import Growth
from data_prep.image import decode
from data_prep.index import ShardInfo, ShardSet, publish_index, read_shard_set, summarise, to_json
from data_prep.plan import Plan
from data_prep.shard import ShardSettings, complete_shard, make_shards, plan_shards, write_shard
from data_prep.shard_cache import ShardReader
from data_prep.sources import Item, list_items, read_item
from data_prep.storage import StorageError, join
from data_prep.tasks import in_order
from data_prep.verify import verify
from tests.photographs import write_photographs
from tests.shared_data import ROOT
from tests.unit.data_prep.odd_files import bad_files, encoded, good_files, photograph

SETTINGS = ShardSettings(samples_per_shard=5, seed=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """18 photographs, in folders."""
    folder = tmp_path_factory.mktemp("source")
    write_photographs(folder, 18)
    return str(folder)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory, ray_local):
    return make_shards(source, str(tmp_path_factory.mktemp("made")), SETTINGS)


def items(count):
    return [Item(f"key-{number}", f"/data/{number}.png", number, "1") for number in range(count)]


def test_a_plan_takes_every_item_once_whatever_order_they_come_in():
    plans = plan_shards(items(23), SETTINGS)
    assert [len(plan.items) for plan in plans] == [5, 5, 5, 5, 3]
    assert {item for plan in plans for item in plan.items} == set(items(23))
    assert plan_shards(items(23)[::-1], SETTINGS) == plans
    assert [item for plan in plans for item in plan.items] != items(23)
    assert plan_shards(items(23), SETTINGS.model_copy(update={"seed": 4})) != plans


def test_a_plans_digest_follows_what_decides_its_content():
    plan = plan_shards(items(3), SETTINGS)[0]
    changed = dataclasses.replace(plan.items[0], version="2")
    assert dataclasses.replace(plan, items=(changed, *plan.items[1:])).digest != plan.digest
    assert dataclasses.replace(plan, settings=SETTINGS.model_copy(update={"min_side_px": 65})).digest != plan.digest
    assert plan_shards(items(3), SETTINGS.model_copy(update={"max_reject_share": 1.0}))[0].digest == plan.digest


def test_tars_hold_the_original_bytes_where_the_index_says(made, source):
    assert made.num_samples == 18
    seen = set()
    for number, shard in enumerate(made.shards):
        tar = storage.read_bytes(made.tar_uri(number))
        assert hashlib.sha256(tar).hexdigest() == shard.sha256
        assert len(tar) == shard.bytes
        for sample in made.samples(number):
            data = tar[sample.offset : sample.offset + sample.size]
            assert data == storage.read_bytes(join(source, unquote(sample.key)))
            assert decode(data).shape[:2] == (sample.height, sample.width)
            seen.add(sample.key)
    assert len(seen) == 18


def test_headers_name_no_machine_time_or_owner(made):
    with tarfile.open(made.tar_uri(0)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_the_webdataset_library_reads_every_sample(made):
    tars = [made.tar_uri(number) for number in range(len(made.shards))]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("pil")]
    assert keys == [sample.key for number in range(len(made.shards)) for sample in made.samples(number)]


def test_shards_made_elsewhere_are_byte_equal(made, source, tmp_path, ray_local):
    again = make_shards(source, str(tmp_path), SETTINGS)
    assert again.digest == made.digest
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in made.shards]
    assert read_shard_set(str(tmp_path)).index == again.index


def test_a_finished_set_is_left_alone_and_a_changed_source_is_not(source, tmp_path, ray_local):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    destination, steps = str(tmp_path / "set"), []
    first = make_shards(str(copy), destination, SETTINGS, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = storage.list_files(destination)
    assert make_shards(str(copy), destination, SETTINGS).digest == first.digest
    assert storage.list_files(destination) == before

    next(copy.rglob("*.JPEG")).unlink()
    second = make_shards(str(copy), destination, SETTINGS)
    assert second.num_samples == 17
    assert second.digest != first.digest


def test_a_stopped_run_keeps_finished_shards_and_drops_those_of_another_plan(made, source, tmp_path, ray_local):
    destination = str(tmp_path)
    plans = plan_shards(list_items(source), SETTINGS)
    write_shard(plans[1], destination)
    write_shard(plans[2], destination)
    storage.delete(join(destination, "shard-000002.tar"))  # a sidecar alone is not a shard
    write_shard(dataclasses.replace(plans[0], name="shard-000009"), destination)
    storage.write_bytes(join(destination, "shard-000003.json"), b"{}")
    kept = next(info for info in storage.list_files(destination) if info.path == "shard-000001.tar")
    made_steps = []
    result = make_shards(source, destination, SETTINGS, progress=lambda done, total: made_steps.append(done))
    assert made_steps == [1, 2, 3, 4]
    assert result.digest == made.digest
    listed = storage.list_files(destination)
    assert kept in listed
    names = [f"shard-00000{number}.{ext}" for number in range(4) for ext in ("json", "tar")]
    assert sorted(info.path for info in listed) == sorted(["index.json", "left-out.jsonl", *names])


@pytest.fixture
def damaged(source, tmp_path):
    """Two good images, one cut short, one no image, one tiny."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    good = list_items(source)
    for number, item in enumerate(good[:2]):
        (folder / f"good{number}.jpg").write_bytes(storage.read_bytes(item.uri))
    (folder / "cut.jpg").write_bytes(storage.read_bytes(good[2].uri)[:5000])
    (folder / "text.png").write_bytes(b"this is no image")
    Image.new("RGB", (80, 40)).save(folder / "tiny.png")
    return str(folder)


def test_too_many_rejects_stop_with_count_share_and_reasons(damaged, tmp_path, ray_local):
    with pytest.raises(ValueError, match=r"3 of 5 images \(60.0%\) were rejected, max_reject_share is 1.0%") as caught:
        make_shards(damaged, str(tmp_path / "set"), SETTINGS)
    for part in ("cut%2Ejpg: cannot be decoded", "80x40 pixels: a side is below min_side_px=64", "raise max_reject"):
        assert part in str(caught.value)
    with pytest.raises(StorageError, match="no complete set of shards"):
        read_shard_set(str(tmp_path / "set"))


def test_allowed_rejects_are_listed_and_empty_shards_left_out(damaged, tmp_path, ray_local):
    settings = ShardSettings(samples_per_shard=1, max_reject_share=0.7)
    result = make_shards(damaged, str(tmp_path / "set"), settings)
    assert len(result.shards) == result.num_samples == 2
    assert {unquote(reject.key) for reject in result.index.rejects} == {"cut.jpg", "text.png", "tiny.png"}
    assert {info.path.rpartition(".")[2] for info in storage.list_files(result.uri)} == {"tar", "json", "jsonl"}
    assert len([info for info in storage.list_files(result.uri) if info.path.endswith(".tar")]) == 2
    with pytest.raises(ValueError, match="3 of 5 images"):  # a stricter limit looks again
        make_shards(damaged, str(tmp_path / "set"), settings.model_copy(update={"max_reject_share": 0.5}))


def test_odd_files_by_the_stated_rules(tmp_path, ray_local):
    """Good ones go in as they are, under their names; bad ones are listed with the reason."""
    source, bad = tmp_path / "odd", bad_files()
    for name, data in good_files().items() | {name: data for name, (data, _) in bad.items()}.items():
        storage.write_bytes(str(source / name), data)
    result = make_shards(str(source), str(tmp_path / "set"), ShardSettings(max_reject_share=0.7))
    tar = storage.read_bytes(result.tar_uri(0))
    assert {
        unquote(sample.key): tar[sample.offset : sample.offset + sample.size] for sample in result.samples(0)
    } == good_files()
    assert {sample.ext for sample in result.samples(0)} == {"jpeg", "png"}
    reasons = {unquote(reject.key): reject.reason for reject in result.index.rejects}
    assert set(reasons) == set(bad)
    assert all(reason in reasons[name] for name, (_, reason) in bad.items())
    lines = storage.read_bytes(join(result.uri, "left-out.jsonl")).decode().splitlines()
    assert {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines} == {
        reject.key: reject.reason for reject in result.index.rejects
    }


def test_links_to_nothing_and_names_in_any_bytes(source, tmp_path, ray_local):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("gone1.jpg", "gone2.jpg"):
        (images / name).symlink_to("nowhere.jpg")
    good, bad = os.fsdecode(b"good\xe9.jpg"), os.fsdecode(b"bad\xe9.jpg")
    (images / good).write_bytes(read_item(list_items(source)[0]))
    (images / bad).write_bytes(b"this is no image")
    made = make_shards(str(images), str(tmp_path / "set"), ShardSettings(max_reject_share=0.9))
    assert [sample.key for sample in made.samples(0)] == ["good%E9%2Ejpg"]
    rejects = {reject.key: reject for reject in made.index.rejects}
    assert rejects["gone1%2Ejpg"].reason == rejects["gone2%2Ejpg"].reason == "a link to nothing"
    assert rejects["bad%E9%2Ejpg"].uri == f"{images}/bad\\xe9.jpg"


def test_what_is_passed_over_and_files_of_several_pictures_are_said(tmp_path, ray_local):
    frames = [photograph(seed=seed) for seed in (1, 2)]
    files = {
        "moving.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "still.png": encoded(frames[0], "PNG"),
        "._still.png": b"a Mac's",
        "@eaDir/still.png/thumb.jpg": b"a file server's",
        "notes.txt": b"text",
        "写" * 83 + ".jpg": encoded(frames[1]),
        "line\u2028sep.jfif": encoded(photograph(seed=3)),
        os.fsdecode(b"caf\xe9.jpg"): encoded(photograph(seed=4)),
    }
    for name, data in files.items():
        storage.write_bytes(str(tmp_path / "source" / name), data)
    said = []
    made = make_shards(str(tmp_path / "source"), str(tmp_path / "set"), SETTINGS, say=said.append)
    assert (made.index.num_samples, made.index.num_rejects, made.index.num_of_several) == (5, 0, 1)
    assert said == [
        f"{tmp_path}/source: passed over: 2 of the system's or a program's own (._still.png, @eaDir); "
        "1 with other endings (.txt 1)",
        f"{tmp_path}/source: 1 files hold several pictures; the first of each was taken",
    ]
    for sample in made.samples(0):
        source = files[unquote(sample.key, errors="surrogateescape")]
        with open(tmp_path / "set" / "shard-000000.tar", "rb") as tar:
            tar.seek(sample.offset)
            assert tar.read(sample.size) == source


def test_a_set_without_odd_files_is_written_as_before(made):
    assert b"num_of_several" not in storage.read_bytes(join(made.uri, "index.json"))
    assert b"num_of_several" not in storage.read_bytes(join(made.uri, "shard-000000.json"))


def test_all_rejected_is_an_error_at_any_share(damaged, tmp_path, ray_local):
    with pytest.raises(ValueError, match=r"5 of 5 images \(100.0%\)"):
        make_shards(damaged, str(tmp_path), ShardSettings(min_side_px=5000, max_reject_share=1))


def test_a_storage_error_in_a_task_comes_out_as_itself(source, tmp_path, ray_local):
    (tmp_path / "file").write_bytes(b"")
    plans = plan_shards(list_items(source), SETTINGS)
    with pytest.raises(StorageError, match="a part of the path is a file") as caught:
        list(in_order(complete_shard, ((plan, f"{tmp_path}/file/x", None) for plan in plans)))
    assert "\n" not in str(caught.value)


def test_a_sidecar_that_was_changed_is_refused(made, tmp_path):
    shutil.copytree(made.uri, tmp_path / "set")
    (tmp_path / "set" / "shard-000001.json").write_text("{}")
    with pytest.raises(StorageError, match=r"shard-000001\.json: it is not the sidecar"):
        read_shard_set(str(tmp_path / "set")).samples(1)


def test_an_index_of_another_kind_is_refused(made, tmp_path):
    index = json.loads(storage.read_bytes(join(made.uri, "index.json"))) | {"surprise": 1}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match=r"index.json: surprise: Extra inputs are not permitted; make"):
        read_shard_set(str(tmp_path))


def test_the_digest_is_of_the_content_alone(made):
    renamed = made.index.model_copy(update={"source": "elsewhere", "source_fingerprint": "0"})
    assert ShardSet("/other", renamed).digest == made.digest


@pytest.mark.integration
def test_shards_in_an_object_store_equal_local_ones(made, source, s3):
    """In a process of its own: Ray's workers take their S3 credentials from where Ray was started."""
    code = f"""
import ray
from data_prep.shard import ShardSettings, make_shards
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
settings = ShardSettings(samples_per_shard=5, seed=3)
made = make_shards({source!r}, {join(s3.uri, "set")!r}, settings)
assert make_shards({source!r}, {join(s3.uri, "set")!r}, settings).digest == made.digest
print(made.digest)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip().endswith(made.digest), run.stderr
    assert [shard.sha256 for shard in read_shard_set(join(s3.uri, "set")).shards] == [s.sha256 for s in made.shards]


def contents(shards):
    """key -> bytes of every sample, as a loader reads them."""
    reader, found = ShardReader(shards, None, 0), {}
    for shard, entry in enumerate(shards.shards):
        samples = shards.samples(shard)
        assert len(samples) == entry.count
        for number, sample in enumerate(samples):
            assert sample.key not in found
            found[sample.key] = reader.read(shard, number)[0]
    reader.close()
    return found


def test_a_finished_set_grows_by_new_images_and_lets_go_of_those_that_are_gone(source, tmp_path, ray_local):
    folder, uri, said = tmp_path / "source", str(tmp_path / "set"), []
    images = {f"{number:02d}.JPEG": read_item(item) for number, item in enumerate(list_items(source))}

    def make(files, settings=SETTINGS):
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            storage.write_bytes(str(folder / name), data)
            os.utime(folder / name, ns=(0, zlib.crc32(data)))
        said.clear()
        return make_shards(str(folder), uri, settings, grow=True, say=said.append)

    def expected(files):
        return {name.replace(".", "%2E"): data for name, data in files.items()}

    at_first = dict(list(images.items())[:12])
    first = make(at_first)
    before = {info.path: (info.size, info.version) for info in storage.list_files(uri)}
    assert first.index.generation == 0

    # one is gone, one has other bytes, three are new, a copy of one that is there is called before it
    later = {name: data for name, data in images.items() if name not in ("03.JPEG", "15.JPEG", "16.JPEG", "17.JPEG")}
    later["05.JPEG"] = images["17.JPEG"]
    second = make(later | {"00 copy.JPEG": images["07.JPEG"]})
    assert said == [f"{uri} grows: 4 new images, 2 no longer listed"]
    assert contents(second) == expected(later)
    assert (second.num_samples, second.index.num_duplicates, second.index.generation) == (14, 1, 1)
    assert second.digest != first.digest
    after = {info.path: (info.size, info.version) for info in storage.list_files(uri)}
    shards = [path for path in before if path.startswith("shard-")]
    assert {path: after[path] for path in shards} == {path: before[path] for path in shards}
    assert set(after) - set(before) == {
        "index-000000.json", "left-out-000000.jsonl", "shard-000003.tar", "shard-000003.json"
    }  # fmt: skip
    assert make(later | {"00 copy.JPEG": images["07.JPEG"]}).index == second.index

    old = read_shard_set(join(uri, "index-000000.json"))
    assert (old.uri, old.index, old.digest) == (first.uri, first.index, first.digest)
    assert contents(old) == expected(at_first)
    for index in (uri, join(uri, "index-000000.json")):
        assert verify(index).problems == ()

    third = make(later | {"03.JPEG": images["03.JPEG"]})  # back in its place
    assert said == [f"{uri} grows: 0 new images, 1 no longer listed"]
    assert contents(third) == expected(later | {"03.JPEG": images["03.JPEG"]})
    assert third.index.generation == 2
    assert verify(uri).problems == verify(join(uri, "index-000001.json")).problems == ()

    anew = make(at_first, SETTINGS.model_copy(update={"seed": 4}))
    assert said == [f"{uri}: it was made with other settings; it is made anew"]
    assert contents(anew) == expected(at_first)
    assert not [info for info in storage.list_files(uri) if info.path.startswith(("index-", "left-out-"))]
    assert verify(uri).problems == ()


def test_a_set_without_marks_is_made_anew(made, source, tmp_path, ray_local):
    """One of before sets could grow does not say which images it is of."""
    uri, said = str(tmp_path / "set"), []
    shutil.copytree(made.uri, uri)
    summaries = []
    for shard in made.shards:
        path = join(uri, f"{shard.name}.json")
        info = ShardInfo.model_validate_json(storage.read_bytes(path)).model_copy(update={"marks": ""})
        storage.write_bytes(path, to_json(info))
        summaries.append(summarise(info))
    publish_index(uri, source, "of before", SETTINGS, summaries)
    again = make_shards(source, uri, SETTINGS, grow=True, say=said.append)
    assert said == [f"{uri}: it holds none of these images, or was made before sets could grow; it is made anew"]
    assert (again.digest, again.index.generation) == (made.digest, 0)


def test_of_a_grown_set_of_sub_images_all_pieces_of_an_image_go_or_stay(tmp_path):
    settings = ShardSettings(samples_per_shard=3, sub_image_px=64, sub_image_step_px=48)
    uri, folder = str(tmp_path / "set"), tmp_path / "source"
    for number in range(5):
        storage.write_bytes(str(folder / f"{number}.png"), encoded(photograph(seed=number), "PNG"))
    plans = plan_shards(list_items(str(folder)), settings)
    before = publish_index(uri, "x", "0", settings, [summarise(write_shard(plan, uri)) for plan in plans])
    (folder / "2.png").unlink()
    storage.write_bytes(str(folder / "new.png"), encoded(photograph(seed=9), "PNG"))
    with Plan(list_items(str(folder)), settings) as plan:
        growth = Growth(before, plan)
        (added,) = growth.new_shards({})
        summaries = [*growth.old_summaries(), summarise(write_shard(added, uri))]
    assert (added.name, [item.path for item in added.items]) == ("shard-000002", ["new.png"])
    grown = publish_index(uri, "x", "1", settings, summaries, generation=1, next_shard=3)
    pieces = len(before.samples(0)) // 3
    keys = [sample.key for shard in range(3) for sample in grown.samples(shard)]
    assert len(keys) == len(set(keys)) == grown.num_samples == 5 * pieces
    assert {key.partition("%2E")[0] for key in keys} == {"0", "1", "3", "4", "new"}
    assert grown.index.num_images == 5
    assert sum(len(shard.removed) for shard in grown.shards) == pieces
