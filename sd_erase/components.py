"""The one place where the parts of a model are loaded, whatever its source: a diffusers folder, a hub id or a one-file checkpoint.

Each is built from its configuration and filled strictly (see `weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_erase import bases, formats
from sd_erase.bases import Base, TextEncoder
from sd_erase.errors import UserError
from sd_erase.hub import folder_of, loading, weight_files
from sd_erase.modelfiles import AUTOENCODER, DENOISER, INDEX, INPAINTING, read_json
from sd_erase.weights import Entry, Stored, build, check_finite, fill, held, load, matched, shapes_of, stored

CLIP_TOKENS = 49_408  # rows of CLIP's token embedding, which programs of one-file checkpoints build
CLIP_ADVICE = "pass the folder of that CLIP model with --clip"


def is_checkpoint(base: Base) -> bool:
    """Whether the base is one file of everything."""
    return base.source.endswith(".safetensors")


def config_folder(base: Base) -> Path:
    """The folder whose files describe the base's components: its own, or ours for a one-file checkpoint."""
    return bases.CONFIGURATIONS / base.configuration if is_checkpoint(base) else folder_of(base.source)


# --- text encoders ----------------------------------------------------------------------------------------------------------


def _text_module(folder: Path, pooled: bool, rows: int) -> Any:
    """A text encoder without weights, of the configuration in `folder`.

    Args:
        pooled: whether it has the projection of its pooled state.
        rows: of the token embedding in its file, which may have more than its configuration says.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with loading(str(folder)):
        settings = CLIPTextConfig.from_pretrained(folder)
        settings.vocab_size = max(settings.vocab_size, rows)
        # what transformers would load a stored copy as
        setattr(settings, "dtype" if hasattr(settings, "dtype") else "torch_dtype", torch.float32)
        return build(lambda: (CLIPTextModelWithProjection if pooled else CLIPTextModel)(settings))


def _matched_text(
    folder: Path, pooled: bool, entries: Mapping[str, Entry], what: str, file: object
) -> tuple[Any, dict[str, Entry]]:
    """A text encoder without weights, and the tensors that belong into it."""
    rows = next((each.shape[0] for name, each in entries.items() if name.endswith("token_embedding.weight") and each.shape), 0)
    module = _text_module(folder, pooled, rows)
    return module, matched(shapes_of(module), entries, what, file)


def _without_spare(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors without the last block of an SD 2.x checkpoint, which nothing reads and no configuration counts."""
    layers = int(read_json(folder / "config.json")["num_hidden_layers"])
    return {name: each for name, each in entries.items() if f"encoder.layers.{layers}." not in name}


def build_text_encoder(folder: Path, tensors: Mapping[str, Any], pooled: bool) -> Any:
    """A text encoder in float32 of the configuration in `folder`, made of `tensors` (prefixed names).

    SD 2.x checkpoints keep a last block that nothing reads: the block beyond the configuration's is left out.

    Raises:
        UserError: the tensors do not fit the configuration.
    """
    import torch

    return fill(*_matched_text(folder, pooled, _without_spare(folder, held(tensors)), "text encoder", folder), torch.float32)


def _own_text(base: Base, encoder: TextEncoder) -> tuple[Any, dict[str, Entry]]:
    """A base's text encoder without weights, and the tensors of its files that belong into it."""
    folder = config_folder(base) / encoder.name
    if is_checkpoint(base):
        state = formats.read_encoders(Path(base.source).expanduser())[encoder.name]
        entries: Mapping[str, Entry] = _without_spare(folder, held(state))
    else:
        entries = stored(weight_files(base.source, encoder.name, "model", f"{encoder.name} of {base.source}"))
    return _matched_text(folder, encoder.pooled, entries, encoder.name, base.source)


def text_encoder(base: Base, encoder: TextEncoder, dtype: Any = None) -> Any:
    """A base's text encoder as `dtype` (float32): a CLIPTextModel, or one with its projection.

    Raises:
        UserError: the base cannot be read, or its tensors do not fit its configuration or are not finite.
    """
    import torch

    module, entries = _own_text(base, encoder)
    fill(module, entries, dtype or torch.float32)
    check_finite(module.state_dict(), encoder.name, base.source)
    return module


def text_encoder_state(base: Base, encoder: TextEncoder) -> dict[str, Any]:
    """The tensors of the base's own text encoder, with the prefix ``text_model.``, in the type in which they are stored.

    Raises:
        UserError: the base cannot be loaded.
    """
    return formats.prefixed({key: each.read() for key, each in _own_text(base, encoder)[1].items()})


