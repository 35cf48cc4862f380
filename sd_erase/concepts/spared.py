"""The language of a card's ``spared`` entries: phrases with choices, named choices, ``*``, commas and contexts."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd_erase.concepts.inflection import numbers
from sd_erase.concepts.phrases import shown
from sd_erase.concepts.text import GAP, RIGHT, TOKEN, bounded, keys, literal, plain
from sd_erase.errors import UserError

if TYPE_CHECKING:
    from random import Random

MAX_ENTRY = 10_000  # characters of one entry with all its choices
MAX_PIECES = 40  # words of one entry: a caption has no more
CHOICES = {
    "colour": "red|blue|green|yellow|white|black|brown|gray|grey|pink|purple|tan|gold|golden|silver|navy|beige|maroon|teal|turquoise|violet|lime"
    "|orange",
    "their": "his|her|their|its|my|your|our|one's",
    "somebody": "man|men|woman|women|person|people|boy|boys|girl|girls|child|children|kid|kids|guy|guys|lady|ladies|toddler|toddlers|baby"
    "|gentleman|gentlemen|individual|individuals|teenager|teenagers|teen|teens|someone|somebody|couple|crowd|team|he|she",
}
CHOICES["color"] = CHOICES["colour"]
# words that a noun phrase does not contain: what follows the concept's word is then no noun that it qualifies
FUNCTION_WORDS = (
    "a an the and or but nor so as if is are was were be been being has have had does do did of in on at to from by with without for near next "
    "beside behind under over above below between among around through into onto off out up down along across against inside outside while "
    "when where who whom which that this these those there it its his her their he she they we you i "
    "very just also then than not no one two three sits sit sitting lies lie lying lay laying stands stand standing hangs hanging "
    "rests resting looks looking goes going walks walking runs running plays playing works working talks talking holds holding "
    "watches watching grows growing falls falling floats floating cut sliced peeled"
)  # fmt: skip


@dataclass(frozen=True)
class Spared:
    """One compiled entry of `Concept.spared`."""

    source: str
    pattern: re.Pattern[str]
    context: re.Pattern[str] | None  # must occur in the caption as well
    unless: re.Pattern[str] | None  # must not
    open: bool  # ends with any word, so that a phrase of the concept's own goes first
    needed: tuple[frozenset[str], ...]  # the caption holds a word of each: a quick test before the expressions are run


@functools.cache
def compile_spared(entry: str) -> Spared:
    phrase, context, unless = parts_of(entry)
    head, counted = counted_part(phrase)
    forms = tuple(dict.fromkeys((head + (numbers(counted)[1] if counted else ""), phrase)))
    needed = [_needed(form) for form in forms]
    shared = zip(*needed, strict=True) if len({len(places) for places in needed}) == 1 else ()
    return Spared(
        entry,
        _compiled(*forms),
        _compiled(context) if context else None,
        _compiled(unless) if unless else None,
        phrase.endswith("*"),
        (*(frozenset().union(*place) for place in shared), *(_needed(context) if context else ())),
    )


def check_entry(entry: str, where: str) -> str:
    """A spared entry as it is kept: `text.plain`, lower case.

    Raises:
        UserError: braces, ``+``, ``unless``, ``*`` or ``|`` stand where they mean nothing, or it is too long.
    """
    if len(entry) > MAX_ENTRY:
        raise UserError(f"{where} {shown(entry)} has {len(entry):,} characters: write {MAX_ENTRY:,} at most.")
    kept = plain(entry).lower()
    fault = _fault(kept)
    if fault:
        raise UserError(f"{where} {shown(entry)} has {fault}.")
    for named in re.findall(r"\{([^{}|]+)\}", kept):
        near = [] if named in CHOICES else difflib.get_close_matches(named, CHOICES, n=1, cutoff=0.8)
        if near:
            raise UserError(
                f"{where} {shown(entry)} names a choice {{{named}}} that does not exist: did you mean {{{near[0]}}}? Write that."
            )
    return kept


def _fault(entry: str) -> str:
    """What is wrong with a spared entry, and what to write; "" where nothing is."""
    context = "write `word + {other|words} unless {these}`"
    bare = re.sub(r"\{[^{}]*\}", "x", entry)
    if "{" in bare or "}" in bare:
        return f"an unmatched brace: {context}"
    if bare.count("+") > 1 or re.search(r"^(\+|unless\b)|(\+|\bunless)$| unless .*(\+| unless )|\+\s*unless\b", bare):
        return f"a misplaced + or unless: {context}"
    if len(pieces(bare)) > MAX_PIECES:
        return f"{len(pieces(bare))} words: write {MAX_PIECES} at most"
    if "|" in bare:
        return "a choice without braces: write `{a|b} word`, or each as an entry of its own: [a word, b word]"
    if re.search(r"[^\s,],|,[^\s,]|;|\u3001", bare):
        return "a list in one text: write each as an entry of its own: [a word, b word] (a comma that captions have stands alone: `red , x`)"
    if re.search(r"\*\w|\w\*", bare):
        return "a * inside a word: it stands for one whole word, as in `apple *`"
    if any(not TOKEN.search(choice) for braced in re.findall(r"\{([^{}]*)\}", entry) for choice in braced.split("|")):
        return "an empty choice: write `{a|b}`"
    if not all(TOKEN.search(part) for part in (parts_of(entry)[0], *filter(None, parts_of(entry)[1:]))):
        return f"a part without a word: {context}"
    return ""


def _compiled(*forms: str) -> re.Pattern[str]:
    return re.compile(bounded([(form, expression(form)) for form in forms]))


def parts_of(entry: str) -> tuple[str, str, str]:
    """A spared entry's phrase, the context that it needs and the one that it must not have, "" where there is none."""
    rest, _, unless = entry.partition(" unless ")
    phrase, _, context = rest.partition("+")
    return phrase.strip(), context.strip(), unless.strip()


