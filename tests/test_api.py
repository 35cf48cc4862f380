"""`sd_erase.erase`, `evaluate` and `audit` on models in memory."""

from __future__ import annotations

import copy
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import build, narrow
from test_hosts import state_hash

import sd_erase
from sd_erase import bases, catalog
from sd_erase.api import models
from sd_erase.api.erasing import _keeping
from sd_erase.api.scratch import Scratch
from sd_erase.concepts import load_concepts, read_concepts
from sd_erase.config import RunConfig
from sd_erase.erasure.method import Stateless
from sd_erase.errors import UserError
from sd_erase.rundir import RunDir

PROMPT = "a bicycle next to a dog"
SMALL = {"harvest.max_forget": 20, "harvest.max_retain": 40}  # captions enough for a method that reads none


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = sd_erase.load_pocket()
    states(pipeline)  # which sets the tokenizer's padding
    return pipeline


@pytest.fixture(scope="module")
def erased(pipe: Any) -> sd_erase.Erasure[Any]:
    return sd_erase.erase(pipe, "bicycle", method="token", anchor="kite", settings=SMALL, progress=False)


def states(pipeline: Any, prompt: str = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        ids = pipeline.tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids).last_hidden_state


def test_importing_the_package_imports_nothing_heavy_and_names_everything() -> None:
    code = "import sd_erase, sys; sys.exit(', '.join({'torch', 'diffusers', 'transformers', 'yaml', 'numpy'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).returncode == 0
    for name in sd_erase.__all__:
        assert getattr(sd_erase, name).__doc__
    assert set(sd_erase.__all__) <= set(dir(sd_erase))
    assert (Path(sd_erase.__file__).parent / "py.typed").is_file()


def test_the_concept_goes_where_the_anchor_is_and_the_input_stays(pipe: Any) -> None:
    own = copy.copy(pipe)
    own.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():  # what lies in memory counts, not where it was loaded from
        own.text_encoder.get_input_embeddings().weight.mul_(1.01)
    before, randomness = state_hash(own), torch.get_rng_state()
    found = sd_erase.erase(own, "bicycle", method="token", anchor="kite", settings=SMALL, progress=False)
    assert state_hash(own) == before
    assert torch.equal(torch.get_rng_state(), randomness)
    assert type(found.model) is type(own) and found.model.unet is own.unet
    # the method gives the word's token the anchor's embedding, so that both captions are one
    assert torch.allclose(states(found.model), states(own, "a kite next to a dog"), atol=1e-5)
    assert not torch.allclose(states(found.model), states(pipe, "a kite next to a dog"), atol=1e-3)
    assert (found.concepts, dict(found.anchors), found.method, found.base) == (
        ("bicycle",),
        {"bicycle": "kite"},
        "token",
        "pocket",
    )
    assert not found._scratch.run.checkpoints.exists()


def test_a_text_encoder_alone_is_taken_and_returned_in_its_type(pipe: Any, tmp_path: Path) -> None:
    encoder = copy.deepcopy(pipe.text_encoder).to(torch.float16)
    del encoder.config.sd_erase_base  # as of anybody's model
    before = copy.deepcopy(encoder.state_dict())
    found = sd_erase.erase(encoder, ["bicycle", "apple"], method="token", anchor="kite", settings=SMALL, progress=False)
    assert type(found.model) is type(encoder) and found.model.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    table, own = (each.get_input_embeddings().weight for each in (found.model, encoder))
    tokens = pipe.tokenizer(["bicycle", "apple", "kite", "dog"]).input_ids
    bicycle, apple, kite, dog = (ids[1] for ids in tokens)
    assert torch.equal(table[bicycle], own[kite]) and torch.equal(table[apple], own[kite]) and torch.equal(table[dog], own[dog])
    file = found.save(tmp_path, "comfyui")
    assert file.name.startswith("bicycle-apple-model-text_encoder")
    with pytest.raises(UserError, match="draws no images"):
        found.save(tmp_path / "whole", "diffusers", pipeline=True)


