"""What `build` makes and what it refuses."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch

from model import build
from tests.unit.model.tiny import TINY, TINY_HMANET, tiny, tiny_hmanet


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_output_size(scale: int) -> None:
    network = tiny(scale)
    assert (network.scale, network.arch, network.multiple) == (scale, "hat", 8)
    with torch.no_grad():
        assert network(torch.rand(2, 3, 8, 16)).shape == (2, 3, 8 * scale, 16 * scale)


def test_config_is_json_and_rebuilds_the_network() -> None:
    network = tiny(3, overlap_ratio=0.25, conv_scale=0.5, checkpoint="block")
    again = build(**json.loads(json.dumps(network.config)))
    assert again.config == network.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_output_size_of_hmanet(scale: int) -> None:
    network = tiny_hmanet(scale)
    assert (network.scale, network.arch, network.multiple) == (scale, "hmanet", 8)
    with torch.no_grad():
        assert network(torch.rand(2, 3, 8, 16)).shape == (2, 3, 8 * scale, 16 * scale)


@pytest.mark.parametrize("arch", ["hat_s", "hat_l", "hmanet", "hat_unet"])
def test_config_of_a_preset_rebuilds_it(arch: str) -> None:
    with torch.device("meta"):
        network = build(arch, 2)
        again = build(**network.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"upscale": 2}, "no argument upscale"),
        ({"num_heads": (5,)}, "not divisible by num_heads=5"),
        ({"depths": (2, 2)}, "one entry per group"),
        ({"depths": (0,)}, "must be positive"),
        ({"depths": (), "num_heads": ()}, "one entry per group"),
        ({"squeeze_factor": 13}, "squeeze_factor=13 leaves no channel"),
        ({"compress_ratio": 13}, "compress_ratio=13 leaves no channel"),
        ({"compress_ratio": 0}, "compress_ratio=0 leaves no channel"),
        ({"window_size": 7}, "must be even"),
        ({"overlap_ratio": 0.2}, "no even rim"),
        ({"overlap_ratio": 0.0}, "no even rim"),
        ({"overlap_ratio": 0.53}, "no even rim"),
        ({"embed_dim": "12"}, "embed_dim='12': expected a whole number"),
        ({"embed_dim": 12.5}, "embed_dim=12.5: expected a whole number"),
        ({"window_size": True}, "window_size=True: expected a whole number"),
        ({"depths": 2}, "depths=2: expected a list of whole numbers"),
        ({"num_heads": (2.0,)}, r"num_heads=\(2.0,\): expected a list of whole numbers"),
        ({"conv_scale": "0.1"}, "conv_scale='0.1': expected a number"),
        ({"img_range": float("nan")}, "img_range=nan: expected a number"),
        ({"mlp_ratio": None}, "mlp_ratio=None: expected a number"),
        ({"drop_path_rate": 1.0}, "outside 0 <= rate < 1"),
        ({"img_range": 0.0}, "must be positive"),
        ({"mlp_ratio": 0.0}, "must be positive"),
        ({"checkpoint": "all"}, "choose one of"),
    ],
)
def test_impossible_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("hat", 2, **(TINY | overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"compress_ratio": 3}, "hmanet has no argument compress_ratio"),
        ({"interval_size": 3}, "interval_size=3 does not divide window_size=8"),
        ({"interval_size": 0}, "interval_size=0 does not divide"),
        ({"num_heads": (1,)}, "heads must be even"),
        ({"num_heads": (4,), "embed_dim": 36}, "num_heads=4 with embed_dim=36"),
        ({"embed_dim": 28}, "embed_dim=28: grid attention's position network"),
    ],
)
def test_impossible_arguments_of_hmanet(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("hmanet", 2, **(TINY_HMANET | overrides))


def test_unknown_architecture_and_scale() -> None:
    with pytest.raises(ValueError, match="'hatt' is unknown: choose one of hat, hat_s, hat_l, hmanet, hat_unet"):
        build("hatt", 2)
    for scale in (5, "2", True, [2]):
        with pytest.raises(ValueError, match="scale="):
            build("hat", scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 3, 7, 8), (1, 3, 0, 8)])
def test_input_that_is_no_multiple_of_the_window(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"not multiples of 8: .*model\.inference"):
        tiny()(torch.rand(shape))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8)])
def test_input_of_another_layout(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        tiny()(torch.rand(shape))


def test_tables_are_no_part_of_the_weights_but_follow_copies_and_casts() -> None:
    network = tiny()
    assert not {"mean", "shift_masks"} & set(network.state_dict())
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(copy.deepcopy(network)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), expected)
        assert torch.allclose(network.double()(x.double()).float(), expected, atol=1e-5)


def test_checkpointing_changes_memory_only() -> None:
    """Same gradients, also with stochastic depth: the recomputation draws the same random numbers."""
    gradients = []
    for checkpoint in ("none", "block"):
        network = tiny(checkpoint=checkpoint, drop_path_rate=0.5).train()
        torch.manual_seed(1)
        network(torch.full((4, 3, 8, 8), 0.3)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stochastic_depth_grows_linearly_over_all_blocks() -> None:
    network = tiny(depths=(2, 3), num_heads=(2, 2), drop_path_rate=0.4)
    rates = [module.rate for name, module in network.named_modules() if name.endswith("drop_path")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_published_initialization() -> None:
    network = tiny(embed_dim=48)
    for name, parameter in network.named_parameters():
        if name.endswith(("qkv.weight", "fc1.weight", "bias_table")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        if name.endswith(("qkv.bias", "fc1.bias", "proj.bias")):
            assert not parameter.any(), name


def test_residual_trunk_stays_fp32_under_autocast() -> None:
    network = tiny()
    seen = []
    for module in network.modules():
        if type(module).__name__ in ("HybridAttentionBlock", "OverlappingAttentionBlock", "ResidualGroup"):
            module.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = network(torch.rand(1, 3, 8, 8))
    assert set(seen) == {torch.float32}
    assert out.dtype == torch.float32
