"""What a person may write where a word or phrase is asked for, and where a list of them."""

from __future__ import annotations

import re
import reprlib

from sd_erase.concepts.text import TOKEN, plain
from sd_erase.errors import UserError

MAX_PHRASE = 200  # characters: CLIP reads 75 tokens, and a caption of that length holds a phrase and more
MAX_ENTRIES = 5_000  # of one list of a card; of names to erase
_SHOWN = 60  # characters of a value in a message
SEPARATORS = re.compile(r"[,;\uff0c\uff1b\u3001\n]")
# what separates, chooses or stands for something in another place; M*A*S*H and A+ are names
_MARK = re.compile(r"[,;|{}\u3001]|(?<!\w)\*|\*(?!\w)|(?<!\S)\+(?!\S)")


def shown(value: object) -> str:
    """`value` in a message, on one line and cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = _SHOWN
    return short.repr(value)


def split_list(text: str) -> list[str]:
    """The entries of a list that was written as one text: ``bike, cycle; velo``, or one a line."""
    return [entry for entry in (part.strip() for part in SEPARATORS.split(text)) if entry]


def phrase_of(text: str, where: str, several: str = "write each as an entry of its own: [{}]") -> str:
    """`text` as a phrase is kept (`text.plain`).

    Args:
        text: as it was written.
        where: what the phrase is, as the beginning of a sentence.
        several: how several phrases are written there; ``{}`` stands for them.

    Raises:
        UserError: it is a list, a choice, holds no word, or is too long for a caption.
    """
    if len(text) > MAX_PHRASE:
        raise UserError(f"{where} {shown(text)} has {len(text):,} characters: write a phrase of {MAX_PHRASE} at most.")
    phrase = plain(text)
    if not TOKEN.search(phrase):
        raise UserError(f"{where} {shown(text)} holds no word: write a word or phrase such as bicycle.")
    mark = _MARK.search(phrase)
    if mark:
        parts = [part for part in (part.strip() for part in _MARK.split(phrase)) if TOKEN.search(part)]
        advice = several.format(", ".join(parts)) if len(parts) > 1 else "write the phrase without it"
        raise UserError(f"{where} {shown(text)} is one phrase, but {mark.group()!r} stands in it: {advice}.")
    return phrase


def entries_of(value: object, where: str, *, templates: bool = False) -> list[str]:
    """The texts of a card's list, or of what stands in its place: one text with commas, semicolons or line ends is several.

    Raises:
        UserError: it is no list of texts, or one with too many.
    """
    if isinstance(value, str):
        value = split_list(value) if len(value) <= MAX_PHRASE * MAX_ENTRIES else [value]
    items = value or []
    word = re.compile(rf"{TOKEN.pattern}|{{}}") if templates else TOKEN  # the template "{}" is the concept's words alone
    if not isinstance(items, list) or not all(isinstance(item, str) and word.search(item) for item in items):
        raise UserError(f'{where} must be a list of words, not {shown(value)} (quote words such as "true").')
    if len(items) > MAX_ENTRIES:
        raise UserError(f"{where} has {len(items):,} entries: write {MAX_ENTRIES:,} at most.")
    return items
