"""The U-shaped network: its fusions, its levels, and that everything else takes it as it takes HAT."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model import build, load
from model.blocks import drop_paths
from model.hat_unet import Fuse, HatUnet, LocalBranch
from model.inference import upscale_tensor
from model.init import bicubic_start, transfer
from model.weights import read_weights, recognise, save_network
from tests.unit.model.tiny import TINY_UNET, tiny_unet

FUSIONS = ("concat", "add", "gate")


def stirred(network: torch.nn.Module) -> torch.nn.Module:
    """With weights that let every part be heard."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_output_size(scale: int, fusion: str) -> None:
    network = tiny_unet(scale, fusion=fusion)
    assert (network.scale, network.arch, network.multiple) == (scale, "hat_unet", 8)
    with torch.no_grad():
        assert network(torch.rand(2, 3, 8, 24)).shape == (2, 3, 8 * scale, 24 * scale)
        assert upscale_tensor(network, torch.rand(1, 3, 5, 13)).shape == (1, 3, 5 * scale, 13 * scale)


def test_the_default_size() -> None:
    with torch.device("meta"):
        network = build("hat_unet", 1)
    assert sum(parameter.numel() for parameter in network.parameters()) == 25_150_479
    assert network.multiple == 64


def test_fusions_do_what_they_are_called() -> None:
    attended, local = torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6)
    assert torch.equal(Fuse(6, "add")(attended, local), attended + local)
    both = torch.cat([attended, local], -1)
    concat = Fuse(6, "concat")
    assert torch.allclose(concat(attended, local), both @ concat.mix.weight.T + concat.mix.bias, atol=1e-6)
    gate = Fuse(6, "gate")
    share = torch.sigmoid(both @ gate.gate.weight.T + gate.gate.bias)
    assert torch.allclose(gate(attended, local), share * attended + (1 - share) * local, atol=1e-6)


def test_the_local_branch_sees_a_pixels_neighbours_across_windows() -> None:
    branch = stirred(LocalBranch(4))
    x = torch.rand(1, 9, 9, 4)
    moved = x.clone()
    moved[0, 4, 4] += 1
    with torch.no_grad():
        changed = (branch(moved) - branch(x)).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[y, x] for y in (3, 4, 5) for x in (3, 4, 5)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_parameter_gets_its_true_gradient(fusion: str) -> None:
    """By finite differences along a random direction: the branches keep less than autograd would."""
    network = stirred(tiny_unet(fusion=fusion)).double().train()
    x = torch.rand(1, 3, 16, 8, dtype=torch.float64)
    network(x).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())
    for name, parameter in network.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(network(x).square().mean())
                parameter.sub_(direction, alpha=sign * step)
        found, expected = (losses[0] - losses[1]) / (2 * step), (parameter.grad * direction).sum()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7 * expected.abs().max() + 1e-8), name


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, saving = (stirred(tiny_unet(checkpoint=how)).train() for how in ("none", "block"))
    x = torch.rand(1, 3, 16, 16)
    for network in (plain, saving):
        network(x).square().mean().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_weights_tell_all_sizes(fusion: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depths": (1, 3, 2), "num_heads": (1, 2, 4), "refinement": 2, "mlp_ratio": 1.625}
    network = tiny_unet(2, fusion=fusion, **sizes)
    found = recognise(network.state_dict())
    expected = {"arch": "hat_unet", "scale": 2, "fusion": fusion, "embed_dim": 8, "window_size": 4, **sizes}
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()} == expected
    for suffix in ("pth", "safetensors"):
        save_network(tmp_path / f"w.{suffix}", network)
        again = load(tmp_path / f"w.{suffix}")
        x = torch.rand(1, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(again(x), network(x))
    assert set(read_weights(tmp_path / "w.pth")) == set(network.state_dict())


def test_a_ratio_that_leaves_no_whole_channels_is_recognised() -> None:
    network = tiny_unet(mlp_ratio=1.7)
    assert load(network.state_dict()).config["mlp_ratio"] == 13 / 8  # 13 channels of 8, 26 of 16


def test_it_starts_as_the_identity_and_passes_its_body_to_another_scale() -> None:
    network = tiny_unet(1)
    bicubic_start(network)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(network(x), x, atol=1e-6)
    report = transfer(stirred(tiny_unet(2)).state_dict(), network)
    assert report["encoder.1.blocks.0.attn.qkv.weight"] == "copied"
    assert report["down.0.conv.weight"] == "copied"


def test_stochastic_depth_is_counted_by_block() -> None:
    network = tiny_unet(drop_path_rate=0.4)
    assert isinstance(network, HatUnet)
    # encoder 2 + 2, decoder 2, refinement 1; the decoder has its level's rates
    assert [round(part.rate, 3) for part in drop_paths(network)] == [0, 0.133, 0.267, 0.4, 0, 0.133, 0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fusion": "sum"}, "fusion='sum': choose one of"),
        ({"embed_dim": 9, "num_heads": (1, 1)}, "embed_dim=9 must be even"),
        ({"refinement": -1}, "refinement=-1 must not be negative"),
        ({"num_heads": (1, 3)}, "not divisible by num_heads=3"),
        ({"compress_ratio": 3}, "hat_unet has no argument compress_ratio"),
    ],
)
def test_impossible_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("hat_unet", 1, **(TINY_UNET | overrides))


def test_an_input_that_does_not_halve_often_enough() -> None:
    with pytest.raises(ValueError, match="12 x 8 px, not multiples of 8"):
        tiny_unet()(torch.rand(1, 3, 12, 8))
