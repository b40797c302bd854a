"""YAML files of configs: read with the place of every fault, put on top of those they extend, overridden by a.b=c.

`extends` names files beside the extending one first, then those that are shipped, by name: `extends: hat_l` works in
any folder. An entry of a mapping that is null takes back what an extended file says: `pretrain-x3: null`.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import schema
from pipeline.suggest import did_you_mean, some_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_HINTS = (
    ("expected ',' or", "put the missing comma or bracket"),
    ("cannot start any token", "indent by spaces, not by tabs, and put what begins with @, ` or % in quotes"),
    ("mapping values are not allowed", "put a comma, quotes or a line break before it, or indent it as its neighbours"),
    ("could not find expected ':'", "put `: ` behind the key, with a space"),
    ("expected <block end>", "indent it as its neighbours"),
    ("expected key", "indent it as its neighbours"),
    ("end of stream", "close the quotes"),
    ("duplicate", "keep one of them"),
)
"""What may mend what YAML's parser says; where its words are others, they stand alone."""
_UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError)
"""What OmegaConf raises for texts that are no YAML, or no config."""


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and the remedy."""


def shipped(folder: str) -> list[str]:
    """Names of the configs of a kind (`recipe`, `domain`, ...) that are shipped to be used, not only extended."""
    return sorted(file.stem for file in (CONFIGS / folder).glob("[!_]*.yaml"))


def _at_home(path: str | Path) -> Path:
    """With ~ and ~user for their folders; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def find(name: str, folder: str) -> Path:
    """A config's file by its path, or by the name of a shipped one. ConfigError where there is none."""
    for candidate in (_at_home(name), CONFIGS / folder / f"{name}.yaml"):
        if _is_file(candidate):
            return candidate
    known = shipped(folder)
    meant = did_you_mean(Path(name).stem, known)
    give = f"{meant} Give" if meant else "; give"
    raise ConfigError(f"{folder} {name!r} is no file{give} a path or one of: {', '.join(known)}")


def read(kind: Any, file: Path, folder: str) -> DictConfig:
    """A config's file on top of all that it extends. kind: its class; `configs/{folder}` holds the shipped ones."""
    merged = _read(kind, file, folder, ())
    assert isinstance(merged, DictConfig)
    return merged


def parse(text: str, origin: str) -> DictConfig:
    """A config's YAML. ConfigError with line, column and the line itself where it is none, and for no mapping."""
    content: Any
    try:
        content = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{origin}: {place_of(error, text)}") from error
    except OSError:  # a number
        content = None
    except _UNREADABLE as error:
        raise ConfigError(f"{origin}: not readable as YAML: {first_line(error)}") from error
    if not isinstance(content, DictConfig) or (content and ":" not in text):  # OmegaConf makes a key of a bare word
        raise ConfigError(f"{origin}: a config is a mapping of keys to values")
    return content


def read_text(file: Path) -> str:
    """A file's text. ConfigError, naming it, where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is no UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}: correct the path or its permissions") from error


def overridden(kind: Any, config: DictConfig, overrides: list[str]) -> Any:
    """A config with `a.b=c` overrides on top. ConfigError, naming the override, for one that cannot be read."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"override {override!r} is not of the form key.sub_key=value")
        origin = f"--set {override!r}"
        try:
            layer = OmegaConf.from_dotlist([f"{key}={_whole(value)}"])
        except yaml.MarkedYAMLError as error:
            raise ConfigError(f"{origin}: {place_of(error, value)}") from error
        except _UNREADABLE as error:
            raise ConfigError(f"{origin}: not readable: {first_line(error)}") from error
        config = _on_top(kind, config, layer, origin)
    return config


def _whole(value: str) -> str:
    """An override's value; quoted where YAML would take the end of a text, as of a path with " #" in it, for a comment.

    yaml.YAMLError where it is no YAML.
    """
    read = yaml.safe_load(value) if " #" in value else None
    return json.dumps(value) if isinstance(read, str) and value.startswith(read) else value


def first_line(error: BaseException) -> str:
    """What is wrong, in the first of an error's lines, behind the key where OmegaConf names it."""
    lines = str(error).rpartition("raised while resolving interpolation: ")[2].strip().splitlines()
    key = getattr(error, "full_key", None)
    return f"{key + ': ' if key else ''}{lines[0] if lines else type(error).__name__}"


