"""Files of the kinds that real data sets hold, made on the spot."""

import io
import tarfile

import numpy as np
from PIL import Image


def photograph(height=96, width=120, seed=0):
    """Smooth colours with some noise: a PIL image."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + random.integers(-12, 13, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tar_of(files):
    """A tar of files: name -> bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            header.mtime = 1
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def with_orientation(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(photograph(), exif=exif)


def good_files():
    """Name -> bytes of odd files that are good."""
    return {
        "cmyk.JPEG": encoded(photograph(seed=1).convert("CMYK")),
        "gray.JPEG": encoded(photograph(seed=2).convert("L")),
        "png called.JPEG": encoded(photograph(seed=3), "PNG"),
        "exif.JPEG": with_orientation(6),
        "progressive.JPEG": encoded(photograph(seed=4), progressive=True),
        "progressive cmyk.JPEG": encoded(photograph(seed=9).convert("CMYK"), progressive=True),
        "restart.JPEG": encoded(photograph(seed=5), restart_marker_blocks=3),
        "palette.png": encoded(photograph(seed=6).convert("P"), "PNG"),
        "bytes behind the end.JPEG": encoded(photograph(seed=7)) + b"trailing bytes \xff\xd8",
    }


def zeros_before_the_end(data):
    """The second half zeros, all but the end marker."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2 - 2) + data[-2:]


def bad_files():
    """Name -> (bytes, what the reason says)."""
    whole = encoded(photograph(seed=8), quality=95)
    progressive = encoded(photograph(seed=8), quality=95, progressive=True)
    cmyk = encoded(photograph(seed=8).convert("CMYK"), quality=95)
    return {
        "cut tail.JPEG": (whole[: len(whole) * 2 // 3], "damaged or cut off"),
        "cut tail, closed.JPEG": (whole[: len(whole) * 2 // 3] + b"\xff\xd9", "damaged or cut off"),
        "zeros at the end.JPEG": (whole[: len(whole) * 2 // 3] + bytes(len(whole) // 3), "damaged or cut off"),
        "cut progressive.JPEG": (encoded(photograph(), progressive=True)[:-400], "damaged or cut off"),
        "cut progressive, closed.JPEG": (progressive[: len(progressive) * 2 // 3] + b"\xff\xd9", "damaged or cut off"),
        "short progressive, closed.JPEG": (progressive[:-40] + b"\xff\xd9", "damaged or cut off"),
        "zeros in a progressive.JPEG": (zeros_before_the_end(progressive), "damaged or cut off"),
        "cut cmyk, closed.JPEG": (cmyk[: len(cmyk) * 2 // 3] + b"\xff\xd9", "damaged or cut off"),
        "zeros in a cmyk.JPEG": (zeros_before_the_end(cmyk), "damaged or cut off"),
        "cut.png": (encoded(photograph(), "PNG")[:-200], "cannot be decoded"),
        "text.JPEG": (b"this is no image", "cannot be decoded"),
        "empty.JPEG": (b"", "cannot be decoded"),
        "small.JPEG": (encoded(photograph(40, 80)), "80x40 pixels: a side is below min_side_px=64"),
    }
