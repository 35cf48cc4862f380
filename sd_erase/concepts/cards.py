"""Cards into concepts: those that ship, and the user's own."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_erase.concepts.inflection import NUMBERS_FILE, inflected, inflections
from sd_erase.concepts.matching import Concept, names
from sd_erase.concepts.spared import counted_part, parts_of
from sd_erase.concepts.text import TOKEN
from sd_erase.errors import UserError, unknown_choice

CARDS_FOLDER = Path(__file__).parents[1] / "cards"
KINDS = ("object", "style", "person", "nudity")
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


def normal_name(name: str) -> str:
    return " ".join(re.split(r"[\s_\-]+", name.strip().lower())).strip()


def from_card(values: dict[str, Any], where: str) -> Concept:
    """A resolved concept from the mapping of a card."""
    fields = [field.name for field in dataclasses.fields(Concept)]
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of a card's keys ({', '.join(fields)}), not {values!r}.")
    lists: dict[str, tuple[str, ...]] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_choice(f"{where}: key", key, fields)
        if key in ("name", "kind", "anchor"):
            if not isinstance(value, str) and not (key == "anchor" and value is None):
                raise UserError(f"{where}: {key} must be text, not {value!r}.")
            continue
        items = [value] if isinstance(value, str) else value or []
        if not isinstance(items, list) or not all(isinstance(item, str) and TOKEN.search(item) for item in items):
            raise UserError(f'{where}: {key} must be a list of words, not {value!r} (quote words such as "no").')
        lists[key] = tuple(" ".join(item.replace("\u2019", "'").split()) for item in items)  # captions are folded likewise
    name = normal_name((values.get("name") or "").replace("\u2019", "'"))
    if not TOKEN.search(name):
        raise UserError(f"{where} has no name: add `name: ...`.")
    kind = values.get("kind", "object")
    if kind not in KINDS:
        raise unknown_choice(f"{where}: kind", kind, KINDS)
    inflects = kind == "object"

    def spread(phrases: Iterable[str]) -> tuple[str, ...]:
        lower = [" ".join(phrase.lower().split()) for phrase in phrases]
        return tuple(dict.fromkeys(form for phrase in lower for form in (inflections(phrase) if inflects else (phrase,))))

    words = tuple(word.lower() for word in lists.get("words", ())) or spread([name])
    synonyms = spread(lists.get("synonyms", _NUDITY_WORDS if kind == "nudity" else ()))
    for entry in lists.get("spared", ()):
        misplaced = entry.count("+") > 1 or re.search(
            r"^(\+|unless\b)|(\+|\bunless)$| unless .*(\+| unless )|\+\s*unless\b", entry
        )
        if entry.count("{") != entry.count("}") or misplaced:
            raise UserError(
                f"{where}: spared phrase {entry!r} has an unmatched brace, or a misplaced + or unless: write "
                "`word + {other|words} unless {these}`."
            )
    for template in lists.get("templates", ()):
        if template.count("{}") != 1 or re.search("[{}]", template.replace("{}", "")):
            raise UserError(f"{where}: template {template!r} must hold {{}} once: write `a photo of a {{}}`.")
    concept = Concept(
        name=name,
        kind=kind,
        words=words,
        synonyms=tuple(form for form in synonyms if form not in words),
        spared=tuple(entry.lower() for entry in lists.get("spared", ())),
        anchor=values.get("anchor", _ANCHORS.get(kind)),
        neighbours=tuple(neighbour.lower() for neighbour in lists.get("neighbours", ())),
        labels=lists.get("labels", ()),
        templates=lists.get("templates", TEMPLATES[kind]),
    )
    if "neighbours" in lists or kind not in _NEIGHBOURS:
        return concept
    return dataclasses.replace(concept, neighbours=tuple(name for name in _NEIGHBOURS[kind] if not names(concept, name)))


def read_yaml(path: Path) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same loader in C: 80 cards in a tenth of the time
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: no UTF-8, or a date as 2020-13-45
        raise UserError(f"Concept file {path} cannot be read as YAML: {' '.join(str(error).split())}") from error


@functools.cache
def packaged_card(name: str) -> Concept | None:
    """The card that ships for `name` (a word of the concept in any inflection), or None."""
    name = normal_name(name)
    path = CARDS_FOLDER / f"{name.replace(' ', '_')}.yaml"
    if re.fullmatch(r"[\w ]+", name) and path.is_file():
        return from_card(read_yaml(path), f"Card {path.name}")
    # "apples" and "busses" name the card whose word they are
    return next((card for card in all_cards().values() if name in card.words), None)


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
        UserError: the name holds no word, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise unknown_choice("Concept kind", kind, KINDS)
    if not TOKEN.search(name):
        raise UserError(f"Concept {name!r} holds no word: pass a name such as bicycle.")
    card = packaged_card(name)
    return card if card is not None else from_card({"name": name, "kind": kind}, f"Concept {name!r}")


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
