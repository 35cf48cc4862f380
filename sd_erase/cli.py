"""The command line: each command parses, calls one library function and prints the path of what it made."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sd_erase import __version__, catalog
from sd_erase.bases import ROWS as BASES
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.folders import Busy
from sd_erase.interrupts import Terminated, as_interrupts
from sd_erase.rundir import RunDir, write_text_atomic
from sd_erase.terminal import echo, echo_json, excepthook, one_line, rendered

COUNT = click.IntRange(min=0)
POSITIVE = click.IntRange(min=1)
SHARE = click.FloatRange(0.0, 1.0)
AMOUNT = click.FloatRange(min=0.0)
PLACEHOLDERS = {int: "N", float: "X", str: "NAME"}


class DeviceName(click.Choice):
    """A device, or one of several cards as cuda:N."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if re.fullmatch(r"cuda:\d+", value) else super().convert(value, param, ctx)


class Objective(click.Choice):
    """A row of `catalog.METHODS`, or MODULE:CLASS of the user's own."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if re.fullmatch(r"[\w.]+:\w+", value) else super().convert(value, param, ctx)


class TermWeight(click.ParamType):
    """``TERM=VALUE``, the weight of one loss term."""

    name = "TERM=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        term, sign, number = value.partition("=")
        try:
            if not (sign and term):
                raise ValueError
            return term, float(number)
        except ValueError:
            self.fail(f"{value!r} is not of the form TERM=VALUE, for example preserve=20.", param, ctx)


@dataclass(frozen=True)
class Flag:
    """How one setting looks on the command line; its name and type come from the configuration."""

    help: str
    type: Any = None
    name: str = ""  # where it differs from the setting's
    alias: str = ""  # a second spelling
    metavar: str | None = None


# every setting of `RunConfig`, by its dotted name
FLAGS: dict[str, Flag] = {
    "concepts": Flag("Concept to erase, such as bicycle; repeatable.", name="--concept", metavar="NAME"),
    "concept_file": Flag("YAML card of a concept of your own (words, synonyms, senses to spare).", metavar="FILE"),
    "kind": Flag("What the concept is, where no card says so.", click.Choice(["object", "style", "person", "nudity"])),
    "exact": Flag("Erase the names as they are written, even where one is near a card's."),
    "anchor": Flag("Phrase that takes the concept's place; '' removes the phrase. By default the card's.", metavar="PHRASE"),
    "base": Flag(f"Model to erase from: {', '.join(BASES)}, a diffusers folder, a .safetensors file or a hub id."),
    "seed": Flag("Seed of everything random.", COUNT),
    "device": Flag("Where to compute.", DeviceName(["auto", "cpu", "cuda", "mps"])),
    "harvest.dataset": Flag(
        f"READER:PATH, with READER one of {', '.join(catalog.READERS)} (pocket and synthetic need no path); auto takes the pocket's "
        "scenes for objects on the pocket base, else synthetic.",
        name="--dataset",
        alias="--data",
        metavar="DATASET",
    ),  # fmt: skip
    "harvest.max_forget": Flag("Most pairs to forget; 0 keeps all.", COUNT),
    "harvest.max_retain": Flag("Most pairs to retain; 0 keeps all.", COUNT),
    "harvest.train_share": Flag("Share of the pairs to train on; the rest validates.", SHARE),
    "harvest.max_missing_share": Flag("Share of missing or corrupt images that is still accepted.", SHARE),
    "harvest.exclude": Flag("Word whose captions are left out of both sets, such as one to test on; repeatable.", metavar="WORD"),
    "train.objective": Flag(
        "robust: what the denoiser reads, against an adversary; sd: the same without one; fast: closed form; paper: the published loss; "
        "projection, token, ga, graddiff, kl, emmn and finetune: for comparison only; or MODULE:CLASS of your own.",
        Objective(list(catalog.METHODS)),
    ),
    "train.towers": Flag("CLIP towers to train; only the text tower is exported.", click.Choice(["text", "both"])),
    "train.steps": Flag("Training steps; 0 takes the objective's default.", COUNT),
    "train.batch_size": Flag("Pairs a step.", POSITIVE),
    "train.learning_rate": Flag("Learning rate; 0 takes the objective's default.", AMOUNT),
    "train.weight_decay": Flag("Weight decay.", AMOUNT),
    "train.weights": Flag("Weight of one loss term; repeatable.", TermWeight(), name="--weight"),
    "train.validate_every": Flag("Steps between validations.", POSITIVE),
    "train.lora_rank": Flag("Train a LoRA of this rank instead of the full linear weights; 0 trains those.", COUNT),
    "train.precision": Flag("Mixed precision.", click.Choice(["no", "fp16", "bf16"])),
    "train.clip": Flag(
        "CLIP model (folder or hub id) that the base's text encoder is from, with its vision tower; by default the base's.",
        metavar="CLIP",
    ),  # fmt: skip
    "generate.prompts": Flag("File with one prompt a line, or a bundled list by name (apple); repeatable.", metavar="FILE"),
    "generate.images_per_prompt": Flag("Images of each prompt, each from its own seed.", POSITIVE),
    "generate.steps": Flag("Denoising steps; 0 takes the base's default.", COUNT),
    "generate.guidance": Flag("Classifier-free guidance scale; negative takes the base's default."),
    "generate.height": Flag("Pixels; 0 takes the base's size.", COUNT),
    "generate.width": Flag("Pixels; 0 takes the base's size.", COUNT),
    "generate.negative_prompt": Flag("What the images should not show.", metavar="TEXT"),
    "generate.scheduler": Flag("Sampler; auto keeps the base's.", metavar="NAME"),
    "generate.batch_size": Flag("Images at once; 0 takes the base's default.", COUNT),
    "generate.clip_skip": Flag("Text encoder layers to skip from the end; 1 is what other programs call clip skip 2.", COUNT),
    "evaluate.detector": Flag("Detector card by name or path; auto takes the base's.", metavar="CARD"),
    "evaluate.confidence": Flag("Least confidence of a detection; negative takes the card's.", click.FloatRange(max=1.0)),
    "evaluate.image_size": Flag("Pixels of the detector's input; 0 takes the card's.", COUNT),
    "attack.prompts": Flag("File with one prompt a line, or a bundled list by name (apple); repeatable.", metavar="FILE"),
    "attack.tokens": Flag("Words before the prompt.", POSITIVE),
    "attack.steps": Flag("Steps of the search; 0 leaves the first random words.", COUNT),
    "attack.candidates": Flag("Prefixes tried a step.", POSITIVE),
    "attack.images_per_prompt": Flag("Images of each prompt, each from its own seed.", POSITIVE),
    "export.to": Flag("Program to export for.", click.Choice(list(catalog.EXPORTS))),
    "export.dtype": Flag("Type of the exported numbers.", click.Choice(["float16", "float32", "bfloat16"])),
    "export.output": Flag("File or folder to write; by default the run's export folder.", metavar="PATH"),
    "export.checkpoint": Flag("Checkpoint that a1111 copies; by default the base, where that is one.", metavar="FILE"),
    "export.rank": Flag("Rank of a LoRA; 0 takes the run's own, or 64 for a run of full weights.", COUNT),
    "export.pipeline": Flag("With diffusers: write the complete pipeline, not the encoders alone."),
    "export.force": Flag("Write a LoRA that loses much, or replace a checkpoint's own, different encoder."),
}
CONCEPT = ("concepts", "concept_file", "kind", "exact", "anchor")
COMMON = ("base", "seed", "device")


def section(name: str) -> tuple[str, ...]:
    """The dotted names of one stage's settings."""
    return tuple(dotted for dotted in FLAGS if dotted.startswith(f"{name}."))


