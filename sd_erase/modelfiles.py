"""What a model is, read from its own small files: never from its name.

Of a diffusers folder these are ``model_index.json`` and its components' configurations; `onefile` reads one-file checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import formats
from sd_erase.errors import UserError
from sd_erase.lora import is_lora

INDEX = "model_index.json"
STATEMENT = (
    "sd_erase_base"  # what a configuration of an embedded base's text encoder has beside transformers' settings: one of these
)
EMBEDDED = ("pocket", "pocket-art")
# the sizes of the pocket's parts, which no other model has: earlier versions exported it without the statement
POCKET_TEXT = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512, "projection_dim": 128}
POCKET_UNET = {"block_out_channels": [64, 128, 128], "cross_attention_dim": 128, "sample_size": 16, "layers_per_block": 1}
DENOISER, AUTOENCODER = "model.diffusion_model.", "first_stage_model."  # their places in a one-file checkpoint
TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
REMEDY = "pass a model of Stable Diffusion 1.x, 2.x or XL"

# What other models are, by a part of their pipeline's class (after diffusers' StableDiffusion... where both are there). Ordered: the
# first that matches speaks.
OTHERS = (
    ("Onnx|^OV|^ORT", "made for another runtime (ONNX or OpenVINO), without weights that can be trained"),
    ("Kolors", "Kolors, whose text encoder is ChatGLM, not CLIP"),
    ("StableDiffusion3", "Stable Diffusion 3, whose denoiser is a transformer that reads T5 too"),
    ("Flux", "FLUX, whose denoiser is a transformer that reads T5"),
    ("PixArt|Sana|Lumina|AuraFlow|HunyuanDiT|Chroma|QwenImage|Bria|ZImage|HiDream|Cosmos|OmniGen",
     "a transformer whose text encoder is a language model, not CLIP"),
    ("^IF|DeepFloyd", "DeepFloyd IF, whose text encoder is T5"),
    ("Cascade|Wuerstchen", "Stable Cascade or Wuerstchen, which draws in other latents"),
    ("Kandinsky|UnCLIP|ImageVariation|VersatileDiffusion|PaintByExample", "a model that is conditioned on image embeddings"),
    ("Upscale|LDMSuperResolution", "an upscaler"),
    ("InstructPix2Pix|CycleDiffusion", "InstructPix2Pix, which edits an image"),
    ("Depth2Img|Marigold", "a model that reads a depth map or an image"),
    ("Video|Animate|CogVideo|^Wan|LTX|Mochi|Allegro|TextToVideo|I2VGen|Latte", "a video model"),
    ("LDMTextToImage|AltDiffusion", "a latent-diffusion model whose text encoder is not CLIP"),
    ("Audio|MusicLDM|Spectrogram", "a model of sound"),
)  # fmt: skip
# channels that a UNet takes beside CLIP's text -> what it then is; 4 is noise alone
CHANNELS = {
    5: "a model that reads a depth map beside the noise (depth2img)",
    7: "an upscaler, whose denoiser reads the small image beside the noise",
    8: "InstructPix2Pix or another model that edits an image, whose denoiser reads that image beside the noise",
}
INPAINTING = (
    "is an inpainting model (its denoiser reads 9 channels: noise, a mask and the image under it), which needs an image to draw on: train "
    "and export from it, and generate and evaluate with the model that it was made from"
)
# single models that are often passed in place of a whole one, by their config.json
SINGLE = {
    "ControlNetModel": "a ControlNet alone",
    "T2IAdapter": "a T2I adapter alone",
    "MotionAdapter": "a motion adapter alone",
    "UNet2DConditionModel": "a denoiser alone",
    "AutoencoderKL": "an autoencoder alone",
    "AutoencoderTiny": "an autoencoder alone",
    "clip_text_model": "a text encoder alone",
    "clip_vision_model": "a CLIP's vision tower alone",
    "t5": "a T5 text encoder",
}


@dataclass(frozen=True)
class Facts:
    """What the files of a model say; what they do not say is empty, 0 or below 0."""

    family: str  # "sd1", "sd2", "sdxl"
    embedded: str = ""  # the row of `bases.ROWS` whose embedded world it is of
    resolution: int = 0  # pixels
    steps: int = 0
    guidance: float = -1.0
    prediction: str = ""  # "epsilon", "v_prediction"
    prediction_is_sure: bool = True  # whether it is stated rather than told from weights
    zero_snr: bool = False  # whether a one-file checkpoint asks for betas that end in pure noise
    lacks: str = ""  # why it draws no images, to follow its name
    licence: str = ""  # as its maker states it
    notes: tuple[str, ...] = field(default=())


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
    except RecursionError as error:
        raise UserError(f"File {path} is nested too deeply: restore the model's folder.") from error
    if not isinstance(found, dict):
        raise UserError(f"File {path} holds no settings by name: restore the model's folder.")
    return found


def unsupported(name: object, what: str) -> UserError:
    """The refusal of a model that is none of Stable Diffusion's."""
    return UserError(f"Base {name} is {what}, which is not supported: {REMEDY}.")