@pytest.mark.slow
def test_both_encoders_of_sdxl_are_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build(narrow("sdxl", tmp_path, monkeypatch))
    found = sd_erase.erase(pipeline, "bicycle", method="token", anchor="kite", settings=SMALL, progress=False)
    (word,), (other,) = (pipeline.tokenizer([text]).input_ids[0][1:2] for text in ("bicycle", "kite"))
    for name in ("text_encoder", "text_encoder_2"):
        own, new = (getattr(each, name).get_input_embeddings().weight for each in (pipeline, found.model))
        assert torch.equal(new[word], own[other]) and not torch.equal(new[word], own[word])
    assert {path.name for path in found.save(tmp_path / "files", "comfyui").iterdir()} == {
        f"bicycle-model-text_encoder{name}-fp16.safetensors" for name in ("", "_2")
    }


class Small(Stateless):
    """An objective of a user's own that changes one linear layer, at once."""

    needs_images, only_matrices, solves = False, True, True
    default_steps, default_learning_rate, default_weights = 0, 1e-3, {"nothing": 1.0}

    def prepare(self, towers: Any, concepts: Any, anchors: Any, both_towers: bool) -> list[Any]:
        self.weight = towers.text.get_submodule("encoder.layers.1.mlp.fc2" if not hasattr(towers.text, "text_model") else
                                                "text_model.encoder.layers.1.mlp.fc2").weight  # fmt: skip
        return [self.weight]

    def solve(self, towers: Any, forget: Any, retain: Any, seed: int, progress: Any) -> None:
        with torch.no_grad():
            self.weight += 30 * torch.outer(self.weight[:, 0], self.weight[0])  # of rank 1

    def losses(self, towers: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"nothing": torch.zeros(())}


@pytest.fixture(scope="module")
def changed(pipe: Any) -> sd_erase.Erasure[Any]:
    return sd_erase.erase(pipe, "bicycle", method=f"{__name__}:Small", settings=SMALL, progress=False)


@pytest.mark.parametrize("form", [*catalog.EXPORTS])
def test_every_export_form_loads_into_the_original_as_the_result_is(
    pipe: Any, changed: sd_erase.Erasure[Any], form: str, tmp_path: Path
) -> None:
    if form == "a1111":
        with pytest.raises(UserError, match="pass checkpoint="):
            changed.save(tmp_path, form)
        return
    loaded = sd_erase.load_erased(pipe, changed.save(tmp_path / "new", form, dtype="float32", rank=1 if form == "lora" else 0))
    assert not torch.allclose(states(changed.model), states(pipe), atol=1e-2)
    assert torch.allclose(states(loaded), states(changed.model), atol=1e-4)


def test_what_is_to_stay_is_on_the_cards_of_the_run(pipe: Any) -> None:
    config, scratch = RunConfig(concepts=("bicycle",)), Scratch(pipe, weights=False)
    (concept,) = load_concepts(_keeping(config, load_concepts(config), ["tuk tuk", "cycle path"], scratch))
    assert concept.neighbours[0] == "motorcycle" and concept.neighbours[-1] == "tuk tuk"
    assert concept.find("a cycle") and not concept.find("a cycle path")
    assert concept.find("two bikes") and concept.labels == ("bicycle",)  # as its card has it
    with pytest.raises(UserError, match="keep names 'bike', a word of bicycle"):
        sd_erase.erase(pipe, "bicycle", keep="bike")


@pytest.mark.slow
def test_what_is_to_stay_comes_behind_what_clip_chooses(pipe: Any) -> None:
    found = sd_erase.erase(pipe, "gizmo", method="token", keep="clock", progress=False)
    (concept,) = read_concepts(found._scratch.run)
    assert len(concept.neighbours) > 3 and concept.neighbours[-1] == "clock"


