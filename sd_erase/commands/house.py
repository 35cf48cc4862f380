"""``list``, ``doctor`` and ``config``: what is there, whether it works, and what can be set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from sd_erase.commands.common import Once
from sd_erase.errors import UserError
from sd_erase.flags import FilePath
from sd_erase.terminal import Styled, echo, echo_json, one_line, rendered

ROOT = click.option("--output-root", "root", type=FilePath(), default=Path("outputs"), show_default=True, help="Where runs are.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.command("list", cls=Once)
@ROOT
@JSON
def list_command(root: Path, as_json: bool) -> None:
    """Show the runs of a folder: concept, base, what is done, size, and when.

    \b
    Example:
      sd-erase list
      sd-erase list --output-root /data/outputs --json
    """
    from sd_erase.listing import listed, megabytes

    runs = listed(root)
    if as_json:
        echo_json({"root": str(root), "bytes": sum(run.bytes for run in runs), "runs": [dataclasses.asdict(run) for run in runs]})
        return
    rows = [
        [
            run.name,
            f"{', '.join(run.concepts) or '–'} ({run.base}, {run.objective})",
            ", ".join((*(() if run.state == "done" else (run.state.upper(),)), *run.done)),
            f"{megabytes(run.bytes)} {run.completed[:10]}",
        ]
        for run in runs
    ]
    if rows:
        echo(_table(("run", "erased", "done", "size, last"), rows))
    for run in runs:
        if run.fault:
            echo(one_line(f"Warning: {run.fault}"), err=True)
    echo(one_line(f"{len(runs)} run{'s' * (len(runs) != 1)} in {root}, {megabytes(sum(run.bytes for run in runs))}"))


@click.command("doctor", cls=Once)
@ROOT
@JSON
def doctor_command(root: Path, as_json: bool) -> None:
    """Say whether this machine can do the work: versions, devices, attention, memory, caches and disk; exit code 1 where something is wrong.

    \b
    Example:
      sd-erase doctor
      sd-erase doctor --json
    """
    from sd_erase import doctor

    found = doctor.examine(root)
    if as_json:
        echo_json(dataclasses.asdict(found))
    else:
        for title, values in found.groups.items():
            echo(f"{title}:")
            for name, value in values.items():
                echo(one_line(f"  {name}: {'not installed' if value is None else value}"))
        for problem in found.problems:
            echo(one_line(f"Problem: {problem}"), err=True)
        echo(f"{len(found.problems)} problem{'s' * (len(found.problems) > 1)}" if found.problems else "Nothing is wrong.")
    if found.problems:
        raise click.exceptions.Exit(1)


@click.command("config", cls=Once)
@click.option("--run", "run_path", type=FilePath(), metavar="FOLDER", help="Show this run's settings instead of the defaults.")
@click.option("--output", type=FilePath(), metavar="FILE", help="Write it there, where no file is yet.")
@JSON
def config_command(run_path: Path | None, output: Path | None, as_json: bool) -> None:
    """Print all settings as YAML, each with what it may be and its flag; --config FILE reads it back.

    \b
    Example:
      sd-erase config --output my-settings.yaml
      sd-erase train --config my-settings.yaml
      sd-erase config --run outputs/bicycle-pocket-0001
    """
    from sd_erase.config import RunConfig, load, to_dict
    from sd_erase.rundir import RunDir
    from sd_erase.template import template

    config = RunConfig() if run_path is None else load(RunDir(run_path).config)
    if output is not None:
        try:
            with output.expanduser().open("x", encoding="utf-8") as stream:
                stream.write(template(config))
        except FileExistsError as error:
            raise UserError(f"File {output} exists, and may hold settings of yours: pass another one with --output.") from error
        except FileNotFoundError as error:
            raise UserError(f"Folder {output.parent} does not exist: make it, or pass another file with --output.") from error
    if as_json:
        echo_json({"output": None if output is None else str(output), "settings": to_dict(config)})
    else:
        echo(one_line(output) if output is not None else template(config).rstrip())


def _table(headers: tuple[str, ...], rows: list[list[Any]]) -> Styled | str:
    """A table for the terminal; a narrow one breaks cells, the first last."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, header in enumerate(headers):
        table.add_column(header, no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return rendered(table)


COMMANDS = (list_command, doctor_command, config_command)
