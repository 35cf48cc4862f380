"""Detectors: geometry, strict loading, agreement with independent implementations, and real photographs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sd_erase import bases, resources
from sd_erase.config import RunConfig, dump, load, override
from sd_erase.detection import Card, letterbox, load_detector, read_card, select
from sd_erase.detection.yolo import import_ultralytics
from sd_erase.errors import UserError
from sd_erase.flags import resolve_config

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("SD_ERASE_DATA", REPOSITORY.parent / "shared" / "data"))
CARD = {"name": "mine", "kind": "yolo", "weights": "mine.safetensors", "architecture": "arch.yaml", "image_size": 64,
        "confidence": 0.25, "iou": 0.45, "licence": "none"}  # fmt: skip


def write_card(folder: Path, **changes: Any) -> Path:
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**CARD, **changes}.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def architecture() -> dict[str, Any]:
    """YOLOv5 in ultralytics' description, a quarter as wide as its smallest, with three classes."""
    import_ultralytics()
    import ultralytics

    path = Path(ultralytics.__file__).parent / "cfg" / "models" / "v5" / "yolov5.yaml"
    description = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**description, "nc": 3, "names": ["apple", "dog", "couch"], "scale": "n", "scales": {"n": [0.33, 0.0625, 1024]}}


@pytest.fixture(scope="module")
def model(architecture: dict[str, Any]) -> Any:
    from ultralytics.nn.tasks import DetectionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DetectionModel(architecture, verbose=False).eval()
    head = model.model[-1]
    for branch in head.cv3:  # an untrained head is sure of nothing: make it find something
        torch.nn.init.constant_(branch[-1].bias, -0.5)
        torch.nn.init.normal_(branch[-1].weight, std=3.0, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def folder(tmp_path: Path, architecture: dict[str, Any], model: Any) -> Path:
    """A card with its architecture and half-precision weights beside it."""
    (tmp_path / "arch.yaml").write_text(yaml.safe_dump(architecture))
    halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in halves.items()}, tmp_path / "mine.safetensors")
    write_card(tmp_path)
    return tmp_path


def picture(width: int = 90, height: int = 60) -> Image.Image:
    noise = numpy.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(noise)


def test_letterbox_keeps_the_aspect_and_pads_with_grey() -> None:
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    batch, [(scale, left, top)] = letterbox([image], 64)
    assert batch.shape == (1, 3, 64, 64) and (scale, left, top) == (0.32, 0, 16)
    assert torch.allclose(batch[0, :, 32, 32], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(batch[0, :, [15, 48], :], torch.tensor(114 / 255))


def test_letterbox_agrees_with_ultralytics() -> None:
    from ultralytics.data.augment import LetterBox

    for size in ((90, 60), (61, 97), (64, 64), (300, 211)):
        image = picture(*size)
        theirs = LetterBox((64, 64), auto=False)(image=numpy.asarray(image))
        ours = (letterbox([image], 64)[0][0].permute(1, 2, 0) * 255).numpy()
        assert numpy.abs(ours - theirs).max() <= 1.01  # they round to whole numbers


def test_select_merges_overlaps_and_returns_to_the_images_pixels() -> None:
    card = Card("x", "yolo", "w", 64, 0.25, 0.45, "none", labels={"sofa": "couch"})
    boxes = torch.tensor([[32.0, 32, 20, 10], [33, 32, 20, 10], [32, 32, 20, 10], [10, 32, 40, 10], [50, 32, 4, 4]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.1, 0.7], [0.5, 0.2], [0.2, 0.24]])
    found = select(boxes, scores, (0.32, 0, 16), Image.new("RGB", (200, 100)), ["dog", "sofa"], card)
    assert [(each.label, round(each.score, 2)) for each in found] == [("dog", 0.9), ("couch", 0.7), ("dog", 0.5)]
    assert found[0].box == pytest.approx((22 / 0.32, (27 - 16) / 0.32, 42 / 0.32, (37 - 16) / 0.32))
    assert found[2].box[0] == 0.0  # clipped to the image


