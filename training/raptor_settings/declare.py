"""Declares settings, each with its help, unit, range and group in one place, and checks their values."""

import dataclasses
import math
import typing
from typing import Any

GROUPS = ("teacher", "images", "phases", "student", "training", "machine", "run")
# counts from here on are mistakes: lists of all steps, or names of all classes, would be built
TOO_MANY = 10**9


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    group: str,
    unit: str | None = None,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare one field of a settings dataclass.

    Args:
        default: its value; a list is copied for each instance. A setting without one is required.
        help: one line of plain English.
        group: one of GROUPS, under which `--help` shows it.
        unit: of the number, such as "steps" or "pixels".
        above: the value, or each value of a list, must be greater than this.
        at_least: ... must not be less than this.
        at_most: ... must not be greater than this.
        below: ... must be less than this. Whole numbers without an upper bound must be below TOO_MANY.

    Returns:
        The field, for the body of a dataclass.
    """
    ranges = {"above": above, "at_least": at_least, "at_most": at_most, "below": below}
    metadata = {"help": help, "group": group, "unit": unit} | ranges
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(settings: Any) -> None:
    """Check every value of a settings dataclass against the range that its field declares; NaN passes nowhere.

    Raises:
        ValueError: a number outside its range, one that is not finite, or an empty text where the default is not.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str) and not value.strip() and field.default != value:
            raise ValueError(f"{field.name} is {value!r}; it must not be empty")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                if reason := _refusal(number, field.metadata):
                    raise ValueError(f"{field.name} is {value}; {'each' if number is not value else 'it'} {reason}")


def range_words(field: dataclasses.Field) -> str:
    """The range of a field in words, such as "above 0"; empty where it has none."""
    names = ("above", "at_least", "below", "at_most")
    bounds = {name: field.metadata.get(name) for name in names}
    return ", ".join(f"{name.replace('_', ' ')} {bound:,}" for name, bound in bounds.items() if bound is not None)


def settings_to_dict(settings: Any) -> dict[str, Any]:
    """Turn a settings dataclass into a dict that JSON and YAML can hold."""
    return {name: getattr(settings, name) for name in field_types(type(settings))}


def field_types(settings_class: type) -> dict[str, Any]:
    """The types of all fields that can be set, by name."""
    annotations = typing.get_type_hints(settings_class)
    return {field.name: annotations[field.name] for field in dataclasses.fields(settings_class) if field.init}


def _refusal(number: float, bounds: typing.Mapping[str, Any]) -> str | None:
    """What a number must be and is not; comparisons are written so that NaN fails them."""
    above, at_least, at_most, below = (bounds.get(name) for name in ("above", "at_least", "at_most", "below"))
    if above is not None and not number > above:
        return f"must be above {above:,}"
    if at_least is not None and not number >= at_least:
        return f"must be at least {at_least:,}"
    if not math.isfinite(number):
        return "must be finite"
    if at_most is not None and not number <= at_most:
        return f"must be at most {at_most:,}"
    if below is not None and not number < below:
        return f"must be below {below:,}"
    if isinstance(number, int) and below is None and at_most is None and not number < TOO_MANY:
        return f"must be below {TOO_MANY:,}"
    return None
