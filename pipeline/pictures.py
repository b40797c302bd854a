"""Pictures of an evaluation: the worst and the best images, each with an error map and a zoomed crop."""

import hashlib
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.benchmark import BenchmarkImage, baseline, read_pair, upscale_bicubic
from pipeline.evaluate import ImageResult, Judged

_LABEL_PX, _GAP_PX = 14, 4
_MOST_PX = 384  # of the large panels
_ZOOM, _ZOOM_PX = 4, 96  # the crop: this many pixels a side, shown this many times larger
_MOST_NAME_BYTES = 200  # file systems take 255
_ERROR_GAIN = 4  # error maps show differences of 64 levels as full


def write_pictures(judged: Judged, images: list[BenchmarkImage], count: int, folder: Path) -> dict[str, Path]:
    """Sheets of the `count` worst and best images by gain over bicubic, as files below `folder`; by artifact name."""
    result, files = judged.result, {}
    by_name = {image.name: image for image in images}
    for rank, found in chosen(result.images, count):
        pair = read_pair(by_name[found.image], result.scale)
        panels = {
            f"{baseline(result.scale)} {found.bicubic_psnr_y:.2f} dB": upscale_bicubic(pair.low_res, result.scale),
            f"{result.model} {found.psnr_y:.2f} dB": judged.upscaled[found.image](),
            f"{found.image} (truth)": pair.high_res,
        }
        name = file_name(f"{result.set}-x{result.scale}-{result.model}-{rank}-{found.image}", ".png")
        sheet(panels).save(folder / name)
        files[f"pictures/{name}"] = folder / name
    return files


def file_name(name: str, suffix: str) -> str:
    """A name that every file system and artifact store takes; one that is too long ends in its hash."""
    plain = re.sub(r"[/\\]", "_", name)
    if len(plain.encode()) > _MOST_NAME_BYTES:
        kept = plain.encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
        plain = f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return plain + suffix


def chosen(images: tuple[ImageResult, ...], count: int) -> list[tuple[str, ImageResult]]:
    """("worst-1" ..., result) and ("best-1" ..., result): least and most gain in PSNR-Y; no image twice."""
    ordered = sorted(images, key=lambda image: (image.psnr_y - image.bicubic_psnr_y, image.image))
    worst = ordered[:count]
    best = [image for image in reversed(ordered) if image not in worst][:count]
    return [(f"worst-{n}", image) for n, image in enumerate(worst, 1)] + [
        (f"best-{n}", image) for n, image in enumerate(best, 1)
    ]


def sheet(panels: dict[str, np.ndarray]) -> Image.Image:
    """Captions -> images of equal size, the truth last: a row of images, one of zoomed crops, one of error maps.

    The crop lies where the second panel differs most from the truth.
    """
    images = list(panels.values())
    truth, model = images[-1], images[1]
    top, left = most_different(model, truth, _ZOOM_PX)
    zoomed = [_enlarged(image[top : top + _ZOOM_PX, left : left + _ZOOM_PX]) for image in images]
    errors = [error_map(image, truth) for image in images[:-1]]
    rows = [
        [(caption, _middle(image)) for caption, image in panels.items()],
        [(f"{_ZOOM} x, at {left}, {top}", crop) for crop in zoomed],
        [(f"error x {_ERROR_GAIN}", _middle(error)) for error in errors],
    ]
    return _laid_out(rows)


def error_map(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute difference of the channels, amplified, as gray uint8 HxWx3."""
    difference = np.abs(image.astype(np.int16) - truth).mean(axis=2) * _ERROR_GAIN
    return np.repeat(np.clip(difference, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def most_different(image: np.ndarray, truth: np.ndarray, side_px: int) -> tuple[int, int]:
    """(top, left) of the square, on a grid of half its side, where squared differences are largest."""
    error = ((image.astype(np.float64) - truth) ** 2).sum(axis=2)
    sums = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = error.shape
    places = [
        (top, left)
        for top in range(0, max(height - side_px, 0) + 1, side_px // 2)
        for left in range(0, max(width - side_px, 0) + 1, side_px // 2)
    ]

    def inside(place: tuple[int, int]) -> float:
        top, left = place
        bottom, right = min(top + side_px, height), min(left + side_px, width)
        return float(sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left])

    return max(places, key=inside)


def _middle(image: np.ndarray) -> Image.Image:
    top, left = (max(0, (side - _MOST_PX) // 2) for side in image.shape[:2])
    return Image.fromarray(np.ascontiguousarray(image[top : top + _MOST_PX, left : left + _MOST_PX]))


def _enlarged(image: np.ndarray) -> Image.Image:
    height, width = image.shape[:2]
    whole = Image.fromarray(np.ascontiguousarray(image))
    return whole.resize((width * _ZOOM, height * _ZOOM), Image.Resampling.NEAREST)


def _laid_out(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of captioned panels on white."""
    widths = [sum(panel.width + _GAP_PX for _, panel in row) for row in rows]
    heights = [max(panel.height for _, panel in row) + _LABEL_PX + _GAP_PX for row in rows]
    made = Image.new("RGB", (max(widths), sum(heights)), "white")
    draw = ImageDraw.Draw(made)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for caption, panel in row:
            draw.text((x + 2, y + 1), caption, fill="black")
            made.paste(panel, (x, y + _LABEL_PX))
            x += panel.width + _GAP_PX
        y += height
    return made
