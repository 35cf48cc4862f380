"""Training where the denoiser reads two text encoders (SDXL), on narrow layers with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ldm import checkpoint
from narrow import build, narrow
from safetensors.torch import load_file

from sd_erase import bases, components
from sd_erase.attacks.stage import attack
from sd_erase.captions.pocket import render
from sd_erase.clip import encode, load_towers
from sd_erase.config import ExportConfig, HarvestConfig, RunConfig, TrainConfig, dump
from sd_erase.erasure import stage
from sd_erase.erasure.batches import Batches
from sd_erase.erasure.merge import merge, merged_config
from sd_erase.errors import UserError
from sd_erase.export.lora import export
from sd_erase.pairs import harvest
from sd_erase.pipeline import erased_pipeline
from sd_erase.rundir import RunDir, read_jsonl

NAMES = ("text_encoder", "text_encoder_2")
PLAIN = ("a photo of {}", "there is {}", "{} on the grass", "this is {}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SDXL as one file, pocket scenes, and configurations of its own for as long as the module runs."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("sdxl")
        pipeline = build(narrow("sdxl", root, patch))
        safetensors.torch.save_file(checkpoint(pipeline), root / "xl.safetensors", {"format": "pt"})
        render(root / "scenes", scenes=120)
        yield root


def harvested(folder: Path, where: Path, concept: str = "bicycle", **train: object) -> tuple[RunConfig, RunDir]:
    settings = {"steps": 12, "batch_size": 8, "validate_every": 4, "learning_rate": 3e-3, **train}
    config = RunConfig(
        base=str(folder / "xl.safetensors"),
        concepts=(concept,),
        device="cpu",
        harvest=HarvestConfig(dataset=f"pocket:{folder / 'scenes'}", max_forget=40, max_retain=60),
        train=TrainConfig(**settings),
    )
    run = RunDir(where)
    run.path.mkdir()
    run.config.write_text(dump(config), encoding="utf-8")
    harvest(config, run)
    return config, run


def states(folder: Path, run: RunDir, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.encoder / name / "model.safetensors")


@pytest.mark.parametrize("objective", ["sd", pytest.param("robust", marks=pytest.mark.slow)])
def test_both_encoders_learn_and_the_pooled_output_with_the_second(folder: Path, tmp_path: Path, objective: str) -> None:
    config, run = harvested(folder, tmp_path / "run", steps=60, objective=objective)
    found = stage.train(config, run)
    base = bases.resolve(config.base)
    assert found["encoders"].keys() == set(NAMES) and found["best_step"] == found["encoders"]["text_encoder"]["best_step"]
    pooled = {}
    for encoder in base.encoders:
        rows = [row for row in read_jsonl(run.training(encoder.name)[1]) if row["split"] == "validation"]
        best = found["encoders"][encoder.name]["best_validation"]
        assert best["redirect"] < 0.8 * rows[0]["terms"]["redirect"]
        assert rows[0]["terms"]["preserve"] < 1e-9 and best["preserve"] < 0.5 * best["redirect"]
        towers = load_towers(base, "cpu", need_images=False, encoder=encoder)
        state = states(folder, run, encoder.name)
        assert state.pop("text_projection.weight", None) is None or encoder.pooled
        towers.text.load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
        if encoder.pooled:
            # several captions of each: of one alone, training seeds differ by a tenth
            captions = [
                template.format(word) for word in ("a bicycle", f"an {found['anchor']['bicycle']}", "a dog") for template in PLAIN
            ]
            ids = towers.tokens(captions)
            with torch.no_grad():
                pooled = {
                    which: towers.projection(encode(text, ids, (-1,))[1]).unflatten(0, (3, len(PLAIN)))
                    for which, text in (("own", towers.text), ("original", towers.frozen_text))
                }
    before = (pooled["original"][0] - pooled["original"][1]).norm(dim=-1).mean()
    # "a bicycle" went towards the anchor, and "a dog" stayed
    assert (pooled["own"][0] - pooled["original"][1]).norm(dim=-1).mean() < 0.8 * before
    assert (pooled["own"][2] - pooled["original"][2]).norm(dim=-1).mean() < 0.5 * before


def test_the_pooled_output_is_part_of_every_term(folder: Path) -> None:
    """A change that shows in the pooled projection alone must be seen: the loss may not be met beside it."""
    import random

    from sd_erase.concepts import load_concepts
    from sd_erase.erasure.method import Batch
    from sd_erase.erasure.sd import StableDiffusionErasure
    from sd_erase.pairs import Pair

    base = bases.resolve(str(folder / "xl.safetensors"))
    towers = load_towers(base, "cpu", need_images=False, encoder=base.encoders[1])
    (concept,) = load_concepts(RunConfig(concepts=("bicycle",)))
    method = StableDiffusionErasure()
    method.prepare(towers, [concept], {"bicycle": "object"}, False)

    def losses() -> dict[str, float]:
        forget = [Pair("f", None, "a bicycle by a dog", "forget", "validation", "bicycle", ((2, 9),), "")]
        retain = [Pair("r", None, "a dog by a car", "retain", "validation", None, (), "")]
        batch = Batch(forget, retain, None, None, None, None, random.Random(0), "validation")
        with torch.no_grad():
            return {name: float(term) for name, term in method.losses(towers, batch).items()}

    before = losses()
    with torch.no_grad():
        towers.text.final_layer_norm.bias += 1.0  # behind the layer -2 that is read
    after = losses()
    assert before["preserve"] == before["empty"] == 0
    assert all(after[name] > before[name] for name in ("redirect", "preserve", "protect", "empty"))


def test_an_interruption_in_the_second_encoder_does_not_train_the_first_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = harvested(folder, tmp_path / "run", objective="sd")
    stage.train(config, run)
    expected = {name: states(folder, run, name) for name in NAMES}
    config, again = harvested(folder, tmp_path / "again", objective="sd")
    steps, plain = [], Batches.batch

    def interrupted(self: object, split: str, number: int) -> object:
        if split == "train":
            steps.append(number)
            if len(steps) == 12 + 7:
                raise KeyboardInterrupt
        return plain(self, split, number)

    monkeypatch.setattr(Batches, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.train(config, again)
    steps.clear()
    stage.train(config, again)
    assert steps == [4, 5, 6, 7, 8, 9, 10, 11]  # the second encoder's, from its last checkpoint
    for name in NAMES:
        found = states(folder, again, name)
        assert all(torch.equal(found[key], value) for key, value in expected[name].items())


def test_a_lora_of_both_is_exported_exactly(folder: Path, tmp_path: Path) -> None:
    config, run = harvested(folder, tmp_path / "run", objective="sd", lora_rank=4)
    found = stage.train(config, run)
    assert all(run.lora(name).is_file() for name in NAMES) and found["lora_rank"] == 4
    config = dataclasses.replace(config, export=ExportConfig(to="lora", dtype="float32"))
    (file,) = export(config, run)["files"]
    assert file["residual"] == 0 and file["rank"] == 4
    pipeline = components.load_pipeline(bases.resolve(config.base))
    erased = erased_pipeline(pipeline, run)
    pipeline.load_lora_weights(Path(file["path"]).parent, weight_name=Path(file["path"]).name)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for one, other in zip(
        erased.encode_prompt("a bicycle", **options), pipeline.encode_prompt("a bicycle", **options), strict=True
    ):
        assert one is None or torch.allclose(one, other, atol=1e-4)


def test_the_closed_form_and_a_merge_work_on_both(folder: Path, tmp_path: Path) -> None:
    runs = []
    for concept in ("bicycle", "elephant"):
        config, run = harvested(folder, tmp_path / concept, concept, objective="fast", steps=0)
        stage.train(config, run)
        runs.append(run)
    merged = RunDir(tmp_path / "both")
    merged.path.mkdir()
    found = merge(runs, merged, merged_config(runs))
    assert [row["encoder"] for row in found["interference"]] == [NAMES[0], NAMES[0], NAMES[1], NAMES[1]]
    base = bases.resolve(str(folder / "xl.safetensors"))
    for encoder in base.encoders:
        original = components.text_encoder_state(base, encoder)
        one, other, both = (states(folder, run, encoder.name) for run in (*runs, merged))
        assert any(not torch.allclose(one[key], original[key]) for key in one)
        assert all(torch.allclose(both[key], one[key] + other[key] - original[key], atol=1e-5) for key in both)


def test_what_needs_a_vision_tower_is_refused_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    config, run = harvested(folder, tmp_path / "run", objective="paper")
    with pytest.raises(UserError, match="second has none here: pass --objective sd"):
        stage.train(config, run)
    assert not run.encoder.exists()


def test_the_prefix_search_says_that_it_is_for_one_encoder(folder: Path, tmp_path: Path) -> None:
    config, run = harvested(folder, tmp_path / "run", objective="fast", steps=0)
    stage.train(config, run)
    with pytest.raises(UserError, match="reads two text encoders"):
        attack(config, run)
