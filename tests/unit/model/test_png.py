"""PNG files with much beside their pixels."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from model import png
from model.picture import Outline, Picture, read_outline, read_picture, write_picture

LEVELS = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(kind: bytes, content: bytes, at_end: bool = False, deep: bool = False) -> bytes:
    file = io.BytesIO()
    Image.fromarray(LEVELS).save(file, "PNG")
    data = bytes(imagecodecs.png_encode(LEVELS.astype(np.uint16) * 257)) if deep else file.getvalue()
    place = len(data) - 12 if at_end else png.HEADER_END
    return data[:place] + chunk(kind, content) + data[place:]


LONG = {
    "zTXt": (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 2_000_000)),
    "tEXt": (b"tEXt", b"Comment\0" + b"a" * 68_000_000),
    "iTXt": (b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(b"a" * 2_000_000)),
    "iCCP": (b"iCCP", b"x\0\0" + zlib.compress(bytes(16) + b"RGB " + bytes(3_000_000))),
    "bomb": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(200_000_000), 1)),
    "cut": (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 2_000_000)[:100]),
}


@pytest.mark.parametrize(("at_end", "deep"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", LONG)
def test_texts_are_no_fault_of_the_pixels(name: str, at_end: bool, deep: bool, tmp_path: Path) -> None:
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    (tmp_path / "a.png").write_bytes(with_chunk(*LONG[name], at_end, deep))
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, LEVELS.astype(np.uint16) * 257 if deep else LEVELS)
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)
    assert picture.metadata.lost == (("EXIF",) if name == "bomb" else ())
    assert read_outline(tmp_path / "a.png") == Outline((7, 9), deep, False)
    if name == "iCCP":
        assert picture.profile is not None
        assert len(picture.profile) == 3_000_020


def test_raw_profiles_of_other_programs_are_read(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x010F] = "Maker"
    tags[0x0112] = 6
    block = tags.tobytes()
    for number, content in enumerate(
        (
            b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(block) + block.hex().encode()),
            b"Raw profile type APP1\0\0" + zlib.compress(b"\ngeneric\n%8d\n" % len(block) + block.hex().encode()),
        )
    ):
        (tmp_path / "a.png").write_bytes(with_chunk(b"zTXt", content))
        picture = read_picture(tmp_path / "a.png")
        assert picture.pixels.shape == (9, 7, 3)
        write_picture(tmp_path / f"{number}.jpg", picture)
        assert Image.open(tmp_path / f"{number}.jpg").getexif()[0x010F] == "Maker"


def test_a_damaged_text_is_passed_over_and_damaged_pixels_are_not(tmp_path: Path) -> None:
    data = with_chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0\0\0\0\0")
    at = data.index(b"eXIf")
    (tmp_path / "a.png").write_bytes(data[: at + 6] + b"\xff" + data[at + 7 :])
    assert read_picture(tmp_path / "a.png").metadata.lost == ("EXIF",)
    at = data.index(b"IDAT")
    (tmp_path / "a.png").write_bytes(data[: at + 20] + bytes([data[at + 20] ^ 255]) + data[at + 21 :])
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(tmp_path / "a.png")


def saved(path: Path, mode: str, **options: object) -> None:
    image = Image.fromarray(LEVELS).convert("P" if mode == "P" else "L" if mode in "1L" else "RGB")
    image = image.convert(mode) if mode in ("1", "LA", "RGBA", "CMYK") else image
    image.save(path, **options)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        *(("a.png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("a.png", mode, {"transparency": 5}) for mode in ("L", "P")),
        *(("a.tif", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "CMYK")),
        *(("a.webp", mode, {}) for mode in ("RGB", "RGBA")),
        *(("a.jpg", mode, {}) for mode in ("L", "RGB", "CMYK")),
        ("a.bmp", "RGB", {}),
    ],
)
def test_an_outline_says_what_the_pixels_are(name: str, mode: str, options: dict[str, object], tmp_path: Path) -> None:
    saved(tmp_path / name, mode, **options)
    pixels = read_picture(tmp_path / name).pixels
    assert read_outline(tmp_path / name) == Outline((7, 9), False, pixels.shape[2] in (2, 4))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_an_outline_says_16_bits(channels: int, suffix: str, tmp_path: Path) -> None:
    write_picture(tmp_path / f"a{suffix}", Picture(np.zeros((7, 9, channels), np.uint16)))
    assert read_outline(tmp_path / f"a{suffix}") == Outline((7, 9), True, channels in (2, 4))


def test_outlines_of_no_images_are_named(tmp_path: Path) -> None:
    for content in (b"", b"no image", png.SIGNATURE, b"II*\0", b"\xff\xd8\xff"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png cannot be read"):
            read_outline(tmp_path / "a.png")
