"""Which judge looks at a run's images, whether it knows what it is asked, and how far a CLIP among them can be trusted.

Judges are chosen by the concepts' kinds where the settings name none, and refused before any image is drawn or looked at. What a CLIP
takes its threshold from lies in ``FOLDER/calibration/``: images of the original, and ``calibration.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_erase import components, digests, forms, jsonfile, parallel, resources
from sd_erase.bases import Base
from sd_erase.captions import held_out
from sd_erase.clip import load_state
from sd_erase.concepts import Concept, all_cards, concept_named, label_form
from sd_erase.config import RunConfig
from sd_erase.detection import Detector, load_detector, split_name
from sd_erase.detection.clip import ClipJudge, Question
from sd_erase.detection.panel import Panel, judges_of, known_labels
from sd_erase.drawing import Settings, base_stamp, is_flat, opened, precision
from sd_erase.erasure.sd import anchored
from sd_erase.errors import UserError
from sd_erase.formats import prefixed
from sd_erase.images import draw
from sd_erase.metrics.calibration import calibrated, sentence
from sd_erase.progress import Progress
from sd_erase.prompts import Prompt
from sd_erase.rundir import RunDir, fingerprint, write_json_atomic

BY_KIND = {"style": "clip", "person": "clip", "nudity": "nudenet"}  # judges by name; of an object the base's detector
SEED = 500_000  # of the images of a calibration: other noise than that of the images that count
LEAST = (
    0.5  # a CLIP whose text tower is this share of the erasure's own size, or less, away from the erased encoder, is that encoder
)


def names_of(config: RunConfig, base: Base, concepts: Sequence[Concept]) -> list[str]:
    """The judges that the settings name, else those of the concepts' kinds."""
    wanted = config.evaluate
    if wanted.judge:
        return list(dict.fromkeys(wanted.judge))
    if wanted.detector != "auto":
        return [wanted.detector]
    return list(dict.fromkeys(BY_KIND.get(concept.kind, base.detector) for concept in concepts)) or [base.detector]


def default_anchors(concepts: Sequence[Concept], base: Base) -> dict[str, str]:
    """What stands in the place of concepts of which nothing was trained: their cards' anchors, or the base's plainest word."""
    return {concept.name: base.anchors[0] if concept.anchor is None else concept.anchor for concept in concepts}


def judge_of(config: RunConfig, base: Base, concepts: Sequence[Concept], anchors: Mapping[str, str] | None = None) -> Detector:
    """The judge of these concepts; where there are several, a `Panel`. A CLIP among them is not calibrated yet.

    Args:
        config: section ``evaluate``.
        base: whose detector and CLIP partner are the defaults.
        anchors: what stands in each concept's place; None: see `default_anchors`.

    Raises:
        UserError: a judge that is not at hand, or a concept that none of them knows.
    """
    names, wanted = names_of(config, base, concepts), config.evaluate
    judges: list[Detector] = []
    for name in names:
        overrides: dict[str, Any] = {} if wanted.confidence < 0 else {"confidence": wanted.confidence}
        if wanted.image_size:
            overrides["image_size"] = wanted.image_size
        if split_name(name)[0] == "clip" and split_name(name)[1] in ("", "base"):
            overrides["weights"] = str(Path(config.train.clip).expanduser()) if config.train.clip else base.clip_partner
            name = "clip"
        judge = load_detector(name, device=resources.device(config.device), trust_pickle=wanted.trust_pickle, **overrides)
        if isinstance(judge, ClipJudge):
            by_kind = not wanted.judge and wanted.detector == "auto" and len(names) > 1  # each concept by its kind's
            asked = [concept for concept in concepts if not by_kind or BY_KIND.get(concept.kind) == "clip"]
            judge.ask(asked, {**default_anchors(concepts, base), **(anchors or {})})
            judge.card["calibrated_on"] = wanted.calibration  # decides the threshold, and so every figure
        judges.append(judge)
    found: Detector = judges[0] if len(judges) == 1 else Panel(judges, concepts)
    for concept in concepts:
        if not known_labels(concept, found):
            shown = " and ".join(judge.card["name"] for judge in judges)
            raise UserError(
                f"Concept {concept.name!r} has no label that detector {shown} can find (labels: {', '.join(concept.labels) or 'none'}), so "
                "nothing could be measured: pass --judge with one that knows it, such as --judge clip (the base's own CLIP, zero-shot)."
            )
    return found


def judge_of_run(config: RunConfig, base: Base, run: RunDir, concepts: Sequence[Concept]) -> Detector:
    """`judge_of` for what a run erased, with the anchors of its training.

    Raises:
        UserError: as `judge_of`, or a CLIP among the judges is the run's erased one.
    """
    try:
        anchors = run.anchors([concept.name for concept in concepts])
    except UserError:  # images of the original alone need no training
        anchors = None
    judge = judge_of(config, base, concepts, anchors)
    refuse_erased_of(judge, base, run)
    return judge


def labelled(concepts: Sequence[Concept], judge: Detector) -> list[Concept]:
    """The concepts with the labels that a judge has for them in place of their cards'."""
    return [dataclasses.replace(concept, labels=tuple(sorted(known_labels(concept, judge)))) for concept in concepts]


def things(concepts: Sequence[Concept], judge: Detector) -> list[Concept]:
    """What else prompts may name: every card, and the styles and people beside the concepts, with the labels that a judge has for them."""
    beside = [
        concept_named(name, concept.kind)
        for concept in concepts
        if concept.kind in ("style", "person")
        for name in concept.neighbours
    ]
    cards = {**{one.name: one for one in beside}, **all_cards()}
    found = []
    for card in cards.values():
        own = frozenset({label_form(card.name)}) & judge.labels
        found.append(dataclasses.replace(card, labels=tuple(own)) if card.kind != "object" and own else card)
    return found


# --- the erased encoder never judges itself -----------------------------------------------------------------------------------


def refuse_erased(judge: Detector, original: Mapping[str, Any], erased: Mapping[str, Any]) -> None:
    """Refuse a CLIP whose text tower is the erased encoder.

    Weights decide, not names: it is the erased one where it is nearer to it than half of what the erasure changed (a copy stored in half
    precision is hundreds of times nearer, a CLIP of another training many times farther).

    Args:
        original, erased: state dicts of a base's text encoder.

    Raises:
        UserError: it is.
    """
    pair = [prefixed(dict(state)) for state in (original, erased)]
    edit = _distance(*pair)
    for one in judges_of(judge):
        if isinstance(one, ClipJudge) and edit > 0 and _distance(prefixed(one.text_state()), pair[1]) < LEAST * edit:
            raise UserError(
                f"Judge {one.card['name']} ({one.card['weights']}) is the erased encoder itself, which knows the concept no longer and would "
                "call every image clean: pass a CLIP that was not erased, or leave --judge out."
            )


def refuse_erased_of(judge: Detector, base: Base, run: RunDir) -> None:
    """`refuse_erased` of what lies in a run.

    Raises:
        UserError: a CLIP among the judges is the run's erased one.
    """
    for encoder in base.encoders if any(isinstance(one, ClipJudge) for one in judges_of(judge)) else ():
        file = run.encoder / encoder.name / "model.safetensors"
        if file.is_file():
            refuse_erased(judge, components.text_encoder_state(base, encoder), load_state(file))


