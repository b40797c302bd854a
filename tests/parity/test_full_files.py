"""What the tests keep of large files in `../shared` is what those hold."""

import numpy as np
import torch

from data_prep.bicubic import imresize, to_uint8
from model import load
from tests.golden_cases import CASES, Sketch, golden, golden_network, options
from tests.golden_crops import NAMES, SCALES, crop, kept_crop, read_image
from tests.shared_data import shared


def test_golden_cases_are_those_of_the_whole_files() -> None:
    """Weights and inputs are drawn to the last bit, and the network has every gradient, entry by entry."""
    folder = shared("golden")
    for case in CASES:
        published = torch.load(folder / f"{case}.pth", weights_only=True)["params_ema"]
        network, kept = golden_network(case), golden(case)
        state = network.state_dict()
        assert state.keys() == published.keys()
        for key, value in published.items():  # drawn a little differently where the processor has no AVX2
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
        values = {name: torch.from_numpy(value) for name, value in np.load(folder / f"{case}.npz").items()}
        assert torch.equal(kept.x, values["x"])
        assert torch.equal(kept.y, values["y"])
        assert torch.equal(kept.target, values["target"])
        assert kept.loss == values["loss"].item()
        for name, sketch in kept.gradients.items():
            found = Sketch.of(values[f"grad:{name}"])
            assert (found.largest, found.entries.tolist()) == (sketch.largest, sketch.entries.tolist())
            torch.testing.assert_close(found.sums, sketch.sums)


def test_every_gradient_entry_equals_the_published() -> None:
    folder = shared("golden")
    for case in CASES:
        network = load(folder / f"{case}.pth", **{k: v for k, v in options(case).items() if k == "interval_size"})
        values = golden(case)
        network(values.x).backward((values.y - values.target).sign() / values.y.numel())
        published = np.load(folder / f"{case}.npz")
        for name, parameter in network.named_parameters():
            expected = torch.from_numpy(published[f"grad:{name}"])
            assert parameter.grad is not None
            size = max(expected.abs().max().item(), 1e-4)
            assert (parameter.grad - expected).abs().max().item() <= 1e-4 * size, (case, name)


def test_whole_published_low_res_files_are_equalled() -> None:
    """Set5 x2, x3 and x4, rounded between the passes, and x8, rounded once; the crops that tests keep are of these."""
    folder = shared("data/benchmark/Set5")
    for name in NAMES:
        high_res = read_image(folder / f"HR/{name}.png")
        np.testing.assert_array_equal(crop(high_res, name, 1), kept_crop(name, 1))
        for scale in SCALES:
            published = read_image(folder / f"LR_bicubic/X{scale}/{name}x{scale}.png")
            whole = high_res[: high_res.shape[0] // scale * scale, : high_res.shape[1] // scale * scale]
            made = to_uint8(imresize(whole, 1 / 8, rounding="float")) if scale == 8 else imresize(whole, 1 / scale)
            np.testing.assert_array_equal(made, published)
            np.testing.assert_array_equal(crop(published, name, scale), kept_crop(name, scale))
