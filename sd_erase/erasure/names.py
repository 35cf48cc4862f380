"""Which words a base reads as a concept: asked of its text encoder, so that no card need be complete.

A word is put into plain captions, and the end-of-text states that the encoder gives it, in the layers that the denoiser reads, are
measured against the way from the anchor ("nothing in particular") to the concept: how far *along* it they lie (0: the anchor, 1: the
concept) and how far *aside*, in lengths of the way. Candidates are the whole words of the tokenizer's vocabulary, words made of two tokens of
which the last alone goes half of the way, and misspellings made on purpose of what was found.

No paper that we know of asks a text encoder for its synonyms; the measure is that of the attacks in `erasure.robust`.
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_erase import bases, resources, sharding
from sd_erase.clip import choose_anchor, choose_neighbours, encode, load_towers
from sd_erase.concepts import Concept, load_concepts
from sd_erase.concepts.typos import misspellings
from sd_erase.erasure.pseudo_words import embedding, vocabulary
from sd_erase.progress import NoProgress, Progress

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.config import RunConfig

TEMPLATES = {
    "object": ("a photo of a {}", "there is a {} here"),
    "style": ("a painting in the style of {}", "a picture by {}"),
    "person": ("a photo of {}", "{} is here"),
    "nudity": ("a photo of a {} person", "{} people"),
}
ALONG = 0.85  # of the way, from which a word is taken for the concept
ASIDE = 0.3  # lengths of the way, up to which it is
REACH = 0.35  # lengths of the way, both together
BETWEEN = 0.6  # of the nearest neighbour's distance from the concept: a name is nearer to the concept than to other things
KNOWN = 0.5  # of the way, from which the base is said to know a word as the concept
STILL = (
    0.25  # of the way, from which an erased encoder still reads a word as the concept (on the pocket model .31 drew it in 1 of 8
)
BESIDE = 0.5  # images, .69 in 2, .90 in 8), where it is not further aside: all nouns go some of each other's ways
PARTS = 48  # first and last parts of which words are made, and of each source the most that are kept
AT_ONCE = 256  # captions
MOST = 1024  # words that are measured in all templates: the nearest in one
MADE_UP = 64  # words of random letters, by which the base is asked what it makes of nonsense
NONSENSE = 0.9  # share of these: what goes no further along than so many of them do means nothing to the base
KEPT = 2  # lists of words whose states are kept for the next concept
SOURCES = {
    "vocabulary": "words that the card lacks",
    "parts": "words of two tokens",
    "misspelling": "misspellings",
}


@dataclass(frozen=True)
class Name:
    """A word or phrase as an encoder reads it.

    Attributes:
        text: the word.
        along: how far its states lie along the way from the anchor to the concept.
        aside: how far beside it, in lengths of the way.
        source: "card", "vocabulary", "parts" or "misspelling".
    """

    text: str
    along: float
    aside: float
    source: str

    @property
    def distance(self) -> float:
        """From the concept, in lengths of the way."""
        return float(((1 - self.along) ** 2 + self.aside**2) ** 0.5)


@dataclass(frozen=True)
class Names:
    """How a base names a concept.

    Attributes:
        card: the card's words, each as the base reads it.
        found: words that the base reads as the concept and the card lacks, the nearest first.
        reach: the distance up to which a word was taken for the concept.
        nonsense: how far along made-up words go: what goes no further is none of the base's words for the concept.
    """

    card: tuple[Name, ...]
    found: tuple[Name, ...]
    reach: float
    nonsense: float = 0.0

    @property
    def known(self) -> tuple[str, ...]:
        """The card's words that the base reads as the concept rather than as nothing in particular."""
        return tuple(name.text for name in self.card if name.along >= KNOWN)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The card's other words that still mean something: to send nonsense to the anchor moves every prompt with a strange word."""
        return tuple(name.text for name in self.card if self.nonsense < name.along < KNOWN)

    def of(self, *sources: str) -> tuple[str, ...]:
        """What was found among these sources."""
        return tuple(name.text for name in self.found if name.source in sources)


NONE = Names((), (), 0.0)  # where nobody asked

_FOUND: dict[tuple[Any, ...], Names] = {}  # of this process: the stage and the objective ask for the same ones
# by encoder, template and words: of a full vocabulary they take minutes on a processor, and every concept asks for the same ones
_SCREENED: dict[tuple[Any, ...], torch.Tensor] = {}


def find(towers: Towers, concept: Concept, anchor: str, *, cheap: bool = False, progress: Progress | None = None) -> Names:
    """The words that the frozen encoder of `towers` reads as `concept`.

    Args:
        towers: the base; its frozen text encoder is asked.
        concept: what is to be erased; words of its ``spared`` senses and its ``neighbours`` are never its names.
        anchor: what stands in its place ("" counts as "thing").
        cheap: where the search would take minutes (a wide encoder on a processor) only the card's words are measured, and misspelt.
        progress: told of the words of the vocabulary.
    """
    device, width = towers.frozen_text.device, towers.frozen_text.config.hidden_size
    searches = not cheap or device.type != "cpu" or width < resources.WIDE
    key = (towers.stamp, towers.layers, concept, anchor, searches)
    if key not in _FOUND:
        # in whole by every process of a training: which words are accepted is a choice that another rounding could change
        with sharding.sharing(False):
            _FOUND[key] = _search(towers, concept, anchor, searches, progress or NoProgress())
    return _FOUND[key]


