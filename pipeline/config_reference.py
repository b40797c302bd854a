"""`hatchery config`: every key of a recipe with what it is for, its default, and its value in a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline import schema
from pipeline.config import ConfigError, Recipe
from pipeline.suggest import did_you_mean, some_of

NAME = "NAME"
"""Stands for a name of the user's own where no recipe gives them."""
_BOUNDS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """One key: its path, what it is for, what it takes, its default and its value as text; None where there is none."""

    path: str
    description: str
    accepts: str
    default: str | None
    value: str | None

    def as_line(self) -> str:
        """`path = value  (default ...)  # description; what it takes`."""
        value = self.value if self.value is not None else self.default
        shown = f" = {value}" if value is not None else ""
        if self.default is None:
            default = "  (no default)"
        else:
            default = "" if value == self.default else f"  (default {self.default})"
        return f"{self.path}{shown}{default}  # {self.description}; {self.accepts}"


def keys(recipe: Recipe | None = None) -> list[Key]:
    """All keys, in the order of the classes; those below the names of a recipe, else below NAME."""
    values = recipe.model_dump(mode="json") if recipe is not None else None
    return list(_keys(Recipe, values, ""))


def chosen(found: list[Key], asked: str | None) -> list[Key]:
    """The key of that path, or all below it; ConfigError, with what was meant, where there is none.

    A key without its path will do: `steps` finds phases.NAME.steps.
    """
    if asked is None:
        return found
    path = asked.strip(".")
    here = [key for key in found if key.path == path or key.path.startswith(f"{path}.")]
    here = here or [key for key in found if f".{key.path}".endswith(f".{path}")]
    if not here:
        paths = {key.path[:end] for key in found for end in _ends(key.path)}
        leaves = {key.path.rpartition(".")[2] for key in found}
        sections = list(dict.fromkeys(key.path.partition(".")[0] for key in found))
        meant = did_you_mean(path, paths) or did_you_mean(path.rpartition(".")[2], leaves)
        raise ConfigError(f"no key {asked!r}{meant or f'; there are {some_of(sections)}'}")
    return here


def _ends(path: str) -> list[int]:
    """Where a path's parts end."""
    return [place for place, character in enumerate(path) if character == "."] + [len(path)]


def _keys(kind: Any, values: Any, prefix: str) -> Iterator[Key]:
    for found in schema.classes_of(kind):
        for name, field in found.model_fields.items():
            value = values.get(name) if isinstance(values, dict) else None
            yield from _below(f"{prefix}{name}", field, value, isinstance(values, dict))


def _below(path: str, field: FieldInfo, value: Any, known: bool) -> Iterator[Key]:
    """The keys of a field: itself, or those of its section, or of each of its names."""
    annotation = field.annotation
    entry = schema.entry_of(annotation)
    if entry is not None and _sections_in(entry):
        inner, many = _sections_in(entry), schema.element_of(entry) is not None
        for name in value if known and value else [NAME]:
            content = value[name] if known and value else None
            first = content[0] if many and isinstance(content, list | tuple) and content else content
            yield from _keys(inner, first if known else None, f"{path}.{name}{'.N' if many else ''}.")
        return
    if not schema.is_section(annotation):
        yield _key(path, field, value, known)
    if schema.classes_of(annotation) and not (known and value is None):
        yield from _keys(annotation, value, f"{path}.")


def _sections_in(entry: Any) -> Any:
    """The classes that the entries of a mapping, or the elements of lists in it, are of; None for plain values."""
    element = schema.element_of(entry)
    found = entry if element is None else element
    classes = schema.classes_of(found)
    return found if len(classes) == 1 else None  # of several kinds (steps) no one has these keys


def _key(path: str, field: FieldInfo, value: Any, known: bool) -> Key:
    default = None if field.is_required() else _as_text(field.get_default(call_default_factory=True))
    return Key(path, field.description or "", _accepts(field), default, _as_text(value) if known else None)


def _as_text(value: Any) -> str:
    """A value as YAML has it in one line."""
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, BaseModel):
        return _as_text(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_text(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_text, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else '""'


def _accepts(field: FieldInfo) -> str:
    """What a key takes, in words, with the bounds that its class declares."""
    bounds = [
        f"{words} {getattr(found, attribute):g}"
        for found in field.metadata
        for kind, (words, attribute) in _BOUNDS.items()
        if isinstance(found, kind)
    ]
    words = _type_in_words(field.annotation)
    number = next((_WORDS[kind] for kind in (int, float) if _WORDS[kind] in words), None)
    return words.replace(number, f"{number} {', '.join(bounds)}", 1) if number and bounds else words


def _type_in_words(annotation: Any) -> str:
    words = list(dict.fromkeys(_form_in_words(form) for form in schema.forms_of(annotation)))
    return " or ".join(words)


def _form_in_words(form: Any) -> str:
    origin = get_origin(form)
    if origin is Literal:
        return " | ".join(_as_text(value) for value in get_args(form))
    if origin is dict:
        return f"a mapping of names to {_type_in_words(get_args(form)[1])}"
    if origin in (tuple, list):
        inner = dict.fromkeys(_type_in_words(argument) for argument in get_args(form) if argument is not Ellipsis)
        return f"a list of {' and '.join(inner)}"
    if origin is Annotated:
        return _type_in_words(form)
    if isinstance(form, type) and issubclass(form, BaseModel):
        return _kind_in_words(form)
    return _WORDS.get(form, "anything")


def _kind_in_words(form: type[BaseModel]) -> str:
    """A section, or a step by its name."""
    tag = form.model_fields.get("step")
    return f"step {get_args(tag.annotation)[0]}" if tag is not None and get_args(tag.annotation) else "a section"
