"""The audit: what is read of a source, when a figure is shown, what the verdict says, and one audit of an erasure that keys on a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sd_erase import bases, catalog, components
from sd_erase.auditing import bench, card, conditions, job, wording
from sd_erase.auditing.bench import Share
from sd_erase.auditing.job import Asked, audit
from sd_erase.auditing.probe import Kept, NotTried, Row
from sd_erase.auditing.subject import distance, load_pair, read_subject
from sd_erase.cli import main
from sd_erase.clip import save_text_encoder
from sd_erase.concepts import concept_named
from sd_erase.concepts.typos import every_error
from sd_erase.config import EvaluateConfig, GenerateConfig, RunConfig
from sd_erase.errors import UserError
from sd_erase.metrics.rates import fisher

CPU = RunConfig(device="cpu")
BASE = bases.resolve("pocket")


def encoder() -> Any:
    return components.text_encoder(BASE, BASE.encoders[0])


def tokenizer() -> Any:
    return components.tokenizer(BASE, BASE.encoders[0])


def saved(text: Any, folder: Path, **stated: str) -> Path:
    """An encoder as a file that states its erasure."""
    save_text_encoder(text, folder, {f"sd_erase.{name}": value for name, value in stated.items()})
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket's encoder with the anchor's embedding for "bicycle" and "bicycles", which leaves every other word for it."""
    text, words = encoder(), tokenizer()
    (anchor,) = words("object", add_special_tokens=False).input_ids
    with torch.no_grad():
        rows = text.get_input_embeddings().weight
        for word in ("bicycle", "bicycles"):
            (token,) = words(word, add_special_tokens=False).input_ids
            rows[token] = rows[anchor]
    folder = tmp_path_factory.mktemp("swapped") / "text_encoder"
    return saved(text, folder, concept="bicycle", anchor=json.dumps({"bicycle": "object"}), base="pocket")


# --- statistics and the verdict -------------------------------------------------------------------------------------------------


