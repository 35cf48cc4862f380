"""The audit as a whole: what is asked, checked before any work; every probe in turn, each kept as soon as it is done; and the card."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_erase import digests, jsonfile, resources
from sd_erase.auditing.bench import SHARES, Bench
from sd_erase.auditing.card import render, verdict
from sd_erase.auditing.probe import NotTried, Probe
from sd_erase.auditing.subject import KINDS, Subject, load_pair, read_subject
from sd_erase.auditing.wording import DESCRIBED
from sd_erase.captions import held_out
from sd_erase.catalog import PROBES, resolve
from sd_erase.config import RunConfig
from sd_erase.detection import Detector
from sd_erase.detection.panel import known_labels
from sd_erase.drawing import Settings
from sd_erase.errors import UserError, unknown_choice
from sd_erase.evaluation import decides
from sd_erase.folders import working_in
from sd_erase.judging import calibrate, calibrations, judge_of, labelled, refuse_erased
from sd_erase.metrics.verdicts import GONE_RATE, WEAK_TEST
from sd_erase.pipeline import ENCODERS
from sd_erase.progress import NoProgress, Progress
from sd_erase.prompts import read_prompt_files
from sd_erase.rundir import fingerprint, write_json_atomic, write_text_atomic

PROMPTS = 100  # that are made where no list is given
KIND = "audit"
CODE = ("auditing", "attacks", "erasure")  # what decides beside the inputs


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command was asked.

    Attributes:
        config: ``concepts``, ``concept_file``, ``kind``, ``anchor``, ``base``, ``seed``, ``device``, sections ``generate`` (prompts, how to
            draw) and ``evaluate`` (the detector).
        base_given: whether the base was named.
        share: a key of `SHARES`.
        probes: those to carry out; empty: all.
    """

    config: RunConfig
    base_given: bool = False
    share: str = "default"
    probes: tuple[str, ...] = ()


def audit(source: Path, folder: Path, asked: Asked, progress: Progress | None = None) -> dict[str, Any]:
    """Audit `source` into `folder`; what is there already of the same inputs is not done again.

    Returns:
        What ``audit.json`` holds; ``again`` says whether nothing had to be done.

    Raises:
        UserError: bad input, in one sentence, before any work.
    """
    progress = progress or NoProgress()
    unknown = next((name for name in asked.probes if name not in PROBES), None)
    if unknown is not None:
        raise unknown_choice("Probe", unknown, PROBES)
    subject = read_subject(source, asked.config, asked.base_given)
    detector, labels = _detector(subject, asked.config)
    subject = dataclasses.replace(subject, concept=labelled([subject.concept], detector)[0])
    settings = Settings.of(asked.config, subject.base)
    prompts = _prompts(subject, asked.config)
    names = [name for name in PROBES if name in (asked.probes or PROBES)]
    inputs = fingerprint(
        subject.stamp, digests.of_base(subject.base) or subject.base.source, [each.to_dict() for each in subject.erased], subject.anchors,
        dataclasses.asdict(settings), prompts, decides(detector), asked.share, asked.config.device, digests.of_sources(*CODE), DESCRIBED,
    )  # fmt: skip
    with working_in(folder, KIND, earlier=["audit.json"]):
        done = _stored(folder / "audit.json", inputs, names)
        if done is not None:
            return {**done, "again": True}
        bench = _bench(subject, detector, labels, settings, prompts, folder, asked, progress)
        return {**_carry_out(bench, names, inputs, asked.share), "again": False}


def _detector(subject: Subject, config: RunConfig) -> tuple[Detector, frozenset[str]]:
    """The judge and its labels for the concept.

    Raises:
        UserError: it is not there, or does not know the concept.
    """
    judge = judge_of(config, subject.base, [subject.concept], subject.anchors)
    return judge, known_labels(subject.concept, judge)


def _prompts(subject: Subject, config: RunConfig) -> list[str]:
    """The prompts that name the concept and nothing else that was erased with it."""
    concept = subject.concept
    if config.generate.prompts:
        texts = [prompt.text for prompt in read_prompt_files(config.generate.prompts)[0]]
    else:
        bundled = resources.names("prompts")
        own = [prompt.text for prompt in read_prompt_files([concept.name])[0]] if concept.name in bundled else []
        texts = [*(own if held_out.listed(own, [concept]) else ()), *held_out.naming([concept], subject.base, PROMPTS)]
    kept = [text for text in dict.fromkeys(texts) if concept.find(text) and not subject.alike(text)]
    if not kept:
        raise UserError(
            f"None of {len(texts)} prompts names {concept.name} and nothing that was erased with it or has its detector's label: pass --prompts "
            "with a list that does."
        )
    return kept


