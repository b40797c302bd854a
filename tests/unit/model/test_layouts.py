"""Files as other trainers and tools write them: entries, prefixes, what lies beside, and whose tensors they are."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from model import load
from model.discriminator import Discriminator
from model.layouts import name_of_other, state_dict_in
from model.weights import read_weights, recognise
from tests.unit.model.tiny import tiny, tiny_hmanet, tiny_unet

State = dict[str, Tensor]


def named(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    """What an optimizer of these tensors saves."""
    moments = {number: {"step": torch.tensor(3.0), "exp_avg": value} for number, value in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}


def without_indices(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("relative_position_index")}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "alone": lambda s: s,
    "ordered": OrderedDict,
    "alone beside an epoch": lambda s: {**s, "epoch": 3, "lr": 0.1},
    "alone beside an optimizer": lambda s: {**s, "optimizer": optimizer(s)},
    "params_ema": lambda s: {"params_ema": s},
    "params-ema": lambda s: {"params-ema": s},
    "params": lambda s: {"params": s, "iter": 5},
    "empty averages": lambda s: {"params_ema": {}, "params": s},
    "no averages": lambda s: {"params_ema": None, "params": s},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": optimizer(s)},
    "model": lambda s: {"model": s, "optimizer": optimizer(s), "epoch": 2},
    "net": lambda s: {"net": s},
    "net_g": lambda s: {"net_g": s, "net_d": {"conv0.weight": torch.zeros(3)}},
    "nested": lambda s: {"model": {"net_g": {"params": s}}},
    "another word": lambda s: {"sr_network": s, "step": torch.tensor(4)},
    "compiled": lambda s: {"params": named("_orig_mod.", s)},
    "compiled in parallel": lambda s: {"params": named("module._orig_mod.", s)},
    "in parallel, compiled": lambda s: named("_orig_mod.module.", s),
    "generator": lambda s: {"params": named("netG.", s)},
    "net_g before names": lambda s: named("net_g.", s),
    "generator. before names": lambda s: named("generator.", s),
    "module": lambda s: {"params": named("module.", s)},
    "module as an entry": lambda s: {"module": s, "ds_version": "0.19"},
    "averaged model": lambda s: {"n_averaged": torch.tensor(7), **named("module.", s)},
    "lightning": lambda s: {
        "state_dict": {
            **named("model.net_g.", s),
            "model.net_d.conv0.weight": torch.zeros(2),
            "loss.vgg.0": torch.ones(1),
        },
        "optimizer_states": [optimizer(s)],
        "hyper_parameters": {"scale": 2},
    },
    "without indices": lambda s: {"params": without_indices(s)},
    "indices in every block, masks": lambda s: {
        "params": {
            **without_indices(s),
            "layers.0.residual_group.blocks.1.attn_mask": torch.zeros(4, 64, 64),
            "layers.0.residual_group.blocks.0.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.long),
            "mean": torch.tensor([0.4488, 0.4371, 0.4040]).reshape(1, 3, 1, 1),
        }
    },
    "double": lambda s: {"params": {key: v.double() if v.is_floating_point() else v for key, v in s.items()}},
    "32-bit indices": lambda s: {key: v if v.is_floating_point() else v.int() for key, v in s.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_a_file_loads(layout: str, tmp_path: Path) -> None:
    original = tiny(seed=3)
    content = LAYOUTS[layout](original.state_dict())
    torch.save(content, tmp_path / "w.pth")
    for network in (load(tmp_path / "w.pth"), load(content)):
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in original.state_dict().items())


@pytest.mark.parametrize("layout", ["compiled in parallel", "lightning", "without indices", "averaged model"])
@pytest.mark.parametrize("make", [lambda: tiny(1), tiny_hmanet, tiny_unet, lambda: tiny_unet(1, fusion="add")])
def test_every_network_is_found_in_any_layout(make: Callable[[], Any], layout: str) -> None:
    state = make().state_dict()
    found = load(LAYOUTS[layout](state), **({"interval_size": 2} if make is tiny_hmanet else {}))
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("everything", [False, True])
def test_narrow_types_load_as_fp32(dtype: torch.dtype, everything: bool, tmp_path: Path) -> None:
    """Also where a tool has turned the indices into floats, which bf16 cannot hold."""
    state = tiny(seed=1).state_dict()
    narrow = {
        key: value.to(dtype) if everything or value.is_floating_point() else value for key, value in state.items()
    }
    safetensors.torch.save_file(named("params_ema.", narrow), tmp_path / "w.safetensors")
    network = load(tmp_path / "w.safetensors")
    assert torch.equal(network.conv_first.weight, state["conv_first.weight"].to(dtype).float())
    assert torch.equal(network.relative_position_index_OCA, state["relative_position_index_OCA"])


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "{not ours", "arch": "HAT"}])
@pytest.mark.parametrize("prefix", ["", "module.", "params.", "model._orig_mod."])
def test_safetensors_of_other_tools_load(prefix: str, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    state = tiny(3).state_dict()
    safetensors.torch.save_file(named(prefix, state), tmp_path / "w.safetensors", metadata)
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.safetensors").read_bytes())  # the content tells what it is
    for name in ("w.safetensors", "w.pth"):
        assert load(tmp_path / name).scale == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda averaged, s: {"params": s, "params_ema": averaged},
        lambda averaged, s: {"params": s, "params-ema": averaged},
        lambda averaged, s: {"net_g": s, "net_g_ema": averaged},
        lambda averaged, s: {"model": s, "ema": averaged, "epoch": 1},
        lambda averaged, s: {"state_dict": s, "state_dict_ema": averaged},
        lambda averaged, s: {"model": s, "model_ema": {"module": averaged}},
        lambda averaged, s: {**named("online_model.", s), **named("ema_model.", averaged), "step": torch.tensor(1)},
        lambda averaged, s: {"state_dict": {**named("net_g.", s), **named("ema.module.", averaged)}},
        lambda averaged, s: {"params": {}, "params_ema": named("module.", averaged), "extra": {"teacher": s}},
    ],
)
def test_averaged_weights_come_first(wrap: Callable[[State, State], Any]) -> None:
    averaged, trained = tiny(seed=1).state_dict(), tiny(seed=2).state_dict()
    found = state_dict_in(wrap(averaged, trained), "file")
    assert torch.equal(found["conv_first.weight"], averaged["conv_first.weight"])


def test_of_several_networks_the_usual_name_is_meant_or_none() -> None:
    one, other = tiny(seed=1).state_dict(), tiny(seed=2).state_dict()
    found = state_dict_in({"teacher": other, "params": one}, "file")
    assert torch.equal(found["conv_first.weight"], one["conv_first.weight"])
    with pytest.raises(ValueError, match=r"^file holds several networks \(netG_A, netG_B\): save the one"):
        state_dict_in({"netG_A": one, "netG_B": other}, "file")


@pytest.mark.parametrize(
    "content", [3, None, [tiny().state_dict()], {}, {"epoch": 3}, {"params": {}}, {1: torch.ones(2)}]
)
def test_what_holds_no_tensors_by_name_is_said(content: Any) -> None:
    with pytest.raises(ValueError, match=r"^file holds no state dict"):
        state_dict_in(content, "file")


def test_files_of_other_kinds_lose_only_what_stands_before_all_names() -> None:
    """A perceptual loss's backbone, and a calibration whose names only look as if."""
    backbone = {"features.0.weight": torch.ones(1), "features.0.bias": torch.ones(1)}
    assert state_dict_in({"state_dict": named("module.model.", backbone)}, "file").keys() == backbone.keys()
    calibration = {"lin0.model.1.weight": torch.ones(1), "lin1.model.1.weight": torch.ones(1)}
    assert state_dict_in(calibration, "file").keys() == calibration.keys()


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["conv0.weight", "conv1.weight_orig", "conv9.weight"], "a U-shaped discriminator"),
        (list(Discriminator(4).state_dict()), "a U-shaped discriminator"),
        (["conv0_0.weight", "bn0_1.weight", "linear1.weight"], "a VGG discriminator"),
        (["net_d.model.0.weight"], "a discriminator"),
        (["conv_first.weight", "body.0.rdb1.conv1.weight", "conv_up1.weight"], "RRDBNet"),
        (["conv_first.weight", "layers.0.residual_group.blocks.0.attn.qkv.weight", "norm.weight"], "SwinIR"),
        (["conv_first.weight", "layers.0.residual_group.blocks.0.attn.logit_scale"], "Swin2SR"),
        (["conv_first.weight", "layers.0.blocks.0.attn.temperature"], "DAT"),
        (["conv_first.weight", "body.0.conv1.weight"], "EDSR"),
        (["body.0.weight", "body.1.weight"], "SRVGGNet"),
        (["features.0.weight"], "VGG"),
    ],
)
def test_other_networks_are_named_in_one_line(keys: list[str], name: str) -> None:
    with pytest.raises(ValueError, match=r"^these are weights of ") as refused:
        recognise({key: torch.zeros(4, 3, 3, 3) for key in keys})
    assert name in str(refused.value)
    assert "hat, hmanet, hat_unet" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_hat_with_a_tensor_missing_is_no_other_network() -> None:
    state = tiny().state_dict()
    del state["layers.0.residual_group.blocks.0.mlp.fc1.weight"]
    assert name_of_other(state) is None
    with pytest.raises(ValueError, match=r"layers\.0\.residual_group\.blocks\.0\.mlp\.fc1\.weight is missing"):
        load(state)


def test_prefixes_are_taken_off_before_checksums_are_asked(tmp_path: Path) -> None:
    safetensors.torch.save_file(named("module.", tiny().state_dict()), tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").keys() == tiny().state_dict().keys()