def test_figures_come_typed_and_as_html(pipe: Any, erased: sd_erase.Erasure[Any], tmp_path: Path) -> None:
    found = sd_erase.evaluate(
        pipe, erased, [PROMPT, "a bicycle"], images_per_prompt=2, steps=8, folder=tmp_path / "kept", progress=False
    )
    target = found.rows[0]
    assert (target.name, target.role, found.images) == ("bicycle", "target", 4)
    assert target.original is not None and target.erased is not None
    assert target.original.count == 4 and target.erased.count == 0 and str(target.erased) == "0.0% [0–49] of 4"
    assert found.folder is not None and len(list(found.folder.glob("images/*/*.png"))) == 8
    assert "<img" in found._repr_html_() and "100.0% [51–100] of 4" in found._repr_html_()
    with pytest.raises(UserError, match="pass concept="):
        sd_erase.evaluate(pipe, erased.model, [PROMPT])


def test_a_comparator_trains_on_the_denoiser_in_memory(pipe: Any) -> None:
    found = sd_erase.erase(
        pipe, "bicycle", method="uce", progress=False, settings={"harvest.max_forget": 40, "harvest.max_retain": 40}
    )
    own, new = (dict(each.unet.named_parameters()) for each in (pipe, found.model))
    assert {name.rsplit(".", 2)[1] for name in own if not torch.equal(own[name], new[name])} == {"to_k", "to_v"}
    assert torch.allclose(states(found.model), states(pipe), atol=1e-5)
    with pytest.raises(UserError, match="reads a denoiser, and a text encoder alone has none"):
        sd_erase.erase(pipe.text_encoder, "bicycle", method="uce", progress=False)


