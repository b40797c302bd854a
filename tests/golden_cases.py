"""The golden cases: what the published code of HAT and HMANet made of drawn weights and inputs (`tests/golden`).

Weights, input and target follow from seeds and are drawn here; the output, the loss and a *sketch* of every gradient
are kept. A sketch holds some of a gradient's entries, its largest one, and sums of all entries with drawn signs, in
which a fault anywhere shows. `tests/parity/test_full_files.py` holds them against the whole files in `../shared`.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import build
from model.blocks import UpscalingNetwork
from model.weights import save_pth
from tests.shared_data import ROOT

GOLDEN = ROOT / "tests" / "golden"
CASES = ("hat_x2_w16", "hat_x3_w8", "hat_x4_w16", "hmanet_x2_w16", "hmanet_x4_w8")
"""All on non-square input; the place in this list gives the seeds."""
_ENTRIES, _SUMS = 512, 8
NOISE = 1e-8
"""Gradients of at most 0.2 are compared; what is zero but for rounding (see `gradient_errors`) is below this."""


@dataclass(frozen=True)
class Sketch:
    """What is kept of a gradient: `largest` of its sizes, evenly spread `entries`, signed `sums` of all of them."""

    largest: float
    entries: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, gradient: torch.Tensor) -> "Sketch":
        """Of a whole gradient, in fp32; the sums are taken in fp64."""
        flat = gradient.detach().flatten().to(torch.float32)
        spread = np.linspace(0, len(flat) - 1, min(_ENTRIES, len(flat))).round().astype(np.int64)
        signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (_SUMS, len(flat))))
        return cls(float(flat.abs().max()), flat[torch.from_numpy(spread)], signs @ flat.double())

    def error(self, gradient: torch.Tensor) -> float:
        """Largest difference from `gradient`, relative to the largest entry; that of a sum per root of its terms.

        HMANet's golden cases have position networks one channel wide, whose layer norm makes the same bias of every
        offset: their gradients are zero but for rounding, and compared as such.
        """
        other, size = Sketch.of(gradient), max(self.largest, NOISE / 1e-4)
        sums = (other.sums - self.sums).abs().max().item() / gradient.numel() ** 0.5
        return max((other.entries - self.entries).abs().max().item(), sums, abs(other.largest - self.largest)) / size


@dataclass(frozen=True)
class Golden:
    """Input, target and the published output, (n, 3, height, width) each, the published L1 loss, and gradients."""

    x: torch.Tensor
    y: torch.Tensor
    target: torch.Tensor
    loss: float
    gradients: dict[str, Sketch]


def options(case: str) -> dict[str, Any]:
    """How the published code was told to build the case, `scale` included."""
    known = dict(json.loads((GOLDEN / "cases.json").read_text())[case]["kwargs"])
    return {"scale": known.pop("upscale"), **known}


def golden_network(case: str, **overrides: Any) -> UpscalingNetwork:
    """The case's network with its weights."""
    network = build(case.split("_")[0], **(options(case) | overrides))
    parameters, order = dict(network.named_parameters()), golden(case).gradients
    assert parameters.keys() == order.keys()
    generator = torch.Generator().manual_seed(100 + CASES.index(case))
    with torch.no_grad():
        for name in order:
            parameters[name].copy_(_drawn(name, parameters[name].shape, generator))
    return network.eval()


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "relative_position_bias_table" in name:
        return torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * shape[1:].numel() ** -0.5
    return 1 + 0.2 * values if "norm" in name and name.endswith("weight") else 0.1 * values


def golden_file(case: str, folder: Path) -> Path:
    """The case's weights as a published `.pth` file in this folder."""
    path = folder / f"{case}.pth"
    if not path.exists():
        save_pth(path, golden_network(case).state_dict())
    return path


@cache
def golden(case: str) -> Golden:
    """What is known of the case."""
    with np.load(GOLDEN / f"{case}.npz") as file:
        kept = {name: torch.from_numpy(file[name]) for name in file.files}
    generator = torch.Generator().manual_seed(7 + CASES.index(case))
    x = torch.rand(*json.loads((GOLDEN / "cases.json").read_text())[case]["input"], generator=generator)
    target = torch.rand(kept["y"].shape, generator=generator)
    names = [name.removeprefix("sums:") for name in kept if name.startswith("sums:")]
    gradients = {
        name: Sketch(kept[f"largest:{name}"].item(), kept[f"entries:{name}"], kept[f"sums:{name}"]) for name in names
    }
    return Golden(x, kept["y"], target, kept["loss"].item(), gradients)
