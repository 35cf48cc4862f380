"""The towers of a base beside its CLIP partner."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import checkpoint
from narrow import SMALL, build, narrow
from PIL import Image
from safetensors.torch import save_file

from sd_erase import bases
from sd_erase import clip as module
from sd_erase.clip import cached_image_embeddings, load_towers


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_a_fine_tunes_own_encoder_is_trained_and_it_is_said(
    fine_tuned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    pipeline = build(narrow("sd15", tmp_path, monkeypatch))
    text = SMALL["sd15"]["text_encoder"]
    vision = {**text, "image_size": 32, "patch_size": 16}
    partner = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    state = pipeline.text_encoder.state_dict()
    partner.text_model.load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
    partner.save_pretrained(tmp_path / "partner")
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "partner")
    if fine_tuned:
        with torch.no_grad():
            pipeline.text_encoder.state_dict()["encoder.layers.1.mlp.fc2.weight"].mul_(1.01)
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in checkpoint(pipeline).items()}
    save_file(tensors, tmp_path / "tuned.safetensors")
    base = dataclasses.replace(bases.resolve(str(tmp_path / "tuned.safetensors")), clip_partner=str(tmp_path / "partner"))
    towers = load_towers(base, torch.device("cpu"), need_images=True)
    if fine_tuned:
        (note,) = towers.notes
        assert "differs from its CLIP partner's" in note and "its own encoder is what is trained" in note and "1 %" in note
    else:
        assert towers.notes == ()
    expected = pipeline.text_encoder.state_dict()["encoder.layers.1.mlp.fc2.weight"].half().float()
    for clip, own in ((towers.clip, towers.text), (towers.frozen_clip, towers.frozen_text)):
        assert clip.text_model is own
        assert torch.equal(own.state_dict()["encoder.layers.1.mlp.fc2.weight"], expected)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_vision_tower_that_does_not_train_is_held_once(is_shared: bool) -> None:
    towers = load_towers(bases.resolve("pocket"), torch.device("cpu"), need_images=True, share_vision=is_shared)
    assert (towers.clip.vision_model is towers.frozen_clip.vision_model) == is_shared
    for name in ("text_model", "text_projection", "visual_projection", "logit_scale"):
        assert getattr(towers.clip, name) is not getattr(towers.frozen_clip, name)


def test_a_clip_partner_that_is_named_is_the_one_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_erase.config import HarvestConfig, RunConfig, TrainConfig
    from sd_erase.erasure import stage
    from sd_erase.errors import UserError
    from sd_erase.pairs import harvest
    from sd_erase.rundir import RunDir

    (tmp_path / "captions.jsonl").write_text(
        '{"caption": "a bicycle"}\n{"caption": "a dog"}\n{"caption": "a bike"}\n{"caption": "a cat"}'
    )
    partner = tmp_path / "clip-vit"
    partner.mkdir()
    config = RunConfig(
        concepts=("bicycle",),
        device="cpu",
        harvest=HarvestConfig(f"jsonl:{tmp_path / 'captions.jsonl'}"),
        train=TrainConfig(clip=str(partner)),
    )
    run = RunDir(tmp_path / "run")
    harvest(config, run)
    with pytest.raises(UserError, match="clip-vit"):  # an empty folder: told, though `sd` would do without a partner
        stage.train(config, run)
    assert not run.encoder.exists()


def test_image_embeddings_are_known_again_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by paths: of another CLIP, of another preparation and of replaced images they are others."""
    towers = load_towers(bases.resolve("pocket"), "cpu", need_images=True)
    computed: list[int] = []
    embed = module.image_embeddings

    def counted(model: Any, pixels: torch.Tensor) -> torch.Tensor:
        computed.append(len(pixels))
        return embed(model, pixels)

    monkeypatch.setattr(module, "image_embeddings", counted)
    (tmp_path / "moved").mkdir()
    for number in range(2):
        Image.effect_noise((64, 64), 20 + 40 * number).convert("RGB").save(tmp_path / f"{number}.png")
        shutil.copyfile(tmp_path / f"{number}.png", tmp_path / "moved" / f"{number}.png")
    cache = tmp_path / "cache.safetensors"

    def found(folder: Path = tmp_path) -> list[torch.Tensor]:
        """What is found, and in `computed` whether that was computed."""
        computed.clear()
        return list(cached_image_embeddings(towers, [str(folder / f"{n}.png") for n in range(2)], cache, lambda _: None).values())

    first = found()
    assert computed == [2] and torch.equal(first[0], found()[0]) and computed == []
    assert torch.equal(first[1], found(tmp_path / "moved")[1]) and computed == []
    cache.write_bytes(cache.read_bytes()[:-8])
    assert torch.equal(first[1], found()[1]) and computed == [2]
    shutil.copyfile(tmp_path / "0.png", tmp_path / "1.png")
    assert torch.allclose(found()[1], first[0]) and computed == [2]
    towers.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not torch.allclose(found()[0], first[0]) and computed == [2]
    before = found()
    assert computed == []
    towers.frozen_clip.visual_projection.weight.mul_(torch.linspace(0.5, 1.5, towers.frozen_clip.visual_projection.in_features))
    assert not torch.allclose(found()[0], before[0]) and computed == [2]
