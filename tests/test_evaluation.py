"""Rates: intervals against published values, who is counted where, and the stage on a run of images."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import finish_images
from PIL import Image

from sd_erase import evaluation, judging
from sd_erase.concepts import Concept, all_cards, concept_named, write_concepts
from sd_erase.config import EvaluateConfig, RunConfig
from sd_erase.detection import Detection
from sd_erase.errors import UserError
from sd_erase.metrics.rates import ImagePair, detection_rates, mcnemar, row, share, surplus, surplus_p_values, wilson
from sd_erase.metrics.tables import render_table
from sd_erase.metrics.verdicts import doubts
from sd_erase.rundir import RunDir, read_jsonl, write_jsonl_atomic

COCO = frozenset(
    ["apple", "bicycle", "bus", "cat", "cell phone", "chair", "couch", "dog", "hot dog", "laptop", "person", "teddy bear"]
)
PIXELS = {"bicycle": 1, "dog": 2, "bus": 4, "cat": 8}  # what the fake detector reads from a pixel


def test_wilson_gives_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="21 successes of 20"):
        wilson(21, 20)


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(2, 6) == pytest.approx(2 * (1 + 8 + 28) / 2**8)
    assert mcnemar(4, 4) == 1.0
    assert 0 <= mcnemar(3000, 100) < 1e-300


def pair(
    prompt: int, original: Sequence[str], erased: Sequence[str] | None, others: Sequence[str] = (), named: bool = True
) -> ImagePair:
    objects = {name: frozenset({name}) for name in others}
    targets = frozenset({"apple"}) if named else frozenset()
    return ImagePair(prompt, targets, objects, Counter(original), None if erased is None else Counter(erased))


TARGETS = {"apple": frozenset({"apple"})}


def test_rates_count_targets_over_all_images_and_others_where_they_are_named() -> None:
    pairs = [
        pair(0, ["apple", "dog"], ["dog", "dog"], ["dog"]),
        pair(0, ["apple"], ["dog"], ["dog"]),
        pair(1, ["apple", "cat", "dog"], ["apple"], ["cat", "dog"]),
        pair(2, ["bus"], ["bus"], ["bus"], named=False),
    ]
    rows = {row["name"]: row for row in detection_rates(pairs, TARGETS)}
    assert [(row["original"]["count"], row["erased"]["count"], row["images"]) for row in rows.values()] == [
        (3, 1, 4), (3, 1, 3), (4, 3, 5), (1, 1, 1), (1, 0, 1), (2, 2, 3)
    ]  # fmt: skip
    assert list(rows) == ["apple", "apple (where the prompt names it)", "others (mean over named objects)", "bus", "cat", "dog"]
    apple, others = rows["apple"], rows["others (mean over named objects)"]
    assert apple["original"]["rate"] == 0.75 and apple["change"] == -0.5 and apple["kept"] == pytest.approx(1 / 3)
    assert apple["p_value"] == pytest.approx(0.5) and others["kept"] == pytest.approx(0.75)
    assert (apple["erased"]["low"], apple["erased"]["high"]) == wilson(1, 4)
    assert rows["dog"]["p_value"] == 1.0  # one appears, one goes


def test_rates_without_an_erased_model_or_an_original_hit() -> None:
    (apple, *_) = detection_rates([pair(0, [], None, ["dog"])], TARGETS)
    assert apple["erased"] is None and apple["change"] is None and apple["p_value"] is None
    (apple, *_) = detection_rates([pair(0, [], ["apple"])], TARGETS)
    assert apple["kept"] is None and apple["change"] == 1.0
    assert share([]) == {"count": 0, "n": 0, "rate": None, "low": 0.0, "high": 1.0}


def test_surplus_counts_doubles_and_strangers() -> None:
    pairs = [
        pair(0, ["apple", "apple", "dog", "dog", "cat"], None, ["dog"]),
        pair(1, ["dog", "bus", "bus", "chair"], None, ["dog", "bus"]),
        pair(2, ["apple"], None, []),
    ]
    found = surplus(pairs, "original", TARGETS)
    assert found["named_others_mean_count"] == pytest.approx(5 / 3) and found["named_others_asked"] == 1.0
    assert (found["doubled"]["count"], found["doubled"]["n"]) == (2, 3)
    assert found["unnamed"]["count"] == 2 and found["unnamed_labels"] == {"cat": 1, "chair": 1}


def test_surplus_is_compared_pair_by_pair() -> None:
    """Doubled: two grew, none shrank of three; unnamed: five grew, one shrank."""
    grew = [pair(n, ["dog", "bus"], ["dog", "dog", "bus", "bus"], ["dog", "bus"]) for n in range(1)]
    pairs = [*grew, pair(1, ["dog", "dog"], ["dog", "dog"], ["dog"])]
    pairs += [pair(n, [], ["cat"]) for n in range(2, 7)] + [pair(7, ["cat"], []), pair(8, ["cat"], ["chair"]), pair(9, [], [])]
    assert surplus_p_values(pairs, TARGETS) == {"doubled": pytest.approx(mcnemar(0, 2)), "unnamed": pytest.approx(mcnemar(1, 5))}
    assert (
        surplus([], "original", TARGETS)["named_others_mean_count"]
        == surplus([], "original", TARGETS)["named_others_asked"]
        == 0.0
    )


def test_rows_need_both_sides_of_every_image() -> None:
    with pytest.raises(ValueError, match="shorter"):
        row("x", "target", [True, False], [True])
    assert row("x", "target", [True], None) == {
        "name": "x", "role": "target", "images": 1, "original": share([True]), "erased": None, "change": None, "kept": None,
        "p_value": None,
    }  # fmt: skip


def test_a_line_of_its_own_for_prompts_that_name_the_target() -> None:
    def roles(*named: bool) -> list[str]:
        return [row["role"] for row in detection_rates([pair(n, [], [], named=each) for n, each in enumerate(named)], TARGETS)]

    assert roles(True, False) == ["target", "target_named"]
    assert roles(True, True) == roles(False, False) == ["target"]


def compare(prompt: str, labels: Sequence[str], concept: str = "apple", after: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison of one image pair."""
    boxes = (0.0, 0.0, 1.0, 1.0)
    before, later = ([Detection("", label, 0.9, boxes) for label in found] for found in (labels, after))
    index = [{"prompt_index": 0, "prompt": prompt, "seed": 0}]
    return evaluation.compare(index, [before], [later], [concept_named(concept)], all_cards().values(), COCO)


