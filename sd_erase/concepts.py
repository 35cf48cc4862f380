"""Concepts: the words that name one, the senses of those words to spare, its anchor, neighbours and detector labels.

A card (``cards/*.yaml``, or the user's ``concept_file``) has these keys, all but ``name`` optional:

* ``name``, ``kind`` ("object", "style", "person", "nudity"), ``words`` (instead of the inflections of the name),
  ``synonyms``, ``anchor``, ``neighbours``, ``labels`` (of the detector), ``templates`` (prompts with one ``{}``);
* ``spared``: uses of the words that mean something else. ``apple phone`` is a phrase (its plural is added, a space also
  matches a hyphen); ``{a|b}`` is a choice; ``{colour}``, ``{their}`` and ``{somebody}`` are named choices; ``*`` is any one word that
  is not a function word; a ``,`` is a comma; ``bat + {baseball|batter}`` is the word "bat" in a caption that also names one of the
  right side; ``bat + {somebody} unless {cave|wing}`` is the same in a caption that names none of the last.

A spared use excludes every match that lies inside it, unless the match is a longer phrase of the concept's own.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase.errors import UserError, unknown_choice

if TYPE_CHECKING:
    from random import Random

    from sd_erase.config import RunConfig
    from sd_erase.rundir import RunDir

CARDS_FOLDER = Path(__file__).parent / "cards"
NUMBERS_FILE = CARDS_FOLDER / "inflections.json"
KINDS = ("object", "style", "person", "nudity")
TOKEN = re.compile(r"[^\W_]+")  # what counts as one word of a caption
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
_CHOICES = {
    "colour": "red|blue|green|yellow|white|black|brown|gray|grey|pink|purple|tan|gold|golden|silver|navy|beige|maroon|teal|turquoise|violet|lime"
    "|orange",
    "their": "his|her|their|its|my|your|our|one's",
    "somebody": "man|men|woman|women|person|people|boy|boys|girl|girls|child|children|kid|kids|guy|guys|lady|ladies|toddler|toddlers|baby"
    "|gentleman|gentlemen|individual|individuals|teenager|teenagers|teen|teens|someone|somebody|couple|crowd|team|he|she",
}
# words that a noun phrase does not contain: what follows the concept's word is then no noun that it qualifies
_FUNCTION_WORDS = (
    "a an the and or but nor so as if is are was were be been being has have had does do did of in on at to from by with without for near next "
    "beside behind under over above below between among around through into onto off out up down along across against inside outside while "
    "when where who whom which that this these those there it its his her their he she they we you i "
    "very just also then than not no one two three sits sit sitting lies lie lying lay laying stands stand standing hangs hanging "
    "rests resting looks looking goes going walks walking runs running plays playing works working talks talking holds holding "
    "watches watching grows growing falls falling floats floating cut sliced peeled"
)  # fmt: skip
_SINGULAR_ENDS = ("us", "is", "ss", "gas", "lens", "canvas", "atlas", "bias", "christmas", "cosmos", "rhinoceros")
_PLURALS = (  # of the words that end so
    "menus gnus emus gurus tutus bayous caribous haikus tofus skis waterskis jetskis taxis bikinis kiwis zucchinis tsunamis saris "
    "safaris martinis khakis rabbis yetis salamis paninis tiramisus"
)
_GAP = r"[\s\-\u2010-\u2015]+"
_LEFT, _RIGHT = r"(?<!\w)", r"(?!\w)"


@dataclass(frozen=True)
class Match:
    """One use of a concept's words in a caption: characters ``start`` to ``end``, and why it matched."""

    start: int
    end: int
    text: str
    reason: str


@dataclass(frozen=True)
class _Spared:
    """One compiled entry of `Concept.spared`."""

    source: str
    pattern: re.Pattern[str]
    context: re.Pattern[str] | None  # must occur in the caption as well
    unless: re.Pattern[str] | None  # must not
    open: bool  # ends with any word, so that a phrase of the concept's own goes first
    needed: tuple[frozenset[str], ...]  # the caption holds a word of each: a quick test before the expressions are run


