"""Sources of images: folders, the shipped photographs, globs, and keys that WebDataset keeps apart."""

import importlib.util
import os
import tarfile
import threading
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_prep import sources
from data_prep.image import decode
from data_prep.sources import fingerprint, key_of, list_items, read_item
from data_prep.storage import StorageError, read_bytes, write_bytes


@pytest.fixture
def folder(tmp_path):
    for path in ("a.jpg", "a.png", "b.c/d.e.JPEG", "b.c/__skip__.tif", "notes.txt", "noext"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    return str(tmp_path)


def test_images_of_a_folder_sorted_with_keys_that_lead_back(folder):
    items = list_items(folder)
    assert [unquote(item.key) for item in items] == ["a.jpg", "a.png", "b.c/__skip__.tif", "b.c/d.e.JPEG"]
    assert [item.ext for item in items] == ["jpg", "png", "tif", "jpeg"]
    assert items == list_items(f"file://{folder}")


@given(st.lists(st.text("ab._-/ %é", min_size=1), min_size=1, unique=True))
def test_keys_are_unique_reversible_and_webdataset_splits_them_right(paths):
    keys = [key_of(path) for path in paths]
    assert len(set(keys)) == len(paths)
    assert [unquote(key) for key in keys] == paths
    for key in keys:
        if not key.endswith("/"):
            assert base_plus_ext(f"{key}.jpg") == (key, "jpg")
            assert "__" not in key


def test_a_name_that_is_no_utf8_is_listed_and_read_and_leads_back(tmp_path):
    folder, path = str(tmp_path / "images"), os.fsdecode(b"caf\xe9.jpg")
    write_bytes(f"{folder}/{path}", b"latin")
    (tmp_path / "list.txt").write_bytes(b"images/caf\xe9.jpg\n")
    for source in (folder, str(tmp_path / "list.txt")):
        [item] = list_items(source)
        assert unquote(item.key, errors="surrogateescape").endswith(path)
        assert item.ext == "jpg"
        assert read_item(item) == b"latin"
    assert key_of(path) == "caf%E9%2Ejpg" != key_of("café.jpg")


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["a.*"], [], ["a.jpg", "a.png"]),
        (["b.c/*"], ["*.tif"], ["b.c/d.e.JPEG"]),
        ([], ["a.png", "b.c/*"], ["a.jpg"]),
        (["/b.c/d.e.JPEG", "/d.e.JPEG", "/__skip__.tif"], [], ["b.c/d.e.JPEG"]),
    ],
)
def test_globs(folder, include, exclude, names):
    assert [unquote(item.key) for item in list_items(folder, include, exclude)] == names


def test_a_list_names_images_folders_and_tars(folder, tmp_path):
    listing = tmp_path / "lists" / "sources.txt"
    listing.parent.mkdir()
    (tmp_path / "t.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "x/y.jpg")
    listing.write_text(f"# a comment\n\n../a.png\n{folder}/b.c\nfile://{tmp_path}/t.tar\n")
    base = str(tmp_path).lstrip("/")
    items = list_items(str(listing))
    assert [unquote(item.key).removeprefix(f"{base}/") for item in items] == [
        "a.png",
        "b.c/__skip__.tif",
        "b.c/d.e.JPEG",
        "t.tar/x/y.jpg",
    ]
    assert read_item(items[0]) == b"a.png"
    assert read_item(items[3]) == b"a.jpg"
    assert [unquote(item.key) for item in list_items(str(listing), include=["*/b.c/*"], exclude=["*.tif"])] == [
        f"{base}/b.c/d.e.JPEG"
    ]


def test_a_list_in_a_list_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("b.txt\n")
    with pytest.raises(ValueError, match=r"a.txt: it lists b.txt, another list"):
        list_items(str(tmp_path / "a.txt"))


def test_a_listed_file_that_is_gone_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("gone.png\n")
    with pytest.raises(StorageError, match=r"gone.png: it does not exist"):
        list_items(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mistyped", "mistyped: it does not exist"),
        ("empty", "sources.txt: it lists empty, which holds no image; correct or remove the line"),
        ("notes.gif", "notes.gif: it is a file, no .tar or .txt"),
        ("none.tar", "sources.txt: it lists none.tar, which holds no image"),
    ],
)
def test_a_line_that_names_no_image_is_an_error(tmp_path, line, words):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.gif").write_bytes(b"")
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(__file__, "x.py")
    (tmp_path / "sources.txt").write_text(f"\ufeffa.png\n{line}\n")
    with pytest.raises(ValueError, match=words):
        list_items(str(tmp_path / "sources.txt"))


def test_listed_images_are_looked_at_side_by_side_and_keep_their_order(tmp_path, monkeypatch):
    """None is answered before eight are asked: one by one, the first would wait for ever."""
    together = threading.Barrier(8, timeout=20)

    def head(uri):
        together.wait()
        return 7, "tag"

    monkeypatch.setattr("data_prep.s3.head", head)
    uris = [f"s3://bucket/{number:02d}.png" for number in range(16)]
    (tmp_path / "sources.txt").write_text("\n".join(reversed(uris)))
    items = list_items(str(tmp_path / "sources.txt"))
    assert [(item.uri, item.size, item.version) for item in items] == [(uri, 7, "tag") for uri in reversed(uris)]


def test_no_images_is_an_error_that_names_source_and_extensions(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images among 0 found; accepted extensions are png jpg"):
        list_items(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"nowhere: it does not exist"):
        list_items(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no images with include=\['z\*'\] exclude=\[\] among 4 found"):
        list_items(folder, include=["z*"])


def test_the_fingerprint_follows_the_content(folder, tmp_path):
    before = fingerprint(list_items(folder))
    assert fingerprint(list_items(folder)) == before
    (tmp_path / "a.jpg").write_bytes(b"other")
    assert fingerprint(list_items(folder)) != before


def test_the_photographs_are_there_and_decode():
    items = list_items("photographs:")
    assert len(items) == 17
    for item in items:
        assert min(decode(read_bytes(item.uri)).shape[:2]) >= 300, item.key
    assert [unquote(item.key) for item in list_items("photographs:", include=["china.*"])] == ["china.jpg"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sources, "_SHIPPED", (("some-package", "no_such_module", "data", ("x.png",)),))
    with pytest.raises(ValueError, match="needs the package some-package; pip install some-package"):
        list_items("photographs:")


def test_a_missing_photograph_is_named(monkeypatch):
    assert importlib.util.find_spec("skimage")
    monkeypatch.setattr(sources, "_SHIPPED", (("scikit-image", "skimage", "data", ("gone.png",)),))
    with pytest.raises(ValueError, match=r"lacks .*gone.png; pip install --force-reinstall scikit-image"):
        list_items("photographs:")
