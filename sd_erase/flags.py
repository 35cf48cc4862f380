"""Every setting as a flag: its help stands here, its type and rule on the configuration's field; and flags, YAML and a run's stored
settings into one configuration."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from sd_erase import bases, catalog, schema
from sd_erase.config import RunConfig, load, override, read_yaml, refuse_consent
from sd_erase.schema import SettingsError
from sd_erase.terminal import echo, one_line

PLACEHOLDERS = {int: "N", float: "X", str: "NAME"}


class Checked(click.ParamType):
    """A value that a `Rule` holds of.

    Args:
        kind: int, float or str.
        rule: what values are right; of a setting none: `resolve_config` checks all settings together, wherever they come from.
    """

    def __init__(self, kind: type, rule: schema.Rule | None = None, choices: Sequence[str] = ()):
        self.kind, self.rule, self.choices, self.name = kind, rule, choices, PLACEHOLDERS[kind]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = schema.from_text(value, self.kind)
        if self.rule is not None and not (type(found) is self.kind and self.rule.accepts(found)):
            self.fail(f"{schema.shown(value)} cannot be used: pass {self.rule.describe(self.kind)}.", param, ctx)
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(choice) for choice in self.choices if choice.startswith(incomplete)]


class FilePath(click.Path):
    """A path that a file may have: "" would be the working folder, and what is too long or no text an error of the system's."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not schema.Rule().accepts(value):
            self.fail(f"{schema.shown(value)} is no path: pass {schema.Rule().describe(str)}.", param, ctx)
        return super().convert(value, param, ctx)


class TermWeight(click.ParamType):
    """``TERM=VALUE``, the weight of one loss term."""

    name = "TERM=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        term, sign, number = value.partition("=")
        if not (sign and term):
            self.fail(f"{schema.shown(value)} is not of the form TERM=VALUE: pass preserve=20, for example.", param, ctx)
        return term, schema.from_text(number, float)


@dataclass(frozen=True)
class Flag:
    """How one setting looks on the command line; its name, type and rule come from the configuration."""

    help: str
    name: str = ""  # where it differs from the setting's
    alias: str = ""  # a second spelling
    metavar: str | None = None


