"""Starts from bicubic interpolation and from a network of another scale."""

from itertools import permutations

import numpy as np
import pytest
import torch

from data_prep.bicubic import imresize
from model.blocks import UpscalingNetwork
from model.inference import upscale
from model.init import bicubic_start, transfer
from model.metrics import psnr_y
from tests.photographs import shipped
from tests.unit.model.tiny import tiny, tiny_hmanet


def keys_matrix(length: int, scale: int) -> np.ndarray:
    """(scale length, length): bicubic interpolation (a = -0.5) along one axis, written out pixel by pixel."""
    matrix = np.zeros((length * scale, length))
    for out in range(length * scale):
        for source in range(length):
            x = abs((out + 0.5) / scale - 0.5 - source)
            if x <= 1:
                matrix[out, source] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[out, source] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return matrix


def interior_error(network: UpscalingNetwork, expected_chw: np.ndarray, low_res_chw: np.ndarray, rim: int) -> float:
    """Largest difference, in levels of 255, more than `rim` low-resolution pixels inside."""
    with torch.no_grad():
        out_chw = network(torch.from_numpy(low_res_chw)[None].float())[0].numpy()
    inside = slice(rim * network.scale, -rim * network.scale)
    return float(np.abs(out_chw - expected_chw)[:, inside, inside].max() * 255)


@pytest.mark.parametrize("embed_dim", [3, 12])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_bicubic_start_is_bicubic_interpolation(scale: int, embed_dim: int) -> None:
    network = tiny(scale, embed_dim=embed_dim, num_heads=(3,), squeeze_factor=3)
    bicubic_start(network)
    low_res_chw = np.random.default_rng(0).random((3, 16, 24))
    expected = np.einsum("oh,chw,pw->cop", keys_matrix(16, scale), low_res_chw, keys_matrix(24, scale))
    assert interior_error(network, expected, low_res_chw, rim=2) <= 1e-4


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_bicubic_start_of_hmanet(scale: int) -> None:
    network = tiny_hmanet(scale)
    bicubic_start(network)
    low_res_chw = np.random.default_rng(0).random((3, 16, 24))
    expected = np.einsum("oh,chw,pw->cop", keys_matrix(16, scale), low_res_chw, keys_matrix(24, scale))
    assert interior_error(network, expected, low_res_chw, rim=2) <= 1e-4


@pytest.mark.parametrize("head", ["reconstruction", "residual"])
@pytest.mark.parametrize("embed_dim", [3, 12])
def test_bicubic_start_of_scale_1_is_the_identity(embed_dim: int, head: str) -> None:
    network = tiny(1, embed_dim=embed_dim, num_heads=(3,), squeeze_factor=3, restoration_head=head)
    bicubic_start(network)
    low_res_chw = np.random.default_rng(0).random((3, 16, 24))
    assert interior_error(network, low_res_chw, low_res_chw, rim=1) <= 1e-4


