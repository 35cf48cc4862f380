"""What a configuration asks of the model and of this machine, looked at before any work: seconds, where the work takes hours.

Only small files are opened (configurations, headers, cards, prompt lists), and the text encoders where a harvest comes before their
training. Each check says what is wrong as the settings' own schema does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from sd_erase import bases, catalog, components, formats, hub, modelfiles, resources, schema
from sd_erase.bases import Base
from sd_erase.captions import choose_dataset
from sd_erase.concepts import excluded_words, load_concepts
from sd_erase.config import RunConfig, TrainConfig
from sd_erase.errors import no_file
from sd_erase.headers import read_header
from sd_erase.prompts import read_prompts
from sd_erase.schema import Fault, SettingsError

# layers and width of the text encoders whose configuration is not on this disk yet
SIZES = {
    "sd1": {"text_encoder": (12, 768)},
    "sd2": {"text_encoder": (23, 1024)},
    "sdxl": {"text_encoder": (12, 768), "text_encoder_2": (32, 1280)},
}
# what only some exports read
EXPORT_ONLY = {"export.checkpoint": ("a1111",), "export.rank": ("lora",), "export.pipeline": ("diffusers",)}
# what only a training with steps reads
STEPS_ONLY = ("train.learning_rate", "train.weight_decay", "train.validate_every", "train.precision")
DRAWING = ("generate", "attack")  # the stages that draw images


def check(config: RunConfig, stages: Collection[str], names: Mapping[str, str] | None = None, base: Base | None = None) -> None:
    """Refuse settings that `stages` could not work with on this base and this machine.

    Args:
        names: how the settings that were just given are called in a sentence (their flags), by dotted name.
        base: what a run's training left of a base that need not be at hand; None asks for it.

    Raises:
        UserError: what is wrong, before anything is made.
    """
    names = names or {}
    base = base or bases.resolve(config.base)
    device = _device(config)
    faults: list[Fault] = []
    if "harvest" in stages:  # what lies in the data set, the harvest says
        if config.harvest.exclude:
            excluded_words(config.harvest.exclude)
        dataset = choose_dataset(config.harvest.dataset, base, load_concepts(config))
        catalog.resolve(catalog.READERS, dataset.partition(":")[0], "Data set reader")
    if "train" in stages:
        faults += _training(config, base, device, names)
    if any(stage in stages for stage in DRAWING):
        bases.check_draws(base)
        faults += _drawing(config, base)
    if "export" in stages:
        faults += _export(config, base, names)
    if faults:
        raise SettingsError(schema.called(faults, names))
    for stage in DRAWING:
        if stage in stages:
            for name in getattr(config, stage).prompts:
                read_prompts(name)
    if {"harvest", "train"} <= set(stages):
        from sd_erase.clip import check_encoders

        check_encoders(base)
    if "evaluate" in stages or "attack" in stages:
        _check_detector(config, base, with_labels="train" in stages)


def _device(config: RunConfig) -> str:
    """The type of device that will compute; torch is asked only where the answer matters."""
    if config.device == "cpu" or (config.device == "auto" and config.train.precision != "fp16"):
        return config.device
    return str(resources.device(config.device).type)


def sizes(base: Base) -> dict[str, tuple[int, int]]:
    """Layers and width of each text encoder, from its own files where they are on this disk."""
    source = Path(base.source).expanduser()
    if source.suffix == ".safetensors":
        return _sizes_of_checkpoint(source, base)
    folder = source if source.is_dir() else hub.cached(base.source)
    known = dict(SIZES.get(base.family, {}))
    if folder is None:
        return known
    for encoder in base.encoders:
        file = folder / encoder.name / "config.json" if base.family not in bases.IMAGE_TEXT else folder / "config.json"
        if file.is_file():
            values = modelfiles.read_json(file)
            values = values.get("text_config", values)
            layers, width = values.get("num_hidden_layers"), values.get("hidden_size")
            if isinstance(layers, int) and isinstance(width, int):
                known[encoder.name] = layers, width
    return known


def _sizes_of_checkpoint(path: Path, base: Base) -> dict[str, tuple[int, int]]:
    tensors = read_header(path).tensors
    found = {}
    for place in formats.PLACES.get(base.family, ()):
        own = [name for name in tensors if name.startswith(place.prefix)]
        layers = {match[1] for name in own if (match := re.search(r"\.(?:layers|resblocks)\.(\d+)\.", name))}
        widths = [tensors[name]["shape"][-1] for name in own if name.endswith("token_embedding.weight")]
        if layers and widths:
            # SD 2.x leaves out OpenCLIP's last layer
            found[place.encoder] = len(layers) - (base.family == "sd2"), int(widths[0])
    return found


def _training(config: RunConfig, base: Base, device: str, names: Mapping[str, str]) -> list[Fault]:
    settings = config.train
    method = catalog.resolve(catalog.METHODS, settings.objective, "Objective")
    lacking = [name for name in ("needs_images", "default_steps", "default_weights") if not hasattr(method, name)]
    if lacking or not callable(method):
        what = f"is {settings.objective}, which is no class of an objective" + (f" (no {lacking[0]})" if lacking else "")
        return [Fault("train.objective", what, "name a class as docs/add-a-method.md shows")]
    faults = _weights(settings, method.default_weights) + _partner(settings.clip, base)
    steps = settings.steps or method.default_steps
    if getattr(method, "needs_denoiser", False):
        bases.check_draws(base)
        if len(base.encoders) > 1:
            what = (
                f"is {settings.objective}, which is written for a denoiser that reads one text encoder, and {base.title} has two"
            )
            faults.append(Fault("train.objective", what, "pass a base of Stable Diffusion 1.x or 2.x"))
    if settings.lora_rank and not getattr(method, "takes_lora", True):
        what = f"has no effect: objective {settings.objective} says itself which weights change"
        faults.append(Fault("train.lora_rank", what, "leave it out"))
    elif settings.lora_rank:
        width = max((width for _, width in sizes(base).values()), default=settings.lora_rank)
        if settings.lora_rank > width:
            faults.append(
                Fault("train.lora_rank", f"is {settings.lora_rank} and the text encoder {width} wide", f"pass 1 to {width}")
            )
        if not steps:
            remedy = "pass --steps, or --objective sd"
            faults.append(
                Fault("train.lora_rank", f"wants a training, and objective {settings.objective} does not train", remedy)
            )
    if not steps:
        faults += [
            Fault(dotted, f"has no effect: objective {settings.objective} does not train", "leave it out, or pass --steps")
            for dotted in STEPS_ONLY
            if dotted in names
        ]
    if settings.precision == "fp16" and device in ("cpu", "auto"):
        faults.append(Fault("train.precision", "is fp16, which a CPU does not train in", "pass no or bf16"))
    if (method.needs_images or settings.towers == "both") and len(base.encoders) > 1:
        faults.append(
            Fault(
                "train.towers" if settings.towers == "both" else "train.objective",
                f"wants a CLIP with a vision tower for every text encoder, and {base.title}'s second has none here",
                "pass --objective sd or fast, and --towers text",
            )
        )
    return faults


def _partner(source: str, base: Base) -> list[Fault]:
    """What is wrong with a CLIP of the user's own (``train.clip``), from its configuration; a hub's is fetched.

    Raises:
        UserError: the hub cannot be reached, or has no such model.
    """
    if not source:
        return []
    remedy = "pass the CLIP model that the base belongs to, as a folder or a hub id"
    if not Path(source).expanduser().exists() and not hub.is_identifier(source):
        return [Fault("train.clip", "is no folder, and no name of the hub", remedy)]
    folder = hub.folder_of(source, components.CLIP_ADVICE)
    file = folder / "clip" / "config.json"  # a pocket pack's
    file = file if file.is_file() else folder / "config.json"
    if not file.is_file():
        return [Fault("train.clip", f"({source}) has no config.json", remedy)]
    values = modelfiles.read_json(file)
    found = values.get("text_config")
    text = found if isinstance(found, dict) else {}
    width, (_, own) = text.get("hidden_size", 512), sizes(base).get(base.encoders[0].name, (0, 0))  # CLIP's default width
    if values.get("model_type") != "clip":
        return [Fault("train.clip", f"({source}) is no CLIP but {values.get('model_type')!r}", remedy)]
    if own and width != own:
        return [Fault("train.clip", f"({source}) is {width} wide and the base's text encoder {own}", remedy)]
    return []


def _weights(settings: TrainConfig, known: Mapping[str, float]) -> list[Fault]:
    return [
        Fault(
            f"train.weights.{name}",
            f"is of no loss term of objective {settings.objective}{schema.nearest(name, known)}",
            f"choose one of {', '.join(known) or 'none'}",
        )
        for name in settings.weights
        if name not in known
    ]


def _drawing(config: RunConfig, base: Base) -> list[Fault]:
    layers = min((layers for layers, _ in sizes(base).values()), default=0)
    most = layers - (2 if base.family == "sdxl" else 1)  # SDXL reads the layer before the last as it is
    if layers and config.generate.clip_skip > most:
        text = f"is {config.generate.clip_skip} and the text encoder has {layers} layers"
        return [Fault("generate.clip_skip", text, f"pass 0 to {most}")]
    return []


def _export(config: RunConfig, base: Base, names: Mapping[str, str]) -> list[Fault]:
    to = config.export.to
    faults = [
        Fault(dotted, f"has no effect on an export to {to}", f"leave it out, or pass --to {' or '.join(only)}")
        for dotted, only in EXPORT_ONLY.items()
        if dotted in names and to not in only
    ]
    width = max((width for _, width in sizes(base).values()), default=config.export.rank)
    if config.export.rank > width:
        faults.append(Fault("export.rank", f"is {config.export.rank} and the text encoder {width} wide", f"pass at most {width}"))
    if config.export.checkpoint and not Path(config.export.checkpoint).expanduser().is_file():
        faults.append(
            Fault(
                "export.checkpoint",
                f"is {config.export.checkpoint!r}, which {no_file(Path(config.export.checkpoint).expanduser())}",
                "pass a .safetensors file",
            )
        )
    return faults


def _check_detector(config: RunConfig, base: Base, with_labels: bool) -> None:
    """Refuse a detector that is not there.

    Args:
        with_labels: load it too and see whether it knows the concepts: worth its seconds where a training comes first.

    Raises:
        UserError: no such card, no weights, or no label of a concept.
    """
    from sd_erase.detection import read_card, split_name
    from sd_erase.judging import judge_of, names_of

    if not with_labels:  # the stage asks for the labels itself
        for name in config.evaluate.judge or (config.evaluate.detector,):
            if name != "auto":
                read_card(split_name(name)[0])
        return
    concepts = load_concepts(config)
    for name in names_of(config, base, concepts):
        read_card(split_name(name)[0])
    judge_of(config, base, concepts)
