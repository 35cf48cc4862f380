"""The settings of a run: one frozen dataclass a stage, each field with the rule that its values obey; YAML in and out.

All that is wrong with a configuration is one `SettingsError`, whichever way the settings came in (see `schema`). What depends on the
model or the machine is checked by `preflight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_erase import schema, yamlfile
from sd_erase.catalog import EXPORTS, KINDS, METHODS, SCHEDULERS, resolve
from sd_erase.errors import UserError, no_file
from sd_erase.headers import PICKLES
from sd_erase.schema import Fault, SettingsError, setting

MANY = 10_000_000  # steps, pairs, images: more is a slip of the hand
MAX_SEED = 2**32 - 1  # the largest that numpy takes; torch and every other program take it too
MAX_PIXELS = 16_384  # of a side
TOKENS = 75  # of a prompt, beside its start and its end


@dataclass(frozen=True)
class HarvestConfig:
    """Captions into forget and retain pairs."""

    dataset: str = setting("auto")  # "READER" or "READER:PATH"; "auto": the base's own scenes (pocket, pocket-art)
    max_forget: int = setting(1000, low=0, high=MANY)  # pairs, after sampling; 0 keeps all
    max_retain: int = setting(3000, low=0, high=MANY)
    train_share: float = setting(0.7, low=0, high=1, open_ends=True)
    max_missing_share: float = setting(0.05, low=0, high=1)  # more missing or corrupt images than this is an error
    exclude: tuple[str, ...] = setting((), longest=20_000)  # words whose captions are left out of both sets; each may be a list

    def __post_init__(self) -> None:
        _check(self, "harvest")


@dataclass(frozen=True)
class TrainConfig:
    """Pairs into an erased text encoder."""

    objective: str = setting("robust", choices=tuple(METHODS), pattern=r"[\w.]+:\w+", form="MODULE:CLASS of your own")
    towers: str = setting("text", choices=("text", "both"))
    steps: int = setting(0, low=0, high=MANY)  # 0: the method's default
    batch_size: int = setting(32, low=1, high=65_536)
    learning_rate: float = setting(0.0, low=0, high=100)  # 0: the method's default
    weight_decay: float = setting(0.0, low=0, high=100)
    weights: dict[str, float] = setting({}, low=0, high=1e9)  # loss term -> weight; overrides the method's defaults
    validate_every: int = setting(50, low=1, high=MANY)  # steps
    lora_rank: int = setting(0, low=0, high=65_536)  # 0: full linear weights
    # Accelerate's mixed precision; auto: `resources.precision`
    precision: str = setting("auto", choices=("auto", "no", "fp16", "bf16"))
    clip: str = setting("", blank=True)  # folder or hub id of the base's CLIP partner; empty: the base's row

    def __post_init__(self) -> None:
        _check(self, "train")


@dataclass(frozen=True)
class GenerateConfig:
    """Prompts into pairs of images."""

    prompts: tuple[str, ...] = setting(())  # files
    images_per_prompt: int = setting(8, low=1, high=100_000)
    steps: int = setting(0, low=0, high=1000)  # denoising steps; 0: the base's default
    guidance: float = setting(-1.0, low=0, high=1000, also=(-1,))  # classifier-free guidance scale; -1: the base's default
    height: int = setting(0, low=0, high=MAX_PIXELS, multiple_of=8)  # pixels; 0: the base's default
    width: int = setting(0, low=0, high=MAX_PIXELS, multiple_of=8)
    negative_prompt: str = setting("", blank=True, longest=10_000)
    scheduler: str = setting("auto", choices=tuple(SCHEDULERS))
    batch_size: int = setting(0, low=0, high=65_536)  # images; 0: the base's default
    clip_skip: int = setting(0, low=0, high=1000)

    def __post_init__(self) -> None:
        _check(self, "generate")


MOST_JUDGES = 2


@dataclass(frozen=True)
class EvaluateConfig:
    """Images into detections and rates."""

    judge: tuple[str, ...] = setting(())  # cards' names or paths, NAME:WEIGHTS for other weights; empty: `detector`
    detector: str = setting("auto")  # one judge, as `judge` names it; "auto": by the concepts' kinds
    calibration: int = setting(40, low=4, high=10_000)  # images each of the concept and of its anchor, for a CLIP's threshold
    confidence: float = setting(-1.0, low=0, high=1, open_ends=True, also=(-1,))  # -1: the card's
    image_size: int = setting(0, low=0, high=MAX_PIXELS, multiple_of=32)  # pixels; 0: the card's
    trust_pickle: bool = setting(False)  # read a detector that is a pickle; consent, so never taken from a file nor kept in one

    def __post_init__(self) -> None:
        _check(self, "evaluate")


@dataclass(frozen=True)
class AttackConfig:
    """Words before a prompt that bring the concept back."""

    prompts: tuple[str, ...] = setting(())  # files; empty: those of the generate section
    tokens: int = setting(3, low=1, high=TOKENS)  # words of a prefix
    steps: int = setting(40, low=0, high=MANY)
    candidates: int = setting(4, low=1, high=100_000)  # prefixes tried a step
    images_per_prompt: int = setting(4, low=1, high=100_000)

    def __post_init__(self) -> None:
        _check(self, "attack")


@dataclass(frozen=True)
class ExportConfig:
    """The erased encoder into a file of another program."""

    to: str = setting("comfyui", choices=tuple(EXPORTS))
    dtype: str = setting("float16", choices=("float16", "float32", "bfloat16"))
    output: str = setting("", blank=True)  # a file or folder; empty: the run's export folder
    checkpoint: str = setting("", blank=True)  # of a1111: the file to copy; empty: the base, where that is one
    rank: int = setting(0, low=0, high=65_536)  # of lora; 0: that of the run's LoRA, or 64
    pipeline: bool = setting(False)  # of diffusers: the complete pipeline beside the encoders
    force: bool = setting(False)  # export in spite of what is lost or replaced

    def __post_init__(self) -> None:
        _check(self, "export")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    concepts: tuple[str, ...] = setting((), longest=20_000)  # names; each may be a list
    concept_file: str = setting("", blank=True)
    kind: str = setting("object", choices=KINDS)
    exact: bool = setting(False)  # take a name that looks misspelt as it is
    anchor: str | None = setting(None, blank=True, longest=300)  # None: the card's, or chosen by CLIP; "": remove the phrase
    base: str = setting("pocket")
    seed: int = setting(0, low=0, high=MAX_SEED)
    device: str = setting(
        "auto", choices=("auto", "cpu", "cuda", "mps"), pattern=r"cuda:\d{1,3}", form="cuda:N for one of several cards"
    )
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        _check(self)
        if faults := _relations(self):
            raise SettingsError(faults)
        object.__setattr__(self, "concepts", tuple(dict.fromkeys(self.concepts)))  # one that is named twice is one


# stage -> its section
SECTIONS: dict[str, Any] = {
    one.name: one.default_factory for one in dataclasses.fields(RunConfig) if callable(one.default_factory)
}


def _check(instance: Any, where: str = "") -> None:
    if faults := schema.check_fields(instance, where):
        raise SettingsError(faults)


def _relations(config: RunConfig) -> list[Fault]:
    """What is wrong with settings that no rule of one alone tells."""
    faults = []
    output = Path(config.export.output)
    if output.suffix in PICKLES:
        better = f"pass {output.with_suffix('.safetensors').name}, or a folder"
        faults.append(Fault("export.output", f"is {config.export.output!r}, a pickle, which sd-erase does not write", better))
    if config.train.lora_rank and config.train.towers == "both":
        faults.append(
            Fault(
                "train.lora_rank",
                f"is {config.train.lora_rank} and train.towers both",
                "a LoRA holds the text tower only: pass text",
            )
        )
    if config.evaluate.judge and config.evaluate.detector != "auto":
        better = "pass --judge alone; where the run's own settings name a detector, with --detector auto beside it"
        faults.append(Fault("evaluate.judge", "is given together with evaluate.detector, which means the same", better))
    if len(config.evaluate.judge) > MOST_JUDGES:
        faults.append(Fault("evaluate.judge", f"names {len(config.evaluate.judge)} judges", f"pass at most {MOST_JUDGES}"))
    last = max(config.generate.images_per_prompt, config.attack.images_per_prompt) - 1
    if config.seed + last > MAX_SEED:
        faults.append(
            Fault("seed", f"is {config.seed} and the last image's {config.seed + last}", f"pass at most {MAX_SEED - last}")
        )
    return faults


def from_dict(values: Any, names: Mapping[str, str] | None = None) -> RunConfig:
    """A `RunConfig` from nested mappings.

    Args:
        names: what sentences call a setting, by its dotted name, where that is not the dotted name itself.

    Raises:
        SettingsError: unknown keys, wrong types, and values that a rule forbids; all of them in one sentence.
    """
    faults: list[Fault] = []
    found = schema.converted_fields(RunConfig, values, faults)
    if not faults:
        try:
            sections = {name: kind(**found.pop(name)) for name, kind in SECTIONS.items() if name in found}
            return RunConfig(**found, **sections)
        except SettingsError as error:
            faults += error.faults
    raise SettingsError(schema.called(faults, names))


def to_dict(config: Any) -> dict[str, Any]:
    """The nested mapping of a configuration, with lists for tuples (as YAML and JSON have them)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    found: dict[str, Any] = plain(dataclasses.asdict(config))
    return found


