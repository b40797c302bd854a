"""Faults that pydantic finds in a config, in one line each: the key's path, the value, what is accepted."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline import schema
from pipeline.suggest import closest, did_you_mean, some_of

Place = tuple[int | str, ...]


def explain(kind: type[BaseModel], origin: object, error: ValidationError) -> str:
    """One line per faulty key, beginning with where the config came from; what each of a key's forms wants, in one."""
    lines: dict[str, list[str]] = {}
    faults = [(tuple(part for part in fault["loc"] if not _names_a_form(part)), fault) for fault in error.errors()]
    misspelt = {_meant(kind, place) for place, fault in faults if fault["type"] == "extra_forbidden"}
    missing = [place for place, fault in faults if fault["type"] == "missing" and place not in misspelt]
    for parent in dict.fromkeys(place[:-1] for place in missing):
        lines[_told_missing(kind, [place for place in missing if place[:-1] == parent])] = []
    for place, fault in faults:
        if fault["type"] == "missing":
            continue  # told above, or there under a name that is not known
        line, wanted = _told(kind, place, fault)
        lines.setdefault(line, [])
        if wanted and wanted not in lines[line]:
            lines[line].append(wanted)
    return "\n".join(f"{origin}: {line}{': ' if wants else ''}{', or '.join(wants)}" for line, wants in lines.items())


def _told(kind: type[BaseModel], place: Place, fault: Any) -> tuple[str, str]:
    """A fault as a line, and what one of the key's forms wants, for those of all forms to stand in one line."""
    where, what, value = ".".join(map(str, place)), fault["type"], fault.get("input")
    if what == "extra_forbidden":
        return f"unknown key {where!r}{_value_of(value)}{_known_keys(kind, place)}", ""
    if what == "value_error":
        return f"{where + ': ' if where else ''}{fault['ctx']['error']}", ""
    if what in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_fault(where, fault), ""
    if value is None and schema.is_section(_annotation(kind, place)):
        return f"{where} is empty: list keys below it, or remove it", ""
    wanted = "expected a mapping of keys to values" if what == "model_type" else fault["msg"]
    if what == "literal_error" and isinstance(value, str):
        accepted = [str(name) for form in schema.forms_of(_annotation(kind, place)) for name in get_args(form)]
        wanted += did_you_mean(value, accepted)
    return f"{where}: value {_short(value)}", wanted


def _told_missing(kind: type[BaseModel], places: list[Place]) -> str:
    """Keys of one parent that are wanted and not there."""
    if len(places) > 1:
        return f"{', '.join('.'.join(map(str, place)) for place in places)} are missing: give them"
    return f"{'.'.join(map(str, places[0]))} is missing{_description(kind, places[0])}: give it"


def _meant(kind: type[BaseModel], place: Place) -> Place:
    """The place of the key that an unknown one may stand for."""
    return (*place[:-1], closest(str(place[-1]), schema.fields_at(_annotation(kind, place[:-1]))) or "")


def _names_a_form(part: int | str) -> bool:
    """Whether a part of a fault's place is pydantic's name of one of a key's forms, as `literal['auto']`."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "bool", "str", "constrained-int"))


def _annotation(kind: Any, place: Place) -> Any:
    for part in place:
        kind = schema.below(kind, part)
    return kind


def _value_of(value: object) -> str:
    """A plain value; whole dictionaries hide what is wrong."""
    return "" if isinstance(value, dict | list) else f" (value {_short(value)})"


def _short(value: object) -> str:
    if isinstance(value, dict):
        return f"a mapping of {some_of(map(str, value))}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _description(kind: type[BaseModel], place: Place) -> str:
    """What a key is for, if its class says so."""
    field = schema.fields_at(_annotation(kind, place[:-1])).get(str(place[-1])) if place else None
    return f" ({field.description})" if field is not None and field.description else ""


def _tag_fault(where: str, fault: Any) -> str:
    """One of several kinds of a thing, told apart by a key, that is not told or not known."""
    key = str(fault["ctx"]["discriminator"]).strip("'")
    if fault["type"] == "union_tag_not_found":
        return f"{where}: value {_short(fault['input'])} has no {key}: say which"
    tag, known = str(fault["ctx"]["tag"]), str(fault["ctx"]["expected_tags"]).replace("'", "").split(", ")
    return f"{where}.{key}: value {tag!r} is none of {', '.join(known)}{did_you_mean(tag, known)}"


def _known_keys(kind: type[BaseModel], place: Place) -> str:
    """What may have been meant by a key that is not known: one like it there, one of that name elsewhere, or all."""
    key, known = str(place[-1]), list(schema.fields_at(_annotation(kind, place[:-1])))
    if meant := did_you_mean(key, known):
        return meant
    elsewhere = [".".join(path) for path in _paths_to(kind, key)]
    if elsewhere:
        return f": it belongs to {' or '.join(elsewhere[:3])}"
    return f"; known here: {', '.join(known)}" if known else ": remove it"


def _paths_to(kind: Any, key: str, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a key of this name lies; NAME stands for a name of the user's own."""
    found = []
    for name, field in schema.fields_at(kind).items():
        here = (*path, name)
        found += [here] if name == key else []
        entry = schema.entry_of(field.annotation)
        below, place = (field.annotation, here) if entry is None else (entry, (*here, "NAME"))
        found += _paths_to(below, key, place)
    return found