def setting(dotted: str) -> tuple[Any, Any]:
    """Type hint and default of a setting."""
    kind: Any = RunConfig
    default: Any = RunConfig()
    for part in dotted.split("."):
        kind, default = typing.get_type_hints(kind)[part], getattr(default, part)
    return kind, default


def settings(*names: str, rename: dict[str, str] | None = None) -> Callable[[Any], Any]:
    """Options for the named settings, all None unless given, and the ones that every command has."""

    def decorate(command: Any) -> Any:
        for dotted in reversed((*names, *COMMON)):
            flag = FLAGS[dotted]
            hint, default = setting(dotted)
            several = typing.get_origin(hint) in (tuple, dict)
            plain = hint if hint in (int, float, bool) else str
            shown = "" if default in ("", (), None, {}, False) or several else f"  [default: {default}]"
            spellings = [(rename or {}).get(dotted) or flag.name or "--" + dotted.split(".")[-1].replace("_", "-"), flag.alias]
            command = click.option(
                *filter(None, spellings),
                dotted.replace(".", "__"),
                type=flag.type or plain,
                is_flag=plain is bool,
                multiple=several,
                default=None,
                metavar=flag.metavar or (None if isinstance(flag.type, click.Choice | TermWeight) else PLACEHOLDERS.get(plain)),
                help=flag.help + shown,
            )(command)
        command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)
        command = click.option(
            "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML settings; flags override them."
        )(command)
        command = click.option(
            "--output-root", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True, help="Where runs lie."
        )(command)
        help_run = "Run to work on; by default a new or the latest one."
        return click.option("--run", "run_path", type=click.Path(path_type=Path), metavar="FOLDER", help=help_run)(command)

    return decorate


