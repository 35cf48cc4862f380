"""Captions and phrases as the matching reads them: in lower case, without the many ways to write one letter or one space.

A word ends where CLIP's tokenizer ends it: at whatever is no letter, and between letters and digits. Between the words of a phrase
stands any run of spaces, hyphens and underscores, so that ``hot dog`` is found in ``hot-dog`` and in the tag ``hot_dog``.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

TOKEN = re.compile(r"[^\W_]+")  # what counts as one word of a caption
GAP = r"[\s_\-\\]+"  # the backslash is how tags write a bracket that is no weight: hatsune_miku_\(vocaloid\)
LEFT, RIGHT = r"(?<![^\W\d_])", r"(?![^\W\d_])"
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+")
_PIECE = re.compile(r"[^\W\d_]+|\d+")
_GAPS = re.compile(GAP)
_APOSTROPHES = "\u2018\u2019\u201b\u02b9\u02bc\u02bb\u2032\u00b4\u05f3\uff07"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\ufe58\ufe63\uff0d"
_ALIKE = str.maketrans(
    {letter: "'" for letter in _APOSTROPHES}
    | {letter: "-" for letter in _DASHES}
    | {
        "\u0131": "i",
        "\u0142": "l",
        "\u0141": "l",
        "\u00f8": "o",
        "\u00d8": "o",
        "\u0111": "d",
        "\u0110": "d",
        "\u0451": "\u0435",
    }
)
_SIGNS = {code: sign for code, sign in _ALIKE.items() if sign in "'-"}
_ACCENTS = re.compile("[\u0300-\u036f]")
_POINTS = re.compile("[\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0670\ufe00-\ufe0f]")  # that may be left out
# scripts that write no space between words: what is found there may as well be the end of a longer word
_RUN_ON = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_HANGUL = re.compile("[\uac00-\ud7a3]")  # particles are written to the noun
_ABBREVIATIONS = frozenset({"dr", "mr", "mrs", "ms", "st", "jr", "sr", "mt", "ft"})
_BRACKET_ESCAPE = re.compile(r"\\+(?=[()\[\]{}])")


@dataclass(frozen=True)
class Folded:
    """A text in one spelling, and where each of its characters comes from.

    Attributes:
        starts, ends: for each character of `text` the characters of the original that it stands for; empty where both are
            of one length.
    """

    text: str
    starts: Sequence[int] = ()
    ends: Sequence[int] = ()

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The characters of the original behind ``text[start:end]``."""
        return (self.starts[start], self.ends[end - 1]) if self.starts else (start, end)

    def cuts(self, start: int, end: int) -> bool:
        """Whether ``text[start:end]`` ends or begins inside what is one letter of the original (with its marks)."""
        return any(0 < place < len(self.starts) and self.starts[place - 1] == self.starts[place] for place in (start, end))

    @functools.cached_property
    def pieces(self) -> frozenset[str]:
        """The words, for a quick test before an expression is run."""
        return frozenset(_PIECE.findall(self.text))


@functools.lru_cache(maxsize=8)  # every concept asks for the same caption
def fold(text: str) -> tuple[Folded, ...]:
    """`text` in the spelling in which it is compared; two readings where it holds characters without a width.

    A zero-width space or a soft hyphen may part two words as well as stand inside one.
    """
    if text.isascii():
        return (Folded(text.lower()),)
    clusters = _clusters(text)
    if not any(unicodedata.category(text[start]) == "Cf" for start, _ in clusters):
        return (_joined(text, clusters, ""),)
    return _joined(text, clusters, ""), _joined(text, clusters, " ")


def folded(phrase: str) -> str:
    """A phrase of a card in the spelling in which captions are compared with it."""
    return fold(plain(phrase))[0].text


def plain(text: str) -> str:
    """A phrase as it is kept: one kind of apostrophe, hyphen and space; tags' underscores and escapes are for reading only."""
    text = "".join(letter for letter in text.translate(_SIGNS) if unicodedata.category(letter) != "Cf")
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text))
    return " ".join(_without_loose_marks(_BRACKET_ESCAPE.sub("", text).replace("_", " ")).split())


def _without_loose_marks(text: str) -> str:
    """`text` without the marks that stand on no letter (a lone macron): in a caption they would belong to the sign before them."""
    if text.isascii():
        return text
    kept: list[str] = []
    for letter in text:
        on_letter = kept and (kept[-1].isalnum() or unicodedata.category(kept[-1])[0] == "M")
        if on_letter or unicodedata.category(letter)[0] != "M":
            kept.append(letter)
    return "".join(kept)


def label_form(label: object) -> str:
    """A detector's label as it is compared and shown: ``Cell_Phone`` is ``cell phone``."""
    return " ".join(_GAPS.split(plain(str(label)).lower())).strip()