# --- diffusers folders ------------------------------------------------------------------------------------------------------


def of_folder(folder: Path, name: str) -> Facts:
    """What a diffusers folder says of itself.

    Args:
        folder: with ``model_index.json``.
        name: what the user called it.

    Raises:
        UserError: a file is missing or damaged, or the model is another kind.
    """
    index = read_json(folder / INDEX)
    _check_kind(index, name)
    unet = _config(folder, "unet", name)
    encoders = [part for part in ("text_encoder", "text_encoder_2") if _class_of(index, part)]
    texts = [_config(folder, part, name) for part in encoders]
    _check_texts(texts, name)
    _check_denoiser(unet, texts, name)
    scheduler = _config(folder, "scheduler", name, "scheduler_config.json")
    family = "sdxl" if len(texts) > 1 else _family_of(texts[0])
    steps, guidance = _distilled(unet, scheduler)
    lacks = INPAINTING if unet.get("in_channels", 4) == 9 else ""
    if not _class_of(index, "vae"):
        lacks = "has no autoencoder (VAE), so it draws no images: add one to its folder, or only train and export from it"
    stated = stated_base(texts[0])
    looks_pocket = not stated and POCKET_TEXT.items() <= texts[0].items() and POCKET_UNET.items() <= unet.items()
    return Facts(
        family,
        embedded="pocket" if looks_pocket else stated,
        resolution=0 if not _class_of(index, "vae") else _resolution(unet, _config(folder, "vae", name)),
        steps=steps,
        guidance=guidance,
        prediction=str(scheduler.get("prediction_type", "epsilon")),
        lacks=lacks,
        licence=_licence(folder),
        notes=(f"{name} does not state what it is; by its sizes it is the pocket model.",) if looks_pocket else (),
    )


def _licence(folder: Path) -> str:
    """What the front matter of a model's README.md names as its licence."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(1 << 16)
    except OSError:
        return ""
    front = text.split("---")[1] if text.startswith("---") else ""
    found = {
        name: value.strip().strip("\"'") for name, value in re.findall(r"^(license(?:_name)?):[ \t]*(\S.*)$", front, re.MULTILINE)
    }
    return plain_licence(found.get("license_name") or found.get("license", ""))


def plain_licence(licence: str) -> str:
    """A licence's name as it may stand in a model card; "" where it says nothing."""
    return re.sub(r"[^\w .,+()/-]", "", licence)[:100].strip() if licence != "other" else ""


def _class_of(index: Mapping[str, Any], part: str) -> str:
    """The class of a pipeline's component, "" where there is none."""
    entry = index.get(part)
    return str(entry[1] or "") if isinstance(entry, list) and len(entry) == 2 else ""


def _config(folder: Path, part: str, name: str, file: str = "config.json") -> dict[str, Any]:
    if not (folder / part / file).is_file():
        raise UserError(f"Base {name} has no {part}/{file}: restore the whole folder.")
    return read_json(folder / part / file)


def _check_kind(index: Mapping[str, Any], name: str) -> None:
    """Whether a pipeline's parts are those of Stable Diffusion 1.x, 2.x or XL."""
    kind = str(index.get("_class_name", ""))
    unet, first, second = (_class_of(index, part) for part in ("unet", "text_encoder", "text_encoder_2"))
    known = next((what for pattern, what in OTHERS if re.search(pattern, kind)), "")
    clip = {"CLIPTextModel", "CLIPTextModelWithProjection"}
    if not first and second in clip and unet == "UNet2DConditionModel":
        raise unsupported(
            name, "the refiner of Stable Diffusion XL (it has the second text encoder only), which draws on the base's images"
        )
    if known:
        raise unsupported(name, f"{known} ({kind})")
    third = [
        part
        for part in ("text_encoder_3", "transformer", "prior", "motion_adapter", "image_noising_scheduler")
        if _class_of(index, part)
    ]
    odd = [each for each in (first, second) if each and each not in clip]
    if unet != "UNet2DConditionModel" or not first or third or odd:
        told = f"its text encoder is a {odd[0]}" if odd else f"it has a {third[0]}" if third else ""
        told = told or ("it has no text encoder" if not first else f"its denoiser is a {unet}" if unet else "it has no UNet")
        raise unsupported(name, f"a {kind or 'pipeline without a class'} ({told})")