class Failure(click.ClickException):
    """One sentence on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Commands(click.Group):
    """A group whose commands end in a sentence, not in a traceback, where the user can do something about it."""

    def main(self, *args: Any, **options: Any) -> Any:
        sys.excepthook = excepthook
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with as_interrupts():
                return super().invoke(ctx)
        except click.UsageError as error:
            error.message = one_line(error.message)
            raise
        except KeyboardInterrupt as interrupt:
            echo("\nInterrupted; run the same command again to resume.", err=True)
            raise click.exceptions.Exit(interrupt.exit_code if isinstance(interrupt, Terminated) else 130) from None
        except UserError as error:
            raise Failure(str(error)) from error
        except OSError as error:
            sentence = explain_os_error(error)
            if sentence is None:
                raise
            raise Failure(sentence) from error
        except Exception as error:
            if "No space left on device" in str(error):  # safetensors has an exception of its own
                raise Failure("no space left on the output's disk: free some, then run the same command again.") from error
            if type(error).__name__ == "OutOfMemoryError":
                raise Failure("The device's memory is full: pass a smaller --batch-size, or --device cpu.") from error
            raise


def explain_os_error(error: OSError) -> str | None:
    """One sentence for what the disk refuses; None for what is rather a bug."""
    where = error.filename or "the output's disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on {where}: free some, then run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} may not be written or read ({error.strerror}): pass a folder of your own with --output-root or --output."
    return None


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, checked, by dotted name."""
    import yaml

    from sd_erase import config

    config.load(path)  # raises for unknown keys and wrong types

    def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, dict) and dotted not in FLAGS:
                yield from flatten(value, f"{dotted}.")
            else:
                yield dotted, value

    return dict(flatten(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))


def resolve_config(flags: dict[str, Any], stored: Path | None = None, default: RunConfig | None = None) -> RunConfig:
    """Defaults, then a run's stored settings, then --config, then the given flags."""
    from sd_erase import config

    resolved = config.load(stored) if stored is not None and stored.is_file() else default or RunConfig()
    if flags["config_file"] is not None:
        resolved = config.override(resolved, read_config_file(flags["config_file"]))
    given = {name.replace("__", "."): value for name, value in flags.items() if name.replace("__", ".") in FLAGS}
    given = {dotted: value for dotted, value in given.items() if value is not None and value != ()}
    if "train.weights" in given:
        given["train.weights"] = dict(given["train.weights"])
    return config.override(resolved, given)


def unfinished_run(root: Path, config: RunConfig, last_stage: str) -> RunDir | None:
    """The newest run with the same settings whose `last_stage` is not complete.

    Raises:
        UserError: another process works on it.
    """
    from sd_erase.config import load
    from sd_erase.provenance import is_running

    stages = tuple(field.name for field in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, field.name)))

    def differs(stored: RunConfig, run: RunDir) -> bool:
        """In what matters up to `last_stage`; a run that only harvested may be trained in any way."""
        later = {"harvest": stages[1:], "train": stages[2:]}.get(last_stage, ())
        ignored = later if run.metrics.exists() or last_stage == "harvest" else ("train", *later)
        names = [field.name for field in dataclasses.fields(config) if field.name not in ignored]
        return any(getattr(stored, name) != getattr(config, name) for name in names)

    for path in sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True):
        run = RunDir(path.parent)
        with contextlib.suppress(UserError):  # a broken run of the past is not this command's business
            if run.read_manifest(last_stage) is None and not differs(load(path), run):
                break
    else:
        return None
    if is_running(run):
        raise Busy(
            f"Run {run} has these settings and is being worked on by another sd-erase process: wait until that has ended, or pass "
            "--run with a folder of its own."
        )
    return run