# every setting of `RunConfig`, by its dotted name
FLAGS: dict[str, Flag] = {
    "concepts": Flag("Concept to erase, such as bicycle; repeatable.", name="--concept", metavar="NAME"),
    "concept_file": Flag("YAML card of a concept of your own (words, synonyms, senses to spare).", metavar="FILE"),
    "kind": Flag("What the concept is, where no card says so."),
    "exact": Flag("Erase the names as they are written, even where one is near a card's name or stands on a card."),
    "anchor": Flag("Phrase that takes the concept's place; '' removes the phrase. By default the card's.", metavar="PHRASE"),
    "base": Flag(f"Model to erase from: {bases.names()}, a diffusers folder, a .safetensors file or a hub id."),
    "seed": Flag("Seed of everything random."),
    "device": Flag("Where to compute."),
    "harvest.dataset": Flag(
        f"READER:PATH, with READER one of {', '.join(catalog.READERS)} (pocket, pocket-art and synthetic need no path); auto takes an "
        "embedded base's own scenes for what its world holds, else synthetic.",
        name="--dataset",
        alias="--data",
        metavar="DATASET",
    ),  # fmt: skip
    "harvest.max_forget": Flag("Most pairs to forget; 0 keeps all."),
    "harvest.max_retain": Flag("Most pairs to retain; 0 keeps all."),
    "harvest.train_share": Flag("Share of the pairs to train on; the rest validates."),
    "harvest.max_missing_share": Flag("Share of missing or corrupt images that is still accepted."),
    "harvest.exclude": Flag("Word whose captions are left out of both sets, such as one to test on; repeatable.", metavar="WORD"),
    "train.objective": Flag(
        "robust: what the denoiser reads, against an adversary; sd: the same without one; fast: closed form; paper: the published loss; "
        "projection, token, ga, graddiff, kl, emmn and finetune: for comparison only, and so are the published methods hirm, advunlearn and "
        "tea (text encoder), esd, uce and speed (denoiser: such a run is not exported); or MODULE:CLASS of your own.",
    ),
    "train.towers": Flag("CLIP towers to train; only the text tower is exported."),
    "train.steps": Flag("Training steps; 0 takes the objective's default."),
    "train.batch_size": Flag("Pairs a step."),
    "train.learning_rate": Flag("Learning rate; 0 takes the objective's default."),
    "train.weight_decay": Flag("Weight decay."),
    "train.weights": Flag("Weight of one loss term; repeatable.", name="--weight"),
    "train.validate_every": Flag("Steps between validations."),
    "train.lora_rank": Flag("Train a LoRA of this rank instead of the full linear weights; 0 trains those."),
    "train.precision": Flag("Mixed precision; auto takes bf16 where the processor has units for it and the encoder is wide."),
    "train.clip": Flag(
        "CLIP model (folder or hub id) that the base's text encoder is from, with its vision tower; by default the base's.",
        metavar="CLIP",
    ),  # fmt: skip
    "generate.prompts": Flag("File with one prompt a line, or a bundled list by name (apple); repeatable.", metavar="FILE"),
    "generate.images_per_prompt": Flag("Images of each prompt, each from its own seed."),
    "generate.steps": Flag("Denoising steps; 0 takes the base's default."),
    "generate.guidance": Flag("Classifier-free guidance scale; -1 takes the base's default."),
    "generate.height": Flag("Pixels; 0 takes the base's size."),
    "generate.width": Flag("Pixels; 0 takes the base's size."),
    "generate.negative_prompt": Flag("What the images should not show.", metavar="TEXT"),
    "generate.scheduler": Flag("Sampler; auto keeps the base's."),
    "generate.batch_size": Flag("Images at once; 0 takes the base's default."),
    "generate.clip_skip": Flag("Text encoder layers to skip from the end; 1 is what other programs call clip skip 2."),
    "evaluate.judge": Flag(
        "What looks at the images: a card of detectors/ by name or path, clip:FOLDER for another CLIP than the base's, classifier:FOLDER; "
        "given twice, the second judges too. By default by the concept's kind: objects by the base's detector, styles and people by its "
        "own CLIP, nudity by nudenet.",
        metavar="CARD",
    ),  # fmt: skip
    "evaluate.detector": Flag("The same for one judge; auto is by the concept's kind.", metavar="CARD"),
    "evaluate.calibration": Flag("Images each of the concept and of its anchor that the original draws for a CLIP's threshold."),
    "evaluate.confidence": Flag("Least confidence of a detection; -1 takes the card's."),
    "evaluate.image_size": Flag("Pixels of the detector's input; 0 takes the card's."),
    "evaluate.trust_pickle": Flag(
        "Read a detector's .pt. It is a pickle, which can run its maker's code on this machine when it is opened; ultralytics' list of "
        "allowed classes is all that stands against it. Pass it only for a file whose maker you trust."
    ),
    "attack.prompts": Flag("File with one prompt a line, or a bundled list by name (apple); repeatable.", metavar="FILE"),
    "attack.tokens": Flag("Words before the prompt."),
    "attack.steps": Flag("Steps of the search; 0 leaves the first random words."),
    "attack.candidates": Flag("Prefixes tried a step."),
    "attack.images_per_prompt": Flag("Images of each prompt, each from its own seed."),
    "export.to": Flag("Program to export for."),
    "export.dtype": Flag("Type of the exported numbers."),
    "export.output": Flag("File or folder to write; by default the run's export folder.", metavar="PATH"),
    "export.checkpoint": Flag("Checkpoint that a1111 copies; by default the base, where that is one.", metavar="FILE"),
    "export.rank": Flag("Rank of a LoRA; 0 takes the run's own, or 64 for a run of full weights."),
    "export.pipeline": Flag("With diffusers: write the complete pipeline, not the encoders alone."),
    "export.force": Flag(
        "Write a LoRA that loses much, replace a checkpoint's own, different encoder, or replace a file that sd-erase did not write."
    ),
}
CONCEPT = ("concepts", "concept_file", "kind", "exact", "anchor")
COMMON = ("base", "seed", "device")


