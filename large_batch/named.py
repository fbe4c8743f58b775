"""What is chosen by a text: a name, and the settings that differ from the defaults, as in `sam:radius=0.1`.

Each name stands for a frozen data class whose fields are numbers, declared by `number`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from large_batch.errors import UserError, no_such

Kind = TypeVar("Kind")

# What there is, known before TensorFlow starts
STRATEGIES = ("auto", "none", "mirrored", "multiworker")  # to share a batch; see distribution.py
OPTIMIZERS = ("adam", "adagrad", "sgd", "adaqn")
REMEDIES = ("augment", "conservative", "adversarial", "stability", "sam", "asam")


def number(default: float, least: float = 0.0, most: float = math.inf) -> Any:
    """Declare a setting: a field of a data class, whole where its default is, from `least` to `most`."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def split(text: str) -> tuple[str, ...]:
    """Return the texts of a list with commas, which may also stand between the settings of one name.

    `augment,asam:radius=0.1,eta=0` has two.
    """
    parts: list[str] = []
    for part in map(str.strip, text.split(",")):
        if parts and "=" in part and ":" not in part:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return tuple(parts)


def check_name(text: str, names: Iterable[str], what: str) -> None:
    """Raise `UserError` unless a text begins with one of the names of `what` there is."""
    if (name := text.strip().partition(":")[0]) not in names:
        raise no_such(what, name, names)


def make(text: str, kinds: Mapping[str, type[Kind]], what: str) -> Kind:
    """Return what a text chooses among the kinds; `what` they are is for the message.

    Raises `UserError` for a name, a setting or a value that does not exist.
    """
    check_name(text, kinds, what)
    name, _, settings = text.strip().partition(":")
    fields = {field.name: field for field in dataclasses.fields(kinds[name])}
    values: dict[str, float] = {}
    for setting in settings.split(",") if settings else ():
        key, _, value = setting.partition("=")
        if key not in fields or key in values:
            known = f"these, each once: {', '.join(fields)}" if fields else "none"
            raise UserError(f"The {what} '{text}' cannot have the setting '{key}'; {name} has {known}.")
        values[key] = _read(value, fields[key], f"The setting {key} of the {what} {name}")
    return kinds[name](**values)


def canonical(text: str, kinds: Mapping[str, type], what: str) -> str:
    """Return the one text of all that choose the same, without the settings that are as by default.

    Raises `UserError` as `make` does.
    """
    chosen = make(text, kinds, what)
    fields = [field for field in dataclasses.fields(chosen) if getattr(chosen, field.name) != field.default]
    settings = ",".join(f"{field.name}={getattr(chosen, field.name)}" for field in fields)
    return text.strip().partition(":")[0] + (f":{settings}" if settings else "")


def _read(text: str, field: dataclasses.Field, which: str) -> float:
    kind, least, most = type(field.default), field.metadata["least"], field.metadata["most"]
    try:
        value = kind(text)
        fits = least <= value <= most and math.isfinite(value)
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        limits = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        raise UserError(f"{which} must be a {'whole ' if kind is int else ''}number {limits}, not '{text}'.")
    return value