def _search(towers: Towers, concept: Concept, anchor: str, whole_vocabulary: bool, progress: Progress) -> Names:
    way = Way(towers, concept, anchor)
    card = tuple(way.measured(concept.phrases, "card"))
    kept = {*concept.neighbours, *concept.spared, anchor}
    # a neighbour that the base does not tell from the concept says nothing of where the concept ends
    others = [name.distance for name in way.measured(concept.neighbours, "neighbour") if name.distance > ASIDE]
    reach = min([REACH, *(BETWEEN * distance for distance in others)])

    def accepted(names: Sequence[Name]) -> list[Name]:
        return [name for name in names if name.along >= ALONG and name.aside <= ASIDE and name.distance <= reach]

    def fresh(texts: Sequence[str], known: Collection[str] = ()) -> list[str]:
        return [text for text in dict.fromkeys(texts) if text not in kept and text not in known and not any(concept.scan(text))]

    found: list[Name] = []
    if whole_vocabulary:
        table = embedding(towers.frozen_text).weight
        texts = [towers.tokenizer.decode([token]).strip() for token in vocabulary(towers.tokenizer, table)]
        screened = way.screened(texts, "vocabulary", progress)
        near = sorted((name for name in screened if name.along >= KNOWN), key=_order)[:MOST]
        whole = way.measured([name.text for name in near], "vocabulary")
        words = set(fresh([name.text for name in whole]))
        found = accepted([name for name in whole if name.text in words])
        made = fresh(_of_two_parts(way.screened(first_parts(towers.tokenizer, table), "parts", progress), whole))
        found += _nearest(accepted(way.measured(made, "parts")))
    names = [name.text for name in (*card, *found) if name.source != "parts" and name.along >= KNOWN]
    wrong = fresh(misspellings(names, random.Random(concept.name)), {name.text for name in found})
    found += _nearest(accepted(way.measured(wrong, "misspelling")))
    alongs = sorted(name.along for name in way.measured(made_up(MADE_UP, random.Random("nonsense")), "made up"))
    return Names(card, tuple(sorted(found, key=_order)), reach, alongs[round(NONSENSE * (MADE_UP - 1))])


def made_up(count: int, rng: random.Random) -> list[str]:
    """Words of three to eight random letters, which mean nothing to anybody."""
    return ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(count)]


def _order(name: Name) -> tuple[float, str]:
    return name.distance, name.text


def _nearest(names: Sequence[Name]) -> list[Name]:
    return sorted(names, key=_order)[:PARTS]


