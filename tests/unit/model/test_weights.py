"""Weights files in and out, and what is said about files that do not fit."""

import json
import os
import pickle
import re
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from model import load, weights
from model.blocks import UpscalingNetwork
from model.weights import (
    content_sha256,
    load_parameters,
    load_strictly,
    read_metadata,
    read_weights,
    recognise,
    save_network,
    save_pth,
    save_safetensors,
)
from tests.unit.model.tiny import TINY, tiny, tiny_hmanet, tiny_unet


def save_state(path: Path, network: UpscalingNetwork) -> None:
    save_pth(path, network.state_dict())


class Malicious:
    """A pickle of this runs a command when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


WRAPS: list[Callable[[Any], Any]] = [
    lambda s: {"params_ema": s, "params": {}},
    lambda s: {"params": s},
    lambda s: s,
    lambda s: {"params_ema": None, "params": s},
    lambda s: {"params_ema": {}, "params": s},
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"params_ema": {f"module.{key}": value for key, value in s.items()}},
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_layouts_of_pth(wrap: Any, tmp_path: Path) -> None:
    state = tiny().state_dict()
    torch.save(wrap(state), tmp_path / "a.pth")
    read = read_weights(tmp_path / "a.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    assert load(wrap(state)).state_dict().keys() == state.keys(), "the same in memory"


def test_halved_weights_load_as_fp32() -> None:
    halved = {key: value.half() if value.is_floating_point() else value for key, value in tiny().state_dict().items()}
    network = load({"params": halved})
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(network.conv_first.weight, tiny().conv_first.weight.half().float())


def test_any_width_of_an_mlp_is_recognised() -> None:
    """60 * (123 / 60) is a little less than 123."""
    network = tiny(embed_dim=60, mlp_ratio=123 / 60)
    assert network.layers[0].residual_group.blocks[0].mlp.fc1.out_features == 123  # type: ignore[union-attr, index]
    assert load(network.state_dict()).config["mlp_ratio"] == 123 / 60


def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params_ema": Malicious()}, "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth is damaged or holds more than tensors"):
        read_weights("bad.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_the_weights_is_refused_too(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"params_ema": tiny().state_dict(), "optimizer": Malicious()}
    torch.save(content, "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not loaded, since that could run code"):
        load("bad.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match=r"plain\.pth"):
        load("plain.pth")
    assert not Path("executed").exists()


def test_what_a_file_needs_beside_tensors_is_named_in_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": tiny().state_dict(), "hyper_parameters": Namespace(lr=0.1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"\(it needs argparse\.Namespace\); not loaded, since that could run") as said:
        read_weights(tmp_path / "a.ckpt")
    assert "\n" not in str(said.value)


def test_scripted_and_unknown_files_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=f"{name} is ") as said:
            read_weights(tmp_path / name)
        assert "\n" not in str(said.value)


def test_quantized_weights_are_refused() -> None:
    state = dict(tiny().state_dict())
    state["conv_first.weight"] = (state["conv_first.weight"] * 100).to(torch.int8)
    with pytest.raises(ValueError, match=r"of whole numbers: conv_first\.weight torch\.int8"):
        load(state)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_missing_and_damaged_files(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_truncated_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (save_pth if name == "a.pth" else lambda p, s: save_safetensors(p, s, {}))(path, tiny().state_dict())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=name):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds no state dict"), ({}, "holds no state dict"), ({"params": {"step": 3}}, "'step' is a int")],
)
def test_files_without_a_state_dict(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_every_size_is_recognised(scale: int) -> None:
    sizes = {
        "embed_dim": 20,
        "depths": [1, 3],
        "num_heads": [2, 5],
        "window_size": 4,
        "compress_ratio": 4,
        "squeeze_factor": 3,
        "overlap_ratio": 1.0,
        "mlp_ratio": 1.5,
    }
    network = tiny(scale, **sizes)
    head = {"restoration_head": "reconstruction"} if scale == 1 else {}
    assert recognise(network.state_dict()) == {"arch": "hat", "scale": scale, **sizes, **head}


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_every_size_of_hmanet_is_recognised(scale: int) -> None:
    sizes = {"embed_dim": 48, "depths": [1, 3], "num_heads": [2, 6], "window_size": 4, "mlp_ratio": 1.5}
    network = tiny_hmanet(scale, **sizes)
    head = {"restoration_head": "reconstruction"} if scale == 1 else {}
    assert recognise(network.state_dict()) == {"arch": "hmanet", "scale": scale, **sizes, **head}


def test_load_takes_hmanets_interval() -> None:
    state = tiny_hmanet(interval_size=2).state_dict()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(state, interval_size=2)(x), tiny_hmanet(interval_size=2)(x))
        assert not torch.equal(load(state)(x), tiny_hmanet(interval_size=2)(x))


def test_unknown_architectures_are_named_as_such() -> None:
    with pytest.raises(ValueError, match=r"not the state dict .*conv_first\.weight"):
        recognise({"fc.weight": torch.zeros(2, 2)})
    state = tiny(4).state_dict()
    state["upsample.2.weight"] = torch.zeros(576, 64, 3, 3)
    with pytest.raises(ValueError, match=r"factors \(2, 3\)"):
        recognise(state)


def test_load_gives_eval_mode_and_takes_overrides() -> None:
    state = tiny(conv_scale=0.5).state_dict()
    network = load(state, conv_scale=0.5)
    assert not network.training
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x), tiny(conv_scale=0.5)(x))
        assert not torch.equal(network(x), load(state)(x))


def test_mismatch_names_the_first_keys() -> None:
    state = dict(tiny().state_dict())
    del state["norm.weight"]
    state["surplus"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(5)
    expected = "missing: norm.weight; unexpected: surplus; of another shape: norm.bias (5,) instead of (12,)"
    with pytest.raises(ValueError, match=re.escape(expected)):
        load(state)


def test_many_mismatches_are_counted() -> None:
    with pytest.raises(ValueError, match=r"missing: conv_first.weight, .* and \d\d more"):
        load_strictly(tiny(), {"norm.weight": torch.ones(12)})


def test_other_position_indices_are_refused() -> None:
    state = dict(tiny().state_dict())
    state["relative_position_index_OCA"] = state["relative_position_index_OCA"] + 1
    with pytest.raises(ValueError, match="of another value: relative_position_index_OCA"):
        load(state)


def test_another_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="of another value: mean"):
        load({**tiny().state_dict(), "mean": torch.zeros(1, 3, 1, 1)})


def test_gray_networks_are_refused() -> None:
    state = dict(tiny().state_dict())
    state["conv_first.weight"] = state["conv_first.weight"][:, :1]
    with pytest.raises(ValueError, match=r"conv_first\.weight takes images of 1 channels: networks here take RGB"):
        load(state)


@pytest.mark.parametrize("head", ["reconstruction", "residual"])
@pytest.mark.parametrize("make", [tiny, tiny_hmanet, tiny_unet])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_heads_of_scale_1_are_told_by_the_weights(suffix: str, make: Any, head: str, tmp_path: Path) -> None:
    network = make(1, restoration_head=head)
    (save_network if suffix == ".safetensors" else save_state)(tmp_path / f"a{suffix}", network)
    again = load(tmp_path / f"a{suffix}", **({"interval_size": 2} if make is tiny_hmanet else {}))
    assert again.config == network.config | ({} if suffix == ".safetensors" else {"drop_path_rate": 0.1})
    assert again.is_residual == (head == "residual")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), network(x))


def test_residual_weights_of_before_load_whatever_their_header_lacks(tmp_path: Path) -> None:
    """Files written when scale 1 knew no other head: their config has no word for it."""
    network = tiny(1, restoration_head="residual")
    config = {key: value for key, value in network.config.items() if key != "restoration_head"}
    save_safetensors(tmp_path / "a.safetensors", network.state_dict(), {"config": json.dumps(config)})
    assert load(tmp_path / "a.safetensors").is_residual
    with pytest.raises(ValueError, match="restoration_head='other': choose one of"):
        tiny(1, restoration_head="other")


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda: tiny(conv_scale=0.5), "conv_scale=0.5 (published: 0.01)"),
        (lambda: tiny(img_range=255.0, conv_scale=0.02), "conv_scale=0.02 (published: 0.01), img_range=255"),
        (lambda: tiny_hmanet(interval_size=2), "interval_size=2 (published: 4)"),
        (lambda: tiny_unet(img_range=2), "img_range=2 (published: 1)"),
    ],
)
def test_a_pth_warns_of_what_it_cannot_tell_once(network: Any, said: str, tmp_path: Path) -> None:
    weights._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=re.escape(said)):
        save_network(tmp_path / "a.pth", network())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_network(tmp_path / "a.pth", network())


def test_published_arguments_and_safetensors_warn_of_nothing(tmp_path: Path) -> None:
    weights._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_network(tmp_path / "a.pth", tiny())
        save_network(tmp_path / "a.pth", tiny_hmanet(interval_size=4))
        save_network(tmp_path / "a.safetensors", tiny(conv_scale=0.5))


def test_trained_weights_may_lack_buffers_but_no_parameter() -> None:
    network, other = tiny(), tiny(seed=1)
    trained = {name: value.detach() for name, value in other.named_parameters()}
    load_parameters(network, trained)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())
    load_parameters(network, other.state_dict())
    with pytest.raises(AssertionError, match=r"parameters without a value: \['norm.weight'\]"):
        load_parameters(tiny(), {name: value for name, value in trained.items() if name != "norm.weight"})
    with pytest.raises(AssertionError, match=r"values without a parameter: \['surplus'\]"):
        load_parameters(tiny(), trained | {"surplus": torch.zeros(1)})


def test_safetensors_carry_metadata_and_no_surplus_storage(tmp_path: Path) -> None:
    view = torch.zeros(1000, 1000)[:2, :2]
    save_safetensors(tmp_path / "sub" / "a.safetensors", {"view": view}, {"arch": "hat", "note": "x2"})
    with safe_open(tmp_path / "sub" / "a.safetensors", "pt") as file:
        assert file.metadata() == {"arch": "hat", "note": "x2", "sha256": content_sha256({"view": view})}
    save_pth(tmp_path / "sub" / "a.pth", {"view": view})
    assert all(path.stat().st_size < 5000 for path in (tmp_path / "sub").iterdir())


def test_published_layout_is_written(tmp_path: Path) -> None:
    save_pth(tmp_path / "a.pth", tiny().state_dict())
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(content) == ["params_ema"]
    assert content["params_ema"].keys() == tiny(**TINY).state_dict().keys()


def test_failed_save_raises_and_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": torch.ones(2)}, {})
    with pytest.raises(Exception, match="metadata"):
        save_safetensors(path, {"a": torch.zeros(2)}, {"a": 3})  # type: ignore[dict-item]
    assert read_weights(path)["a"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_network_is_written_with_its_config_and_lineage(tmp_path: Path) -> None:
    network = tiny_hmanet(3, interval_size=4)
    save_network(tmp_path / "a.safetensors", network, recipe="demo", stage="finetune-x3")
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert json.loads(metadata.pop("config")) == network.config
    assert metadata.pop("sha256") == content_sha256(network.state_dict())
    assert metadata == {"arch": "hmanet", "scale": "3", "recipe": "demo", "stage": "finetune-x3"}
    save_network(tmp_path / "a.pth", network, recipe="demo")
    assert read_metadata(tmp_path / "a.pth") == {}
    with pytest.raises(ValueError, match=r"a\.bin: choose an ending among \.safetensors, \.pth"):
        save_network(tmp_path / "a.bin", network)


def test_what_shapes_do_not_tell_is_read_from_the_header(tmp_path: Path) -> None:
    """Also by `hatchery upscale --weights`: no interval has to be given for a file that names it."""
    network = tiny_hmanet(interval_size=2)
    save_network(tmp_path / "a.safetensors", network)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a.safetensors")(x), network(x))
        assert not torch.equal(load(tmp_path / "a.safetensors", interval_size=4)(x), network(x))


def test_shapes_have_the_last_word_on_sizes(tmp_path: Path) -> None:
    """A header of another network cannot make weights mean something else."""
    save_safetensors(tmp_path / "a.safetensors", tiny().state_dict(), {"config": json.dumps(tiny(3).config)})
    assert load(tmp_path / "a.safetensors").scale == 2


@pytest.mark.parametrize(
    ("config", "message"), [("{", "no JSON"), ("[1]", "no mapping"), ('{"up": 2}', "no argument up")]
)
def test_headers_that_cannot_be_meant(config: str, message: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", tiny().state_dict(), {"config": config})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.safetensors")


def test_changed_tensors_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_network(path, tiny())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its tensors do not have the sha256"):
        read_weights(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_metadata(path)