def section(name: str) -> tuple[str, ...]:
    """The dotted names of one stage's settings."""
    return tuple(dotted for dotted in FLAGS if dotted.startswith(f"{name}."))


def default_of(dotted: str, config: RunConfig | None = None) -> Any:
    """The value of a setting, by default that of a configuration of nothing."""
    value: Any = config or RunConfig()
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


@functools.cache
def _schema() -> dict[str, tuple[Any, schema.Rule]]:
    """Type and rule of each setting, by its dotted name."""
    return {dotted: (hint, rule) for dotted, hint, rule in schema.walk(RunConfig)}


def type_of(dotted: str, checked: bool = False) -> click.ParamType:
    """The click type of a setting.

    Args:
        checked: whether to check it at once, for a command that does not resolve a whole configuration.
    """
    hint, rule = _schema()[dotted]
    origin, kind = schema.plain_type(hint)
    if origin is dict:
        return TermWeight()
    if kind is bool:
        return click.BOOL
    return Checked(kind, rule if checked else None, rule.choices)


def _metavar(dotted: str) -> str | None:
    """A setting's choices, which click would write in capitals; None for click's own."""
    choices = _schema()[dotted][1].choices
    return f"[{'|'.join(choices)}]" if choices else None


def spelling(dotted: str, rename: Mapping[str, str] | None = None) -> str:
    """How a setting's flag is written."""
    return (rename or {}).get(dotted) or FLAGS[dotted].name or "--" + dotted.split(".")[-1].replace("_", "-")


def _help(dotted: str) -> str:
    """The flag's help with the setting's range and default."""
    (hint, rule), default = _schema()[dotted], default_of(dotted)
    shown = [rule.brief()] if schema.plain_type(hint)[1] in (int, float) else []
    if typing.get_origin(hint) not in (tuple, dict) and default not in ("", None, False):
        shown.append(f"default: {default}")
    return FLAGS[dotted].help + (f"  [{'; '.join(filter(None, shown))}]" if any(shown) else "")


def options(*names: str, rename: Mapping[str, str] | None = None) -> Callable[[Any], Any]:
    """Options for the named settings, all None unless given."""

    def decorate(command: Any) -> Any:
        for dotted in reversed(names):
            flag, (hint, _) = FLAGS[dotted], _schema()[dotted]
            command = click.option(
                *filter(None, (spelling(dotted, rename), flag.alias)),
                dotted.replace(".", "__"),
                type=type_of(dotted),
                is_flag=hint is bool,
                multiple=typing.get_origin(hint) in (tuple, dict),
                default=None,
                metavar=flag.metavar or _metavar(dotted),
                help=_help(dotted),
            )(command)
        return command

    return decorate


def settings(*names: str, rename: Mapping[str, str] | None = None) -> Callable[[Any], Any]:
    """Options for the named settings, all None unless given, and the ones that every command has."""

    def decorate(command: Any) -> Any:
        command = options(*names, *COMMON, rename=rename)(command)
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
            click.option("--config", "config_file", type=FilePath(), metavar="FILE", help="YAML settings; flags override them."),
            click.option("--output-root", type=FilePath(), default=Path("outputs"), show_default=True, help="Where runs lie."),
            click.option(
                "--run", "run_path", type=FilePath(), metavar="FOLDER", help="Run to work on; by default a new or the latest one."
            ),
        ):
            command = option(command)
        return command

    return decorate


