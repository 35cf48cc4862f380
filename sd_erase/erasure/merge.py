"""Runs that were made separately, composed into one: the sum of their changes to the weights, and what that costs each.

Reads the runs' ``encoder/``, ``pairs.jsonl`` and ``concepts.json``. Writes a run of the same kind: its ``pairs.jsonl`` and
``concepts.json`` are the union, its encoder the original plus every run's difference from it (task arithmetic, Ilharco et al. 2023,
arXiv:2212.04089), so that the stages after training work on it as on any other.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_erase import bases, chain, folders, formats, resources
from sd_erase.clip import Towers, load_towers, save_text_encoder
from sd_erase.concepts import read_concepts, write_concepts
from sd_erase.config import RunConfig, load, override
from sd_erase.erasure.method import Batch
from sd_erase.erasure.sd import StableDiffusionErasure
from sd_erase.errors import UserError
from sd_erase.pairs import Pair, read_pairs, write_pairs
from sd_erase.progress import NoProgress, Progress
from sd_erase.rundir import RunDir, fingerprint
from sd_erase.weights import load_named

MEASURED = 64  # validation captions of each set, for each run


def merged_config(runs: Sequence[RunDir]) -> RunConfig:
    """The settings of a merged run: the first run's, with all concepts.

    Raises:
        UserError: fewer than two runs, runs of different bases, a concept that two of them erase, or a run that changes the denoiser or
            whose base or encoder is not what it was.
    """
    if len(runs) < 2:
        raise UserError("Only one run is given: pass two or more to merge.")
    for run in runs:
        run.require("train", "train")
        if run.denoiser.is_file():
            raise UserError(f"Run {run} changes the denoiser, not the text encoder: leave it out, a merge adds up text encoders.")
    configs = [load(run.config) for run in runs]
    for run, config in zip(runs, configs, strict=True):  # what is added is a difference from the base that each was trained from
        chain.Chain(run, config).require("train")
    first = configs[0]
    for run, config in zip(runs, configs, strict=True):
        if bases.resolve(config.base).source != bases.resolve(first.base).source:
            raise UserError(
                f"Run {run} was erased from base {config.base}, run {runs[0]} from {first.base}: merge runs of one base."
            )
    names = [concept.name for run in runs for concept in read_concepts(run)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"Concept {twice[0]!r} is erased by more than one of the runs: pass each concept once.")
    exact = any(config.exact for config in configs)  # names that were asked about once are not asked about again
    return override(first, {"concepts": tuple(names), "concept_file": "", "exact": exact})


def place(runs: Sequence[RunDir], config: RunConfig, path: Path | None, root: Path) -> tuple[RunDir, dict[str, Any]]:
    """The run that `runs` are merged into, and what its mark says beside its kind: which they are.

    An interrupted merge of the same runs goes on, and a finished one whose parts are as they were is not done again.

    Args:
        path: a folder; None takes the one under `root` that was begun or made of `runs`, or a new one.

    Raises:
        UserError: `path` holds something else.
    """
    parts = [str(run.path.resolve()) for run in runs]

    def is_ours(run: RunDir) -> bool:
        return (folders.mark_of(run.path) or {}).get("merged") == parts

    if path is not None:
        run = RunDir(path)
        run.check_ours()
        if run.is_ours() and not is_ours(run):
            raise UserError(f"Run {run} exists and is no merge of these runs: pass a new or an empty folder with --run.")
        return run, {"merged": parts}
    inputs = _inputs(runs, config)
    for begun in sorted(root.glob(f"*/{folders.MARK}")):
        run = RunDir(begun.parent)
        if is_ours(run) and (run.read_manifest("train") is None or run.is_complete("train", inputs)):
            return run, {"merged": parts}
    base = config.base if config.base in bases.ROWS else Path(config.base).stem
    return RunDir.next(root, "-".join(config.concepts), base), {"merged": parts}


def _inputs(runs: Sequence[RunDir], config: RunConfig) -> str:
    encoders = bases.resolve(config.base).encoders
    files = [run.encoder / encoder.name / "model.safetensors" for run in runs for encoder in encoders]
    return fingerprint([str(run) for run in runs], *files)


def merge(runs: Sequence[RunDir], run: RunDir, config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Compose `runs` into `run`.

    Args:
        runs: trained runs of one base, of different concepts.
        run: the run to write.
        config: as `merged_config` gives it.
        progress: told of each run that is measured.

    Returns:
        The manifest "train" of `run`; its ``interference`` has for each concept the redirect error of its forget captions and the
        preserve error of its retain captions (relative squared error of hidden states; 0 is perfect) under its own encoder
        (``alone``) and under the sum (``merged``).

    Raises:
        UserError: an encoder that does not fit the base.
    """
    started = time.perf_counter()
    base, inputs = bases.resolve(config.base), _inputs(runs, config)
    links = chain.Chain(run, config, progress)
    is_whole = chain.BROKEN not in (links.link("harvest").state, links.link("train").state)
    if is_whole and run.is_complete("train", inputs) and all((run.encoder / encoder.name).is_dir() for encoder in base.encoders):
        return run.require("train", "merge")
    run.reopen("train")
    concepts = [read_concepts(part) for part in runs]
    anchors = {
        name: anchor
        for part, own in zip(runs, concepts, strict=True)
        for name, anchor in part.anchors([concept.name for concept in own]).items()
    }
    metadata = {
        "sd_erase.concept": ", ".join(concept.name for group in concepts for concept in group),
        "sd_erase.anchor": json.dumps(anchors, ensure_ascii=False),
        "sd_erase.base": base.name,
        "sd_erase.merged": json.dumps([str(part) for part in runs]),
    }
    rows: list[dict[str, Any]] = []
    with (progress or NoProgress())("measuring", 2 * len(runs) * len(base.encoders)) as task:
        for encoder in base.encoders:
            towers = load_towers(base, resources.device(config.device), need_images=False, encoder=encoder)
            original = {key: value.clone() for key, value in towers.text.state_dict().items()}
            total = {key: value.clone() for key, value in original.items()}
            own: list[dict[str, Any]] = [
                {"run": str(part), "concepts": [concept.name for concept in concepts[n]]} for n, part in enumerate(runs)
            ]
            if len(base.encoders) > 1:
                own = [{**row, "encoder": encoder.name} for row in own]
            for number, part in enumerate(runs):
                file = part.encoder / encoder.name / "model.safetensors"
                (state,) = formats.read_encoders(file).values()
                load_named(towers.text, state, f"erased {encoder.name}", file)  # without the projection, which never changes
                for key, value in towers.text.state_dict().items():
                    total[key] += value - original[key]
                own[number]["alone"] = _errors(towers, concepts[number], anchors, read_pairs(part), config.seed)
                task.advance()
            towers.text.load_state_dict(total)
            for number, part in enumerate(runs):
                own[number]["merged"] = _errors(towers, concepts[number], anchors, read_pairs(part), config.seed)
                task.advance()
            save_text_encoder(towers.text, run.encoder / encoder.name, metadata, towers.projection)
            rows += own
    together = [concept for group in concepts for concept in group]
    pairs = [
        pair
        for part in runs
        for pair in read_pairs(part)
        if pair.set == "forget" or not any(c.find(pair.caption) for c in together)
    ]
    unique = {(pair.set, pair.key, pair.caption): pair for pair in pairs}
    write_concepts(run, together)
    write_pairs(run, unique.values())
    harvested = (runs[0].read_manifest("harvest") or {}) | {"merged": [str(part) for part in runs]}
    kept = {key: value for key, value in harvested.items() if key not in ("stage", "inputs", "completed")}
    run.complete("harvest", inputs, {**kept, "from": {}, "made": links.makes("harvest")})
    manifest = run.complete(
        "train",
        inputs,
        {
            "objective": "merge",
            "merged": [str(part) for part in runs],
            "anchor": anchors,
            "interference": rows,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mb": None,
            "warnings": [],
            "card": {**chain.card(base), "named": config.base},
            "from": {name: chain.Chain(run, config).now(name) for name in ("text", "pairs", "concepts")},
            "made": links.makes("train"),
        },
    )
    chain.retire(run, config)
    return manifest


def _errors(towers: Towers, concepts: list[Any], anchors: dict[str, str], pairs: list[Pair], seed: int) -> dict[str, float]:
    """Redirect and preserve error of the towers' text encoder on a run's validation pairs."""
    import torch

    method = StableDiffusionErasure()
    method.prepare(towers, concepts, anchors, False)
    rng = random.Random(seed)
    sets = {}
    for name in ("forget", "retain"):
        group = [pair for pair in pairs if pair.set == name and pair.split == "validation"]
        sets[name] = rng.sample(group, min(MEASURED, len(group)))
    with torch.no_grad():
        terms = method.losses(towers, Batch(sets["forget"], sets["retain"], None, None, None, None, rng, "validation"))
    return {name: round(float(terms[name]), 4) for name in ("redirect", "preserve")}
