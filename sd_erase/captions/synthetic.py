"""Captions where there is no data set: templates filled from the concept's card, and the original pipeline's images of them.

To forget are scenes with the concept's words; to retain are scenes with its neighbours, with the senses that its card spares, and with
the objects of the other cards, of all these what the base tells from the concept: it could not keep one and lose the other. The same
base, concepts and seed give the same captions on every machine.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from sd_erase import resources
from sd_erase.captions.caption import Caption
from sd_erase.concepts import Concept, all_cards, common_nouns, is_plural, spoken_form
from sd_erase.drawing import Batches, Job, Settings, base_stamp, is_drawn, precision, save_png
from sd_erase.errors import UserError
from sd_erase.rundir import fingerprint

if TYPE_CHECKING:
    from sd_erase.bases import Base
    from sd_erase.progress import Progress

FORGET = 800  # captions of each concept, from which the harvest takes its sample
RETAIN = 3000
IMAGES = "synthetic"

Nouns = Sequence[Sequence[str]]  # of each thing its phrases, its name first

_PEOPLE = ("a man", "a woman", "a boy", "a girl", "a child", "an old man", "a young woman", "a lady", "a gentleman", "a guy",
           "a person", "the man", "the woman")  # fmt: skip
# one, two and three things {0} {1} {2}; {n}: somebody; {p}: the place, which may be empty
SCENES = (
    ("{0} {p}", "{0} {p}", "a photo of {0} {p}", "a picture of {0} {p}", "there {is0} {0} {p}", "a close-up of {0} {p}",
     "{0} {is0} seen {p}", "{0} {is0} shown {p}", "an image of {0} {p}", "{n} with {0} {p}", "{n} looking at {0} {p}", "{n} stands behind {0} {p}",
     "{n} is holding {0} {p}", "{n} walks past {0} {p}"),
    ("{0} and {1} {p}", "{0} next to {1} {p}", "{0} beside {1} {p}", "{0} with {1} {p}", "{0} near {1} {p}", "{0} behind {1} {p}",
     "{0} in front of {1} {p}", "{0} to the left of {1} {p}", "{0} close to {1} {p}", "a photo of {0} and {1} {p}",
     "{0} to the right of {1} {p}", "{0} leaning against {1} {p}", "{0} {is0} parked near {1} {p}", "{0} {is0} standing by {1} {p}",
     "{0} {is0} lying beside {1} {p}", "{0} together with {1} {p}", "{0}, {1} {p}", "there {is0} {0} beside {1} {p}", "{n} next to {0} and {1} {p}", "{0} and {n} with {1} {p}"),
    ("{0}, {1} and {2} {p}", "{0}, {1}, {2} {p}", "{0} next to {1} and {2} {p}", "{0} and {1} beside {2} {p}", "{0} near {1} with {2} {p}",
     "a photo of {0}, {1} and {2} {p}"),
)  # fmt: skip
NOUN_PHRASES = tuple(
    tuple(text for text in texts if text.startswith("{0}") and "{is0}" not in text) for texts in SCENES
)  # what a style can be put on: "a painting of a dog next to a car"
PLACES = ("", "", "", "on the grass", "in a park", "in the garden", "in a field", "on the street", "in the city", "on the sidewalk",
           "in a parking lot", "outside a shop", "in a room", "in the kitchen", "on the floor", "on a table", "at home", "indoors",
           "on the beach", "by the sea", "near the water", "under a tree", "in front of a white wall", "at night", "in the sun",
           "on a plain background")  # fmt: skip
_ADJECTIVES = ("red", "blue", "green", "yellow", "black", "white", "brown", "old", "new", "small", "big", "little", "large", "young",
               "beautiful", "colorful", "shiny", "broken", "dark", "modern", "lonely", "nice", "clean", "dirty", "wet", "wooden",
               "abandoned", "painted", "tiny", "favorite")  # fmt: skip
_STYLED = ("{s} in the style of {w}", "a painting of {s} by {w}", "{s}, {w} style", "{s}, painted by {w}", "{s} by {w}",
           "a drawing of {s} in the manner of {w}")  # fmt: skip
_MEDIA = ("{s}", "a photo of {s}", "an oil painting of {s}", "a watercolor of {s}", "a pencil drawing of {s}", "a sketch of {s}")
# the word "nudity" names no thing that could be held or stand somewhere
_SHOWN = ("{w}", "{w} {p}", "{w} in art", "a photo with {w}", "a painting with {w}", "a film scene with {w}", "a magazine with {w}",
          "a sculpture that shows {w}", "an image of {w} {p}", "{n} in a scene of {w}", "a scene of {w} {p}")  # fmt: skip
FIGURES = ("person", "woman", "man", "figure", "couple", "model")


FEWEST = 20  # things that scenes are made of, where the cards have as many that stay
THINGS = 3  # of a scene at most
SPOKEN = 8  # phrases that a spared pattern of a card stands for


def read(
    path: Path,
    folder: Path | None = None,
    wanted: Any = None,
    concepts: Sequence[Concept] = (),
    seed: int = 0,
    base: Base | None = None,
    device: str = "cpu",
    **_: Any,
) -> Iterator[Caption]:
    """Captions of `concepts`, text alone; `draw` makes images of the ones that were chosen.

    Raises:
        UserError: templates and card give no caption that names a concept, hardly a thing is left that none names, or the base cannot
            be loaded.
    """
    texts = _texts(tuple(concepts), seed, base, device)
    for number, text in enumerate(texts):
        yield Caption(f"{number:05d}.png#0", None, text, None)


@functools.lru_cache(maxsize=4)  # the harvest reads its captions more than once
def vocabulary(
    concepts: tuple[Concept, ...], seed: int, base: Base | None, device: str = "cpu"
) -> tuple[list[list[str]], list[tuple[str, list[str]]]]:
    """Phrases that stay: of each object its own, the name first; and of each neighbour and spared sense, with the concept's kind.

    Args:
        base: leaves out what it reads as the concept; None leaves out nothing.
        device: where it reads, as in `RunConfig`.
    """
    nouns = [
        [
            phrase
            for phrase in (card.name, *card.synonyms)
            # "an apple tree" would teach that the fruit's tree stays
            if len(phrase.split()) <= 2 and "'" not in phrase and not any(concept.find(phrase) for concept in concepts)
        ]
        for card in all_cards().values()
        if card.kind == "object" and not any(concept.find(card.name) for concept in concepts)
    ]
    if len(nouns) < FEWEST:  # most of the cards are to be erased
        named = {phrase for phrases in nouns for phrase in phrases}
        nouns += [[noun] for noun in common_nouns() if noun not in named and not any(concept.find(noun) for concept in concepts)]
    if len(nouns) < THINGS:
        raise UserError(f"Hardly a thing is left that none of the {len(concepts)} concepts names: erase fewer at once.")
    rng, plain = Random(f"{seed} spared"), [phrases[0] for phrases in nouns]
    kept = [(concept.kind, [word]) for concept in concepts for word in concept.neighbours]
    for concept in concepts:  # a pattern is as good as a phrase: its choices are made anew
        spoken = [dict.fromkeys(spoken_form(entry, plain, rng) for _ in range(SPOKEN)) for entry in concept.spared]
        kept += [(concept.kind, [phrase for phrase in phrases if phrase]) for phrases in spoken]
    if base is not None and concepts:
        from sd_erase.clip import load_towers, told_apart

        towers = load_towers(base, resources.device(device), need_images=False)
        every = list(dict.fromkeys(phrase for phrases in (*nouns, *(each for _, each in kept)) for phrase in phrases))
        apart = set(told_apart(towers, every, concepts))
        # a base that tells nothing from the concept has to keep something all the same
        left = [[phrase for phrase in phrases if phrase in apart] for phrases in nouns if phrases[0] in apart]
        nouns = left if len(left) >= THINGS else nouns
        kept = [(kind, [phrase for phrase in phrases if phrase in apart]) for kind, phrases in kept]
    return nouns, [(kind, phrases) for kind, phrases in kept if phrases]


def _texts(concepts: tuple[Concept, ...], seed: int, base: Base | None, device: str = "cpu") -> list[str]:
    """All captions, those to forget first; each names exactly what it is meant to name, as the matcher sees it."""
    nouns, kept = vocabulary(concepts, seed, base, device)
    found: dict[str, None] = {}
    for concept in concepts:
        rng = Random(f"{seed} forget {concept.name}")

        def forget(concept: Concept = concept, rng: Random = rng) -> str:
            text = _forget(concept, nouns, rng)
            matches, spared = concept.scan(text)
            return text if matches and not spared else ""

        texts = _collect(forget, FORGET)
        if not texts:
            raise UserError(
                f"Templates give no caption that names concept {concept.name!r} in a sense that its card does not spare: "
                "pass --concept-file with `templates:`, or --dataset."
            )
        found.update(dict.fromkeys(texts))
    rng = Random(f"{seed} retain")

    def retain() -> str:
        kind, word = "object", ""
        if kept and rng.random() < 0.6:
            kind, phrases = rng.choice(kept)
            word = rng.choice(phrases)
        elif concepts:
            kind = rng.choice(concepts).kind
        text = _retain(kind, word, nouns, rng)
        return "" if any(concept.find(text) for concept in concepts) else text

    found.update(dict.fromkeys(_collect(retain, RETAIN)))
    return list(found)


def _collect(make: Callable[[], str], count: int) -> list[str]:
    """Up to `count` different texts; a concept with few words and templates gives fewer."""
    texts: dict[str, None] = {}
    for _ in range(count * 5):
        text = make()
        if text:
            texts[text] = None
            if len(texts) == count:
                break
    return list(texts)


def is_noun(concept: Concept, word: str) -> bool:
    """Whether a word of nudity is a noun: its name and the plurals are, the others adjectives."""
    return concept.kind == "nudity" and (word == concept.name or is_plural(word))


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def mention(noun: str, rng: Random) -> str:
    """A noun phrase: "a bicycle", "the red bicycle", "two bicycles"."""
    if rng.random() < 0.25:
        noun = f"{rng.choice(_ADJECTIVES)} {noun}"
    if is_plural(noun):
        return f"{rng.choice(('two', 'some', 'several'))} {noun}"
    return f"the {noun}" if rng.random() < 0.15 else article(noun)


def scene(
    subject: str,
    nouns: Nouns,
    rng: Random,
    templates: Sequence[Sequence[str]] = SCENES,
    held: bool = True,
) -> str:
    """A caption of one to three things, of which `subject` (if any) is one.

    Args:
        nouns: the phrases of each thing, its name first.
        held: whether the subject is a thing that somebody may hold or park.
    """
    count = rng.choices((1, 2, 3), (0.4, 0.45, 0.15))[0]
    # as photos have it, every fourth thing is somebody
    # and people have several words for a thing
    words = [phrases[0] if rng.random() < 0.5 else rng.choice(phrases) for phrases in rng.sample(nouns, count)]
    things = [rng.choice(_PEOPLE) if rng.random() < 0.25 else mention(word, rng) for word in words]
    if subject:
        things[rng.randrange(count)] = subject
    template = rng.choice(templates[count - 1])
    if ("holding" in template or "parked" in template) and (things[0] in _PEOPLE or not held):
        template = templates[count - 1][0]
    verb = "are" if re.match(r"(two|some|several) ", things[0]) else "is"
    text = template.format(*things, n=rng.choice(_PEOPLE), p=rng.choice(PLACES), is0=verb)
    return " ".join(text.strip(" ,").split())


def finished(text: str, rng: Random) -> str:
    """As people write captions: half as a sentence, half as a prompt."""
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.5 else text


def _forget(concept: Concept, nouns: Nouns, rng: Random) -> str:
    word = concept.words[0] if rng.random() < 0.5 else rng.choice(concept.phrases)
    noun = is_noun(concept, word)
    if rng.random() < 0.15 and not noun and not is_plural(word):
        return finished(re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(concept.templates).format(word)), rng)
    if concept.kind == "style":
        return finished(rng.choice(_STYLED).format(s=scene("", nouns, rng, NOUN_PHRASES), w=word), rng)
    subject = word
    if concept.kind == "object":
        subject = mention(word, rng)
    elif noun:
        text = rng.choice(_SHOWN).format(w=word, n=rng.choice(_PEOPLE), p=rng.choice(PLACES))
        return finished(" ".join(text.split()), rng)
    elif concept.kind == "nudity":
        subject = article(f"{word} {rng.choice(FIGURES)}")
    return finished(scene(subject, nouns, rng, held=concept.kind == "object"), rng)


def _retain(kind: str, word: str, nouns: Nouns, rng: Random) -> str:
    if kind == "style":
        template = rng.choice(_STYLED if word else _MEDIA)
        return finished(template.format(s=scene("", nouns, rng, NOUN_PHRASES), w=word), rng)
    return finished(scene(mention(word, rng) if word and kind == "object" else word, nouns, rng, held=kind == "object"), rng)


def draw(
    captions: Sequence[tuple[str, str]], folder: Path, base: Base, seed: int, device: Any, progress: Progress
) -> dict[str, str]:
    """Draw captions with the original pipeline into ``folder/synthetic``; an image that is there already is not drawn again.

    Args:
        captions: key and text of each.

    Returns:
        The absolute path of each key's image.

    Raises:
        UserError: the base cannot be loaded, or a single image does not fit into memory.
    """
    from sd_erase.components import load_pipeline

    size = base.resolution
    settings = Settings(seed, 1, base.steps, base.guidance, size, size, batch_size=base.batch_size)
    target = (folder / IMAGES).absolute()
    target.mkdir(parents=True, exist_ok=True)
    weights = fingerprint(base_stamp(base), device.type, base.steps, base.guidance, size)
    jobs, paths, stamps = [], {}, {}
    for key, text in captions:
        number = int(re.match(r"\d+", key)[0])  # type: ignore[index]
        job = Job(number, text, seed * 1_000_003 % 2**31 + number)
        paths[key] = target / job.file_name
        stamps[job] = fingerprint(weights, text, job.seed)
        if not is_drawn(target / job.file_name, stamps[job]):
            jobs.append(job)
    with progress("drawing images", len(captions)) as task:
        task.advance(len(captions) - len(jobs))
        if jobs:
            pipeline = load_pipeline(base, precision(base, device)).to(device)

            def save(job: Job, image: Any) -> None:
                about = {"prompt": job.prompt, "seed": str(job.seed), "encoder": "original", "inputs": stamps[job]}
                save_png(image, target / job.file_name, about)

            Batches(settings.batch_size).write(pipeline, jobs, settings, save, task.advance)
    return {key: str(path) for key, path in paths.items()}
