"""What people send to a served model, as pixels, and the answer in the kind that they sent.

Taken is what cannot be mistaken: arrays of uint8 (also whole numbers in 0..255), of uint16, of floats in 0..1 or in
0..255, each (H, W), (H, W, C) or (B, H, W, C) with 1, 3 or 4 channels; PNG and JPEG files as bytes or in base64; lists
of these; and a table of one column, or a mapping of one entry, that holds them. All else is refused in one line.

Axes: B batch, H height, W width, C channels.
"""

import base64
import binascii
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.picture import read_picture, write_picture

Pixels = NDArray[Any]
Enlarge = Callable[[Pixels], Pixels]
"""One image (H, W) or (H, W, C), uint8 or uint16, to its result of the same type."""
CHANNELS = (1, 3, 4)
"""Last axes that are taken for channels: gray, RGB, RGB and alpha."""
SIGNATURES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
"""How files begin, and the endings that name their kinds."""
DATA_URL = re.compile(r"data:[\w/+.-]*;base64,")
BRIGHTER_THAN_1 = 2.0
"""From here on floats cannot be meant for 0..1, which filters overshoot by a little."""


class RefusedError(ValueError):
    """What was sent is not an image, or may mean several: one line that says what is taken."""


def answer(asked: Any, enlarge: Enlarge) -> Any:
    """What `enlarge` makes of every image in what was asked, in the same kind.

    An array gives an array of the same type and number of axes, a file the same kind of file, base64 base64 (text),
    several images in a list, table or array of objects a list. Floats are worked on as 16 bits.
    RefusedError for everything that the module does not name.
    """
    asked = _unpacked(asked)
    if isinstance(asked, str | bytes):
        return _file_answer(asked, enlarge, "the image")
    if isinstance(asked, Sequence):
        return _each(asked, enlarge)
    return _array_answer(asked, enlarge, "the images")


def _unpacked(asked: Any) -> Any:
    """Text, bytes, an array of numbers, or a list of images; tables and mappings give what they hold."""
    if hasattr(asked, "columns") and hasattr(asked, "iloc"):
        if len(asked.columns) != 1:
            raise RefusedError(f"a table must have one column, of images: this one has {len(asked.columns)}")
        return list(asked.iloc[:, 0])
    if isinstance(asked, Mapping):
        if len(asked) != 1:
            raise RefusedError(f"one entry must hold the images: there are {len(asked)} ({_shown(asked)})")
        return _unpacked(next(iter(asked.values())))
    if isinstance(asked, np.ndarray) and asked.dtype.kind in "USO":
        return _unpacked(asked.item()) if asked.ndim == 0 else asked.tolist()
    if isinstance(asked, list | tuple) and not any(isinstance(entry, str | bytes | Mapping) for entry in asked):
        return _stacked(asked)
    return asked


def _shown(names: Mapping[Any, Any]) -> str:
    text = ", ".join(str(name) for name in names)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _stacked(asked: Sequence[Any]) -> Any:
    """Nested lists of numbers as an array; what are arrays already, or lists of unequal sizes, one by one."""
    if not len(asked) or isinstance(asked[0], np.ndarray):
        return asked
    try:
        return np.array(asked)
    except ValueError:
        return [np.array(entry) if _is_even(entry) else entry for entry in asked]


def _is_even(entry: Any) -> bool:
    try:
        np.array(entry)
    except ValueError:
        return False
    return True


def _each(asked: Sequence[Any], enlarge: Enlarge) -> list[Any]:
    """A list of images of any sizes and kinds, one by one."""
    if not len(asked):
        raise RefusedError("there are no images")
    answers: list[Any] = []
    for number, entry in enumerate(asked, start=1):
        image = _unpacked(entry)
        name = f"image {number}"
        if isinstance(image, str | bytes):
            answers.append(_file_answer(image, enlarge, name))
        elif isinstance(image, np.ndarray | np.number) and np.ndim(image) < 4:
            answers.append(_array_answer(image, enlarge, name))
        else:
            raise RefusedError(f"{name} is a {type(image).__name__}, not one image: {TAKEN}")
    return answers


