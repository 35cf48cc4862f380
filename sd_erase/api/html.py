"""What a result shows in a notebook: a heading, a few lines, a table; all that comes from a user's files is text."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from sd_erase.terminal import one_line

CELL = "padding:2px 10px;text-align:left;vertical-align:top"


def text(value: object) -> str:
    """`value` as text of one line."""
    return html.escape(one_line(value))


def table(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first cell of a row is its heading."""
    head = "".join(f'<th style="{CELL}">{text(cell)}</th>' for cell in headers)
    lines = "".join(
        f'<tr><th scope="row" style="{CELL};font-weight:normal">{text(first)}</th>'
        + "".join(f'<td style="{CELL}">{text(cell)}</td>' for cell in others)
        + "</tr>"
        for first, *others in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if headers else ''}<tbody>{lines}</tbody></table>"


def block(title: str, *parts: str, warnings: Sequence[str] = ()) -> str:
    """A heading above `parts`, which are HTML, and the warnings below."""
    told = "".join(f"<li>{text(warning)}</li>" for warning in warnings)
    return f"<div><p><strong>{text(title)}</strong></p>{''.join(parts)}{f'<ul>{told}</ul>' if told else ''}</div>"


def picture(png: bytes, what: str) -> str:
    """A PNG inside the page."""
    return f'<img alt="{text(what)}" style="max-width:100%" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
