"""Judges: chosen by kind, refused in time, calibrated, compared; each maker on its own, and UnlearnCanvas' measures by hand."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import yaml
from conftest import finish_images
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_erase import bases, evaluation, judging
from sd_erase.concepts import Concept, concept_named, write_concepts
from sd_erase.config import EvaluateConfig, GenerateConfig, RunConfig
from sd_erase.detection import Detection, load_detector, read_card, split_name
from sd_erase.detection.clip import ClipJudge
from sd_erase.detection.nudenet import LABELS
from sd_erase.detection.panel import Panel, known_labels
from sd_erase.errors import UserError
from sd_erase.metrics.calibration import calibrated, sentence, threshold
from sd_erase.metrics.rates import ImagePair, share
from sd_erase.metrics.tables import render_markdown
from sd_erase.metrics.unlearncanvas import measures
from sd_erase.metrics.verdicts import judge_target
from sd_erase.progress import NoProgress
from sd_erase.rundir import RunDir

BASE = bases.resolve("pocket")
BICYCLE, VAN_GOGH = concept_named("bicycle"), concept_named("van gogh")
COLOURS = {"bicycle": (255, 0, 0), "dog": (0, 255, 0)}


def asking(*names: str, **settings: Any) -> RunConfig:
    return RunConfig(device="cpu", evaluate=EvaluateConfig(judge=names, **settings))


# --- which judge, and whether it knows ------------------------------------------------------------------------------------------


def test_a_judge_is_chosen_by_the_concepts_kind_or_by_name() -> None:
    kinds = {"object": "pocket", "style": "clip", "person": "clip", "nudity": "nudenet"}
    for kind, name in kinds.items():
        assert judging.names_of(asking(), BASE, [Concept("x", kind, ("x",))]) == [name]
    both = [Concept("x", "style", ("x",)), Concept("y", "object", ("y",))]
    assert judging.names_of(asking(), BASE, both) == ["clip", "pocket"]
    assert judging.names_of(asking("nudenet", "clip:a"), BASE, both) == ["nudenet", "clip:a"]
    old = RunConfig(evaluate=EvaluateConfig(detector="yolov5su"))
    assert judging.names_of(old, BASE, both) == ["yolov5su"]  # --detector as it was


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": ("clip",), "detector": "pocket"}, "given together with evaluate.detector"),
        ({"judge": ("clip", "pocket", "nudenet")}, "names 3 judges"),
    ],
)
def test_judges_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(evaluate=EvaluateConfig(**settings))


def test_a_name_may_bring_its_own_weights(tmp_path: Path) -> None:
    assert split_name("clip:/models/x") == ("clip", "/models/x") and split_name("pocket") == ("pocket", "")
    assert split_name("C:\\cards\\mine.yaml") == ("C:\\cards\\mine.yaml", "")  # no card of ours stands before the colon
    with pytest.raises(UserError, match="names no weights: pass --judge classifier:FOLDER"):
        load_detector("classifier")
    for text, message in (
        ("templates: [no place]", "must hold {} once"),
        ("groups: {nude: [a]}", "kind 'nude' is unknown"),
        ("groups: [a]", "groups must map"),
    ):
        (tmp_path / "card.yaml").write_text(f"name: x\nkind: clip\nweights: base\nconfidence: 0.5\nlicence: none\n{text}\n")
        with pytest.raises(UserError, match=message):
            read_card(tmp_path / "card.yaml")


def test_a_judge_without_the_label_is_refused_before_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    picture(run.images / "original" / "0000-seed0.png", "dog")
    row = {"prompt_index": 0, "prompt": "a dog by van gogh", "seed": 0, "original": "original/0000-seed0.png", "erased": None}
    evaluation.write_jsonl_atomic(run.images / "index.jsonl", [row])
    finish_images(run)
    write_concepts(run, [VAN_GOGH])
    monkeypatch.setattr(evaluation, "detect_files", lambda *arguments: pytest.fail("an image was looked at"))
    monkeypatch.setattr(judging, "draw", lambda *arguments, **settings: pytest.fail("an image was drawn"))
    with pytest.raises(UserError, match="'van gogh' has no label that detector pocket can find .*--judge clip"):
        evaluation.evaluate(asking("pocket"), run)
    assert not run.detections.exists() and (run.images / "original" / "0000-seed0.png").is_file()


def test_a_kind_whose_judge_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"needs the package nudenet .*pip install sd-erase\[nudenet\]"):
        judging.judge_of(asking(), BASE, [concept_named("nudity")])


def test_a_clip_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder without model_index.json"):
        judging.judge_of(asking(f"clip:{tmp_path}"), BASE, [VAN_GOGH])


@pytest.mark.parametrize("name", ["clip", "classifier:some/folder"])
def test_a_size_that_would_do_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="leave --image-size out"):
        judging.judge_of(asking(name, image_size=64), BASE, [BICYCLE])


class Fake:
    """Sees in an image the thing whose colour it has, if it knows it."""

    groups: dict[str, frozenset[str]] = {}

    def __init__(self, name: str, *labels: str, blind_to: int = 0, kind: str = "yolo"):
        self.card = {"name": name, "kind": kind, "weights": "w", "weights_sha256": "0", "image_size": 64, "confidence": 0.5}
        self.labels, self._blind = frozenset(labels), blind_to

    def detect(self, images: Sequence[Any]) -> list[list[Detection]]:
        found = []
        for image in images:
            red, green, number = image.getpixel((0, 0))
            seen = [label for label, value in (("bicycle", red), ("dog", green)) if value == 255]
            found.append([Detection("", one, 0.9, (0, 0, 8, 8)) for one in seen if one in self.labels and number != self._blind])
        return found


def picture(path: Path, label: str, number: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 8), "white")
    red, green, _ = COLOURS[label]
    image.putpixel((0, 0), (red, green, number))
    image.save(path)
    return path


def test_what_stands_for_a_concept() -> None:
    yolo, clip = Fake("yolo", "bicycle", "crane"), Fake("clip", "crane", "van gogh", kind="clip")
    assert known_labels(BICYCLE, yolo) == {"bicycle"}
    assert (
        known_labels(Concept("crane", "object", ("crane",)), yolo) == frozenset()
    )  # a bird or a machine: its card names no label
    assert known_labels(Concept("crane", "object", ("crane",)), clip) == {"crane"}
    assert known_labels(VAN_GOGH, clip) == {"van gogh"} and known_labels(VAN_GOGH, yolo) == frozenset()
    nude = Fake("nude", "belly exposed", "anus exposed")
    nude.groups = {"nudity": frozenset({"anus exposed"})}
    assert known_labels(Concept("naked", "nudity", ("naked",)), nude) == {"anus exposed"}
    own = Concept("naked", "nudity", ("naked",), labels=("belly exposed",))
    assert known_labels(own, nude) == {"belly exposed"}


def test_a_label_is_its_first_judges(tmp_path: Path) -> None:
    images = [Image.open(picture(tmp_path / f"{number}.png", "bicycle", number)) for number in (1, 2)]
    panel = Panel([Fake("first", "bicycle", blind_to=1), Fake("second", "bicycle", "dog")], [BICYCLE])
    assert panel.labels == {"bicycle", "dog"} and panel.card["name"] == "first + second"
    assert [[each.label for each in one] for one in panel.detect(images)] == [[], ["bicycle"]]


# --- two judges -----------------------------------------------------------------------------------------------------------------


def test_two_judges_that_disagree_are_both_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second judge does not see the bicycle of image 2, which the first does; both see the erased one's leak in image 3."""
    run, rows = RunDir(tmp_path / "run"), []
    for number in range(4):
        row = {"prompt_index": number, "prompt": "a bicycle and a dog", "seed": 0}
        for side, label in (("original", "bicycle"), ("erased", "bicycle" if number == 3 else "dog")):
            row[side] = f"{side}/{number:04d}-seed0.png"
            picture(run.images / row[side], label, number)
        rows.append(row)
    evaluation.write_jsonl_atomic(run.images / "index.jsonl", rows)
    finish_images(run)
    write_concepts(run, [BICYCLE])
    judges = {"one": Fake("one", "bicycle", "dog", blind_to=99), "two": Fake("two", "bicycle", blind_to=2)}
    monkeypatch.setattr(judging, "load_detector", lambda name, **settings: judges[name])
    result = evaluation.evaluate(asking("one", "two"), run)
    (first, *_), (opinion,) = result["rows"], result["opinions"]
    assert (first["original"]["count"], first["erased"]["count"]) == (4, 1)
    assert opinion["judge"] == "two" and opinion["apart"] == {
        "bicycle": {"original": {"first": 1, "second": 0, "of": 4}, "erased": {"first": 0, "second": 0, "of": 4}}
    }
    assert (opinion["rows"][0]["original"]["count"], opinion["rows"][0]["erased"]["count"]) == (3, 1)
    text = render_markdown(result)
    assert "one and two differ on bicycle in 1 of 4 original images: only one sees it in 1, only two in 0." in text
    assert "| two | bicycle | erased | 4 |" in text and "detector one (w" in text and "detector two (w" in text
    assert evaluation.evaluate(asking("one", "two"), run)["opinions"] == result["opinions"]  # as it was stored


