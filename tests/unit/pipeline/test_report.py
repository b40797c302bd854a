"""Reports and pictures of made-up results, and the published figures beside them."""

import json
import math

import numpy as np
import pytest

from model import build
from model.metrics import RESOLVED_DB
from pipeline import pictures, published, report
from pipeline.benchmark import Protocol, set_name
from pipeline.compare import compare
from pipeline.evaluate import SetResult, figures
from tests.unit.model.tiny import TINY
from tests.unit.pipeline.figures import judged


def test_tables_hold_the_figures() -> None:
    mine, theirs = judged([33.0, 35], model="a"), judged([32.0, 35], model="b")
    text = report.as_text(
        report.table([mine]), report.image_table(mine), report.comparison_table([compare(mine, theirs)])
    )
    assert "34.000" in text
    assert "+4.000" in text
    assert "+0.5000" in text
    assert "+0.0000 .. +1.0000 (95%)" in text
    with_rgb = mine.model_copy(update={"psnr_rgb": 29.25, "protocol": Protocol(rgb=True, ensemble=True)})
    assert "29.2500" in report.as_text(report.table([with_rgb]))
    assert "self-ensemble" in report.as_text(report.table([with_rgb]))


def test_json_and_csv_lose_nothing() -> None:
    results = [judged([33.0, 35]), judged([30.0], "new")]
    assert report.from_json(report.as_json(results)) == results
    assert report.as_csv(results).splitlines()[1].startswith("Set5,2,mine,34.0,0.9,")
    lines = report.images_csv(results).splitlines()
    assert lines[0].startswith("set,scale,model,image,digest,psnr_y")
    assert lines[0].endswith(",tile,device")
    assert [line.split(",")[3] for line in lines[1:]] == ["i0", "i1", "i0"]


def test_a_blank_page_has_a_figure_in_valid_json() -> None:
    blank = np.full((40, 40, 3), 250, np.uint8)
    found = figures(blank, blank, 2, Protocol(rgb=True))
    assert (found["psnr_y"], found["psnr_rgb"]) == (RESOLVED_DB, RESOLVED_DB)
    assert "Infinity" not in report.as_json([judged([found["psnr_y"], 30])])
    with pytest.raises(ValueError, match="JSON"):
        report.as_json([judged([math.inf, 30])])


def test_published_figures_stand_beside_the_same_network_only() -> None:
    result = judged([33.0, 33.2], scale=4, model="w")
    shown = report.as_text(report.published_table([result], {"w": "hat"}))
    assert "HAT + ImageNet" in shown
    assert "33.04" in shown
    assert "+0.060" in shown
    assert "HAT" not in report.as_text(report.published_table([result], {"w": None}))
    assert report.published_table([judged([33.0], "mine", "w", 4)], {"w": "hat"}) is None
    degraded = result.model_copy(update={"degraded": True})  # what the papers never judged
    assert report.published_table([degraded], {"w": "hat"}) is None
    found = [row for row in published.beside("hat_l", 4, "urban100") if row.arch == "hat_l"]
    assert [row.figure("Urban100") for row in found] == [28.60]


def shown_rows(*results: SetResult) -> list[list[str]]:
    lines = report.as_text(report.published_table(list(results), {})).splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


@pytest.mark.parametrize(("scale", "figure"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_stands_beside_the_published_one_once_per_set(scale: int, figure: float) -> None:
    rows = shown_rows(judged([33.0], scale=scale, model="a"), judged([34.0], scale=scale, model="b"))
    bicubic = [row for row in rows if row[2] == "bicubic"]
    assert bicubic == [
        ["Set5", f"x{scale}", "bicubic", "bicubic", "30.000", f"{figure:.2f}", f"{30 - figure:+.3f}"],
    ]
    swin_ir = [row for row in rows if row[3] == "SwinIR"]
    assert [row[2:] for row in swin_ir] == (
        [["a", "SwinIR", "33.000", "32.92", "+0.080"], ["b", "SwinIR", "34.000", "32.92", "+1.080"]]
        if scale == 4
        else []
    )


def test_comparisons_are_files_too() -> None:
    found = [compare(judged([33.0, 35]), judged([32.0, 35], model="b"))]
    (entry,) = json.loads(report.comparisons_json("a", found))
    assert (entry["model"], entry["rival"], entry["difference"], entry["low"], entry["high"]) == ("a", "b", 0.5, 0, 1)
    header, line = report.comparisons_csv("a", found).splitlines()
    assert header == "model,set,metric,images,mine,theirs,rival,difference,low,high,confidence"
    assert line == "a,Set5,psnr_y,2,34.0,33.5,b,0.5,0.0,1.0,0.95"


@pytest.mark.parametrize("arch", ["hat_s", "hat", "hat_l", "hmanet"])
def test_published_sizes_are_recognised(arch: str) -> None:
    import torch

    with torch.device("meta"):
        network = build(arch, 2)
    assert published.preset_of(network.state_dict()) == arch


def test_other_sizes_are_no_preset() -> None:
    assert published.preset_of(build("hat", 2, **TINY).state_dict()) is None


def test_worst_and_best_are_chosen_once() -> None:
    ranked = pictures.chosen(judged([33.0, 31, 35]).images, 2)
    assert [(rank, image.image) for rank, image in ranked] == [("worst-1", "i1"), ("worst-2", "i0"), ("best-1", "i2")]


def test_the_crop_lies_on_the_error() -> None:
    truth = np.zeros((200, 300, 3), np.uint8)
    model = truth.copy()
    model[150:160, 210:220] = 90
    top, left = pictures.most_different(model, truth, 96)
    assert top <= 150 <= 160 <= top + 96
    assert left <= 210 <= 220 <= left + 96
    errors = pictures.error_map(model, truth)
    assert errors[155, 215, 0] == 255
    assert errors[0, 0, 0] == 0
    sheet = np.asarray(pictures.sheet({"bicubic": truth, "model": model, "truth": truth}))
    assert sheet.shape[1] == 3 * (96 * 4 + 4)
    assert (sheet == 90).any()


def test_sets_are_named_by_their_folder() -> None:
    uris = ("/a/Set5/", "s3://b/Set5/HR", "/a/Set5/GTmod12", "photographs:")
    assert [set_name(uri) for uri in uris] == ["Set5", "Set5", "Set5", "photographs"]