def test_a_clip_judges_models_in_memory_and_a_judge_that_knows_nothing_is_refused_before_drawing(
    pipe: Any, erased: sd_erase.Erasure[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"evaluate.judge": ("clip",), "evaluate.calibration": 4}
    found = sd_erase.evaluate(pipe, erased, [PROMPT], images_per_prompt=1, steps=2, settings=own, progress=False)
    assert found.detector == "clip" and any("was calibrated on images" in text for text in found.warnings)
    monkeypatch.setattr("sd_erase.images.generate_pairs", lambda *given, **asked: pytest.fail("an image was drawn"))
    with pytest.raises(UserError, match="no label that detector pocket can find"):
        sd_erase.evaluate(pipe, erased.model, [PROMPT], concept="van gogh", detector="pocket", progress=False)


def test_a_judge_is_refused_before_anything_is_drawn(
    pipe: Any, erased: sd_erase.Erasure[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_erase.images.generate_pairs", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(UserError, match="'yolov9000' does not exist"):
        sd_erase.evaluate(pipe, erased, [PROMPT], detector="yolov9000", progress=False)
    with pytest.raises(UserError, match="has no label that detector pocket can find"):
        sd_erase.evaluate(pipe, erased.model, [PROMPT], concept="gizmo", progress=False)


@pytest.mark.slow
def test_a_clip_judges_and_is_calibrated_on_the_pipeline_in_memory(
    pipe: Any, erased: sd_erase.Erasure[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd_erase import images

    drawn: list[Any] = []
    monkeypatch.setattr(
        "sd_erase.judging.draw", lambda pipeline, *rest, **more: [drawn.append(pipeline), images.draw(pipeline, *rest, **more)][1]
    )
    few = {"evaluate.calibration": 4}
    found = sd_erase.evaluate(pipe, erased, [PROMPT], images_per_prompt=1, steps=2, detector="clip", settings=few, progress=False)
    assert found.detector == "clip" and found.rows[0].original is not None
    assert any('of 4 of "kite"' in warning for warning in found.warnings)  # what stands in its place, as the erasure says
    assert len(drawn) == 2 and all(one is pipe for one in drawn)


@pytest.mark.slow
def test_an_objective_of_the_denoiser_gives_a_pipeline_with_its_own(pipe: Any) -> None:
    before = state_hash(pipe)
    found = sd_erase.erase(pipe, "bicycle", anchor="kite", method="uce", settings=SMALL, progress=False)
    assert state_hash(pipe) == before and found.model.unet is not pipe.unet
    own, new = (each.unet.state_dict() for each in (pipe, found.model))
    assert {name for name in own if not torch.equal(own[name], new[name])}
    with pytest.raises(UserError, match="denoiser"):
        found.save(Path("nowhere"))


def test_html_shows_what_comes_from_others_as_text(erased: sd_erase.Erasure[Any]) -> None:
    import dataclasses

    odd = dataclasses.replace(erased, concepts=("<script>",), warnings=("a & b",))
    assert "<script>" not in odd._repr_html_() and "&lt;script&gt;" in odd._repr_html_() and "a &amp; b" in odd._repr_html_()


@pytest.mark.slow
def test_an_audit_of_what_was_erased_in_memory(erased: sd_erase.Erasure[Any], tmp_path: Path) -> None:
    found = sd_erase.audit(erased, share="quick", probes=["listed", "drift"], folder=tmp_path / "audit", progress=False)
    assert found.answer in ("gone", "open", "returns") and found.concept == "bicycle"
    assert found.verdict in found._repr_html_().replace("&#x27;", "'") and found.card.startswith("#")
    again = sd_erase.audit(erased, share="quick", probes=["listed", "drift"], folder=tmp_path / "audit", progress=False)
    assert again.figures["again"] and again.verdict == found.verdict


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("pipe", {"concept": "bycicle"}, "did you mean bicycle"),
        ("pipe", {"method": "tokens"}, "tokens"),
        ("pipe", {"settings": {"train.stepz": 3}}, "train.stepz"),
        ("pipe", {"device": "cuda:77"}, "cuda:77"),
        ("text", {}, "A str is no diffusers pipeline"),
        ("tokenless", {}, "pass tokenizer="),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(pipe: Any, model: str, options: dict[str, Any], sentence: str) -> None:
    given: Any = {"pipe": pipe, "text": "sd15"}.get(model)
    if given is None:
        given = copy.deepcopy(pipe.text_encoder)
        given.config.hidden_act = "gelu"
    with pytest.raises(UserError, match=sentence):
        sd_erase.erase(given, **{"concept": "bicycle", "method": "token", **options})


def test_a_base_without_weights_is_known_all_the_same(pipe: Any) -> None:
    scratch = Scratch(pipe, weights=False)
    assert (scratch.card.pocket, scratch.card.resolution, scratch.card.name) == (True, 64, "pocket")
    assert not list(scratch.path.rglob("*.safetensors"))
    path = scratch.path
    del scratch
    assert not path.exists()


def test_a_model_is_called_as_the_row_that_it_was_loaded_from(pipe: Any) -> None:
    class Loaded:
        config = {"_name_or_path": bases.ROWS["sd15"].source}

    assert models.name_of(Loaded()) == "sd15"
    Loaded.config = {"_name_or_path": "/data/My model.v2.safetensors"}
    assert models.name_of(Loaded()) == "My-model.v2"
    assert RunDir(Path("x")).name == "x"


@pytest.mark.parametrize("name", [*(pytest.param(slow, marks=pytest.mark.slow) for slow in ("erasing", "measuring")), "results"])
def test_the_examples_of_the_documentation_are_true(name: str, pipe: Any, erased: sd_erase.Erasure[Any], tmp_path: Path) -> None:
    given = {"pipe": pipe, "erased": erased, "folder": tmp_path}
    module = importlib.import_module(f"sd_erase.api.{name}")
    found = doctest.testmod(module, extraglobs=given, optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


@pytest.mark.slow
def test_the_examples_of_the_page_are_true(pipe: Any, erased: sd_erase.Erasure[Any], tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "python.md"
    found = doctest.testfile(str(page), False, globs={"pipe": pipe, "folder": tmp_path}, optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed
