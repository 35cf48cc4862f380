"""The stage "attack": how often words found by a search bring the concept back, beside no words and random ones.

Reads the run's erased encoder and ``concepts.json``. Writes ``attacks/prefix.jsonl`` (one line a prompt),
``attacks/{none,random,search}/*.png``, the same of the control in ``attacks/control/``, what the search is shown in
``attacks/original/``, what the original draws behind words that were found in ``attacks/unnamed/``, ``report/attack.json`` and ``report/attack.md``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, chain, digests, forms, jsonfile, markdown, parallel, resources
from sd_erase.asked import prompt_files
from sd_erase.attacks.prefix import encode_images, random_prefixes, search
from sd_erase.concepts import read_concepts
from sd_erase.config import AttackConfig, RunConfig
from sd_erase.detection import Detector
from sd_erase.drawing import Settings
from sd_erase.erasure.sd import anchored
from sd_erase.errors import UserError
from sd_erase.evaluation import decides, detect_files
from sd_erase.images import draw
from sd_erase.judging import calibrate, calibrations, judge_of_run, labelled
from sd_erase.metrics.rates import share
from sd_erase.metrics.tables import percent
from sd_erase.metrics.verdicts import ENCODERS, doubts_of_attack
from sd_erase.progress import NoProgress, Progress
from sd_erase.prompts import Prompt, read_prompt_files
from sd_erase.rundir import RunDir, fingerprint, read_jsonl, write_json_atomic, write_jsonl_atomic, write_text_atomic

if TYPE_CHECKING:
    import torch

GROUP = 16  # prompts that are searched side by side; an interrupted search goes on behind the last whole group
REFERENCE_SEEDS = 10_000  # the search is shown images from other noise than that of the images that count
REFERENCES = 3  # drawn by the original for each prompt; the first that shows the concept is taken
OVERFLOWED = ", so nothing can be measured: the model overflowed; run the command again with --device cpu"
ARMS = {"none": "the prompt alone", "random": "random words before it", "search": "found words before it"}


def shows(detector: Detector, labels: frozenset[str], paths: Sequence[Path]) -> tuple[list[bool], list[bool]]:
    """Whether the detector finds any of `labels` in each image file, and whether each is of a single colour: there none is found.

    A CLIP would have an opinion of a black image too.
    """
    found, pictures = detect_files(detector, paths, "detections", NoProgress())
    flat = [picture.flat for picture in pictures]
    return [not no and any(each.label in labels for each in one) for one, no in zip(found, flat, strict=True)], flat


def references(
    pipeline: Any,
    prompts: Sequence[str],
    folder: Path,
    settings: Settings,
    detector: Detector,
    labels: frozenset[str],
    *,
    stamp: str = "",
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Latents of the original's images of `prompts`, which the search shall bring back.

    Args:
        pipeline: the original.
        prompts: what is drawn.
        folder: where the images go.
        settings: how they are drawn.
        detector: finds the concept.
        labels: the concept's.
        stamp: a fingerprint of the original's weights; without one, images are always drawn.
        progress: told of each image.

    Returns:
        prompt -> [1, channels, height, width], without the prompts of which no image shows the concept.

    Raises:
        UserError: no image of any prompt shows it.
    """
    from PIL import Image

    settings = dataclasses.replace(settings, seed=settings.seed + REFERENCE_SEEDS, images_per_prompt=REFERENCES)
    paths = draw(pipeline, [Prompt(prompt) for prompt in prompts], folder, settings, stamp=stamp, progress=progress)
    latents: dict[str, torch.Tensor] = {}
    found, flat = shows(detector, labels, paths)
    for number, (path, is_shown, is_flat) in enumerate(zip(paths, found, flat, strict=True)):
        prompt = prompts[number // REFERENCES]
        if is_shown and not is_flat and prompt not in latents:
            with Image.open(path) as image:
                latents[prompt] = encode_images(pipeline, [image.convert("RGB")])
    if prompts and all(flat):
        raise UserError(f"Every image that the original draws is a single colour{OVERFLOWED}.")
    if not latents:
        names = " or ".join(sorted(labels))
        raise UserError(
            f"No image that the original draws of these prompts shows {names}: pass --prompts that name what it draws."
        )
    return latents


def measure(
    pipeline: Any,
    prompts: Sequence[str],
    latents: torch.Tensor,
    folder: Path,
    attack: AttackConfig,
    settings: Settings,
    detector: Detector,
    labels: frozenset[str],
    *,
    stamp: str,
    shown: str = "",
    arms: Sequence[str] = tuple(ARMS),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Search a prefix for each prompt, draw without, with random and with found words, and look for the concept.

    What `folder` holds already of the same inputs is not done again.

    Args:
        pipeline: with the encoder under attack, in float32.
        prompts: what is attacked.
        latents: [prompts, images, channels, height, width]; see `search`.
        folder: where ``prefix.jsonl`` and the images go.
        attack: the search's settings; its ``images_per_prompt`` counts here.
        settings: how images are drawn; its seed is the search's too.
        detector: finds the concept.
        labels: the concept's.
        stamp: a fingerprint of the weights.
        shown: a fingerprint of what `latents` are of.
        arms: which of `ARMS` to draw.
        progress: told of each step and image.

    Returns:
        One row a prompt: ``prompt``, ``prefix``, ``random_prefix``, ``loss``, ``loss_before``, ``seconds`` of its search,
        ``found``: arm -> one bool an image, and ``flat``: arm -> whether each image is of a single colour.
    """
    settings = dataclasses.replace(settings, images_per_prompt=attack.images_per_prompt)
    searched = (attack.tokens, attack.steps, attack.candidates)
    inputs = fingerprint(stamp, shown, settings.seed, searched, digests.of_sources("attacks/prefix"))
    file = folder / "prefix.jsonl"
    kept = parallel.agreed(lambda: list(read_jsonl(file)) if file.is_file() else [])
    stored = [row for row in kept if row["inputs"] == inputs and _is_sealed(row)]
    rows = {number: row for number, (row, prompt) in enumerate(zip(stored, prompts, strict=False)) if row["prompt"] == prompt}
    left = [number for number in range(len(prompts)) if number not in rows]
    groups = [left[start : start + GROUP] for start in range(0, len(left), GROUP)]
    for start in range(0, len(groups), parallel.size()):
        searched_now: list[tuple[int, dict[str, Any]]] = []
        for group in parallel.share(groups[start : start + parallel.size()]):
            began = time.perf_counter()
            found = search(pipeline, [prompts[number] for number in group], latents[group], attack, settings.seed, progress)
            seconds = round((time.perf_counter() - began) / len(group), 2)
            for number, one in zip(group, found, strict=True):
                row = {**dataclasses.asdict(one), "seconds": seconds, "inputs": inputs}
                searched_now.append((number, {**row, "seal": _seal(row)}))
        for share_of_one in parallel.gathered(searched_now):
            rows |= dict(share_of_one)
        if parallel.is_main():
            write_jsonl_atomic(file, rows.values())
    chosen = [rows[number] for number in range(len(prompts))]
    words = random_prefixes(pipeline, prompts, attack.tokens, settings.seed)
    prefixes = {"none": [""] * len(prompts), "random": words, "search": [row["prefix"] for row in chosen]}
    for row, random_prefix in zip(chosen, words, strict=True):
        row |= {"random_prefix": random_prefix, "found": {}, "flat": {}}
    for arm in arms:
        texts = [Prompt(f"{prefix} {prompt}".strip()) for prefix, prompt in zip(prefixes[arm], prompts, strict=True)]
        paths = draw(pipeline, texts, folder / arm, settings, stamp=stamp, progress=progress)
        seen, flat = shows(detector, labels, paths)
        for number, row in enumerate(chosen):
            own = slice(number * attack.images_per_prompt, (number + 1) * attack.images_per_prompt)
            row["found"][arm], row["flat"][arm] = seen[own], flat[own]
    if parallel.is_main():
        write_jsonl_atomic(file, chosen)
    return chosen


def unnamed(
    original: Any,
    rows: Sequence[dict[str, Any]],
    anchored_prompts: Sequence[str],
    folder: Path,
    settings: Settings,
    detector: Detector,
    labels: frozenset[str],
    *,
    stamp: str,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Of the images that found words brought: how many the original draws too, behind the same words, where nothing names the concept.

    There the words draw it and not its name: no erasure of a name is to blame, and what is wanted gone is more than the name.

    Args:
        original: the base's pipeline.
        rows: what `measure` found on the erased one.
        anchored_prompts: their prompts with the anchor in the concept's place.
        folder: where the images go.
        settings: how images are drawn.
        detector: finds the concept.
        labels: the concept's.
        stamp: a fingerprint of the original's weights.
        progress: told of each image.

    Returns:
        ``images``: with the concept behind found words; ``original``: those of them that the original draws with it, from the same seed.
    """
    hits = [(row, text) for row, text in zip(rows, anchored_prompts, strict=True) if any(_told(row, "search"))]
    paths: list[Path] = []
    if hits:
        texts = [Prompt(f"{row['prefix']} {text}") for row, text in hits]
        settings = dataclasses.replace(settings, images_per_prompt=len(hits[0][0]["found"]["search"]))
        paths = draw(original, texts, folder, settings, stamp=stamp, progress=progress)
    if parallel.is_main():  # an earlier search may have found more
        for path in set(folder.glob("*.png")) - set(paths):
            path.unlink()
    if not hits:
        return {"images": 0, "original": 0}
    seen, _ = shows(detector, labels, paths)
    brought = [shown for row, _ in hits for shown in row["found"]["search"]]
    return {"images": sum(brought), "original": sum(both for one, both in zip(brought, seen, strict=True) if one)}


UNSEALED = ("random_prefix", "found", "flat", "seal")  # what is done anew each time, from the images


def _seal(row: dict[str, Any]) -> str:
    """A digest of what a search found, by which a row that somebody edited is told from it."""
    return fingerprint({key: value for key, value in row.items() if key not in UNSEALED})


def _is_sealed(row: dict[str, Any]) -> bool:
    return row.get("seal") == _seal(row)


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Arm -> the share of ``images`` with the concept and of ``prompts`` with at least one such image (each a `share`).

    Images of a single colour, in which nothing can be found, do not count, nor do the prompts that have no other.
    """
    told = {arm: [_told(row, arm) for row in rows] for arm in rows[0]["found"]}
    return {
        arm: {
            "images": share([shown for found in each for shown in found]),
            "prompts": share([any(found) for found in each if found]),
        }
        for arm, each in told.items()
    }


def _told(row: dict[str, Any], arm: str) -> list[bool]:
    """Whether the concept is found in each image of a prompt that is not of a single colour."""
    return [shown for shown, flat in zip(row["found"][arm], row["flat"][arm], strict=True) if not flat]


def attack(config: RunConfig, run: RunDir, progress: Progress | None = None) -> dict[str, Any]:
    """Attack the run's erased encoder, and as a control the original one with the concept replaced in the prompts.

    The control shows whether the search can succeed at all: the original encoder knows the concept, so words that bring it
    back exist for every prompt.

    Args:
        config: the run's configuration; sections ``attack``, ``generate`` (how to draw) and ``evaluate`` (the detector).
        run: where the erased encoder lies and the results go.
        progress: told of each step and image.

    Returns:
        The manifest "attack": ``erased`` and ``control`` (see `shares`), ``prompts``, ``seconds`` of a prompt's search, the
        ``detector`` and ``warnings``.

    Raises:
        UserError: a bad setting, no trained encoder, or no prompt whose original image shows the concept.
    """
    import torch

    from sd_erase.pipeline import erased_pipeline, load_original

    progress = progress or NoProgress()
    run.require("train", "train")
    links = chain.Chain(run, config, progress)
    links.require("train")
    concepts = read_concepts(run)
    anchors = run.anchors([concept.name for concept in concepts])
    base, device = bases.resolve(config.base), resources.device(config.device)
    if len(base.encoders) > 1:
        raise UserError(
            f"Base {base.name} reads two text encoders, and the search changes words for one: pass an SD 1.x or 2.x base."
        )
    settings = Settings.of(config, base)
    files, made = (config.attack.prompts, []) if config.attack.prompts else parallel.agreed(lambda: prompt_files(config, run))
    given, read_files, notes = read_prompt_files(files)
    notes = made + notes
    listed = list(dict.fromkeys(prompt.text for prompt in given))
    if len(listed) < len(given):
        notes.append(f"{len(given) - len(listed)} of {len(given)} prompts occur more than once: each is attacked once.")
    named = [prompt for prompt in listed if any(concept.find(prompt) for concept in concepts)]
    if not named:
        raise UserError(f"None of the prompts names {', '.join(concept.name for concept in concepts)}: pass --prompts that do.")
    detector = judge_of_run(config, base, run, concepts)
    concepts = labelled(concepts, detector)
    labels = frozenset(label for concept in concepts for label in concept.labels)
    names = ", ".join(concept.name for concept in concepts)
    decided = decides(detector)

    def stamps(read: dict[str, Any]) -> tuple[str, str, str]:
        """Of the original, of the erased model, and of all that the figures depend on."""
        cards = [concept.to_dict() for concept in concepts]
        known = fingerprint(read["base"] or base.source, device.type, dataclasses.asdict(settings), cards)
        erased = fingerprint(known, read["encoder"])
        code = digests.of_sources("attacks")
        return known, erased, fingerprint(erased, anchors, named, dataclasses.asdict(config.attack), decided, code)

    if run.is_complete("attack", stamps(links.reads("attack"))[-1]) and links.holds("attack"):
        return {**(run.read_manifest("attack") or {}), **jsonfile.read_as(run.report / "attack.json", forms.ATTACK)}
    original = load_original(base, device, torch.float32)
    erased = erased_pipeline(original, run)
    read = chain.Chain(run, config, progress).reads("attack")  # only now does a hub's model surely lie here
    known, erased_stamp, inputs = stamps(read)
    read["attack prompts"] = chain.prompts(files)
    calibrate(detector, config, base, run.cache, progress, lambda: original)
    if parallel.is_main():
        run.reopen("attack")
    shown = references(original, named, run.attacks / "original", settings, detector, labels, stamp=known, progress=progress)
    latents = torch.stack(list(shown.values()))
    used = {name: getattr(config.attack, name) for name in ("tokens", "steps", "candidates", "images_per_prompt")}
    counts = {"prompts": len(shown), "named": len(named), "left_out": len(listed) - len(shown)}
    result: dict[str, Any] = {"concepts": names, "anchors": anchors, **counts, **used, "flat": {}}
    plain = [anchored(prompt, concepts, anchors) for prompt in shown]
    for name, pipeline, prompts, folder, stamp in (
        ("erased", erased, list(shown), run.attacks, erased_stamp),
        ("control", original, plain, run.attacks / "control", known),
    ):
        rows = measure(
            pipeline, prompts, latents, folder, config.attack, settings, detector, labels,
            stamp=stamp, shown=fingerprint(known, named, decided), progress=progress,
        )  # fmt: skip
        result["flat"][name] = sum(sum(flat) for row in rows for flat in row["flat"].values())
        result[name] = shares(rows)
        for arm, each in result[name].items():
            if not each["images"]["n"]:
                raise UserError(f"Every image of {ENCODERS[name]} with {ARMS[arm]} is a single colour{OVERFLOWED}.")
        result["seconds"] = max(row["seconds"] for row in rows)
        if name == "erased":
            result["unnamed"] = unnamed(
                original, rows, plain, run.attacks / "unnamed", settings, detector, labels, stamp=known, progress=progress
            )
    if not parallel.is_main():
        return {}
    result["detector"] = detector.card
    result["prompt_files"], result["warnings"] = read_files, doubts_of_attack(result) + calibrations(detector) + notes
    write_json_atomic(run.report / "attack.json", result)
    write_text_atomic(run.report / "attack.md", render(result))
    return run.complete("attack", inputs, {**result, "from": read, "made": links.makes("attack")})


def render(result: dict[str, Any]) -> str:
    """The shares as Markdown."""
    titles = {
        "erased": "erased",
        "control": "original, " + ", ".join(f"{a or 'nothing'} for {c}" for c, a in result["anchors"].items()),
    }
    table = [
        [titles[name], ARMS[arm], percent(result[name][arm]["images"]), percent(result[name][arm]["prompts"])]
        for name in titles
        for arm in ARMS
    ]
    lines = [
        f"# Words before the prompt that bring {markdown.text(result['concepts'])} back",
        "",
        *(f"> {markdown.sentence(warning)}\n" for warning in result["warnings"]),
        *markdown.table(["Encoder", "Prompt", "Images with it", "Prompts with one or more"], table),
        "",
        *_unnamed(result),
        f"{result['prompts']} prompts, {result['images_per_prompt']} images each; {result['tokens']} words, {result['steps']} steps of "
        f"{result['candidates']} candidates, {result['seconds']:.1f} s a prompt; detector {markdown.text(result['detector']['name'])}. Intervals: "
        "Wilson, 95 %.",
    ]
    return "\n".join(lines) + "\n"


def _unnamed(result: dict[str, Any]) -> list[str]:
    """What the original draws behind the words that were found, as a paragraph; nothing of an attack that did not ask, or found none."""
    told = result.get("unnamed", {"images": 0})
    if not told["images"]:
        return []
    return [
        f"Of the {told['images']} images that found words brought, the original draws {told['original']} with the concept too behind the same "
        "words, with the anchor in its place: there the words draw it, and no name does.",
        "",
    ]
