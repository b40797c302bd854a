"""Figures of the papers (configs/published.yaml) that belong to a network, a scale and a set."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor

from model import build
from model.presets import PRESETS
from model.weights import recognise
from pipeline import config_files
from pipeline.settings import CONFIGS, ConfigError, Settings, explain


class Published(Settings):
    """One row of a paper's table; figures by set, PSNR-Y in dB."""

    model: str
    arch: str | None
    extra: str | None
    scale: int
    psnr_y: dict[str, float]
    ssim_y: dict[str, float] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """The row's name, with what it was trained on beside DF2K."""
        return f"{self.model} + {self.extra}" if self.extra else self.model

    def figure(self, name: str) -> float | None:
        """PSNR-Y on a set, whose name is compared without case; None where the paper tells none."""
        return {key.lower(): value for key, value in self.psnr_y.items()}.get(name.lower())


class _Table(Settings):
    rows: tuple[Published, ...]


@functools.cache
def rows() -> tuple[Published, ...]:
    """Every row of the data file. ConfigError, with the place, for one that cannot be read."""
    file = CONFIGS / "published.yaml"
    text = config_files.read_text(file)
    try:
        return _Table.model_validate({"rows": yaml.safe_load(text)}).rows
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{file}: {config_files.place_of(error, text)}") from error
    except ValidationError as error:
        raise ConfigError(explain(_Table, file, error)) from error


def beside(arch: str | None, scale: int, name: str) -> list[Published]:
    """The rows at one scale that tell a figure for a set; set names are compared without case.

    Those of bicubic interpolation and of networks that this project does not build, for reference, then the network's.
    """
    return [row for row in rows() if row.arch in (None, arch) and row.scale == scale and row.figure(name) is not None]


def preset_of(state: Mapping[str, Tensor]) -> str | None:
    """The published network whose sizes a state dict has (hat_s, hat, hat_l, hmanet), or None."""
    found = recognise(state)
    found.pop("restoration_head", None)
    for arch in PRESETS:
        with torch.device("meta"):
            config: dict[str, Any] = build(arch, found["scale"]).config
        if all(_plain(config.get(key)) == _plain(value) for key, value in found.items()):
            return arch
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
