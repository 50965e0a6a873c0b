"""Settings that check themselves: dataclasses whose fields name their type and range."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from osscl_min.runtime.files import UserError


class Settings:
    """Base of frozen dataclasses that checks every field against its hint, and makes tuples of lists.

    ``Annotated[float, "(0, 1]"]`` gives the range as an interval. A wrong value is a UserError.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = _checked(getattr(self, name), hint, f"{_section(type(self))}.{name}")
            object.__setattr__(self, name, value)


def from_dict(values: dict[str, Any], kind: type) -> Any:
    """Settings from plain values; missing keys keep their defaults. Mistakes are a UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{_section(kind)}: expected a table of settings, got {values!r}")
    known = get_type_hints(kind)
    if unknown := [str(key) for key in values if key not in known]:
        raise UserError(f"{_section(kind)}: unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**values)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names: "train.epochs" -> 300."""
    items = {}
    for name, value in values.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return items


def _section(kind: type) -> str:
    return kind.__name__.removesuffix("Config").lower() or "config"


def _checked(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number, interval = _checked(value, arguments[0], name), arguments[1]
        low, high = map(float, interval[1:-1].split(","))
        above = number > low or (number == low and interval[0] == "[")
        if above and (number < high or (number == high and interval[-1] == "]")):
            return number
        raise UserError(f"{name}: {value!r} lies outside {interval}")
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{name}: {value!r} is not one of {', '.join(arguments)}")
    if is_dataclass(hint) and not isinstance(value, hint):
        return from_dict(value, hint)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(item, arguments[0], name) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
