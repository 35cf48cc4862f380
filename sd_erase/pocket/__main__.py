"""``python -m sd_erase.pocket``: build the pocket model's weights, or render its data set in Flickr30K's layout."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sd_erase.errors import UserError
from sd_erase.folders import claim, is_claimed
from sd_erase.interrupts import as_interrupts

if TYPE_CHECKING:
    from sd_erase.pocket.recipe import Recipe


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The embedded world and its weights."""


WORLDS = ("pocket", "art")
STEPS = ("data", "clip", "vae", "latents", "unet", "decoder", "detector", "classifier", "pack", "scores")


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """End in the sentence of a `UserError`, not in its traceback."""
    try:
        yield
    except UserError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--world", "name", type=click.Choice(WORLDS), default="pocket", show_default=True, help="Which embedded world.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=None,
    help="Where checkpoints and the log go (default: outputs/pocket-build, of the art world outputs/art-build).",
)
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), help="Only these steps (default: all).")
@click.option(
    "--target", type=click.Path(path_type=Path), default=None, help="Where the finished pack goes (default: the package's own)."
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="How many steps run side by side, each on one core; 2 is what the recipe's times are planned for.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=None,
    help="The longest that one training may take (0: as its steps take); it then ends with what it has.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=NUMBER", help="Replace a number of the recipe, as unet_steps=2000."
)
def build(
    name: str,
    work: Path | None,
    steps: tuple[str, ...],
    target: Path | None,
    jobs: int,
    minutes: float | None,
    settings: tuple[str, ...],
) -> None:
    """Train every component from seeds; finished steps are skipped, an interrupted one resumes.

    Example: python -m sd_erase.pocket build --world art --jobs 2
    """
    import torch

    from sd_erase.pocket import build as builder
    from sd_erase.pocket.jobs import run_jobs

    world = builder.WORLDS[name]
    own = builder.steps_of(world)
    if unfit := [step for step in steps if step not in own]:
        raise click.BadParameter(
            f"{unfit[0]!r} is no step of the {name} world: choose from {', '.join(own)}", param_hint="--step"
        )
    recipe = _recipe(builder.RECIPES[name], settings if minutes is None else (*settings, f"minutes={minutes}"))
    work, target = work or Path("outputs") / f"{name}-build", target or world.pack
    with sentences():
        claim(work, "pocket build", ["build.log"], "--work")
        is_claimed(target, "pocket", ["detector/architecture.yaml"], "--target")  # the package's own gets no mark
    asked = [step for step in own if not steps or step in steps]
    if jobs > 1 and len(asked) > 1:
        options = ["--world", name, "--work", str(work), "--target", str(target)]
        options += [word for setting in settings for word in ("--set", setting)] + (
            [] if minutes is None else ["--minutes", str(minutes)]
        )
        after = {step: builder.STEPS[step].after for step in own}
        with sentences(), as_interrupts():  # a signal ends the steps too
            run_jobs(
                asked, after, jobs, lambda step: [sys.executable, "-m", "sd_erase.pocket", "build", *options, "--step", step]
            )
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s",
                        handlers=[logging.StreamHandler(), logging.FileHandler(work / "build.log")])  # fmt: skip
    torch.set_num_threads(1)  # the networks are too small for more; run two steps side by side instead
    torch.set_flush_denormal(True)
    for step in asked:
        logging.info("step %s", step)
        builder.STEPS[step].run(recipe, work, target)


def _recipe(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with numbers replaced by ``NAME=NUMBER``."""
    import dataclasses

    for setting in settings:
        name, _, value = setting.partition("=")
        fields = {field.name: type(getattr(recipe, field.name)) for field in dataclasses.fields(recipe) if field.name != "world"}
        try:
            recipe = dataclasses.replace(recipe, **{name: fields[name](float(value))})
        except (KeyError, ValueError) as error:
            raise click.BadParameter(f"{setting!r} is no NAME=NUMBER with a name of: {', '.join(fields)}") from error
    return recipe


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scenes", type=click.IntRange(min=1), default=3000, show_default=True, help="How many images.")
@click.option("--world", type=click.Choice(WORLDS), default="pocket", show_default=True, help="Which embedded world.")
def render(folder: Path, scenes: int, world: str) -> None:
    """Write the world's scenes as a data set in Flickr30K's layout: flickr30k-images/ and results_20130124.token.

    Example: python -m sd_erase.pocket render outputs/pocket-flickr30k
    """
    from sd_erase.captions.pocket import check_free
    from sd_erase.captions.pocket import render as library
    from sd_erase.progress import RichProgress

    with sentences():
        check_free(folder)
    click.echo(library(folder, scenes, progress=RichProgress(), world=world))


if __name__ == "__main__":
    main()