@dataclass(frozen=True)
class Concept:
    """What is to be erased, resolved: all inflections are written out."""

    name: str
    kind: str = "object"
    words: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    anchor: str | None = None
    neighbours: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    @property
    def phrases(self) -> tuple[str, ...]:
        """All words and phrases that match, lower case, the concept's own words first."""
        return tuple(dict.fromkeys((*self.words, *self.synonyms)))

    @functools.cached_property
    def triggers(self) -> frozenset[str]:
        """Words of which a matching caption holds at least one: a quick test before the expression is run."""
        return frozenset(
            word for phrase in self.phrases for word in (max(TOKEN.findall(phrase), key=len), _closed(phrase)) if word
        )

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.phrases, key=lambda phrase: (-len(phrase), phrase))
        forms = (form for phrase in longest_first for form in (_literal(phrase), _closed(phrase)) if form)
        return re.compile(f"{_LEFT}(?:{'|'.join(forms)}){_RIGHT}")

    @functools.cached_property
    def _spared_entries(self) -> tuple[_Spared, ...]:
        return tuple(_compile_spared(entry) for entry in self.spared)

    @functools.cached_property
    def _spared_by_word(self) -> dict[str, list[int]]:
        """Word -> the entries of `_spared_entries` that need it, each under its piece that is rarest in the concept's captions."""
        index: dict[str, list[int]] = {}
        for position, entry in enumerate(self._spared_entries):
            rare = min(entry.needed, key=lambda words: (bool(words & self.triggers), len(words)), default=self.triggers)
            for word in rare:
                index.setdefault(word, []).append(position)
        return index

    def _possibly_spared(self, tokens: Iterable[str]) -> list[_Spared]:
        hits = self._spared_by_word.keys() & tokens
        if not hits:
            return []
        return [
            self._spared_entries[position]
            for position in sorted({place for word in hits for place in self._spared_by_word[word]})
        ]

    @functools.cached_property
    def _own_words(self) -> frozenset[str]:
        return frozenset(self.words)

    def find(self, caption: str) -> list[Match]:
        """The uses of the concept in `caption`, left to right, without overlap and without spared senses."""
        return self.scan(caption)[0]

    def scan(self, caption: str, tokens: Iterable[str] | None = None) -> tuple[list[Match], list[Match]]:
        """The uses of the concept in `caption`, and the uses of its words in a spared sense.

        Args:
            tokens: the caption's words, lower case (`TOKEN`), where they are known already.
        """
        text = _fold(caption)
        found = list(self._pattern.finditer(text))
        if not found:
            return [], []
        spans: list[tuple[int, int, _Spared]] = []
        if self.spared:
            for entry in self._possibly_spared(TOKEN.findall(text) if tokens is None else tokens):
                in_context = entry.context is None or entry.context.search(text)
                if in_context and (entry.unless is None or not entry.unless.search(text)):
                    spans += [(*use.span(), entry) for use in entry.pattern.finditer(text)]
        matches, spared = [], []
        for use in found:
            start, end = use.span()
            cover = next(
                (
                    (left, right, entry)
                    for left, right, entry in spans
                    if left <= start and end <= right and not (entry.open and (left, right) == (start, end))
                ),
                None,
            )
            if cover is None:
                phrase = " ".join(TOKEN.findall(use.group()))
                sort = "word" if phrase in self._own_words or use.group() in self._own_words else "synonym"
                matches.append(Match(start, end, caption[start:end], f"{sort}: {use.group()}"))
            else:
                left, right, entry = cover
                beside = entry.context.search(text) if entry.context else None
                shown = f"{text[left:right]} + {beside.group()}" if beside else text[left:right]
                spared.append(Match(left, right, caption[left:right], f"spared sense: {shown}"))
        return matches, spared

    def to_dict(self) -> dict[str, Any]:
        """The concept as JSON has it; `from_dict` gives it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Concept:
        """A resolved concept from `to_dict`."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _fold(caption: str) -> str:
    """Lower case of the same length, so that spans hold for the caption itself."""
    text = caption.lower().replace("\u2019", "'")
    if len(text) != len(caption):  # a few letters (as the Turkish capital dotted i) grow in lower case
        text = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in caption).replace("\u2019", "'")
    return text


def _literal(phrase: str) -> str:
    """`phrase` as an expression in which a space or a hyphen matches any run of both."""
    return _GAP.join(re.escape(part) for part in re.split(r"[\s\-]+", phrase.strip()))


