"""Weights in and out: published `.pth` files, safetensors, and the network that a state dict belongs to."""

import functools
import hashlib
import json
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.blocks import STAGES, UpscalingNetwork, restoration_head_of, stages_of
from model.files import write_atomically
from model.layouts import COMPUTED, StateDict, name_of_other, state_dict_in
from model.presets import NETWORKS, build

UNTOLD = ("conv_scale", "img_range", "interval_size")
"""Arguments that change the output and that no shape tells: who reads a `.pth` takes the published values."""


def read_weights(path: str | Path) -> StateDict:
    """Tensors by name, as published, from a `.safetensors` file or a `.pth` of any program (see `model.layouts`).

    On the CPU. ValueError for a file that is missing, damaged, without tensors, or that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    if not _is_safetensors(path):
        return state_dict_in(_read_pickle(path), path)
    try:
        state = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if read_metadata(path).get("sha256", digest := content_sha256(state)) != digest:
        raise ValueError(f"{path} is damaged: its tensors do not have the sha256 that its header names")
    return state_dict_in(state, path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header of a `.safetensors` file (see `save_safetensors`); nothing for other files.

    ValueError for a file that cannot be read.
    """
    if not _is_safetensors(Path(path)):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """By its ending, else by its first bytes: a length and the brace of a JSON header."""
    if path.suffix.lower() == ".safetensors" or not path.is_file():
        return path.suffix.lower() == ".safetensors"
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def content_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of all tensors: names in order, types, shapes and bytes; not of how a file holds them."""
    digest = hashlib.sha256()
    for key, value in sorted(state_dict.items()):
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_pickle(path: Path) -> Any:
    """What a PyTorch file holds, without running what pickles may run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_why_not_loaded(path)) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable PyTorch file: {' '.join(str(error).split())}") from error


def _why_not_loaded(path: Path) -> str:
    """What to say of a file that PyTorch refuses to open without running code."""
    try:
        classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError):  # none of PyTorch's zips
        classes = []
    beside = f" (it needs {', '.join(classes[:3])})" if classes else ""
    return (
        f"{path} is damaged or holds more than tensors{beside}; not loaded, since that could run code. "
        "Where it was made, save its state dict alone: torch.save(network.state_dict(), 'weights.pth')"
    )


def recognise(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `build` that the shapes of a state dict tell: arch, scale and all sizes.

    At scale 1 also restoration_head. What leaves no trace in the weights (conv_scale, interval_size, img_range,
    drop_path_rate) is not in the answer. ValueError for a state dict of another architecture: names it where it is
    known, else what is missing.
    """
    try:
        if "encoder.0.blocks.0.norm1.weight" in state_dict:
            return _unet_arguments(state_dict)
        is_hmanet = "layers.0.residual_group.gab.qkv.weight" in state_dict
        return _hmanet_arguments(state_dict) if is_hmanet else _hat_arguments(state_dict)
    except (KeyError, IndexError, ZeroDivisionError, TypeError) as error:
        known = ", ".join(NETWORKS)
        if other := name_of_other(state_dict):
            raise ValueError(f"these are weights of {other}; this program knows those of {known}") from error
        missing = error.args[0] if isinstance(error, KeyError) else "a tensor of the first block"
        raise ValueError(
            f"not the state dict of a network known here ({known}): {missing} is missing or empty"
        ) from error


def _unet_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    block = "encoder.0.blocks.0."
    fusions = [name for name, part in (("concat", "mix"), ("gate", "gate")) if f"{block}fuse.{part}.weight" in state]
    refinement = {key.split(".")[2] for key in state if key.startswith("refinement.blocks.")}
    common = _common_arguments(state, block, r"encoder\.(\d+)")
    return {"arch": "hat_unet", "fusion": (*fusions, "add")[0], "refinement": len(refinement)} | common


def _common_arguments(
    state: Mapping[str, Tensor], first_block: str, group: str = r"layers\.(\d+)\.residual_group"
) -> dict[str, Any]:
    factors = stages_of(state)
    if factors not in STAGES.values():
        raise ValueError(f"upsampling stages of factors {factors} belong to no known scale")
    embed_dim, channels = state["conv_first.weight"].shape[:2]
    if channels != 3:
        raise ValueError(f"conv_first.weight takes images of {channels} channels: networks here take RGB, 3 channels")
    scale = math.prod(factors)
    depths, num_heads = _groups(state, group)
    return {
        "scale": scale,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": (math.isqrt(len(state[first_block + "attn.relative_position_bias_table"])) + 1) // 2,
        "mlp_ratio": len(state[first_block + "mlp.fc1.weight"]) / embed_dim,
        **({"restoration_head": restoration_head_of(state)} if scale == 1 else {}),
    }


def _hmanet_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"arch": "hmanet"} | _common_arguments(state, "layers.0.residual_group.blocks.1.")


def _hat_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    first_block = "layers.0.residual_group.blocks.0."
    common = _common_arguments(state, first_block)
    window_size, embed_dim = common["window_size"], common["embed_dim"]
    overlap_table = state["layers.0.residual_group.overlap_attn.relative_position_bias_table"]
    overlap_size = math.isqrt(len(overlap_table)) - window_size + 1
    return (
        {"arch": "hat"}
        | common
        | {
            "compress_ratio": embed_dim // len(state[first_block + "conv_block.cab.0.weight"]),
            "squeeze_factor": embed_dim // len(state[first_block + "conv_block.cab.3.attention.1.weight"]),
            "overlap_ratio": (overlap_size - window_size) / window_size,
        }
    )


def _groups(state: Mapping[str, Tensor], group: str) -> tuple[list[int], list[int]]:
    """Attention blocks and heads of each group."""
    tables: dict[int, list[Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(group + r"\.blocks\.\d+\.attn\.relative_position_bias_table", key)
        if found:
            tables.setdefault(int(found[1]), []).append(value)
    groups = [tables[number] for number in range(len(tables))]
    return [len(group) for group in groups], [group[0].shape[1] for group in groups]


def load(weights: str | Path | Mapping[str, Any], **overrides: Any) -> UpscalingNetwork:
    """The network that a weights file or state dict belongs to, on the CPU, in eval mode, in fp32.

    A mapping may have the layouts that a `.pth` file may have.
    Its sizes come from the shapes, what shapes do not tell (e.g. HMANet's interval_size) from the config in a
    safetensors file's header, else the published values; `overrides` are arguments of `build` and come first.
    ValueError for an unreadable file, an unknown architecture, or weights that do not fit.
    """
    state = state_dict_in(weights, "the mapping") if isinstance(weights, Mapping) else read_weights(weights)
    untold = {} if isinstance(weights, Mapping) else _config_of(Path(weights))
    network = build(**(untold | recognise(state) | overrides))
    load_strictly(network, state)
    return network.eval()


def _config_of(path: Path) -> dict[str, Any]:
    """The arguments of `build` in the header of a file of ours, or none."""
    about = read_metadata(path)
    if "sha256" not in about:  # another program's, where the word means something else
        return {}
    try:
        config = json.loads(about.get("config", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the config in its header is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the config in its header is no mapping of arguments")
    return config


def load_strictly(network: UpscalingNetwork, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict into a network, in the network's dtypes; ValueError names the first keys that differ.

    Buffers are computed, so they may be absent. Those that are there must hold our values: other ones mean another
    meaning of the bias tables.
    """
    own, buffers = network.state_dict(), dict(network.named_buffers())
    trained = {key: value for key, value in own.items() if key not in buffers}
    problems = _first("missing", [key for key in trained if key not in state])
    surplus = [key for key in state if key not in trained and key not in buffers and not COMPUTED.fullmatch(key)]
    problems += _first("unexpected", surplus)
    shared = {key: state[key] for key in {**trained, **buffers} if key in state}
    ours = {**buffers, **trained}
    misshapen = [key for key, value in shared.items() if ours[key].shape != value.shape]
    problems += _first(
        "of another shape",
        [f"{key} {tuple(state[key].shape)} instead of {tuple(ours[key].shape)}" for key in misshapen],
    )
    untrained = [key for key in shared if key in trained and not state[key].is_floating_point()]
    problems += _first("of whole numbers", [f"{key} {state[key].dtype}" for key in untrained])
    differing = [key for key in buffers if key in shared and key not in misshapen]
    problems += _first("of another value", [key for key in differing if not _is_same(buffers[key], state[key])])
    if problems:
        raise ValueError(f"weights do not fit {network.arch} x{network.scale}: {'; '.join(problems)}")
    network.load_state_dict({key: value for key, value in shared.items() if key in trained}, strict=False)


def _is_same(own: Tensor, theirs: Tensor) -> bool:
    """Whether a buffer holds our values, as far as its type can hold them."""
    return torch.equal(own.cpu().to(theirs.dtype), theirs.cpu())


def load_parameters(network: UpscalingNetwork, state: Mapping[str, Tensor]) -> None:
    """Copy trained weights into a network of the same config; its buffers may be absent, since they are computed."""
    differing = network.load_state_dict(state, strict=False)
    untold = set(differing.missing_keys) - {name for name, _ in network.named_buffers()}
    assert not untold, f"parameters without a value: {sorted(untold)}"
    assert not differing.unexpected_keys, f"values without a parameter: {differing.unexpected_keys}"


def _first(what: str, keys: list[str], limit: int = 3) -> list[str]:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return [f"{what}: {', '.join(keys[:limit])}{more}"] if keys else []


def save_pth(path: str | Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write the published layout, {"params_ema": tensors}; the file appears only when complete."""
    content = {"params_ema": _on_cpu(state_dict)}
    write_atomically(Path(path), lambda part: torch.save(content, part))


def save_safetensors(path: str | Path, state_dict: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; the file appears only when complete.

    Its header holds `metadata` and the `sha256` of the tensors, which `read_weights` checks. Hatchery's own files
    name arch, scale, config (JSON: the arguments of `build`) and where the weights come from.
    """
    content = _on_cpu(state_dict)
    metadata = metadata | {"sha256": content_sha256(content)}
    write_atomically(Path(path), lambda part: safetensors.torch.save_file(content, part, metadata=metadata))


def _on_cpu(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Own copies: views would drag their whole storage into the file."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state_dict.items()}


def save_network(path: str | Path, network: UpscalingNetwork, **lineage: str) -> None:
    """Write a network as `.safetensors` with its arch, scale, config and lineage, or as `.pth` (tensors only).

    A `.pth` of a network with other than the published `UNTOLD` warns, once. ValueError for another ending.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{path}: choose an ending among .safetensors, .pth")
    if suffix == ".pth":
        if untold := untold_by_pth(network):
            _warn_once(untold)
        save_pth(path, network.state_dict())
    else:
        about = {"arch": network.arch, "scale": str(network.scale), "config": json.dumps(network.config)}
        save_safetensors(path, network.state_dict(), about | lineage)


def untold_by_pth(network: UpscalingNetwork) -> str | None:
    """One line on the arguments that a `.pth` file cannot tell and that are not the published ones; None without."""
    _, config = NETWORKS[network.arch]
    differing = {
        key: network.config[key]
        for key in UNTOLD
        if key in network.config and network.config[key] != getattr(config, key)
    }
    if not differing:
        return None
    said = ", ".join(f"{key}={value:g} (published: {getattr(config, key):g})" for key, value in differing.items())
    return f"a .pth file cannot tell {said}: programs that read it take the published value; .safetensors tells ours"


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)
