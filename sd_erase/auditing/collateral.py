"""What else changed: companions, neighbours, other senses, attributes and counts, all other things, and the images of untouched prompts.

The reference of what the concept's own prompts should show is the original on the anchor's caption; everywhere else it is the original on
the same prompt from the same noise.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sd_erase.auditing.bench import Batch, Bench, Images
from sd_erase.auditing.embeds import images_of
from sd_erase.auditing.probe import Kept, NotTried, Probe
from sd_erase.captions import held_out, synthetic
from sd_erase.clip import caption_of, encode, nearness
from sd_erase.concepts import Concept, all_cards, spoken_form
from sd_erase.errors import UserError
from sd_erase.evaluation import compare
from sd_erase.judging import things
from sd_erase.probes import Coherence, probes, psnr, quantile

NOISES = (0.01, 0.02)  # of the states' norm: the base's own floor
NUMBERS = ("two", "three")
ATTRIBUTES = ("red", "blue", "black", "white", "old", "small")
CARE = (
    "CARE score, Kim et al. 2026, arXiv:2606.24192 (ICLR 2026): zero-shot top-1 of CLIP for the companion among the labels, as "
    "github.com/damilab/CARE, metrics/care_eval.py, counts it; there by CLIP ViT-B/32, here by the base's own CLIP"
)


def _pair(found: Sequence[bool]) -> tuple[int, int]:
    return sum(found), len(found)


def _compared(bench: Bench, images: Images) -> dict[str, Any]:
    """What `evaluation.compare` says of one side's images."""
    told = [number for number, picture in enumerate(images.pictures) if not picture.flat]
    index = [{"prompt": images.prompts[number], "prompt_index": number} for number in told]
    # the audited concept's label is what is looked for; the others that were erased with it no longer count as kept
    every = things([bench.subject.concept], bench.detector)
    cards = [card for card in every if card.name not in {each.name for each in bench.subject.erased}]
    return compare(index, [images.found[number] for number in told], None, [bench.subject.concept], cards, bench.detector.labels)


def _others(result: dict[str, Any]) -> tuple[int, int]:
    rows = [row["original"] for row in result["rows"] if row["role"] == "others"]
    return (rows[0]["count"], rows[0]["n"]) if rows else (0, 0)


def companions(bench: Bench) -> list[Kept]:
    """The other things that the concept's prompts name, what is drawn twice, and what nobody named; and the CARE score."""
    count = bench.share.images
    before, after = bench.arm("control", count), bench.arm("erased", count)
    wanted, found = _compared(bench, before), _compared(bench, after)
    rows = [
        Kept("companions of the concept", _others(wanted), _others(found)),
        *(
            Kept(title, _counts(wanted["surplus"]["original"][kind]), _counts(found["surplus"]["original"][kind]), rises=True)
            for kind, title in (("doubled", "companions drawn twice"), ("unnamed", "images with a thing that nobody named"))
        ),
    ]
    return [*rows, *_care(bench, before, after)]


def _counts(share: dict[str, Any]) -> tuple[int, int]:
    return share["count"], share["n"]


def _companion(bench: Bench, text: str) -> Concept | None:
    """The one card beside the concept that a prompt names, where it is one."""
    erased = {each.name for each in bench.subject.erased}
    named = [
        card
        for card in all_cards().values()
        if card.name not in erased and card.find(text) and set(card.labels) & bench.detector.labels
    ]
    return named[0] if len(named) == 1 else None


def _care(bench: Bench, before: Images, after: Images) -> list[Kept]:
    """The share of images whose best label by CLIP is the companion."""
    import torch

    from sd_erase.clip import text_embeddings

    try:
        judge = Coherence(bench.subject.base, bench.original.device)
    except UserError:
        return []
    asked = {number: card for number, text in enumerate(bench.sentences(len(after.prompts))) if (card := _companion(bench, text))}
    if not asked:
        return []
    things = [*_things(bench), (bench.subject.concept.name, *sorted(bench.labels)[:1])]
    with torch.no_grad():
        pooled = encode(judge.towers.frozen_text, judge.towers.tokens([caption_of(name) for name, _ in things]), (-1,))[1]
        texts = text_embeddings(judge.towers.frozen_clip, pooled)
    hits = []
    for images in (before, after):
        best = (judge.features([images.paths[number] for number in asked]) @ texts.T).argmax(-1).tolist()
        hits.append(_pair([things[place][1] in card.labels for place, card in zip(best, asked.values(), strict=True)]))
    return [Kept("CARE score (companions by CLIP, zero-shot)", hits[0], hits[1])]


