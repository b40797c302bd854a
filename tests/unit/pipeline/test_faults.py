"""What users get wrong, in one line each, outside of recipes' own checks."""

import io
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from data_prep.image import decode
from data_prep.sources import fingerprint, list_items
from pipeline import artifact, cluster, pretrain, stages
from pipeline.benchmark import read_pair, read_set, set_fingerprint, set_name, upscale_bicubic
from pipeline.cli import main
from pipeline.config import ComputeConfig, load_recipe
from pipeline.domain import load_domain
from pipeline.evaluate import ImageResult
from pipeline.lock import LockedError
from pipeline.pictures import file_name
from pipeline.plan import Kind, Stage
from pipeline.progress import Display
from pipeline.rule import GateConfig
from pipeline.settings import load_settings
from pipeline.tracking import Tracker, TrackingError
from tests.golden_crops import SCALES, SET5, exact
from tests.shared_data import ROOT

TINY = str(ROOT / "tests" / "integration" / "tiny_pair.yaml")


def save_image(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)


def test_a_set_that_lacks_a_low_resolution_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_image(tmp_path / "HR" / f"{name}.png", 16, 20)
    save_image(tmp_path / "LR_bicubic" / "X2" / "ax2.png", 8, 10)
    with pytest.raises(ValueError, match="lacks the low-resolution images of b: add them"):
        read_set(str(tmp_path), 2)
    assert [image.low_res for image in read_set(str(tmp_path), 3)] == [None, None]
    assert [image.name for image in read_set(str(tmp_path), 3, ("HR/b*",))] == ["b"]


@pytest.mark.parametrize(
    ("truth", "low_res"),
    [
        ("HR/{}.png", "LR_bicubic/X2/{}x2.png"),
        ("HR/{}.png", "LRbicx2/{}.png"),
        ("GTmod12/{}.png", "LRbicx2/{}.png"),
        ("GTmod2/{}.png", "LRbicx2/{}.png"),
        ("{}.png", "LR_bicubic/X2/{}x2.png"),
        ("{}.png", "DIV2K_valid_LR_bicubic/X2/{}x2.png"),
        ("valid/{}.png", "LRbicx3/{}.png"),
    ],
)
def test_the_layouts_of_published_sets(tmp_path: Path, truth: str, low_res: str) -> None:
    for name in ("a", "b"):
        for template, side in (("GTmod3/{}.png", 15), (truth, 24), (low_res, 12)):
            if "GTmod" in truth or "GTmod" not in template:
                save_image(tmp_path / template.format(name), side, side)
    found = read_set(str(tmp_path), 2)
    assert [image.name for image in found] == ["a", "b"]
    assert {read_pair(image, 2).high_res.shape for image in found} == {(24, 24, 3)}
    published = low_res.startswith(("LR_bicubic/X2", "LRbicx2"))
    assert all((image.low_res is not None) == published for image in found)


@pytest.mark.parametrize(
    ("paths", "below", "words"),
    [
        (["LR_bicubic/X2/a.png"], "", "holds only low-resolution images: add HR/"),
        (["LRbicx2/a.png"], "LRbicx2", "holds low-resolution images: name the folder of the whole set"),
        (["LR_bicubic/X2/a.png"], "LR_bicubic/X2", "holds low-resolution images: name the folder"),
        (["GTmod3/a.png", "LRbicx2/a.png"], "", "has GTmod3, none of them cut for x2: add GTmod2/"),
        (["one/a.png", "two/a.jpg"], "", r"two/a\.jpg and one/a\.png are both called a: rename one"),
    ],
)
def test_folders_that_are_no_benchmark(tmp_path: Path, paths: list[str], below: str, words: str) -> None:
    for path in paths:
        save_image(tmp_path / path, 12, 12)
    with pytest.raises(ValueError, match=words):
        read_set(str(tmp_path / below), 2)


def test_an_include_that_takes_no_truth(tmp_path: Path) -> None:
    for path in ("HR/a.png", "LRbicx2/a.png"):
        save_image(tmp_path / path, 12, 12)
    with pytest.raises(ValueError, match=r"include \['LRbicx2/\*'\] takes none of its high-resolution images"):
        read_set(str(tmp_path), 2, ("LRbicx2/*",))


def test_a_low_resolution_image_of_another_size(tmp_path: Path) -> None:
    save_image(tmp_path / "HR" / "a.png", 17, 20)
    save_image(tmp_path / "LR_bicubic" / "X2" / "a.png", 9, 10)
    (image,) = read_set(str(tmp_path), 2)
    with pytest.raises(ValueError, match=r"has height and width \(9, 10\), expected \(8, 10\)"):
        read_pair(image, 2)


def test_an_image_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded: it is none of PNG, JPEG, .* replace it"):
        read_pair(read_set(str(tmp_path), 2)[0], 2)


