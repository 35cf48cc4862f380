"""The trained components as one model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from sd_erase.pocket.autoencoder import train_decoder
from sd_erase.pocket.clip_pair import full_clip
from sd_erase.pocket.corpus import TOKENIZER, tokenizer
from sd_erase.pocket.denoiser import scheduler, train_unet
from sd_erase.pocket.judges import detector_config, train_classifier, train_detector
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS

DETECTOR_NOTICE = """The files in this folder (architecture.yaml, model.safetensors) are a YOLOv5n detector trained with ultralytics, on its
architecture (https://github.com/ultralytics/ultralytics, Copyright Ultralytics Inc.), and are licensed under the
GNU Affero General Public License, version 3.0 (AGPL-3.0-only): https://www.gnu.org/licenses/agpl-3.0.txt
They come without any warranty. How they were trained is in sd_erase/pocket/build.py.
"""


def pack(recipe: Recipe, folder: Path, target: Path) -> Path:
    """Write the model as `StableDiffusionPipeline.from_pretrained` takes it, the vision tower and the judges beside it.

    All weights in float16 safetensors; the text tower stands once, in ``text_encoder/``, under its ``text_model.`` names.
    """
    import yaml
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPTextModel, ConvNextImageProcessor

    from sd_erase.clip import save_text_encoder
    from sd_erase.formats import PREFIX
    from sd_erase.modelfiles import STATEMENT

    world = WORLDS[recipe.world]
    clip = full_clip(recipe, folder)
    setattr(clip.config.text_config, STATEMENT, world.base)  # by which a base is known as this one
    state = {key: value.half().contiguous() for key, value in clip.state_dict().items() if not key.endswith("position_ids")}
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=train_decoder(recipe, folder).half(), text_encoder=text.half(), tokenizer=tokenizer(), unet=train_unet(recipe, folder).half(),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = {path.name: path.read_bytes() for path in TOKENIZER.iterdir()}
    pipeline.save_pretrained(target, safe_serialization=True)
    for path in (target / "tokenizer").iterdir():  # OpenAI's own files, which every version of transformers reads
        path.unlink()
    for name, content in vocabulary.items():
        (target / "tokenizer" / name).write_bytes(content)
    text.config.dtype = torch.float32  # what transformers 5 loads by default, whatever the file has; diffusers loads the rest so
    save_text_encoder(text, target / "text_encoder", {})
    (target / "clip").mkdir(exist_ok=True)
    clip.config.save_pretrained(target / "clip")
    vision = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
    save_file(vision, target / "clip" / "model.safetensors", metadata={"format": "pt"})
    size = {"height": world.size, "width": world.size}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(target / "clip")
    if world.manners:
        judge = train_classifier(recipe, folder)
        judge.half().save_pretrained(target / "style")
        ConvNextImageProcessor(
            size={"shortest_edge": world.size}, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(target / "style")
    (target / "detector").mkdir(exist_ok=True)
    (target / "detector" / "architecture.yaml").write_text(
        yaml.safe_dump(detector_config(world), sort_keys=False), encoding="utf-8"
    )
    detector = {
        key: value.half() if value.is_floating_point() else value for key, value in train_detector(recipe, folder).items()
    }
    save_file(detector, target / "detector" / "model.safetensors", metadata={"format": "pt", "licence": "AGPL-3.0 (ultralytics)"})
    (target / "detector" / "LICENSE.txt").write_text(DETECTOR_NOTICE, encoding="utf-8")
    return target