def test_a_judge_of_the_concept_alone_says_nothing_of_other_things() -> None:
    """It could see none, so that "0 %" would be no figure; one that knows another thing has it."""
    index = [{"prompt": "a bicycle and a dog", "prompt_index": number} for number in range(12)]
    found = [[Detection("", "bicycle", 0.9, (0, 0, 8, 8))] for _ in index]
    for known, shown in ((frozenset({"bicycle"}), "–"), (frozenset({"bicycle", "cat"}), "0.0% [0–24]")):
        result = evaluation.compare(index, found, found, [BICYCLE], [], known)
        result |= {"detector": {**Fake("one").card, "calibration": {}}, "labels": {"bicycle": ["bicycle"]}, "warnings": []}
        (line,) = (
            line for line in render_markdown(result).splitlines() if line.startswith("| Images with an object that nobody")
        )
        assert [cell.strip() for cell in line.split("|")[2:4]] == [shown, shown]
    assert "| Those objects (images) | none | none |" in render_markdown(result)


def test_a_file_that_is_no_image_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match=r"a\.png is missing or damaged: run `sd-erase generate` again"):
        evaluation.detect_files(Fake("one", "dog"), [tmp_path / "a.png"], "", NoProgress())


# --- UnlearnCanvas --------------------------------------------------------------------------------------------------------------


