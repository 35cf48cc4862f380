"""Whole prompts that a search made, token by token: what they share when they are drawn and counted."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sd_erase.auditing.bench import Bench
from sd_erase.auditing.probe import Row

TOKENS = 16  # of a prompt that is searched


def typed(bench: Bench, rows: Sequence[Sequence[int]]) -> list[str]:
    """Token sequences as text."""
    return [str(bench.original.tokenizer.decode(list(row))).strip() for row in rows]


def padded(bench: Bench, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids [rows, TOKENS + 5] with begin- and end-of-text and some padding: the mask is causal, what follows changes nothing before it."""
    tokenizer = bench.original.tokenizer
    return [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * 3] for row in rows]


def starts(bench: Bench, count: int, salt: str) -> list[list[int]]:
    """`count` random prompts of `TOKENS` tokens."""
    rng = random.Random(f"{bench.settings.seed} {salt}")
    return [rng.choices(bench.tokens, k=TOKENS) for _ in range(count)]


def counted(bench: Bench, name: str, variant: str, erased: Sequence[str], control: Sequence[str], images: int = 2) -> Row:
    """The row of prompts that were found on the audited model and on the original; `images` of each."""

    def repeated(texts: Sequence[str]) -> list[str]:
        return [text for text in texts for _ in range(images)]

    nothing = [" ".join(bench.random_words(TOKENS, f"{name} {number}")) for number in range(len(erased))]
    drawn = bench.drawn(f"{name}-control", "original", repeated(control)).shows(bench.labels)
    return Row(
        variant,
        erased=bench.drawn(name, "erased", repeated(erased)).shows(bench.labels),
        control=drawn,
        floor=bench.drawn(f"{name}-random", "erased", repeated(nothing)).shows(bench.labels),
        proof=drawn,
        proof_is="the original, searched in the same way,",
        words=list(erased),
        baseline=bench.drawn(f"{name}-random", "original", repeated(nothing)).shows(bench.labels),
    )