def _closed(phrase: str) -> str:
    """Two words written as one ("wine glass": "wineglass"), or "" for any other phrase."""
    parts = re.split(r"[\s\-]+", phrase)
    return "".join(parts) if len(parts) == 2 and all(re.fullmatch(TOKEN, part) for part in parts) else ""


@functools.cache
def _compile_spared(entry: str) -> _Spared:
    phrase, context, unless = _parts(entry)
    head, counted = _counted_part(phrase)
    forms = tuple(dict.fromkeys((head + (_numbers(counted)[1] if counted else ""), phrase)))
    needed = [_needed(form) for form in forms]
    shared = zip(*needed, strict=True) if len({len(places) for places in needed}) == 1 else ()
    return _Spared(
        entry,
        re.compile(f"{_LEFT}(?:{'|'.join(_expression(form) for form in forms)}){_RIGHT}"),
        re.compile(f"{_LEFT}(?:{_expression(context)}){_RIGHT}") if context else None,
        re.compile(f"{_LEFT}(?:{_expression(unless)}){_RIGHT}") if unless else None,
        phrase.endswith("*"),
        (*(frozenset().union(*place) for place in shared), *(_needed(context) if context else ())),
    )


def _parts(entry: str) -> tuple[str, str, str]:
    """A spared entry's phrase, the context that it needs and the one that it must not have, "" where there is none."""
    rest, _, unless = entry.partition(" unless ")
    phrase, _, context = rest.partition("+")
    return phrase.strip(), context.strip(), unless.strip()


def _counted_part(phrase: str) -> tuple[str, str]:
    """A spared phrase as what stays and what has a plural: all of a plain phrase, else its last word, if it is one."""
    if not re.search(r"[{*,]", phrase):
        return "", phrase
    head, space, last = phrase.rpartition(" ")
    return (head + space, last) if re.fullmatch(r"[^\W_]+", last) else (phrase, "")