def _clusters(text: str) -> list[tuple[int, int]]:
    """Where each letter begins and ends with the marks that belong to it."""
    starts = [
        position
        for position, letter in enumerate(text)
        if not position
        or not (unicodedata.category(letter)[0] == "M" or "\u1160" <= letter <= "\u11ff" or letter in "\uff9e\uff9f")
    ]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def _joined(text: str, clusters: list[tuple[int, int]], instead: str) -> Folded:
    """The folded clusters; `instead` stands for a character without a width."""
    parts, starts, ends = [], [], []
    for start, end in clusters:
        part = instead if unicodedata.category(text[start]) == "Cf" else _one(text[start:end])
        parts.append(part)
        starts += [start] * len(part)
        ends += [end] * len(part)
    return Folded("".join(parts), starts, ends)


@functools.lru_cache(maxsize=4096)
def _one(cluster: str) -> str:
    """One letter with its marks: compatible forms are one, case and the accents of Latin and Greek letters do not count."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", cluster.translate(_ALIKE)).casefold())
    if "a" <= text[:1] <= "z" or "\u0370" <= text[:1] <= "\u03ff" or not text[:1].isalpha():
        text = _ACCENTS.sub("", text)
    return unicodedata.normalize("NFC", _POINTS.sub("", text)).translate(_ALIKE)


def literal(phrase: str) -> str:
    """`phrase` as an expression for folded text; what parts its words matches any run of spaces, hyphens and underscores."""
    words = [word for word in _GAPS.split(folded(phrase)) if word]
    inside = GAP.join(_word(word, is_last=number == len(words)) for number, word in enumerate(words, 1))
    # a letter beside it is for `bounded` to forbid, but a number goes on
    return "".join(
        (
            r"(?<!\d)" if words[:1] and words[0][0].isdigit() else "",
            inside,
            r"(?!\d)" if words and words[-1][-1].isdigit() else "",
        )
    )


def _word(word: str, is_last: bool) -> str:
    """One word of a phrase as an expression: full stops of abbreviations and apostrophes inside it may be missing."""
    bare, stop = word.removesuffix("."), "" if is_last and not word.endswith(".") else r"\.?"
    if bare in _ABBREVIATIONS:
        return bare + stop
    initials = word.replace(".", "") if re.fullmatch(r"(?:[^\W\d_]\.)+", word) else ""
    if len(initials) > 1:
        return "(?:" + r"\.[\s_]*".join(initials) + stop + "|" + initials + ")"
    if initials and initials not in "ai":  # "a painter" is no "A. Painter"
        return initials + stop
    return "".join(_letter(word, place) for place in range(len(word)))


def _letter(word: str, place: int) -> str:
    letter = word[place]
    if letter in "()[]{}":
        return r"\\?" + re.escape(letter)
    optional = letter == "'" and word[:place].isalpha() and word[place + 1 :].isalpha()  # mcdonald's, mcdonalds
    return "'?" if optional else re.escape(letter)


def closed(phrase: str) -> str:
    """Two words written as one ("wine glass": "wineglass"), or "" for any other phrase."""
    parts = _GAPS.split(folded(phrase))
    return "".join(parts) if len(parts) == 2 and all(re.fullmatch(TOKEN, part) for part in parts) else ""


def runs_on(text: str) -> bool:
    """Whether `text` holds letters of a script that writes no spaces between words, or only some."""
    return bool(_RUN_ON.search(text) or _HANGUL.search(text))


def keys(phrase: str) -> frozenset[str]:
    """Words (see `Folded.pieces`) of which a text with `phrase` holds at least one; none where that cannot be told."""
    text = folded(phrase)
    words = _WORD.findall(text)
    if not words or runs_on(text):
        return frozenset()
    longest = max(words, key=len)
    if "'" in longest:
        return frozenset({max(longest.split("'"), key=len), longest.replace("'", "")})
    return frozenset({longest, "".join(words)}) if len(longest) == 1 else frozenset({longest})


def bounded(expressions: Sequence[tuple[str, str]]) -> str:
    """One expression for whole words out of several, of which the first that fits is taken.

    Args:
        expressions: each phrase and its expression.
    """
    if any(runs_on(phrase) for phrase, _ in expressions):
        return "|".join("".join((_left(phrase), expression, _right(phrase))) for phrase, expression in expressions)
    # what all have in common stands outside: the search is several times as fast
    return f"{LEFT}(?:{'|'.join(expression for _, expression in expressions)}){RIGHT}"


def _left(phrase: str) -> str:
    return "" if _RUN_ON.match(phrase) else LEFT


def _right(phrase: str) -> str:
    return "" if _RUN_ON.match(phrase[-1:]) or _HANGUL.match(phrase[-1:]) else RIGHT
