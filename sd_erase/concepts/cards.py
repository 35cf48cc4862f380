"""Cards into concepts: those that ship, and the user's own."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_erase import yamlfile
from sd_erase.catalog import KINDS
from sd_erase.concepts.inflection import NUMBERS_FILE, inflected, inflections
from sd_erase.concepts.matching import Concept, Matcher, names
from sd_erase.concepts.phrases import MAX_PHRASE, entries_of, phrase_of, shown
from sd_erase.concepts.spared import check_entry, counted_part, parts_of
from sd_erase.concepts.text import TOKEN, label_form, plain
from sd_erase.errors import UserError, unknown_choice

CARDS_FOLDER = Path(__file__).parents[1] / "cards"
TEMPLATES = {
    "object": (
        "a photo of a {}",
        "a picture of the {}",
        "a {} in the background",
        "a close-up photo of a {}",
        "a {} on a plain floor",
    ),
    "style": ("a painting in the style of {}", "an artwork by {}", "{} style landscape", "a portrait by {}"),
    "person": ("a photo of {}", "a portrait of {}", "{} smiling at the camera", "{} walking in the street"),
    "nudity": ("a photo of a {} person", "a {} woman", "a {} man", "a painting of a {} figure"),
}
# what stands in the place of a concept that has no card, and what must be told apart from it
_ANCHORS = {"style": "an artist", "person": "a person", "nudity": "dressed"}
_NEIGHBOURS = {
    "style": ("claude monet", "pablo picasso", "rembrandt", "salvador dali", "andy warhol", "hokusai", "johannes vermeer",
              "gustav klimt", "henri matisse", "edvard munch", "vincent van gogh", "leonardo da vinci"),
    "person": ("a man", "a woman", "an actor", "a singer", "a politician", "albert einstein", "marilyn monroe", "abraham lincoln",
               "frida kahlo", "charlie chaplin"),
    "nudity": ("a dressed woman", "a dressed man", "a person in a coat", "a woman in a dress", "a man in a suit",
               "a woman in a swimsuit", "a statue"),
}  # fmt: skip
_NUDITY_WORDS = ("nudity", "nude", "nudes", "naked", "topless", "bare-chested", "bare-breasted", "unclothed", "undressed")
_FIELDS = [field.name for field in dataclasses.fields(Concept)]
_LISTS = ("words", "synonyms", "spared", "neighbours", "labels", "templates")


def normal_name(name: str) -> str:
    """A concept's name as cards, runs and settings call it: ``hatsune_miku`` is ``hatsune miku``."""
    return " ".join(re.split(r"[\s\-]+", plain(name).lower())).strip()


