"""``python -m sd_erase.pocket``: build the pocket model's weights, or render its data set in Flickr30K's layout."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from sd_erase.errors import UserError
from sd_erase.folders import claim, is_claimed


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The embedded world and its weights."""


PACK = Path(__file__).parent / "weights"
STEPS = ("data", "clip", "vae", "latents", "decoder", "unet", "detector", "pack", "scores")


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """End in the sentence of a `UserError`, not in its traceback."""
    try:
        yield
    except UserError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("outputs/pocket-build"),
    show_default=True,
    help="Where checkpoints and the log go.",
)
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), help="Only these steps (default: all).")
@click.option(
    "--target", type=click.Path(path_type=Path), default=PACK, help="Where the finished pack goes (default: the package's own)."
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=NUMBER", help="Replace a number of the recipe, as unet_steps=2000."
)
def build(work: Path, steps: tuple[str, ...], target: Path, settings: tuple[str, ...]) -> None:
    """Train every component from seeds; finished steps are skipped, an interrupted one resumes.

    Example: python -m sd_erase.pocket build --step clip
    """
    import dataclasses
    import functools

    import torch

    from sd_erase.pocket import build as builder

    with sentences():
        claim(work, "pocket build", ["build.log"], "--work")
        is_claimed(target, "pocket", ["detector/architecture.yaml"], "--target")  # the package's own gets no mark
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s",
                        handlers=[logging.StreamHandler(), logging.FileHandler(work / "build.log")])  # fmt: skip
    torch.set_num_threads(1)  # the networks are too small for more; run two steps side by side instead
    torch.set_flush_denormal(True)
    recipe = builder.Recipe()
    for setting in settings:
        name, _, value = setting.partition("=")
        fields = {field.name: type(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
        if name not in fields or not value:
            raise click.BadParameter(f"{setting!r} is no NAME=NUMBER with a name of: {', '.join(fields)}")
        recipe = dataclasses.replace(recipe, **{name: fields[name](float(value))})
    actions: dict[str, Callable[[builder.Recipe, Path], object]] = {
        "data": builder.data, "clip": builder.train_clip, "vae": builder.train_vae, "latents": builder.encode_latents,
        "decoder": builder.train_decoder, "unet": builder.train_unet, "detector": builder.train_detector,
        "pack": functools.partial(builder.pack, target=target), "scores": functools.partial(builder.scores, target=target),
    }  # fmt: skip
    for step in steps or STEPS:
        logging.info("step %s", step)
        actions[step](recipe, work)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scenes", type=click.IntRange(min=1), default=3000, show_default=True, help="How many images.")
def render(folder: Path, scenes: int) -> None:
    """Write the world's scenes as a data set in Flickr30K's layout: flickr30k-images/ and results_20130124.token.

    Example: python -m sd_erase.pocket render outputs/pocket-flickr30k
    """
    from sd_erase.captions.pocket import check_free
    from sd_erase.captions.pocket import render as library
    from sd_erase.progress import RichProgress

    with sentences():
        check_free(folder)
    click.echo(library(folder, scenes, progress=RichProgress()))


if __name__ == "__main__":
    main()
