"""What a one-file checkpoint is, read from the names and shapes of its tensors, its metadata and the ``.yaml`` beside it."""

from __future__ import annotations

import re
from pathlib import Path

from sd_erase import formats
from sd_erase.lora import is_lora
from sd_erase.modelfiles import AUTOENCODER, CHANNELS, DENOISER, INPAINTING, TITLES, Facts, plain_licence, unsupported

# what a checkpoint may hold beside its parts: what latent-diffusion kept of its training, ComfyUI's marks, another copy of the denoiser
BESIDE = re.compile(
    r"model_ema\..*|(sqrt|log|posterior|lvlb)_.*|betas|alphas_cumprod(_prev)?|logvar|scale_factor|denoiser\.(log_)?sigmas"
    r"|v_pred|ztsnr|edm_.*|(cond_stage_model|conditioner\.embedders\.\d)\.(logit_scale|text_projection)(\.weight)?|safety_checker\..*|.*position_ids"
)
# tensors that only other kinds of files have, and what those are
FOREIGN = (
    (r"model\.diffusion_model\.joint_blocks\.|^joint_blocks\.", "Stable Diffusion 3, whose denoiser is a transformer that reads T5 too"),
    (r"(^|model\.diffusion_model\.)(double_blocks|single_blocks|double_stream_blocks)\.", "FLUX or another model whose denoiser is a transformer"),
    (r"text_encoders\.(t5|llama|qwen|gemma|umt5)|\.t5xxl\.", "a model with a T5 or another language model as text encoder"),
    (r"^(model\.diffusion_model\.)?(time_stack|temporal|motion_modules)|\.(time_stack|temporal_transformer|motion_modules)\.", "a video model"),
    (r"noise_augmentor|^embedder\.", "a model that is conditioned on image embeddings (unCLIP)"),
    (r"^control_model\.|^controlnet_|^input_hint_block\.", "a ControlNet alone"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion alone"),
)  # fmt: skip


def of_checkpoint(path: Path) -> Facts:
    """What a one-file checkpoint says of itself.

    Raises:
        UserError: it is damaged, or no checkpoint of Stable Diffusion 1.x, 2.x or XL.
    """
    header = formats.read_header(path)
    family = formats.checkpoint_family(header.tensors)
    _check_file(header, family)
    assert family is not None
    prediction, sure = _prediction(header, family)
    lacks = _lacking(header)
    return Facts(
        family,
        resolution=_stated_resolution(header, family, prediction),
        prediction=prediction,
        prediction_is_sure=sure,
        zero_snr="ztsnr" in header.tensors,
        lacks=lacks,
        licence=plain_licence(header.metadata.get("modelspec.license", "")),
        notes=_left_out(header, family),
    )


def _check_file(header: formats.Header, family: str | None) -> None:
    """Raises `UserError` where a file is no checkpoint, or one of another kind, with what it is."""
    names, path = header.tensors, header.path
    if family is None and is_lora(names):
        raise unsupported(path, "a LoRA alone")
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            raise unsupported(path, what)
    if family is None:
        if any(name.startswith("conditioner.embedders.0.model.") for name in names):
            raise unsupported(
                path, "the refiner of Stable Diffusion XL (it has the second text encoder only), which draws on the base's images"
            )
        if any(name.startswith(DENOISER) for name in names) or "time_embed.0.weight" in names:
            what = "a denoiser alone: it holds no text encoder that can be trained"
        elif any(name.removeprefix(formats.PREFIX).startswith(("encoder.layers.", "transformer.resblocks.")) for name in names):
            what = "a text encoder alone"
        elif any(name.removeprefix(AUTOENCODER).startswith(("decoder.", "encoder.")) for name in names):
            what = "an autoencoder alone: it holds no text encoder"
        else:
            what = "a file that holds no text encoder that Stable Diffusion 1.x, 2.x or XL uses"
        raise unsupported(path, what)
    channels = _shape(header, f"{DENOISER}input_blocks.0.0.weight")
    if len(channels) > 1 and channels[1] not in (4, 9):
        raise unsupported(path, CHANNELS.get(channels[1], f"a model whose denoiser reads {channels[1]} channels"))
    if family != "sdxl" and any(name.startswith(f"{DENOISER}label_emb.") for name in names):
        raise unsupported(path, "a model whose denoiser reads class or image embeddings (an upscaler or unCLIP)")


def _shape(header: formats.Header, name: str) -> tuple[int, ...]:
    return header.shape(name) if name in header.tensors else ()


def _lacking(header: formats.Header) -> str:
    names = header.tensors
    if not any(name.startswith(DENOISER) for name in names):
        return "holds no denoiser (UNet), so it draws no images: train and export from it, and generate with the whole model"
    if _shape(header, f"{DENOISER}input_blocks.0.0.weight")[1:2] == (9,):
        return INPAINTING
    if not any(name.startswith(AUTOENCODER) for name in names):
        return (
            "holds no autoencoder (a NoVAE file), so it draws no images: train and export from it, and generate with a copy that has one "
            "baked in"
        )
    if any(name.startswith("edm_") for name in names):
        return (
            "is an EDM model (Playground 2.5 or CosXL), whose sampling is not known here: train and export from it, and generate with its "
            "diffusers folder"
        )
    return ""


def _left_out(header: formats.Header, family: str) -> tuple[str, ...]:
    """What is said of tensors that belong to no part."""
    own = (DENOISER, AUTOENCODER, *(place.prefix for place in formats.PLACES[family]))
    rest = [name for name in header.tensors if not name.startswith(own) and not BESIDE.fullmatch(name)]
    if not rest:
        return ()
    return (
        f"{len(rest)} tensors of {header.path.name} belong to no part of {TITLES[family]} and are not read, first {min(rest)}; exports keep "
        "them.",
    )


def _prediction(header: formats.Header, family: str) -> tuple[str, bool]:
    """What a checkpoint's denoiser predicts, and whether the file, or the one beside it, states it."""
    stated = _stated_prediction(header, family) or _beside(header)
    if stated or family != "sd2":
        return stated or "epsilon", True
    return ("v_prediction" if _looks_like_velocity(header) else "epsilon"), False


def _stated_prediction(header: formats.Header, family: str) -> str:
    """What the checkpoint itself states; "" where it states nothing."""
    names, metadata = header.tensors, header.metadata
    if "v_pred" in names:
        return "v_prediction"
    stated = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    if stated:
        return "v_prediction" if stated.lower().startswith("v") else "epsilon"
    # sd-erase wrote there what the family was, whatever its model predicts
    architecture = metadata.get("modelspec.architecture", "") if "sd_erase.version" not in metadata else ""
    if family == "sd2" and architecture.startswith("stable-diffusion-v2-"):
        return "v_prediction" if architecture.startswith("stable-diffusion-v2-768-v") else "epsilon"
    return ""


def _beside(header: formats.Header) -> str:
    """What the ``.yaml`` beside a checkpoint states, as A1111 has it; "" where there is none."""
    beside = header.path.with_suffix(".yaml")
    if not beside.is_file():
        return ""
    with beside.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(1 << 16)
    is_v = re.search(r"^\s*parameterization:\s*[\"']?v[\"']?\s*(#.*)?$", text, re.MULTILINE) is not None
    return "v_prediction" if is_v else "epsilon"


def decided_beside(path: Path) -> str:
    """What a checkpoint's denoiser predicts where only the ``.yaml`` beside it makes it so; "" where the file alone says the same.

    With the checkpoint's own contents this makes the model what it is: the ``.yaml`` may come, change or go later.
    """
    header = formats.read_header(path)
    family = formats.checkpoint_family(header.tensors)
    if family is None or _stated_prediction(header, family) or not (beside := _beside(header)):
        return ""
    alone = "v_prediction" if family == "sd2" and _looks_like_velocity(header) else "epsilon"
    return beside if beside != alone else ""


def _looks_like_velocity(header: formats.Header) -> bool:
    """Whether an SD 2.x denoiser was trained to predict velocity, as ComfyUI tells it: by the spread of one norm's biases."""
    name = f"{DENOISER}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if name not in header.tensors:
        return False
    return float(formats.read_tensors(header.path, [name])[name].float().std(unbiased=False)) > 0.09


def _stated_resolution(header: formats.Header, family: str, prediction: str) -> int:
    """The pixels that ModelSpec states, or (of SD 2.x) those of what it predicts; 0 where nothing says it."""
    if match := re.fullmatch(r"(\d{2,5})x(\d{2,5})", header.metadata.get("modelspec.resolution", "").strip()):
        width, height = int(match[1]), int(match[2])
        if width == height and 64 <= width <= 4096:
            return width - width % 8
    return {"v_prediction": 768, "epsilon": 512}[prediction] if family == "sd2" else 0
