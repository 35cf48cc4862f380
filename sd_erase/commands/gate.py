"""``evaluate --fail-over 2%``: an exit code for who publishes only what is surely erased."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from sd_erase.errors import OVER
from sd_erase.terminal import echo, one_line


class Share(click.ParamType):
    """``2%`` or ``0.02``, between 0 and 1 without the ends."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            self.fail(f"{one_line(value)[:60]!r} is no share: pass 2% or 0.02, above 0 and below 100%.", param, ctx)
        return share


fail_over = click.option(
    "--fail-over",
    "limit",
    type=Share(),
    metavar="SHARE",
    help=f"End with exit code {OVER} unless each concept is surely in less than this share of the images that ask for it (2%, 0.02): the upper "
    "end of the 95 % interval counts, so that few images do not pass.",
)


def check(result: Mapping[str, Any], limit: float) -> None:
    """End the command with exit code `errors.OVER` where a figure is over `limit`, or cannot be told to be below it."""
    from sd_erase.metrics.verdicts import over_limit  # with it the cards' grammar, a quarter of the time that --help takes

    if sentences := over_limit(result, limit):
        for sentence in sentences:
            echo(f"Over --fail-over: {one_line(sentence)}", err=True)
        raise click.exceptions.Exit(OVER)