def place_of(error: yaml.MarkedYAMLError, text: str) -> str:
    """Where a text stops being YAML, the line itself, what is wrong with it, and what may mend it."""
    mark, begun = error.problem_mark or error.context_mark, error.context_mark
    problem = " ".join((error.problem or "it is no YAML").split())
    hint = next((f": {remedy}" for words, remedy in _HINTS if words in problem), "")
    if mark is None:
        return f"not readable as YAML: {problem}{hint}"
    lines = text.splitlines()
    shown = repr(lines[mark.line].strip()[:100]) if mark.line < len(lines) else "the end"
    since = f", in what begins at line {begun.line + 1}" if begun is not None and begun.line != mark.line else ""
    return f"not readable as YAML at line {mark.line + 1}, column {mark.column + 1}, {shown}: {problem}{since}{hint}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, a null byte
        return False


def _read(kind: Any, file: Path, folder: str, parents: tuple[Path, ...]) -> Any:
    """A YAML file on top of those that its `extends` names, in their order."""
    file = _at_home(file).resolve()
    if file in parents:
        raise ConfigError(f"{file} extends itself through {' -> '.join(str(p) for p in (*parents, file))}")
    if not _is_file(file):
        raise ConfigError(f"{file} is no file: correct the path")
    content = parse(read_text(file), str(file))
    merged: Any = OmegaConf.create({})
    for base in _extended(content, file):
        merged = _merged(merged, _read(kind, _find_base(base, file, folder), folder, (*parents, file)), str(file))
    return _on_top(kind, merged, content, str(file))


def _on_top(kind: Any, base: Any, layer: Any, origin: str) -> Any:
    """A layer on top of a base. ConfigError where it takes back an entry that is not there: it may be misspelt."""
    below = OmegaConf.to_container(base)
    for *parents, name in schema.nulls_in_mappings(kind, OmegaConf.to_container(layer)):
        entries = _at(below, parents)
        if name not in entries:
            where, meant = ".".join([*parents, name]), did_you_mean(name, entries)
            raise ConfigError(f"{origin}: {where} is null, but there is no {name} to drop{meant or ': remove it'}")
    return _merged(base, layer, origin)


def _at(values: Any, path: list[str]) -> dict[str, Any]:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _merged(base: Any, layer: Any, origin: str) -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except _UNREADABLE as error:
        place = _clash(OmegaConf.to_container(base), OmegaConf.to_container(layer))
        why = f"{place} is a list in one place and a mapping in another: make it one of them" if place else ""
        raise ConfigError(f"{origin}: {why or first_line(error)}") from error


def _clash(base: Any, layer: Any, path: str = "") -> str | None:
    """The key at which a list and a mapping would be put on top of one another."""
    if isinstance(base, dict) and isinstance(layer, dict):
        places = (_clash(base[key], layer[key], f"{path}.{key}" if path else str(key)) for key in layer if key in base)
        return next(filter(None, places), None)
    kinds = (type(base), type(layer))
    return path if kinds in ((dict, list), (list, dict)) else None


def _extended(content: DictConfig, file: Path) -> list[str]:
    """What a file says to extend; removed from it."""
    try:
        said = OmegaConf.create({"extends": content.pop("extends", None)})
        extends = OmegaConf.to_container(said, resolve=True)["extends"]  # type: ignore[call-overload, index]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {first_line(error)}: correct what it extends") from error
    bases = [extends] if isinstance(extends, str) else [] if extends is None else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(f"{file}: extends {extends!r} is no file and no list of files: write extends: [_base, hat_l]")
    return bases


def _find_base(base: str, file: Path, folder: str) -> Path:
    """The file that `extends` names: beside the extending file, else shipped. ConfigError where there is none."""
    found = [
        candidate
        for place in (file.parent, CONFIGS / folder, CONFIGS)
        for candidate in (place / _at_home(base), place / f"{base}.yaml")
        if _is_file(candidate)
    ]
    for candidate in found:  # a file of one's own may be called as what it extends
        if os.path.realpath(candidate) != str(file):
            return candidate
    if found:
        raise ConfigError(f"{file} extends itself: name another file")
    names = sorted({path.stem for path in (CONFIGS / folder).glob("*.yaml")})
    meant = did_you_mean(Path(base).stem, names)
    raise ConfigError(
        f"{file}: extends {base!r}, which is no file beside it and none that is shipped{meant or ': correct it'} "
        f"(shipped: {some_of(names)})"
    )
