"""What all YAML configs share: pydantic models that refuse unknown keys, `extends`, overrides, errors in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import config_files, schema
from pipeline.config_files import CONFIGS, ConfigError
from pipeline.explain import explain

__all__ = ["CONFIGS", "ConfigError", "Settings", "digest_of", "explain", "flatten", "load_settings"]


class Settings(BaseModel):
    """Base of all config classes: unknown keys are refused, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(kind: type[AnySettings], file: Path, overrides: list[str], folder: str = "recipe") -> AnySettings:
    """The config of a YAML file with `a.b=c` overrides on top; `configs/{folder}` holds the shipped ones of its kind.

    Raises ConfigError with one line per fault, each naming the key, the value and the remedy.
    """
    merged = config_files.overridden(kind, config_files.read(kind, file, folder), overrides)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {config_files.first_line(error)}") from error
    try:
        return kind.model_validate(schema.without_nulls(kind, values))
    except ValidationError as error:
        raise ConfigError(explain(kind, file, error)) from error


def digest_of(value: object) -> str:
    """sha256 (hex) of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config as dotted keys to strings, as MLflow parameters want them."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat
