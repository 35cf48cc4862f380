"""What a setting may be: types and rules stand on the fields of the dataclasses in `config`, and are read here, once for all ways
in which a setting comes in (a flag's text, YAML, a recipe, Python)."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from sd_erase.errors import UserError

LONGEST = 4096  # characters of a text: as long as a path may be
SHOWN = 60  # characters of a wrong value in a sentence
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Rule:
    """What the values of one setting may be; of a list or a mapping, each item.

    Attributes:
        low, high: of numbers, both included unless `open_ends`.
        also: numbers that stand for something else, such as -1 for "the model's own".
        multiple_of: of whole numbers; 0 for any.
        choices: of texts; `pattern` matches further ones, which `form` describes.
        blank: whether a text may be empty.
        longest: characters of a text.
    """

    low: float = -math.inf
    high: float = math.inf
    open_ends: bool = False
    also: tuple[float, ...] = ()
    multiple_of: int = 0
    choices: tuple[str, ...] = ()
    pattern: str = ""
    form: str = ""
    blank: bool = False
    longest: int = LONGEST

    def accepts(self, value: Any) -> bool:
        """Whether `value`, of the right type, obeys."""
        if isinstance(value, bool):
            return True
        if isinstance(value, str):
            return self._accepts_text(value)
        if value in self.also:
            return True
        inside = self.low < value < self.high if self.open_ends else self.low <= value <= self.high  # nan is nowhere
        return inside and not (self.multiple_of and value % self.multiple_of)

    def _accepts_text(self, value: str) -> bool:
        if self.choices and value not in self.choices:
            return bool(self.pattern and re.fullmatch(self.pattern, value))
        try:
            value.encode()
        except UnicodeEncodeError:  # half a character, as an argument that is no UTF-8 gives
            return False
        return len(value) <= self.longest and not _CONTROL.search(value) and (self.blank or bool(value.strip()))

    def describe(self, kind: Any) -> str:
        """What is wanted, as it stands in a sentence."""
        if kind in (int, float):
            return self._describe_number("whole number" if kind is int else "number")
        if kind is bool:
            return "true or false"
        if self.choices:
            return f"one of {', '.join(self.choices)}" + (f", or {self.form}" if self.form else "")
        return f"a text of {'' if self.blank else '1 to '}{'at most ' if self.blank else ''}{self.longest} characters"

    def _describe_number(self, noun: str) -> str:
        if self.multiple_of:
            noun = f"multiple of {self.multiple_of}"
        low, high = f"{self.low:.12g}", f"{self.high:.12g}"
        text = f"a {noun} above {low} and below {high}" if self.open_ends else f"a {noun} from {low} to {high}"
        return " or ".join([*(f"{value:g}" for value in self.also), text])

    def brief(self) -> str:
        """The range for a help text, "" where there is none."""
        if math.isinf(self.low):
            return ""
        return f"{self.low:.12g} to {self.high:.12g}" + (", both excluded" if self.open_ends else "")


def setting(default: Any, **rule: Any) -> Any:
    """A dataclass field with a `Rule`."""
    metadata = {"rule": Rule(**rule)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Fault:
    """One setting that cannot be used."""

    name: str  # dotted, or the flag that gave it
    problem: str  # what follows the name: "is 0"
    remedy: str  # what to do: "pass a whole number from 1 to 9"

    def __str__(self) -> str:
        return f"{self.name} {self.problem} ({self.remedy})"


def called(faults: Sequence[Fault], names: Mapping[str, str] | None) -> list[Fault]:
    """`faults` with the names that sentences are to use: of "train.weights.redirect" that of "train.weights" with the rest."""

    def name_of(dotted: str) -> str:
        whole = next((key for key in names or () if dotted == key or dotted.startswith(f"{key}.")), None)
        return dotted if whole is None or names is None else f"{names[whole]} {dotted[len(whole) + 1 :]}".strip()

    return [dataclasses.replace(fault, name=name_of(fault.name)) for fault in faults]


class SettingsError(UserError):
    """All that is wrong with a configuration, in one sentence."""

    def __init__(self, faults: Sequence[Fault]):
        self.faults = tuple(faults)
        if len(faults) == 1:
            (fault,) = faults
            name = fault.name if fault.name.startswith("-") else f"Setting {fault.name}"
            super().__init__(f"{name} {fault.problem}: {fault.remedy}.")
        else:
            super().__init__(f"{len(faults)} settings cannot be used: {'; '.join(map(str, faults))}.")


def shown(value: Any) -> str:
    """`value` as it stands in a sentence: in quotes where it is a text, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def nearest(name: object, names: Iterable[str]) -> str:
    """ " (did you mean 'steps'?)" where a name is near, else ""."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@functools.cache
def fields_of(kind: Any) -> dict[str, tuple[Any, Rule]]:
    """Type and rule of each field of a dataclass; a nested dataclass has an empty rule."""
    hints = typing.get_type_hints(kind)
    return {one.name: (hints[one.name], one.metadata.get("rule", Rule())) for one in dataclasses.fields(kind)}


def plain_type(hint: Any) -> tuple[Any, Any]:
    """The origin of a hint (tuple, dict, or None) and the type of its items: ``tuple[str, ...]`` is (tuple, str)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return None, next(each for each in arguments if each is not type(None))
    return (origin, arguments[1] if origin is dict else arguments[0]) if origin in (tuple, dict) else (None, hint)