def test_weights_in_half_precision_find_what_ultralytics_predictor_finds(folder: Path, model: Any) -> None:
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import scale_boxes

    image = picture()
    detector = load_detector(folder / "card.yaml")
    found = detector.detect([image])[0]
    halved = model.__class__(model.yaml, verbose=False).eval()
    halved.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    batch, _ = letterbox([image], 64)
    with torch.no_grad():
        expected = non_max_suppression(halved(batch), 0.25, 0.45)[0]
    boxes = scale_boxes((64, 64), expected[:, :4].clone(), (60, 90))
    assert 3 < len(found) == len(expected)
    assert [each.label for each in found] == [["apple", "dog", "couch"][int(number)] for number in expected[:, 5]]
    assert numpy.allclose([each.score for each in found], expected[:, 4], atol=1e-5)
    assert numpy.allclose([each.box for each in found], boxes, atol=0.51)  # they round the padding


def test_detection_does_not_depend_on_the_batch(folder: Path) -> None:
    detector = load_detector(folder / "card.yaml")
    images = [picture(90, 60), picture(64, 64), picture(40, 80)]
    together = detector.detect(images)
    for one, found in zip(images, together, strict=True):
        (alone,) = detector.detect([one])
        assert numpy.allclose([each.score for each in alone], [each.score for each in found], atol=1e-5)  # the best first
        # and by place, since scores that differ by less than rounding stand in either order
        alone, found = (sorted(each, key=lambda item: (item.label, *numpy.round(item.box, 1))) for each in (alone, found))
        assert [each.label for each in alone] == [each.label for each in found]
        assert numpy.allclose([each.box for each in alone], [each.box for each in found], atol=1e-3)
        assert numpy.allclose([each.score for each in alone], [each.score for each in found], atol=1e-5)
    assert detector.detect([]) == []


def test_what_is_recorded_names_the_weights_by_content(folder: Path) -> None:
    import hashlib

    detector = load_detector(folder / "card.yaml", confidence=0.5, image_size=96)
    assert detector.card["confidence"] == 0.5 and detector.card["image_size"] == 96 and detector.card["name"] == "mine"
    assert detector.card["weights_sha256"] == hashlib.sha256((folder / "mine.safetensors").read_bytes()).hexdigest()
    assert str(folder) not in str(detector.card)
    assert detector.labels == {"apple", "dog", "couch"}
    sure = [each.score for each in detector.detect([picture()])[0]]
    assert all(score > 0.5 for score in sure)
    assert detector.detect([Image.new("RGB", (8, 300))])[0] is not None