def load(path: str | Path) -> RunConfig:
    """Read a YAML file; a missing or malformed one raises `UserError`."""
    return from_file(path, read_yaml(path))


def read_yaml(path: str | Path) -> Any:
    """What a settings file holds, unchecked.

    Raises:
        UserError: it is missing or no YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Configuration {path} {no_file(path)}: pass a YAML file.")
    return yamlfile.read(path, "Configuration") or {}


def from_file(path: str | Path, values: Any) -> RunConfig:
    """`from_dict` of what the file at `path` holds; the sentence names the file."""
    try:
        config = from_dict(values)
    except SettingsError as error:
        raise UserError(f"{path}: {error}") from error
    refuse_consent(path, config.evaluate.trust_pickle)
    return config


def refuse_consent(path: str | Path, given: object) -> None:
    """Refuse a settings file that consents for its reader: it may come from the maker of the pickle."""
    if given:
        raise UserError(
            f"{path}: evaluate.trust_pickle is yours to give: remove it there, and pass --trust-pickle if you trust the file."
        )


def dump(config: RunConfig) -> str:
    """`config` as YAML; `load` gives it back."""
    import yaml

    values = to_dict(config)
    del values["evaluate"]["trust_pickle"]
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def override(config: RunConfig, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> RunConfig:
    """`config` with dotted settings replaced, as flags do: ``{"train.steps": 40}``; weights are merged.

    Args:
        names: see `from_dict`.

    Raises:
        SettingsError: an unknown setting, or a value that a rule forbids; all of them in one sentence.
    """
    names = names or {}
    nested, faults = to_dict(config), []
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        target: Any = nested
        if not all(isinstance(values.get(".".join(sections[: depth + 1]), {}), Mapping) for depth in range(len(sections))):
            continue  # the section itself is no mapping, which is what is said
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        is_weight = sections == ["train", "weights"] and bool(key)
        if not isinstance(target, dict) or (key not in target and not is_weight):
            faults.append(unknown(dotted))
        elif isinstance(target.get(key), dict) and isinstance(value, Mapping):
            target[key] = {**target[key], **value}
        else:
            target[key] = list(value) if isinstance(value, tuple) else value
    try:
        changed = from_dict(nested, names)
    except SettingsError as error:
        raise SettingsError([*schema.called(faults, names), *error.faults]) from error
    if faults:
        raise SettingsError(schema.called(faults, names))
    return changed


def unknown(name: str) -> Fault:
    """The fault of a dotted name that no setting has."""
    known = [dotted for dotted, _, _ in schema.walk(RunConfig)]
    return Fault(
        name, f"does not exist{schema.nearest(name, known)}", "`sd-erase train --help` and those of the other stages list all"
    )


def check_seeds(path: Path, seeds: object) -> None:
    """Refuse a recipe's seeds that --seed would not take."""
    hint, rule = schema.fields_of(RunConfig)["seed"]
    if not isinstance(seeds, (list, tuple)) or not seeds or not all(type(seed) is hint and rule.accepts(seed) for seed in seeds):
        raise UserError(
            f"Recipe {path}: seeds must be a list, each {rule.describe(hint)}, not {schema.shown(seeds)}: write `seeds: [0, 1]`."
        )


def check_methods(path: Path, shared: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a recipe one of whose methods, with the settings that all share, cannot be used, or is code that nobody trusted."""
    for method, settings in methods.items():
        try:
            objective = override(RunConfig(), {**shared, **settings}).train.objective
            if objective not in METHODS:
                resolve(METHODS, objective, f"Recipe {path}, method {method!r}: objective")
        except SettingsError as error:
            raise UserError(f"Recipe {path}, method {method!r}: {error}") from error
