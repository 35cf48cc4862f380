"""Prompt files: the prompts of a list, each with a seed of its own where its file gives one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sd_erase import resources
from sd_erase.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt, with a seed of its own where its file gives one."""

    text: str
    seed: int | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a text file (one a line; blank lines and lines that start with ``#`` are skipped) or of a CSV file.

    A CSV file has a column ``prompt`` and may have ``evaluation_seed`` or ``seed``, as the lists of ESD, AdvUnlearn and
    Concept Ablation do; other columns (``case_number``, ``source``) are ignored.

    Args:
        path: a file, or the name of a bundled list ("apple", "prompts/apple.txt").

    Raises:
        UserError: the file is missing, not text, has no prompt, or a seed is no whole number.
    """
    path = resources.find("prompts", path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"Prompts file {path} cannot be read as UTF-8 text ({error}): pass a text or CSV file.") from error
    if path.suffix.lower() == ".csv":
        prompts = list(_csv_prompts(path, text))
    else:
        lines = (line.strip() for line in text.splitlines())
        prompts = [Prompt(line) for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"Prompts file {path} holds no prompt: write one a line ('#' starts a comment).")
    return prompts


def _csv_prompts(path: Path, text: str) -> Iterator[Prompt]:
    rows = csv.DictReader(text.splitlines(keepends=True), strict=True)
    columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
    if "prompt" not in columns:
        raise UserError(f"Prompts file {path} has no column 'prompt' (it has {', '.join(columns) or 'none'}): add one.")
    seed_column = next((columns[name] for name in ("evaluation_seed", "seed") if name in columns), None)
    try:
        for row in rows:
            prompt = (row[columns["prompt"]] or "").strip()
            seed = (row[seed_column] or "").strip() if seed_column is not None else ""
            if not prompt:
                continue
            if seed and not (seed.isdecimal() and int(seed) < 2**63):
                raise UserError(f"Prompts file {path}, line {rows.line_num}: seed {seed!r} is no whole number below 2^63.")
            yield Prompt(prompt, int(seed) if seed else None)
    except csv.Error as error:
        raise UserError(f"Prompts file {path}, line {rows.line_num}, is no valid CSV ({error}): close its quotes.") from error
