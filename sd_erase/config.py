"""The settings of a run: one frozen dataclass a stage, YAML in and out; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from sd_erase.errors import UserError, unknown_choice


@dataclass(frozen=True)
class HarvestConfig:
    """Captions into forget and retain pairs."""

    dataset: str = "auto"  # "READER" or "READER:PATH"; "auto": the base's own scenes (pocket)
    max_forget: int = 1000  # pairs, after sampling; 0 keeps all
    max_retain: int = 3000
    train_share: float = 0.7
    max_missing_share: float = 0.05  # more missing or corrupt images than this is an error
    exclude: tuple[str, ...] = ()  # words whose captions are left out of both sets


@dataclass(frozen=True)
class TrainConfig:
    """Pairs into an erased text encoder."""

    objective: str = "robust"  # a row of catalog.METHODS
    towers: str = "text"  # "text" or "both"
    steps: int = 0  # 0: the method's default
    batch_size: int = 32
    learning_rate: float = 0.0  # 0: the method's default
    weight_decay: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)  # loss term -> weight; overrides the method's defaults
    validate_every: int = 50  # steps
    lora_rank: int = 0  # 0: full linear weights
    precision: str = "no"  # Accelerate's mixed precision: "no", "fp16", "bf16"
    clip: str = ""  # folder or hub id of the base's CLIP partner; empty: the base's row


@dataclass(frozen=True)
class GenerateConfig:
    """Prompts into pairs of images."""

    prompts: tuple[str, ...] = ()  # files
    images_per_prompt: int = 8
    steps: int = 0  # denoising steps; 0: the base's default
    guidance: float = -1.0  # classifier-free guidance scale; negative: the base's default
    height: int = 0  # pixels; 0: the base's default
    width: int = 0
    negative_prompt: str = ""
    scheduler: str = "auto"
    batch_size: int = 0  # images; 0: the base's default
    clip_skip: int = 0


@dataclass(frozen=True)
class EvaluateConfig:
    """Images into detections and rates."""

    detector: str = "auto"  # a card's name or a path to one; "auto": the base's default
    confidence: float = -1.0  # negative: the card's
    image_size: int = 0  # pixels; 0: the card's


@dataclass(frozen=True)
class AttackConfig:
    """Words before a prompt that bring the concept back."""

    prompts: tuple[str, ...] = ()  # files; empty: those of the generate section
    tokens: int = 3  # words of a prefix
    steps: int = 40
    candidates: int = 4  # prefixes tried a step
    images_per_prompt: int = 4


@dataclass(frozen=True)
class ExportConfig:
    """The erased encoder into a file of another program."""

    to: str = "comfyui"
    dtype: str = "float16"
    output: str = ""  # a file or folder; empty: the run's export folder
    checkpoint: str = ""  # of a1111: the file to copy; empty: the base, where that is one
    rank: int = 0  # of lora; 0: that of the run's LoRA, or 64
    pipeline: bool = False  # of diffusers: the complete pipeline beside the encoders
    force: bool = False  # export in spite of what is lost or replaced


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    concepts: tuple[str, ...] = ()
    concept_file: str = ""
    kind: str = "object"
    exact: bool = False  # take a name that looks misspelt as it is
    anchor: str | None = None  # None: the card's, or chosen by CLIP; "": remove the phrase
    base: str = "pocket"
    seed: int = 0
    device: str = "auto"  # "auto", "cpu", "cuda", "mps"
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def _convert(where: str, value: Any, expected: Any) -> Any:
    """`value` from YAML as `expected`, or a `UserError` that names the key."""
    origin = typing.get_origin(expected)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(where, value, next(arg for arg in typing.get_args(expected) if arg is not type(None)))
    if dataclasses.is_dataclass(expected):
        return _build(expected, value, where)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"Setting {where} must be a list, not {value!r}.")
        return tuple(_convert(where, item, typing.get_args(expected)[0]) for item in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"Setting {where} must be a mapping of names to numbers, not {value!r}.")
        return {str(key): _convert(f"{where}.{key}", item, typing.get_args(expected)[1]) for key, item in value.items()}
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):
        try:
            return float(value)  # YAML reads "1e-4" as text
        except ValueError:
            pass
    if type(value) is not expected:
        raise UserError(f"Setting {where} must be of type {expected.__name__}, not {value!r}.")
    return value


def _build(kind: type, values: Any, where: str = "") -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where or 'The configuration'} must be a mapping of settings, not {values!r}.")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_choice(f"Setting {where + '.' if where else ''}", key, hints)
        arguments[key] = _convert(f"{where}.{key}" if where else key, value, hints[key])
    return kind(**arguments)


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested mappings; unknown keys and wrong types raise `UserError`."""
    return _build(RunConfig, values)


def to_dict(config: Any) -> dict[str, Any]:
    """The nested mapping of a configuration, with lists for tuples (as YAML and JSON have them)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def load(path: str | Path) -> RunConfig:
    """Read a YAML file; a missing or malformed one raises `UserError`."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise UserError(f"Configuration {path} does not exist: pass a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Configuration {path} is not YAML: {' '.join(str(error).split())}") from error
    return from_dict(values or {})


def dump(config: RunConfig) -> str:
    """`config` as YAML; `load` gives it back."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def override(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """`config` with dotted settings replaced, as flags do: ``{"train.steps": 40}``."""
    nested = to_dict(config)
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        target = nested
        for section in sections:
            target = target[section]
        if key == "weights":
            value = {**target[key], **value}
        target[key] = list(value) if isinstance(value, tuple) else value
    return from_dict(nested)


def check_methods(path: Path, shared: dict[str, Any], methods: dict[str, dict[str, Any]]) -> None:
    """Refuse a recipe whose methods, with the settings that all share, name a setting that does not exist."""
    for method, settings in methods.items():
        try:
            override(RunConfig(), {**shared, **settings})
        except (KeyError, TypeError) as error:
            raise UserError(f"Recipe {path}: method {method!r} has an unknown setting {error}.") from error
