"""Reports and pictures of made-up results, and the published figures beside them."""

import math

import numpy as np
import pytest

from model import build
from model.metrics import RESOLVED_DB
from pipeline import pictures, published, report
from pipeline.benchmark import Protocol, set_name
from pipeline.compare import compare
from pipeline.evaluate import figures
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
    assert report.published_table([result], {"w": None}) is None
    assert report.published_table([judged([33.0], scale=2, model="w")], {"w": "hat"}) is None
    assert [row.psnr_y["Urban100"] for row in published.beside("hat_l", 4, "urban100")] == [28.60]


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
