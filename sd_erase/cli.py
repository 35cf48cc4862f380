"""The command line: each command parses, calls one library function and prints the path of what it made."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from sd_erase import __version__, catalog, parallel, quiet, schema
from sd_erase.commands import gate, house
from sd_erase.commands.common import Failure, Once
from sd_erase.commands.gate import fail_over
from sd_erase.config import RunConfig
from sd_erase.errors import UserError, is_full_disk
from sd_erase.flags import (
    COMMON,
    CONCEPT,
    FLAGS,
    Checked,
    FilePath,
    given_names,
    options,
    resolve_config,
    section,
    settings,
    spelling,
    type_of,
)
from sd_erase.folders import lasting
from sd_erase.interrupts import Terminated, as_interrupts
from sd_erase.rundir import RunDir
from sd_erase.schema import Rule
from sd_erase.terminal import echo, echo_json, excepthook, one_line, rendered

PROMPTS = Rule(low=1, high=100_000)
PROCESSES = Rule(low=1, high=1024)
POINTS = Rule(low=1, high=100_000)
# what decides how an audit draws
AUDITED = tuple(
    f"generate.{name}"
    for name in ("prompts", "steps", "guidance", "height", "width", "negative_prompt", "scheduler", "batch_size")
)
SIDES = Rule(choices=("classes", "captions"))
EXACT = click.option("--exact", is_flag=True, help=FLAGS["exact"].help)


class Commands(click.Group):
    """A group whose commands end in a sentence, not in a traceback, where the user can do something about it."""

    command_class = Once

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        sys.excepthook = excepthook
        quiet.process()
        given = list(sys.argv[1:] if args is None else args)
        return super().main(given, *others, obj=given, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with as_interrupts(), catalog.only_trusted():
                return super().invoke(ctx)
        except click.UsageError as error:
            error.message = one_line(error.message)  # type: ignore[misc]  # final since click 8.3, by annotation alone
            error.ctx = error.ctx or ctx  # of a flag with a value; then click names the help
            raise
        except KeyboardInterrupt as interrupt:
            if not parallel.is_explained() and parallel.first_to_say("interrupted"):
                echo("\nInterrupted; run the same command again to resume.", err=True)
            raise click.exceptions.Exit(interrupt.exit_code if isinstance(interrupt, Terminated) else 130) from None
        except parallel.Lost as error:
            if parallel.is_ours() or parallel.is_explained():
                raise click.exceptions.Exit(parallel.ENDED if parallel.is_ours() else Failure.exit_code) from error
            raise Failure(str(error)) from error
        except UserError as error:
            if not parallel.first_to_say(str(error)):
                raise click.exceptions.Exit(Failure.exit_code) from error
            raise Failure(str(error)) from error
        except OSError as error:
            sentence = explain_os_error(error)
            if sentence is None:
                raise
            raise Failure(sentence) from error
        except Exception as error:
            if is_full_disk(error):
                raise Failure("no space left on the output's disk: free some, then run the same command again.") from error
            if type(error).__name__ == "OutOfMemoryError":
                raise Failure("The device's memory is full: pass a smaller --batch-size, or --device cpu.") from error
            raise


def explain_os_error(error: OSError) -> str | None:
    """One sentence for what the disk refuses; None for what is rather a bug."""
    where = lasting(error.filename) if isinstance(error.filename, str) else "the output's disk"
    if is_full_disk(error):
        return f"no space left on {where}: free some, then run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} may not be written or read ({error.strerror}): pass a folder of your own with --output-root or --output."
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
        return f"{schema.shown(str(where))} is no path that this system has ({error.strerror}): pass another one."
    return None


def begin(
    flags: dict[str, Any],
    last_stage: str,
    default: RunConfig | None = None,
    fill: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> tuple[RunConfig, RunDir]:
    """Settings and run of a command that may start one, from its flags: see `runs.begin`."""
    from sd_erase import runs

    path: Path | None = flags["run_path"]
    runs.check_place(path, flags["new"])
    config = fill(resolve_config(flags, None if path is None else RunDir(path).config, default))
    return runs.begin(config, last_stage, flags["output_root"], path, flags["new"], given_names(flags))


def resume(flags: dict[str, Any], stage: str) -> tuple[RunConfig, RunDir]:
    """Settings and run of a command that does `stage` with a trained one: --run or the latest."""
    from sd_erase import runs

    run = runs.trained(flags["output_root"], flags["run_path"])
    config = resolve_config(flags, run.config)
    runs.check_stage(config, run, stage, given_names(flags))
    return config, run


@contextlib.contextmanager
def working_on(config: RunConfig, run: RunDir, store: bool = True, about: dict[str, Any] | None = None) -> Iterator[None]:
    """Work on a run as `runs.working_on` says, and say which it is."""
    from sd_erase import runs

    with runs.working_on(config, run, store, about):
        echo(f"Run {one_line(run)}", err=True)
        yield


def perform(
    stages: tuple[str, ...],
    config: RunConfig,
    run: RunDir,
    as_json: bool,
    store: bool = True,
    more: Callable[[RunConfig, RunDir, Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run `stages` one after the other, then `more`; print the last one's result, and return it; `store`: keep the settings in the run."""
    from sd_erase.progress import RichProgress
    from sd_erase.stages import assist, output_of, run_stage

    result: dict[str, Any] = {}
    if not parallel.is_main():
        for stage in stages:
            assist(stage, config, run)
        return {}
    with working_on(config, run, store):
        for stage in stages:
            result = run_stage(stage, config, run, RichProgress())
            warn(result)
        further = more(config, run, RichProgress()) if more is not None else {}
        warn(further)
        result = {**result, **further}
    if not run.done and not further:
        say_nothing_was_done(run, begins=stages[0] == "harvest")
    output = output_of(stages[-1], run, result)
    if as_json:
        echo_json({"run": str(run), "output": str(output), **result})
    else:
        echo(summary(stages[-1], result))
        echo(one_line(output))
        if "prompts_file" in further:
            echo(one_line(further["prompts_file"]))
    return result