def counted_part(phrase: str) -> tuple[str, str]:
    """A spared phrase as what stays and what has a plural: all of a plain phrase, else its last word, if it is one."""
    if not re.search(r"[{*,]", phrase):
        return "", phrase
    head, space, last = phrase.rpartition(" ")
    return (head + space, last) if re.fullmatch(r"[^\W_]+", last) else (phrase, "")


def pieces(phrase: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|[^\s\-{}]+", phrase)


def choices_of(piece: str) -> list[str]:
    """What a piece of a spared phrase may stand for."""
    return CHOICES.get(piece[1:-1], piece[1:-1]).split("|") if piece.startswith("{") else [piece]


def _needed(phrase: str) -> list[frozenset[str]]:
    """For each piece of `phrase`, words of which a caption that matches holds at least one."""
    needed = []
    for piece in pieces(phrase):
        words = [keys(choice) for choice in choices_of(piece)]
        if all(words):
            needed.append(frozenset().union(*words))
    return needed


def expression(phrase: str) -> str:
    parts: list[str] = []
    for part in pieces(phrase):
        if part == "*":
            piece = rf"(?!(?:{'|'.join(FUNCTION_WORDS.split())}){RIGHT})[^\W\d_]+"
        elif part.startswith("{"):
            piece = "(?:" + "|".join(literal(choice) for choice in sorted(choices_of(part), key=len, reverse=True)) + ")"
        else:
            piece = literal(part)
        parts.append((r"\s*" if part == "," else GAP if parts else "") + piece)
    return "".join(parts)


def spoken_form(entry: str, nouns: Sequence[str], rng: Random) -> str:
    """A noun phrase that the spared `entry` matches, its choices made at random; "" where it is none (a verb, a context).

    Args:
        nouns: what may stand for ``*``.
    """
    chosen = re.sub(r"\{([^}]*)\}", lambda choice: rng.choice(CHOICES.get(choice[1], choice[1]).split("|")), entry)
    words = [rng.choice(nouns) if word == "*" else word for word in chosen.split()]
    no_noun = {"a", "an", "the", *CHOICES["their"].split("|")} & set(words) or {words[0], words[-1]} & set(FUNCTION_WORDS.split())
    return "" if no_noun or re.search(r"[,+&]| unless ", chosen) else " ".join(words)