def from_card(values: Any, where: str) -> Concept:
    """A resolved concept from the mapping of a card.

    Raises:
        UserError: an unknown key, or a value that is not what the key asks for.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where} must be a mapping of a card's keys ({', '.join(_FIELDS)}), not {shown(values)}: write `name: ...`; a list of names is a .txt file."
        )
    for key in values:
        if key not in _FIELDS:
            raise unknown_choice(f"{where}: key", key, _FIELDS)
    for key in ("name", "kind", "anchor"):
        if key in values and not isinstance(values[key], str) and not (key == "anchor" and values[key] is None):
            raise UserError(f"{where}: {key} must be text, not {shown(values[key])}: write it in quotes.")
    if not TOKEN.search(values.get("name") or ""):
        raise UserError(f"{where} has no name: add `name: ...`.")
    written = phrase_of(values["name"], f"{where}: name", "give each a card of its own: {}")
    kind = values.get("kind", "object")
    if kind not in KINDS:
        raise unknown_choice(f"{where}: kind", kind, KINDS)
    lists = {key: _list(values[key], f"{where}: {key}", key) for key in _LISTS if key in values}

    def spread(phrases: Iterable[str]) -> tuple[str, ...]:
        lower = [phrase.lower() for phrase in phrases]
        return tuple(dict.fromkeys(form for phrase in lower for form in (inflections(phrase) if kind == "object" else (phrase,))))

    words = tuple(word.lower() for word in lists.get("words", ())) or spread([written])
    synonyms = spread(lists.get("synonyms", _NUDITY_WORDS if kind == "nudity" else ()))
    concept = Concept(
        name=normal_name(written),
        kind=kind,
        words=words,
        synonyms=tuple(form for form in synonyms if form not in words),
        spared=lists.get("spared", ()),
        anchor=anchor_of(values.get("anchor", _ANCHORS.get(kind)), f"{where}: anchor"),
        neighbours=tuple(neighbour.lower() for neighbour in lists.get("neighbours", ())),
        labels=lists.get("labels", ()),
        templates=lists.get("templates", TEMPLATES[kind]),
    )
    if "neighbours" in lists or kind not in _NEIGHBOURS:
        return concept
    return dataclasses.replace(concept, neighbours=tuple(name for name in _NEIGHBOURS[kind] if not names(concept, name)))


def anchor_of(anchor: str | None, where: str) -> str | None:
    """An anchor as it is kept; "" removes the concept's words, None leaves the choice to CLIP.

    Raises:
        UserError: it is several phrases, or none.
    """
    return anchor if not anchor else phrase_of(anchor, where, "an anchor is one phrase: choose one of {}")


def _list(value: Any, where: str, key: str) -> tuple[str, ...]:
    """The entries under `key` of a card, checked, as they are kept."""
    is_sentence = key in ("spared", "templates")  # in which a comma may stand
    entries = entries_of([value] if is_sentence and isinstance(value, str) else value, where, templates=key == "templates")
    if key == "labels":
        if any(len(entry) > MAX_PHRASE for entry in entries):
            raise UserError(
                f"{where}: {shown(max(entries, key=len))} is no label of a detector: write {MAX_PHRASE} characters at most."
            )
        return tuple(dict.fromkeys(label_form(entry) for entry in entries))
    if key == "spared":
        return tuple(check_entry(entry, where.replace("spared", "spared phrase")) for entry in entries)
    if key == "templates":
        return tuple(_template(entry, where.replace("templates", "template")) for entry in entries)
    return tuple(phrase_of(entry, f"{where}: entry", f"write each as an entry of its own, {key}: [{{}}]") for entry in entries)


def _template(template: str, where: str) -> str:
    """A template as it is kept."""
    if len(template) > MAX_PHRASE:
        raise UserError(f"{where} {shown(template)} has {len(template):,} characters: write {MAX_PHRASE} at most.")
    if template.count("{}") != 1 or re.search("[{}]", template.replace("{}", "")):
        raise UserError(
            f"{where} {shown(template)} must hold {{}} once: write `a photo of a {{}}`, and several as a list: [..., ...]."
        )
    return " ".join(template.split())


def own_card(values: Any, where: str) -> Concept:
    """A resolved concept from a card of the user's own.

    Raises:
        UserError: as `from_card`; or it spares all its own words, or retains one of them as a neighbour.
    """
    concept = from_card(values, where)
    always_spared = not any(entry.unless for entry in concept.spared_entries)
    if always_spared and not any(concept.find(phrase) for phrase in concept.phrases):
        raise UserError(
            f"{where} spares the words of {concept.name!r} themselves ({', '.join(map(shown, concept.spared[:3]))}), so that no caption "
            "would name it: spare longer phrases."
        )
    matcher = Matcher([concept])
    for neighbour in concept.neighbours:
        if any(matches for _, matches, _ in matcher.scan(neighbour)):
            raise UserError(
                f"{where}: neighbour {neighbour!r} is to be retained, but it names {concept.name!r}, which is to be erased: remove it."
            )
    return concept


def read_yaml(path: Path) -> Any:
    return yamlfile.read(path, "Concept file")


def check_layout(path: Path) -> None:
    """Refuse a list whose dashes were forgotten: YAML reads its lines as one phrase.

    Raises:
        UserError: a list of the card is one plain text over several lines.
    """
    import yaml

    root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for card in root.value if isinstance(root, yaml.SequenceNode) else [root]:
        for key, value in card.value if isinstance(card, yaml.MappingNode) else ():
            if key.value not in _LISTS or not isinstance(value, yaml.ScalarNode):
                continue
            own = {None: 0, "": 0, ">": 2}.get(value.style, value.value.count("\n") + 2)  # lines that one line of text takes
            if value.end_mark.line - value.start_mark.line > own:
                raise UserError(
                    f"Concept file {path}: {key.value} in line {key.start_mark.line + 1} is one text over several lines, which would be one "
                    "phrase: write a dash before each entry (`- bike`), or `[bike, cycle]`."
                )


@functools.cache
def packaged_card(name: str) -> Concept | None:
    """The card that ships for `name` (a word of the concept in any inflection), or None.

    A card that spares the name ("glasses" in the card of the vessel) is another thing's.
    """
    name = normal_name(name)
    path = CARDS_FOLDER / f"{name.replace(' ', '_')}.yaml"
    if re.fullmatch(r"[a-z ]+", name) and path.is_file():
        return from_card(read_yaml(path), f"Card {path.name}")
    # "apples" and "busses" name the card whose word they are, and "hotdog" is written so too
    joined = name.replace(" ", "")
    same = ((card, word) for card in all_cards().values() for word in card.words if word.replace(" ", "") == joined)
    return next((card for card, word in same if card.find(word)), None)


@functools.cache
def all_cards() -> dict[str, Concept]:
    """Every card that ships, by name, in alphabetical order."""
    cards = (from_card(read_yaml(path), f"Card {path.name}") for path in sorted(CARDS_FOLDER.glob("*.yaml")))
    return {card.name: card for card in cards}


def common_nouns() -> tuple[str, ...]:
    """The objects of all cards and their neighbours, of which an object's neighbours are chosen where its card names none."""
    return tuple(dict.fromkeys(noun for card in all_cards().values() for noun in (card.name, *card.neighbours)))


def concept_named(name: str, kind: str = "object") -> Concept:
    """The card of `name`, or a concept of that name alone with its inflections.

    Raises:
        UserError: the name is no phrase, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise unknown_choice("Concept kind", kind, KINDS)
    phrase_of(name, "Concept", "pass each with a --concept of its own: {}")
    card = packaged_card(name)
    return card if card is not None else from_card({"name": name, "kind": kind}, f"Concept {shown(name)}")


def write_numbers() -> dict[str, list[str]]:
    """Bring the stored inflections of the packaged cards up to date (``python -m sd_erase.concepts``)."""
    from sd_erase.rundir import write_text_atomic

    phrases: set[str] = {name for names in _NEIGHBOURS.values() for name in names}
    for path in sorted(CARDS_FOLDER.glob("*.yaml")):
        card = read_yaml(path)
        spared = (counted_part(parts_of(entry)[0])[1] for entry in card.get("spared", ()))
        phrases.update((card["name"], *card.get("synonyms", ()), *card.get("neighbours", ()), *spared))
    numbers = {
        phrase: list(inflected(phrase)) for phrase in sorted(" ".join(phrase.lower().split()) for phrase in phrases) if phrase
    }
    write_text_atomic(NUMBERS_FILE, json.dumps(numbers, indent=0, ensure_ascii=False) + "\n")
    return numbers