def by_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command be done by several processes: those that --processes starts, or that another launcher started."""

    @click.option(
        "--processes",
        type=Checked(int, PROCESSES),
        metavar="N",
        help="Work in N processes, each on a graphics card (or some cores) of its own.  [1 to 1024; default: 1]",
    )
    @functools.wraps(command)
    def run(processes: int | None, **given: Any) -> None:
        context = click.get_current_context()
        if processes is not None and not parallel.is_ours():
            from sd_erase import launch

            if "WORLD_SIZE" in os.environ:
                raise UserError("--processes is for a command that no other launcher starts: leave it out, or the launcher.")
            if processes > 1:
                context.exit(launch.launch(processes, context.find_root().obj, given["device"] or "auto"))
        with parallel.together():
            file = given["config_file"]
            text = "" if file is None or not file.is_file() else file.read_text(encoding="utf-8", errors="replace")
            flags = {
                spelling(name.replace("__", ".")) if name.replace("__", ".") in FLAGS else name: value
                for name, value in given.items()
            }
            parallel.refuse_differences({**flags, "--config": text, "the version": __version__})
            command(**given)

    return run


def say_nothing_was_done(run: RunDir, begins: bool) -> None:
    """Tell that a command found all of its work done and, of one that `begins` a run, how to have another."""
    another = "; for another run pass --new, another --seed or --run FOLDER" if begins else ""
    echo(f"Run {one_line(run)} has finished this with these settings: nothing was done again{another}.", err=True)


def say_all_was_there(folder: Path) -> None:
    """Tell that a table, a figure or a comparison was finished, and how to have it made once more."""
    echo(
        f"{one_line(folder)} holds all of this, finished with these settings: nothing was done again; for another pass --output.",
        err=True,
    )


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
        from sd_erase.clients import line

        lines = [export_summary(file) for file in result["files"]]
        return "\n".join(map(one_line, [*lines, *(f"  {line(**client)}" for client in result.get("programs", ()))]))
    if stage == "harvest":
        return harvest_summary(result)
    skipped = {"stage", "inputs", "warnings"}
    lines = [f"{name}: {value}" for name, value in result.items() if name not in skipped and isinstance(value, (int, float, str))]
    lines += [
        f"{name}: " + ", ".join(entry(key, item) for key, item in value.items())
        for name, value in result.items()
        if isinstance(value, dict) and name not in skipped and all(isinstance(item, (int, float, str)) for item in value.values())
    ]
    return "\n".join(map(one_line, lines))


def entry(key: str, value: int | float | str) -> str:
    """One of several figures of a name, or what belongs to a name."""
    if isinstance(value, str):
        return f"{key} → {value}"
    return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"


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
    from sd_erase.metrics.tables import render_table

    return as_text(render_table(result))


def as_text(renderable: Any) -> str:
    """A string, or what rich makes of a renderable on this terminal."""
    return renderable if isinstance(renderable, str) else rendered(renderable)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sd-erase")
@click.option(
    "--trust-code",
    "trusted",
    multiple=True,
    metavar="MODULE:CLASS",
    help="Import this objective, which a run's settings or a recipe name; repeatable. Needless where the command itself names it.",
)
def main(trusted: tuple[str, ...]) -> None:
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
    catalog.trust(trusted)


@main.command()
@click.option(
    "-n",
    "--prompts-count",
    type=Checked(int, PROMPTS),
    default=50,
    show_default=True,
    help="Prompts that --write-prompts writes.",
)
@click.option(
    "--write-prompts",
    type=FilePath(),
    metavar="FILE",
    help="Also write captions that no pair contains, to generate.",
)
@click.option("--force", is_flag=True, help="Let --write-prompts replace a file that it did not write.")
@click.option("--new", is_flag=True, help="Begin another run, even where one with these settings is finished.")
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
@click.option("--new", is_flag=True, help="Begin another run, even where one with these settings is finished.")
@by_processes
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
    perform(("harvest", "train"), *parallel.agreed(lambda: begin(flags, "train")), as_json)


@main.command()
@by_processes
@settings(*section("generate"))
def generate(as_json: bool, **flags: Any) -> None:
    """Draw images with the original and the erased encoder from the same seeds and noise.

    \b
    Example:
      sd-erase generate --prompts bicycle --images-per-prompt 4
      sd-erase generate --prompts prompts/apple.txt --prompts my-prompts.txt --steps 30
    """
    perform(("generate",), *parallel.agreed(lambda: resume(flags, "generate")), as_json)


@main.command()
@by_processes
@fail_over
@settings(*section("evaluate"))
def evaluate(as_json: bool, limit: float | None, **flags: Any) -> None:
    """Count how often a judge finds the concept, and all else that the prompts name.

    Objects are judged by the base's detector, styles and people by its own frozen CLIP, nudity by nudenet, or by --judge.

    \b
    Example:
      sd-erase evaluate
      sd-erase evaluate --judge yolov5su --confidence 0.4 --json
      sd-erase evaluate --judge clip --judge pocket
      sd-erase evaluate --fail-over 2%
    """
    result = perform(("evaluate",), *parallel.agreed(lambda: resume(flags, "evaluate")), as_json)
    if limit is not None and result:
        gate.check(result, limit)


@main.command()
@by_processes
@settings(*section("attack"), *section("evaluate"))
def attack(as_json: bool, **flags: Any) -> None:
    """Search words that bring the concept back when they stand before a prompt, and count how often they do.

    \b
    Example:
      sd-erase attack --prompts bicycle
      sd-erase attack --prompts my-prompts.txt --tokens 5 --steps 100
    """
    perform(("attack",), *parallel.agreed(lambda: resume(flags, "attack")), as_json)


@main.command()
@settings(*section("export"))
def export(as_json: bool, **flags: Any) -> None:
    """Write the erased encoder for another program, load it back and compare.

    \b
    Example:
      sd-erase export --to comfyui
      sd-erase export --to comfyui --dtype float32 --output ComfyUI/models/text_encoders
      sd-erase export --to a1111 --checkpoint v1-5-pruned-emaonly.safetensors
      sd-erase export --to forge
      sd-erase export --to lora --rank 64
      sd-erase export --to diffusers --pipeline --output my-model
    """
    # what one export asks for must not decide the next one's: a kept --output would be overwritten, a kept --force forgotten
    perform(("export",), *resume(flags, "export"), as_json, store=False)


@main.command()
@settings()
def report(as_json: bool, **flags: Any) -> None:
    """Write one self-contained HTML page about the run.

    \b
    Example:
      sd-erase report
      sd-erase report --run outputs/bicycle-pocket-0001
    """
    perform(("report",), *resume(flags, "report"), as_json)


@main.command()
@click.option("--new", is_flag=True, help="Begin another run, even where one with these settings is finished.")
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
    if not run.done:
        say_nothing_was_done(run, begins=True)
    if as_json:
        echo_json(result)
    else:
        echo(table(result["evaluate"]))
        echo(f"Text encoder for ComfyUI: {one_line(result['export']['output'])}")
        echo(f"Page: {one_line(result['output'])}")


@main.command("merge")
@click.argument("runs", nargs=-1, required=True, type=FilePath())
@click.option("--run", "run_path", type=FilePath(), metavar="FOLDER", help="Run to write; by default a new one.")
@click.option("--output-root", type=FilePath(), default=Path("outputs"), show_default=True, help="Where a new run goes.")
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
    if not run.done:
        say_nothing_was_done(run, begins=False)
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
@click.option("--output", type=FilePath(), metavar="FOLDER", help="Where it goes; by default outputs/RECIPE.")
@EXACT
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def compare_command(recipe: str, output: Path | None, exact: bool, as_json: bool) -> None:
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
    asked, done = read_recipe(recipe), list[str]()
    if exact:
        asked = dataclasses.replace(asked, settings={**asked.settings, "exact": True})
    result = compare(asked, folder, RichProgress(), done)
    if not done:
        say_all_was_there(folder)
    if as_json:
        echo_json({"output": str(folder / "comparison.md"), **result})
    else:
        echo(render(result))
        echo(one_line(folder / "comparison.md"))


class Change(click.ParamType):
    """``SETTING=VALUE``, by dotted name, the value as YAML."""

    name = "SETTING=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        from sd_erase import yamlfile

        if isinstance(value, tuple):
            return value
        key, sign, text = value.partition("=")
        if not (sign and key and text):
            self.fail(f"{value!r} is not of the form SETTING=VALUE: pass train.steps=40, for example.", param, ctx)
        try:
            return key, yamlfile.parse(text, f"The value of {key}")
        except UserError as error:
            self.fail(str(error), param, ctx)


def bench_options(command: Any) -> Any:
    """What `reproduce` and `sweep` have in common."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        EXACT,
        click.option(
            "--set", "changes", multiple=True, type=Change(), help="Setting of all methods, such as train.steps=3; repeatable."
        ),
        click.option("--device", default="auto", show_default=True, type=type_of("device", checked=True), help="Where to compute."),
        click.option(
            "--dataset", "datasets", multiple=True, type=type_of("harvest.dataset", checked=True), metavar="DATASET",
            help="READER:PATH of your own data: cifar100 for the class tables, others for the caption tables; repeatable.",
        ),
        click.option("--base", default="pocket", show_default=True, type=type_of("base", checked=True), help=FLAGS["base"].help),
    ):  # fmt: skip
        command = option(command)
    return command