def test_the_measures_of_unlearncanvas_by_hand() -> None:
    """Style "ink" was erased; "wash" and "dots" are styles beside it, "dog" and "cat" objects."""
    one = {name: frozenset({name}) for name in ("wash", "dots", "dog", "cat")}

    def pair(asked: str, objects: str, erased: str) -> ImagePair:
        everything = Counter([*asked.split(), *objects.split()])
        named = frozenset({"ink"}) & frozenset(asked.split())
        others = {name: one[name] for name in f"{asked} {objects}".split() if name in one}
        return ImagePair(0, named, others, everything, Counter(erased.split()))

    pairs = [
        pair("ink", "dog", "dog"),  # unlearned, the object kept
        pair("ink", "cat", "ink"),  # neither
        pair("ink", "dog", ""),  # unlearned, the object lost
        pair("wash", "dog", "wash dog"),
        pair("wash", "dog", "dog"),  # the other style lost
        pair("wash", "cat", "wash cat"),
        pair("dots", "cat", "dots cat"),
    ]
    kinds = {"ink": "style", "wash": "style", "dots": "style", "dog": "object", "cat": "object"}
    found = measures(pairs, {"ink": frozenset({"ink"})}, kinds)["ink"]
    erased = {name: sides["erased"] for name, sides in found.items()}
    assert erased["UA"]["rate"] == pytest.approx(2 / 3) and erased["UA"]["n"] == 3
    assert erased["IRA"]["rate"] == pytest.approx((2 / 3 + 1) / 2) and (erased["IRA"]["count"], erased["IRA"]["n"]) == (3, 4)
    assert erased["CRA"]["rate"] == pytest.approx((3 / 4 + 2 / 3) / 2) and erased["CRA"]["concepts"] == 2
    original = {name: sides["original"]["rate"] for name, sides in found.items()}
    assert original == {"UA": 0.0, "IRA": 1.0, "CRA": 1.0}
    alone = measures([dataclasses.replace(pairs[0], erased=None, objects={})], {"ink": frozenset({"ink"})}, kinds)["ink"]
    assert alone["UA"]["erased"] is None and alone["IRA"]["original"]["rate"] is None


