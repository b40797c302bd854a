"""Cron expressions as Kubernetes takes them: five fields of numbers, names, ranges, steps and lists."""

import re

_FIELDS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}
_NAMES = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "weekday": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
_PART = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?")


def check_cron(expression: str) -> str:
    """The expression as it is. ValueError, naming the field, for one that no scheduler takes."""
    fields = expression.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"{expression!r} has {len(fields)} fields: write {' '.join(_FIELDS)}, such as '0 3 * * *'")
    for name, field in zip(_FIELDS, fields, strict=True):
        low, high = _FIELDS[name]
        for part in field.split(","):
            if not _is_valid(name, part):
                raise ValueError(f"{expression!r}: {name} {part!r} is no value, range or step within {low}-{high}")
    return expression


def _is_valid(name: str, part: str) -> bool:
    found = _PART.fullmatch(part)
    if found is None:
        return False
    first, last, step = found.groups()
    low, high = _FIELDS[name]
    values = [_value(name, text) for text in (first, last) if text]
    return values == sorted(values) and all(low <= value <= high for value in values) and step not in ("0", "00")


def _value(name: str, text: str) -> int:
    """A number, or the number that a name stands for; -1 for neither."""
    names = _NAMES.get(name, [])
    if text.lower() in names:
        return names.index(text.lower()) + _FIELDS[name][0]
    return int(text) if text.isdecimal() else -1
