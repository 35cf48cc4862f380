"""The judges of a world, trained on its renders: a YOLO detector for what is there, an image classifier for the style it is drawn in."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sd_erase.pocket.autoencoder import encode_latents, train_decoder
from sd_erase.pocket.corpus import as_images, data, pixels
from sd_erase.pocket.fit import fit, generator_of
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS, World

# --- what is there ---------------------------------------------------------------------------------------------------


def detector_config(world: World = WORLDS["pocket"]) -> dict[str, Any]:
    """Ultralytics' YOLOv5 (anchor-free "u" head) in the world's width, with its labels: COCO's 80 names for the pocket's."""
    import yaml
    from ultralytics.nn.tasks import yaml_model_load

    config = yaml_model_load("yolov5n.yaml")
    names = dict(enumerate(world.names)) or yaml.safe_load(_coco_names())
    found = {key: config[key] for key in ("nc", "scales", "scale", "backbone", "head") if key in config} | {"names": names}
    if world.names:
        depth, _, most = found["scales"]["n"]
        found |= {"nc": len(names), "scales": {"n": [depth, world.detector_width, most]}, "scale": "n"}
    return found


def _coco_names() -> str:
    import yaml
    from ultralytics.utils import ROOT

    names = yaml.safe_load((ROOT / "cfg" / "datasets" / "coco.yaml").read_text(encoding="utf-8"))["names"]
    return yaml.safe_dump({int(key): value for key, value in names.items()})


@torch.no_grad()
def _write_detector_data(recipe: Recipe, folder: Path, names: dict[int, str]) -> Path:
    """Renders in YOLO's layout; every second training picture has gone through the autoencoder."""
    import yaml
    from PIL import Image

    world = WORLDS[recipe.world]
    root = folder / "detector-data"
    index = {name: number for number, name in names.items()}
    model = train_decoder(recipe, folder)
    for split, count, offset in (("train", recipe.detector_scenes, 5_000_000), ("val", 400, 6_000_000)):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, boxes = world.render(world.sample(offset + number, held_out=split == "val"))
            if split == "train" and number % 2:
                found = model.decode(model.encode(pixels(np.asarray(picture)[None])).latent_dist.mean).sample
                picture = Image.fromarray(as_images(found)[0])
            picture.save(root / "images" / split / f"{number:05d}.png")
            lines = [
                f"{index[world.label(name)]} {(x0 + x1) / 2 / world.size:.5f} {(y0 + y1) / 2 / world.size:.5f} "
                f"{(x1 - x0) / world.size:.5f} {(y1 - y0) / world.size:.5f}"
                for name, (x0, y0, x1, y1) in boxes
            ]
            (root / "labels" / split / f"{number:05d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = root / "data.yaml"
    path.write_text(
        yaml.safe_dump({"path": str(root.resolve()), "train": "images/train", "val": "images/val", "names": names}),
        encoding="utf-8",
    )
    return path


def train_detector(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """The detector by ultralytics' own trainer, which resumes from its last epoch; the weights come back as a state dict."""
    import yaml
    from ultralytics import YOLO

    final = folder / "detector.safetensors"
    if final.is_file():
        return load_file(final)
    config = detector_config(WORLDS[recipe.world])
    architecture = folder / "yolov5n.yaml"
    architecture.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    runs = (folder / "detector-runs").resolve()  # a relative one would go below ultralytics' own folder
    last = runs / "train" / "weights" / "last.pt"
    if last.is_file() and (folder / "detector-data" / "data.yaml").is_file():
        model = YOLO(str(last), task="detect")  # its own file, with the optimizer's state
        with contextlib.suppress(AssertionError):  # all epochs are done: the weights are what it holds
            model.train(resume=True)
    else:
        model = YOLO(str(architecture), task="detect")
        model.train(
            data=str(_write_detector_data(recipe, folder, config["names"])), epochs=recipe.detector_epochs, imgsz=128, batch=32,
            device="cpu", workers=0, optimizer="AdamW", lr0=2e-3, seed=recipe.seed, amp=False, plots=False, val=False, mosaic=0.5,
            close_mosaic=5, fliplr=0.5, project=str(runs), name="train", exist_ok=True, verbose=False, pretrained=False,
        )  # fmt: skip
    state = {key: value.float().contiguous() for key, value in model.model.state_dict().items()}
    save_file(state, final)
    return state


# --- the style -------------------------------------------------------------------------------------------------------

STYLE_RATE = 2e-3  # AdamW's


def classifier_model(world: World) -> Any:
    """A small ResNet of transformers with the world's manners for labels; pictures of its size come in -1..1."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = dict(enumerate(world.manners))
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], layer_type="basic",
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    return ResNetForImageClassification(config)


def train_classifier(recipe: Recipe, folder: Path) -> Any:
    """The style's judge: renders, half of them through the autoencoder, moved by some pixels, mirrored and of another brightness."""
    world = WORLDS[recipe.world]
    torch.manual_seed(recipe.seed + 4)
    model = classifier_model(world)
    final = folder / "classifier.safetensors"
    if final.is_file():
        model.load_state_dict(load_file(final))
        return model.eval()
    images, latents = data(recipe, folder, ["images"])["images"], encode_latents(recipe, folder)
    autoencoder = train_decoder(recipe, folder)
    labels = torch.tensor([world.manners.index(world.sample(number).style) for number in range(len(images))])
    groups = [torch.where(labels == number)[0] for number in range(len(world.manners))]

    def loss_of(step: int) -> torch.Tensor:
        generator = generator_of(recipe.seed + 4, step)
        present = [group for group in groups if len(group)]
        index = torch.cat([group[torch.randint(len(group), (5,), generator=generator)] for group in present])
        picture = pixels(images[index.numpy()])
        noisy = latents[index].float()
        noisy = noisy + 0.15 * torch.rand(len(index), 1, 1, 1, generator=generator) * torch.randn(
            noisy.shape, generator=generator
        )
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = autoencoder.decode(noisy[::2]).sample.float().clamp(-1, 1)
        picture[::2] = decoded
        right, down, mirrored = (int(value) for value in torch.randint(-8, 9, (3,), generator=generator))
        picture = picture.roll((down, right), (2, 3))
        picture = picture.flip(3) if mirrored > 0 else picture
        picture = picture + 0.1 * torch.randn(len(index), 1, 1, 1, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(pixel_values=picture).logits
        return nn.functional.cross_entropy(scores.float(), labels[index])

    state = fit("classifier", folder, model.train(), loss_of, steps=recipe.judge_steps, learning_rate=STYLE_RATE, warmup=50,
                minutes=recipe.minutes)  # fmt: skip
    model.load_state_dict(state)
    return model.eval()
