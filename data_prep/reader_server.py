"""What the server that worker processes are forked from has ready: the loader, and the compiled loops, once used.

Compilers and machine code take 100 MB and a second, descriptions of S3 12 MB; what is there before the fork is shared.
Importing this is enough.
"""

import contextlib
import gc
import io

import numpy as np
from PIL import Image

from data_prep import (
    loader,  # noqa: F401 -- what the workers run
    s3,
)
from data_prep.image import Picture, check
from data_prep.pairs import PairSettings, make_pair

_SIDE_PX = 160  # more than one seek point's distance


def _use_compiled_loops() -> None:
    """Decode and shrink crops of a small JPEG, in colour and gray, as a reader does."""
    pixels = np.arange(_SIDE_PX * _SIDE_PX * 3, dtype=np.uint32).reshape(_SIDE_PX, _SIDE_PX, 3).astype(np.uint8)
    for mode, rounding in (("RGB", "float"), ("L", "uint8")):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, "JPEG")
        data = file.getvalue()
        for seek in (b"", check(data).seek):
            make_pair(Picture(data, seek), "", 0, PairSettings(scale=2, patch_px=8, rounding=rounding))


with contextlib.suppress(Exception):  # what is wrong is told by the worker that needs it: here it would end the server
    _use_compiled_loops()
with contextlib.suppress(Exception):
    s3.descriptions()
gc.collect()
gc.freeze()  # else the collector's first pass writes to every shared page
