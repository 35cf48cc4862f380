"""What an erasure is asked: groups of prompts, each with a question of its own, and the numbers that answer it.

* ``named``: the concept by the words of its card, in sentences that no pair contains. Is it gone, and what of its companions?
* ``anchor``: the same sentences with the anchor in its place, drawn by the original: what a perfect redirect would draw.
* ``unlisted``: words for the concept that neither its card nor any pair contains. Did the erasure learn words or meaning?
* ``untouched``: sentences without the concept. Are their images the same?
* ``senses``: the concept's word in a sense that is spared ("an apple phone").
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import quiet, resources
from sd_erase.bases import Base
from sd_erase.captions import held_out
from sd_erase.concepts import Concept
from sd_erase.erasure.sd import anchored
from sd_erase.errors import UserError
from sd_erase.prompts import read_prompts

if TYPE_CHECKING:
    from sd_erase.detection import Detection, Detector
    from sd_erase.evaluation import Picture

PROMPTS = 50  # of a concept that no list ships for
UNTOUCHED = 100
UNLISTED = 10  # sentences for each word
FEATURES_AT_ONCE = 64


def probes(
    concepts: Sequence[Concept], anchors: dict[str, str], base: Base, prompts: Sequence[str] = (), most: int = 0
) -> dict[str, list[str]]:
    """The prompts of each group, without the groups that have none.

    Args:
        concepts: what is erased.
        anchors: concept -> the phrase that takes its place.
        base: whose world the unlisted words and, where no list of prompts exists, the sentences come from.
        prompts: files of prompts that name the concepts; by default the bundled list of each, or sentences made for it.
        most: prompts of each concept, spread over its list, and as many untouched ones; 0 takes all.

    Raises:
        UserError: there are no prompts for a concept.
    """
    bundled = resources.names("prompts")
    is_pocket = base.pocket
    lists_of = [[prompt.text for file in prompts for prompt in read_prompts(file)]] if prompts else []
    for concept in () if prompts else concepts:
        own = [prompt.text for prompt in read_prompts(concept.name)] if concept.name in bundled else []
        lists_of.append(own if held_out.listed(own, [concept]) else held_out.naming([concept], base, PROMPTS))
    # a card of the user's own may know fewer words than the list uses
    lists_of = [[text for text in texts if any(concept.find(text) for concept in concepts)] for texts in lists_of]
    named = [text for texts in lists_of for text in (texts[:: -(-len(texts) // most)] if most and texts else texts)]
    if not named:
        raise UserError(
            f"No prompt names {', '.join(concept.name for concept in concepts)}: pass --prompts with a file that does."
        )
    lists = [prompt.text for name in bundled for prompt in read_prompts(name)]
    lists = lists[:: max(1, len(lists) // (UNTOUCHED + UNTOUCHED // 2))]  # of every list as many
    untouched = [text for text in lists if not any(_mentions(concept, text) for concept in concepts)][:UNTOUCHED]
    if is_pocket and len(untouched) < UNTOUCHED:  # many concepts at once leave few of the lists' prompts
        untouched += _strangers(concepts, UNTOUCHED - len(untouched))
    if most:
        untouched = untouched[:: -(-len(untouched) // (most * len(concepts)))]
    groups = {
        "named": named,
        "anchor": [anchored(prompt, concepts, anchors) for prompt in named],
        "unlisted": [sentence for concept in concepts for sentence in _unlisted(concept)] if is_pocket else [],
        "untouched": untouched,
        "senses": [sentence for concept in concepts for sentence in _senses(concept)] if is_pocket else [],
    }
    return {name: group for name, group in groups.items() if group}


def _mentions(concept: Concept, text: str) -> bool:
    """Whether `text` uses a word of the concept in any sense, or one that nobody listed."""
    return any(concept.scan(text)) or any(
        re.search(rf"(?<![^\W_]){re.escape(word)}", text.lower()) for word in unlisted_words(concept)
    )


def _strangers(concepts: Sequence[Concept], count: int) -> list[str]:
    """Held-out sentences of the pocket world that do not mention the concepts."""
    from random import Random

    from sd_erase.pocket import world

    nouns = [noun.name for noun in world.NOUNS if not any(_mentions(concept, f"a {noun.words[0]}") for concept in concepts)]
    rng, number = Random("probes-untouched"), 0
    sentences: list[str] = []
    while len(nouns) > 1 and len(sentences) < count:
        number += 1
        text = world.scene_of(rng.sample(nouns, rng.choice((1, 2, 2))), number, plain=False).caption
        if not any(_mentions(concept, text) for concept in concepts) and text not in sentences:
            sentences.append(text)
    return sentences


def unlisted_words(concept: Concept) -> list[str]:
    """Words of the pocket world for the concept that its card does not know."""
    from sd_erase.pocket import world

    nouns = [noun for noun in world.NOUNS if concept.find(f"a {noun.words[0]}")]
    return [word for noun in nouns for word in noun.words if not any(concept.scan(f"a {word}"))]


def _unlisted(concept: Concept) -> list[str]:
    from sd_erase.pocket import world

    sentences = []
    for number, word in enumerate(unlisted_words(concept)):
        for index in range(UNLISTED):
            other = world.CLASSES[(7 * index + 3 * number) % len(world.CLASSES)]
            if concept.find(f"a {other}"):
                other = "dog"
            template = (*world.ONE_HELD_OUT, *world.TWO_HELD_OUT)[index % 7]
            phrases = [world.with_article(word), world.with_article(world.BY_NAME[other].words[0])]
            place = world.PLACES["grass" if index % 2 else "room"][index % 7]
            sentences.append(" ".join(template.format(*phrases, p=place).split()))
    return sentences


def _senses(concept: Concept) -> list[str]:
    from sd_erase.pocket import world

    sentences = []
    for sense in world.SENSES:
        phrase = world.with_article(sense.words[0])
        if concept.scan(phrase)[1]:
            sentences += [
                " ".join(template.format(phrase, "a dog", p=place).split())
                for template in (*world.ONE_HELD_OUT, world.TWO_HELD_OUT[1])
                for place in ("on the grass", "at home", "on the beach", "on the street", "")
            ]
    return sentences


def answers(
    group: str,
    prompts: Sequence[str],
    found: Sequence[Sequence[Detection]],
    pictures: Sequence[Picture],
    concepts: Sequence[Concept],
    detector: Detector,
) -> dict[str, Any]:
    """What a detector's findings say of one group's images.

    Args:
        group: its name.
        prompts: the prompt of each image.
        found: the detections of each image.
        pictures: of each image whether it is of a single colour: such a one shows nothing, and is left out.
        concepts: what is erased.
        detector: which labels it knows.

    Returns:
        ``target`` (share of images with an erased concept; in several-concept runs any of them), ``companions`` (share of the
        other named objects that are found), ``doubled``, ``unnamed``; each a count and a number. For the group "senses",
        ``companions`` are the spared things ("an apple phone" asks for a phone). ``flat`` is the number of images left out.
    """
    from sd_erase.evaluation import compare
    from sd_erase.judging import things

    told = [number for number, picture in enumerate(pictures) if not picture.flat]
    prompts, found, flat = [prompts[number] for number in told], [found[number] for number in told], len(pictures) - len(told)
    if not told:
        return {name: {"count": 0, "n": 0} for name in ("target", "companions", "doubled", "unnamed")} | {"flat": flat}
    index = [{"prompt": prompt, "prompt_index": number} for number, prompt in enumerate(prompts)]
    result = compare(index, found, None, concepts, things(concepts, detector), detector.labels)
    rows = {row["role"]: row["original"] for row in result["rows"] if row["role"] == "others"}
    labels = frozenset(label for concept in concepts for label in concept.labels)
    target = sum(any(each.label in labels for each in one) for one in found)
    surplus = result["surplus"]["original"]
    if group == "senses":
        rows["others"] = _senses_found(prompts, found)
    return {
        "target": {"count": target, "n": len(found)},
        "companions": {key: rows["others"][key] for key in ("count", "n")} if "others" in rows else {"count": 0, "n": 0},
        "doubled": {key: surplus["doubled"][key] for key in ("count", "n")},
        "unnamed": {key: surplus["unnamed"][key] for key in ("count", "n")},
        "flat": flat,
    }


def _senses_found(prompts: Sequence[str], found: Sequence[Sequence[Detection]]) -> dict[str, int]:
    from sd_erase.pocket import world

    hits: Counter[bool] = Counter()
    for prompt, one in zip(prompts, found, strict=True):
        sense = next(sense for sense in world.SENSES if sense.words[0] in prompt.lower())
        hits[any(each.label == sense.label for each in one)] += 1
    return {"count": hits[True], "n": len(found)}


def psnr(first: Iterable[Path], second: Iterable[Path]) -> list[float]:
    """Peak signal-to-noise ratio in dB of each pair of 8-bit images; identical ones count 100 dB."""
    import numpy as np
    from PIL import Image

    values = []
    for one, other in zip(first, second, strict=True):
        with Image.open(one) as left, Image.open(other) as right:
            difference = np.asarray(left.convert("RGB"), np.float64) - np.asarray(right.convert("RGB"), np.float64)
        error = float(np.square(difference).mean())
        values.append(100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error)))
    return values


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, between neighbours in proportion."""
    import numpy as np

    return float(np.quantile(values, share))


