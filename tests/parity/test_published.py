"""Every network against the published code's outputs and gradients, and the published files' keys and shapes."""

import copy
import gzip
import json
import pickle
from functools import cache
from typing import Any

import pytest
import torch

from model import build, load
from model.blocks import UpscalingNetwork
from model.losses import build_loss
from model.weights import recognise, save_pth, save_safetensors
from tests.golden_cases import CASES, GOLDEN, Golden, Sketch, golden, golden_network, options

UNSEEN: dict[str, dict[str, Any]] = {"hmanet_x4_w8": {"interval_size": 2}}
"""Arguments that the weights do not show."""
SIZES = {"hat_s": "HAT-S", "hat": "HAT", "hat_l": "HAT-L", "hmanet": "HMANet"}
PARAMETERS = {
    "hat_s": {2: 9_473_471, 3: 9_658_111, 4: 9_621_183},
    "hat": {2: 20_624_795, 3: 20_809_435, 4: 20_772_507},
    "hat_l": {2: 40_698_863, 3: 40_883_503, 4: 40_846_575},
    "hmanet": {2: 69_722_675, 3: 69_907_315, 4: 69_870_387},
}
PUBLISHED = [(arch, scale) for arch in SIZES for scale in (2, 3, 4)]


def gradient_errors(network: UpscalingNetwork, values: Golden) -> dict[str, float]:
    """Per parameter the largest difference from the published gradient, relative to its largest entry."""
    errors = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        errors[name] = values.gradients[name].error(parameter.grad)
    return errors


def l1_slope(values: Golden) -> torch.Tensor:
    """Gradient of the mean L1 loss at the published output.

    At the network's own output a few pixels within 1e-6 of the target would change their sign in fp32.
    """
    return (values.y - values.target).sign() / values.y.numel()


@cache
def published_shapes() -> dict[str, Any]:
    with gzip.open(GOLDEN / "official_state_dict_shapes.json.gz", "rt") as file:
        return json.load(file)


@pytest.mark.parametrize("case", CASES)
def test_output_and_loss(case: str) -> None:
    network, values = golden_network(case), golden(case)
    with torch.no_grad():
        out = network(values.x)
    assert (out - values.y).abs().max() <= 1e-5
    assert build_loss("l1")(out, values.target).item() == pytest.approx(values.loss, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_gradients(case: str, checkpoint: str) -> None:
    values = golden(case)
    network = golden_network(case, checkpoint=checkpoint)
    network(values.x).backward(l1_slope(values))
    errors = gradient_errors(network, values)
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", ["hat_x2_w16", "hmanet_x2_w16"])
def test_gradients_of_the_loss_itself_in_double(case: str) -> None:
    network, values = golden_network(case), golden(case)
    network.double()
    build_loss("l1")(network(values.x.double()), values.target.double()).backward()
    assert max(gradient_errors(network, values).values()) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_train_mode_without_drop_path(case: str) -> None:
    values = golden(case)
    network = golden_network(case, drop_path_rate=0.0).train()
    with torch.no_grad():
        assert (network(values.x) - values.y).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["hat_x2_w16", "hmanet_x2_w16"])
def test_train_mode_with_drop_path_differs(case: str) -> None:
    values = golden(case)
    torch.manual_seed(0)
    network = golden_network(case, drop_path_rate=0.9).train()
    with torch.no_grad():
        assert (network(values.x) - values.y).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["hat_x3_w8", "hmanet_x4_w8"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_output_survives_saving(case: str, suffix: str, tmp_path: Any) -> None:
    network, values = golden_network(case), golden(case)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        save_pth(path, network.state_dict())
    else:
        save_safetensors(path, network.state_dict(), {"scale": "3"})
    with torch.no_grad():
        assert torch.equal(load(path, **UNSEEN.get(case, {}))(values.x), network(values.x))


@pytest.mark.parametrize("case", ["hat_x3_w8", "hmanet_x4_w8"])
def test_output_survives_copies(case: str) -> None:
    network, values = golden_network(case), golden(case)
    with torch.no_grad():
        expected = network(values.x)
        assert torch.equal(copy.deepcopy(network)(values.x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(network))(values.x), expected)


@pytest.mark.parametrize("case", ["hat_x2_w16", "hmanet_x2_w16"])
def test_bf16_autocast_is_near_fp32(case: str) -> None:
    """Within 2 % of the output's spread; the golden weights are random, so errors are not small as in a trained net."""
    network, values = golden_network(case), golden(case)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = network(values.x)
    assert out.dtype == torch.float32
    assert (out - values.y).abs().mean() <= 0.02 * values.y.std()


@pytest.mark.parametrize(("arch", "scale"), PUBLISHED)
def test_published_keys_shapes_and_counts(arch: str, scale: int) -> None:
    with torch.device("meta"):
        network = build(arch, scale)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    published = published_shapes()[f"{SIZES[arch]}_x{scale}"]
    assert shapes == published["state_dict"]
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == published["parameters"] == PARAMETERS[arch][scale]


@pytest.mark.parametrize(("arch", "scale"), PUBLISHED)
def test_published_sizes_are_recognised(arch: str, scale: int) -> None:
    shapes = published_shapes()[f"{SIZES[arch]}_x{scale}"]["state_dict"]
    found = recognise({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    with torch.device("meta"):
        assert build(**found).config == build(arch, scale).config | {"arch": found["arch"]}


@pytest.mark.parametrize("case", CASES)
def test_golden_arguments_are_recognised(case: str) -> None:
    found = recognise(golden_network(case).state_dict())
    assert {name: found.get(name, value) for name, value in options(case).items()} == options(case)


@pytest.mark.parametrize("case", ["hat_x2_w16", "hmanet_x4_w8"])
def test_a_fault_anywhere_in_a_gradient_shows_in_its_sketch(case: str) -> None:
    """One output channel missing, turned, or another one's, at entries that are not kept."""
    network, values = golden_network(case), golden(case)
    network(values.x).backward(l1_slope(values))
    whole = network.get_parameter("upsample.0.weight").grad
    assert whole is not None
    kept = Sketch.of(whole)
    assert kept.error(whole) == 0
    spread = torch.linspace(0, whole.numel() - 1, len(kept.entries)).round().long()
    unseen = torch.ones(whole.numel(), dtype=torch.bool)
    unseen[spread] = False
    unseen = unseen.view_as(whole)
    for wrong in (torch.zeros_like(whole), whole.flip(3), whole.roll(1, 0)):
        faulty = whole.clone()
        faulty[7] = torch.where(unseen[7], wrong[7], whole[7])
        assert kept.error(faulty) > 1e-4