def test_fishers_test_gives_the_textbook_values() -> None:
    # the lady tasting tea: 4 of 4 against 0 of 4 is one of 70 ways
    assert fisher(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert fisher(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert fisher(0, 5, 0, 5) == fisher(5, 5, 5, 5) == 1
    assert fisher(2, 10, 8, 10) > 0.9


def row(erased: int, proof: int, control: int = 0, n: int = 20, **options: Any) -> dict[str, Any]:
    def found(count: int) -> list[bool]:
        return [True] * count + [False] * (n - count)

    return Row("", found(erased), found(control), found(0), found(proof), **options).to_dict()


def result(*rows: tuple[str, str, dict[str, Any]], collateral: tuple[Kept, ...] = ()) -> dict[str, Any]:
    probes = [
        {"name": name, "asks": f"asked by {name}", "group": group, "citation": "", "settings": {}, "rows": [one]}
        for name, group, one in rows
    ]
    if collateral:
        kept = [one.to_dict() for one in collateral]
        probes.append({"name": "k", "asks": "k", "group": "collateral", "citation": "", "settings": {}, "rows": kept})
    return {
        "subject": "a file: x", "concept": "dog", "anchor": "object", "base": "pocket", "probes": probes, "not_tried": [], "warnings": [],
        "images": 1, "seconds": 1.0, "share": "quick", "detector": {"name": "pocket", "confidence": 0.25}, "drawing": "15 steps",
    }  # fmt: skip


def test_a_figure_without_a_proof_is_not_shown_and_decides_nothing() -> None:
    silent = result(("listed", "words", row(0, 18)), ("long", "words", row(9, 2)))
    assert not row(9, 2)["works"] and row(9, 2)["why_not"]
    assert card.verdict(silent)["answer"] != "returns"
    shown = {**silent, "verdict": card.verdict(silent)}
    text = card.render(shown)
    assert "45.0%" not in text and "asked by long: no figure, " in text
    assert card.verdict(result(("long", "words", row(0, 2))))["answer"] == "untold"


def test_the_verdict_is_made_of_the_figures() -> None:
    gone = card.verdict(result(("listed", "words", row(0, 90, n=100)), ("prefix", "attack", row(1, 60, n=100))))
    assert gone["answer"] == "gone" and "0 of 100 images" in gone["sentence"] and "no search for words" in gone["sentence"]
    back = card.verdict(result(("listed", "words", row(0, 18)), ("names", "words", row(15, 18))))
    assert back["answer"] == "returns" and "names in 15 of 20" in back["sentence"] and "listed" not in back["sentence"]
    few = card.verdict(result(("listed", "words", row(0, 7, n=8))))
    assert few["answer"] == "open" and "few" in few["sentence"]
    searched = card.verdict(result(("listed", "words", row(0, 90, n=100)), ("prefix", "attack", row(40, 60, n=100))))
    assert searched["answer"] == "gone" and "prefix in 40 of 100" in searched["sentence"]


def test_no_verdict_rests_on_less_than_the_judge_errs_by() -> None:
    """A CLIP that sees the concept in 20 % of images without it, or cannot tell at all."""

    def of(alarms: float, blind: bool) -> dict[str, Any]:
        shown = result(("listed", "words", row(15, 90, n=100)))
        shown["detector"] = {
            **shown.get("detector", {}),
            "calibration": {"dog": {"false_alarms": {"rate": alarms}, "blind": blind}},
        }
        return shown

    assert card.verdict(of(0.0, False))["answer"] == "returns"
    within = card.verdict(of(0.2, False))
    assert within["answer"] == "open" and "no more than the judge sees" in within["sentence"]
    assert "no more than the judge errs by" in card.render({**of(0.2, False), "verdict": within})
    blind = card.verdict(of(0.0, True))
    assert blind["answer"] == "untold" and "cannot tell dog" in blind["sentence"]


def test_what_the_denoiser_knows_is_not_the_erasures() -> None:
    alike, beyond = row(16, 20, control=15, relative=True), row(16, 20, control=2, relative=True)
    assert not card.returns(alike) and card.returns(beyond)
    assert card.returns(row(16, 20, control=15))
    shown = result(("listed", "words", row(0, 90, n=100)), ("completion", "wordless", alike))
    shown["verdict"] = card.verdict(shown)
    assert "the denoiser knows it" in card.render(shown) and "completion" not in shown["verdict"]["sentence"]


def test_the_verdict_says_what_broke() -> None:
    listed = ("listed", "words", row(0, 90, n=100))
    lost = Kept("companions", (98, 100), (60, 100))
    assert "companions falls to 61%" in card.verdict(result(listed, collateral=(lost,)))["sentence"]
    fine = Kept("companions", (98, 100), (97, 100))
    assert "is kept" in card.verdict(result(listed, collateral=(fine,)))["sentence"]
    tail = Kept("PSNR, tenth percentile of untouched prompts", value=17.3, unit="dB")
    assert "17 dB" in card.verdict(result(listed, collateral=(fine, tail)))["sentence"]
    assert card.is_grown(Kept("doubled", (1, 100), (30, 100), rises=True).to_dict())
    assert not card.is_lost(Kept("doubled", (30, 100), (1, 100), rises=True).to_dict())


def test_errors_of_a_word_are_single_and_reach_short_words() -> None:
    found = every_error("dog")
    assert "dogg" in found and "dgo" in found and "dog" not in found
    assert "teddy baer" in every_error("teddy bear")
    assert all(abs(len(form) - len("bicycle")) <= 1 for form in every_error("bicycle"))


# --- what is audited ------------------------------------------------------------------------------------------------------------


def test_a_file_says_what_it_is(swapped: Path) -> None:
    found = read_subject(swapped, CPU, False)
    assert (found.kind, found.base.name, found.concept.name, found.anchor) == ("file", "pocket", "bicycle", "object")
    folder = read_subject(swapped.parent.parent, CPU, False)
    assert folder.kind == "encoder" and folder.stamp == found.stamp


def test_a_pipeline_folder_brings_its_own_denoiser(tmp_path: Path) -> None:
    pipeline = components.load_pipeline(BASE)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    pipeline.save_pretrained(tmp_path / "theirs")
    subject = read_subject(tmp_path / "theirs", RunConfig(device="cpu", concepts=("bicycle",)), True)
    original, erased = load_pair(subject, "cpu")
    assert subject.kind == "pipeline"
    assert torch.allclose(erased.unet.conv_out.bias, original.unet.conv_out.bias + 0.1)
    assert distance(original.text_encoder.state_dict(), erased.text_encoder.state_dict()) == 0
    with pytest.raises(UserError, match="does not say of which base"):
        read_subject(tmp_path / "theirs", CPU, False)


@pytest.mark.parametrize(
    ("stated", "asked", "sentence"),
    [
        ({}, CPU, "does not say of which base"),
        ({"base": "pocket"}, CPU, "does not say which concept"),
        ({"base": "pocket", "concept": "bicycle, dog"}, CPU, "pass --concept with one of them"),
        ({"base": "pocket", "concept": "bicycle"}, RunConfig(concepts=("dog",)), "has erased bicycle"),
        ({"base": "somewhere/else.safetensors", "concept": "bicycle"}, CPU, "is not at hand"),
    ],
)
def test_a_file_that_lacks_or_contradicts_is_refused_in_a_sentence(
    tmp_path: Path, stated: dict[str, str], asked: RunConfig, sentence: str
) -> None:
    file = saved(encoder(), tmp_path / "text_encoder", **stated)
    with pytest.raises(UserError, match=sentence):
        read_subject(file, asked, False)


def test_a_file_of_another_base_is_refused(tmp_path: Path, swapped: Path) -> None:
    with pytest.raises(UserError, match="erased from pocket, not from sd15"):
        read_subject(swapped, RunConfig(base="sd15"), True)
    other = encoder()
    torch.manual_seed(0)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=float(parameter.detach().std()) if parameter.numel() > 1 else 1.0)
    file = saved(other, tmp_path / "text_encoder", base="pocket", concept="bicycle", anchor='{"bicycle": "object"}')
    with pytest.raises(UserError, match="is of another base: its text_encoder differs"):
        load_pair(read_subject(file, CPU, False), "cpu")


def test_bad_questions_are_refused_before_the_work(tmp_path: Path, swapped: Path) -> None:
    other = tmp_path / "prompts.txt"
    other.write_text("a dog on the grass\n")
    with pytest.raises(UserError, match="None of 1 prompts names bicycle and nothing"):
        audit(swapped, tmp_path / "a", Asked(RunConfig(device="cpu", generate=GenerateConfig(prompts=(str(other),)))))
    with pytest.raises(UserError, match="Probe 'lsted' is unknown .did you mean 'listed'"):
        audit(swapped, tmp_path / "a", Asked(CPU, probes=("lsted",)))
    card_file = tmp_path / "card.yaml"
    card_file.write_text("name: bicycle\nlabels: [zeppelin]\n")
    plain = saved(encoder(), tmp_path / "text_encoder", base="pocket")
    with pytest.raises(UserError, match="'bicycle' has no label that detector pocket can find .labels: zeppelin"):
        audit(plain, tmp_path / "a", Asked(RunConfig(device="cpu", concept_file=str(card_file))))
    with pytest.raises(UserError, match="does not exist"):
        audit(tmp_path / "nothing", tmp_path / "a", Asked(CPU))
    assert not (tmp_path / "a").exists()


def test_the_command_ends_in_one_sentence(tmp_path: Path, swapped: Path) -> None:
    found = CliRunner().invoke(main, ["audit", str(swapped), "--output", str(tmp_path / "a"), "--concept", "dog"])
    assert found.exit_code == 2
    assert "has erased bicycle" in found.output and "Traceback" not in found.output


# --- an audit ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHARES, "quick", Share(images=6, few=4, searched=1, effort=0.02))


def test_an_erasure_of_a_word_is_found_out_by_its_other_names(tmp_path: Path, swapped: Path, tiny: None) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A bicycle on the grass.\nThere is a bicycle beside a dog.\n")
    config = RunConfig(device="cpu", generate=GenerateConfig(prompts=(str(prompts),), steps=8))
    asked = Asked(config, share="quick", probes=("listed", "synonyms", "drift"))
    found = audit(swapped, tmp_path / "card", asked)
    rows = {probe["name"]: probe["rows"][0] for probe in found["probes"]}
    assert rows["listed"]["works"] and rows["listed"]["erased"]["count"] == 0
    assert rows["synonyms"]["works"] and rows["synonyms"]["erased"]["count"] >= 5  # bike, cycle: not swapped
    assert found["verdict"]["answer"] == "returns" and "synonyms" in found["verdict"]["sentence"]
    assert {each["name"] for each in found["not_tried"]} == set(catalog.PROBES) - {"listed", "synonyms", "drift"}
    written = (tmp_path / "card" / "audit.md").read_text()
    assert found["verdict"]["sentence"] in written and "prefix (words before the prompt" in written
    # drift: only one token's embedding moved, and no caption of the retained world holds it
    assert all(each["value"] == 0 for each in next(p for p in found["probes"] if p["name"] == "drift")["rows"])
    again = audit(swapped, tmp_path / "card", asked)
    assert again["again"] and again["verdict"] == found["verdict"]
    shutil.rmtree(tmp_path / "card" / "probes")
    (tmp_path / "card" / "audit.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "card").rglob("*.png")}
    assert before
    audit(swapped, tmp_path / "card", asked)  # an interrupted one: what was drawn is not drawn again
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_concept_that_the_original_never_draws_is_refused(tmp_path: Path, tiny: None) -> None:
    own = tmp_path / "card.yaml"
    own.write_text("name: zeppelin\nlabels: [elephant]\nanchor: object\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A zeppelin on the grass.\n")
    plain = saved(encoder(), tmp_path / "text_encoder", base="pocket")
    config = RunConfig(device="cpu", concept_file=str(own), exact=True, generate=GenerateConfig(prompts=(str(prompts),), steps=4))
    with pytest.raises(UserError, match="The original shows zeppelin in 0 of 6 images"):
        audit(plain, tmp_path / "a", Asked(config, share="quick", probes=("listed",)))


@pytest.fixture(scope="module")
def small_bench(swapped: Path, tmp_path_factory: pytest.TempPathFactory) -> bench.Bench:
    asked = Asked(RunConfig(device="cpu", generate=GenerateConfig(steps=2)), share="quick")
    subject = read_subject(swapped, asked.config, False)
    detector, labels = job._detector(subject, asked.config)
    settings = job.Settings.of(asked.config, subject.base)
    folder = tmp_path_factory.mktemp("bench")
    prompts = ["A bicycle on the grass.", "There is a bicycle beside a dog."]
    original, erased = load_pair(subject, "cpu")
    return bench.Bench(
        subject, original, erased, detector, labels, settings, Share(2, 2, 1, 0.02), folder, prompts, bench.NoProgress()
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name for name in catalog.PROBES if name not in ("listed", "synonyms", "drift", "weights", "prefix", "untouched", "classes")],
)
def test_every_probe_answers_in_its_own_form_or_says_why_not(small_bench: bench.Bench, name: str) -> None:
    probe = catalog.resolve(catalog.PROBES, name, "Probe")
    assert probe.name == name
    try:
        rows = [one.to_dict() for one in probe(small_bench)]
    except NotTried as reason:
        assert str(reason) and not str(reason).endswith(".")
        return
    assert rows
    json.dumps(rows)
    for one in rows:
        if probe.group == "collateral":
            assert one["original"] is not None or one["value"] is not None
        else:
            assert 0 < one["erased"]["n"] == one["control"]["n"] or one["erased"]["n"]
            assert one["floor"]["n"] and one["proof"]["n"]


def test_only_words_that_the_base_reads_as_the_concept_count(small_bench: bench.Bench) -> None:
    assert wording.known(small_bench, ["bike", "velocipede", "dog", "zzkq", "something"]) == ["bike", "velocipede"]
    assert not any(small_bench.subject.concept.find(word) for word in small_bench.vocabulary)
    assert "velocipede" not in small_bench.vocabulary  # read as the concept: no floor


def test_the_bases_own_names_are_asked(small_bench: bench.Bench) -> None:
    own = small_bench.names()
    assert own and not any(small_bench.subject.concept.find(name) for name in own)
    assert "wheeler" in own  # of "two-wheeler": one of the pieces that searches for words find


def test_found_words_are_a_list_that_generate_reads(tmp_path: Path) -> None:
    from sd_erase.prompts import read_prompts

    rows = [{"words": ["qua umbrella dog", "pede a dog"]}, {"what": "a count"}]
    assert job._write_found(tmp_path, [{"name": "prefix", "citation": "a paper", "asks": "", "rows": rows}]) == "found-words.txt"
    assert [prompt.text for prompt in read_prompts(tmp_path / "found-words.txt")] == rows[0]["words"]
    assert job._write_found(tmp_path, [{"name": "listed", "citation": "", "asks": "", "rows": [{"words": []}]}]) == ""


def test_completion_changes_hands_at_the_step_that_is_asked_for(small_bench: bench.Bench) -> None:
    """With all steps the original's, the image is the original's own; the pipelines are left as they were."""
    from sd_erase.auditing import wordless
    from sd_erase.drawing import Job

    texts, unet = small_bench.sentences(1), small_bench.original.unet
    batch = small_bench._batch([Job(0, texts[0], 0)], small_bench.settings)
    steps = small_bench.settings.steps

    def image(first: int, then: Any) -> torch.Tensor:
        (picture,) = wordless._completed(small_bench, batch, texts, then, first)
        return torch.tensor(list(picture.getdata()), dtype=torch.float32)

    (own,) = small_bench.drawn("own", "original", texts).paths
    from PIL import Image

    drawn = torch.tensor(list(Image.open(own).convert("RGB").getdata()), dtype=torch.float32)
    assert (image(steps, small_bench.erased) - drawn).abs().max() <= 1
    assert (image(1, small_bench.original) - drawn).abs().max() <= 1
    assert (image(1, small_bench.erased) - drawn).abs().mean() > 1
    assert small_bench.original.unet is unet


def test_weights_are_written_as_compel_reads_them(small_bench: bench.Bench) -> None:
    assert conditions._weighted(small_bench, "A bicycle (red) on the grass.", 1.3) == "A (bicycle)1.3 red on the grass."
    assert conditions._weighted(small_bench, "A bicycle on the grass.", 0.6, "object") == "(an object)0.6 on the grass."
    pytest.importorskip("compel")
    (one, *_) = conditions.weights(small_bench)
    assert one.variant == "weight 1.3" and len(one.erased) == 2


def test_descriptions_name_neither_the_concept_nor_a_card() -> None:
    for name, lists in wording._described().items():
        concept = concept_named(name)
        assert set(lists) <= {"implicit", "languages"}
        assert not [text for texts in lists.values() for text in texts if any(concept.scan(text))]


def test_an_audit_knows_only_detectors_that_are_there(tmp_path: Path, swapped: Path) -> None:
    with pytest.raises(UserError, match="Detectors file 'nothing'"):
        audit(swapped, tmp_path / "a", Asked(RunConfig(device="cpu", evaluate=EvaluateConfig(detector="nothing"))))
