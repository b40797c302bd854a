"""ONNX files and torch.export programs against the network, at sizes that the export never saw."""

import json
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from model import export as exports
from model.blocks import UpscalingNetwork
from model.export import Padded, export_onnx, save_program
from model.inference import upscale_tensor
from model.tiles import padded
from tests.golden_cases import golden_network
from tests.unit.model.tiny import tiny, tiny_unet

NETWORKS = ("hat", *(pytest.param(arch, marks=pytest.mark.system) for arch in ("hmanet", "hat_unet")))
"""Half a minute each, so `make test` exports one, and `make system` all."""
SIZES = [(1, 9, 9), (1, 16, 16), (2, 24, 9), (3, 13, 40), (1, 64, 33)]
BELOW_A_WINDOW = [(1, 8, 8), (2, 3, 17), (1, 2, 1), (4, 1, 1)]
"""(images, height, width)."""


def images(size: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(size[0], 3, *size[1:])


@cache
def network(arch: str) -> UpscalingNetwork:
    """Golden weights, or ours: random ones that answer strongly."""
    if arch == "hat_unet":
        made = tiny_unet(1)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return made
    if arch == "hat":
        return golden_network("hat_x3_w8")
    return golden_network("hmanet_x4_w8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.mark.parametrize("arch", NETWORKS)
def test_onnx_equals_the_network_at_any_size(arch: str, folder: Path) -> None:
    path = folder / f"{arch}.onnx"
    assert export_onnx(path, network(arch)) <= 1e-4
    session = onnxruntime.InferenceSession(str(path))
    for size in SIZES + BELOW_A_WINDOW:
        low_res = images(size)
        (out,) = session.run(["high_res"], {"low_res": low_res.numpy()})
        assert (torch.from_numpy(out) - upscale_tensor(network(arch), low_res)).abs().max() <= 1e-4, size
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    scale = network(arch).scale
    larger = ["height", "width"] if scale == 1 else [f"{scale}*height", f"{scale}*width"]
    assert (taken.name, taken.shape) == ("low_res", ["batch", 3, "height", "width"])
    assert (given.name, given.shape) == ("high_res", ["batch", 3, *larger])
    onnx.checker.check_model(path)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["hatchery"]) == network(arch).config
    assert [item.name for item in folder.iterdir()] == [path.name]
    path.unlink()


@pytest.mark.parametrize("arch", NETWORKS)
def test_programs_equal_the_network_above_a_window(arch: str, folder: Path) -> None:
    path = folder / f"{arch}.pt2"
    save_program(path, network(arch))
    about = {"hatchery.json": ""}
    program = torch.export.load(path, extra_files=about)
    assert json.loads(about["hatchery.json"]) == network(arch).config
    for size in SIZES:
        low_res = images(size)
        assert (program.module()(low_res) - upscale_tensor(network(arch), low_res)).abs().max() <= 1e-5, size
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.rand(1, 3, 8, 8))
    path.unlink()


@pytest.mark.parametrize("size", SIZES + BELOW_A_WINDOW + [(1, 5, 12)])
def test_padding_inside_the_graph_is_that_of_inference(size: tuple[int, int, int]) -> None:
    x = images(size)
    seen: list[torch.Tensor] = []
    module = Padded(tiny())
    module.network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        out = module(x)
    assert torch.equal(seen[0], padded(x, 8))
    assert out.shape == (size[0], 3, 2 * size[1], 2 * size[2])


def test_exporting_leaves_the_network_as_it_was() -> None:
    network = tiny(1, depths=(1,), drop_path_rate=0.5).double().train()
    exports.export_program(network)
    assert network.training
    assert network.conv_first.weight.dtype == torch.float64


def test_the_graph_is_compared_in_fp32(tmp_path: Path) -> None:
    """What the network computes in by itself, here bf16, on GPUs TF32, is not what the graph computes in."""
    steps: list[tuple[int, int, str]] = []
    network = tiny(1, depths=(1,)).bfloat16()
    assert export_onnx(tmp_path / "a.onnx", network, lambda *step: steps.append(step)) <= 1e-5
    whats = ["tracing hat x1", "translating it to ONNX", "comparing it with PyTorch in onnxruntime"]
    assert steps == [(number, 3, what) for number, what in enumerate(whats, start=1)]


def test_a_graph_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"differs from the network by .* not written"):
        export_onnx(tmp_path / "a.onnx", tiny(1, depths=(1,)))
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnxscript is missing\): pip install 'hatchery\[export\]'"):
        exports.require_onnx()
