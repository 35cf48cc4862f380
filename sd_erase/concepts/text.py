"""Captions and phrases as the matching reads them."""

from __future__ import annotations

import re

TOKEN = re.compile(r"[^\W_]+")  # what counts as one word of a caption
GAP = r"[\s\-\u2010-\u2015]+"
LEFT, RIGHT = r"(?<!\w)", r"(?!\w)"


def fold(caption: str) -> str:
    """Lower case of the same length, so that spans hold for the caption itself."""
    text = caption.lower().replace("\u2019", "'")
    if len(text) != len(caption):  # a few letters (as the Turkish capital dotted i) grow in lower case
        text = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in caption).replace("\u2019", "'")
    return text


def literal(phrase: str) -> str:
    """`phrase` as an expression in which a space or a hyphen matches any run of both."""
    return GAP.join(re.escape(part) for part in re.split(r"[\s\-]+", phrase.strip()))


def closed(phrase: str) -> str:
    """Two words written as one ("wine glass": "wineglass"), or "" for any other phrase."""
    parts = re.split(r"[\s\-]+", phrase)
    return "".join(parts) if len(parts) == 2 and all(re.fullmatch(TOKEN, part) for part in parts) else ""
