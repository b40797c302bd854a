"""Whole and damaged JPEG files of every Huffman-coded kind: what passes, what is found."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_prep.jpeg_markers import segments
from data_prep.jpeg_scans import is_whole
from tests.unit.data_prep.odd_files import encoded, photograph
from tests.unit.data_prep.odd_jpegs import pillows, segment

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


def with_segment(data, marker, change):
    """The file with the body of its first segment of a kind changed."""
    part = next(part for part in segments(data) if part.marker == marker)
    return data[: part.at] + segment(marker, change(data[part.start : part.stop])) + data[part.stop :]


CHANGES = {
    "a table's number": (0xC4, lambda body: bytes((body[0] & 0x10 | 7,)) + body[1:]),
    "a table's class": (0xC4, lambda body: bytes((body[0] | 0x20,)) + body[1:]),
    "a table that is too short": (0xC4, lambda body: body[:-1]),
    "a table that is too long": (0xC4, lambda body: body + b"\0"),
    "a frame that is too long": (0xC2, lambda body: body + b"\0"),
    "a scan that is too long": (0xDA, lambda body: body + b"\0"),
    "a restart interval of four bytes": (0xDD, lambda body: body + b"\0\0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_segments_whose_length_or_number_libjpeg_refuses_are_not_sound(name):
    data = with_segment(made("progressive, restarts"), *CHANGES[name])
    assert pillows(data) is None
    assert not is_whole(data)


def test_a_frame_of_more_blocks_than_the_file_has_bits_takes_no_memory():
    """2.8 kB made it ask for gigabytes."""
    small = encoded(photograph(16, 16), progressive=True)
    sides = (16384).to_bytes(2) + (32768).to_bytes(2)
    huge = with_segment(
        small, 0xC2, lambda body: body[:1] + sides + body[5:7] + b"\x44" + body[8:10] + b"\x44" + body[11:]
    )
    tracemalloc.start()
    try:
        assert is_whole(huge) is False
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
