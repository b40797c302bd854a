"""Two models on the same images: the mean difference and its bootstrap interval, image by image.

Images differ much more from one another than models do, so figures are paired: the difference is taken on each image
first. Images are matched by content, not by name. The interval is the percentile bootstrap's (Efron 1979) over images,
seeded; on five images it is rough, and on one it is a point.
"""

import numpy as np

from model.metrics import RESOLVED_DB
from pipeline.evaluate import SetResult
from pipeline.rule import Metric
from pipeline.settings import Settings

RESAMPLES = 10_000
SEED = 20_240_501


class Comparison(Settings):
    """One model less another on one set, in the metric's unit; `low` and `high` are the interval's ends."""

    set: str
    metric: str
    images: int
    mine: float
    theirs: float
    rival: str
    difference: float
    low: float
    high: float
    confidence: float


def compare(mine: SetResult, theirs: SetResult, metric: Metric = "psnr_y", confidence: float = 0.95) -> Comparison:
    """`mine` less `theirs`. ValueError where they judge different images, scales, or lack the metric."""
    others = {image.digest: image for image in theirs.images}
    unpaired = {image.digest for image in mine.images} ^ set(others)
    if unpaired or mine.scale != theirs.scale:
        raise ValueError(
            f"{mine.set}: {mine.model} (x{mine.scale}, {len(mine.images)} images) and {theirs.model} "
            f"(x{theirs.scale}, {len(theirs.images)} images) were not judged on the same images: "
            f"judge both on the same set"
        )
    pairs = [(image, others[image.digest]) for image in mine.images]
    a, b = ([_figure(pair[side], metric, mine.set) for pair in pairs] for side in (0, 1))
    return _comparison(mine.set, metric, a, b, theirs.model, confidence)


def against_bicubic(mine: SetResult, metric: Metric = "psnr_y", confidence: float = 0.95) -> Comparison:
    """A model less bicubic interpolation of the same images. ValueError where the metric is missing."""
    a = [_figure(image, metric, mine.set) for image in mine.images]
    b = [_figure(image, f"bicubic_{metric}", mine.set) for image in mine.images]
    return _comparison(mine.set, metric, a, b, "bicubic", confidence)


def _figure(image: object, key: str, name: str) -> float:
    value = getattr(image, key)
    if value is None:
        raise ValueError(f"{name} was judged without {key}: judge it again with that metric switched on")
    return float(value)


def _comparison(
    name: str, metric: str, mine: list[float], theirs: list[float], rival: str, confidence: float
) -> Comparison:
    # reports of earlier versions may hold more than uint8 resolves; SSIM never reaches it
    a, b = (np.minimum(np.array(values, np.float64), RESOLVED_DB) for values in (mine, theirs))
    low, high = bootstrap_interval(a - b, confidence)
    return Comparison(
        set=name,
        metric=metric,
        images=len(mine),
        mine=float(a.mean()),
        theirs=float(b.mean()),
        rival=rival,
        difference=float((a - b).mean()),
        low=low,
        high=high,
        confidence=confidence,
    )


def bootstrap_interval(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of the mean of (n,) differences; the same for the same values and order."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    n = len(differences)
    means = np.concatenate(
        [differences[generator.integers(0, n, (RESAMPLES // 10, n))].mean(axis=1) for _ in range(10)]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
