"""Images of two domains that differ from photographs: pages of text and charts, drawn here, the same for a seed."""

import random
import statistics
import tempfile
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from PIL import Image, ImageDraw, ImageFont

from pipeline import registry
from pipeline.benchmark import Protocol, read_set
from pipeline.evaluate import judge, load_bytes

_TEXT = (
    "the of and a to in is was he for it with as his on be at by had not are but from or have an they "
    "which one you were her all she there would their we him been has when who will more no if out so "
    "said what up its about into than them can only other new some could time these two may then do first "
    "any my now such like our over man me even most made after also did many before must through back "
    "years where much your way well down should because "
)


def text_page(seed: int, side_px: int = 320) -> Image.Image:
    """A page of sentences in one of several sizes and shades."""
    draw_from, words = random.Random(seed), _TEXT.split()
    paper, ink = draw_from.randint(215, 255), draw_from.randint(0, 70)
    page = Image.new("RGB", (side_px, side_px), (paper, paper, max(0, paper - draw_from.randint(0, 25))))
    draw = ImageDraw.Draw(page)
    y = 6
    while y < side_px - 10:
        size = draw_from.choice((9, 10, 11, 12, 14, 18))
        line = " ".join(draw_from.choice(words) for _ in range(14))
        draw.text((draw_from.randint(4, 16), y), line, fill=(ink, ink, ink), font=ImageFont.load_default(size))
        y += size + draw_from.randint(3, 7)
    return page


def chart(seed: int, side_px: int = 320) -> Image.Image:
    """A chart: axes, ticks with numbers, a few lines or bars in strong colours."""
    draw_from = random.Random(seed)
    page = Image.new("RGB", (side_px, side_px), "white")
    draw = ImageDraw.Draw(page)
    left, bottom = 40, side_px - 30
    for tick in range(8):
        y, x = bottom - tick * (bottom - 20) // 8, left + tick * (side_px - left - 10) // 8
        draw.line((left - 4, y, side_px - 8, y), fill=(215, 215, 215))
        draw.text((6, y - 6), f"{tick * draw_from.randint(2, 99)}", fill="black", font=ImageFont.load_default(11))
        draw.text((x, bottom + 6), f"{2000 + tick}", fill="black", font=ImageFont.load_default(10))
    for _ in range(draw_from.randint(2, 5)):
        colour = tuple(draw_from.randint(0, 200) for _ in range(3))
        if draw_from.random() < 0.5:
            points = [(left + 9 * n, draw_from.randint(20, bottom)) for n in range(29)]
            draw.line(points, fill=colour, width=draw_from.randint(1, 3))
        else:
            for n in range(12):
                x = left + 22 * n + draw_from.randint(0, 8)
                draw.rectangle((x, draw_from.randint(20, bottom), x + 8, bottom), fill=colour, outline="black")
    draw.line((left, 10, left, bottom, side_px - 8, bottom), fill="black", width=2)
    return page


DRAWN = {"text": text_page, "charts": chart}


def let_arrive(domain: str, folder: Path, seeds: range) -> None:
    """Images of a domain as PNG files that were not there before."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        DRAWN[domain](seed).save(folder / f"{domain}-{seed:05}.png")


def mean_psnr_y(version: ModelVersion, uri: str, scale: int = 2) -> float:
    """A registered version on a set, judged here and now, in dB."""
    with tempfile.TemporaryDirectory() as folder:
        network = load_bytes(*registry.read_weights(version, Path(folder)))
    return statistics.fmean(judge(image, scale, network, Protocol())[0].psnr_y for image in read_set(uri, scale))
