"""`evaluate` and `audit` of models in memory, by the stages that measure a run."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_erase import bases, catalog, chain, hosts
from sd_erase.api import models
from sd_erase.api.results import Audit, Erasure, Evaluation, Rate, Row
from sd_erase.api.scratch import Scratch, shown
from sd_erase.concepts import load_concepts, read_concepts, write_concepts
from sd_erase.config import RunConfig, override
from sd_erase.errors import UserError, unknown_choice
from sd_erase.progress import Progress
from sd_erase.prompts import Prompt, read_prompt_files
from sd_erase.rundir import RunDir
from sd_erase.stages import run_stage

SHARES = ("default", "quick", "full")


def evaluate(
    pipe: Any,
    erased: Any,
    prompts: str | Path | Sequence[str],
    *,
    concept: str | Sequence[str] = (),
    images_per_prompt: int = 4,
    steps: int = 0,
    guidance: float = -1.0,
    seed: int = 0,
    detector: str = "auto",
    device: str = "auto",
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Progress = True,
) -> Evaluation:
    """Draw `prompts` with both pipelines from the same noise, and count how often a detector finds what they name.

    Args:
        pipe: the original pipeline, on the device where it is to draw.
        erased: what `erase` returned, or any pipeline with an erased encoder (`load_erased`).
        prompts: texts; or the path of a list, or the name of one that ships ("bicycle").
        concept: what was erased; an `Erasure` knows it.
        images_per_prompt: of each model.
        steps: of denoising; 0 is the model's default, as is -1 for `guidance`.
        seed: of a prompt's first image.
        detector: a judge's name ("pocket", "yolov5su", "clip") or its card's path; "auto" goes by the concepts' kinds. Several are
            ``settings={"evaluate.judge": [...]}``.
        device: of the detector.
        folder: where images and figures are kept, as a run; None keeps the contact sheet alone.
        settings: further settings by dotted name, {"generate.scheduler": "euler"}.
        progress: bars on stderr, or a progress of your own.

    Raises:
        UserError: no concept, no prompt, no such detector or no label that it can find, or a CLIP that is the erased encoder; before any
            image is drawn.

    Example:
        >>> import sd_erase
        >>> found = sd_erase.evaluate(pipe, erased, ["a bicycle next to a dog"], images_per_prompt=2, steps=3, progress=False)
        >>> found.images, [row.name for row in found.rows][:1]
        (2, ['bicycle'])
    """
    from sd_erase.drawing import Settings
    from sd_erase.images import generate_pairs
    from sd_erase.judging import calibrate, judge_of, refuse_erased

    started = time.perf_counter()
    known = read_concepts(erased._scratch.run) if isinstance(erased, Erasure) and not concept else []
    names = _names(concept) or tuple(each.name for each in known)
    if not names:
        raise UserError("No concept is given, and a pipeline does not say what was erased from it: pass concept=.")
    other = erased.model if isinstance(erased, Erasure) else erased
    asked = {"concepts": names, "exact": True, "seed": seed, "device": device, "generate.images_per_prompt": images_per_prompt,
             "generate.steps": steps, "generate.guidance": guidance, "evaluate.detector": detector, **(settings or {})}  # fmt: skip
    _check_devices(pipe, other)
    original = Scratch(pipe, weights=False)
    bases.check_draws(original.card)
    config = override(RunConfig(base=str(original.base)), asked)
    texts = _prompts(prompts)
    concepts = known or load_concepts(config)
    if isinstance(erased, Erasure):  # a CLIP asks whether an image fits the concept or what stands in its place
        concepts = [dataclasses.replace(each, anchor=erased.anchors.get(each.name, each.anchor)) for each in concepts]
    judge = judge_of(config, original.card, concepts)
    refuse_erased(judge, *(hosts.own_state(models.encoders_of(each)["text_encoder"]) for each in (pipe, other)))
    bars = shown(progress)
    with _place(folder) as path:
        run = RunDir(path)
        with run.writing():
            write_concepts(run, concepts)
            shutil.rmtree(run.cache / "calibration", ignore_errors=True)  # of whatever pipeline was measured here before
            calibrate(judge, config, original.card, run.cache, bars, lambda: pipe)  # the stage finds it: no weights lie on disk
            drawn = generate_pairs(pipe, other, texts, run.images, Settings.of(config, original.card), progress=bars)
            links = chain.Chain(run, config)
            run.complete("generate", "in memory", {**drawn, "from": {}, "made": links.makes("generate")})
        result = run_stage("evaluate", config, run, bars)
        rows = [
            Row(row["name"], row["role"], Rate.of(row["original"]), Rate.of(row["erased"]), row["p_value"])
            for row in result["rows"]
        ]
        return Evaluation(
            concepts=tuple(result["concepts"]),
            prompts=result["prompts"],
            images=result["images"],
            rows=tuple(rows),
            warnings=(*drawn["warnings"], *result["warnings"]),
            detector=str(result["detector"]["name"]),
            seconds=round(time.perf_counter() - started, 1),
            contact=(run.images / "contact.png").read_bytes(),
            folder=None if folder is None else path,
        )


def audit(
    erased: Erasure[Any] | str | Path,
    *,
    concept: str = "",
    base: str = "",
    share: str = "default",
    probes: Sequence[str] = (),
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Progress = True,
) -> Audit:
    """Ask whether a concept is really gone, what was not tried, and what else changed, as ``sd-erase audit`` does.

    Args:
        erased: what `erase` returned for a pipeline, or the path of a run, an exported file or an erased diffusers folder.
        concept, base: what the source does not say of itself.
        share: "quick", "default" or "full": how many images, how long searches.
        probes: those of `sd_erase.catalog.PROBES` to carry out; empty is all.
        folder: where images and card are kept, and an interrupted audit goes on; None keeps nothing.
        settings: further settings by dotted name, {"evaluate.detector": "my.yaml"}.
        progress: bars on stderr, or a progress of your own.

    Raises:
        UserError: bad input, in one sentence, before any work.

    Example:
        >>> import sd_erase
        >>> sd_erase.audit("outputs/bicycle-pocket-0001", share="quick").verdict  # doctest: +SKIP
        'Gone without an attacker: bicycle is in 0 of 118 images ...'
    """
    from sd_erase.auditing.card import render
    from sd_erase.auditing.job import Asked
    from sd_erase.auditing.job import audit as carry_out

    if share not in SHARES:
        raise unknown_choice("Share", share, SHARES)
    unknown = next((name for name in probes if name not in catalog.PROBES), None)
    if unknown is not None:
        raise unknown_choice("Probe", unknown, catalog.PROBES)
    asked = {**({"concepts": (concept,)} if concept else {}), **({"base": base} if base else {}), **(settings or {})}
    if isinstance(erased, Erasure):
        erased._scratch.complete()
        source = erased._scratch.run.path
        asked = {"device": erased._scratch.config.device, **asked}
    else:
        source = Path(erased).expanduser()
    config = override(RunConfig(), asked)
    with _place(folder) as path:
        found = carry_out(source, path, Asked(config, bool(base), share, tuple(probes)), shown(progress))
    return Audit(
        answer=found["verdict"]["answer"],
        verdict=found["verdict"]["sentence"],
        concept=found["concept"],
        card=render(found),
        figures=found,
        warnings=tuple(found["warnings"]),
        folder=None if folder is None else path,
    )


def _names(concept: str | Sequence[str]) -> tuple[str, ...]:
    return ((concept,) if concept else ()) if isinstance(concept, str) else tuple(concept)


def _prompts(prompts: str | Path | Sequence[str]) -> list[Prompt]:
    """Texts as they are; the prompts of a list by its path or name."""
    found = read_prompt_files([prompts])[0] if isinstance(prompts, (str, Path)) else [Prompt(text) for text in prompts]
    if not found:
        raise UserError("No prompt is given: pass texts, or the path of a list.")
    return found


def _check_devices(pipe: Any, erased: Any) -> None:
    """Refuse two pipelines that do not draw on one device: their noise would be the same and their images not to be compared."""
    if str(pipe.device) != str(erased.device):
        raise UserError(
            f"The original lies on {pipe.device} and the erased pipeline on {erased.device}: move both to one device."
        )


@contextmanager
def _place(folder: str | Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one for a while."""
    if folder is not None:
        yield Path(folder).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="sd-erase-") as temporary:
        yield Path(temporary) / "run"