@main.command("reproduce")
@click.argument("experiments", nargs=-1, required=True, metavar="ID...")
@click.option("--output", type=FilePath(), default=Path("outputs/reproduce"), show_default=True, help="Folder.")
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
    exact: bool,
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
    from sd_erase.reproduce.asked import check_experiments
    from sd_erase.reproduce.bench import Bench

    catalog.trust([*objectives, *(value for setting, value in changes if setting == "train.objective")])
    asked = names(experiments)
    for name in experiments:
        if name != "all":
            catalog.resolve(catalog.EXPERIMENTS, name, "Experiment")
    check_experiments(asked, base, datasets, device, dict(changes), objectives, concepts, exact)
    bench = Bench(output, base, datasets, device, RichProgress(), exact)
    with bench.working():
        results = [reproduce(name, bench, dict(changes), objectives, concepts) for name in asked]
    if bench.finished == asked:
        say_all_was_there(output)
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
    "--random",
    "number",
    type=Checked(int, POINTS),
    default=None,
    help="Try N random points instead of the whole grid.",
    metavar="N",
)
@click.option(
    "--data",
    "side",
    type=Checked(str, SIDES),
    default="classes",
    show_default=True,
    help="Judge on single objects and class names, or on captions.",
)
@click.option(
    "--seed",
    type=type_of("seed", checked=True),
    default=0,
    show_default=True,
    help="Seed of the training and of the random points.",
)
@click.option("--output", type=FilePath(), default=Path("outputs/sweep"), show_default=True, help="Folder.")
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
    exact: bool,
    as_json: bool,
) -> None:
    """Search settings, and plot forgetting against retention, both CLIP's own on the validation split.

    \b
    Example:
      sd-erase sweep --concept apple --set train.objective=paper --over train.learning_rate=1e-4,3e-4 --over train.weights.forgetting=1,3
      sd-erase sweep --concept apple --over train.learning_rate=1e-5..1e-3 --random 8
    """
    from sd_erase.progress import RichProgress
    from sd_erase.reproduce.asked import check_sweep
    from sd_erase.reproduce.bench import Bench
    from sd_erase.reproduce.sweep import points, read_axis, render, sweep

    axes = [read_axis(text) for text in over]
    tried = [{**dict(changes), **point} for point in points(axes, number or 0, seed)]
    catalog.trust(point["train.objective"] for point in tried if "train.objective" in point)
    check_sweep(tried, " + ".join(concepts), side, base, datasets, device, seed, [axis.setting for axis in axes], exact)
    bench = Bench(output, base, datasets, device, RichProgress(), exact)
    with bench.working():
        result = sweep(bench, " + ".join(concepts), side, dict(changes), axes, number or 0, seed)
    if bench.finished:
        say_all_was_there(output)
    if as_json:
        echo_json({"output": str(output / "sweep.md"), **result})
    else:
        echo(render(result))
        echo(one_line(output / "sweep.md"))


