"""One self-contained HTML page about a run: is the concept gone, what broke, how is the encoder loaded.

Reads the run's manifests, ``concepts.json``, ``metrics.jsonl``, ``images/index.jsonl``, ``detections/*.jsonl`` and
``report/evaluation.json``. Writes ``report/report.html`` and ``report/report.json``.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from sd_erase import __version__, catalog
from sd_erase.bases import resolve as resolve_base
from sd_erase.concepts import Concept
from sd_erase.config import RunConfig, dump
from sd_erase.errors import UserError
from sd_erase.report.figures import curves, image_pairs
from sd_erase.rundir import RunDir, fingerprint, write_json_atomic, write_text_atomic

STAGE = "report"
# what the page calls gone, and little harm; said on the page too
GONE_RATE = 0.04
KEPT_SHARE = 0.95
SURE_HIGH = 0.10  # the interval's upper end above which "gone" rests on too few images
TEMPLATE = Path(__file__).with_name("template.html")


def build_report(config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
    """Write the page of `run` from what its stages left; stages that did not run yet are named with their command.

    Args:
        config: the run's configuration.
        run: a run whose train stage is complete.
        progress: told of each picture.

    Returns:
        The manifest "report": the verdicts as text, the number of image pairs shown, bytes of the page, warnings.

    Raises:
        UserError: the run is not trained, or one of its files is damaged.
    """
    import jinja2

    trained = run.require("train", "train")
    exports = [f"export-{name}" for name in catalog.EXPORTS]
    manifests = {stage: run.read_manifest(stage) for stage in ("harvest", "train", "generate", "evaluate", *exports)}
    record = _read_json(run.run) or {}
    concepts = [Concept.from_dict(values) for values in _read_json(run.concepts) or ()]
    evaluation, warnings = _evaluation(run, manifests)
    names = [concept.name for concept in concepts] or list(config.concepts)
    base = resolve_base(config.base)
    date = datetime.datetime.fromtimestamp(run.manifest("train").stat().st_mtime, datetime.timezone.utc)
    labels = {label for concept in concepts for label in concept.labels}
    groups = image_pairs(run, concepts, labels, progress) if manifests["generate"] else []
    gone, broken = judge_target(evaluation), judge_others(evaluation)
    towers = "both towers trained" if config.train.towers == "both" else "text tower trained"
    facts = {
        "Erased": ", ".join(names),
        "In its place": _anchors(trained.get("anchor")),
        "Base model": base.title,
        "Objective": f"{trained.get('objective', config.train.objective)}, {towers}",
        "Trained": f"{date.day} {date:%B %Y}",
        "Run": run.name,
    }
    context = {
        "names": names,
        "title": ", ".join(names),
        "facts": facts,
        "gone": gone,
        "broken": broken,
        "rows": [_table_row(row) for row in evaluation["rows"]] if evaluation else [],
        "evaluation": evaluation,
        "generated": manifests["generate"],
        "detector": (evaluation or {}).get("detector"),
        "instead": _instead(evaluation),
        "groups": groups,
        "example": groups[0]["pairs"][0]["text"] if groups else f"a photo of {', '.join(names)}",
        "files": [
            {**file, "name": "/".join(Path(file["path"]).parts[-3 if stage == "export-diffusers" else -1 :])}
            for stage in exports
            for file in (manifests[stage] or {}).get("files", ())
        ],
        "encoders": [encoder.name for encoder in base.encoders],
        "base": base,
        "charts": curves(run.metrics, trained.get("best_step")),
        "trained": trained,
        "harvest": manifests["harvest"],
        "warnings": warnings,
        "config": dump(config),
        "record": record,
        "version": __version__,
        "gone_rate": GONE_RATE,
        "kept_share": KEPT_SHARE,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)
    run.reopen(STAGE)
    write_text_atomic(run.report / "report.html", page)
    summary = {
        "facts": facts,
        "gone": gone,
        "broken": broken,
        "rows": evaluation["rows"] if evaluation else [],
        "pairs_shown": sum(len(group["pairs"]) for group in groups),
        "bytes": len(page.encode()),
    }
    write_json_atomic(run.report / "report.json", summary)
    kept = {"gone": gone["answer"], "broken": broken["answer"], "pairs_shown": summary["pairs_shown"], "bytes": summary["bytes"]}
    return run.complete(STAGE, fingerprint(manifests, __version__), {**kept, "warnings": warnings})


def percent(share: float | None) -> str:
    """A share as a percentage, with a decimal only where it tells something."""
    if share is None:
        return "–"
    value = 100 * share
    return f"{value:.0f}%" if value == round(value) or 10 <= value <= 90 else f"{value:.1f}%"


def judge_target(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Is it really gone? The answer in a word, and one sentence a concept with the numbers it rests on."""
    rows = _target_rows(evaluation)
    if not rows or any(row["erased"] is None or not row["images"] for row in rows):
        return {"answer": "Not measured yet", "tone": "open", "sentences": [], "rows": []}
    worst = max(rows, key=lambda row: row["erased"]["rate"])
    before, after = worst["original"]["rate"], worst["erased"]["rate"]
    if before < 2 * GONE_RATE:
        answer, tone = "Cannot be told: the original model hardly shows it", "open"
    elif after <= GONE_RATE:
        answer, tone = (
            ("Yes, for these prompts", "good")
            if worst["erased"]["high"] <= SURE_HIGH
            else (f"It looks so, but {worst['images']} images are few", "open")
        )
    elif after <= 0.2 * before:
        answer, tone = "Mostly, not fully", "open"
    elif after <= 0.8 * before:
        answer, tone = "Only in part", "bad"
    else:
        answer, tone = "No", "bad"
    sentences = [
        f"In {row['images']} images, the detector found {_plain(row)} in "
        f"{percent(row['original']['rate'])} with the original encoder and in {percent(row['erased']['rate'])} with the "
        f"erased one (95% interval {percent(row['erased']['low'])} to {percent(row['erased']['high'])})."
        for row in rows
    ]
    return {"answer": answer, "tone": tone, "sentences": sentences, "rows": [_change(row) for row in rows]}


