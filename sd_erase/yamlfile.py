"""The one reader of YAML: cards, recipes, settings and detectors, which people pass on to each other.

PyYAML's safe loader runs no code, but keeps the last of two equal keys, reads ``no`` as false, 017 as fifteen, 1:30 as ninety and
2024-05-01 as a date, and a few lines of aliases as billions of values. Here the size, the depth and what aliases amount to are
bounded before anything is built; equal keys, tags and values that are not what they look like are refused with their line; and
``yes``, ``no``, ``on`` and ``off`` are words, as in YAML 1.2.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_erase.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000  # with every alias counted as what it stands for
MAX_DIGITS = 30
TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def read(path: Path, what: str) -> Any:
    """The value that a YAML file holds; None where it is empty.

    Args:
        what: the kind of file, for the error ("Recipe").

    Raises:
        UserError: the file is missing, too large, no UTF-8, or not this reader's YAML.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}): pass the path of a YAML file.") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{what} {path} has more than {MAX_BYTES // 1_000_000} MB, which no such file needs: pass another.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not YAML (byte {error.start} is no UTF-8): save it as UTF-8.") from error
    return parse(text, f"{what} {path}")


def parse(text: str, what: str) -> Any:
    """The value of a text in YAML.

    Args:
        what: what the text is and where it stands, for the error ("Recipe mine.yaml").

    Raises:
        UserError: it is not this reader's YAML.
    """
    import yaml

    try:
        _check_events(yaml.parse(text, Loader=_loader()))
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not YAML ({_reason(error)}): correct it.") from error
    except ValueError as error:
        raise UserError(f"{what} is not YAML ({' '.join(str(error).split())[:300]}): correct it.") from error


def _reason(error: Any) -> str:
    """A YAML error in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())[:300]
    return f"line {mark.line + 1}: {' '.join(str(problem).split())[:300]}"


def _check_events(events: Iterable[Any]) -> None:
    """Refuse what would become far more than it looks like, before anything of it is built."""
    from yaml import events as kinds

    total = 0
    amounts: dict[str, int] = {}  # anchor -> values, itself included
    opened: list[tuple[str | None, int]] = []
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, kinds.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ValueError(f"line {line}: the alias {event.anchor} stands within what it names")
            total += amounts.get(event.anchor or "", 0)  # an unknown one is the loader's error
        elif isinstance(event, kinds.NodeEvent):
            total += 1
            _check_tag(event, line)
            if isinstance(event, kinds.CollectionStartEvent):
                opened.append((event.anchor, total))
            elif event.anchor:
                amounts[event.anchor] = 1
        elif isinstance(event, kinds.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                amounts[anchor] = total - before + 1
        if len(opened) > MAX_DEPTH:
            raise ValueError(f"line {line}: it is nested more than {MAX_DEPTH} levels deep")
        if total > MAX_VALUES:
            raise ValueError(f"line {line}: it has more than {MAX_VALUES} values")


def _check_tag(event: Any, line: int) -> None:
    if event.tag is not None and event.tag != f"{TAG}str":
        raise ValueError(f"line {line}: the tag {event.tag[:80]!r} is not used here")


@functools.cache
def _loader() -> Any:
    """The class that builds the values; in C, which reads the packaged cards in a tenth of the time."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]  # which of the two is known when it runs
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            lines: dict[Any, int] = {}
            for key_node, _ in node.value:
                if key_node.tag == f"{TAG}merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                line = key_node.start_mark.line + 1
                if isinstance(key, (list, dict)):
                    raise ValueError(f"line {line}: a list or a mapping is no key")
                if key in lines:
                    raise ValueError(f"line {line}: {key_node.value[:80]!r} stands twice, in line {lines[key]} too")
                lines[key] = line
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {  # of YAML 1.1's truth values only those of 1.2
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{TAG}bool", f"{TAG}value")]
        for first, resolvers in base.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(f"{TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    for name, build in (("int", _whole), ("float", _decimal), ("timestamp", _date)):
        Loader.add_constructor(f"{TAG}{name}", build)
    return Loader


def _surprise(node: Any, what: str) -> ValueError:
    return ValueError(
        f"line {node.start_mark.line + 1}: {node.value[:40]!r} is {what} in YAML: put it in quotes if you mean the text"
    )


def _whole(loader: Any, node: Any) -> int:
    if ":" in node.value:
        raise _surprise(node, "a number in base sixty")
    if _OCTAL.fullmatch(node.value):
        raise _surprise(node, "an octal number")
    if len(node.value) > MAX_DIGITS:
        raise _surprise(node, "a number that nothing here needs")
    return int(loader.construct_yaml_int(node))


def _decimal(loader: Any, node: Any) -> float:
    if ":" in node.value:
        raise _surprise(node, "a number in base sixty")
    value = float(loader.construct_yaml_float(node))
    if not math.isfinite(value):
        raise _surprise(node, "no finite number")
    return value


def _date(loader: Any, node: Any) -> Any:
    raise _surprise(node, "a date")
