"""Judgement on the published Set5 files: the bicubic rows are design.md's to the last digit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model import build
from model.init import bicubic_start
from model.weights import save_pth
from pipeline import report
from pipeline.benchmark import BenchmarkImage, Protocol, read_set
from pipeline.cli import main
from pipeline.config import ComputeConfig
from pipeline.evaluate import Judged, Weights, evaluate, judges
from pipeline.pictures import write_pictures
from tests.golden_crops import SET5
from tests.shared_data import ROOT, shared

pytestmark = pytest.mark.integration

BICUBIC = {2: ("33.678", "0.9304"), 3: ("30.404", "0.8690"), 4: ("28.431", "0.8113"), 8: ("24.398", "0.6582")}
CROPS = {2: ("34.066", "0.9289"), 3: ("30.741", "0.8660"), 4: ("28.828", "0.8104"), 8: ("25.022", "0.6687")}
"""Of the crops of these files in `tests/golden`."""
OPTIONS = {"embed_dim": 12, "depths": [1], "num_heads": [3], "window_size": 4, "compress_ratio": 3, "squeeze_factor": 3}


def judge_bicubic(folder: Path, scale: int, place: Path) -> tuple[Judged, list[BenchmarkImage]]:
    """A set judged by a network that has the bicubic start."""
    network = build("hat", scale, **OPTIONS)
    bicubic_start(network)
    path = f"{place}/weights.pth"
    save_pth(path, network.state_dict())
    images = read_set(str(folder), scale)
    assert [image.name for image in images] == ["baby", "bird", "butterfly", "head", "woman"]
    assert all(image.low_res for image in images)
    with open(path, "rb") as file:
        weights = Weights.put(file.read(), {})
    with judges(ComputeConfig()) as pool:
        return evaluate(pool, "start", scale, weights, "Set5", images, Protocol(rgb=scale == 4)), images


def test_bicubic_rows_equal_the_published_figures(ray_local: object, tmp_path: Path) -> None:
    for scale, expected in BICUBIC.items():
        result = judge_bicubic(shared("data/benchmark/Set5"), scale, tmp_path)[0].result
        assert (f"{result.bicubic_psnr_y:.3f}", f"{result.bicubic_ssim_y:.4f}") == expected


@pytest.mark.parametrize("scale", CROPS)
def test_bicubic_rows_of_crops_of_the_published_files(ray_local: object, tmp_path: Path, scale: int) -> None:
    judged, images = judge_bicubic(SET5, scale, tmp_path)
    result = judged.result
    pictures = write_pictures(judged, images, 1, tmp_path)
    assert (f"{result.bicubic_psnr_y:.3f}", f"{result.bicubic_ssim_y:.4f}") == CROPS[scale]
    # the network starts as bicubic interpolation; borders are cropped, so the figures agree
    assert result.psnr_y == pytest.approx(result.bicubic_psnr_y, abs=0.02)
    assert len(pictures) == 2
    assert all(path.stat().st_size > 10_000 for path in pictures.values())
    assert (result.psnr_rgb is not None) == (scale == 4)
    assert report.from_json(report.as_json([result])) == [result]
    assert CROPS[scale][0] in report.as_text(report.table([result]))
    assert report.as_csv([result]).splitlines()[1].startswith(f"Set5,{scale},start,")


def hatchery(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_judges_anybodys_weights_and_compares_them(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        network = build("hat", 2, **OPTIONS)
        bicubic_start(network)
        if seed:  # a little off bicubic
            network.conv_last.weight.data *= 0.98
        save_pth(tmp_path / f"{name}.pth", network.state_dict())
    weights = ["--weights", f"{tmp_path}/a.pth", "--weights", f"{tmp_path}/b.pth"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bird.png").write_bytes((SET5 / "HR" / "bird.png").read_bytes())
    sets = ["--sets", str(SET5), "--sets", f"{tmp_path}/mine"]
    done = hatchery("evaluate", *weights, *sets, "--ensemble", "--pictures", "1", "--out", f"{tmp_path}/out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "34.066" in done.stdout
    assert "Paired by image" in done.stdout
    compared = json.loads((tmp_path / "out" / "comparisons.json").read_text())
    assert [(entry["model"], entry["rival"], entry["set"]) for entry in compared] == [
        ("a", "b", "Set5"),
        ("a", "b", "mine"),
    ]
    assert len((tmp_path / "out" / "comparisons.csv").read_text().splitlines()) == 3
    assert "33.66" in done.stdout  # published bicubic
    results = report.from_json((tmp_path / "out" / "results.json").read_text())
    assert [(r.model, r.set) for r in results] == [("a", "Set5"), ("a", "mine"), ("b", "Set5"), ("b", "mine")]
    # the LR of a folder of plain images is made by exact bicubic: the same figures as with the published file, but for
    # the rim, where the published file was made of the whole image and this one of its crop
    bird = next(image for image in results[0].images if image.image == "bird")
    assert results[1].images[0].bicubic_psnr_y == pytest.approx(bird.bicubic_psnr_y, abs=0.01)
    assert results[0].psnr_y > results[2].psnr_y
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".csv", ".txt", ""}
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "/absent.pth", "--sets", "."], ["/absent.pth"]),
        (["--weights", "README.md", "--sets", "."], ["README.md"]),
        (["--weights", "{golden}/hat_x2_w16.pth", "--sets", "/absent"], ["/absent", "does not exist"]),
        (["--weights", "{golden}/hat_x2_w16.pth", "--weights", "{golden}/hat_x3_w8.pth", "--sets", "."], ["x2", "x3"]),
        (["--weights", "{golden}/hat_x2_w16.pth", "--sets", ".", "--option", "a=b"], ["a=b", "key=number"]),
        (["--weights", "{golden}/hat_x2_w16.pth", "--sets", ".", "--option", "scael=1"], ["scael"]),
        (
            ["--weights", "{golden}/hat_x2_w16.pth", "--sets", "tests", "--lpips", "/absent.pth", "/b.pth"],
            ["/absent.pth"],
        ),
        (
            ["--weights", "{golden}/hat_x2_w16.pth", "--sets", "x", "--lpips", *2 * ("{golden}/hat_x2_w16.pth",)],
            ["LPIPS of", "neither AlexNet, VGG-16 nor VGG-19"],
        ),
        (
            ["--weights", "{golden}/hat_x2_w16.pth", "--sets", "x", "--dists", *2 * ("{golden}/hat_x2_w16.pth",)],
            ["DISTS of", "neither AlexNet, VGG-16 nor VGG-19"],
        ),
        (["--weights", "models:/m@champion", "--sets", ".", "--tracking-uri", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], golden_files: Path, arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *[argument.format(golden=golden_files) for argument in arguments]])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert len(said.strip().splitlines()) == 1, said
    for word in words:
        assert word in said
