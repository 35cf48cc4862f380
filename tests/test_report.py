from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from conftest import finish, finish_images
from PIL import Image

from sd_erase import bases, chain
from sd_erase.concepts import concept_named
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.report import build_report
from sd_erase.report.figures import CHART_HEIGHT, CHART_WIDTH, MOST_POINTS, curves, image_pairs
from sd_erase.rundir import RunDir, read_jsonl, write_json_atomic, write_jsonl_atomic

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Attributes of a page that would make a browser fetch something, its images, its text and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.sources += [value for name, value in attributes if name in {"src", "href", "srcset", "data"} and value]
        self.ids += [value for name, value in attributes if name == "id" and value]
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.text += f"{data} "


def page_of(settings: RunConfig, run: RunDir) -> Page:
    build_report(settings, run)
    page = Page((run.report / "report.html").read_text(encoding="utf-8"))
    assert page.stack == []
    return page


def test_the_page_stands_alone(settings: RunConfig, evaluated: RunDir) -> None:
    page = page_of(settings, evaluated)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    text = (evaluated.report / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert not re.search(r"\{\{|\{%|Undefined", text)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_answers_the_three_questions(settings: RunConfig, evaluated: RunDir) -> None:
    text = " ".join(page_of(settings, evaluated).text.split())
    assert "Is it really gone? Yes, for these prompts bicycle: 98% → 2%" in text
    assert "What did it break? Something, see below" in text
    assert "cat (100% to 80%)" in text
    assert "bus 0 → 7" in text
    assert "Run sd-erase export --to comfyui" in text
    assert "In its place something" in text
    assert "has no label for kite" in text


def test_images_are_embedded_sharply_described_and_escaped(settings: RunConfig, evaluated: RunDir) -> None:
    page = page_of(settings, evaluated)
    assert len(page.images) == 4  # the first seed of each of two prompts
    picture = Image.open(io.BytesIO(base64.b64decode(page.images[0]["src"].split(",")[1])))
    assert (picture.size, picture.getpixel((0, 0))) == ((64, 64), (200, 30, 30))
    assert page.images[0]["class"] == "sharp"
    assert "a bike and a <cat> & a bus" in page.images[2]["alt"]
    assert "<mark>bike</mark>" in (evaluated.report / "report.html").read_text(encoding="utf-8")


def test_large_images_are_made_small(settings: RunConfig, evaluated: RunDir) -> None:
    for path in evaluated.images.glob("*/*.png"):
        Image.effect_noise((512, 384), 50).convert("RGB").save(path)
    finish_images(evaluated)
    page = page_of(settings, evaluated)
    picture = Image.open(io.BytesIO(base64.b64decode(page.images[0]["src"].split(",")[1])))
    assert (picture.format, picture.size) == ("JPEG", (320, 240))
    assert page.images[0]["width"] == "512"  # the detector's boxes are in the image's own pixels


def test_a_run_that_is_only_trained_says_what_to_run(settings: RunConfig, run: RunDir) -> None:
    result = build_report(settings, run)
    assert result["gone"] == "Not measured yet"
    assert "sd-erase generate" in result["warnings"][0]
    run.reopen("train")
    with pytest.raises(UserError, match="run `sd-erase train --run "):
        build_report(settings, run)


def test_an_evaluation_of_other_images_is_not_shown(settings: RunConfig, evaluated: RunDir) -> None:
    os.utime(evaluated.manifest("evaluate"), (1, 1))  # as in a copy of the run: times say nothing
    assert build_report(settings, evaluated)["gone"] == "Yes, for these prompts"
    for path in evaluated.images.glob("*/*.png"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    finish_images(evaluated)
    result = build_report(settings, evaluated)
    assert result["gone"] == "Not measured yet" and result["pairs_shown"] == 2
    assert "changed since the figures were counted" in result["warnings"][0]
    assert "run `sd-erase evaluate --run" in result["warnings"][0]


def test_the_page_of_a_run_whose_base_was_moved_says_what_could_not_be_checked(settings: RunConfig, evaluated: RunDir) -> None:
    manifest = evaluated.read_manifest("train")
    gone = dataclasses.replace(settings, base="/nowhere/model.safetensors")
    card = {**chain.card(bases.resolve("pocket")), "title": "My model", "named": gone.base}
    evaluated.complete("train", "t", {**manifest, "card": card})
    result = build_report(gone, evaluated)
    assert result["gone"] == "Yes, for these prompts"
    assert any("is not at hand and could not be checked" in warning for warning in result["warnings"])
    assert "My model" in (evaluated.report / "report.html").read_text()


def test_a_run_of_an_earlier_version_asks_for_new_figures(settings: RunConfig, evaluated: RunDir) -> None:
    for stage in ("train", "generate", "evaluate"):
        kept = {key: value for key, value in evaluated.read_manifest(stage).items() if key not in ("from", "made")}
        write_json_atomic(evaluated.manifest(stage), kept)
    result = build_report(settings, evaluated)
    assert (result["gone"], result["pairs_shown"]) == ("Not measured yet", 0)
    assert "did not record what the images were drawn from" in result["warnings"][0]
    assert "`sd-erase generate --run" in result["warnings"][0]


def test_the_summary_is_machine_readable(settings: RunConfig, evaluated: RunDir) -> None:
    result = build_report(settings, evaluated)
    summary = json.loads((evaluated.report / "report.json").read_text())
    assert summary["pairs_shown"] == 2
    assert summary["rows"][0]["erased"]["count"] == 2
    assert evaluated.read_manifest("report") == result


def test_exported_files_are_listed(settings: RunConfig, evaluated: RunDir) -> None:
    from sd_erase.export.text_encoder import export

    export(settings, evaluated)
    assert "bicycle-pocket-text_encoder-fp16.safetensors" in page_of(settings, evaluated).text


def test_curves_span_their_box_and_are_thinned(tmp_path: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "split": "train", "loss": float(step), "terms": {"a_b": 1.0}} for step in range(1000)]
    write_jsonl_atomic(path, [*rows, {"step": 5, "split": "train", "loss": float("nan"), "terms": {}}])
    loss, term = curves(path, 999)
    points = [tuple(map(float, point.split(","))) for point in loss["lines"][0]["points"].split()]
    assert len(points) <= MOST_POINTS
    assert points[0][0] < 2 and points[-1][0] > CHART_WIDTH - 2
    assert points[0][1] > CHART_HEIGHT - 2 and points[-1][1] < 2
    assert (loss["best"], term["title"]) == (CHART_WIDTH, "a b")
    assert curves(tmp_path / "none", None) == []


def test_every_image_that_still_shows_the_concept_comes_first(settings: RunConfig, evaluated: RunDir) -> None:
    """Also those that are no prompt's first image, and those whose prompt does not ask for it."""
    index = list(read_jsonl(evaluated.images / "index.jsonl"))
    index[3]["prompt"] = "a dog"
    write_jsonl_atomic(evaluated.images / "index.jsonl", index)
    rows = [
        {
            "image": row["erased"],
            "detections": [{"label": "bicycle", "score": score, "box": [8.0, 8.0, 40.0, 40.0]}] if score else [],
        }
        for row, score in zip(index, (0.0, 0.4, 0.6, 0.9), strict=True)
    ]
    write_jsonl_atomic(evaluated.detections / "erased.jsonl", rows)
    finish_images(evaluated)
    finish(evaluated, "evaluate", "e", evaluated.read_manifest("evaluate"))
    text = " ".join(page_of(settings, evaluated).text.split())
    headings = [
        "Still found: bicycle, in images whose prompt names it (2 of 3 images)",
        "Found though no word asks for it: bicycle (1 of 4 images)",
        "Prompts that name bicycle (2 of 2 prompts)",
    ]
    assert [text.index(heading) for heading in headings] == sorted(text.index(heading) for heading in headings)
    groups = image_pairs(evaluated, [concept_named("bicycle")])
    assert [[pair["seed"] for pair in group["pairs"]] for group in groups] == [[0, 1], [1], [0, 0]]  # the surest first
    assert "In no image of the erased encoder" not in text


def test_doubts_stand_before_any_figure(settings: RunConfig, evaluated: RunDir) -> None:
    text = page_of(settings, evaluated).text
    assert text.index("has no label for kite") < text.index("Base model") < text.index("98%")
    assert "In no image of the erased encoder was the concept still found." in " ".join(text.split())


def test_doubled_and_unnamed_objects_stand_on_the_page(settings: RunConfig, evaluated: RunDir) -> None:
    text = " ".join(page_of(settings, evaluated).text.split())
    assert "Named objects drawn more than once 0 of 100 (0%) 0 of 100 (0%) 1.000" in text
    assert "Images with an object that nobody named 0 of 100 (0%) 7 of 100 (7%) 0.016" in text
    assert "an object that nobody named is in the image (0% to 7%)" in text
