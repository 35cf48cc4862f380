"""Which program takes which exported file, how it is loaded there, and which programs take it wrongly or ignore it.

Each line was measured in the program's own code at full size (docs/clients.md); the export prints them, the file's header and the
report's page repeat them.
"""

from __future__ import annotations

from typing import NamedTuple


class Client(NamedTuple):
    """What to do with a file in some programs, or why not to."""

    programs: str
    advice: str
    works: bool = True


_CHECKPOINT = "take --to a1111 or --to lora"
_WEIGHT = "at weight 1: at less, part of the concept comes back"
_LORA = (
    Client("A1111, Forge, SD.Next", f"models/Lora, <lora:NAME:1> in the prompt and in the negative one; {_WEIGHT}"),
    Client("ComfyUI", f"models/loras, node LoraLoader with strength_clip 1, whose CLIP output every prompt takes; {_WEIGHT}"),
    Client("InvokeAI", "import it and set its weight to 1: a new LoRA's is 0.75 there"),
)

CLIENTS: dict[str, tuple[Client, ...]] = {
    "a1111": (
        Client("A1111, Forge, SD.Next", "models/Stable-diffusion, as any checkpoint"),
        Client("ComfyUI", "models/checkpoints, as any checkpoint"),
        Client("InvokeAI, diffusers (from_single_file), kohya's sd-scripts", "as any checkpoint"),
    ),
    "lora": (
        *_LORA,
        Client("diffusers", "pipe.load_lora_weights(FILE); pipe.unload_lora_weights() brings the concept back"),
        Client("OpenVINO GenAI", "as an Adapter with alpha 1"),
        Client("kohya's sd-scripts", "--network_module networks.lora --network_weights FILE"),
    ),
    "lora-diff": (
        *_LORA,
        Client(
            "kohya's sd-scripts, OpenVINO GenAI",
            "ignored without a word (a merge made there calls itself erased and is the original): take --to lora",
            False,
        ),
        Client("diffusers", "refused: take --to lora, --to diffusers, or load_erased", False),
    ),
    "diffusers": (
        Client("diffusers", "from_pretrained, as the folder's README.md shows"),
        Client(
            "ComfyUI, Forge", "not this folder's files (SDXL's give no numbers in ComfyUI): take --to comfyui, --to forge", False
        ),
    ),
}
_TEXT_ENCODER = {
    "sd1": (
        Client("ComfyUI", "models/text_encoders, node CLIPLoader of type stable_diffusion, in place of the checkpoint's CLIP"),
        Client("Forge", "models/text_encoder, then choose it under VAE / Text Encoder"),
        Client("SD.Next", "models/Text-encoder; it knows the file by vit-l in its name alone"),
        Client("A1111, InvokeAI", f"no way to use a text encoder's file: {_CHECKPOINT}", False),
    ),
    "sd2": (
        Client("ComfyUI", "models/text_encoders, node CLIPLoader of type stable_diffusion, in place of the checkpoint's CLIP"),
        Client("Forge", f"text encoders of SD 2.x are ignored without a word: {_CHECKPOINT}", False),
        Client("A1111, InvokeAI, SD.Next", f"no way to use a text encoder's file: {_CHECKPOINT}", False),
    ),
    "sdxl": (
        Client("ComfyUI", "both in models/text_encoders, node DualCLIPLoader of type sdxl, in place of the checkpoint's CLIP"),
        Client("Forge", "reads the second file's text_projection the wrong way round, without a word: take --to forge", False),
        Client("SD.Next", "models/Text-encoder, one after the other; it knows the files by vit-l and vit-g in their names alone"),
        Client("A1111, InvokeAI", f"no way to use a text encoder's file: {_CHECKPOINT}", False),
    ),
}
_FORGE = (
    Client("Forge", "models/text_encoder, then choose it under VAE / Text Encoder"),
    Client("ComfyUI, SD.Next", "not this file: take --to comfyui", False),
)


POCKET = Client("other programs", "the pocket model is for learning and testing: its encoder fits no checkpoint of theirs", False)


def clients(to: str, family: str, pocket: bool = False) -> tuple[Client, ...]:
    """The programs for an export of this kind.

    Args:
        to: a row of `catalog.EXPORTS`.
        family: the base's.
        pocket: whether the base is of an embedded world, which only diffusers and we load.
    """
    if pocket:
        return (POCKET,)
    if to == "comfyui":
        return _TEXT_ENCODER.get(family, ())
    if to == "forge":
        return _FORGE if family == "sdxl" else _TEXT_ENCODER.get(family, ())
    return CLIENTS[to]


def line(programs: str, advice: str, works: bool) -> str:
    """One client, for reading."""
    return f"{programs}: {advice}" if works else f"Not for {programs}: {advice}"
