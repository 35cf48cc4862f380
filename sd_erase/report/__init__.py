"""One self-contained HTML page about a run: is the concept gone, what broke, how is the encoder loaded.

Reads the run's manifests, ``concepts.json``, ``metrics.jsonl``, ``images/index.jsonl``, ``detections/*.jsonl`` and
``report/evaluation.json``. Writes ``report/report.html`` and ``report/report.json``.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from sd_erase import __version__, catalog
from sd_erase.bases import Base
from sd_erase.bases import resolve as resolve_base
from sd_erase.clients import clients
from sd_erase.concepts import read_concepts
from sd_erase.config import RunConfig, dump
from sd_erase.metrics.verdicts import GONE_RATE, KEPT_SHARE, judge_others, judge_target, percent
from sd_erase.report.figures import curves, image_pairs
from sd_erase.rundir import RunDir, fingerprint, read_json, write_json_atomic, write_text_atomic
from sd_erase.terminal import printable

STAGE = "report"
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
    concepts = read_concepts(run) if run.concepts.is_file() else []
    evaluation, warnings = _evaluation(run, manifests)
    names = [concept.name for concept in concepts] or list(config.concepts)
    base = resolve_base(config.base)
    groups = image_pairs(run, concepts, progress) if manifests["generate"] else []
    gone, broken = judge_target(evaluation), judge_others(evaluation)
    towers = "both towers trained" if config.train.towers == "both" else "text tower trained"
    facts = {
        "Erased": ", ".join(names),
        "In its place": _anchors(trained.get("anchor")),
        "Base model": base.title,
        "Objective": f"{trained.get('objective', config.train.objective)}, {towers}",
        "Trained": _day(run.completed("train")),
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
        "beyond": _beyond(evaluation),
        "instead": _instead(evaluation),
        "groups": groups,
        "example": groups[0]["pairs"][0]["text"] if groups else f"a photo of {', '.join(names)}",
        "files": [
            {**file, "name": "/".join(Path(file["path"]).parts[-3 if stage == "export-diffusers" else -1 :])}
            for stage in exports
            for file in (manifests[stage] or {}).get("files", ())
        ],
        "loading": _loading(base, manifests, exports),
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
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters |= {"percent": percent, "python": repr}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)
    run.reopen(STAGE)
    write_text_atomic(run.report / "report.html", page)
    summary = {
        "facts": facts,
        "gone": dataclasses.asdict(gone),
        "broken": dataclasses.asdict(broken),
        "rows": evaluation["rows"] if evaluation else [],
        "pairs_shown": sum(len(group["pairs"]) for group in groups),
        "bytes": len(page.encode()),
    }
    write_json_atomic(run.report / "report.json", summary)
    kept = {"gone": gone.answer, "broken": broken.answer, "pairs_shown": summary["pairs_shown"], "bytes": summary["bytes"]}
    return run.complete(STAGE, fingerprint(manifests, __version__), {**kept, "warnings": warnings})


def _shown(value: Any) -> Any:
    """What the page shows of `value`: no control character, nor one that turns the direction of what follows."""
    return printable(value) if type(value) is str else value


def _day(time: str) -> str:
    """The day of a time in ISO 8601, for people; "–" where it is not known."""
    try:
        date = datetime.datetime.fromisoformat(time)
    except ValueError:
        return "–"
    return f"{date.day} {date:%B %Y}"


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the page's table; positions of its chart in percent of the width."""

    def mark(share: dict[str, Any] | None) -> dict[str, float] | None:
        if share is None or share["rate"] is None:
            return None
        return {key: round(100 * share[key], 2) for key in ("low", "high", "rate")}

    return {**row, "is_target": row["role"].startswith("target"), "marks": [mark(row["original"]), mark(row["erased"])]}


def _loading(base: Base, manifests: dict[str, Any], exports: list[str]) -> list[dict[str, Any]]:
    """For each export that was written, else for ComfyUI's, the programs that take it and those that do not."""
    done = {stage.removeprefix("export-"): manifest for stage in exports if (manifest := manifests[stage])}
    fallback = [client._asdict() for client in clients("comfyui", base.family, pocket=base.pocket)]
    ways = [{"to": to, "programs": manifest["programs"]} for to, manifest in done.items() if manifest.get("programs")]
    return ways or [{"to": "comfyui", "programs": fallback}]


def _beyond(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What is in the images beyond each named object once: shares of both sides and whether they differ beyond chance."""
    surplus = (evaluation or {}).get("surplus", {})
    if "erased" not in surplus:
        return []
    names = {"doubled": "Named objects drawn more than once", "unnamed": "Images with an object that nobody named"}
    p_values = (evaluation or {}).get("surplus_p", {})
    return [
        {"name": name, "sides": [surplus[side][kind] for side in ("original", "erased")], "p_value": p_values.get(kind)}
        for kind, name in names.items()
    ]


def _instead(evaluation: dict[str, Any] | None) -> list[tuple[str, int, int]]:
    """Objects that no prompt named: label, images with the original and with the erased encoder; the most grown first."""
    surplus = (evaluation or {}).get("surplus", {})
    if "erased" not in surplus:
        return []
    before, after = surplus["original"]["unnamed_labels"], surplus["erased"]["unnamed_labels"]
    rows = [(label, before.get(label, 0), after.get(label, 0)) for label in {**before, **after}]
    return sorted(rows, key=lambda row: (row[1] - row[2], row[0]))


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
    return read_json(path)
