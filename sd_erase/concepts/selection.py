"""The concepts that a run is to erase."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import forms, jsonfile
from sd_erase.concepts.cards import (
    TEMPLATES,
    anchor_of,
    check_layout,
    concept_named,
    from_card,
    normal_name,
    own_card,
    packaged_card,
    read_yaml,
)
from sd_erase.concepts.inflection import inflections, numbers
from sd_erase.concepts.matching import Concept, Matcher
from sd_erase.concepts.near import cards_listing, meant
from sd_erase.concepts.phrases import MAX_ENTRIES, MAX_PHRASE, phrase_of, shown, split_list
from sd_erase.concepts.spared import Spared
from sd_erase.concepts.text import bounded, folded, literal
from sd_erase.errors import UserError, no_file

if TYPE_CHECKING:
    from sd_erase.config import RunConfig
    from sd_erase.rundir import RunDir

NAME_LISTS = (".txt", ".csv", ".list")  # files with a name a line
_CARD = re.compile(r"\s*(?:-\s*)?name\s*:")  # a line of a card, whatever its file is called
MAX_FILE = 2**20  # bytes of a concept file


def load_concepts(config: RunConfig) -> list[Concept]:
    """The concepts that `config` names: from its concept file, the cards that ship, or their names alone.

    A name with commas, semicolons or line ends is several. `config.anchor` (unless None) and `config.kind` (unless "object", the
    default) override each card's.

    Raises:
        UserError: no concept; a malformed file; a name that is probably misspelt (unless `config.exact`); a concept all of whose
            words another one spares; an anchor that names what is to be erased.
    """
    own = read_concept_file(Path(config.concept_file).expanduser(), config.kind, config.exact) if config.concept_file else {}
    asked = list(dict.fromkeys(name for text in config.concepts for name in names_in(text))) or list(own)
    if not asked:
        raise UserError("No concept to erase: pass --concept bicycle, or --concept-file with a card.")
    if len(asked) > MAX_ENTRIES:
        raise UserError(f"{len(asked):,} concepts are named: erase {MAX_ENTRIES:,} at once at most.")
    anchor = anchor_of(config.anchor, "Anchor")
    concepts: dict[str, Concept] = {}
    for name in asked:
        concept = _own_concept(name, own) or _concept_named(name, config, own)
        changes: dict[str, Any] = {}
        if config.kind != "object" and concept.kind != config.kind:
            changes |= {"kind": config.kind, "templates": TEMPLATES[config.kind]}
        if anchor is not None:
            changes["anchor"] = anchor
        concepts[concept.name] = dataclasses.replace(concept, **changes)
    selected = list(concepts.values())
    _check_spared(selected)
    return _with_anchors(selected, own, is_asked_for=anchor is not None)


def names_in(text: str) -> list[str]:
    """The concepts that one --concept names: of ``apple, bicycle`` two.

    Raises:
        UserError: none, or one that cannot be a name.
    """
    if len(text) > MAX_PHRASE * MAX_ENTRIES:
        raise UserError(f"Concept {shown(text)} has {len(text):,} characters: pass a name such as bicycle.")
    written = [part.strip("'\"\u2018\u2019\u201c\u201d ") for part in split_list(text)] or [text]
    return [normal_name(phrase_of(part, "Concept", "pass each with a --concept of its own: {}")) for part in written]


def excluded_words(texts: Iterable[str]) -> Concept:
    """What ``harvest.exclude`` names, in all inflections, as a concept that finds it.

    Raises:
        UserError: a text that holds no word, or that cannot be a phrase.
    """
    written = [part for text in texts for part in split_list(text) or [text]]
    phrases = [phrase_of(part, "Excluded word", "pass each with an --exclude of its own: {}") for part in written]
    return Concept("excluded", words=tuple(dict.fromkeys(form for phrase in phrases for form in inflections(phrase))))


def _own_concept(name: str, own: dict[str, Concept]) -> Concept | None:
    """The user's own card for `name`, which may be any word of it."""
    if name in own:
        return own[name]
    return next((card for card in own.values() if name in map(normal_name, card.words) and card.find(name)), None)


def _concept_named(name: str, config: RunConfig, own: dict[str, Concept]) -> Concept:
    if not config.exact:
        _ask_about(name, config.kind, own.values())
    return concept_named(name, config.kind)


