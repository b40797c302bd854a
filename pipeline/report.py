"""Evaluation results as tables, CSV and JSON. Only formats; computes nothing but differences."""

import csv
import io
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pipeline import published
from pipeline.compare import Comparison
from pipeline.evaluate import ImageResult, SetResult
from pipeline.settings import Settings

_MORE = {"psnr_rgb": "PSNR-RGB", "lpips": "LPIPS", "dists": "DISTS"}
_FIGURES = tuple(f"{who}{metric}" for who in ("", "bicubic_") for metric in ("psnr_y", "ssim_y", *_MORE))


def table(results: list[SetResult]) -> Table:
    """PSNR-Y (dB) and SSIM-Y of every model and set, beside bicubic; what else was asked for."""
    more = [metric for metric in _MORE if any(getattr(result, metric) is not None for result in results)]
    ensemble = "self-ensemble, " if any(result.protocol.ensemble for result in results) else ""
    made = Table(title=f"PSNR-Y / SSIM-Y by the published protocol, {ensemble}means over images", title_justify="left")
    for heading in ("set", "scale", "model"):
        made.add_column(heading)
    beside = _beside(results)
    headings = [
        "PSNR-Y",
        "SSIM-Y",
        *(_MORE[metric] for metric in more),
        f"{beside} PSNR-Y",
        f"{beside} SSIM-Y",
    ]
    for heading in (*headings, "gain (dB)"):
        made.add_column(heading, justify="right")
    for result in results:
        row = [result.set, f"x{result.scale}", result.model, f"{result.psnr_y:.3f}", f"{result.ssim_y:.4f}"]
        row += ["" if (value := getattr(result, metric)) is None else f"{value:.4f}" for metric in more]
        row += [f"{result.bicubic_psnr_y:.3f}", f"{result.bicubic_ssim_y:.4f}"]
        made.add_row(*row, f"{result.psnr_y - result.bicubic_psnr_y:+.3f}")
    return made


def _beside(results: list[SetResult]) -> str:
    return "input" if all(result.scale == 1 for result in results) else "bicubic"


def published_table(results: list[SetResult], archs: dict[str, str | None]) -> Table | None:
    """Ours beside the papers' figures, or None where they tell none of the sets; archs: model -> preset or None.

    Bicubic interpolation of a set stands beside the published one, a network beside the same network's figures and
    beside others' that are given for reference.
    """
    made = Table(title="Beside the published figures (PSNR-Y, dB)", title_justify="left")
    for heading in ("set", "scale", "model", "published as"):
        made.add_column(heading)
    for heading in ("ours", "published", "difference"):
        made.add_column(heading, justify="right")
    lines: dict[tuple[str, ...], tuple[float, float]] = {}  # bicubic once per set, whatever the models
    for result in results:
        for row in [] if result.degraded else published.beside(archs.get(result.model), result.scale, result.set):
            bicubic = row.model == "bicubic"
            model, ours = ("bicubic", result.bicubic_psnr_y) if bicubic else (result.model, result.psnr_y)
            figure = row.figure(result.set)
            assert figure is not None
            lines[result.set, f"x{result.scale}", model, row.title] = ours, figure
    for names, (ours, figure) in lines.items():
        made.add_row(*names, f"{ours:.3f}", f"{figure:.2f}", f"{ours - figure:+.3f}")
    return made if made.row_count else None


def comparison_table(comparisons: list[Comparison]) -> Table:
    """Paired differences with their intervals."""
    made = Table(title="Paired by image: mean difference and bootstrap interval", title_justify="left")
    for heading in ("set", "metric", "against"):
        made.add_column(heading)
    for heading in ("images", "mine", "theirs", "difference", "interval"):
        made.add_column(heading, justify="right")
    for found in comparisons:
        interval = f"{found.low:+.4f} .. {found.high:+.4f} ({found.confidence:.0%})"
        figures = (f"{found.mine:.4f}", f"{found.theirs:.4f}", f"{found.difference:+.4f}", interval)
        made.add_row(found.set, found.metric, found.rival, str(found.images), *figures)
    return made


def image_table(result: SetResult) -> Table:
    """Every image of a set."""
    made = Table(title=f"{result.set} x{result.scale}, {result.model}", title_justify="left")
    made.add_column("image")
    for heading in ("PSNR-Y", "SSIM-Y", f"{_beside([result])} PSNR-Y", "gain (dB)"):
        made.add_column(heading, justify="right")
    for image in result.images:
        gain = f"{image.psnr_y - image.bicubic_psnr_y:+.3f}"
        figures = (f"{image.psnr_y:.3f}", f"{image.ssim_y:.4f}", f"{image.bicubic_psnr_y:.3f}", gain)
        made.add_row(image.image, *figures)
    return made


def as_text(*tables: Table | None) -> str:
    """Tables as plain text."""
    console = Console(file=io.StringIO(), width=140, no_color=True)
    for shown in tables:
        if shown is not None:
            console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def as_json(results: list[SetResult]) -> str:
    """Everything, per image too."""
    return json.dumps([result.model_dump(mode="json") for result in results], indent=1, allow_nan=False)


def from_json(text: str | bytes) -> list[SetResult]:
    """The inverse of as_json."""
    return [SetResult.model_validate(entry) for entry in json.loads(text)]


def comparisons_json(model: str, comparisons: list[Comparison]) -> str:
    """One model less others, paired by image."""
    return json.dumps([{"model": model, **found.model_dump(mode="json")} for found in comparisons], indent=1)


def comparisons_csv(model: str, comparisons: list[Comparison]) -> str:
    """One line per set and rival."""
    return _csv(("model", *Comparison.model_fields), [(found, {"model": model}) for found in comparisons])


def as_csv(results: list[SetResult]) -> str:
    """One line per set and model."""
    return _csv(("set", "scale", "model", *_FIGURES), [(result, {}) for result in results])


def images_csv(results: list[SetResult]) -> str:
    """One line per image, set and model."""
    lines: list[tuple[SetResult | ImageResult, dict[str, object]]] = []
    for result in results:
        whose = {"set": result.set, "scale": result.scale, "model": result.model}
        lines += [(image, whose) for image in result.images]
    return _csv(("set", "scale", "model", "image", "digest", "tile", "device", *_FIGURES), lines)


def _csv(columns: tuple[str, ...], lines: Sequence[tuple[Settings, dict[str, object]]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record, more in lines:
        writer.writerow(record.model_dump() | more)
    return file.getvalue()