def begin(
    flags: dict[str, Any],
    last_stage: str,
    default: RunConfig | None = None,
    fill: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> tuple[RunConfig, RunDir]:
    """Settings and run of a command that may start one: --run, an unfinished run with the same settings, or a new one."""
    from sd_erase.bases import resolve
    from sd_erase.concepts import load_concepts

    path: Path | None = flags["run_path"]
    if path is not None:
        RunDir(path).check_ours()
    config = fill(resolve_config(flags, None if path is None else RunDir(path).config, default))
    if not config.concepts and not config.concept_file:
        raise UserError("No concept is given: pass --concept, for example --concept bicycle, or --concept-file.")
    load_concepts(config)  # names and cards are refused, or asked about, before a run is begun
    base = resolve(config.base)
    if path is not None:
        return config, RunDir(path)
    root, concept = flags["output_root"], "-".join(config.concepts) or Path(config.concept_file).stem
    return config, unfinished_run(root, config, last_stage) or RunDir.next(root, concept, base.name)


def resume(flags: dict[str, Any]) -> tuple[RunConfig, RunDir]:
    """Settings and run of a command that works on a trained one: --run or the latest."""
    path: Path | None = flags["run_path"]
    run = RunDir(path) if path is not None else RunDir.latest(flags["output_root"], "train")
    if not run.config.is_file():
        raise UserError(f"Run {run} has no config.yaml: pass the folder of a run with --run, or run `sd-erase train` first.")
    return resolve_config(flags, run.config), run


@contextlib.contextmanager
def working_on(config: RunConfig, run: RunDir, store: bool = True, about: dict[str, Any] | None = None) -> Iterator[None]:
    """Be the one process that writes to the run, its settings first; where the input was wrong, leave nothing of a new run behind.

    Of a new run in a folder that was there before, the folder stays; of one whose harvest names a file of what it missed, all.
    """
    from sd_erase.stages import write_config, writing

    is_new, is_made = not run.config.exists(), not run.path.exists()
    with writing(config, run, about):
        stored = None if is_new else run.config.read_text(encoding="utf-8")
        if store and not is_new:
            write_config(config, run)
        echo(f"Run {one_line(run)}", err=True)
        try:
            yield
        except UserError as error:
            if stored is not None:
                write_text_atomic(run.config, stored)  # the refused settings must not stick
            elif not run.manifest("harvest").exists() and str(run.missing) not in str(error):
                run.discard(is_made)
            raise


def perform(
    stages: tuple[str, ...],
    config: RunConfig,
    run: RunDir,
    as_json: bool,
    store: bool = True,
    more: Callable[[RunConfig, RunDir, Any], dict[str, Any]] | None = None,
) -> None:
    """Run `stages` one after the other, then `more`, and print the last one's result; `store`: keep the settings in the run."""
    from sd_erase.progress import RichProgress
    from sd_erase.stages import output_of, run_stage

    result: dict[str, Any] = {}
    with working_on(config, run, store):
        for stage in stages:
            result = run_stage(stage, config, run, RichProgress())
            warn(result)
        further = more(config, run, RichProgress()) if more is not None else {}
        warn(further)
        result = {**result, **further}
    output = output_of(stages[-1], run, result)
    if as_json:
        echo_json({"run": str(run), "output": str(output), **result})
    else:
        echo(summary(stages[-1], result))
        echo(one_line(output))
        if "prompts_file" in further:
            echo(one_line(further["prompts_file"]))


def warn(result: dict[str, Any]) -> None:
    for warning in result.get("warnings", ()):
        echo(f"Warning: {one_line(warning)}", err=True)


def summary(stage: str, result: dict[str, Any]) -> str:
    """What a stage found, for reading."""
    if stage == "evaluate":
        return table(result)
    if stage == "attack":
        from sd_erase.attacks.stage import render

        return render(result)
    if stage == "export":
        return "\n".join(one_line(export_summary(file)) for file in result["files"])
    if stage == "harvest":
        return harvest_summary(result)
    skipped = {"stage", "inputs", "warnings"}
    lines = [f"{name}: {value}" for name, value in result.items() if name not in skipped and isinstance(value, (int, float, str))]
    lines += [
        f"{name}: " + ", ".join(f"{key} {item}" for key, item in value.items())
        for name, value in result.items()
        if isinstance(value, dict) and name not in skipped and all(isinstance(item, (int, float, str)) for item in value.values())
    ]
    return "\n".join(map(one_line, lines))


def export_summary(file: dict[str, Any]) -> str:
    """What stands in an exported file, and how far it is from the erased encoder."""
    parts = [f"{file['encoder']}: {file['tensors']} tensors"]
    if "swapped" in file:
        parts.append(f"{file['swapped']} of the encoder swapped ({file['changed']} differ), all others bit-identical")
    if "rank" in file:
        parts.append(f"rank {file['rank']}, {100 * file['residual']:.2g} % of the change of the weights lost")
    parts.append(f"{file['bytes'] / 1e6:.1f} MB, {file['dtype']}")
    return f"{', '.join(parts)}; loaded back, largest relative difference {file['difference']:.1e}"


def harvest_summary(result: dict[str, Any]) -> str:
    """How many pairs, why they were chosen, and some of them to look at before anything is trained."""
    lines = [
        f"{result['dataset']}: {result['statistics']['captions']} captions in {result['seconds']:.1f} s; split {result['splits']}"
    ]
    if result["dataset"] == "synthetic":
        drawn = f"{result['images']} drawn by the original" if result["images"] else "none, the objective works from text alone"
        lines.append(f"images: {drawn}")
    for name in ("forget", "retain"):
        counts, reasons = result["counts"][name], result["reasons"][name]
        shown = ", ".join(f"{reason} {count}" for reason, count in list(reasons.items())[:6])
        more = f" and {len(reasons) - 6} more" if len(reasons) > 6 else ""
        lines.append(f"{name}: {counts['train']} to train on, {counts['validation']} to validate ({shown}{more})")
        lines += [f"    {row['caption']}  [{row['reason']}]" for row in result["sample"][name]]
    return "\n".join(map(one_line, lines))


def table(result: dict[str, Any]) -> str:
    """The evaluation's table as it stands in the terminal."""
    from sd_erase.evaluation import render_table

    return as_text(render_table(result))


def as_text(renderable: Any) -> str:
    """A string, or what rich makes of a renderable on this terminal."""
    return renderable if isinstance(renderable, str) else rendered(renderable)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sd-erase")
def main() -> None:
    """Make Stable Diffusion forget a concept by unlearning it from its CLIP text encoder.

    \b
    Example:
      sd-erase demo
      sd-erase train --concept bicycle
      sd-erase generate --prompts bicycle
      sd-erase evaluate
      sd-erase export --to comfyui
      sd-erase report
    """


@main.command()
@click.option("-n", "--prompts-count", type=POSITIVE, default=50, show_default=True, help="Prompts that --write-prompts writes.")
@click.option(
    "--write-prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write captions that no pair contains, to generate.",
)
@click.option("--force", is_flag=True, help="Let --write-prompts replace a file that it did not write.")
@settings(*CONCEPT, *section("harvest"))
def harvest(as_json: bool, write_prompts: Path | None, prompts_count: int, force: bool, **flags: Any) -> None:
    """Gather captions with the concept (to forget) and without it (to retain).

    \b
    Example:
      sd-erase harvest --concept bicycle
      sd-erase harvest --concept apple --dataset flickr30k:data/flickr30k --json
      sd-erase harvest --concept "van gogh" --data synthetic
      sd-erase harvest --concept bicycle --write-prompts bicycle-held-out.txt -n 50
    """

    def write(config: RunConfig, run: RunDir, progress: Any) -> dict[str, Any]:
        from sd_erase import pairs

        return {} if write_prompts is None else pairs.write_prompts(config, run, write_prompts, prompts_count, progress)

    config, run = begin(flags, "harvest")
    if write_prompts is not None:
        from sd_erase.pairs import check_prompts_file

        check_prompts_file(config, run, write_prompts, force)
    perform(("harvest",), config, run, as_json, more=write)


@main.command()
@click.option("--fast", "train__objective", flag_value="fast", help="Short for --objective fast: no training, seconds on a CPU.")
@click.option(
    "--robust",
    "train__objective",
    flag_value="robust",
    help="Short for --objective robust, the default: trained against attacks.",
)
@click.option(
    "--no-robust", "train__objective", flag_value="sd", help="Short for --objective sd: without an adversary, in less time."
)
@settings(*CONCEPT, *section("train"), *section("harvest"))
def train(as_json: bool, **flags: Any) -> None:
    """Train an erased text encoder; harvests first where the run has no pairs.

    \b
    Example:
      sd-erase train --concept bicycle
      sd-erase train --concept bicycle --objective paper --towers both
      sd-erase train --concept apple --anchor "an orange" --weight preserve=20
      sd-erase train --concept "cell phone" --fast
      sd-erase train --concept "van gogh" --data synthetic
    """
    perform(("harvest", "train"), *begin(flags, "train"), as_json)


@main.command()
@settings(*section("generate"))
def generate(as_json: bool, **flags: Any) -> None:
    """Draw images with the original and the erased encoder from the same seeds and noise.

    \b
    Example:
      sd-erase generate --prompts bicycle --images-per-prompt 4
      sd-erase generate --prompts prompts/apple.txt --prompts my-prompts.txt --steps 30
    """
    perform(("generate",), *resume(flags), as_json)


@main.command()
@settings(*section("evaluate"))
def evaluate(as_json: bool, **flags: Any) -> None:
    """Count how often a detector finds the concept, and all else that the prompts name.

    \b
    Example:
      sd-erase evaluate
      sd-erase evaluate --detector yolov5su --confidence 0.4 --json
    """
    perform(("evaluate",), *resume(flags), as_json)


@main.command()
@settings(*section("attack"), *section("evaluate"))
def attack(as_json: bool, **flags: Any) -> None:
    """Search words that bring the concept back when they stand before a prompt, and count how often they do.

    \b
    Example:
      sd-erase attack --prompts bicycle
      sd-erase attack --prompts my-prompts.txt --tokens 5 --steps 100
    """
    perform(("attack",), *resume(flags), as_json)


@main.command()
@settings(*section("export"))
def export(as_json: bool, **flags: Any) -> None:
    """Write the erased encoder for another program, load it back and compare.

    \b
    Example:
      sd-erase export --to comfyui
      sd-erase export --to comfyui --dtype float32 --output ComfyUI/models/text_encoders
      sd-erase export --to a1111 --checkpoint v1-5-pruned-emaonly.safetensors
      sd-erase export --to lora --rank 64
      sd-erase export --to diffusers --pipeline --output my-model
    """
    # what one export asks for must not decide the next one's: a kept --output would be overwritten, a kept --force forgotten
    perform(("export",), *resume(flags), as_json, store=False)


@main.command()
@settings()
def report(as_json: bool, **flags: Any) -> None:
    """Write one self-contained HTML page about the run.

    \b
    Example:
      sd-erase report
      sd-erase report --run outputs/bicycle-pocket-0001
    """
    perform(("report",), *resume(flags), as_json)


@main.command()
@settings(
    *CONCEPT, "train.objective", "train.towers", "train.steps", "generate.prompts", "generate.images_per_prompt",
    rename={"train.steps": "--train-steps"},
)  # fmt: skip
def demo(as_json: bool, **flags: Any) -> None:
    """Do all of it for bicycle on the embedded pocket model, in a few minutes on two cores.

    \b
    Example:
      sd-erase demo
      sd-erase demo --concept elephant
    """
    from sd_erase import demo as library
    from sd_erase.progress import RichProgress

    config, run = begin(flags, "report", library.DEFAULTS, library.fill)
    with working_on(config, run):
        result = library.demo(config, run, RichProgress())
    warn(result)
    if as_json:
        echo_json(result)
    else:
        echo(table(result["evaluate"]))
        echo(f"Text encoder for ComfyUI: {one_line(result['export']['output'])}")
        echo(f"Page: {one_line(result['output'])}")


@main.command("merge")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--run", "run_path", type=click.Path(path_type=Path), metavar="FOLDER", help="Run to write; by default a new one.")
@click.option(
    "--output-root", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True, help="Where a new run goes."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def merge_command(runs: tuple[Path, ...], run_path: Path | None, output_root: Path, as_json: bool) -> None:
    """Compose trained RUNS of different concepts into one that has forgotten them all, and show what that costs each.

    \b
    Example:
      sd-erase merge outputs/bicycle-pocket-0001 outputs/apple-pocket-0001
      sd-erase generate --prompts bicycle --prompts apple
    """
    from sd_erase.erasure.merge import merge, merged_config, place
    from sd_erase.progress import RichProgress
    from sd_erase.provenance import recorded

    parts = [RunDir(path) for path in runs]
    config = merged_config(parts)
    run, about = place(parts, config, run_path, output_root)
    with working_on(config, run, about=about), recorded(run, "merge", config):
        result = merge(parts, run, config, RichProgress())
    if as_json:
        echo_json({"run": str(run), "output": str(run.encoder), **result})
    else:
        echo("Relative error of hidden states, alone -> merged (0 is perfect):")
        for row in result["interference"]:
            changes = ", ".join(f"{name} {row['alone'][name]:.4f} -> {row['merged'][name]:.4f}" for name in row["alone"])
            echo(one_line(f"  {', '.join(row['concepts'])}: {changes}"))
        echo(one_line(run.encoder))


@main.command("compare")
@click.argument("recipe")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Where it goes; by default outputs/RECIPE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def compare_command(recipe: str, output: Path | None, as_json: bool) -> None:
    """Train, draw and measure several methods, concepts and seeds, into one table.

    RECIPE is a YAML file or the name of a bundled one. An interrupted comparison goes on where it was; two processes may work on
    one folder, on different concepts.

    \b
    Example:
      sd-erase compare pocket-default
      sd-erase compare my-methods.yaml --output outputs/my-methods
    """
    from sd_erase.comparison import compare, read_recipe, render
    from sd_erase.progress import RichProgress

    folder = output or Path("outputs") / Path(recipe).stem
    result = compare(read_recipe(recipe), folder, RichProgress())
    if as_json:
        echo_json({"output": str(folder / "comparison.md"), **result})
    else:
        echo(render(result))
        echo(one_line(folder / "comparison.md"))


class Change(click.ParamType):
    """``SETTING=VALUE``, by dotted name, the value as YAML."""

    name = "SETTING=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        import yaml

        if isinstance(value, tuple):
            return value
        key, sign, text = value.partition("=")
        if not (sign and key and text):
            self.fail(f"{value!r} is not of the form SETTING=VALUE, for example train.steps=40.", param, ctx)
        try:
            return key, yaml.safe_load(text)
        except yaml.YAMLError:
            self.fail(f"The value of {key} is not YAML: {text!r}.", param, ctx)


def bench_options(command: Any) -> Any:
    """What `reproduce` and `sweep` have in common."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option(
            "--set", "changes", multiple=True, type=Change(), help="Setting of all methods, such as train.steps=3; repeatable."
        ),
        click.option("--device", default="auto", show_default=True, type=FLAGS["device"].type, help="Where to compute."),
        click.option(
            "--dataset", "datasets", multiple=True, metavar="DATASET",
            help="READER:PATH of your own data: cifar100 for the class tables, others for the caption tables; repeatable.",
        ),
        click.option("--base", default="pocket", show_default=True, help=FLAGS["base"].help),
    ):  # fmt: skip
        command = option(command)
    return command


@main.command("reproduce")
@click.argument("experiments", nargs=-1, required=True, metavar="ID...")
@click.option("--output", type=click.Path(path_type=Path), default=Path("outputs/reproduce"), show_default=True, help="Folder.")
@click.option(
    "--method", "objectives", multiple=True, metavar="OBJECTIVE", help="One more row: an objective, or MODULE:CLASS; repeatable."
)
@click.option(
    "--concept",
    "concepts",
    multiple=True,
    metavar="NAME",
    help="Erase this in place of the recipe's, 'A + B' jointly; repeatable.",
)
@bench_options
def reproduce_command(
    experiments: tuple[str, ...],
    objectives: tuple[str, ...],
    concepts: tuple[str, ...],
    output: Path,
    base: str,
    datasets: tuple[str, ...],
    device: str,
    changes: tuple[tuple[str, Any], ...],
    as_json: bool,
) -> None:
    """Measure the CLIPErase paper's tables and figures, beside the printed figures.

    ID is a table or figure of the paper (table2, figure3, ...), cost, or all. Runs are shared between them; an interrupted command
    goes on where it was.

    \b
    Example:
      sd-erase reproduce table2 figure3
      sd-erase reproduce table2 --method my_method:MyMethod
      sd-erase reproduce all --base sd15 --dataset cifar100:data/cifar --dataset flickr30k:data/flickr30k
    """
    from sd_erase.progress import RichProgress
    from sd_erase.reproduce import names, render, reproduce
    from sd_erase.reproduce.bench import Bench

    asked = names(experiments)
    bench = Bench(output, base, datasets, device, RichProgress())
    with bench.working():
        results = [reproduce(name, bench, dict(changes), objectives, concepts) for name in asked]
    if as_json:
        echo_json({"output": str(output), "experiments": results})
        return
    for result in results:
        echo(render(result))
        echo(one_line(output / result["id"] / f"{result['id']}.md"))


@main.command("sweep")
@click.option("--concept", "concepts", multiple=True, required=True, metavar="NAME", help="Concept to erase; repeatable.")
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="SETTING=V1,V2|LOW..HIGH",
    help="Setting to search over, by dotted name; repeatable.",
)
@click.option(
    "--random", "number", type=POSITIVE, default=None, help="Try N random points instead of the whole grid.", metavar="N"
)
@click.option(
    "--data",
    "side",
    type=click.Choice(["classes", "captions"]),
    default="classes",
    show_default=True,
    help="Judge on single objects and class names, or on captions.",
)
@click.option("--seed", type=COUNT, default=0, show_default=True, help="Seed of the training and of the random points.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("outputs/sweep"), show_default=True, help="Folder.")
@bench_options
def sweep_command(
    concepts: tuple[str, ...],
    over: tuple[str, ...],
    number: int | None,
    side: str,
    seed: int,
    output: Path,
    base: str,
    datasets: tuple[str, ...],
    device: str,
    changes: tuple[tuple[str, Any], ...],
    as_json: bool,
) -> None:
    """Search settings, and plot forgetting against retention, both CLIP's own on the validation split.

    \b
    Example:
      sd-erase sweep --concept apple --set train.objective=paper --over train.learning_rate=1e-4,3e-4 --over train.weights.forgetting=1,3
      sd-erase sweep --concept apple --over train.learning_rate=1e-5..1e-3 --random 8
    """
    from sd_erase.progress import RichProgress
    from sd_erase.reproduce.bench import Bench
    from sd_erase.reproduce.sweep import read_axis, render, sweep

    axes = [read_axis(text) for text in over]
    bench = Bench(output, base, datasets, device, RichProgress())
    with bench.working():
        result = sweep(bench, " + ".join(concepts), side, dict(changes), axes, number or 0, seed)
    if as_json:
        echo_json({"output": str(output / "sweep.md"), **result})
    else:
        echo(render(result))
        echo(one_line(output / "sweep.md"))


@main.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Say what a .safetensors file is, what was erased from it, and whether it is intact.

    \b
    Example:
      sd-erase inspect outputs/bicycle-pocket-0001/export/bicycle-pocket-text_encoder-fp16.safetensors
    """
    from sd_erase.export.metadata import inspect_file

    found = inspect_file(file)
    if as_json:
        echo_json(found)
    else:
        for name, value in found.items():
            if name == "metadata":
                echo("metadata:")
                for key, item in value.items():
                    echo(one_line(f"  {key[:200]}: {item if len(item) <= 200 else item[:197] + '...'}"))
            else:
                echo(one_line(f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"))
    if found["problems"]:
        raise Failure(f"{file} is damaged: {found['problems'][0]}")