@main.command("names")
@click.argument("concepts", nargs=-1, metavar="CONCEPT...")
@options("concept_file", "kind", "exact", "anchor", "base", "device")
@click.option("--config", "config_file", type=FilePath(), metavar="FILE", help="YAML settings; flags override them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def names_command(as_json: bool, **flags: Any) -> None:
    """Show which words a base reads as a concept, card or no card; nothing is trained.

    \b
    Example:
      sd-erase names dog
      sd-erase names bicycle --base my-checkpoint.safetensors --json
    """
    from sd_erase.erasure import names
    from sd_erase.progress import RichProgress

    told = names.of_base(resolve_config(flags), RichProgress())
    if as_json:
        echo_json(told)
    else:
        echo("\n".join(map(one_line, names.render(told).split("\n"))))


@main.command("audit")
@click.argument("source", type=FilePath(), metavar="RUN-OR-FILE")
@click.option(
    "--quick",
    "share",
    flag_value="quick",
    help="Fewer images and shorter searches: a first look (the pocket model on two cores: four minutes).",
)
@click.option("--full", "share", flag_value="full", help="Four times the images and longer searches.")
@click.option(
    "--probe",
    "probes",
    multiple=True,
    type=Checked(str, Rule(choices=tuple(catalog.PROBES))),
    metavar="NAME",
    help=f"Carry out this alone: {', '.join(catalog.PROBES)}; repeatable.",
)
@click.option("--output", type=FilePath(), metavar="FOLDER", help="Where it goes; by default outputs/audit-NAME.")
@options(*CONCEPT, *AUDITED, *section("evaluate"), *COMMON)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def audit_command(
    source: Path, share: str | None, probes: tuple[str, ...], output: Path | None, as_json: bool, **flags: Any
) -> None:
    """Say whether a concept is really gone, what was not tried, and what broke: one report card.

    RUN-OR-FILE is a run, a file that `export` wrote, or anybody's erased diffusers folder, its denoiser included. --concept and --base say
    what the source does not. An interrupted audit goes on where it was.

    \b
    Example:
      sd-erase audit outputs/bicycle-pocket-0001
      sd-erase audit bicycle-sd15-text_encoder-vit-l-fp16.safetensors --quick
      sd-erase audit someones-pipeline --concept "van gogh" --base sd14 --judge clip:my-clip
    """
    from sd_erase.auditing.card import render
    from sd_erase.auditing.job import Asked, audit, default_folder
    from sd_erase.concepts import load_concepts
    from sd_erase.progress import RichProgress

    folder = output or default_folder(source)
    config = resolve_config({**flags, "config_file": None})
    if config.concepts or config.concept_file:
        load_concepts(config)  # a slip in a name is said before a file of gigabytes is read
    asked = Asked(config, "base" in given_names(flags), share or "default", probes)
    with contextlib.redirect_stdout(sys.stderr):  # the libraries' own messages
        result = audit(source, folder, asked, RichProgress())
    warn(result)
    if result["again"]:
        say_all_was_there(folder)
    if as_json:
        echo_json({"output": str(folder / "audit.md"), **result})
        return
    echo(render(result))
    echo(one_line(folder / "audit.md"))
    if result["prompt_file"]:
        echo(one_line(folder / result["prompt_file"]))


@main.command("inspect")
@click.argument("file", type=FilePath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Say what a .safetensors file is, what was erased from it, and whether it is intact.

    \b
    Example:
      sd-erase inspect outputs/bicycle-pocket-0001/export/bicycle-pocket-text_encoder-fp16.safetensors
    """
    from sd_erase.export.metadata import inspect_file
    from sd_erase.progress import RichProgress

    found = inspect_file(file, RichProgress())
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
        raise Failure(f"{file} is damaged: {found['problems'][0].rstrip('.')}; export or download it again.")


for command in house.COMMANDS:
    main.add_command(command)
