"""Prompts for a concept that no list exists of: sentences that name it by its card's words beside other things, and sentences that do not.

On the pocket base they come from its world's grammar, elsewhere from patterns (of the art base with things that it knows); both are held out: no data set that sd-erase makes
uses them. The same concepts and base give the same sentences on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING

from sd_erase.captions import synthetic
from sd_erase.concepts import TOKEN, Concept, all_cards

if TYPE_CHECKING:
    from sd_erase.bases import Base

TRIES = 60  # for each sentence that is wanted
# one, two and three things {0} {1} {2}; {p}: the place. `synthetic` has none of these
SCENES = (
    ("a view of {0} {p}", "someone took a snapshot of {0} {p}", "{0} can be found {p}", "what one notices first is {0} {p}"),
    ("somebody left {0} close to {1} {p}", "a snapshot of {0} that waits by {1} {p}", "{0} rests alongside {1} {p}",
     "{0} and, not far away, {1} {p}"),
    ("{0} between {1} and {2} {p}", "a snapshot of {0}, then {1}, then {2} {p}", "{0} rests alongside {1} and {2} {p}"),
)  # fmt: skip
STYLED = (
    "{s} as {w} would have made it",
    "a museum's print of {s} after {w}",
    "{s}, a work in {w}'s manner",
    "{s}: homage to {w}",
)
PLAIN = ("{s} as a beginner would have made it", "a museum's print of {s}", "{s}, an anonymous work", "{s}: a study")
SHOWN = ("an exhibition about {w} {p}", "somebody speaks of {w} {p}", "a snapshot with {w} in it {p}")


def text_key(text: str) -> str:
    """What two captions share that say the same, whatever their capitals and marks."""
    return " ".join(TOKEN.findall(text.lower()))


def naming(concepts: Sequence[Concept], base: Base, count: int, used: Collection[str] = ()) -> list[str]:
    """Up to `count` sentences that name the concepts, in turn: by the words of each card, in no sense that it spares.

    Args:
        base: whose world the sentences are about.
        used: texts that they must not repeat, as `text_key` gives them.
    """
    lists = [_naming(concept, concepts, base, -(-count // len(concepts)), used) for concept in concepts]
    turns = [text for number in range(max(map(len, lists), default=0)) for texts in lists for text in texts[number : number + 1]]
    return list(dict.fromkeys(turns))[:count]


def strangers(concepts: Sequence[Concept], base: Base, count: int, used: Collection[str] = ()) -> list[str]:
    """Up to `count` sentences of the same kinds that use no word of the concepts in any sense."""
    rng = Random("held out, strangers")
    nouns = _nouns(concepts, base)
    styled = bool(concepts) and all(concept.kind == "style" for concept in concepts)

    def make() -> str:
        scene = _scene("", nouns, rng)
        return _finished(
            rng.choice(PLAIN).format(s=synthetic.scene("", nouns, rng, synthetic.NOUN_PHRASES)) if styled else scene, rng
        )

    return _collect(make, count, lambda text: not any(any(concept.scan(text)) for concept in concepts), used)


def _naming(concept: Concept, concepts: Sequence[Concept], base: Base, count: int, used: Collection[str]) -> list[str]:
    if base.pocket and world_nouns(concept):
        return [text for text in pocket_sentences(concept, count + len(used)) if text_key(text) not in used][:count]
    nouns, rng = _nouns(concepts, base), Random(f"held out, {concept.name}")

    def named(text: str) -> bool:
        matches, spared = concept.scan(text)
        return bool(matches) and not spared

    return _collect(lambda: _sentence(concept, nouns, rng), count, named, used)


def _nouns(concepts: Sequence[Concept], base: Base) -> synthetic.Nouns:
    """Other things: of an embedded base those that it can draw, else the objects of all cards."""
    if not base.embedded:
        return synthetic.vocabulary(tuple(concepts), 0, None)[0]
    from sd_erase.pocket import world
    from sd_erase.pocket.art import cast

    nouns = [world.BY_NAME[name] for name in cast.OBJECTS] if base.world == "art" else world.NOUNS
    known = [list(noun.words) for noun in nouns if not any(any(concept.scan(noun.words[0])) for concept in concepts)]
    return known if len(known) >= len(SCENES) else [[card.name] for card in all_cards().values()]


def _sentence(concept: Concept, nouns: synthetic.Nouns, rng: Random) -> str:
    word = concept.words[0] if rng.random() < 0.5 else rng.choice(concept.phrases)
    if concept.kind == "style":
        scene = synthetic.scene("", nouns, rng, synthetic.NOUN_PHRASES)
        return _finished(rng.choice(STYLED).format(s=scene, w=word), rng)
    if concept.kind == "nudity":
        if synthetic.is_noun(concept, word):
            return _finished(rng.choice(SHOWN).format(w=word, p=rng.choice(synthetic.PLACES)), rng)
        return _finished(_scene(synthetic.article(f"{word} {rng.choice(synthetic.FIGURES)}"), nouns, rng), rng)
    return _finished(_scene(synthetic.mention(word, rng) if concept.kind == "object" else word, nouns, rng), rng)


def _scene(subject: str, nouns: synthetic.Nouns, rng: Random) -> str:
    return synthetic.scene(subject, nouns, rng, SCENES)


def _finished(text: str, rng: Random) -> str:
    return synthetic.finished(" ".join(text.split()), rng)


def _collect(make: Callable[[], str], count: int, wanted: Callable[[str], bool], used: Collection[str]) -> list[str]:
    found: dict[str, str] = {}
    for _ in range(count * TRIES):
        if len(found) == count:
            break
        text = make()
        key = text_key(text)
        if key not in used and key not in found and wanted(text):
            found[key] = text
    return list(found.values())


def world_nouns(concept: Concept) -> list[str]:
    """The names of the pocket world's classes that the concept's words name."""
    from sd_erase.pocket import world

    return [name for name, noun in world.BY_NAME.items() if concept.find(f"a {noun.words[0]}")]


def pocket_sentences(concept: Concept, count: int) -> list[str]:
    """Held-out sentences of the pocket world that name `concept` once, first, second or alone, by words of its card."""
    from sd_erase.pocket import world

    names, rng = world_nouns(concept), Random(f"probes-{concept.name}")
    found: list[str] = []
    for number in range(1, 1 + count * TRIES if names else 1):
        strange = [noun.name for noun in world.NOUNS if noun.label not in concept.labels]  # that a detector tells apart
        others = rng.sample(strange, rng.choice((0, 1, 1, 1)))
        cast = [rng.choice(names), *others]
        rng.shuffle(cast)
        text = world.scene_of(cast, number, plain=False).caption
        if len(concept.find(text)) == 1 and text not in found:
            found.append(text)
            if len(found) == count:
                break
    return found


def listed(texts: Iterable[str], concepts: Sequence[Concept]) -> bool:
    """Whether a list of prompts is about the concepts: whether at least half of its texts name one."""
    hits = [any(concept.find(text) for concept in concepts) for text in texts]
    return sum(hits) * 2 >= len(hits) > 0
