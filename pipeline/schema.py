"""What the config classes say of their keys: what lies below one, which are sections or mappings, what may be null.

Works on the annotations of pydantic fields, so that messages, `hatchery config` and nulls in YAML know every key.
"""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def forms_of(annotation: Any) -> list[Any]:
    """The types that an annotation allows: members of unions, without Annotated's extras."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return [form for member in get_args(annotation) for form in forms_of(member)]
    return [annotation]


def classes_of(annotation: Any) -> list[type[BaseModel]]:
    """The config classes among an annotation's forms; several where a key tells which (`step: noise`)."""
    return [form for form in forms_of(annotation) if isinstance(form, type) and issubclass(form, BaseModel)]


def entry_of(annotation: Any) -> Any:
    """What the entries of a mapping with names of the user's own are; None where the annotation is no mapping."""
    return next((get_args(form)[1] for form in forms_of(annotation) if get_origin(form) is dict), None)


def element_of(annotation: Any) -> Any:
    """What the elements of a list are; None where the annotation is none."""
    for form in forms_of(annotation):
        if get_origin(form) in (tuple, list) and (arguments := get_args(form)):
            return arguments[0]
    return None


def allows_none(annotation: Any) -> bool:
    """Whether null is a value of its own there, or anything is."""
    return any(form in (type(None), Any) for form in forms_of(annotation))


def fields_at(annotation: Any) -> dict[str, FieldInfo]:
    """The keys that are known at a place: of its config class, or of all that it may be."""
    return {name: field for found in classes_of(annotation) for name, field in found.model_fields.items()}


def below(annotation: Any, part: int | str) -> Any:
    """What lies at a key, a name of the user's own, or a number below a place; None where nothing is known."""
    if isinstance(part, int):
        return element_of(annotation)
    if (field := fields_at(annotation).get(part)) is not None:
        return field.annotation
    if (entry := entry_of(annotation)) is not None:
        return entry
    return next((found for found in classes_of(annotation) if _is_tag(found, part)), None)


def _is_tag(found: type[BaseModel], part: str) -> bool:
    """Whether pydantic calls a class so in the places of faults: by the literal that tells it from the others."""
    return any(part in get_args(field.annotation) for field in found.model_fields.values())


def is_section(annotation: Any) -> bool:
    """Whether a key holds keys of a config class, and must."""
    return bool(classes_of(annotation)) and not allows_none(annotation)


def without_nulls(annotation: Any, values: Any) -> Any:
    """Values without the entries that are null where null is no value: the default holds, or a name is dropped.

    A section that is null stays, and is refused: it may be one whose lines were all commented out.
    """
    if isinstance(values, list):
        return [without_nulls(element_of(annotation), value) for value in values]
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, value in values.items():
        place = below(annotation, str(key))
        named = entry_of(annotation) is not None
        if value is None and place is not None and not allows_none(place) and (named or not is_section(place)):
            continue
        kept[key] = without_nulls(place, value)
    return kept


def nulls_in_mappings(annotation: Any, values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of entries with names of the user's own that are null, which drops them."""
    if not isinstance(values, dict):
        return []
    found, entry = [], entry_of(annotation)
    for key, value in values.items():
        where = (*path, str(key))
        if value is None and entry is not None and not allows_none(entry):
            found.append(where)
        else:
            found += nulls_in_mappings(below(annotation, str(key)), value, where)
    return found
