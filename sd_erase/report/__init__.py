"""One self-contained HTML page about a run: is the concept gone, what broke, how is the encoder loaded.

Reads the run's manifests, ``concepts.json``, ``metrics.jsonl``, ``images/index.jsonl``, ``detections/*.jsonl`` and
``report/evaluation.json``. Writes ``report/report.html`` and ``report/report.json``.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from sd_erase import __version__, catalog, chain, digests
from sd_erase.bases import Base
from sd_erase.clients import clients
from sd_erase.concepts import read_concepts
from sd_erase.config import RunConfig, dump
from sd_erase.evaluation import stored
from sd_erase.metrics.tables import apart_sentences
from sd_erase.metrics.unlearncanvas import NAMES
from sd_erase.metrics.verdicts import GONE_RATE, KEPT_SHARE, judge_others, judge_target, percent
from sd_erase.provenance import read_run
from sd_erase.report.figures import curves, image_pairs
from sd_erase.rundir import RunDir, fingerprint, write_json_atomic, write_text_atomic
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
    record = read_run(run)
    concepts = read_concepts(run) if run.concepts.is_file() else []
    links = chain.Chain(run, config, progress)
    evaluation, has_images, warnings = _evaluation(run, links)
    names = [concept.name for concept in concepts] or list(config.concepts)
    base = chain.base_of(run, config)
    exported = _exported(manifests, exports, links)
    seen_by = (evaluation or {}).get("labels", {})
    judged = [dataclasses.replace(one, labels=tuple(seen_by.get(one.name, one.labels))) for one in concepts]
    groups = image_pairs(run, judged, progress) if has_images else []
    gone, broken = judge_target(evaluation), judge_others(evaluation)
    towers = "both towers trained" if trained.get("towers", config.train.towers) == "both" else "text tower trained"
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
        "judges": _judges(evaluation),
        "opinions": _opinions(evaluation),
        "measures": _measures(evaluation),
        "beyond": _beyond(evaluation),
        "instead": _instead(evaluation),
        "groups": groups,
        "example": groups[0]["pairs"][0]["text"] if groups else f"a photo of {', '.join(names)}",
        "files": _files(exported),
        "loading": _loading(base, exported),
        "encoders": [encoder.name for encoder in base.encoders],
        "base": base,
        "charts": [] if links.link("train").state == chain.BROKEN else curves(run.metrics, trained.get("best_step")),
        "trained": trained,
        "harvest": manifests["harvest"],
        "warnings": warnings,
        "config": dump(config),
        "record": record,
        "ended": _ended(record),
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
    made = {"from": links.reads(STAGE), "made": links.makes(STAGE)}
    return run.complete(STAGE, fingerprint(manifests, __version__), {**kept, "warnings": warnings, **made})


def _exported(manifests: dict[str, Any], stages: list[str], links: chain.Chain) -> dict[str, dict[str, Any]]:
    """The manifests of the exports of the encoder of now, with those files that are still as they were written."""
    encoder = links.now("encoder")
    found = {
        stage: manifest for stage in stages if (manifest := manifests[stage] or {}).get("from", {}).get("encoder") == encoder
    }
    return {stage: {**manifest, "files": list(filter(_is_there, manifest["files"]))} for stage, manifest in found.items()}


def _is_there(file: dict[str, Any]) -> bool:
    path = Path(file["path"])
    return path.is_file() and digests.of_file(path) == file["sha256"]


def _files(exported: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page's list of files says of each."""
    return [
        {**file, "name": "/".join(Path(file["path"]).parts[-3 if stage == "export-diffusers" else -1 :])}
        for stage, manifest in exported.items()
        for file in manifest["files"]
    ]


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


def _ended(record: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Name, status and seconds of the stages that a run's record says are over; one without a status is left out."""
    every = [(name, stage.get("status"), stage.get("seconds")) for name, stage in (record.get("stages") or {}).items()]
    return [(name, status, seconds) for name, status, seconds in every if isinstance(status, str) and status != "running"]


def _loading(base: Base, exported: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each export that was written, else for ComfyUI's, the programs that take it and those that do not."""
    done = {stage.removeprefix("export-"): manifest for stage, manifest in exported.items()}
    fallback = [client._asdict() for client in clients("comfyui", base.family, pocket=base.embedded)]
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


def _judges(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The cards of what looked at the images, the first the one whose figures are shown."""
    detector = (evaluation or {}).get("detector") or {}
    found: list[dict[str, Any]] = detector.get("judges") or [detector]
    return found if detector else []


def _opinions(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What further judges say of the erased concepts: judge, rows, and sentences on where they differ from the first."""
    first = next((judge["name"] for judge in _judges(evaluation)), "")
    return [
        {**each, "sentences": apart_sentences(each, first), "rows": each["rows"]}
        for each in (evaluation or {}).get("opinions", ())
    ]


def _measures(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """UnlearnCanvas' measures that prompts ask for: concept, name, what it is, and a share a side."""
    return [
        {"concept": name, "name": measure, "about": NAMES[measure], "sides": [sides["original"], sides.get("erased")]}
        for name, found in ((evaluation or {}).get("unlearncanvas") or {}).items()
        for measure, sides in found.items()
        if sides["original"]["n"]
    ]


def _anchors(anchors: Any) -> str:
    if isinstance(anchors, dict):
        return ", ".join(dict.fromkeys(_anchors(anchor) for anchor in anchors.values())) or "–"
    return str(anchors) if anchors else "nothing (the word is dropped)" if anchors == "" else "–"


def _evaluation(run: RunDir, links: chain.Chain) -> tuple[dict[str, Any] | None, bool, list[str]]:
    """The evaluation where it belongs to all that lies in the run now, whether the images do, and what a reader is to know."""
    drawn, counted = links.fault("generate"), links.fault("evaluate")
    notes = links.notes("evaluate")
    attacked = links.fault("attack") if run.read_manifest("attack") is not None else None
    if attacked is not None and attacked.stage == "attack":
        notes.append(f"The attack's figures are out of date, {links.sentence(attacked, 'attack')}")
    if drawn is not None:
        return None, False, [links.shown(drawn, "report"), *notes]
    notes += (run.read_manifest("generate") or {}).get("warnings", ())
    if counted is not None:
        return None, True, [links.shown(counted, "report"), *notes]
    evaluation = stored(run)
    return evaluation, True, [*evaluation.get("warnings", ()), *notes]