@pytest.mark.parametrize(
    ("prompt", "others"),
    [
        ("A puppy sleeps on the sofa beside two bikes.", {"dog", "couch", "bicycle"}),
        ("A woman and a man eat an apple.", {"person"}),
        ("A hot dog and a teddy bear.", {"hot dog", "teddy bear"}),  # neither a dog nor a bear
        ("An apple laptop and an apple phone", {"laptop", "cell phone"}),
        ("The dogma of catalogues", set()),
    ],
)
def test_objects_are_named_by_whole_words(prompt: str, others: set[str]) -> None:
    (row,) = compare(prompt, [])["per_prompt"]
    assert set(row["others"]) == others


def test_a_spared_sense_does_not_name_the_target() -> None:
    result = compare("An apple phone on a chair", ["cell phone", "chair"], after=["chair"])
    assert result["naming"] == {"apple": 0} and "No prompt names apple" in doubts(result)[0]
    (row,) = result["per_prompt"]
    assert row["targets"] == {"apple": {"original": 0, "erased": 0}}
    assert row["others"] == {"cell phone": {"original": 1, "erased": 0}, "chair": {"original": 1, "erased": 1}}


def test_objects_with_the_targets_label_are_left_out_with_a_warning() -> None:
    result = compare("A woman next to a man with a dog", ["person", "dog"], concept="woman")
    assert set(result["per_prompt"][0]["others"]) == {"dog"}
    assert any("cannot tell woman from man" in warning for warning in result["warnings"])


def test_what_the_detector_cannot_find_is_said() -> None:
    result = compare("An apple near a zebra", ["apple"])
    assert any("no label for zebra" in warning for warning in result["warnings"])
    index = [{"prompt_index": 0, "prompt": "a painting by Van Gogh", "seed": 0}]
    with pytest.raises(UserError, match="'van gogh' has no label that this detector can find"):
        evaluation.compare(index, [[]], None, [Concept("van gogh", "style", ("van gogh",))], [], COCO)


