"""What can be plugged in, by name. A row is "module:object", resolved when it is used; nothing heavy is imported here."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from sd_erase.errors import UserError, shortened, unknown_choice

KINDS = ("object", "style", "person", "nudity")  # of concepts: what decides captions, anchor and judge
METHODS = {
    "sd": "sd_erase.erasure.sd:StableDiffusionErasure",
    "paper": "sd_erase.erasure.cliperase:CLIPErase",
    "robust": "sd_erase.erasure.robust:RobustErasure",
    "projection": "sd_erase.erasure.cliperase:ProjectionOnly",
    "fast": "sd_erase.erasure.fast:ClosedForm",
    "token": "sd_erase.erasure.token_swap:TokenSwap",
    "ga": "sd_erase.erasure.gradient_ascent:GradientAscent",
    "graddiff": "sd_erase.erasure.grad_diff:GradientDifference",
    "kl": "sd_erase.erasure.kl:KLMinimization",
    "emmn": "sd_erase.erasure.emmn:ErrorNoise",
    "finetune": "sd_erase.erasure.finetune:FineTune",
    # published methods, for comparison only; the first three change the denoiser
    "esd": "sd_erase.erasure.peers.esd:ESD",
    "uce": "sd_erase.erasure.peers.uce:UCE",
    "speed": "sd_erase.erasure.peers.speed:SPEED",
    "hirm": "sd_erase.erasure.peers.hirm:HiRM",
    "advunlearn": "sd_erase.erasure.peers.advunlearn:AdvUnlearn",
    "tea": "sd_erase.erasure.peers.tea:TEA",
}
READERS = {
    "pocket": "sd_erase.captions.pocket:read",
    "pocket-art": "sd_erase.captions.pocket:read_art",
    "synthetic": "sd_erase.captions.synthetic:read",
    "flickr30k": "sd_erase.captions.named:flickr30k",
    "flickr8k": "sd_erase.captions.named:flickr8k",
    "coco": "sd_erase.captions.named:coco",
    "cc12m": "sd_erase.captions.named:cc12m",
    "cifar100": "sd_erase.captions.cifar100:read",
    "folder": "sd_erase.captions.folder:read",
    "jsonl": "sd_erase.captions.named:json_lines",
}
DETECTORS = {
    "yolo": "sd_erase.detection.yolo:YoloDetector",
    "onnx": "sd_erase.detection.onnx:OnnxDetector",
    "clip": "sd_erase.detection.clip:ClipJudge",
    "classifier": "sd_erase.detection.classifier:Classifier",
    "nudenet": "sd_erase.detection.nudenet:NudeNet",
}
EXPORTS = {
    "comfyui": "sd_erase.export.text_encoder:export",
    "forge": "sd_erase.export.forge:export",
    "a1111": "sd_erase.export.checkpoint:export",
    "lora": "sd_erase.export.lora:export",
    "lora-diff": "sd_erase.export.lora:export_diff",
    "diffusers": "sd_erase.export.diffusers:export",
}
# samplers: diffusers' classes; None is the model's own
SCHEDULERS: dict[str, str | None] = {
    "auto": None,
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# what an audit asks, in this order
PROBES = {
    "listed": "sd_erase.auditing.wording:LISTED",
    "inflections": "sd_erase.auditing.wording:INFLECTIONS",
    "synonyms": "sd_erase.auditing.wording:SYNONYMS",
    "misspellings": "sd_erase.auditing.wording:MISSPELLINGS",
    "unlisted": "sd_erase.auditing.wording:UNLISTED",
    "paraphrases": "sd_erase.auditing.wording:PARAPHRASED",
    "positions": "sd_erase.auditing.wording:POSITIONS",
    "long": "sd_erase.auditing.wording:LONG",
    "implicit": "sd_erase.auditing.wording:IMPLICIT",
    "languages": "sd_erase.auditing.wording:LANGUAGES",
    "weights": "sd_erase.auditing.conditions:WEIGHTED",
    "clip-skip": "sd_erase.auditing.conditions:CLIP_SKIP",
    "guidance": "sd_erase.auditing.conditions:GUIDANCE",
    "samplers": "sd_erase.auditing.conditions:SAMPLER",
    "prefix": "sd_erase.auditing.prefix:PREFIX",
    "ring-a-bell": "sd_erase.auditing.ring_a_bell:RING_A_BELL",
    "gradient": "sd_erase.auditing.gradient:GRADIENT",
    "inversion": "sd_erase.auditing.inversion:INVERSION",
    "completion": "sd_erase.auditing.wordless:COMPLETION",
    "noise": "sd_erase.auditing.wordless:NOISE",
    "image": "sd_erase.auditing.wordless:IMAGE",
    "inpainting": "sd_erase.auditing.wordless:INPAINTING",
    "relearning": "sd_erase.auditing.relearning:RELEARNING",
    "companions": "sd_erase.auditing.collateral:COMPANIONS",
    "classes": "sd_erase.auditing.collateral:CLASSES",
    "attributes": "sd_erase.auditing.collateral:ATTRIBUTES_AND_COUNTS",
    "senses": "sd_erase.auditing.collateral:SENSES",
    "untouched": "sd_erase.auditing.collateral:UNTOUCHED",
    "drift": "sd_erase.auditing.collateral:DRIFT",
}
# the paper's tables and figures: each is called with (recipe, bench)
EXPERIMENTS = {
    "table2": "sd_erase.reproduce.tables:zero_shot",
    "table3": "sd_erase.reproduce.tables:retrieval",
    "table4": "sd_erase.reproduce.tables:zero_shot",
    "table7": "sd_erase.reproduce.tables:variance",
    "table9": "sd_erase.reproduce.tables:zero_shot",
    "table10": "sd_erase.reproduce.tables:zero_shot",
    "table11": "sd_erase.reproduce.tables:zero_shot",
    "figure3": "sd_erase.reproduce.tables:proportion",
    "table5": "sd_erase.reproduce.architectures:blip",
    "table6": "sd_erase.reproduce.generator:detection",
    "table8": "sd_erase.reproduce.architectures:patches",
    "figure1": "sd_erase.reproduce.pictures:grids",
    "figure4": "sd_erase.reproduce.pictures:grids",
    "figure5": "sd_erase.reproduce.pictures:heat_maps",
    "figure6": "sd_erase.reproduce.pictures:tsne",
    "figure7": "sd_erase.reproduce.pictures:grids",
    "cost": "sd_erase.reproduce.tables:cost",
}


LONGEST = 200  # characters of a name in a sentence
_trusted: set[str] | None = None  # None: a Python program names what it imports itself


@contextlib.contextmanager
def only_trusted() -> Iterator[None]:
    """Import, of code that is not ours, what the command line names (see `trust`): the settings in files may be a stranger's."""
    global _trusted
    before, _trusted = _trusted, set()
    try:
        yield
    finally:
        _trusted = before


def trust(names: Iterable[object]) -> None:
    """Take "module:object" names as the user's own, who typed them."""
    if _trusted is not None:
        _trusted.update(map(str, names))


def resolve(rows: dict[str, str], name: str, what: str) -> Any:
    """The object behind row `name`, or behind a "module:object" of the user's own.

    Raises:
        UserError: an unknown name, which lists the rows, a module that cannot be imported, or one that only a file names.
    """
    if name not in rows and ":" not in name:
        raise unknown_choice(what, name, rows)
    module, attribute = rows.get(name, name).split(":", 1)
    if name in rows:
        return getattr(importlib.import_module(module), attribute)
    if _trusted is not None and name not in _trusted:
        raise UserError(
            f"{what} {shortened(name)} is code of its own, which a file of settings names and which nobody asked to run: if you trust it, "
            f"put --trust-code {name[:LONGEST]} before the command's name (sd-erase --trust-code {name[:LONGEST]} ...)."
        )
    if os.getcwd() not in sys.path:  # a file in the working folder; an installed `sd-erase` does not look there
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(
            f"{what} {name!r} cannot be imported ({error}): pass MODULE:CLASS of a module that is installed."
        ) from error
