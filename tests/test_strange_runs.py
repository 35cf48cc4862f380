"""A run from a stranger: its JSON is valid and fits its digests, and says what no stage writes. Each reader gives a result or one sentence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import made_as_it_is

pytest.importorskip("hypothesis", reason="needs sd-erase[dev]")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sd_erase import chain, forms  # noqa: E402
from sd_erase.cli import main  # noqa: E402
from sd_erase.concepts import read_concepts  # noqa: E402
from sd_erase.config import load  # noqa: E402
from sd_erase.erasure.merge import merged_config  # noqa: E402
from sd_erase.errors import UserError  # noqa: E402
from sd_erase.evaluation import stored  # noqa: E402
from sd_erase.metrics.tables import render_markdown, render_table  # noqa: E402
from sd_erase.provenance import is_running, read_run  # noqa: E402
from sd_erase.report import build_report  # noqa: E402
from sd_erase.rundir import RunDir, read_jsonl, write_json_atomic, write_jsonl_atomic  # noqa: E402

MOST = 3000  # characters of a sentence


class Gone:
    """In place of a value: the name is removed."""


VALUES: list[Any] = [
    None, True, -1, 0, 1.5, -1e308, 10**30, "", "x", "\x1b[31m", "y" * 1_000_000, [], [1], ["a"], [[]], {}, {"a": 1}, {"a": None}, [{}],
    {"a": {"b": ["c"]}}, Gone,
]  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value: names and numbers, from the outermost."""
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, each in inner:
        yield from places(each, (*above, name))


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return {} if new is Gone else new
    value = copy.deepcopy(value)
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    if new is Gone:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


LINES = {"images/index.jsonl": "generate", "detections/erased.jsonl": "evaluate", "metrics.jsonl": "train"}
FILES = {
    **{f"manifests/{stage}.json": "" for stage in ("harvest", "train", "generate", "evaluate", "report", "export-comfyui")},
    "concepts.json": "harvest", "report/evaluation.json": "evaluate", "run.json": "", **LINES,
}  # fmt: skip


def readers(run: RunDir) -> list[Callable[[], object]]:
    """All that reads a run's JSON without a model."""
    config = load(run.config)
    return [
        lambda: build_report(config, run),
        lambda: chain.check(run, config),
        lambda: chain.base_of(run, config),
        lambda: chain.Chain(run, config).mend("train", "report"),
        lambda: chain.Chain(run, config).require("evaluate"),
        lambda: (render_markdown(stored(run)), render_table(stored(run))),
        lambda: merged_config([run, run]),
        lambda: run.anchors(["bicycle"]),
        lambda: RunDir.latest(run.path.parent, "train"),
        lambda: (read_run(run), is_running(run)),
        lambda: list(run.drawn()),
    ]


@pytest.fixture
def whole(evaluated: RunDir) -> RunDir:
    """A run with all manifests, one of an export too, and with a base that is no longer at hand in the second half of the readers."""
    config = load(evaluated.config)
    card = chain.card(chain.base_of(evaluated, config))
    trained = evaluated.read_manifest("train") or {}
    write_json_atomic(
        evaluated.manifest("train"), {**trained, "card": {**card, "named": "pocket"}, "weights": {"redirect": 10.0}}
    )
    encoder = chain.Chain(evaluated, config).now("encoder")
    file = {
        "path": "x",
        "sha256": "0",
        "encoder": "text_encoder",
        "dtype": "float16",
        "bytes": 1,
        "difference": 0.0,
        "tensors": 68,
    }
    program = {"programs": "ComfyUI", "advice": "load it", "works": True}
    evaluated.complete("export-comfyui", "x", {"files": [file], "programs": [program], "from": {"encoder": encoder}})
    write_json_atomic(evaluated.run, {"status": "complete", "stages": {"train": {"status": "complete", "seconds": 1.0}}})
    build_report(config, evaluated)
    return evaluated


def test_the_forms_are_those_that_the_stages_write(whole: RunDir) -> None:
    for stage in ("harvest", "train", "generate", "evaluate", "report", "export-comfyui"):
        assert whole.read_manifest(stage) is not None, stage
    for reader in readers(whole)[:6]:
        reader()


