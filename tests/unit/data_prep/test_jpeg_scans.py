"""Whole and damaged JPEG files of every Huffman-coded kind: what passes, what is found."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.jpeg_scans import is_whole
from tests.unit.data_prep.odd_files import encoded, photograph

KINDS = {
    "progressive": ("RGB", {"progressive": True, "quality": 90}),
    "progressive, halved chroma": ("RGB", {"progressive": True, "subsampling": 2}),
    "progressive, restarts": ("RGB", {"progressive": True, "subsampling": 1, "restart_marker_blocks": 5}),
    "progressive gray": ("L", {"progressive": True}),
    "progressive cmyk": ("CMYK", {"progressive": True, "quality": 90}),
    "cmyk": ("CMYK", {"quality": 90}),
    "cmyk, restarts": ("CMYK", {"restart_marker_blocks": 7}),
    "rgb": ("RGB", {"keep_rgb": True}),
    "baseline": ("RGB", {"subsampling": 2}),
}


def made(kind, height=143, width=195):
    """Sides that fill neither blocks nor MCUs."""
    mode, options = KINDS[kind]
    return encoded(photograph(height, width).convert(mode), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_whole_and_what_is_behind_the_end_is_not_looked_at(kind):
    for height, width in ((143, 195), (8, 8), (1, 17)):
        data = made(kind, height, width)
        assert is_whole(data) is True
        assert is_whole(data + b"behind \xff\xd8") is True


@pytest.mark.parametrize("kind", KINDS)
def test_cut_filled_and_replaced_tails_are_found(kind):
    data, random = made(kind), np.random.default_rng(0)
    size = len(data)
    for cut in range(size // 2, size - 2, size // 40):
        assert not is_whole(data[:cut])
        assert not is_whole(data[:cut] + b"\xff\xd9")
    for start in (size // 2, size * 3 // 4):
        for filling in (bytes(size - start - 2), b"\x55" * (size - start - 2)):
            assert not is_whole(data[:start] + filling + b"\xff\xd9")
    for _ in range(40):
        start = int(random.integers(size // 2, size - 510))
        assert not is_whole(data[:start] + random.bytes(500) + data[start + 500 :])


def test_pillow_shows_such_a_file_as_a_good_one():
    data = made("progressive")
    with Image.open(io.BytesIO(data[: len(data) // 2] + b"\xff\xd9")) as image:
        image.load()


def test_a_scan_that_is_left_out_is_found():
    data = made("progressive")
    last = data.rfind(b"\xff\xda")
    tables = data.rfind(b"\xff\xc4", 0, last)
    assert not is_whole(data[:tables] + b"\xff\xd9")


def test_other_kinds_are_not_judged():
    arithmetic = bytearray(made("baseline"))
    arithmetic[arithmetic.find(b"\xff\xc0") + 1] = 0xC9
    for data in (b"", b"\xff\xd8", encoded(photograph(), "PNG"), bytes(arithmetic)):
        assert is_whole(data) is None


@pytest.mark.parametrize("kind", ["progressive, restarts", "cmyk"])
def test_no_damage_is_more_than_an_answer(kind):
    whole, random = made(kind), np.random.default_rng(1)
    for number in range(400):
        data = bytearray(whole)
        for at in random.integers(2, len(data) if number % 2 else 700, 3):
            data[at] = random.integers(256)
        assert is_whole(bytes(data)) in (True, False, None)


def test_real_photographs_are_whole(photographs):
    assert all(is_whole(file.read_bytes()) for file in sorted(photographs.rglob("*.JPEG"))[::3])