class Way:
    """The way from the anchor to a concept in the frozen encoder's end-of-text states, by which words are measured."""

    def __init__(self, towers: Towers, concept: Concept, anchor: str):
        self.towers, self.templates = towers, TEMPLATES[concept.kind]
        self._start, goal = (self._states([word], towers.frozen_text) for word in (anchor or "thing", concept.name))
        self._way = goal - self._start  # [1, templates, layers, width]

    def _states(
        self, words: Sequence[str], text: Any, most: int | None = None, advance: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """End-of-text states [words, templates, layers, width] in the first `most` templates; the mask is causal, so no padding is needed."""
        import torch

        templates = self.templates[:most]
        captions = [template.format(word) for word in words for template in templates]
        order = sorted(range(len(captions)), key=lambda number: len(captions[number]))  # short ones beside short ones
        parts = []
        with torch.no_grad():
            for start in range(0, len(captions), AT_ONCE):
                some = [captions[number] for number in order[start : start + AT_ONCE]]
                ids = self.towers.tokens(some)
                ids = ids[:, : self.towers.end_of(ids, 0)]
                ends = (ids == self.towers.tokenizer.eos_token_id).int().argmax(1)
                rows = torch.arange(len(ids), device=ids.device)
                parts.append(torch.stack([state[rows, ends] for state in encode(text, ids, self.towers.layers)[0]], 1).float())
                if advance is not None:
                    advance(len(some))
        found = torch.cat(parts)
        back = torch.empty_like(found)
        back[torch.tensor(order, device=found.device)] = found
        return back.unflatten(0, (len(words), len(templates)))

    def measured(self, words: Sequence[str], source: str, text: Any | None = None) -> list[Name]:
        """Each of `words` on the way: the mean over the layers, each by its own length.

        Args:
            words: words or phrases.
            source: see `Name`.
            text: the encoder that reads them; None is the frozen one.
        """
        if not words:
            return []
        return self._names(words, source, self._states(words, self.towers.frozen_text if text is None else text))

    def screened(self, words: Sequence[str], source: str, progress: Progress) -> list[Name]:
        """Each of `words` in one template, in bfloat16 where that is faster: most words of a vocabulary go nowhere."""
        import torch

        towers = self.towers
        device, width = towers.frozen_text.device, towers.frozen_text.config.hidden_size
        key = (towers.stamp, towers.layers, self.templates[0], tuple(words))
        if key not in _SCREENED:
            halved = resources.precision("auto", device, width) == "bf16"
            with progress("the base's own words", len(words)) as task, torch.autocast("cpu", torch.bfloat16, enabled=halved):
                states = self._states(words, towers.frozen_text, 1, task.advance)
            while len(_SCREENED) >= KEPT:
                del _SCREENED[next(iter(_SCREENED))]
            _SCREENED[key] = states
        return self._names(words, source, _SCREENED[key]) if words else []

    def _names(self, words: Sequence[str], source: str, states: torch.Tensor) -> list[Name]:
        templates = states.shape[1]
        way = self._way[:, :templates]
        length = way.square().sum((1, 3), keepdim=True).clamp(min=1e-12)
        gone = states - self._start[:, :templates]
        along = (gone * way).sum((1, 3), keepdim=True) / length
        aside = ((gone - along * way).square().sum((1, 3), keepdim=True) / length).sqrt()
        numbers = zip(along.mean(2).flatten().tolist(), aside.mean(2).flatten().tolist(), strict=True)
        return [Name(word, one, other, source) for word, (one, other) in zip(words, numbers, strict=True)]


def first_parts(tokenizer: Any, table: torch.Tensor) -> list[str]:
    """Tokens of letters that begin a word and do not end it; of those that share one input embedding the first.

    Args:
        tokenizer: a CLIP tokenizer.
        table: [tokens, width], the input embeddings.
    """
    rows = table.detach().float().cpu().numpy() + 0.0  # -0.0 is 0.0
    first: dict[bytes, str] = {}
    for text, token in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token < len(rows) and text.isascii() and text.isalpha():
            first.setdefault(rows[token].tobytes(), text)
    return list(first.values())


def _of_two_parts(firsts: Sequence[Name], lasts: Sequence[Name]) -> list[str]:
    """Words of two tokens, of the `PARTS` of each that go furthest alone."""
    begun, ended = (sorted(names, key=lambda name: -name.along)[:PARTS] for names in (firsts, lasts))
    return [first.text + last.text for first in begun for last in ended]


def named(concept: Concept, names: Names) -> Concept:
    """`concept` with the whole words that were found among its synonyms."""
    return dataclasses.replace(concept, synonyms=tuple(dict.fromkeys((*concept.synonyms, *names.of("vocabulary")))))


def still_read(towers: Towers, concept: Concept, anchor: str, words: Sequence[str]) -> list[Name]:
    """Those of `words` that the student of `towers` still reads as `concept`, the worst first; see `STILL`."""
    with sharding.sharing(False):
        read = Way(towers, concept, anchor).measured(words, "held out", towers.text)
    return sorted((name for name in read if name.along > STILL and name.aside < BESIDE), key=lambda name: -name.along)


def of_base(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """What the base of `config` calls each of its concepts, without training; of SDXL's two encoders the first is asked.

    Returns:
        ``base``, and ``concepts``: name -> ``anchor``, ``reach``, ``card`` and ``found``, each a list of `Name` as a mapping.

    Raises:
        UserError: the base, its encoder or the concepts cannot be used.
    """
    base, device = bases.resolve(config.base), resources.device(config.device)
    selected = load_concepts(config)
    towers = load_towers(base, device, need_images=False)
    result: dict[str, Any] = {}
    for concept in selected:
        anchor = choose_anchor(towers, concept) if concept.anchor is None else concept.anchor
        if not concept.neighbours:
            concept = dataclasses.replace(concept, neighbours=choose_neighbours(towers, concept, anchor))
        found = find(towers, concept, anchor, progress=progress)
        rows = {"card": found.card, "found": found.found}
        result[concept.name] = {
            "anchor": anchor,
            "reach": found.reach,
            **{key: [dataclasses.asdict(name) for name in names] for key, names in rows.items()},
        }
    return {"base": base.name, "concepts": result}


def render(told: dict[str, Any]) -> str:
    """`of_base` for reading."""
    lines = []
    for concept, row in told["concepts"].items():
        known = [name["text"] for name in row["card"] if name["along"] >= KNOWN]
        lines.append(f"{concept}, away from {row['anchor'] or 'nothing'!r}, as {told['base']} reads it:")
        lines.append(f"  of the card's {len(row['card'])} words it knows {len(known)}: {_listed(known)}")
        for source, title in SOURCES.items():
            names = [
                f"{name['text']} ({name['along']:.2f}, {name['aside']:.2f})" for name in row["found"] if name["source"] == source
            ]
            lines.append(f"  {title}: {_listed(names)}")
    lines.append("(in brackets: how far along the way from the anchor to the concept, and how far aside of it)")
    return "\n".join(lines)


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