def _problem(value: Any, rule: Rule) -> str:
    return f"is {shown(value)}" + (nearest(value, rule.choices) if isinstance(value, str) else "")


def _item(name: str, value: Any, kind: Any, rule: Rule, faults: list[Fault]) -> Any:
    """One number or text as the type `kind`; what is wrong goes to `faults`."""
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads "1e-4" as text
    if type(value) is not kind or not rule.accepts(value):
        faults.append(Fault(name, _problem(value, rule), f"pass {rule.describe(kind)}"))
    return value


def convert(name: str, value: Any, hint: Any, rule: Rule, faults: list[Fault]) -> Any:
    """`value` as the type `hint`; what is wrong with it goes to `faults`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return converted_fields(hint, value, faults, name)
    if value is None and type(None) in typing.get_args(hint):
        return None
    origin, kind = plain_type(hint)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            faults.append(Fault(name, f"is {shown(value)}", "pass a list"))
            return ()
        return tuple(_item(name, item, kind, rule, faults) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(Fault(name, f"is {shown(value)}", "pass a mapping of names to numbers"))
            return {}
        return {str(key): _item(f"{name}.{key}", item, kind, rule, faults) for key, item in value.items()}
    return _item(name, value, kind, rule, faults)


def converted_fields(kind: type, values: Any, faults: list[Fault], where: str = "") -> dict[str, Any]:
    """The arguments of dataclass `kind` from a mapping; nested ones stay mappings, and unknown names are faults."""
    if not isinstance(values, Mapping):
        faults.append(Fault(where or "configuration", f"is {shown(values)}", "pass a mapping of settings"))
        return {}
    known, found = fields_of(kind), {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key in known:
            found[key] = convert(name, value, *known[key], faults)
        else:
            faults.append(Fault(name, f"does not exist{nearest(key, known)}", f"choose one of {', '.join(known)}"))
    return found


def check_fields(instance: Any, where: str = "") -> list[Fault]:
    """What is wrong with the fields of a dataclass that Python code made, nested ones left out: they check themselves."""
    faults: list[Fault] = []
    kind: Any = type(instance)
    for name, (hint, rule) in fields_of(kind).items():
        if not dataclasses.is_dataclass(hint):
            convert(f"{where}.{name}" if where else name, getattr(instance, name), hint, rule, faults)
    return faults


def from_text(text: str, kind: Any) -> Any:
    """A flag's text as the type `kind`, or the text itself where it is none: the rules then say so."""
    readers: dict[Any, Callable[[str], Any]] = {int: int, float: float}
    try:
        return readers.get(kind, str)(text)
    except ValueError:
        return text


def walk(kind: type, where: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """Dotted name, type and rule of every setting of a dataclass and of those inside it."""
    for name, (hint, rule) in fields_of(kind).items():
        dotted = f"{where}.{name}" if where else name
        if dataclasses.is_dataclass(hint):
            yield from walk(hint, dotted)  # type: ignore[arg-type]
        else:
            yield dotted, hint, rule
