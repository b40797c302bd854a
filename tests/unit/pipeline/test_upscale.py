"""`hatchery upscale` as a user runs it, on real image files and weights files."""

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from model import build
from model.inference import upscale
from model.init import bicubic_start
from model.picture import Picture, read_picture, write_picture
from model.weights import save_pth, save_safetensors
from pipeline.cli import main
from tests.unit.model.conftest import one_thread
from tests.unit.model.test_files import file_size_limit

__all__ = ["one_thread"]

SIZES = {"embed_dim": 12, "depths": (1,), "num_heads": (3,), "window_size": 8, "squeeze_factor": 6}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published-style file of a network that interpolates bicubically."""
    network = build("hat", 2, **SIZES)
    bicubic_start(network)
    path = tmp_path_factory.mktemp("weights") / "x2.pth"
    save_pth(path, network.state_dict())
    return str(path)


@pytest.fixture
def hatchery(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; gives its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def levels(height: int, width: int, channels: int = 3, deep: bool = False) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 65536 if deep else 256, (height, width, channels), np.uint16 if deep else np.uint8)


def test_one_image_with_weights_alone(hatchery, weights, tmp_path) -> None:
    write_picture(tmp_path / "in.png", Picture(levels(10, 14, 4, deep=True)))
    code, out, _ = hatchery("upscale", tmp_path / "in.png", tmp_path / "new" / "out.tif", "--weights", weights)
    assert code == 0
    assert "14 x 10 -> 28 x 20 px, RGB and alpha, 16 bits" in out
    written = read_picture(tmp_path / "new" / "out.tif").pixels
    assert (written.dtype, written.shape) == (np.uint16, (20, 28, 4))


def test_safetensors_and_every_option(hatchery, tmp_path) -> None:
    """The identity network gives the image back whatever the options."""
    network = build("hmanet", 1, embed_dim=32, depths=(1,), num_heads=(2,), window_size=8, interval_size=2)
    bicubic_start(network)
    save_safetensors(tmp_path / "x1.safetensors", network.state_dict(), {})
    write_picture(tmp_path / "in.png", Picture(levels(24, 30)))
    options = ["--tile", 16, "--tile-overlap", 8, "--tile-batch", 3, "--ensemble", "--precision", "fp32", "--scale", 1]
    code, out, _ = hatchery(
        "upscale", tmp_path / "in.png", tmp_path / "out.png", "--weights", tmp_path / "x1.safetensors", *options
    )
    assert code == 0
    assert "hmanet x1, fp32 on" in out
    assert "in.png: tiles of 16 px that overlap by 8 px (WARNING: HMANet attends across the whole image" in out
    assert np.array_equal(read_picture(tmp_path / "out.png").pixels, levels(24, 30))


def test_a_folder_keeps_names_and_goes_on_after_a_broken_image(hatchery, weights, tmp_path) -> None:
    for name in ("a.png", "sub/b.jpg", "sub/C.TIF"):
        write_picture(tmp_path / "in" / name, Picture(levels(9, 8)))
    (tmp_path / "in" / "b-broken.png").write_bytes(b"nothing")
    write_picture(tmp_path / "in" / "cut.jpg", Picture(levels(60, 80)))
    whole = (tmp_path / "in" / "cut.jpg").read_bytes()
    (tmp_path / "in" / "cut.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")  # ends like a sound one
    buffer = io.BytesIO()
    Image.fromarray(levels(60, 80)).save(buffer, "JPEG", progressive=True)
    (tmp_path / "in" / "cut-too.jpg").write_bytes(buffer.getvalue()[:-60] + b"\xff\xd9")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    code, out, err = hatchery("upscale", tmp_path / "in", tmp_path / "in" / "out", "--weights", weights)
    assert code == 1
    assert [line.split(": ")[1] for line in err.splitlines() if line.startswith("hatchery: ")] == [
        f"{tmp_path}/in/b-broken.png cannot be read",
        f"{tmp_path}/in/cut-too.jpg cannot be read",
        f"{tmp_path}/in/cut.jpg cannot be read",
    ]
    assert files(tmp_path / "in" / "out") == ["a.png", "sub/C.TIF", "sub/b.jpg"]
    (tmp_path / "in" / "b-broken.png").unlink()
    (tmp_path / "in" / "cut.jpg").unlink()
    (tmp_path / "in" / "cut-too.jpg").unlink()
    code, out, _ = hatchery("upscale", tmp_path / "in", tmp_path / "in" / "out", "--weights", weights)
    assert code == 0
    assert "[3/3]" in out, "results of the first run are no images to upscale"


def test_odd_names_links_and_clutter(hatchery, weights, tmp_path) -> None:
    """Names are shown in one line each, whatever they hold; what is passed over is said."""
    folder, names = tmp_path / "in", ("line\u2028sep.png", os.fsdecode(b"caf\xe9.png"), "[red]x[1].jfif")
    for name in names:
        write_picture(folder / name, Picture(levels(8, 8)))
    (folder / "._a.png").write_bytes(b"a Mac's")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    code, out, err = hatchery("upscale", folder, tmp_path / "out", "--weights", weights)
    assert code == 1
    assert err.splitlines() == [line for line in err.splitlines() if "gone.png" in line]
    assert files(tmp_path / "out") == sorted(names)
    assert "passed over: 1 of the system's or a program's own (._a.png); 1 not followed: loop (a loop" in out
    for shown in ("line\\u2028sep.png: done", "caf\\xe9.png: done", "[red]x[1].jfif: done"):
        assert sum(shown in line for line in out.split("\n")) == 1


def test_whole_jpegs_without_an_end_and_animations(hatchery, weights, tmp_path) -> None:
    """What sharding takes, `upscale` takes: all blocks are there. The first of several pictures is taken, and said."""
    for progressive in (False, True):
        buffer = io.BytesIO()
        Image.fromarray(levels(40, 30)).save(buffer, "JPEG", progressive=progressive)
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{progressive}.jpg").write_bytes(buffer.getvalue()[:-2])
        (tmp_path / "in" / f"{progressive}-padded.jpg").write_bytes(buffer.getvalue()[:-2] + b"\0\0\xff\xd9")
    frames = [Image.fromarray(levels(8, 8)), Image.fromarray(255 - levels(8, 8))]
    frames[0].save(tmp_path / "in" / "moving.png", save_all=True, append_images=frames[1:])
    code, out, err = hatchery("upscale", tmp_path / "in", tmp_path / "out", "--weights", weights)
    assert (code, err) == (0, "")
    assert len(files(tmp_path / "out")) == 5
    assert "moving.png: the first of its 2 pictures" in out


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_single_image_into_a_folder(hatchery, weights, tmp_path) -> None:
    write_picture(tmp_path / "in.png", Picture(levels(8, 8, 1)))
    (tmp_path / "there").mkdir()
    assert hatchery("upscale", tmp_path / "in.png", tmp_path / "there", "--weights", weights)[0] == 0
    assert hatchery("upscale", tmp_path / "in.png", f"{tmp_path}/new/", "--weights", weights)[0] == 0
    assert files(tmp_path / "there") == files(tmp_path / "new") == ["in.png"]


def case(name: str, folder: Path) -> tuple[list[object], str]:
    """Arguments of a wrong call besides the weights, and what is said."""
    image, out = folder / "in.png", folder / "out.png"
    return {
        "no input": ([folder / "nope.png", out], "nope.png does not exist"),
        "no images": ([folder / "empty", out], "empty holds no images"),
        "unknown ending": ([image, folder / "out.gif"], "out.gif: choose an ending among"),
        "no alpha": ([folder / "alpha.png", folder / "out.jpg"], "cannot hold an alpha channel"),
        "onto itself": ([image, image], "would overwrite"),
        "folder onto itself": ([folder, folder], "would overwrite"),
        "folder into a file": ([folder, image], "is a file: name a folder"),
        "below a file": ([image, image / "sub" / "out.png"], f"{image} is a file, no folder"),
        "folder below a file": ([folder, image / "out"], f"{image} is a file, no folder"),
        "other scale": ([image, out, "--scale", 3], "upscales by 2, not by --scale 3"),
        "small tile": ([image, out, "--tile", 8], "tile=8 px with overlap=32 px"),
        "small tile for a folder": ([folder, folder / "o", "--tile", 8], "tile=8 px with overlap=32 px"),
        "precision": ([image, out, "--precision", "fp16"], "precision='fp16': choose one of"),
        "two networks": ([image, out, "--model", "models:/m@champion"], "--weights and --model are two networks"),
        "too wide": ([folder / "wide.png", folder / "out.webp"], "out.webp cannot hold 16384 x 16 px"),
        "broken": ([folder / "broken.png", out], "broken.png cannot be read"),
    }[name]


WRONG = (
    *("no input", "no images", "unknown ending", "no alpha", "onto itself", "folder onto itself", "folder into a file"),
    *("below a file", "folder below a file", "too wide"),
    *("other scale", "small tile", "small tile for a folder", "precision", "two networks", "broken"),
)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_one_line_and_code_2(name: str, hatchery, weights, tmp_path, monkeypatch) -> None:
    write_picture(tmp_path / "in.png", Picture(levels(8, 8)))
    write_picture(tmp_path / "alpha.png", Picture(levels(8, 8, 4)))
    write_picture(tmp_path / "wide.png", Picture(levels(8, 8192)))
    monkeypatch.setattr("pipeline.upscale.enlarge", Mock(side_effect=AssertionError("no network may run")))
    (tmp_path / "broken.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    arguments, message = case(name, tmp_path)
    code, _, err = hatchery("upscale", *arguments, "--weights", weights)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert files(tmp_path) == before


def test_networks_that_cannot_be_had(hatchery, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_picture("in.png", Picture(levels(8, 8)))
    torch.save({"fc.weight": torch.zeros(2)}, "other.pth")
    for arguments, message in (
        ([], "which network? Give --weights"),
        (["--weights", "nope.pth"], "nope.pth"),
        (["--weights", "other.pth"], "not the state dict of a network known here"),
        (["--scale", "2"], "no MLflow store"),
        (["--model", "models:/m@champion"], "no MLflow store"),
        (["--model", "m@champion", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"], "write models:/NAME@champion"),
        (["--scale", "2", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"], "holds no champion for x2"),
        (["--model", "models:/m@champion", "--tracking-uri", f"sqlite:///{tmp_path}/m.db"], "registered are: none yet"),
    ):
        code, _, err = hatchery("upscale", "in.png", "out.png", *arguments)
        assert (code, message in err) == (2, True), err
    assert not Path("out.png").exists()


@pytest.mark.parametrize("place", ["in.png/out.png", "in.png/sub/out.png"])
def test_a_place_that_cannot_be_is_one_line_from_any_command(place, hatchery, weights, tmp_path, monkeypatch) -> None:
    """Whatever the early check does not see, such as a file made meanwhile."""
    monkeypatch.setattr("pipeline.upscale_files.refuse_below_a_file", lambda target: None)
    write_picture(tmp_path / "in.png", Picture(levels(8, 8)))
    code, _, err = hatchery("upscale", tmp_path / "in.png", tmp_path / place, "--weights", weights)
    assert (code, err.count("\n")) == (2, 1)


def test_export_writes_both_kinds(hatchery, weights, tmp_path) -> None:
    for name, what in (("a.pt2", "x2.pth, hat x2, for sides of more than 8 px"), ("a.onnx", "differs from PyTorch by")):
        code, out, err = hatchery("export", weights, tmp_path / name)
        assert (code, what in out) == (0, True), err
    assert files(tmp_path) == ["a.onnx", "a.pt2"]


def test_the_interval_of_a_pth_file_is_an_option(hatchery, tmp_path) -> None:
    network = build("hmanet", 1, embed_dim=32, depths=(1,), num_heads=(2,), window_size=8, interval_size=2).eval()
    save_pth(tmp_path / "x1.pth", network.state_dict())
    write_picture(tmp_path / "in.png", Picture(levels(24, 16)))
    arguments = ["upscale", tmp_path / "in.png", tmp_path / "out.png", "--weights", tmp_path / "x1.pth"]
    assert hatchery(*arguments, "--interval-size", 2, "--precision", "fp32")[0] == 0
    assert np.array_equal(read_picture(tmp_path / "out.png").pixels, upscale(network, levels(24, 16)))


def test_wrong_exports(hatchery, weights, tmp_path) -> None:
    for arguments, message in (
        ((weights, tmp_path / "a.engine"), "a.engine: choose an ending among .onnx, .pt2"),
        ((tmp_path / "nope.pth", tmp_path / "a.onnx"), "nope.pth"),
        ((weights, Path(weights) / "a.onnx"), "is a file, no folder"),
        ((weights, tmp_path / "a.pt2", "--interval-size", 4), "hat has no argument interval_size"),
    ):
        code, _, err = hatchery("export", *arguments)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err
    assert files(tmp_path) == []


def test_a_folder_as_people_want_it_and_again_after_a_stop(hatchery, weights, tmp_path) -> None:
    tags = Image.Exif()
    tags[0x010F] = "Maker"
    (tmp_path / "in").mkdir()
    Image.fromarray(levels(8, 12)).save(tmp_path / "in" / "a.jpg", exif=tags)
    write_picture(tmp_path / "in" / "b.png", Picture(levels(8, 8, 4)))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    arguments = [
        "upscale",
        tmp_path / "in",
        tmp_path / "out",
        "--weights",
        weights,
        "--skip-existing",
        "--device",
        "cpu",
    ]
    arguments += ["--format", "webp", "--quality", 80, "--suffix", "_large", "--outscale", 2.5, "--alpha", "bicubic"]
    code, out, err = hatchery(*arguments)
    assert (code, err) == (0, "")
    assert "passed over: 1 with other endings (.txt 1)" in out
    assert "0 of 2 are there already" in out
    assert files(tmp_path / "out") == ["a_large.webp", "b_large.webp"]
    with Image.open(tmp_path / "out" / "a_large.webp") as image:
        assert (image.size, image.mode) == ((30, 20), "RGB")
        assert image.getexif()[0x010F] == "Maker"
    with Image.open(tmp_path / "out" / "b_large.webp") as image:
        assert (image.size, image.mode) == ((20, 20), "RGBA")

    (tmp_path / "out" / "a_large.webp").unlink()
    before = (tmp_path / "out" / "b_large.webp").stat()
    code, out, _ = hatchery(*arguments)
    assert (code, "[1/1] a.jpg" in out, "1 of 2 are there already, and skipped" in out) == (0, True, True)
    assert files(tmp_path / "out") == ["a_large.webp", "b_large.webp"]
    assert (tmp_path / "out" / "b_large.webp").stat().st_ino == before.st_ino
    code, out, _ = hatchery(*arguments)
    assert (code, "2 of 2 are there already" in out, "[1/" in out) == (0, True, False)


def test_devices_share_a_folder(hatchery, weights, tmp_path) -> None:
    for name in ("a.png", "b.png", "d.png"):
        write_picture(tmp_path / "in" / name, Picture(levels(8, 8 + ord(name[0]))))
    (tmp_path / "in" / "c.png").write_bytes(b"nothing")
    code, out, err = hatchery("upscale", tmp_path / "in", tmp_path / "out", "--weights", weights, "--device", "cpu,cpu")
    assert (code, err.count("\n"), "c.png cannot be read" in err) == (1, 1, True)
    lines = out.splitlines()
    assert lines[0].endswith("hat x2, fp32 on cpu, cpu") or "bf16 on cpu, cpu" in lines[0]
    assert [line.split()[1] for line in lines if line.startswith("[")] == ["a.png:", "b.png:", "c.png:", "d.png:"]
    assert "      b.png: done on cpu: 106 x 8 -> 212 x 16 px, RGB, 8 bits" in lines
    assert "      c.png: failed on cpu" in lines
    assert hatchery("upscale", tmp_path / "in" / "a.png", tmp_path / "one.png", "--weights", weights)[0] == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "out" / "a.png").read_bytes()


def test_options_that_cannot_be_are_one_line_before_work(hatchery, tmp_path) -> None:
    """The weights are not looked at: there are none."""
    write_picture(tmp_path / "in.png", Picture(levels(8, 8)))
    write_picture(tmp_path / "folder" / "a.png", Picture(levels(8, 8)))
    for arguments, message in (
        (["in.png", "out.png", "--device", "cuda:77"], "--device cuda:77"),
        (["in.png", "out.png", "--device", "gpu"], "--device gpu: choose auto, cpu, cuda"),
        (["in.png", "out.png", "--quality", 80], "--quality is for JPEG and WebP, and results end in .png"),
        (["in.png", "out.png", "--outscale", "-1"], "--outscale -1.0: it must be a positive number"),
        (["in.png", "out.png", "--format", "jpg"], "--format jpg is not what"),
        (["in.png", "out.png", "--alpha", "keep"], "--alpha keep: choose one of"),
        (["folder", "one.png"], "one.png is called like an image"),
        (["in.png", "folder/a.png/b.png"], "is a file, no folder"),
    ):
        paths = [tmp_path / name for name in arguments[:2]]
        code, out, err = hatchery("upscale", *paths, *arguments[2:], "--weights", "/nothing.pth")
        assert (code, out, err.count("\n"), message in err) == (2, "", 1, True), err
    assert files(tmp_path) == ["folder/a.png", "in.png"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_in_one_line(hatchery, weights, small_disk, tmp_path) -> None:
    write_picture(tmp_path / "in" / "a.png", Picture(np.zeros((8, 8, 3), np.uint8)))
    for name in ("b.png", "c.png"):
        write_picture(tmp_path / "in" / name, Picture(levels(150, 150)))
    code, out, err = hatchery("upscale", tmp_path / "in", small_disk, "--weights", weights, "--device", "cpu")
    assert (code, err.count("\n"), "c.png" in out) == (2, 1, False)
    assert f"{small_disk}/b.png cannot be written: No space left on device; 1 of 3 images are done" in err
    assert files(small_disk) == ["a.png"]
    code, _, err = hatchery("upscale", tmp_path / "in" / "b.png", small_disk / "b.png", "--weights", weights)
    assert (code, err) == (2, f"hatchery: {small_disk}/b.png cannot be written: No space left on device\n")
    assert files(small_disk) == ["a.png"]


def test_a_read_only_disk_is_one_line_before_work(hatchery, small_disk, tmp_path) -> None:
    write_picture(tmp_path / "in" / "a.png", Picture(levels(8, 8)))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for target in (small_disk, small_disk / "new", small_disk / "a.png" / "b"):
        code, _, err = hatchery("upscale", tmp_path / "in", target, "--weights", "/nothing.pth")
        assert (code, err) == (
            2,
            f"hatchery: {target} cannot be written: {small_disk} is read-only, or not yours: name another place\n",
        )


def test_a_file_that_is_too_large_costs_itself_alone(hatchery, weights, tmp_path) -> None:
    write_picture(tmp_path / "in" / "a.png", Picture(levels(150, 150)))
    write_picture(tmp_path / "in" / "b.png", Picture(levels(8, 8)))
    with file_size_limit(100_000):
        code, _, err = hatchery("upscale", tmp_path / "in", tmp_path / "out", "--weights", weights, "--device", "cpu")
    assert (code, err) == (1, f"hatchery: {tmp_path}/out/a.png cannot be written: File too large\n")
    assert files(tmp_path / "out") == ["b.png"]


def test_compiled_networks_give_the_same_image(hatchery, weights, tmp_path, monkeypatch) -> None:
    """By the compiler's front end alone: its back end would take minutes."""
    asked: list[dict[str, object]] = []

    def compile_eagerly(network: torch.nn.Module, **options: object) -> None:
        asked.append(options)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    write_picture(tmp_path / "in.png", Picture(levels(24, 16)))
    arguments = ["--weights", weights, "--precision", "fp32"]
    assert hatchery("upscale", tmp_path / "in.png", tmp_path / "plain.png", *arguments)[0] == 0
    assert hatchery("upscale", tmp_path / "in.png", tmp_path / "compiled.png", *arguments, "--compile")[0] == 0
    assert asked == [{"dynamic": False}]
    plain, compiled = (read_picture(tmp_path / f"{name}.png").pixels.astype(int) for name in ("plain", "compiled"))
    assert np.abs(plain - compiled).max() <= 1


def test_too_little_memory_is_one_line(hatchery, weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("model.inference.free_bytes", lambda device: 10**6)
    write_picture(tmp_path / "in.png", Picture(levels(80, 80)))
    code, _, err = hatchery("upscale", tmp_path / "in.png", tmp_path / "out.png", "--weights", weights)
    assert (code, err.count("\n"), "GB are free: free some" in err) == (2, 1, True)
    assert not (tmp_path / "out.png").exists()