@pytest.mark.parametrize("scale", [1, 2])
def test_bicubic_start_can_learn(scale: int) -> None:
    """Gradient reaches the tail and the layer after the body at once, and the body after one step of that."""
    # a narrower channel gate may be dead: it ends in a ReLU
    network = tiny(scale, squeeze_factor=1)
    bicubic_start(network)
    x, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8 * scale, 8 * scale)
    (network(x) - target).square().mean().backward()
    assert network.conv_after_body.weight.grad is not None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.1 * parameter.grad
    network.zero_grad()
    (network(x) - target).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_transfer_within_a_scale_copies_everything() -> None:
    source, network = tiny(2, seed=1), tiny(2)
    report = transfer(source.state_dict(), network)
    assert set(report.values()) == {"copied"}
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        (2, 3, {"upsample.0.weight": "fresh: (256, 64, 3, 3) in the source, (576, 64, 3, 3) here"}),
        (3, 4, {"upsample.0.bias": "fresh: (576,) in the source, (256,) here"}),
        (2, 4, {"upsample.2.weight": "fresh: not in the source"}),
    ],
)
def test_fresh_tail_is_the_published_cascade(old: int, new: int, differs: dict[str, str]) -> None:
    source, network = tiny(old, seed=1).state_dict(), tiny(new)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = transfer(source, network, tail="fresh")
    assert report.items() >= differs.items()
    for key, value in network.state_dict().items():
        assert report[key] == "copied" or key.startswith("upsample.")
        assert torch.equal(value, source[key] if report[key] == "copied" else before[key])
    assert report["upsample.0.weight"] == ("copied" if (old, new) == (2, 4) else report["upsample.0.weight"])


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2), (2, 4), (3, 4), (2, 8), (4, 8)])
def test_resampled_tail_keeps_a_linear_ramp(old: int, new: int) -> None:
    """A source that reproduces linear images (bicubic does) is followed by a network that does so too.

    Not exactly from x2 to x3, where a few small taps do not fit the 3x3 any more; the ramp spans 100 levels.
    """
    source, network = tiny(old), tiny(new, seed=1)
    bicubic_start(source)
    if old == 4:  # x4's own bicubic start computes all sub-pixels in its first stage; here come two cascades
        source = tiny(4)
        transfer(_bicubic(2).state_dict(), source)
    transfer(source.state_dict(), network)
    rows, columns = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")
    ramp = np.stack([0.02 * rows, 0.03 * columns, 0.5 + 0.01 * rows - 0.02 * columns])
    expected = np.einsum("oh,chw,pw->cop", keys_matrix(16, new), ramp, keys_matrix(16, new))
    assert interior_error(network, expected, ramp, rim=4) <= 1e-2


@pytest.mark.parametrize(("old", "new"), list(permutations((2, 3, 4, 8), 2)))
def test_resampled_bicubic_start_is_as_good_as_the_scales_own(old: int, new: int) -> None:
    """On a photograph, in any direction; from more stages to fewer the last one does the work of all that are left."""
    network = tiny(new, seed=1)
    transfer(_bicubic(old).state_dict(), network)
    assert _psnr_of(network) >= _psnr_of(_bicubic(new)) - 0.1


def test_a_cascade_there_and_back_loses_nothing() -> None:
    up, back = tiny(4, seed=1), tiny(2, seed=2)
    transfer(_bicubic(2).state_dict(), up)
    report = transfer(up.state_dict(), back)
    assert report["upsample.0.weight"] == "resampled: the image from x4 sub-pixels to x2"
    assert report["conv_last.bias"] == "passing through: part of upsample.0"
    assert _psnr_of(back) >= _psnr_of(_bicubic(2)) - 0.05


@pytest.mark.parametrize(("old", "new"), [(4, 2), (8, 2), (8, 4)])
def test_any_tail_of_more_stages_gives_its_image_in_fewer_pixels(old: int, new: int) -> None:
    """Also one far from bicubic: on a constant image, of which no part differs, the colours are the source's."""
    source, network = tiny(old, seed=1), tiny(new, seed=2)
    for module in (source.layers, source.conv_after_body):
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
    transfer(source.state_dict(), network)
    with torch.no_grad():
        expected, out = (net(torch.full((1, 3, 24, 24), 0.3))[0] for net in (source, network))
    factor, middle = old // new, slice(10 * new, 14 * new)
    means = torch.nn.functional.avg_pool2d(expected, factor)[:, middle, middle].mean((1, 2))
    assert torch.allclose(out[:, middle, middle].mean((1, 2)), means, atol=1e-2)


def _psnr_of(network: UpscalingNetwork) -> float:
    high_res = shipped("chelsea.png")[:192, 100:292]
    return psnr_y(upscale(network, imresize(high_res, 1 / network.scale)), high_res, network.scale)


def _bicubic(scale: int) -> UpscalingNetwork:
    network = tiny(scale)
    bicubic_start(network)
    return network


@pytest.mark.parametrize(("old", "new"), [(2, 3), (2, 4), (3, 4), (4, 8), (4, 2), (8, 3)])
def test_cascade_of_hmanet(old: int, new: int) -> None:
    source, network = tiny_hmanet(old, seed=1).state_dict(), tiny_hmanet(new)
    report = transfer(source, network)
    state = network.state_dict()
    changed = {key for key in report if report[key] != "copied"}
    assert changed
    assert all(key.startswith(("upsample.", "conv_last.") if new < old else "upsample.") for key in changed)
    assert all(torch.equal(state[key], source[key]) for key in report.keys() - changed)