def read_config_file(path: Path) -> dict[str, Any]:
    """What a YAML file gives, by dotted name, unchecked."""

    def flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, dict) and value and dotted not in FLAGS:
                yield from flatten(value, f"{dotted}.")
            else:
                yield dotted, value

    values = read_yaml(path)
    if not isinstance(values, dict):
        raise SettingsError([schema.Fault(str(path), f"holds {schema.shown(values)}", "pass a mapping of settings")])
    return dict(flatten(values))


def given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given as flags, by dotted name."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    given = {dotted: value for dotted, value in named.items() if dotted in FLAGS and value is not None and value != ()}
    if "train.weights" in given:
        given["train.weights"] = dict(given["train.weights"])
    return given


def spellings() -> dict[str, str]:
    """How the command at work spells the flag of each of its settings, by dotted name."""
    context = click.get_current_context(silent=True)
    parameters = context.command.params if context is not None else ()
    found = {str(parameter.name).replace("__", "."): parameter.opts[0] for parameter in parameters}
    return {dotted: found.get(dotted, spelling(dotted)) for dotted in FLAGS}


def given_names(flags: Mapping[str, Any]) -> dict[str, str]:
    """How the flags that were given are spelled, by the dotted name of their setting."""
    written = spellings()
    return {dotted: written[dotted] for dotted in given_flags(flags)}


def resolve_config(flags: Mapping[str, Any], stored: Path | None = None, default: RunConfig | None = None) -> RunConfig:
    """Defaults, then a run's stored settings, then --config, then the given flags; says what the run's settings decide.

    Raises:
        UserError: what is wrong with any of them, all in one sentence.
    """
    default = default or RunConfig()
    resolved = load(stored) if stored is not None and stored.is_file() else default
    file: Path | None = flags["config_file"]
    from_file = read_config_file(file) if file is not None else {}
    refuse_consent(file or "", from_file.get("evaluate.trust_pickle"))
    given = given_flags(flags)
    catalog.trust([given["train.objective"]] if "train.objective" in given else [])
    weights = {**(_mapping(from_file, "train.weights")), **_mapping(given, "train.weights")}
    values = {**from_file, **given}
    if "train.weights" in given:
        values["train.weights"] = weights
    names = {dotted: f"{dotted} of {file}" for dotted in from_file} | given_names(flags)
    config = override(resolved, values, names)
    if stored is not None and (kept := inherited(flags, config, default, values)):
        echo(f"From {one_line(stored)}: {one_line(kept)}", err=True)
    return config


def _mapping(values: Mapping[str, Any], dotted: str) -> dict[str, Any]:
    found = values.get(dotted)
    return dict(found) if isinstance(found, dict) else {}


def inherited(flags: Mapping[str, Any], config: RunConfig, default: RunConfig, given: Mapping[str, Any]) -> str:
    """What of a command's settings an earlier command decided, and how to have the default again; "" for nothing."""
    own = {name.replace("__", ".") for name in flags}
    # an attack draws as `generate` does, and has no flags for it
    others = {dotted for dotted in FLAGS if dotted.startswith("generate.")} if "attack.tokens" in own else set()
    kept = []
    for dotted in FLAGS:
        value, usual = default_of(dotted, config), default_of(dotted, default)
        if dotted not in own | others or dotted in given or dotted in (*CONCEPT, "base") or value == usual:
            continue
        how = _how_to_change(spellings()[dotted], usual) if dotted in own else "of `generate`"
        kept.append(f"{dotted.split('.')[-1].replace('_', ' ')} {_shown(value)} ({how})")
    return ", ".join(kept)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item:g}" for key, item in value.items())
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _how_to_change(written: str, usual: Any) -> str:
    """A flag with its default; of one that is repeatable, or has none that can be written, the flag alone."""
    is_plain = isinstance(usual, (int, float, str)) and not isinstance(usual, bool)
    return f"{written} {_shown(usual)} for the default" if is_plain else f"{written} for another"