# --- calibration ----------------------------------------------------------------------------------------------------------------


def test_the_threshold_stands_in_the_middle_of_the_widest_gap_of_least_error() -> None:
    assert threshold([2.0, 3.0], [0.0, 1.0]) == 1.5
    assert threshold([0.5, 5.0, 6.0], [0.0, 1.0, 2.0]) == 3.5  # one miss; the gap from 2 to 5
    found = calibrated([3.0, 4.0, 5.0, 6.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    assert (found["missed"]["count"], found["false_alarms"]["count"], found["blind"]) == (1, 0, False)
    assert found["error"] == pytest.approx(0.1)
    blind = calibrated([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert blind["blind"] and "mean nothing" in sentence("bicycle", "thing", "clip", blind)
    assert calibrated([1.0], [0.0])["blind"]  # nothing is known of one image each
    with pytest.raises(ValueError, match="both sides"):
        threshold([], [1.0])


@pytest.mark.parametrize(
    ("alarms", "blind", "answer"),
    [
        (0.0, False, "Only in part"),
        (0.2, False, "It looks so, but no more is seen than the judge errs by"),
        (0.0, True, "Cannot be told: the judge cannot tell bicycle"),
    ],
)
def test_a_verdict_rests_on_no_more_than_the_judge_can_tell(alarms: float, blind: bool, answer: str) -> None:
    before, after = share([True] * 50), share([True] * 10 + [False] * 40)
    after = {**after, "rate": 0.2} if not blind else after
    if answer == "Only in part":
        after = share([True] * 15 + [False] * 35)
    row = {
        "name": "bicycle",
        "role": "target",
        "images": 50,
        "original": before,
        "erased": after,
        "change": -0.8,
        "kept": 0.2,
        "p_value": 0.0,
    }
    calibration = {"bicycle": {"false_alarms": {"rate": alarms}, "blind": blind}}
    told = {"rows": [row], "images": 50, "left_out": 0, "detector": {"calibration": calibration}}
    assert judge_target(told).answer.startswith(answer)


@pytest.fixture(scope="module")
def clip_judge() -> ClipJudge:
    """The pocket's own CLIP, asked for a bicycle."""
    judge = judging.judge_of(asking("clip", calibration=8), BASE, [BICYCLE], {"bicycle": "thing"})
    assert isinstance(judge, ClipJudge)
    return judge


def test_a_clip_is_calibrated_on_what_the_original_draws(
    clip_judge: ClipJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pocket, 8 + 8 images of 10 steps: the threshold tells bicycles from things, and is taken again where nothing changed."""
    config = RunConfig(device="cpu", generate=GenerateConfig(steps=10), evaluate=EvaluateConfig(judge=("clip",), calibration=8))
    with pytest.raises(RuntimeError, match="not calibrated for bicycle"):
        clip_judge.detect([Image.new("RGB", (64, 64))])
    judging.calibrate(clip_judge, config, BASE, tmp_path, NoProgress())
    found = clip_judge.card["calibration"]["bicycle"]
    assert found["error"] <= 0.2 and not found["blind"] and found["missed"]["n"] == found["false_alarms"]["n"] == 8
    images = {
        side: [Image.open(path) for path in sorted(tmp_path.glob(f"calibration/*/{side}/*.png"))]
        for side in ("concept", "anchor")
    }
    seen = {side: [bool(one) for one in clip_judge.detect(each)] for side, each in images.items()}
    assert sum(seen["concept"]) >= 7 and sum(seen["anchor"]) <= 1
    (told,) = judging.calibrations(clip_judge)
    assert "it misses bicycle in" in told and 'of 8 of "thing" instead' in told
    again = judging.judge_of(config, BASE, [BICYCLE], {"bicycle": "thing"})
    monkeypatch.setattr(judging, "draw", lambda *arguments, **settings: pytest.fail("an image was drawn again"))
    assert evaluation.decides(again) == evaluation.decides(clip_judge)
    judging.calibrate(again, config, BASE, tmp_path, NoProgress())
    assert again.card["calibration"] == clip_judge.card["calibration"]
    more = judging.judge_of(dataclasses.replace(config, evaluate=EvaluateConfig(judge=("clip",), calibration=9)), BASE, [BICYCLE])
    again = judging.judge_of(config, BASE, [BICYCLE])
    assert evaluation.decides(more) != evaluation.decides(again)  # figures of another threshold are not taken again


def test_the_erased_encoder_never_judges_itself(clip_judge: ClipJudge, tmp_path: Path) -> None:
    """Refused are the erased encoder and its copy in half precision; not the frozen one, nor a CLIP of another training."""
    run = RunDir(tmp_path / "run")
    file = bases.POCKET_FOLDER / "text_encoder" / "model.safetensors"
    original = {name: tensor.float() for name, tensor in load_file(file).items()}
    noise = torch.Generator().manual_seed(0)
    change = {
        name: 0.02 * tensor.std() * torch.randn(tensor.shape, generator=noise)
        for name, tensor in original.items()
        if tensor.dim() > 1
    }
    erased = {name: tensor + change.get(name, 0) for name, tensor in original.items()}
    far = {name: tensor + 20 * change.get(name, 0) for name, tensor in original.items()}
    (run.encoder / "text_encoder").mkdir(parents=True)
    save_file(erased, run.encoder / "text_encoder" / "model.safetensors")
    judging.refuse_erased_of(clip_judge, BASE, run)

    def judge(state: dict[str, torch.Tensor]) -> Any:
        folder = tmp_path / "clip"
        shutil.rmtree(folder, ignore_errors=True)
        skipped = shutil.ignore_patterns("detector", "model.safetensors")
        shutil.copytree(bases.POCKET_FOLDER, folder, ignore=skipped)
        shutil.copy(bases.POCKET_FOLDER / "clip" / "model.safetensors", folder / "clip")
        save_file(state, folder / "text_encoder" / "model.safetensors")
        return judging.judge_of(asking(f"clip:{folder}"), BASE, [BICYCLE])

    for state in (erased, {name: tensor.half() for name, tensor in erased.items()}):
        with pytest.raises(UserError, match="is the erased encoder itself"):
            judging.refuse_erased_of(judge(state), BASE, run)
    judging.refuse_erased_of(judge(far), BASE, run)


def test_a_style_has_those_beside_it_for_a_domain() -> None:
    judge = judging.judge_of(asking(), BASE, [VAN_GOGH], {"van gogh": "an artist"})
    assert {"van gogh", "claude monet"} <= judge.labels and "dog" not in judge.labels
    judge.set_calibration("van gogh", {"threshold": 1e9})  # never the concept
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    (found,) = judge.detect([Image.fromarray(noise)])
    assert len(found) <= 1 and all(each.label in judge.labels - {"van gogh"} and each.box == (0, 0, 64, 64) for each in found)
    names = {one.name: one.labels for one in judging.things([VAN_GOGH], judge)}
    assert names["claude monet"] == ("claude monet",) and names["dog"] == ("dog",)


# --- the other makers -----------------------------------------------------------------------------------------------------------


def test_nudenets_findings_in_our_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package replaced by one that records what it gets: RGB, and boxes as left, top, width, height."""
    given: list[Any] = []

    class NudeDetector:
        def __init__(self, path: str, inference_resolution: int):
            assert Path(path).name == "320n.onnx" and inference_resolution == 320

        def detect_batch(self, images: list[Any], size: int) -> list[list[dict[str, Any]]]:
            given.extend(images)
            sure = {"class": "BUTTOCKS_EXPOSED", "score": 0.8, "box": [1, 2, 30, 40]}
            return [[{**sure, "class": "FACE_MALE", "score": 0.22}, sure] for _ in images]

    (tmp_path / "320n.onnx").write_bytes(b"weights")
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"), NudeDetector=NudeDetector)
    monkeypatch.setitem(sys.modules, "nudenet", package)
    nude = concept_named("nudity")
    judge = judging.judge_of(asking(), BASE, [nude])
    (found,) = judge.detect([Image.new("RGBA", (50, 60), (255, 0, 0, 255))])
    assert [(each.label, each.score, each.box) for each in found] == [("buttocks exposed", 0.8, (1.0, 2.0, 31.0, 42.0))]
    assert given[0].shape == (60, 50, 3) and given[0][0, 0].tolist() == [255, 0, 0]
    assert len(judge.labels) == len(LABELS) == 18 and "face male" in judge.labels
    assert "female breast exposed" in known_labels(nude, judge) and "male breast exposed" not in known_labels(nude, judge)


def test_nudenet_itself_if_it_is_installed() -> None:
    """Its labels are those that we write out, and it finds nothing in an empty image."""
    nudenet = pytest.importorskip("nudenet")
    assert tuple(vars(sys.modules[nudenet.NudeDetector.__module__])["__labels"]) == LABELS
    judge = load_detector("nudenet")
    assert judge.detect([Image.new("RGB", (100, 50), "white"), Image.new("L", (20, 40))]) == [[], []]
    assert judge.card["image_size"] == 320 and len(judge.card["weights_sha256"]) == 64


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ResNet of transformers with three styles."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names = {0: "van gogh", 1: "Claude_Monet", 2: "plain"}
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], id2label=names, label2id={v: k for k, v in names.items()}
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def test_a_classifier_of_transformers_sees_its_likeliest_class(classifier: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    judge = judging.judge_of(asking(f"classifier:{classifier}"), BASE, [VAN_GOGH])
    assert judge.labels == {"van gogh", "claude monet", "plain"} and judge.card["weights"] == classifier.name
    noise = numpy.random.default_rng(1).integers(0, 255, (3, 40, 48, 3), dtype=numpy.uint8)
    images = [Image.fromarray(one) for one in noise]
    model, processor = (
        AutoModelForImageClassification.from_pretrained(classifier).eval(),
        AutoImageProcessor.from_pretrained(classifier),
    )
    with torch.no_grad():
        theirs = model(processor(images=images, return_tensors="pt").pixel_values).logits.softmax(-1).max(-1)
    found = judge.detect(images)
    assert [one[0].score for one in found] == pytest.approx(theirs.values.tolist(), abs=1e-5) and all(
        len(one) == 1 for one in found
    )
    assert [one[0].label for one in found] == [["van gogh", "claude monet", "plain"][place] for place in theirs.indices]
    with pytest.raises(UserError, match="'bicycle' has no label that detector classifier can find"):
        judging.judge_of(asking(f"classifier:{classifier}"), BASE, [BICYCLE])


def test_only_safetensors_of_a_classifier_are_read(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_detector(f"classifier:{tmp_path / 'pickle'}")
    with pytest.raises(UserError, match="no image classifier"):
        load_detector(f"classifier:{bases.POCKET_FOLDER / 'clip'}")


def test_a_classifier_of_ultralytics_is_given_what_its_own_predictor_is(tmp_path: Path) -> None:
    from sd_erase.detection.yolo import import_ultralytics

    import_ultralytics()
    import ultralytics
    from ultralytics.data.augment import classify_transforms
    from ultralytics.nn.tasks import ClassificationModel

    path = Path(ultralytics.__file__).parent / "cfg" / "models" / "v8" / "yolov8-cls.yaml"
    description = {
        **yaml.safe_load(path.read_text(encoding="utf-8")),
        "nc": 2,
        "scale": "n",
        "scales": {"n": [0.33, 0.0625, 1024]},
    }
    torch.manual_seed(0)
    model = ClassificationModel(description, verbose=False).eval()
    (tmp_path / "arch.yaml").write_text(yaml.safe_dump({**description, "names": ["ink", "wash"]}))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "mine.safetensors")
    card = {"name": "styles", "kind": "classifier", "weights": "mine.safetensors", "architecture": "arch.yaml", "image_size": 64,
            "confidence": 0.01, "licence": "none"}  # fmt: skip
    (tmp_path / "styles.yaml").write_text(yaml.safe_dump(card))
    judge = load_detector(tmp_path / "styles.yaml")
    noise = numpy.random.default_rng(2).integers(0, 255, (80, 100, 3), dtype=numpy.uint8)
    with torch.no_grad():
        output = model(classify_transforms(64)(Image.fromarray(noise))[None])
    theirs = (output[0] if isinstance(output, tuple) else output)[0]
    (found,) = judge.detect([Image.fromarray(noise)])
    assert [each.label for each in found] == [["ink", "wash"][int(theirs.argmax())]]
    assert found[0].score == pytest.approx(float(theirs.max()), abs=1e-5)
