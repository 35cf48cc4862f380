"""Text and tables as Markdown, in which what a user's files say is text: no markup, no cell more, no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sd_erase.terminal import one_line

MARKUP = re.compile(r"([\\`|<]|\](?=[(\[:]))")  # code, cells, HTML, links
LINKS = re.compile(r"(<|\](?=[(\[:]))")


def text(value: object) -> str:
    """`value` as text of one line."""
    return MARKUP.sub(r"\\\1", one_line(value))


def sentence(value: object) -> str:
    """A sentence of ours, whose backticks are meant, with what it quotes as text."""
    return LINKS.sub(r"\\\1", one_line(value))


def table(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(text(cell) for cell in cells) + " |"

    return [line(headers), line(["---"] * len(headers)), *(line(row) for row in rows)]
