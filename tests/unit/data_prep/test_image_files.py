"""Which files are images, the same in folders, lists, tars and object stores; what is passed over is counted."""

import os
import tarfile

import pytest

from data_prep import storage
from data_prep.image_files import EXTENSIONS, FORMATS, PassedOver, clutter_in, has_image_name
from data_prep.sources import NoImagesError, list_items
from data_prep.uri import printable
from model import picture
from pipeline.upscale_files import plan

IMAGES = (
    *("a.jpg", "b/old.jfif", "b/UPPER.JPE", "per%20cent.png", "with space.webp", "dots.in.name.bmp", "'quoted'.tif"),
    *("line\u2028sep.jpg", "写" * 83 + ".jpg", os.fsdecode(b"caf\xe9.jpg"), "plus+.jpeg", "semi;colon.jpg", "[x]*.png"),
    *("new\u0085line.png", "\u3000wide.png"),
)
CLUTTER = (
    *("._a.jpg", ".hidden.png", "b/._old.jfif", "__MACOSX/b/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg"),
    *(".ipynb_checkpoints/a-checkpoint.png", "$RECYCLE.BIN/x.jpg", ".Trash-1000/files/x.jpg", "Thumbs.db", ".DS_Store"),
)
OTHERS = ("notes.txt", "b/clip.gif", "README", "png")


@pytest.fixture
def folder(tmp_path):
    for path in (*IMAGES, *CLUTTER, *OTHERS):
        place = tmp_path / "images" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.fsencode(path))
    return tmp_path / "images"


def paths(items):
    return sorted(item.path for item in items)


def counts(passed_over):
    return passed_over.num_clutter, passed_over.endings.total(), passed_over.num_links


def test_a_folder(folder):
    passed_over = PassedOver()
    assert paths(list_items(str(folder), passed_over=passed_over)) == sorted(IMAGES)
    assert counts(passed_over) == (len(CLUTTER), len(OTHERS), 0)
    said = passed_over.describe()
    assert said.startswith("passed over: 10 of the system's or a program's own ($RECYCLE.BIN, ")
    assert "4 with other endings (none 2, " in said


def test_an_object_store(folder, monkeypatch):
    listed = [(info.path, info.size, "tag") for info in storage.list_files(str(folder))]
    monkeypatch.setattr("data_prep.s3.objects", lambda uri: iter(listed))
    passed_over = PassedOver()
    assert paths(list_items("s3://bucket/images", passed_over=passed_over)) == sorted(IMAGES)
    assert counts(passed_over) == (len(CLUTTER), len(OTHERS), 0)


def test_a_tar_and_a_tar_in_it(folder, tmp_path):
    with tarfile.open(tmp_path / "inner.tar", "w") as tar:
        tar.add(folder, ".")
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(tmp_path / "inner.tar", "class.tar")
    passed_over = PassedOver()
    found = list_items(str(tmp_path / "outer.tar"), passed_over=passed_over)
    assert paths(found) == sorted(f"class/{path}" for path in IMAGES)
    assert passed_over.num_clutter == len(CLUTTER)


def test_a_list_names_what_a_search_finds(folder, tmp_path):
    """`find -name '*.*g'` knows nothing of clutter, and names hold any character but the line feed."""
    every = [f"images/{path}" for path in (*IMAGES, *CLUTTER) if has_image_name(path)]
    (tmp_path / "list.txt").write_bytes(b"\r\n".join(map(os.fsencode, every)))
    passed_over = PassedOver()
    found = list_items(str(tmp_path / "list.txt"), passed_over=passed_over)
    base = str(tmp_path).lstrip("/")
    hidden = {".ipynb_checkpoints/a-checkpoint.png", ".Trash-1000/files/x.jpg"}  # somebody wrote out their folders
    assert paths(found) == sorted(f"{base}/images/{path}" for path in {*IMAGES, *hidden})
    assert passed_over.num_clutter == len([path for path in CLUTTER if has_image_name(path)]) - len(hidden)


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"")
    assert paths(list_items(str(tmp_path / ".cache"))) == ["a.png"]