def _named(
    bench: Bench, name: str, phrases: Sequence[str], check: Callable[[Counter[str], str], bool], labels: Sequence[str]
) -> tuple[Kept, ...]:
    """Each phrase's label in both models' images of sentences that name it."""
    rng = random.Random(f"audit {name}")
    texts = [f"{rng.choice(('a view of', 'someone took a snapshot of', 'one can see'))} {phrase}" for phrase in phrases]
    counts = []
    for side in ("original", "erased"):
        images = bench.drawn(name, side, texts)
        told = zip(images.found, images.pictures, labels, strict=True)
        counts.append(
            _pair([check(Counter(each.label for each in one), label) for one, picture, label in told if not picture.flat])
        )
    return (Kept(name, counts[0], counts[1]),)


def _has(found: Counter[str], label: str) -> bool:
    return found[label] > 0


def _things(bench: Bench) -> list[tuple[str, str]]:
    """(name, label) of every other thing that the detector knows and a card names; on the pocket base those that it can draw."""
    erased = {label for each in bench.subject.erased for label in each.labels}
    known = bench.detector.labels - erased
    if bench.subject.base.pocket:
        from sd_erase.pocket import world

        drawn = {noun.name for noun in world.NOUNS}
    else:
        drawn = set(all_cards())
    things = [
        (card.name, card.labels[0])
        for card in all_cards().values()
        if card.kind == "object" and card.name in drawn and card.labels and card.labels[0] in known
    ]
    return [(name, label) for name, label in things if not any(any(each.scan(name)) for each in bench.subject.erased)]