def _bench(
    subject: Subject,
    detector: Detector,
    labels: frozenset[str],
    settings: Settings,
    prompts: list[str],
    folder: Path,
    asked: Asked,
    progress: Progress,
) -> Bench:
    """The bench, with the first proof drawn: that the original draws the concept at all.

    Raises:
        UserError: it does not.
    """
    device = resources.device(asked.config.device)
    original, erased = load_pair(subject, device)
    for name in [name for name in ENCODERS if getattr(original, name, None) is not None]:
        refuse_erased(detector, *(getattr(each, name).state_dict() for each in (original, erased)))
    calibrate(detector, asked.config, subject.base, folder, progress, lambda: original)
    bench = Bench(subject, original, erased, detector, labels, settings, SHARES[asked.share], folder, prompts, progress)
    shown = bench.shared("original", bench.share.images)
    if not shown:
        raise UserError("Every image that the original draws is a single colour, so nothing can be measured: pass --device cpu.")
    if sum(shown) <= 2 * GONE_RATE * len(shown):
        raise UserError(
            f"The original shows {subject.concept.name} in {sum(shown)} of {len(shown)} images of prompts that name it, so its absence would say nothing: "
            "pass --prompts that it draws it from, or a --detector that sees it."
        )
    return bench


def _carry_out(bench: Bench, names: Sequence[str], inputs: str, share: str) -> dict[str, Any]:
    started = time.perf_counter()
    probes, not_tried = [], []
    for name in PROBES:
        probe: Probe = resolve(PROBES, name, "Probe")
        about = {"name": name, "asks": probe.asks, "group": probe.group}
        if name not in names:
            not_tried.append({**about, "why": "it was not asked for (--probe)"})
            continue
        bench.place = f"{names.index(name) + 1}/{len(names)} "
        found = _probed(bench, probe, inputs)
        if isinstance(found, str):
            not_tried.append({**about, "why": found})
        else:
            probes.append({**about, "citation": probe.citation, "settings": dict(probe.settings), **found})
    result: dict[str, Any] = {
        "inputs": inputs,
        "subject": f"{KINDS[bench.subject.kind]}: {bench.subject.source.name}",
        "digest": bench.subject.stamp,
        "base": bench.subject.base.name,
        "concept": bench.subject.concept.name,
        "erased_with_it": [each.name for each in bench.subject.erased if each.name != bench.subject.concept.name],
        "anchor": bench.subject.anchor,
        "share": share,
        "asked": list(names),
        "detector": bench.detector.card,
        "drawing": f"{bench.settings.steps} steps, guidance {bench.settings.guidance:g}, seed {bench.settings.seed}",
        "images": sum(1 for _ in (bench.folder / "images").rglob("*.png")),
        "seconds": round(sum(probe["seconds"] for probe in probes), 1),
        "probes": probes,
        "not_tried": not_tried,
    }
    result["warnings"] = _warnings(bench, result)
    result["verdict"] = verdict(result)
    result["wall_seconds"] = round(time.perf_counter() - started, 1)
    result["prompt_file"] = _write_found(bench.folder, probes)
    write_text_atomic(bench.folder / "audit.md", render(result))
    write_json_atomic(bench.folder / "audit.json", result)
    return result


def _probed(bench: Bench, probe: Probe, inputs: str) -> dict[str, Any] | str:
    """The rows of a probe, those on disk where they are of the same inputs; or why it was not tried."""
    file = bench.folder / "probes" / f"{probe.name}.json"
    if file.is_file():
        stored = jsonfile.read(file)
        if isinstance(stored, dict) and stored.get("inputs") == inputs:
            return {key: stored[key] for key in ("rows", "seconds")}
    started = time.perf_counter()
    try:
        rows = [row.to_dict() for row in probe(bench)]
    except NotTried as reason:
        return str(reason)
    found = {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}
    write_json_atomic(file, {"inputs": inputs, **found})
    return found


def _stored(file: Path, inputs: str, names: Sequence[str]) -> dict[str, Any] | None:
    """A finished audit of the same inputs and probes."""
    if not file.is_file():
        return None
    stored = jsonfile.read(file)
    same = isinstance(stored, dict) and stored.get("inputs") == inputs and stored.get("asked") == list(names)
    return stored if same else None


def _warnings(bench: Bench, result: dict[str, Any]) -> list[str]:
    found = [*bench.subject.base.notes, *calibrations(bench.detector)]
    shown = bench.shared("original", bench.share.images)
    if sum(shown) < WEAK_TEST * len(shown):
        found.append(
            f"The original shows {result['concept']} in only {sum(shown)} of {len(shown)} images that ask for it, so its absence says little."
        )
    if flat := bench.flat():
        found.append(
            f"{flat} images are a single colour, in which nothing can be found; they are left out of the figures (try --device cpu)."
        )
    return found


def _write_found(folder: Path, probes: Sequence[dict[str, Any]]) -> str:
    """The words that were found, as a prompt file that `generate --prompts` draws; its name, or "" where none were."""
    lines = []
    for probe in probes:
        words = [text for row in probe["rows"] for text in row.get("words", ())]
        if words:
            lines += [f"# {probe['name']}: {probe['citation'] or probe['asks']}", *dict.fromkeys(words)]
    if not lines:
        return ""
    write_text_atomic(folder / "found-words.txt", "\n".join([*lines, ""]))
    return "found-words.txt"


def default_folder(source: Path) -> Path:
    """Where an audit of `source` goes by default."""
    return Path("outputs") / f"audit-{source.resolve().name.removesuffix('.safetensors')}"
