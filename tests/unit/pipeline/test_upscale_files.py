"""Which files are worked on and how results are called, decided before any work."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.picture import Picture, write_picture
from pipeline.upscale_files import Job, Naming, plan, without_finished
from pipeline.upscale_image import Wanted


def put(path: Path, channels: int = 3, deep: bool = False, kind: str = "", size: tuple[int, int] = (7, 9)) -> None:
    """An image; `kind`: in this format, whatever its name says."""
    pixels = np.zeros((*size, channels), np.uint16 if deep else np.uint8)
    made = path.with_name(f"made{kind}") if kind else path
    write_picture(made, Picture(pixels))
    made.rename(path)


def targets(folder: Path, naming: Naming | None = None, out: str = "out") -> list[str]:
    made = plan(str(folder), str(folder.parent / out), naming)
    return [str(job.target.relative_to(folder.parent / out)) for job in made.jobs]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a PNG of 16 bits, one with alpha called .jpg, and a photograph."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    put(tmp_path / "in" / "deep.png", deep=True)
    put(tmp_path / "in" / "a-png.jpg", channels=4, kind=".png")
    put(tmp_path / "in" / "sub" / "photo.JPG")
    return tmp_path / "in"


def test_a_folder_keeps_names_and_endings_that_hold_what_there_is(images: Path) -> None:
    made = plan(str(images), str(images.parent / "out"))
    assert targets(images) == ["a-png.png", "deep.png", "sub/photo.JPG"]
    assert made.notes == ["written as PNG, since the name's ending cannot hold 16 bits or alpha: 1 (a-png.jpg)"], (
        "said before work"
    )
    assert made.problems == []


def test_format_and_suffix(images: Path) -> None:
    assert targets(images, Naming("tif", "_x4")) == ["a-png_x4.tif", "deep_x4.tif", "sub/photo_x4.tif"]
    assert targets(images, Naming(".PNG")) == ["a-png.png", "deep.png", "sub/photo.png"]


def test_what_a_wanted_format_cannot_hold_is_a_problem_of_that_image(images: Path) -> None:
    made = plan(str(images), str(images.parent / "out"), Naming("jpg"))
    assert [job.source.name for job in made.jobs] == ["photo.JPG"]
    out = images.parent / "out"
    assert made.problems == [
        f"{images}/a-png.jpg: {out}/a-png.jpg cannot hold an alpha channel: "
        "choose .png, .webp or .tif, or --alpha drop",
        f"{images}/deep.png: {out}/deep.jpg cannot hold 16 bits a channel: choose .png or .tif",
    ]
    assert made.notes == ["cannot be done, for reasons that are told at the end: 2 (a-png.jpg, deep.png)"]
    without = plan(str(images), str(images.parent / "out"), Naming("jpg", has_alpha=False))
    assert [job.source.name for job in without.jobs] == ["a-png.jpg", "photo.JPG"]
    assert targets(images, Naming(has_alpha=False))[0] == "a-png.jpg"


def test_two_images_of_one_result_are_refused(images: Path) -> None:
    put(images / "a-png.png")
    put(images / "sub" / "photo.png")
    for naming in (Naming(), Naming("webp", "_2")):
        with pytest.raises(ValueError, match=r"a-png\.jpg and a-png\.png would all become .*out/a-png.*: rename them"):
            plan(str(images), str(images.parent / "out"), naming)


def test_results_beside_their_images_are_no_images(images: Path) -> None:
    naming = Naming("png", "_x2")
    first = plan(str(images), str(images), naming)
    for job in first.jobs:
        put(job.target, size=(14, 18))
    again = plan(str(images), str(images), naming)
    assert again.jobs == first.jobs
    assert again.notes == [
        "results of an earlier run, not images to upscale: 3 (a-png_x2.png, deep_x2.png, photo_x2.png)"
    ]


def test_no_image_is_overwritten(images: Path) -> None:
    for target, naming in ((images, Naming()), (images, Naming("png"))):
        with pytest.raises(ValueError, match=r"would overwrite .*name another place for the result, or give --suffix"):
            plan(str(images), str(target), naming)
    (images / "link.png").symlink_to(images / "deep.png")
    with pytest.raises(ValueError, match="would overwrite"):
        plan(str(images / "deep.png"), str(images / "link.png"))


def test_a_single_image(images: Path, tmp_path: Path) -> None:
    def target(source: str, out: str, naming: Naming | None = None) -> str:
        (job,) = plan(str(images / source), str(tmp_path) + "/" + out, naming).jobs
        return str(job.target.relative_to(tmp_path))

    assert target("deep.png", "x.tif") == "x.tif"
    assert target("a-png.jpg", "new/") == "new/a-png.png"
    assert target("a-png.jpg", "new/", Naming("webp", "-2")) == "new/a-png-2.webp"
    assert target("sub/photo.JPG", "new/x.png", Naming("png")) == "new/x.png"
    (note,) = plan(str(images / "a-png.jpg"), f"{tmp_path}/new/").notes
    assert "written as PNG" in note
    for source, out, naming, message in (
        ("a-png.jpg", "x.jpg", Naming(), r"x\.jpg cannot hold an alpha channel: .* or --alpha drop"),
        ("deep.png", "x.webp", Naming(), r"x\.webp cannot hold 16 bits"),
        ("deep.png", "x.tif", Naming("png"), r"--format png is not what .*x\.tif ends in"),
        ("deep.png", "x.tif", Naming(suffix="_2"), "--suffix is for results in folders"),
        ("deep.png", "x", Naming(), "choose an ending among .*, or end it in / for a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            target(source, out, naming)


def test_places_that_cannot_be(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "taken" / "deep.png").mkdir(parents=True)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    for source, out, message in (
        (images, "one.png", r"one\.png is called like an image, and .*in is a folder: .* \(.*one\.png/ if that is"),
        (images, "file", "file is a file: name a folder"),
        (images, "file/sub", r"file/sub cannot be written: .*file is a file, no folder"),
        (images / "deep.png", "taken/", "taken/deep.png is a folder: it cannot become an image"),
        (tmp_path / "dangling.png", "x.png", "dangling.png is a link to what is not there"),
        (tmp_path / "pipe.png", "x.png", "pipe.png is neither a file nor a folder"),
        (tmp_path / "nope", "x", "nope does not exist"),
        (images, "x" * 300, "x cannot be looked at: File name too long"),
        (images / ("x" * 300), "x.png", "x cannot be looked at: File name too long"),
        (images / "deep.png", "pipe.png/x.png", r"pipe\.png is a file, no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(str(source), f"{tmp_path}/{out}")
    for names, empty in ((("", "x.png"), "IN"), (("in.png", ""), "OUT")):
        with pytest.raises(ValueError, match=f"{empty} is empty: name an image"):
            plan(*names)
    assert targets(images, out="folder.png"), "a folder that is there may be called so"
    assert plan(str(images), f"{tmp_path}/new.png/").jobs
    assert plan(str(images), str(tmp_path / "taken")).problems == [
        f"{images}/deep.png: {tmp_path}/taken/deep.png is a folder: it cannot become an image"
    ]


def test_a_folder_that_may_not_be_written_is_refused_before_work(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system answers for a read-only disk, and for another user."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"out/new cannot be written: {images.parent} is read-only, or not yours"):
        plan(str(images), str(images.parent / "out" / "new"))


def test_names_up_to_the_limit(images: Path, tmp_path: Path) -> None:
    name = "写" * 83
    put(images / f"{name}.png")
    assert f"{name}.png" in targets(images)
    made = plan(str(images), str(tmp_path / "out"), Naming(suffix="_x20"))
    assert len(made.jobs) == 3
    assert made.problems == [
        f"{images}/{name}.png: {name}_x20.png has more than the 255 bytes that a name may have: choose a shorter one"
    ]


def test_names_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for raw in (b"caf\xe9.png", "line\u2028sep.png".encode(), b"new\nline.png"):
        put(tmp_path / "in" / os.fsdecode(raw))
    names = [os.fsencode(job.target.name) for job in plan(f"{tmp_path}/in", f"{tmp_path}/out").jobs]
    assert sorted(names) == [b"caf\xe9.png", "line\u2028sep.png".encode(), b"new\nline.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gif"}, "--format gif: choose among auto, png, tif"),
        ({"format": ""}, "--format : choose among auto"),
        ({"suffix": "a/b"}, "--suffix a/b: .* it may hold no /"),
        ({"suffix": "a\0b"}, "--suffix"),
    ],
)
def test_names_that_cannot_be(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Naming(**options)


def test_what_is_finished_is_left_out(tmp_path: Path) -> None:
    jobs = [Job(tmp_path / f"{name}.png", tmp_path / f"{name}-x2.png") for name in "abcdef"]
    for job in jobs:
        put(job.source)
    for job in jobs[:5]:
        put(job.target, size=(14, 18))
    put(jobs[1].target, size=(21, 27))  # of another scale
    os.utime(jobs[2].target, ns=(0, jobs[2].source.stat().st_mtime_ns - 1))  # older than its image
    jobs[3].target.write_bytes(b"no image")
    left, notes = without_finished(jobs, Wanted(), 2)
    assert [job.source.name for job in left] == ["b.png", "c.png", "d.png", "f.png"]
    assert notes == [
        "2 of 6 are there already, and skipped",
        "older than their images, or of another size, and so made anew: 3 (b-x2.png, c-x2.png, d-x2.png)",
    ]
    assert without_finished(jobs, Wanted(width=27), 2)[0] == [jobs[index] for index in (0, 2, 3, 4, 5)]


def test_a_turned_photograph_is_finished_as_well(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (9, 7)).save(tmp_path / "a.jpg", exif=tags)
    put(tmp_path / "b.jpg", size=(18, 14))
    assert without_finished([Job(tmp_path / "a.jpg", tmp_path / "b.jpg")], Wanted(), 2)[0] == []