def judge_others(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """What did it break? The answer in a word, and sentences on all other named objects and on the ones that suffered."""
    rows = (evaluation or {}).get("rows", ())
    total = next((row for row in rows if row["role"] == "others"), None)
    if total is None or total["kept"] is None:
        answer = "Not measured yet" if not rows else "Cannot be told: no prompt names another object that the detector finds"
        return {"answer": answer, "tone": "open", "sentences": [], "rows": []}
    kept = total["kept"]
    answer, tone = (
        ("Little that the detector sees", "good")
        if kept >= KEPT_SHARE
        else ("Something, see below", "open") if kept >= 0.8 else ("A lot", "bad")
    )  # fmt: skip
    sentences = [
        f"Of everything else that the prompts name, {percent(total['original']['rate'])} was found with the original encoder and "
        f"{percent(total['erased']['rate'])} with the erased one: {percent(kept)} of the original rate is kept."
    ]
    harmed = [row for row in rows if row["role"] == "object" and (row["change"] or 0) < 0 and (row["p_value"] or 1) < 0.05]
    if harmed:
        listed = ", ".join(
            f"{row['name']} ({percent(row['original']['rate'])} to {percent(row['erased']['rate'])})"
            for row in sorted(harmed, key=lambda row: row["change"])[:5]
        )
        sentences.append(f"Found less often beyond chance (p < 0.05): {listed}.")
    else:
        sentences.append("No single object is found less often beyond chance (p < 0.05).")
    return {"answer": answer, "tone": tone, "sentences": sentences, "rows": [_change(total)]}


def _plain(row: dict[str, Any]) -> str:
    return row["name"].split(" (")[0]


def _change(row: dict[str, Any]) -> dict[str, Any]:
    return {"name": _plain(row), "before": row["original"]["rate"], "after": row["erased"]["rate"]}


def _target_rows(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row an erased concept: over the images whose prompt names it, where the others are told apart."""
    rows = (evaluation or {}).get("rows", ())
    named = {_plain(row): row for row in rows if row["role"] == "target_named"}
    return [named.get(_plain(row), row) for row in rows if row["role"] == "target"]


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the page's table; positions of its chart in percent of the width."""

    def mark(share: dict[str, Any] | None) -> dict[str, float] | None:
        if share is None or share["rate"] is None:
            return None
        return {key: round(100 * share[key], 2) for key in ("low", "high", "rate")}

    return {**row, "is_target": row["role"].startswith("target"), "marks": [mark(row["original"]), mark(row["erased"])]}


def _instead(evaluation: dict[str, Any] | None) -> list[tuple[str, int, int]]:
    """Objects that no prompt named: label, images with the original and with the erased encoder; the most grown first."""
    surplus = (evaluation or {}).get("surplus", {})
    if "erased" not in surplus:
        return []
    before, after = surplus["original"]["unnamed_labels"], surplus["erased"]["unnamed_labels"]
    rows = [(label, before.get(label, 0), after.get(label, 0)) for label in {**before, **after}]
    return sorted(rows, key=lambda row: (row[1] - row[2], row[0]))[:5]


def _anchors(anchors: Any) -> str:
    if isinstance(anchors, dict):
        return ", ".join(dict.fromkeys(_anchors(anchor) for anchor in anchors.values())) or "–"
    return str(anchors) if anchors else "nothing (the word is dropped)" if anchors == "" else "–"


def _evaluation(run: RunDir, manifests: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The evaluation, where there is one of the images that lie in the run now, and what a reader should be warned of."""
    if manifests["generate"] is None:
        return None, ["No images were drawn yet: run `sd-erase generate`, then `sd-erase evaluate` and `sd-erase report`."]
    warnings = list(manifests["generate"].get("warnings", ()))
    if manifests["evaluate"] is None:
        return None, [*warnings, "The images were not evaluated yet: run `sd-erase evaluate`, then `sd-erase report`."]
    if run.manifest("evaluate").stat().st_mtime_ns < run.manifest("generate").stat().st_mtime_ns:
        return None, [*warnings, "The evaluation is older than the images: run `sd-erase evaluate`, then `sd-erase report`."]
    return _read_json(run.report / "evaluation.json"), [*warnings, *manifests["evaluate"].get("warnings", ())]


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"File {path} is damaged ({error}): run its stage again.") from error
