"""``python -m benchmarks NAME``: measure one pair of programs in turn and write a table and JSON."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import click

from benchmarks import trees
from benchmarks.measured import Benchmark, Pair, table
from benchmarks.programs import BENCHMARKS


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("name", type=click.Choice(sorted(BENCHMARKS)))
@click.option("--pairs", default=5, type=click.IntRange(1), help="How often each of the two runs.")
@click.option(
    "--steps", default=0, type=click.IntRange(0), help="Training steps, where the benchmark trains; 0: as many as a user's."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the other commit and the models lie; kept for the next call.",
)
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here.")
def main(name: str, pairs: int, steps: int, work: Path | None, output: Path | None) -> None:
    """Measure NAME: ours against another program, in turn, each in a process of its own."""
    benchmark: Benchmark = BENCHMARKS[name]
    with tempfile.TemporaryDirectory() as temporary:
        place = trees.Place((work or Path(temporary)).absolute(), steps)
        place.folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = benchmark.prepare(place)
        found = []
        for number in range(pairs):
            # the order changes from pair to pair: what warms up serves both
            first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            results = {}
            for program in (first, second):
                results[program.name] = program.run()
                click.echo(f"{number + 1}/{pairs} {program.name}: {results[program.name]}", err=True)
            found.append(Pair(results[ours.name], results[theirs.name]))
    click.echo(table(benchmark, found))
    if output:
        output.write_text(json.dumps({"benchmark": name, "pairs": [dataclasses.asdict(pair) for pair in found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