TAKEN = (
    "send arrays (H, W), (H, W, C) or (B, H, W, C) of 0..255 or of floats in 0..1, or PNG or JPEG files in base64; "
    "images of several sizes in base64 or as a table of one column"
)


def _array_answer(asked: Any, enlarge: Enlarge, name: str) -> Pixels:
    """One array of numbers, of one image or several of one size."""
    array = np.asarray(asked)
    is_batch = array.ndim == 4
    if array.dtype.kind not in "uif":
        raise RefusedError(f"{name}: values of type {array.dtype} are no pixels: {TAKEN}")
    if not (array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in CHANNELS)) or not array.size:
        first = array.ndim in (3, 4) and array.shape[-3] in CHANNELS
        remedy = "put the channels last" if first else TAKEN
        raise RefusedError(f"{name}: shape {array.shape} is not of one or several images: {remedy}")
    levels, as_sent = _levels(array, name)
    results = [enlarge(image) for image in (levels if is_batch else levels[None])]
    return as_sent(np.stack(results) if is_batch else results[0])


def _levels(array: Pixels, name: str) -> tuple[Pixels, Callable[[Pixels], Pixels]]:
    """An array as uint8 or uint16, and what turns such a result into numbers like those of the array."""
    least, most = array.min(), array.max()
    if not (np.isfinite(least) and np.isfinite(most) and least >= 0):
        raise RefusedError(f"{name}: values from {least:g} to {most:g}: send 0..255, or floats in 0..1")
    if array.dtype in (np.uint8, np.uint16):
        return array, lambda result: result
    if array.dtype.kind in "ui":
        if most > 255 or most == 1:
            why = "16 bits come as uint16 or PNG" if most > 255 else "is 1 white, or nearly black? Send 0..255, or 1.0"
            raise RefusedError(f"{name}: whole numbers from {least} to {most}: {why}")
        return array.astype(np.uint8), lambda result: result
    if 1 < most < BRIGHTER_THAN_1 or most > 255:
        raise RefusedError(f"{name}: floats from {least:g} to {most:g}: clip them to 0..1 or to 0..255")
    step = 65535 if most <= 1 else 257
    levels = np.rint(array.astype(np.float64) * step).astype(np.uint16)
    return levels, lambda result: (result / step).astype(array.dtype)


def _file_answer(asked: str | bytes, enlarge: Enlarge, name: str) -> str | bytes:
    """A PNG or JPEG file: bytes for bytes, base64 for base64."""
    if isinstance(asked, bytes) and _suffix(asked):
        return _enlarged_file(asked, enlarge, name)
    text = asked if isinstance(asked, str) else asked.decode("ascii", "replace")
    prefix = DATA_URL.match(text)
    try:
        data = base64.b64decode("".join(text[prefix.end() if prefix else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not _suffix(data):
        raise RefusedError(f"{name} is no PNG or JPEG file in base64: {TAKEN}")
    encoded = base64.b64encode(_enlarged_file(data, enlarge, name)).decode()
    result = f"{prefix[0] if prefix else ''}{encoded}"
    return result if isinstance(asked, str) else result.encode()


def _suffix(data: bytes) -> str | None:
    """The ending that names a file's kind; None where it is not one of those taken."""
    return next((suffix for signature, suffix in SIGNATURES.items() if data.startswith(signature)), None)


def _enlarged_file(data: bytes, enlarge: Enlarge, name: str) -> bytes:
    """A file of the same kind as `data` with the result."""
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        path = Path(folder, f"image{_suffix(data)}")
        path.write_bytes(data)
        try:
            picture = read_picture(path)
            write_picture(path, replace(picture, pixels=enlarge(picture.pixels)))
        except ValueError as error:
            raise RefusedError(" ".join(str(error).replace(str(path), name).split())) from error
        return path.read_bytes()