def _ask_about(name: str, kind: str, own: Collection[Concept] = (), where: str = "") -> None:
    """Refuse a name whose card was probably meant: a slip of the pen, or a word that stands on a card under another name.

    Args:
        where: the file that names it, as the beginning of a sentence; "" for --concept.

    Raises:
        UserError: which card, and how to have it or the word alone.
    """

    def instead(word: str) -> str:
        return f"write {word} there" if where else f"pass --concept {shown(word) if ' ' in word else word}"

    what = f"{where}: concept" if where else "Concept"
    word = meant(name, kind, own)
    if word is not None:
        listing = cards_listing(word, kind, own)
        card, stands = (listing[0].name, f"which is on the card {listing[0].name!r}") if listing else (word, "which has a card")
        raise UserError(
            f"{what} {name!r} is near {word!r}, {stands}: did you mean {card}? {_sentence(instead(card))}, or --exact to erase what you wrote."
        )
    if cards := cards_listing(name, kind, own):
        names = " and ".join(repr(card.name) for card in cards)
        ways = " or ".join(map(instead, (card.name for card in cards)))
        unseen = ", for which no detector's label is known then" if any(card.labels for card in cards) else ""
        raise UserError(
            f"{what} {name!r} is one of several words on the card{'s' if len(cards) > 1 else ''} {names}: {ways} to erase all that the card "
            f"names, or --exact to erase this word alone{unseen}."
        )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def read_concept_file(path: Path, kind: str, exact: bool = True) -> dict[str, Concept]:
    """The user's own concepts by name: of a card, a list of cards or names, or a text file with a name a line.

    In a text file, what stands behind a comma are further names of the same: ``Claude Monet, Monet``.

    Args:
        path: of the file.
        kind: of what names none.
        exact: take the names of a list as they are, even where one is near a card's.

    Raises:
        UserError: no such file, not readable, malformed, two concepts of one name, or a name that is to be asked about.
    """
    if not path.is_file():
        raise UserError(
            f"Concept file {path} {no_file(path)}: pass a YAML file with `name:` and `synonyms:`, or a list of names as .txt."
        )
    if path.stat().st_size > MAX_FILE:
        raise UserError(
            f"Concept file {path} has {path.stat().st_size:,} bytes: a card or list of names has {MAX_FILE:,} at most; split it."
        )
    where = f"Concept file {path}"
    lines = _named_lines(path) if path.suffix.lower() in NAME_LISTS else []
    values = lines if lines and not any(_CARD.match(line) for line in lines) else _card_values(path)
    cards = values if isinstance(values, list) else [values]
    if len(cards) > MAX_ENTRIES:
        raise UserError(f"{where} has {len(cards):,} concepts: write {MAX_ENTRIES:,} at most.")
    own: dict[str, Concept] = {}
    for card in cards:
        concept = (
            _listed(card, kind, where, exact)
            if isinstance(card, str) and isinstance(values, list)
            else own_card(_of_kind(card, kind), where)
        )
        if concept.name in own:
            raise UserError(f"{where} names {concept.name!r} twice: write one card with all its words.")
        own[concept.name] = concept
    return own


def _card_values(path: Path) -> Any:
    values = read_yaml(path)
    check_layout(path)
    return values


def _of_kind(card: Any, kind: str) -> Any:
    """`card` with the kind that the settings name, where it names none."""
    return {**card, "kind": card.get("kind", kind)} if isinstance(card, dict) else card


def _named_lines(path: Path) -> list[str]:
    """The lines of a list of names; blank ones and those that begin with # are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"Concept file {path} is not UTF-8 text: save it as UTF-8.") from error
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _listed(line: str, kind: str, where: str, exact: bool) -> Concept:
    """The concept of one line of a list: its name, and behind commas further names of it."""
    name, *others = split_list(line) or [line]
    card = packaged_card(name)
    if card is None:
        if not exact and not others:  # whoever writes further names writes a card of their own
            _ask_about(normal_name(phrase_of(name, f"{where}: name")), kind, where=where)
        return own_card({"name": name, "kind": kind, "synonyms": others}, where)
    more = from_card({"name": name, "kind": card.kind, "synonyms": others}, where).synonyms
    return dataclasses.replace(
        card, synonyms=tuple(dict.fromkeys((*card.synonyms, *(form for form in more if form not in card.words))))
    )


def _check_spared(concepts: list[Concept]) -> None:
    for other in concepts:
        covering = [entry for entry in other.spared_entries if entry.context is None and entry.unless is None]
        for concept in concepts if covering else ():
            if concept is other:
                continue
            if all(any(_inside(phrase, entry) for entry in covering) for phrase in concept.phrases):
                entry = next(entry for entry in covering if _inside(concept.phrases[0], entry))
                raise UserError(
                    f"Concept {concept.name!r} is what concept {other.name!r} spares ({entry.source!r}): erase only one of the two, "
                    f"or pass --concept-file with a card of {other.name!r} that does not spare it."
                )


def _with_anchors(selected: list[Concept], own: Collection[str], is_asked_for: bool) -> list[Concept]:
    """`selected`, of which no anchor names what is to be erased.

    Args:
        own: names of the concepts with a card of the user's.
        is_asked_for: whether the settings name the anchor.
    """
    matcher = Matcher(selected)
    named = {
        concept.anchor: next((other for other, *_ in matcher.scan(concept.anchor)), None)
        for concept in selected
        if concept.anchor
    }
    result = []
    for concept in selected:
        other = named.get(concept.anchor or "")
        if other is None:
            result.append(concept)
        elif not is_asked_for and other is not concept and concept.name not in own:
            result.append(dataclasses.replace(concept, anchor=None))  # the card could not know what else is erased
        else:
            raise UserError(
                f"Anchor {concept.anchor!r} of concept {concept.name!r} names {other.name!r}, which is to be erased: "
                "pass --anchor with a word that names neither, such as object."
            )
    return result


def _inside(phrase: str, entry: Spared) -> bool:
    """Whether `phrase` is a spared use, or a run of whole words of the spared phrase."""
    if entry.pattern.fullmatch(folded(phrase)):
        return True
    if re.search(r"[{*,]", entry.source):  # a pattern is no phrase: neither its words nor its plural are any
        return False
    both = (entry.source, numbers(entry.source)[1])
    return any(re.search(bounded([(phrase, literal(phrase))]), folded(form)) is not None for form in both)


def write_concepts(run: RunDir, concepts: list[Concept]) -> None:
    """Write ``run.concepts``."""
    from sd_erase.rundir import write_json_atomic

    write_json_atomic(run.concepts, [concept.to_dict() for concept in concepts])


def read_concepts(run: RunDir) -> list[Concept]:
    """The resolved concepts of a harvested run."""
    if not run.concepts.is_file():
        raise UserError(f"Run {run} has no {run.concepts.name}: run {run.command('harvest')} first.")
    try:
        return [Concept.from_dict(values) for values in jsonfile.read_as(run.concepts, [forms.CONCEPT])]
    except TypeError as error:  # a key that no concept has
        raise jsonfile.damaged(run.concepts, "it holds no list of concepts") from error