def test_resampled_tail_is_near_the_source_on_a_smooth_image() -> None:
    network = tiny(3, seed=1)
    report = transfer(_bicubic(2).state_dict(), network)
    assert report["upsample.0.weight"] == "resampled: x2 sub-pixels to x3"
    rows, columns = np.meshgrid(np.arange(24.0), np.arange(24.0), indexing="ij")
    smooth = np.stack([0.5 + 0.4 * np.sin((rows + i * columns) / 4) for i in range(3)])
    expected = np.einsum("oh,chw,pw->cop", keys_matrix(24, 3), smooth, keys_matrix(24, 3))
    assert interior_error(network, expected, smooth, rim=3) <= 2


def test_resample_reports_what_was_shared_and_what_was_interpolated() -> None:
    report = transfer(tiny(2).state_dict(), tiny(4))
    assert report["upsample.0.weight"] == "copied"
    assert report["upsample.2.weight"] == "interpolating: 3x3 taps of x2 on each feature"
    assert report["conv_last.weight"] == "copied"


def test_bicubic_tail_keeps_the_body_and_resets_the_tail() -> None:
    source, network = _bicubic(2), tiny(3, seed=1)
    report = transfer(source.state_dict(), network, tail="bicubic")
    assert report["conv_last.weight"] == report["upsample.0.bias"] == "bicubic"
    assert report["conv_after_body.weight"] == "copied"
    low_res_chw = np.random.default_rng(0).random((3, 16, 16))
    expected = np.einsum("oh,chw,pw->cop", keys_matrix(16, 3), low_res_chw, keys_matrix(16, 3))
    assert interior_error(network, expected, low_res_chw, rim=2) <= 1e-4


@pytest.mark.parametrize("tail", ["resample", "bicubic", "fresh"])
def test_transfer_to_and_from_a_residual_head_leaves_what_does_not_exist(tail: str) -> None:
    network = tiny(1, embed_dim=64, restoration_head="residual")  # so wide that conv_last has the others' shape
    report = transfer(tiny(2, seed=1, embed_dim=64).state_dict(), network, tail=tail)
    assert report["conv_last.weight"] == "fresh: of a reconstruction head in the source"
    assert report["conv_first.weight"] == "copied"
    assert not any(key.startswith("upsample") for key in report)
    for scale in (1, 2):
        up = transfer(network.state_dict(), tiny(scale, embed_dim=64), tail=tail)
        wanted = "bicubic" if tail == "bicubic" else "fresh: of a residual head in the source"
        assert up["conv_last.weight"] == wanted
    assert up["upsample.0.weight"] == ("bicubic" if tail == "bicubic" else "fresh: not in the source")


@pytest.mark.parametrize("old", [2, 3, 4, 8])
def test_scale_1_gives_the_image_of_a_larger_scale_at_its_pixels(old: int) -> None:
    network = tiny(1, seed=1)
    report = transfer(_bicubic(old).state_dict(), network)
    assert report["conv_last.bias"] == f"resampled: the image from x{old} sub-pixels to x1"
    image = shipped("chelsea.png")[:96, 100:196]
    assert psnr_y(upscale(network, image), image, 4) >= 32


@pytest.mark.parametrize("new", [2, 4])
def test_scale_1_grows_by_interpolation(new: int) -> None:
    network = tiny(new, seed=1)
    report = transfer(_bicubic(1).state_dict(), network)
    assert report["conv_last.weight"] == "copied"
    assert report["upsample.0.weight"] == "interpolating: 3x3 taps of x2 on each feature"
    assert _psnr_of(network) >= _psnr_of(_bicubic(new)) - 1


def test_a_source_without_indices_is_completed_and_one_with_others_refused() -> None:
    source = tiny(2, seed=1).state_dict()
    index = "relative_position_index_SA"
    report = transfer({key: value for key, value in source.items() if key != index}, tiny(3))
    assert report[index] == "computed"
    with pytest.raises(ValueError, match=f"{index} of the source has other values than hat computes"):
        transfer({**source, index: source[index] + 1}, tiny(3))
