"""Names of a recipe that become names in MLflow (metrics, parameters, tags, models) and parts of paths."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

_LONGEST = 100  # MLflow takes 250, with what is put before and behind; file systems 255 bytes
_OTHER = re.compile(r"[^\w.\- :/]")
_NOT_IN_MODELS = re.compile(r"[/:@'\"\\\x00-\x1f\x7f]")


def _check_name(name: str) -> str:
    """A name of a set, phase or training. ValueError, with one that would do, where MLflow would refuse it."""
    parts = _OTHER.sub("-", unicodedata.normalize("NFC", name)).split("/")
    fitting = "/".join(part for part in parts if part.strip(" .")).strip()[:_LONGEST]
    if name != fitting or not name:
        raise ValueError(
            f"{_shown(name)} cannot be a name in MLflow, which takes letters, digits, spaces and _ - . : / "
            f"(here at most {_LONGEST}, and no path that leads elsewhere): call it {fitting or 'other'!r}"
        )
    return name


def check_model_name(name: str) -> str:
    """A registered model's name. ValueError, with one that would do, where MLflow or its URIs would refuse it."""
    fitting = _NOT_IN_MODELS.sub("-", name).strip(" .")[:_LONGEST]
    if name != fitting or not name:
        raise ValueError(
            f"{_shown(name)} cannot be a registered model: MLflow and models:/ take no / : @ ' \" \\ in it, no space "
            f"or dot at its ends, and here at most {_LONGEST} characters: call it {fitting or 'model'!r}"
        )
    return name


def _shown(name: str) -> str:
    return repr(name) if len(name) <= _LONGEST else f"{name[:20]!r}... ({len(name)} characters)"


Name = Annotated[str, AfterValidator(_check_name)]
"""Of a set, mix, phase or training."""
ModelName = Annotated[str, AfterValidator(check_model_name)]
"""Of a registered model."""
