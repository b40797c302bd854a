"""Published sizes by name, and the one place where a network is made from a name and arguments."""

import math
from dataclasses import fields
from typing import Any, get_type_hints

from model.blocks import UpscalingNetwork
from model.frame import FrameConfig
from model.hat import HAT, HatConfig
from model.hat_unet import HatUnet, HatUnetConfig
from model.hmanet import HMANet, HmanetConfig

NETWORKS: dict[str, tuple[type[Any], type[FrameConfig]]] = {
    "hat": (HAT, HatConfig),
    "hmanet": (HMANet, HmanetConfig),
    "hat_unet": (HatUnet, HatUnetConfig),
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "hat": ("hat", {}),
    "hat_s": ("hat", {"embed_dim": 144, "compress_ratio": 24, "squeeze_factor": 24}),
    "hat_l": ("hat", {"depths": (6,) * 12, "num_heads": (6,) * 12}),
    "hmanet": ("hmanet", {}),
    "hat_unet": ("hat_unet", {}),
}
"""Per name the network and what changes in the defaults of its config (the published HAT and HMANet, our U)."""


def build(arch: str, scale: int, **overrides: Any) -> UpscalingNetwork:
    """A freshly initialized network.

    `arch` is a key of `PRESETS`, `scale` 1, 2, 3, 4 or 8, `overrides` fields of the network's config:
    `build("hat", 2, embed_dim=24, depths=(2,), num_heads=(2,), window_size=8, squeeze_factor=6)`.
    ValueError for an unknown name or argument and for sizes that do not go together.
    """
    config = configure(arch, scale, **overrides)
    return NETWORKS[PRESETS[arch][0]][0](config)


def arguments_of(arch: str) -> list[str]:
    """The names of the arguments that a network takes; `arch` is a key of `PRESETS`."""
    return [field.name for field in fields(NETWORKS[PRESETS[arch][0]][1])]


def configure(arch: str, scale: int, **overrides: Any) -> FrameConfig:
    """The config of a network, checked as `build` does, without making the network."""
    if arch not in PRESETS:
        raise ValueError(f"arch={arch!r} is unknown: choose one of {', '.join(PRESETS)}")
    name, preset = PRESETS[arch]
    config, known = NETWORKS[name][1], arguments_of(arch)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"{arch} has no argument {', '.join(unknown)}: it has {', '.join(known)}")
    types = get_type_hints(config)
    arguments = {
        key: _of_type(key, value, types[key]) for key, value in {"scale": scale, **preset, **overrides}.items()
    }
    return config(**arguments)


def _of_type(name: str, value: Any, wanted: Any) -> Any:
    """The value, lists as tuples; ValueError where it is not of the field's type."""
    if wanted == tuple[int, ...]:
        if isinstance(value, list | tuple) and all(_is_whole(entry) for entry in value):
            return tuple(value)
        raise ValueError(f"{name}={value!r}: expected a list of whole numbers, one per group")
    if wanted is int and not _is_whole(value):
        raise ValueError(f"{name}={value!r}: expected a whole number")
    if wanted is float and not (_is_whole(value) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(f"{name}={value!r}: expected a number")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
