"""The one way to the terminal: what stands in a file from a stranger is shown as text and never acts.

An escape sequence in a caption can clear the screen, rename the window or hide a line; a bidi override makes a file name read
backwards; a line break forges a line of ours; ``[red]`` is markup to rich. All of it is shown as Python would write it: ``\\x1b``.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from types import TracebackType
from typing import Any

import click

# control characters, surrogates (file names of other encodings), line and paragraph separators, and what is invisible or changes
# the direction of text; the joiners of Indic scripts, Persian and emoji stay
_INVISIBLE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
UNSAFE = re.compile(f"[{_INVISIBLE}]")
_UNSAFE_IN_A_LINE = re.compile(f"[\t\n{_INVISIBLE}]")
MAX_SHOWN = 10_000  # characters of one line


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def printable(value: object) -> str:
    """`value` as text that only shows: control characters but line breaks and tabs are written out."""
    return UNSAFE.sub(_escaped, str(value))


def one_line(value: object) -> str:
    """`value` as text of one line, line breaks and tabs written out too; a very long one is cut."""
    text = str(value)
    if len(text) > MAX_SHOWN:
        text = f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
    return _UNSAFE_IN_A_LINE.sub(_escaped, text)


class Styled(str):
    """What rich made of strings that are escaped already: its own colours act."""


def echo(value: object, err: bool = False) -> None:
    """Print `value`, which may have several lines, on stdout or stderr."""
    click.echo(value if isinstance(value, Styled) else printable(value), err=err)


def echo_json(value: Any) -> None:
    """Print `value` as JSON on stdout: what would act on a terminal stands there as ``\\u001b``, which JSON reads back."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    click.echo(UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1], text))


def console(**options: Any) -> Any:
    """A `rich.console.Console` to which every string is text: no markup, no emoji codes, no control characters."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **given: Any) -> Text:
            return super().render_str(printable(text), **given)

    return PlainConsole(markup=False, emoji=False, highlight=False, **options)


def rendered(renderable: Any) -> Styled:
    """What rich makes of `renderable` on stdout's terminal."""
    plain = console(file=sys.stdout)
    with plain.capture() as capture:
        plain.print(renderable)
    return Styled(capture.get().rstrip())


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own, escaped: a message may quote what a file held."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