def tokenizer(base: Base, encoder: TextEncoder) -> Any:
    """The tokenizer of a text encoder; it cuts a text where the encoder's positions end.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import CLIPTextConfig, CLIPTokenizerFast

    if is_checkpoint(base):
        return own_tokenizer(base, encoder)
    folder = config_folder(base)
    with loading(base.source):
        found = CLIPTokenizerFast.from_pretrained(folder / encoder.tokenizer)
        positions = CLIPTextConfig.from_pretrained(folder / encoder.name).max_position_embeddings
    if found.model_max_length > positions:  # where its configuration does not say it, it is 10 to the power of 30
        found.model_max_length = positions
    return found


def own_tokenizer(base: Base, encoder: TextEncoder) -> Any:
    """The tokenizer of an encoder in a one-file checkpoint, which holds none: all of CLIP shares one vocabulary."""
    from transformers import CLIPTokenizerFast

    # OpenCLIP pads with its token 0, "!"; CLIP-L with its end of text
    open_clip = {place.encoder: place.open_clip for place in formats.PLACES[base.family]}
    return CLIPTokenizerFast.from_pretrained(
        bases.POCKET_FOLDER / "tokenizer", **({"pad_token": "!"} if open_clip[encoder.name] else {})
    )


def encoder_with_tokenizer(base: Base, encoder: TextEncoder, dtype: Any = None) -> tuple[Any, Any]:
    """`text_encoder` and `tokenizer`, which have to know the same tokens.

    Raises:
        UserError: one of them cannot be loaded, or the tokenizer has tokens without a row.
    """
    model, found = text_encoder(base, encoder, dtype), tokenizer(base, encoder)
    if len(found) > (rows := model.config.vocab_size):
        raise UserError(
            f"The {encoder.tokenizer} of {base.source} has {len(found):,} tokens, its {encoder.name} rows for {rows:,}: tokens were added to "
            "the one alone; save both together (resize_token_embeddings), or restore the tokenizer."
        )
    return model, found


def added_tokens(rows: int) -> list[str]:
    """What a user should know of a text encoder with more token rows than CLIP has; nothing where it has as many."""
    if rows <= CLIP_TOKENS:
        return []
    return [
        f"The text encoder has {rows:,} token rows, {rows - CLIP_TOKENS:,} more than CLIP's {CLIP_TOKENS:,} (tokens were added to it): "
        "ComfyUI and other programs that build CLIP's rows cannot load its text-encoder file nor a checkpoint with it; use --to "
        "diffusers, or --to lora, which changes no token's row."
    ]


# --- CLIP's whole models ----------------------------------------------------------------------------------------------------


def clip_model(source: str, advice: str = CLIP_ADVICE) -> Any:
    """A CLIPModel in float32.

    Raises:
        UserError: it cannot be read, or its tensors do not fit its configuration.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel

    folder = folder_of(source, advice)
    with loading(source):
        module = build(lambda: CLIPModel(CLIPConfig.from_pretrained(folder)))
    return load(
        module, stored(weight_files(source, "", "model", f"CLIP {source}", advice)), torch.float32, "CLIP", source, finite=True
    )


def clip_partner(folder: Path, text: Any) -> Any:
    """The CLIPModel of a pocket pack, which stores everything but the text tower: that is `text`'s."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    with loading(str(folder)):
        module = build(lambda: CLIPModel(CLIPConfig.from_pretrained(folder)))
    entries = stored([folder / "model.safetensors"]) | held(formats.prefixed(text.state_dict()))
    return load(module, entries, torch.float32, "CLIP", str(folder), finite=True)


# --- denoiser and autoencoder -----------------------------------------------------------------------------------------------


def _module(base: Base, name: str, **changes: Any) -> Any:
    """A diffusers module without weights, of its configuration."""
    import diffusers

    with loading(base.source):
        default = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[name]
        kind = getattr(diffusers, default)
        settings = dict(kind.load_config(config_folder(base) / name))
        kind = getattr(diffusers, str(settings.get("_class_name", default)))
        return build(lambda: kind.from_config(settings | changes))


def diffusers_part(base: Base, name: str, dtype: Any) -> Any:
    """The base's denoiser ("unet") or autoencoder ("vae") as `dtype`.

    Raises:
        UserError: it cannot be read, or its tensors do not fit its configuration.
    """
    # our configurations are of models that draw from text alone
    changes = {"in_channels": 9} if name == "unet" and is_checkpoint(base) and base.lacks == INPAINTING else {}
    module = _module(base, name, **changes)
    what = {"unet": "denoiser (UNet)", "vae": "autoencoder (VAE)"}[name]
    if is_checkpoint(base):
        prefix = {"unet": DENOISER, "vae": AUTOENCODER}[name]
        entries, unknown = _converted(Path(base.source).expanduser(), prefix, name, module)
        found = matched(shapes_of(module), {**entries, **unknown}, what, base.source, reshaped=name == "vae")
    else:
        files = weight_files(base.source, name, "diffusion_pytorch_model", f"{name} of {base.source}")
        found = matched(shapes_of(module), stored(files), what, base.source)
    return fill(module, found, dtype)


def _converted(path: Path, prefix: str, name: str, module: Any) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The tensors of a latent-diffusion file under diffusers' names, and those that have no such name.

    diffusers' converter renames tensors without numbers; which one became which is told by the objects themselves.
    """
    import torch
    from diffusers.loaders import single_file_utils as utils

    own = stored([path], prefix)
    empty = {key: torch.empty(each.shape, device="meta") for key, each in own.items()}
    names = {id(tensor): key for key, tensor in empty.items()}
    with loading(str(path)):
        if name == "unet":
            renamed = utils.convert_ldm_unet_checkpoint({prefix + key: value for key, value in empty.items()}, module.config)
        else:
            renamed = utils.convert_ldm_vae_checkpoint(dict(empty), module.config)
    sources = {
        key: names[id(tensor if id(tensor) in names else tensor._base)] for key, tensor in renamed.items() if tensor is not None
    }
    used = set(sources.values())
    return {key: own[source] for key, source in sources.items()}, {key: own[key] for key in own if key not in used}