class FakeDetector:
    """Finds what the colour of the first pixel says."""

    labels = COCO

    def __init__(self, confidence: float):
        self.card = {"name": "fake", "weights": "fake.bin", "weights_sha256": "0" * 64, "image_size": 64}
        self.card["confidence"] = confidence
        self.seen = 0

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        self.seen += len(images)
        reds = [image.convert("RGB").getpixel((0, 0))[0] for image in images]
        box = (1, 2, 3.14159, 4)
        return [[Detection("", label, 0.87654321, box) for label, bit in PIXELS.items() if red & bit] for red in reds]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, RunDir, list[FakeDetector]]:
    """A run with four image pairs; the erased model's images show no bicycle."""
    run = RunDir(tmp_path / "run")
    rows = []
    for index, prompt in enumerate(["a bicycle next to a dog", "a bike and a cat | a bus"]):
        for seed in (0, 1):
            row = {"prompt_index": index, "prompt": prompt, "seed": seed}
            red = 1 | 2 if index == 0 else 1 | 4 | 8
            for role, value in (("original", red), ("erased", red & ~1)):
                row[role] = f"{role}/{index:04d}-seed{seed}.png"
                (run.images / role).mkdir(parents=True, exist_ok=True)
                image = Image.new("RGB", (64, 64), "white")
                image.putpixel((0, 0), (value, 0, 0))
                image.save(run.images / row[role])
            rows.append(row)
    write_jsonl_atomic(run.images / "index.jsonl", rows)
    finish_images(run)
    write_concepts(run, [concept_named("bicycle")])
    made: list[FakeDetector] = []

    def load(name: str, device: Any = None, **overrides: Any) -> FakeDetector:
        assert name == "pocket"
        made.append(FakeDetector(overrides.get("confidence", 0.25)))
        return made[-1]

    monkeypatch.setattr(judging, "load_detector", load)
    return RunConfig(concepts=("bicycle",), device="cpu"), run, made