@given(st.data())
def test_whatever_a_runs_files_say_is_a_result_or_a_sentence(whole: RunDir, data: st.DataObject) -> None:
    run = RunDir(whole.path.with_name("stranger"))
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(whole.path, run.path)
    name = data.draw(st.sampled_from(sorted(FILES)))
    path = run.path / name
    value = list(map(dict, read_jsonl(path))) if name in LINES else json.loads(path.read_text())
    place = data.draw(st.sampled_from(sorted(places(value), key=str)))
    changed = replaced(value, place, data.draw(st.sampled_from(VALUES)))
    if name not in LINES:
        write_json_atomic(path, changed)
    elif isinstance(changed, list) and all(isinstance(row, dict) for row in changed):
        write_jsonl_atomic(path, changed)
    if FILES[name] and data.draw(st.booleans()):
        made_as_it_is(run, FILES[name])
    if data.draw(st.booleans()):  # the base is at hand no more: what the training left of it is read
        run.config.write_text(run.config.read_text().replace("base: pocket", "base: /nowhere/model"))
    for reader in readers(run):
        try:
            reader()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < MOST


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"name": None}, r"it\[0\].name"), ({"words": [3]}, r"it\[0\].words\[0\]"), ({"anchor": 3}, r"it\[0\].anchor")],
)
def test_concepts_of_another_form_are_refused_by_place(
    whole: RunDir, changes: dict[str, Any], place: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "stranger")
    shutil.copytree(whole.path, run.path)
    values = json.loads(run.concepts.read_text())
    write_json_atomic(run.concepts, [{**values[0], **changes}])
    with pytest.raises(UserError, match=rf"concepts.json is damaged \({place} is missing or is not what stands there\)"):
        read_concepts(run)


@pytest.mark.parametrize("stages", [{"train": {}}, {"train": {"status": "complete"}}])
def test_a_record_without_a_status_does_not_keep_the_page_from_being_written(
    whole: RunDir, stages: object, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "stranger")
    shutil.copytree(whole.path, run.path)
    write_json_atomic(run.run, {"status": "complete", "stages": stages})
    build_report(load(run.config), run)
    assert (run.report / "report.html").is_file()


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("train", {"from": []}),
        ("train", {"made": {"encoder": {"encoder/text_encoder/model.safetensors": 7}}}),
        ("train", {"card": {"named": "pocket"}}),
        ("train", {"anchor": ["object"]}),
        ("train", {"steps": -3}),
        ("train", {"objective": "y" * 1_000_000}),
        ("train", {"stage": "harvest"}),
        ("harvest", {"counts": {"forget": -1}}),
        ("export-comfyui", {"files": [{"path": "x"}]}),
    ],
)
def test_a_manifest_of_another_form_counts_as_none(whole: RunDir, stage: str, changes: dict[str, Any]) -> None:
    manifest = whole.read_manifest(stage) or {}
    assert manifest
    write_json_atomic(whole.manifest(stage), {**manifest, **changes})
    assert whole.read_manifest(stage) is None
    result = CliRunner().invoke(main, ["report", "--run", str(whole.path)])
    assert isinstance(result.exception, (SystemExit, type(None)))
    assert result.exit_code == (2 if stage == "train" else 0) and len(result.output) < MOST


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("report/evaluation.json", ("rows", 0, "original", "low")),
        ("report/evaluation.json", ("detector",)),
        ("images/index.jsonl", (0, "prompt")),
        ("detections/erased.jsonl", (0, "detections", 0, "box")),
        ("metrics.jsonl", (0, "terms")),
        ("run.json", ("stages",)),
    ],
)
def test_the_place_of_what_is_damaged_is_named(whole: RunDir, name: str, place: tuple[Any, ...]) -> None:
    path = whole.path / name
    value = list(map(dict, read_jsonl(path))) if name in LINES else json.loads(path.read_text())
    changed = replaced(value, place, "x" if place[-1] != "prompt" else 7)
    (write_jsonl_atomic if name in LINES else write_json_atomic)(path, changed)
    if FILES[name]:
        made_as_it_is(whole, FILES[name])
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(.*{place[-1]} is missing or is not what stands there"):
        build_report(load(whole.config), whole)


def test_forms() -> None:
    form = {forms.Needed("a"): [forms.count], "b": ({str: forms.text}, None)}
    good = [{"a": []}, {"a": [1], "b": None, "c": object()}, {"a": [0, 2], "b": {"x": "y"}}]
    assert all(forms.fits(value, form) for value in good)
    bad = {"it.a": {}, "it.a[1]": {"a": [1, True]}, "it.b.x": {"a": [], "b": {"x": 1}}, "it": []}
    assert {where: forms.misfit(value, form) for where, value in bad.items()} == {where: where for where in bad}
    assert (
        not any(map(forms.number, (True, -1, float("nan"), 10**30, "1"))) and forms.signed(-1.5) and forms.measured(float("nan"))
    )