def _distance(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """L2 distance of two state dicts over the tensors that both have in one shape; infinite where they are of other models."""
    common = [name for name in first if name in second and first[name].is_floating_point()]
    if not common or any(first[name].shape != second[name].shape for name in common):
        return float("inf")
    return float(sum(float((second[name].float() - first[name].float()).square().sum()) for name in common)) ** 0.5


def calibrations(judge: Detector) -> list[str]:
    """What the calibrations of the CLIPs among the judges say of them, a sentence each."""
    return [
        sentence(name, one.card["anchors"].get(name, ""), one.card["name"], found)
        for one in judges_of(judge)
        for name, found in one.card.get("calibration", {}).items()
    ]


# --- calibration --------------------------------------------------------------------------------------------------------------


def calibrate(
    judge: Detector, config: RunConfig, base: Base, folder: Path, progress: Progress, pipeline: Callable[[], Any] | None = None
) -> None:
    """Give each CLIP among the judges the threshold of each concept, from images that the original draws of it and of its anchor.

    What was drawn and found before is taken again, where it is of the same model, words and settings.

    Args:
        config: how images are drawn; ``evaluate.calibration`` is how many of each.
        folder: where ``calibration/`` lies.
        pipeline: the original's, loaded when it is needed.

    Raises:
        UserError: a base that cannot draw, or whose images are all of a single colour.
    """
    drawn: list[Any] = []

    def original() -> Any:
        from sd_erase.pipeline import load_original

        if not drawn:
            device = resources.device(config.device)
            drawn.append(load_original(base, device, precision(base, device)) if pipeline is None else pipeline())
        return drawn[0]

    for one in judges_of(judge):
        if isinstance(one, ClipJudge):
            for question in one.asked:
                if question.label not in one.card["calibration"]:
                    found = _calibration(one, question, config, base, folder / "calibration", progress, original)
                    one.set_calibration(question.label, found)


def _calibration(
    judge: ClipJudge,
    question: Question,
    config: RunConfig,
    base: Base,
    folder: Path,
    progress: Progress,
    original: Callable[[], Any],
) -> dict[str, Any]:
    """The calibration of one question, from ``calibration.json`` or anew."""
    concept, count = question.concept, config.evaluate.calibration
    texts = held_out.naming([concept], base, count) or [one.format(concept.name) for one in concept.templates]
    texts = [texts[place % len(texts)] for place in range(count)]
    plain = [anchored(text, [concept], {concept.name: question.anchor}) for text in texts]
    settings = dataclasses.replace(Settings.of(dataclasses.replace(config, seed=0), base), images_per_prompt=1)
    stamp = base_stamp(base, progress)
    code = digests.of_sources("detection", "judging", "metrics", "clip")
    inputs = fingerprint(
        judge.stamp,
        judge.card["templates"],
        stamp,
        dataclasses.asdict(settings),
        texts,
        plain,
        config.device,
        concept.to_dict(),
        code,
    )
    file = folder / "calibration.json"
    known = parallel.agreed(lambda: _known(file))
    if inputs in known:
        return dict(known[inputs])
    sides = {}
    for name, prompts in (("concept", texts), ("anchor", plain)):
        wanted = [Prompt(text, SEED + place) for place, text in enumerate(prompts)]
        own = folder / fingerprint(texts, plain)[:8] / name  # what lies there is known again by its own stamp
        paths = draw(original(), wanted, own, settings, stamp=stamp, progress=progress)
        sides[name] = [opened(path, "sd-erase evaluate") for path in paths]
    told = [pair for pair in zip(sides["concept"], sides["anchor"], strict=True) if not any(map(is_flat, pair))]
    if not told:
        raise UserError(
            f"Every image that the original drew to calibrate {judge.card['name']} is of a single colour, so it cannot be: pass --device cpu."
        )
    scores = [judge.scores(question.label, side) for side in zip(*told, strict=True)]
    found = calibrated(*scores)
    if parallel.is_main():
        write_json_atomic(file, {**known, inputs: found})
    return found


def _known(file: Path) -> dict[str, Any]:
    """The calibrations that lie in a file; none where it is missing or damaged."""
    try:
        found = jsonfile.read(file)
    except (OSError, ValueError):
        return {}
    return {key: one for key, one in found.items() if forms.fits(one, forms.CALIBRATION)} if isinstance(found, dict) else {}