# --- pipelines --------------------------------------------------------------------------------------------------------------


def scheduler(base: Base) -> Any:
    """The base's scheduler; a one-file checkpoint's predicts what its file says."""
    import diffusers

    with loading(base.source):
        settings = dict(diffusers.DDIMScheduler.load_config(config_folder(base) / "scheduler"))
        if is_checkpoint(base):
            settings["prediction_type"] = base.prediction
        if (
            is_checkpoint(base) and base.zero_snr
        ):  # then the first step has to be at pure noise (Lin et al. 2024, arXiv:2305.08891)
            if "Euler" not in settings["_class_name"]:
                settings["_class_name"] = "DDIMScheduler"  # PNDM's betas cannot be rescaled
            settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return getattr(diffusers, str(settings["_class_name"])).from_config(settings)


def pipeline_class(base: Base) -> str:
    """The class of diffusers that `base` is a pipeline of."""
    return f"StableDiffusion{'XL' if base.family == 'sdxl' else ''}{'Inpaint' if base.lacks == INPAINTING else ''}Pipeline"


def load_pipeline(base: Base, dtype: Any = None, *, draws: bool = True) -> Any:
    """The diffusers pipeline of `base` on the CPU, without a safety checker and without a progress bar.

    Args:
        draws: whether it has to draw from text alone, which one for inpainting does not.

    Raises:
        UserError: the base draws no images, the hub cannot be reached, or a component cannot be loaded (see `weights.matched`).
    """
    import diffusers
    import torch

    if draws or base.lacks != INPAINTING:
        bases.check_draws(base)
    dtype = dtype or torch.float32
    parts: dict[str, Any] = {"scheduler": scheduler(base)}
    for name in ("vae", "unet"):  # the small one first: what does not fit is told before the large one is read
        parts[name] = diffusers_part(base, name, dtype)
    for encoder in base.encoders:
        parts[encoder.name], parts[encoder.tokenizer] = encoder_with_tokenizer(base, encoder, dtype)
    if is_checkpoint(base) and not base.prediction_is_sure:
        _check_prediction(base, parts["unet"])
    if base.family == "sdxl":
        index = read_json(config_folder(base) / INDEX)
        options: dict[str, Any] = {"force_zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", True))}
    else:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, pipeline_class(base))(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_prediction(base: Base, unet: Any) -> None:
    """Raises `UserError` where the file does not state what its denoiser predicts, and two tests of its weights disagree."""
    tried = "v_prediction" if predicts_velocity(unet) else "epsilon"
    if tried != base.prediction:
        beside = Path(base.source).with_suffix(".yaml").name
        raise UserError(
            f"Checkpoint {base.source} does not state what its denoiser predicts, and its weights look like {base.prediction} by one test, "
            f'{tried} by another: put {beside} beside it (as A1111 has it) with the line parameterization: "v", or "eps".'
        )


def predicts_velocity(unet: Any) -> bool:
    """Whether an SD 2.x denoiser predicts velocity (768 px models) or noise (512 px models), where no file states it.

    A1111's test: of a constant input at the last step the former returns about the input's negative (modules/sd_models_config.py).
    """
    import torch

    sample = torch.full((1, 4, 8, 8), 0.5, dtype=unet.dtype)
    context = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, dtype=unet.dtype)
    with torch.inference_mode():
        return float((unet(sample, 999, context).sample - sample).mean()) < -1