def test_the_detector_leaves_pillow_and_stdout_alone(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    code = (
        "import sys; from PIL import Image, UnidentifiedImageError; from sd_erase.detection import load_detector\n"
        "load_detector(sys.argv[1])\n"
        "try: Image.open(sys.argv[2])\n"
        "except UnidentifiedImageError: sys.exit(0)\n"
        "sys.exit(3)"
    )
    command = [sys.executable, "-c", code, str(folder / "card.yaml"), str(folder / "broken.png")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_label_map_renames(folder: Path) -> None:
    write_card(folder, labels={"couch": "sofa"})
    assert load_detector(folder / "card.yaml").labels == {"apple", "dog", "sofa"}
    write_card(folder, labels={"settee": "sofa"})
    with pytest.raises(UserError, match="settee"):
        load_detector(folder / "card.yaml")


def test_weights_must_fit_strictly(folder: Path, model: Any) -> None:
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file({key: value for key, value in list(state.items())[1:]}, folder / "mine.safetensors")
    with pytest.raises(UserError, match="does not fit arch.yaml.*Missing key"):
        load_detector(folder / "card.yaml")
    (folder / "mine.safetensors").write_bytes((folder / "mine.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="mine.safetensors is no complete safetensors file"):
        load_detector(folder / "card.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"architecture": None}, "names no architecture"),
        ({"weights": "model.bin"}, "neither .safetensors nor .pt"),
        ({"names": ["apple"]}, "3 classes but 1 names"),
        ({"kind": "yola"}, "did you mean 'yolo'"),
        ({"image_size": 100}, "multiple of 32"),
        ({"confidence": 1.5}, "confidence 1.5"),
        ({"size": 3}, "'size' is unknown"),
        ({"licence": None}, "lacks licence"),
    ],
)
def test_bad_cards_are_one_sentence(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_detector(write_card(folder, **changes))


def test_unknown_detectors_list_the_bundled_ones() -> None:
    with pytest.raises(UserError, match="pocket, pocket-art, yolov5n-onnx, yolov5su"):
        load_detector("yolov9000")


@pytest.mark.parametrize("name", resources.names("detectors"))
def test_every_bundled_card_is_complete(name: str) -> None:
    card = read_card(name)
    assert card.name == name and card.licence
    assert not card.names or (len(card.names) == 80 and "cell phone" in card.names)


def test_a_pickle_is_opened_with_consent_only_and_even_then_runs_no_code(folder: Path, model: Any, tmp_path: Path) -> None:
    model.names = {0: "apple", 1: "dog", 2: "couch"}
    torch.save({"model": model}, folder / "mine.pt")
    path = write_card(folder, weights="mine.pt", architecture=None)
    with pytest.raises(UserError, match=r"mine.pt is a pickle, which can run .*--trust-pickle"):
        load_detector(path)
    detector = load_detector(path, trust_pickle=True)
    assert detector.labels == {"apple", "dog", "couch"} and len(detector.detect([picture()])[0]) > 3
    for protocol in (2, 4):  # which ultralytics' former loaders tell apart
        for call, arguments in (
            (Path.touch, (tmp_path / "harmed",)),
            (exec, (f"open({str(tmp_path / 'harmed')!r}, 'w')",)),
            (os.system, (f"touch {tmp_path / 'harmed'}",)),
            (
                type(model),
                ({"activation": f"open({str(tmp_path / 'harmed')!r}, 'w')", "nc": 1, "ch": 3, "backbone": [], "head": []},),
            ),
        ):
            torch.save({"model": Harmful(call, arguments)}, folder / "mine.pt", pickle_protocol=protocol)
            with pytest.raises(UserError, match="can be read safely"):
                load_detector(path, trust_pickle=True)
            assert not (tmp_path / "harmed").exists()


def test_an_ultralytics_that_runs_foreign_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ultralytics

    monkeypatch.setattr(ultralytics, "__version__", "8.4.66")
    torch.save({}, folder / "mine.pt")
    with pytest.raises(UserError, match="install ultralytics 8.4.69 or later"):
        load_detector(write_card(folder, weights="mine.pt", architecture=None), trust_pickle=True)


def test_consent_is_the_users_own(folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    for text in ("evaluate: {trust_pickle: true}", "evaluate.trust_pickle: true"):
        settings.write_text(text)
        with pytest.raises(UserError, match="yours to give"):
            resolve_config({"config_file": settings})
    settings.write_text("evaluate: {trust_pickle: true}")
    with pytest.raises(UserError, match="yours to give"):
        load(settings)
    given = override(RunConfig(), {"evaluate.trust_pickle": True})
    assert given.evaluate.trust_pickle and "trust_pickle" not in dump(given)


def test_the_bundled_card_opens_no_pickle_that_lies_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.save({}, folder / "yolov5su.pt")
    with pytest.raises(UserError, match="remove .*yolov5su.pt to fetch ultralytics' own"):
        load_detector("yolov5su")
    with pytest.raises(UserError, match="other.PT is a pickle"):
        load_detector("yolov5su", weights="other.PT")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "open('harmed', 'w')"}, "an activation that is no layer"),
        ({"activation": "nn.SiLU() or open('harmed', 'w')"}, "an activation that is no layer"),
        ({"activation": "nn.SiLU(open('harmed', 'w'))"}, "an activation that is no layer"),
        ({"backbone": [[-1, 1, "torch_safe_load", ["x.pt"]]]}, "'torch_safe_load', which is no layer"),
        ({"backbone": [[-1, 1, "DetectionModel", ["x.yaml"]]]}, "'DetectionModel', which is no layer"),
        ({"backbone": [[-1, 1, "TorchVision", ["resnet18"]]]}, "'TorchVision', which is no layer"),
        ({"backbone": [[-1, 1, "nn.__dict__", []]]}, "which is no layer"),
        ({"backbone": [[-1, 10**9, "nn.Identity", []]]}, "repeats a layer 1000000000 times"),
        ({"backbone": [[-1, 1, "nn.Linear", [10**5, 10**5]]]}, "far larger than its weights"),
        ({"backbone": [[-1, 1, "Conv", [10**7, 3, 2]]]}, "no model that ultralytics can build"),
        ({"scales": {"n": [1e9, 1, 1024]}}, "a depth or a width"),
        ({"depth_multiple": "x"}, "a depth or a width"),
        ({"backbone": "x"}, "no description of a model"),
        ({"head": [[1, 2, 3]]}, "no description of a model"),
        ({"nc": -5}, "no model that ultralytics can build|classes"),
    ],
)
def test_a_description_from_a_stranger_runs_and_fetches_nothing(
    folder: Path, architecture: dict[str, Any], change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "arch.yaml").write_text(yaml.safe_dump({**architecture, **change}))
    with pytest.raises(UserError, match=message) as caught:
        load_detector(folder / "card.yaml")
    assert not (folder / "harmed").exists() and len(str(caught.value)) < 700


def test_a_description_may_name_an_activation(folder: Path, architecture: dict[str, Any]) -> None:
    (folder / "arch.yaml").write_text(yaml.safe_dump({**architecture, "activation": "torch.nn.LeakyReLU(0.1, inplace=True)"}))
    assert load_detector(folder / "card.yaml").labels == {"apple", "dog", "couch"}


def test_a_detector_has_its_own_activation_whatever_was_built_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ultralytics 8.4.69 builds every model behind one with LeakyReLU with LeakyReLU: the pocket's found 2 of 16 bicycles."""
    from ultralytics.nn.modules.conv import Conv

    def activations() -> set[str]:
        modules = load_detector(folder / "card.yaml")._model.modules()  # type: ignore[attr-defined]
        return {type(module.act).__name__ for module in modules if isinstance(module, Conv)} - {"Identity"}

    left = torch.nn.LeakyReLU(0.1)
    monkeypatch.setattr(Conv, "default_act", left)  # as another model, or another program in this process, leaves it
    assert activations() == {"SiLU"}
    description = yaml.safe_load((folder / "arch.yaml").read_text())
    (folder / "arch.yaml").write_text(yaml.safe_dump({**description, "activation": "nn.ReLU()"}))
    assert activations() == {"ReLU"}
    assert Conv.default_act is left


class Harmful:
    """A pickle that would make a file in the test's own folder."""

    def __init__(self, call: Any, arguments: tuple[Any, ...]):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_weights_that_cannot_be_fetched_are_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.utils import downloads

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(downloads, "safe_download", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="yolov5su.pt cannot be fetched .*working folder"):
        load_detector("yolov5su")


def onnx_detector(**overrides: Any) -> Any:
    pytest.importorskip("onnxruntime", reason="needs sd-erase[onnx]")
    if not (DATA / "yolov5n").is_dir():
        pytest.skip(f"needs yolov5n/ and fruit/ in {DATA} (or SD_ERASE_DATA)")
    return load_detector("yolov5n-onnx", weights=str(DATA / "yolov5n" / "yolov5n_320.onnx"), **overrides)


@pytest.mark.realdata
def test_real_apples_are_found_at_320_pixels() -> None:
    """75 photographs are named apple; the README of the data counts 59 of them (here: those numbered up to 60) and 55 found."""
    detector = onnx_detector()
    photos = sorted((DATA / "fruit" / "train").glob("apple_*.jpg"))
    found = {}
    for path in photos:
        with Image.open(path) as photo:
            found[path.stem] = any(each.label == "apple" for each in detector.detect([photo])[0])
    low = [hit for name, hit in found.items() if int(name.removeprefix("apple_")) <= 60]
    assert len(found) == 75 and len(low) == 59
    assert abs(sum(low) - 55) <= 1 and abs(sum(found.values()) - 71) <= 1  # one near the threshold may flip on another machine


@pytest.mark.realdata
def test_an_onnx_model_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="exported for 320 pixels, not 640"):
        onnx_detector(image_size=640)
    with pytest.raises(UserError, match="gives 85 numbers a box"):
        onnx_detector(names=("apple",))


def test_missing_onnx_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="needs sd-erase[onnx]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="yolov5n_320.onnx do not exist"):
        load_detector("yolov5n-onnx")
    (tmp_path / "yolov5n_320.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no ONNX model"):
        load_detector("yolov5n-onnx")


def test_the_pocket_detector_loads_and_sees_nothing_in_a_plain_image() -> None:
    if not (bases.POCKET_FOLDER / "detector" / "model.safetensors").is_file():
        pytest.skip("the pocket weights are not built yet")
    detector = load_detector("pocket")
    assert {"apple", "person", "cell phone", "teddy bear"} <= detector.labels
    plain = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(plain).rectangle((0, 40, 63, 63), fill="#dddddd")
    assert Counter(each.label for each in detector.detect([plain])[0]).total() == 0
