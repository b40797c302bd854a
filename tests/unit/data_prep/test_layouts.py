"""Folders with images in two resolutions: low-resolution ones never train as high-resolution ones unless it is said."""

import pytest

from data_prep import sources
from data_prep.layouts import selfexsr_name, training_items
from data_prep.shard import ShardSettings, make_shards


def made(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return str(folder)


LAYOUTS = {
    "pairs": ("HR/0.png", "LR_bicubic/X2/0x2.png"),
    "gt-lq": ("gt/0.png", "lq/0.png"),
    "GTmod12": ("GTmod12/0.png", "LRbicx2/0.png"),
    "DIV2K": ("DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X2/0001x2.png"),
    "deeper": ("DF2K/Flickr2K/HR/1.png", "DF2K/Flickr2K/LR_unknown/X4/1x4.png"),
    "beside": ("0.png", "LR/0.png"),
    "low alone": ("lr_x4/0.png", "lr_x4/1.png"),
    "SelfExSR": ("image_SRF_2/img_001_SRF_2_HR.png", "image_SRF_2/img_001_SRF_2_LR.png"),
    "by name": ("baby_LR.png", "baby_HR.png"),
    "by name and scale": ("baby-hr.jpg", "baby-lr_x2.jpg"),
}
REMEDIES = {
    "pairs": r"LR_bicubic/ holds low-resolution images, .* name the folder of those \(there is HR/\), or exclude",
    "gt-lq": r"lq/ holds low-resolution images, .* \(there is gt/\), or exclude 'lq/\*'",
    "deeper": r"\(there is HR/\), or exclude 'DF2K/Flickr2K/LR_unknown/\*'",
    "low alone": r"lr_x4/ holds low-resolution images, by its name, .* name the folder of those, or exclude",
    "SelfExSR": r"img_001_SRF_2_LR.png is one of images in two resolutions, .* include '\*_HR\.\*'",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_resolution_images_do_not_train_in_silence(layout, tmp_path):
    folder = made(tmp_path / "set", *LAYOUTS[layout])
    with pytest.raises(ValueError, match=REMEDIES.get(layout, "two resolutions|holds low-resolution images")) as told:
        list(training_items(folder))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=REMEDIES.get(layout, "low-resolution")):
        make_shards(folder, str(tmp_path / "shards"), ShardSettings())
    assert not (tmp_path / "shards").exists()
    assert len(sources.list_items(folder)) == 2  # others read both sides


@pytest.mark.parametrize(
    ("layout", "include", "exclude", "taken"),
    [
        ("pairs", ["HR/*"], [], "HR/0.png"),
        ("pairs", [], ["LR_bicubic/*"], "HR/0.png"),
        ("pairs", ["LR_bicubic/*"], [], "LR_bicubic/X2/0x2.png"),
        ("SelfExSR", ["*_HR.*"], [], "image_SRF_2/img_001_SRF_2_HR.png"),
    ],
)
def test_what_is_said_is_done(layout, include, exclude, taken, tmp_path):
    folder = made(tmp_path, *LAYOUTS[layout])
    assert [item.path for item in training_items(folder, include, exclude)] == [taken]


def test_a_general_include_does_not_say_it(tmp_path):
    with pytest.raises(ValueError, match="low-resolution"):
        list(training_items(made(tmp_path, *LAYOUTS["pairs"]), ["*.png"]))


@pytest.mark.parametrize("below", ["LR_bicubic", "LR_bicubic/X2", "lq"])
def test_a_folder_of_low_resolution_images_is_refused_as_a_source_unless_it_is_said(below, tmp_path):
    folder = made(tmp_path / below, "0.png")
    with pytest.raises(
        ValueError, match=r"holds low-resolution images, by its name: name the folder .* or include '\*'"
    ):
        list(training_items(folder))
    assert len(list(training_items(folder, ["*"]))) == 1


def test_other_names_train(tmp_path):
    paths = ("n01440764/a.jpg", "flr/b.jpg", "xlr8/x2/c.jpg", "d_LR.jpg", "clear/e-LR.jpg", "HR/f_HR.png", "lrx/g.png")
    assert len(list(training_items(made(tmp_path, *paths)))) == len(paths)
    assert len(list(training_items("photographs:"))) == 17


def test_a_lists_paths_are_whole_so_that_one_side_alone_says_nothing(tmp_path):
    made(tmp_path / "lr" / "mine", "HR/0.png", "a.png")
    (tmp_path / "lr" / "list.txt").write_text("mine/a.png\n")
    assert len(list(training_items(str(tmp_path / "lr" / "list.txt")))) == 1
    (tmp_path / "lr" / "list.txt").write_text("mine/a.png\nmine/HR\n")
    with pytest.raises(ValueError, match="low-resolution"):
        list(training_items(str(tmp_path / "lr" / "list.txt")))


def test_names_of_selfexsr():
    assert selfexsr_name("a/img_001_SRF_2_HR.png") == ("img_001", 2, "HR")
    assert selfexsr_name("a/img_001_SRF_4_A+.png") == ("img_001", 4, "A+")
    assert selfexsr_name("a/img_001.png") is None