def test_an_image_too_large_to_be_one(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has more pixels than max_pixels=178956970: cut it .* replace it"):
        read_pair(read_set(str(tmp_path), 2)[0], 2)


def test_sixteen_bit_gray_is_judged_as_it_is_trained(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pair = read_pair(read_set(str(tmp_path), 2)[0], 2)
    np.testing.assert_array_equal(pair.high_res, decode((tmp_path / "ramp.png").read_bytes()))
    assert (pair.high_res.min(), pair.high_res.max()) == (0, 255)
    assert abs(pair.low_res.mean() - 127.5) < 1


def test_images_without_published_low_resolution_are_shrunk(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 17, 20)
    (image,) = read_set(str(tmp_path), 4)
    pair = read_pair(image, 4)
    assert (pair.low_res.shape, pair.high_res.shape) == ((4, 5, 3), (16, 20, 3))
    assert upscale_bicubic(pair.low_res, 4).shape == pair.high_res.shape


@pytest.mark.parametrize("scale", SCALES)
def test_low_resolution_is_made_as_the_published_files_were(tmp_path: Path, scale: int) -> None:
    (tmp_path / "HR").symlink_to(SET5 / "HR")
    for ours, theirs in zip(read_set(str(tmp_path), scale), read_set(str(SET5), scale), strict=True):
        assert ours.low_res is None
        assert theirs.low_res is not None
        made, published = read_pair(ours, scale).low_res, read_pair(theirs, scale).low_res
        assert made is not None
        assert published is not None
        place = exact(ours.name, scale)
        np.testing.assert_array_equal(made[place], published[place])


def recipe_in(folder: Path, *overrides: str) -> "pretrain.Recipe":
    return load_recipe(TINY, [f"storage.uri={folder}/runs", *overrides])


class NoTracker:
    """A tracker that is told and keeps nothing."""

    def stage_run(self, *told: object) -> str:
        return "run"

    def finish(self, *told: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["shard", "cascade"])
def test_two_runs_that_need_the_same_stage_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Shards are made by one and taken by the other; any other stage is refused to the second."""
    recipe, stage, began, made = recipe_in(tmp_path), Stage("shard-replay", kind, "shard", ()), threading.Event(), []

    def work(todo: stages.Work) -> artifact.Artifact:
        began.set()
        time.sleep(6)  # the lock's heartbeat is 5 s
        made.append(todo.stage.name)
        return artifact.publish(recipe.storage.uri, "shard-replay", todo.fingerprint, inputs={}, config={})

    def run(said: io.StringIO) -> artifact.Artifact:
        console = Console(file=said, width=200)
        return pretrain._run_stages(recipe, [stage], {stage.name}, NoTracker(), Display(console))["shard-replay"]

    monkeypatch.setitem(stages.RUN, kind, work)
    first, second = io.StringIO(), io.StringIO()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run, first)
        assert began.wait(10)
        if kind == "shard":
            assert run(second) == running.result()
            assert "waiting for" in second.getvalue()
        else:
            with pytest.raises(LockedError, match=r"stage shard-replay .* is being run by"):
                run(second)
    assert made == ["shard-replay"]


def test_mlflow_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"does not answer .* start the server"):
        Tracker(recipe_in(tmp_path, "tracking.uri=http://127.0.0.1:9"))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"database sqlite:.* cannot be used: .*choose another tracking\.uri"):
        Tracker(recipe_in(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/file/mlflow.db"))
    with pytest.raises(TrackingError, match=r"cannot be used .* correct tracking\.uri"):
        Tracker(recipe_in(tmp_path, "tracking.uri=nonsense://x"))


def test_a_deleted_experiment(tmp_path: Path) -> None:
    tracker = Tracker(recipe_in(tmp_path))
    tracker.begin()
    MlflowClient(tracker.uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match="was deleted: restore it"):
        Tracker(recipe_in(tmp_path))


def test_runs_are_found_again(tmp_path: Path) -> None:
    first, second = Tracker(recipe_in(tmp_path)), Tracker(recipe_in(tmp_path))
    assert first.begin() == second.begin()
    assert Tracker(recipe_in(tmp_path, "seed=7")).begin() != first.begin()
    run_id = first.stage_run("evaluate", "f", {"a": {"b": 1}})
    assert second.stage_run("evaluate", "f", {}) == run_id
    assert second.stage_run("evaluate", "g", {}) != run_id
    assert first.client.get_run(run_id).data.params == {"a.b": "1"}


def test_metrics_are_kept_while_the_server_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker(recipe_in(tmp_path))
    run_id = tracker.stage_run("train", "f", {})
    working, tracker.impatient = tracker.impatient, MlflowClient("http://127.0.0.1:9")
    tracker.log_metrics(run_id, {"loss": 0.5}, 1)
    with pytest.raises(TrackingError, match="did not take 1 metrics"):
        tracker.flush(patience_s=0)
    tracker.impatient = working
    tracker.log_metrics(run_id, {"loss": 0.25}, 2)
    tracker.flush()
    assert [entry.value for entry in working.get_metric_history(run_id, "loss")] == [0.5, 0.25]
    assert tracker.pending == []


def test_a_stage_whose_inputs_are_neither_done_nor_chosen(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    stages, chosen, tracker = pretrain.prepare(recipe, pretrain.Choice(stages=["evaluate"]))
    display = pretrain.Display(Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="stage evaluate needs finetune-x4, not done yet and not selected"):
        pretrain._run_stages(recipe, stages, chosen, tracker, display)


def test_no_ray_at_the_address() -> None:
    with (
        pytest.raises(ValueError, match=r"no Ray cluster at '127\.0\.0\.1:1'"),
        cluster.connected(ComputeConfig(), "127.0.0.1:1", debug=False),
    ):
        pass


def test_exit_codes_of_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, code in (
        (["--help"], 0),
        (["pretrain"], 2),
        (["pretrain", "--recipe", "nope"], 2),
        (["pretrain", "--recipe", TINY, "--set", f"storage.uri={tmp_path}", "--until", "nope", "--dry-run"], 2),
        (["pretrain", "--recipe", TINY, "--set", f"storage.uri={tmp_path}", "--dry-run"], 0),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    assert "8 of 8 stages to run, 6 training steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["rollback", "m", "--tracking-uri", "nonsense://x"],
        ["history", "m", "--tracking-uri", "nonsense://x"],
        ["plan", "--recipe", "nope"],
        ["shards", "ls", "/absent"],
        ["shards", "verify", "/absent"],
        ["schedule", "render", "/absent.yaml"],
    ],
)
def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--debug"])
    assert ended.value.code == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["retrain"], ["schedule"], ["schedule", "render"], ["promote"]])
def test_help_names_a_file_to_begin_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    told = capsys.readouterr().out
    (example,) = set(re.findall(r"configs/[a-z/]+\.yaml", told))
    if arguments == ["promote"]:
        assert set(load_settings(GateConfig, ROOT / example, []).model_dump()) <= set(re.findall(r"\w+", told))
    else:
        load_domain(str(ROOT / example))


def selfexsr(folder: Path, name: str = "img_001", scales: tuple[int, ...] = (2, 3)) -> None:
    for scale in scales:
        for kind, side in (("HR", 24), ("LR", 24 // scale), ("bicubic", 24), ("A+", 24)):
            save_image(folder / f"image_SRF_{scale}" / f"{name}_SRF_{scale}_{kind}.png", side, side)


def test_selfexsrs_sets_are_paired_by_their_names(tmp_path: Path) -> None:
    selfexsr(tmp_path / "Set5", "img_001")
    selfexsr(tmp_path / "Set5", "img_002")
    for below in ("", "/image_SRF_2"):
        found = read_set(f"{tmp_path}/Set5{below}", 2)
        assert [image.name for image in found] == ["img_001", "img_002"]
        assert all("_SRF_2_HR" in image.high_res.path for image in found)
        assert all(image.low_res and "_SRF_2_LR" in image.low_res.path for image in found)
        assert {read_pair(image, 2).low_res.shape for image in found} == {(12, 12, 3)}
    assert set_name(f"{tmp_path}/Set5/image_SRF_2") == set_name(f"{tmp_path}/Set5") == "Set5"
    with pytest.raises(ValueError, match=r"has images for x2, x3, none for x4: add image_SRF_4/ or choose a scale"):
        read_set(f"{tmp_path}/Set5", 4)
    (tmp_path / "Set5/image_SRF_2/img_002_SRF_2_LR.png").unlink()
    with pytest.raises(ValueError, match="image_SRF_2 lacks the low-resolution images of img_002"):
        read_set(f"{tmp_path}/Set5", 2)


def test_a_set_whose_files_are_paired_otherwise_is_judged_anew(tmp_path: Path) -> None:
    """By their names alone, its figures of before would still count."""
    selfexsr(tmp_path / "ours")
    save_image(tmp_path / "plain" / "a.png", 8, 8)
    assert set_fingerprint(list_items(str(tmp_path / "plain"))) == fingerprint(list_items(str(tmp_path / "plain")))
    assert set_fingerprint(list_items(str(tmp_path / "ours"))) != fingerprint(list_items(str(tmp_path / "ours")))


def test_names_that_are_no_utf8_are_judged_and_shown(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"caf\xe8", "line\u2028sep".encode()):
        save_image(tmp_path / os.fsdecode(name + b".png"), 8, 8)
    found = read_set(str(tmp_path), 2)
    assert sorted(image.name for image in found) == ["caf\\xe8", "caf\\xe9", "line\\u2028sep"]
    assert ImageResult.model_fields["image"].annotation is str
    assert file_name(found[0].name, ".png").isprintable()


def test_a_pictures_name_is_one_that_file_systems_take() -> None:
    long = file_name("写" * 300, ".png")
    assert len(long.encode()) < 255
    assert long != file_name("写" * 301, ".png")
    assert file_name("a/b\\c", ".png") == "a_b_c.png"


def test_a_damaged_jpeg_judges_nothing(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg", 64, 64)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-60] + b"\xff\xd9")
    with pytest.raises(
        ValueError, match=r"a\.jpg cannot be decoded: the compressed data is damaged or cut off: replace"
    ):
        read_pair(read_set(str(tmp_path), 2)[0], 2)
