"""Odd JPEG files: the pixels are Pillow's or the file is left to Pillow, and what changes no pixel is no damage."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep import jpeg, jpeg_header
from data_prep.image import Box, Picture, check, decode, whole
from data_prep.jpeg_markers import END, segments
from data_prep.jpeg_scans import is_whole
from tests.unit.data_prep import odd_jpegs
from tests.unit.data_prep.odd_files import encoded, photograph
from tests.unit.data_prep.odd_jpegs import HARMLESS, MUTATIONS, pillows, segment

SMALL = photograph(40, 56)


def mutated(seed):
    """(the file, the names of what was done to it, the sound file it was made of)"""
    random = np.random.default_rng(seed)
    base = data = odd_jpegs.source(random)
    names = [list(MUTATIONS)[number] for number in random.integers(len(MUTATIONS), size=random.integers(1, 3))]
    for name in names:
        if len(list(segments(data))) > 1:
            data = MUTATIONS[name](data, random)
    return data, names, base


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_a_mutated_file_is_read_as_pillow_reads_it_or_refused(start):
    for seed in range(start, start + 100):
        data, names, base = mutated(seed)
        reference, header = pillows(data), jpeg_header.parse(data)
        if header and header.height * header.width < 10**6:
            region = jpeg.region(data, header, 0, 0, header.height, header.width)
            if region is not None and reference is not None:
                np.testing.assert_array_equal(region.transpose(1, 2, 0), reference, err_msg=f"{seed} {names}")
        try:
            height, width, seek, _, by_pillow = check(data)
        except ValueError:
            assert not set(names) <= set(HARMLESS[:3]), (seed, names)
            continue
        assert not by_pillow, (seed, names)
        pixels = decode(data)
        assert pixels.shape[:2] == (height, width), (seed, names)
        np.testing.assert_array_equal(Picture(data, seek).region(Box(0, 0, height, width)).transpose(1, 2, 0), pixels)
        if reference is not None:
            np.testing.assert_array_equal(pixels, reference, err_msg=f"{seed} {names}")
        if set(names) <= set(HARMLESS):
            np.testing.assert_array_equal(pixels, pillows(base), err_msg=f"{seed} {names}")


def kinds():
    """Name -> a file whose pixels are those of SMALL as JPEG has them, or of another file that is told beside it."""
    plain, progressive = encoded(SMALL), encoded(SMALL, progressive=True)
    restarts, random = encoded(SMALL, restart_marker_blocks=2), np.random.default_rng(0)
    hidden = segment(0xC0, b"\x08\xff\xff\xff\xff\xff" + bytes(255 * 3))
    ends = {
        b"": "no end",
        b"\xff": "half an end",
        b"\0\0\xff\xd9": "zeros",
        b" " * 40 + END: "blanks",
        b"\1\2\3" + END: "three",
    }
    return {
        **{
            f"{name} behind {kind}": (data[:-2] + end, data)
            for end, name in ends.items()
            for kind, data in (("baseline", plain), ("progressive", progressive), ("restarts", restarts))
        },
        "fill bytes before restarts": (odd_jpegs.fill_before_restarts(restarts, random), restarts),
        "a restart marker in the end": (
            restarts[:-2] + b"\xff\xd5" + END,
            restarts,
        ),
        "a restart marker before the frame": (
            progressive[:2] + b"\xff\xd0\x00\x06\xff\xe1" + (len(hidden) + 2).to_bytes(2) + hidden + progressive[2:],
            progressive,
        ),
        "two EXIF segments": (
            plain[:2] + segment(0xE1, b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0") + plain[2:],
            plain,
        ),
        "16-bit quantizers": (odd_jpegs.wide_quantizers(plain), plain),
        "a scan for each component": (odd_jpegs.separate(), None),
        "a comment behind the scan": (plain[:-2] + segment(0xFE, b"text") + END, plain),
    }


KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
def test_files_whose_blocks_are_all_there_are_sound_and_have_their_pixels(name):
    data, same_as = KINDS[name]
    expected = pillows(same_as or data)
    height, width, seek, num_pictures, _ = check(data)
    assert (height, width, num_pictures) == (40, 56, 1)
    assert whole(data).startswith(data)
    assert is_whole(data) is True
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(pillows(whole(data)), expected)
    region = Picture(data, seek).region(Box(3, 5, 30, 40)).transpose(1, 2, 0)
    np.testing.assert_array_equal(region, expected[3:33, 5:45])


@pytest.mark.parametrize("transform", [0, 1, 2])
@pytest.mark.parametrize("adobe_bytes", [11, 12])
@pytest.mark.parametrize("jfif_bytes", [0, 10, 13, 14])
@pytest.mark.parametrize("ids", [b"\1\2\3", b"RGB", b"\0\1\2"])
def test_colours_are_decided_as_libjpeg_decides_them(ids, jfif_bytes, adobe_bytes, transform):
    data = encoded(SMALL, keep_rgb=True)
    frame, scan = (next(part for part in segments(data) if part.marker == marker) for marker in (0xC0, 0xDA))
    out = bytearray(data)
    for number, name in enumerate(ids):
        out[frame.start + 6 + 3 * number] = out[scan.start + 1 + 2 * number] = name
    kept = b"".join(out[part.at : part.stop] for part in segments(data) if part.marker not in (0xE0, 0xEE, 0xDA, 0xD9))
    jfif = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"[:jfif_bytes]) if jfif_bytes else b""
    adobe = segment(0xEE, (b"Adobe\0\x64\0\0\0\0" + bytes((transform,)))[:adobe_bytes])
    made = b"\xff\xd8" + jfif + adobe + kept + bytes(out[scan.at :])
    expected = pillows(made)
    region = Picture(made).region(Box(0, 0, 40, 56)).transpose(1, 2, 0)
    np.testing.assert_array_equal(region, expected)


def with_size(data, height, width):
    frame = next(part for part in segments(data) if part.marker in (0xC0, 0xC2))
    return data[: frame.start + 1] + height.to_bytes(2) + width.to_bytes(2) + data[frame.start + 5 :]


@pytest.mark.parametrize("kind", ["baseline", "progressive", "PNG"])
def test_a_file_of_more_pixels_than_are_read_is_refused_before_they_are_decoded(kind):
    if kind == "PNG":
        file = io.BytesIO()
        Image.new("1", (26000, 12000)).save(file, "PNG")
        data = file.getvalue()
    else:
        data = with_size(encoded(SMALL, progressive=kind == "progressive"), 12000, 26000)
    for read in (check, decode):
        with pytest.raises(ValueError, match="has more pixels than max_pixels=178956970: cut it into parts"):
            read(data)


def test_a_complete_file_of_too_many_pixels_is_refused():
    """Every block is there: it passed all checks, and a loader died of it."""
    small = encoded(Image.new("L", (16, 16), 128))
    begin = next(part for part in segments(small) if part.marker == 0xDA).stop
    blocks = 12000 // 8 * (26000 // 8)
    data = with_size(small[:begin], 12000, 26000) + b"\x28\xa2\x8a" * (blocks // 4) + END
    with pytest.raises(ValueError, match="has more pixels than max_pixels"):
        check(data)


def test_a_frame_that_is_hidden_in_another_segment_takes_no_memory():
    data, _ = KINDS["a restart marker before the frame"]
    assert is_whole(data) is True
    huge = with_size(encoded(SMALL, progressive=True), 65535, 65535)
    assert is_whole(huge) is not True


@pytest.mark.parametrize("name", ["all ones", "a first coefficient's size", "its number"])
def test_tables_that_libjpeg_refuses_are_left_to_pillow(name):
    data = encoded(photograph(40, 56).convert("L"))
    table = next(part for part in segments(data) if part.marker == 0xC4)
    out = bytearray(data)
    if name == "its number":
        out = bytearray(data[: table.at] + segment(0xC4, b"\x05" + bytes(16)) + data[table.at :])
    elif name == "all ones":  # a thirteenth code, the last one of nine bits is moved to eight
        counts = out[table.start + 1 : table.start + 17]
        last = max(length for length, count in enumerate(counts) if count)
        out[table.start + 1 + last] += 1
        out[table.start - 2 : table.start] = (table.stop - table.start + 3).to_bytes(2)
        out.insert(table.stop, 11)
    else:
        out[table.stop - 1] = 0x1B
    data = bytes(out)
    assert pillows(data) is None
    header = jpeg_header.parse(data)
    assert header is None or jpeg.region(data, header, 0, 0, 40, 56) is None
    with pytest.raises(ValueError, match="cannot be decoded"):
        check(data)


def test_a_cut_file_is_damaged_with_and_without_an_end_marker():
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        data = encoded(photograph(96, 120), quality=95, **options)
        begin = next(part for part in segments(data) if part.marker == 0xDA).stop
        for cut in range(begin, len(data) - 3, 113):
            filled = data[:cut] + bytes(len(data) - cut)
            for damaged in (data[:cut], data[:cut] + END, filled, filled[:-2] + END):
                with pytest.raises(ValueError, match="damaged or cut off"):
                    whole(damaged)
