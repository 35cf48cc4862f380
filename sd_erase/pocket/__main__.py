"""``python -m sd_erase.pocket``: build the pocket model's weights, or render its data set in Flickr30K's layout."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The embedded world and its weights."""


STEPS = ("data", "clip", "vae", "latents", "decoder", "unet", "detector", "pack", "scores")


@main.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("outputs/pocket-build"), show_default=True, help="Where checkpoints and the log go.")
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), help="Only these steps (default: all).")
@click.option("--target", type=click.Path(path_type=Path), default=None, help="Where the finished pack goes (default: the package's own).")
@click.option("--set", "settings", multiple=True, metavar="NAME=NUMBER", help="Replace a number of the recipe, as unet_steps=2000.")
def build(work: Path, steps: tuple[str, ...], target: Path | None, settings: tuple[str, ...]) -> None:
    """Train every component from seeds; finished steps are skipped, an interrupted one resumes.

    Example: python -m sd_erase.pocket build --step clip
    """
    import dataclasses

    import torch

    from sd_erase.pocket import build as builder

    work.mkdir(parents=True, exist_ok=True)
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
    actions = {
        "data": builder.data, "clip": builder.train_clip, "vae": builder.train_vae, "latents": builder.encode_latents,
        "decoder": builder.train_decoder, "unet": builder.train_unet, "detector": builder.train_detector,
    }  # fmt: skip
    for step in steps or STEPS:
        logging.info("step %s", step)
        actions[step](recipe, work)


if __name__ == "__main__":
    main()