def _check_texts(texts: list[dict[str, Any]], name: str) -> None:
    for text in texts:
        if text.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
            raise unsupported(name, f"a model whose text encoder is a {text['model_type']}, not CLIP")


def _check_denoiser(unet: Mapping[str, Any], texts: list[dict[str, Any]], name: str) -> None:
    """Whether the UNet reads noise (and a mask), and the text encoders' very states."""
    channels = unet.get("in_channels", 4)
    if channels not in (4, 9):
        raise unsupported(name, CHANNELS.get(channels, f"a model whose denoiser reads {channels} channels"))
    for setting, what in (
        ("encoder_hid_dim_type", "another text encoder"),
        ("num_class_embeds", "class labels"),
        ("class_embed_type", "class embeddings"),
    ):
        if unet.get(setting) is not None:
            raise unsupported(name, f"a model whose denoiser reads {what} (unet/config.json: {setting} {unet[setting]})")
    width, read = sum(int(text.get("hidden_size", 512)) for text in texts), unet.get("cross_attention_dim", 1280)
    if isinstance(read, int) and read != width:
        raise UserError(
            f"Base {name} does not fit together: its denoiser reads {read} numbers a token (unet/config.json: cross_attention_dim), its "
            f"text encoders give {width}: restore the whole folder."
        )


def _family_of(text: Mapping[str, Any]) -> str:
    """Whether the only text encoder is CLIP-L's kind (1.x) or OpenCLIP's (2.x), which has another activation."""
    width = text.get("hidden_size")
    return {768: "sd1", 1024: "sd2"}.get(width, "sd2" if text.get("hidden_act") == "gelu" else "sd1")  # type: ignore[arg-type]


def _resolution(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The pixels that a UNet was made for; 0 where its configuration does not say it."""
    size = unet.get("sample_size")
    size = max(size) if isinstance(size, list) and size else size
    return int(size) * 2 ** (len(vae.get("block_out_channels", "1234")) - 1) if isinstance(size, int) else 0


def _distilled(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[int, float]:
    """Steps and guidance of a model that was distilled to few steps; (0, -1) where nothing says that it was.

    What published configurations tell: a denoiser that takes the guidance as an input (time_cond_proj_dim) is an LCM, whose pipeline's
    defaults are 4 and 8.5; LCMScheduler and TCDScheduler are for distilled models alone; SD-Turbo and SDXL-Turbo come with an Euler
    scheduler of trailing timesteps that predicts noise, which else only models of zero terminal SNR have (those predict velocity).
    """
    kind = scheduler.get("_class_name")
    if unet.get("time_cond_proj_dim") is not None:
        return 4, 8.5
    if kind in ("LCMScheduler", "TCDScheduler"):
        return 4, 1.0
    turbo = (
        kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler") and scheduler.get("timestep_spacing") == "trailing"
    )
    if turbo and scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr"):
        return 4, 0.0
    return 0, -1.0


def stated_base(config: Mapping[str, Any]) -> str:
    """The embedded base that a configuration states to be of; "" where it states none."""
    found = config.get(STATEMENT)
    return found if isinstance(found, str) and found in EMBEDDED else ""


def image_text_family(folder: Path) -> tuple[str, str] | None:
    """The family ("clip", "blip") of a folder with transformers' CLIPModel or BlipForImageTextRetrieval and the embedded base that it is of ("":
    none); None for anything else."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or config.get("model_type") not in ("clip", "blip"):
        return None
    text = config.get("text_config")
    return str(config["model_type"]), stated_base(text if isinstance(text, dict) else {}) or (
        "pocket" if STATEMENT in config else ""
    )


def _holds_lora(path: Path) -> bool:
    try:
        return is_lora(formats.read_header(path).tensors)
    except UserError:
        return False


def what_folder(folder: Path) -> str:
    """What a folder without ``model_index.json`` is, "" where nothing tells."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if "adapter_config.json" in names or (files and all(_holds_lora(folder / name) for name in files)):
        return "a LoRA alone"
    if any(name.startswith("learned_embeds") for name in names):
        return "a textual inversion alone"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config.get("_class_name") or config.get("model_type") or "")
    except (OSError, ValueError, AttributeError, RecursionError):
        checkpoints = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
        return f"a folder of files such as {checkpoints[0]}: pass that file's own path" if checkpoints else ""
    return SINGLE.get(kind, f"a {kind} alone" if kind else "")
