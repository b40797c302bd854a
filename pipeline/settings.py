"""What all YAML configs share: pydantic models that refuse unknown keys, `extends`, overrides, errors in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and the remedy."""


class Settings(BaseModel):
    """Base of all config classes: unknown keys are refused, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(kind: type[AnySettings], file: Path, overrides: list[str]) -> AnySettings:
    """The config of a YAML file with `a.b=c` overrides on top.

    Raises ConfigError with one line per fault, each naming the key, the value and the remedy.
    """
    try:
        merged = OmegaConf.merge(_read(file, ()), _parse_overrides(overrides))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {_first_line(error)}") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(kind, file, error)) from error


def _read(file: Path, parents: tuple[Path, ...]) -> Any:
    """A YAML file on top of those that its `extends` names (paths relative to the file), in their order."""
    file = file.resolve()
    if file in parents:
        raise ConfigError(f"{file} extends itself through {' -> '.join(str(p) for p in (*parents, file))}")
    if not file.is_file():
        origin = f"{parents[-1]}: extends {file}, which" if parents else f"{file}"
        raise ConfigError(f"{origin} is no file: correct the path")
    try:
        content = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{file}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file}: a config is a mapping of keys to values")
    extends = content.pop("extends", [])
    bases = [extends] if isinstance(extends, str) else list(extends)
    return OmegaConf.merge(*[_read(file.parent / base, (*parents, file)) for base in bases], content)


def _parse_overrides(overrides: list[str]) -> Any:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key.sub_key=value")
    return OmegaConf.from_dotlist(overrides)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def explain(kind: type[Settings], origin: object, error: ValidationError) -> str:
    """One line per faulty key, beginning with where the config came from; what each of a key's forms wants, in one."""
    lines: dict[str, list[str]] = {}
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if not _names_a_form(part))
        if fault["type"] == "extra_forbidden":
            lines[f"unknown key {where!r} (value {fault['input']!r}); {_known_keys(kind, fault['loc'])}"] = []
        elif fault["type"] == "value_error":
            lines[f"{where + ': ' if where else ''}{fault['ctx']['error']}"] = []
        else:
            lines.setdefault(f"{where}: value {_short(fault.get('input'))}", []).append(fault["msg"])
    return "\n".join(f"{origin}: {line}{': ' if wants else ''}{', or '.join(wants)}" for line, wants in lines.items())


def _names_a_form(part: int | str) -> bool:
    """Whether a part of a fault's place is pydantic's name of one of a key's forms, as `literal['auto']`."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "bool", "str", "constrained-int"))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _known_keys(kind: type[Settings], location: tuple[int | str, ...]) -> str:
    """The keys that the config class at a location knows, for the message about one it does not."""
    here: Any = kind
    for part in location[:-1]:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation
        else:  # dict[str, Class] or tuple[Class, ...]: the part is a name or a number
            classes = [argument for argument in getattr(here, "__args__", ()) if isinstance(argument, type)]
            here = next((c for c in classes if issubclass(c, BaseModel)), None)
    if isinstance(here, type) and issubclass(here, BaseModel):
        return f"known here: {', '.join(here.model_fields)}"
    return "remove it"


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
