"""An independent program reads what is written here, and the other way round: spandrel's HAT, x1 to x8."""

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from model import build, load
from model.blocks import UpscalingNetwork
from model.inference import upscale_tensor
from model.weights import save_network
from tests.unit.model.tiny import TINY

UNUSED = {"torchvision.transforms.functional": ("InterpolationMode", "rotate", "normalize")}
"""What spandrel imports from torchvision for two networks that are not HAT, when it is imported."""


@pytest.fixture(scope="module")
def spandrel() -> Any:
    """The package; skips where it is absent, fails there where CI=true. Without torchvision, by a stand-in for it."""
    if importlib.util.find_spec("spandrel") is None:
        message = "spandrel is not installed: pip install --no-deps spandrel==0.4.2, and einops"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in ("torchvision", "torchvision.transforms", *UNUSED):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            for name, attributes in UNUSED.items():
                for attribute in attributes:
                    setattr(sys.modules[name], attribute, object())
        return importlib.import_module("spandrel")


def stirred(network: UpscalingNetwork) -> UpscalingNetwork:
    """Weights by which every part answers strongly."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def read_by(spandrel: Any, path: Path) -> Any:
    """The network that spandrel makes of a file, in eval mode, on the CPU."""
    return spandrel.ModelLoader("cpu").load_from_file(path).eval()


def difference(ours: UpscalingNetwork, theirs: Any, size: tuple[int, int]) -> float:
    """Largest difference of the outputs, in their standard deviations."""
    low_res = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, out = theirs.model(low_res), upscale_tensor(ours, low_res)
    return float((out - expected).abs().max() / expected.std())


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_what_is_written_is_what_spandrel_reads(scale: int, suffix: str, spandrel: Any, tmp_path: Path) -> None:
    torch.manual_seed(scale)
    network = stirred(build("hat", scale, **(TINY | {"embed_dim": 24, "depths": (2, 1), "num_heads": (2, 3)})))
    save_network(tmp_path / f"w{suffix}", network)
    theirs = read_by(spandrel, tmp_path / f"w{suffix}")
    assert (theirs.architecture.id, theirs.scale) == ("HAT", scale)
    assert difference(network, theirs, (20, 13)) <= 1e-4
    torch.save(theirs.model.state_dict(), tmp_path / "theirs.pth")
    again = load(tmp_path / "theirs.pth")
    assert difference(again, theirs, (16, 24)) <= 1e-4


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(("arch", "scale"), [("hat_s", 3), ("hat", 1), ("hat_l", 4)])
def test_published_sizes_are_what_spandrel_reads(arch: str, scale: int, spandrel: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(arch, scale).eval()
    save_network(tmp_path / "w.pth", network)
    theirs = read_by(spandrel, tmp_path / "w.pth")
    assert theirs.scale == scale
    assert difference(network, theirs, (16, 16)) <= 1e-3


def test_the_residual_head_of_before_is_ours_alone(spandrel: Any, tmp_path: Path) -> None:
    save_network(tmp_path / "w.pth", build("hat", 1, restoration_head="residual", **TINY))
    assert load(tmp_path / "w.pth").is_residual
    with pytest.raises(RuntimeError, match="conv_before_upsample"):
        read_by(spandrel, tmp_path / "w.pth")