def test_the_stage_writes_detections_and_report(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, made = drawn
    result = evaluation.evaluate(config, run)
    rates = {row["name"]: (row["original"]["rate"], row["erased"]["rate"], row["images"]) for row in result["rows"]}
    assert rates == {
        "bicycle": (1.0, 0.0, 4), "others (mean over named objects)": (1.0, 1.0, 6), "bus": (1.0, 1.0, 2), "cat": (1.0, 1.0, 2),
        "dog": (1.0, 1.0, 2),
    }  # fmt: skip
    assert result["detector"] == made[0].card and result["identical"] == {"naming": 0, "naming_of": 4}
    (warning,) = result["warnings"]
    assert warning.startswith("Only 4 images show a prompt with bicycle")
    lines = list(read_jsonl(run.detections / "original.jsonl"))
    assert lines[0] == {
        "image": "original/0000-seed0.png", "prompt_index": 0, "seed": 0,
        "detections": [{"label": label, "score": 0.8765, "box": [1, 2, 3.14, 4]} for label in ("bicycle", "dog")],
    }  # fmt: skip
    assert len(list(read_jsonl(run.detections / "erased.jsonl"))) == 4
    saved = json.loads((run.report / "evaluation.json").read_text(encoding="utf-8"))
    assert saved["rows"] == result["rows"] and run.read_manifest("evaluate")["rows"] == result["rows"]
    markdown = (run.report / "evaluation.md").read_text(encoding="utf-8")
    assert "| bicycle | erased | 4 | 100.0% [51–100] | 0.0% [0–49] | -100.0 | 0.125 |" in markdown
    assert "| a bike and a cat \\| a bus | 2 | bicycle 2 → 0 | bus 2 → 2, cat 2 → 2 |" in markdown
    assert "fake.bin, sha256 000000000000), 64 px, confidence 0.25" in markdown


def test_the_stage_is_done_again_only_when_its_inputs_change(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, made = drawn
    first = evaluation.evaluate(config, run)
    assert evaluation.evaluate(config, run) == first and [each.seen for each in made] == [8, 0]
    surer = RunConfig(concepts=("bicycle",), device="cpu", evaluate=EvaluateConfig(confidence=0.5))
    assert evaluation.evaluate(surer, run)["detector"]["confidence"] == 0.5 and made[-1].seen == 8
    finish_images(run, "drawn again, and the same to the byte")
    assert evaluation.evaluate(surer, run)["detector"]["confidence"] == 0.5 and made[-1].seen == 0
    Image.new("RGB", (64, 64), (1, 0, 0)).save(run.images / "erased" / "0001-seed1.png")
    finish_images(run)
    assert evaluation.evaluate(surer, run)["inputs"] != first["inputs"] and made[-1].seen == 8


def test_the_original_alone_can_be_evaluated(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, _ = drawn
    rows = [{**row, "erased": None} for row in read_jsonl(run.images / "index.jsonl")]
    write_jsonl_atomic(run.images / "index.jsonl", rows)
    finish_images(run)
    run.detections.mkdir()
    (run.detections / "erased.jsonl").write_text("{}\n")  # of images that were drawn before
    result = evaluation.evaluate(config, run)
    assert list(result["surplus"]) == ["original"] and result["rows"][0]["erased"] is None
    assert not (run.detections / "erased.jsonl").exists()
    markdown = (run.report / "evaluation.md").read_text(encoding="utf-8")
    assert "| bicycle | erased | 4 | 100.0% [51–100] | – | – | – |" in markdown


def test_images_of_one_colour_are_reported(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, _ = drawn
    Image.new("RGB", (64, 64), "black").save(run.images / "erased" / "0001-seed1.png")
    finish_images(run)
    result = evaluation.evaluate(config, run)
    assert result["warnings"][0].startswith("1 of the erased images are a single colour")
    assert (result["left_out"], result["flat"]) == (1, {"original": 0, "erased": 1})
    rates = {row["name"]: (row["images"], row["erased"]["count"]) for row in result["rows"]}
    assert rates["bicycle"] == (3, 0) and rates["cat"] == (1, 1)  # the black image is no proof that nothing is there


def test_nothing_is_measured_where_every_pair_has_a_flat_image(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, _ = drawn
    for path in (run.images / "erased").iterdir():
        Image.effect_noise((64, 64), 0.4).convert("RGB").save(path)  # a level or two around one grey
    finish_images(run)
    with pytest.raises(UserError, match="sd-erase generate --device cpu"):
        evaluation.evaluate(config, run)
    assert run.read_manifest("evaluate") is None


def test_pairs_that_are_the_same_to_the_pixel_are_said(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, _ = drawn
    for name in ("0000-seed0.png", "0001-seed1.png"):
        with Image.open(run.images / "original" / name) as image:
            image.save(run.images / "erased" / name, optimize=True)  # other bytes, the same pixels
    finish_images(run)
    result = evaluation.evaluate(config, run)
    assert result["identical"] == {"naming": 2, "naming_of": 4}
    assert "2 of the 4 image pairs whose prompt names bicycle are identical" in result["warnings"][0]
    assert "> 2 of the 4 image pairs" in (run.report / "evaluation.md").read_text(encoding="utf-8").split("\n| Object")[0]


def test_missing_inputs_are_one_sentence(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    config, run, _ = drawn
    (run.images / "erased" / "0001-seed1.png").write_bytes(b"half")
    with pytest.raises(UserError, match=r"\(erased/0001-seed1.png\): run `sd-erase generate --run"):
        evaluation.evaluate(config, run)
    finish_images(run)
    with pytest.raises(UserError, match="0001-seed1.png is missing or damaged"):
        evaluation.evaluate(config, run)
    assert run.read_manifest("evaluate") is None and not (run.report / "evaluation.json").exists()
    run.reopen("generate")
    with pytest.raises(UserError, match="sd-erase generate"):
        evaluation.evaluate(config, run)


def test_the_terminal_table_shows_every_row(drawn: tuple[RunConfig, RunDir, list[FakeDetector]]) -> None:
    from rich.console import Console

    config, run, _ = drawn
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table(evaluation.evaluate(config, run)))
    text = console.export_text()
    for expected in ("erasing bicycle", "100.0% [51–100]", "0.0% [0–49]", "-100.0", "0.125", "others (mean", "2 prompts"):
        assert expected in text
    assert "…" not in text  # nothing is cut off in a narrow terminal