def _pieces(phrase: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|[^\s\-{}]+", phrase)


def _needed(phrase: str) -> list[frozenset[str]]:
    """For each piece of `phrase`, words of which a caption that matches holds at least one."""
    needed = []
    for piece in _pieces(phrase):
        choices = _CHOICES.get(piece[1:-1], piece[1:-1]).split("|") if piece.startswith("{") else [piece]
        words = [TOKEN.findall(choice) for choice in choices]
        if piece != "*" and all(words):
            needed.append(frozenset(max(choice, key=len) for choice in words))
    return needed


def _expression(phrase: str) -> str:
    parts: list[str] = []
    for part in _pieces(phrase):
        if part == "*":
            piece = rf"(?!(?:{'|'.join(_FUNCTION_WORDS.split())}){_RIGHT})[^\W\d_]+"
        elif part.startswith("{"):
            choices = _CHOICES.get(part[1:-1], part[1:-1]).split("|")
            piece = "(?:" + "|".join(_literal(choice) for choice in sorted(choices, key=len, reverse=True)) + ")"
        else:
            piece = re.escape(part)
        parts.append((r"\s*" if part == "," else _GAP if parts else "") + piece)
    return "".join(parts)


@functools.cache
def _known_numbers() -> dict[str, list[str]]:
    """Phrase -> [singular, plural] for the cards that ship: importing inflect alone takes seconds."""
    import json

    return json.loads(NUMBERS_FILE.read_text(encoding="utf-8")) if NUMBERS_FILE.is_file() else {}


@functools.cache
def _inflector() -> Any:
    import inflect

    return inflect.engine()


@functools.cache
def _numbers(phrase: str) -> tuple[str, str]:
    """Singular and plural of `phrase`."""
    if phrase in _known_numbers():
        single, plural = _known_numbers()[phrase]
        return single, plural
    return _inflected(phrase)


def is_plural(phrase: str) -> bool:
    """Whether `phrase` is a plural: as the cards' inflections say, else by its last letter (importing inflect takes seconds)."""
    single, plural = _known_numbers().get(phrase, (phrase, ""))
    if plural:
        return phrase == plural != single
    return phrase.endswith("s") and not phrase.endswith(_SINGULAR_ENDS)


def spoken_form(entry: str, nouns: Sequence[str], rng: Random) -> str:
    """A noun phrase that the spared `entry` matches, its choices made at random; "" where it is none (a verb, a context).

    Args:
        nouns: what may stand for ``*``.
    """
    chosen = re.sub(r"\{([^}]*)\}", lambda choice: rng.choice(_CHOICES.get(choice[1], choice[1]).split("|")), entry)
    words = [rng.choice(nouns) if word == "*" else word for word in chosen.split()]
    no_noun = {"a", "an", "the", *_CHOICES["their"].split("|")} & set(words) or {words[0], words[-1]} & set(
        _FUNCTION_WORDS.split()
    )
    return "" if no_noun or re.search(r"[,+&]| unless ", chosen) else " ".join(words)


def _inflected(phrase: str) -> tuple[str, str]:
    inflector = _inflector()
    last = phrase.split()[-1]
    singular = last.endswith(_SINGULAR_ENDS) and last not in _PLURALS.split()  # inflect takes "bus" for two "bu"
    single = None if singular else inflector.singular_noun(phrase)
    if single and inflector.plural_noun(single) == phrase:
        return str(single), phrase
    return phrase, str(inflector.plural_noun(phrase)).lower()  # inflect has "747S" of "747"


def inflections(phrase: str) -> tuple[str, ...]:
    """`phrase` with its singular and plural, lower case, `phrase` first."""
    phrase = " ".join(phrase.lower().split())
    return tuple(dict.fromkeys((phrase, *_numbers(phrase))))


def write_numbers() -> dict[str, list[str]]:
    """Bring the stored inflections of the packaged cards up to date (``python -m sd_erase.concepts``)."""
    import json

    from sd_erase.rundir import write_text_atomic

    phrases: set[str] = {name for names in _NEIGHBOURS.values() for name in names}
    for path in sorted(CARDS_FOLDER.glob("*.yaml")):
        card = _read_yaml(path)
        spared = (_counted_part(_parts(entry)[0])[1] for entry in card.get("spared", ()))
        phrases.update((card["name"], *card.get("synonyms", ()), *card.get("neighbours", ()), *spared))
    numbers = {
        phrase: list(_inflected(phrase)) for phrase in sorted(" ".join(phrase.lower().split()) for phrase in phrases) if phrase
    }
    write_text_atomic(NUMBERS_FILE, json.dumps(numbers, indent=0, ensure_ascii=False) + "\n")
    return numbers


def _normal_name(name: str) -> str:
    return " ".join(re.split(r"[\s_\-]+", name.strip().lower())).strip()


def _from_card(values: dict[str, Any], where: str) -> Concept:
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
    name = _normal_name((values.get("name") or "").replace("\u2019", "'"))
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
    return dataclasses.replace(concept, neighbours=tuple(name for name in _NEIGHBOURS[kind] if not _names(concept, name)))


def _read_yaml(path: Path) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same loader in C: 80 cards in a tenth of the time
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: no UTF-8, or a date as 2020-13-45
        raise UserError(f"Concept file {path} cannot be read as YAML: {' '.join(str(error).split())}") from error


@functools.cache
def packaged_card(name: str) -> Concept | None:
    """The card that ships for `name` (a word of the concept in any inflection), or None."""
    name = _normal_name(name)
    path = CARDS_FOLDER / f"{name.replace(' ', '_')}.yaml"
    if re.fullmatch(r"[\w ]+", name) and path.is_file():
        return _from_card(_read_yaml(path), f"Card {path.name}")
    # "apples" and "busses" name the card whose word they are
    return next((card for card in all_cards().values() if name in card.words), None)


@functools.cache
def all_cards() -> dict[str, Concept]:
    """Every card that ships, by name, in alphabetical order."""
    cards = (_from_card(_read_yaml(path), f"Card {path.name}") for path in sorted(CARDS_FOLDER.glob("*.yaml")))
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
    return card if card is not None else _from_card({"name": name, "kind": kind}, f"Concept {name!r}")


def load_concepts(config: RunConfig) -> list[Concept]:
    """The concepts that `config` names: from its concept file, the cards that ship, or their names alone.

    `config.anchor` (unless None) and `config.kind` (unless "object", the default) override each card's.

    Raises:
        UserError: no concept; a malformed file; a concept all of whose words another one spares; an anchor that
            names what is to be erased.
    """
    if config.kind not in KINDS:
        raise unknown_choice("Setting kind", config.kind, KINDS)
    own: dict[str, Concept] = {}
    if config.concept_file:
        path = Path(config.concept_file).expanduser()
        if not path.is_file():
            raise UserError(f"Concept file {path} does not exist: pass a YAML file with `name:` and `synonyms:`.")
        values = _read_yaml(path)
        for card in values if isinstance(values, list) else [values]:
            concept = _from_card(card, f"Concept file {path}")
            own[concept.name] = concept
    names = list(dict.fromkeys(_normal_name(name) for name in config.concepts)) or list(own)
    if not names:
        raise UserError("No concept to erase: pass --concept bicycle, or --concept-file with a card.")
    concepts: dict[str, Concept] = {}
    for name in names:
        concept = own[name] if name in own else concept_named(name, config.kind)
        changes: dict[str, Any] = {}
        if config.kind != "object" and concept.kind != config.kind:
            changes |= {"kind": config.kind, "templates": TEMPLATES[config.kind]}
        if config.anchor is not None:
            changes["anchor"] = config.anchor
        concepts[concept.name] = dataclasses.replace(concept, **changes)
    selected = list(concepts.values())
    _check_spared(selected)
    for position, concept in enumerate(selected):
        if not concept.anchor:
            continue
        named = next((other for other in selected if _names(other, concept.anchor)), None)
        if named is None:
            continue
        if config.anchor is None and named is not concept and concept.name not in own:
            selected[position] = dataclasses.replace(concept, anchor=None)  # the card could not know what else is erased
            continue
        raise UserError(
            f"Anchor {concept.anchor!r} of concept {concept.name!r} names {named.name!r}, which is to be erased: "
            "pass --anchor with a word that names neither, such as object."
        )
    return selected


def _names(concept: Concept, text: str) -> bool:
    matches, spared = concept.scan(text)
    return bool(matches or spared)


def _check_spared(concepts: list[Concept]) -> None:
    for concept in concepts:
        for other in concepts:
            if other is concept:
                continue
            covering = [entry for entry in other._spared_entries if entry.context is None and entry.unless is None]
            if all(any(_inside(phrase, entry) for entry in covering) for phrase in concept.phrases):
                entry = next(entry for entry in covering if _inside(concept.phrases[0], entry))
                raise UserError(
                    f"Concept {concept.name!r} is what concept {other.name!r} spares ({entry.source!r}): erase only one of the two, "
                    f"or pass --concept-file with a card of {other.name!r} that does not spare it."
                )


def _inside(phrase: str, entry: _Spared) -> bool:
    """Whether `phrase` is a spared use, or a run of whole words of the spared phrase."""
    if entry.pattern.fullmatch(phrase):
        return True
    return any(
        re.search(_LEFT + _literal(phrase) + _RIGHT, form) is not None
        for form in (entry.source, _numbers(entry.source)[1])
        if not re.search(r"[{*,]", form)
    )


class Matcher:
    """Several concepts in one pass: a caption's words are looked up first, and only concepts that may match are run."""

    def __init__(self, concepts: Iterable[Concept]):
        self.concepts = tuple(concepts)
        self._by_trigger: dict[str, list[int]] = {}
        for position, concept in enumerate(self.concepts):
            for trigger in concept.triggers:
                self._by_trigger.setdefault(trigger, []).append(position)

    def scan(self, caption: str, tokens: list[str]) -> Iterator[tuple[Concept, list[Match], list[Match]]]:
        """The concepts whose words `caption` uses, in their order, with their matches and spared uses.

        Args:
            tokens: ``TOKEN.findall(caption.lower())``.
        """
        if self._by_trigger.keys().isdisjoint(tokens):
            return
        possible = {position for token in tokens for position in self._by_trigger.get(token, ())}
        for position in sorted(possible):
            matches, spared = self.concepts[position].scan(caption, tokens)
            if matches or spared:
                yield self.concepts[position], matches, spared


def write_concepts(run: RunDir, concepts: list[Concept]) -> None:
    """Write ``run.concepts``."""
    from sd_erase.rundir import write_json_atomic

    write_json_atomic(run.concepts, [concept.to_dict() for concept in concepts])


def read_concepts(run: RunDir) -> list[Concept]:
    """The resolved concepts of a harvested run."""
    import json

    if not run.concepts.is_file():
        raise UserError(f"Run {run} has no {run.concepts.name}: run `sd-erase harvest` first.")
    return [Concept.from_dict(values) for values in json.loads(run.concepts.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    print(f"{NUMBERS_FILE}: {len(write_numbers())} phrases")