def classes(bench: Bench) -> list[Kept]:
    """All other things, and of these the ones that CLIP holds nearest to the concept as a row of their own."""
    things = _things(bench)
    if not things:
        raise NotTried("the detector knows nothing else that a card names")
    each = max(1, round(2 * bench.share.few / len(things)))
    near = nearness(bench.towers, bench.subject.concept.name, [name for name, _ in things], "object")
    ranked = [thing for _, thing in sorted(zip(near, things, strict=True), reverse=True)]
    nearest = ranked[: max(1, min(4, len(ranked) // 4))]
    rest = [thing for thing in ranked if thing not in nearest]
    rows: list[Kept] = []
    for title, chosen, times in (
        ("look-alikes: " + ", ".join(name for name, _ in nearest), nearest, max(1, bench.share.few // len(nearest))),
        ("all other things", rest, each),
    ):
        phrases = [synthetic.article(name) for name, _ in chosen for _ in range(times)]
        labels = [label for _, label in chosen for _ in range(times)]
        (row,) = _named(bench, title.partition(":")[0], phrases, _has, labels) if chosen else (None,)
        if row is not None:
            rows.append(Kept(title, row.original, row.erased))
    return rows


def attributes(bench: Bench) -> list[Kept]:
    """Other things with a colour or a size, and two or three of them: that the thing and the count stay, for which a detector has eyes."""
    things = _things(bench)
    if not things:
        raise NotTried("the detector knows nothing else that a card names")
    rng = random.Random("audit attributes")
    picked = [rng.choice(things) for _ in range(bench.share.few)]
    described = [synthetic.article(f"{rng.choice(ATTRIBUTES)} {name}") for name, _ in picked]
    counted = [f"{NUMBERS[number % 2]} {_plural(name)}" for number, (name, _) in enumerate(picked)]
    wanted = {"two": 2, "three": 3}
    numbers = iter([wanted[text.split()[0]] for text in counted] * 2)

    def as_many(found: Counter[str], label: str) -> bool:
        return found[label] >= next(numbers)

    labels = [label for _, label in picked]
    return [
        *_named(bench, "things with an attribute", described, _has, labels),
        *_named(bench, "two or three of a thing", counted, as_many, labels),
    ]


def _plural(name: str) -> str:
    from sd_erase.concepts import inflections, is_plural

    return next((form for form in inflections(name) if is_plural(form)), f"{name}s")


def senses(bench: Bench) -> list[Kept]:
    """Uses of the concept's words that mean something else, which the card spares and the detector can see."""
    rng, things = random.Random("audit senses"), _things(bench)
    found: list[tuple[str, str]] = []
    for entry in bench.subject.concept.spared:
        phrase = spoken_form(entry, [name for name, _ in things] or ["thing"], rng)
        if not phrase:
            continue
        labels = [label for name, label in things if label not in bench.labels and all_cards()[name].find(phrase)]
        if labels:
            found.append((phrase, labels[0]))
    if not found:
        raise NotTried("the card spares no sense that the detector can see")
    picked = [found[number % len(found)] for number in range(bench.share.few)]
    return list(
        _named(
            bench,
            "other senses of its words",
            [synthetic.article(phrase) for phrase, _ in picked],
            _has,
            [label for _, label in picked],
        )
    )


def untouched(bench: Bench) -> list[Kept]:
    """Prompts that do not name the concept: their things, how far the images are the same, CLIPScore and the Fréchet distance."""
    texts = _strangers(bench, bench.share.images)
    before, after = bench.drawn("untouched", "original", texts), bench.drawn("untouched", "erased", texts)
    rows = [Kept("things that untouched prompts name", _others(_compared(bench, before)), _others(_compared(bench, after)))]
    measured = psnr(before.paths, after.paths)
    floors = {}
    if len(bench.subject.base.encoders) == 1:
        floors = {noise: psnr(before.paths, _noised(bench, texts, noise).paths) for noise in NOISES}
    for title, share in (("PSNR, median", 0.5), ("PSNR, tenth percentile", 0.1)):
        note = "; ".join(
            f"the original under noise of {noise:.0%} of its states' norm: {quantile(values, share):.1f} dB"
            for noise, values in floors.items()
        )
        floor = quantile(floors[NOISES[-1]], share) if floors else None
        rows.append(Kept(f"{title} of untouched prompts", value=quantile(measured, share), floor=floor, unit="dB", note=note))
    try:
        judge = Coherence(bench.subject.base, bench.original.device)
    except UserError:
        return rows
    features = [judge.features(images.paths) for images in (before, after)]
    other = judge.features(bench.drawn("untouched-again", "original", texts[::-1]).paths)
    scores = [judge.clip_score(each, texts) for each in features]
    rows.append(Kept("CLIPScore of untouched prompts", value=scores[1], floor=scores[0], note="the original"))
    distances = [judge.frechet(features[0], each) for each in (features[1], other)]
    rows.append(
        Kept("Fréchet distance on CLIP's features", value=distances[0], floor=distances[1], note="the original from other noise")
    )
    return rows


def _strangers(bench: Bench, count: int) -> list[str]:
    """Up to `count` prompts that name nothing that was erased: of the lists that ship and, on the pocket base, of its world."""
    erased = list(bench.subject.erased)
    found = probes(erased, bench.subject.anchors, bench.subject.base).get("untouched", [])
    if len(found) < count:
        found += held_out.strangers(erased, bench.subject.base, count - len(found), {held_out.text_key(text) for text in found})
    return random.Random("audit untouched").sample(found, min(count, len(found)))


def _noised(bench: Bench, texts: Sequence[str], noise: float) -> Images:
    """The original's images with its hidden states moved at random by `noise` of their norm, position by position."""
    import torch

    def make(batch: Batch) -> list[Any]:
        with torch.no_grad():
            states = encode(bench.original.text_encoder, bench.towers.tokens(batch.prompts), (-1,))[0][0]
            drawn = torch.stack([torch.randn(states.shape[1:], generator=generator) for generator in _seeded(batch)]).to(states)
            moved = states + noise * drawn * states.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
        return images_of(bench, bench.original, batch, moved)

    return bench.made(f"noised-{noise:g}", "original", "original", texts, make, noise)


def _seeded(batch: Batch) -> list[Any]:
    """Generators of the noise on the states, apart from those of the images."""
    import torch

    return [torch.Generator().manual_seed(1_000_000 + number) for number in batch.numbers]


def drift(bench: Bench) -> list[Kept]:
    """How far hidden states of captions without the concept, and of the empty prompt, have moved, layer by layer."""
    import torch

    texts = _strangers(bench, 4 * bench.share.images)
    ids = bench.towers.tokens([*texts, ""])
    rows = []
    with torch.no_grad():
        outputs = [bench.pipeline(side).text_encoder(ids, output_hidden_states=True) for side in ("original", "erased")]
    layers = list(range(1, len(outputs[0].hidden_states)))
    for layer in layers:
        was, now = (output.hidden_states[layer] if layer < layers[-1] else output.last_hidden_state for output in outputs)
        moved = ((now - was).flatten(1).norm(dim=1) / was.flatten(1).norm(dim=1)).tolist()
        rows.append(
            Kept(
                f"drift at layer {layer}", value=100 * quantile(moved[:-1], 0.5), unit="%",
                note=f"ninetieth percentile {100 * quantile(moved[:-1], 0.9):.3g} %, the empty prompt {100 * moved[-1]:.3g} %",
            )
        )  # fmt: skip
    return rows


COMPANIONS = Probe("companions", "collateral", "what its prompts name beside it", companions, CARE)
CLASSES = Probe("classes", "collateral", "look-alikes and all other things", classes)
ATTRIBUTES_AND_COUNTS = Probe("attributes", "collateral", "other things with attributes, and counts", attributes)
SENSES = Probe("senses", "collateral", "other senses of its words", senses)
UNTOUCHED = Probe("untouched", "collateral", "prompts that do not name it", untouched, settings={"noise": list(NOISES)})
DRIFT = Probe("drift", "collateral", "the encoder's hidden states", drift)