def test_upscale_takes_the_same_files(folder, tmp_path):
    passed_over = PassedOver()
    jobs = plan(str(folder), str(tmp_path / "out"), passed_over=passed_over).jobs
    assert sorted(str(job.source.relative_to(folder)) for job in jobs) == sorted(IMAGES)
    assert counts(passed_over) == (len(CLUTTER), len(OTHERS), 0)


def test_what_is_read_can_be_named_as_a_result_and_both_sides_ask_the_same_parsers():
    assert {f".{name}" for name in EXTENSIONS} == set(picture.FORMATS)
    assert picture.PARSERS == FORMATS


def test_only_clutter_is_no_image(folder):
    for path in (*IMAGES, *OTHERS):
        (folder / path).unlink()
    with pytest.raises(NoImagesError, match=r"no images among 0 found; .* of the system's or a program's own"):
        list_items(str(folder))
    with pytest.raises(ValueError, match=r"holds no images: .*jfif.* of the system's or a program's own"):
        plan(str(folder), str(folder / "out"))


@pytest.mark.parametrize("path", ["a..b.jpg", "@eaDirs/a.jpg", "MACOSX/a.jpg", "a.ipynb_checkpoints/b.jpg", "../a.jpg"])
def test_names_that_only_look_like_clutter(path):
    assert not clutter_in(path)


def linked(tmp_path):
    """root/{a.png, sub/b.png, elsewhere -> ../data, again -> ../data, back -> root, up -> .., twin -> sub}"""
    for path in ("root/a.png", "root/sub/b.png", "data/c.png", "data/deep/d.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    for name, target in {
        "root/elsewhere": "data",
        "root/again": "data",
        "root/back": "root",
        "root/up": ".",
        "root/twin": "root/sub",
        "data/root": "root",
        "data/deep/loop": "data",
        "root/itself": "root/itself",
    }.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    return str(tmp_path / "root")


def test_linked_folders_are_followed_once_and_loops_are_named(tmp_path):
    root, passed_over = linked(tmp_path), PassedOver()
    found = paths(list_items(root, passed_over=passed_over))
    assert found == ["a.png", "again/c.png", "again/deep/d.png", "sub/b.png"]
    assert passed_over.num_links == 6
    jobs = plan(root, str(tmp_path / "out")).jobs
    assert sorted(str(job.source.relative_to(root)) for job in jobs) == found
    notes = {}
    list(storage.iter_files(root, note=lambda path, reason: notes.update({path: reason})))
    assert {path: reason.partition(":")[0].partition(" /")[0] for path, reason in notes.items()} == {
        "again/deep/loop": "a loop",
        "again/root": "a link to",
        "back": "a loop",
        "elsewhere": "a second link to",
        "twin": "a link to",
        "up": "a loop",
    }
    assert "a loop: it leads back to" in passed_over.describe()


def test_a_link_into_what_is_left_out_is_followed(tmp_path):
    (tmp_path / ".store" / "x").mkdir(parents=True)
    (tmp_path / ".store" / "x" / "a.png").write_bytes(b"")
    (tmp_path / "images").symlink_to(".store/x")
    assert paths(list_items(str(tmp_path))) == ["images/a.png"]


def test_a_pipe_is_no_image_and_nobody_waits_for_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(b"")
    passed_over = PassedOver()
    assert paths(list_items(str(tmp_path), passed_over=passed_over)) == ["a.png"]
    assert "pipe.png (neither a file nor a folder)" in passed_over.describe()


def test_names_are_shown_in_one_line_and_as_they_are_where_they_can_be():
    shown = {"line\u2028sep": "line\\u2028sep", "caf\udce9": "caf\\xe9", "a\nb": "a\\nb", "\x1b[2J": "\\x1b[2J"}
    assert {name: printable(name) for name in shown} == shown
    for name in ("ünï 写", "a\u00a0b", "\u3000", "👩‍🚀"):
        assert printable(name) == name