class Coherence:
    """CLIPScore and the Fréchet distance of images, with the base's own frozen CLIP as the feature extractor.

    Both need the CLIP partner with its vision tower. CLIPScore is Hessel et al. 2021 (arXiv:2104.08718): 100 x the cosine of image
    and caption, floored at 0, by torchmetrics' definition. The Fréchet distance is FID's formula (Heusel et al. 2017,
    arXiv:1706.08500) on these features in place of Inception's, whose weights do not ship; it compares only within one base.
    """

    def __init__(self, base: Base, device: Any):
        from sd_erase.clip import load_towers

        self.towers = load_towers(base, device, need_images=True)

    def features(self, paths: Sequence[Path]) -> Any:
        """Normalised image embeddings [images, dimensions]."""
        import torch

        from sd_erase.clip import image_embeddings, read_pixels

        parts = []
        for start in range(0, len(paths), FEATURES_AT_ONCE):
            pixels = read_pixels(self.towers.image_processor, [str(path) for path in paths[start : start + FEATURES_AT_ONCE]])
            with torch.no_grad():
                parts.append(image_embeddings(self.towers.frozen_clip, pixels.to(self.towers.text.device)))
        return torch.cat(parts)

    def clip_score(self, features: Any, captions: Sequence[str]) -> float:
        """Mean CLIPScore of images, given their `features`, to their captions."""
        import torch

        from sd_erase.clip import encode, text_embeddings

        with torch.no_grad():
            pooled = encode(self.towers.frozen_text, self.towers.tokens(captions), (-1,))[1]
            texts = text_embeddings(self.towers.frozen_clip, pooled)
        return float((100 * (features * texts).sum(-1)).clamp(min=0).mean())

    def frechet(self, first: Any, second: Any) -> float:
        """Fréchet distance between Gaussians fitted to two sets of features, x 1000 (the features are normalised)."""
        import torch

        quiet.figures()
        from torchmetrics.image.fid import FrechetInceptionDistance

        identity = torch.nn.Identity()
        identity.num_features = first.shape[1]
        distance = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
        distance.update(first.cpu(), real=True)
        distance.update(second.cpu(), real=False)
        return 1000 * float(distance.compute())
