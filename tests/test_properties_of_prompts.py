"""Whatever stands in a prompts file, it is read exactly or refused in one sentence: generated inputs.

Few by default; ``SD_ERASE_EXAMPLES=100000 pytest tests/test_properties_of_prompts.py`` tries as many of each.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs sd-erase[dev]")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sd_erase.errors import UserError  # noqa: E402
from sd_erase.prompts import Prompt, PromptList, read_prompts  # noqa: E402

EDGES = " \t\r\n"
ODD = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ufeff,;\t|\"'#\\-[]{} a"  # what some splitter or parser stumbles over


def words(line_ends: str) -> st.SearchStrategy[str]:
    """Texts of all of Unicode but half characters and NUL, or of odd characters alone."""
    every = st.characters(codec="utf-8", exclude_characters="\0" if line_ends else "\0\r\n")
    return st.text(every, min_size=1, max_size=20) | st.text(st.sampled_from(ODD + line_ends), min_size=1, max_size=20)


lines_of_text, prompt_texts = words(""), words("\r\n")
seeds = st.none() | st.integers(0, 2**63 - 1)
rows_of_prompts = st.lists(st.tuples(prompt_texts, seeds), min_size=1, max_size=6)
SUFFIXES = ("txt", "csv", "tsv", "jsonl", "json")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], Path]:
    folder = tmp_path_factory.mktemp("prompts")

    def file(suffix: str, content: bytes) -> Path:
        path = folder / f"any.{suffix}"
        path.write_bytes(content)
        return path

    return file


def read_or_refused(path: Path) -> PromptList | None:
    """The prompts, or None where one sentence that names the file says why not."""
    try:
        prompts = read_prompts(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
    assert prompts and all(prompt.text.strip() and "\0" not in prompt.text for prompt in prompts)
    "".join(prompt.text for prompt in prompts).encode()
    return prompts


@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(write: Callable[[str, bytes], Path], suffix: str, content: bytes) -> None:
    read_or_refused(write(suffix, content))


near_valid = st.lists(
    st.sampled_from(
        ["prompt", "seed", "evaluation_seed", "a dog", ",", ";", "\t", "|", '"', '""', "\n", "\r\n", "\r", "4068.0", "-1", "1e999", "[", "]",
         "{", "}", ":", '"prompt"', '"seed"', "null", "true", "\\ud800", "\\u0000", "#", "sep=;", " ", "\ufeff", "\x1e", "\u2028", "9" * 400]
    ) | prompt_texts,
    max_size=24,
)  # fmt: skip


@given(suffix=st.sampled_from(SUFFIXES), pieces=near_valid, headed=st.booleans())
def test_files_that_are_nearly_right_are_read_or_refused(
    write: Callable[[str, bytes], Path], suffix: str, pieces: Sequence[str], headed: bool
) -> None:
    content = ("prompt,seed\n" if headed else "") + "".join(pieces)
    prompts = read_or_refused(write(suffix, content.encode()))
    if prompts is not None and suffix in ("csv", "tsv"):  # no row goes astray
        assert len(prompts) + sum(prompts.skipped.values()) < 2 + content.count("\n") + content.count("\r")


@given(wanted=st.lists(lines_of_text, min_size=1, max_size=6), end=st.sampled_from(("\n", "\r\n", "\r")), bom=st.booleans())
def test_all_lines_of_a_text_come_back(write: Callable[[str, bytes], Path], wanted: list[str], end: str, bom: bool) -> None:
    text = end.join(["a dog", *wanted])  # in front of all a prompt, so that none is taken for the head of a table
    prompts = read_prompts(write("txt", (b"\xef\xbb\xbf" if bom else b"") + text.encode()))
    kept = [line.strip(" \t") for line in wanted]
    assert [prompt.text for prompt in prompts] == ["a dog", *(line for line in kept if line.strip() and not line.startswith("#"))]
    assert len(prompts) + sum(prompts.skipped.values()) == 1 + len(wanted)


@given(
    rows=rows_of_prompts,
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(("\n", "\r\n")),
    quoting=st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
    columns=st.permutations(("case_number", "prompt", "evaluation_seed")),
    as_float=st.booleans(),
)
def test_all_rows_that_csv_writes_come_back(
    write: Callable[[str, bytes], Path],
    rows: list[tuple[str, int | None]],
    delimiter: str,
    end: str,
    quoting: int,
    columns: Sequence[str],
    as_float: bool,
) -> None:
    if any("\r" in text for text, _ in rows):
        quoting = csv.QUOTE_ALL  # before Python 3.13 the writer leaves a lone \r without quotes
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writeheader()
    for number, (text, seed) in enumerate(rows):
        cell = "" if seed is None else f"{seed}.0" if as_float else str(seed)
        writer.writerow({"case_number": number, "prompt": text, "evaluation_seed": cell})
    path = write("csv", stream.getvalue().encode())
    expected = [Prompt(text.strip(EDGES), seed) for text, seed in rows if text.strip()]
    if not expected:
        assert read_or_refused(path) is None
        return
    prompts = read_prompts(path)
    assert prompts == expected
    assert len(prompts) + prompts.skipped.get("rows without a prompt", 0) == len(rows)


@given(rows=rows_of_prompts, ascii_only=st.booleans(), lines=st.booleans())
def test_all_rows_that_json_writes_come_back(
    write: Callable[[str, bytes], Path], rows: list[tuple[str, int | None]], ascii_only: bool, lines: bool
) -> None:
    values = [json.dumps({"prompt": text, "seed": seed}, ensure_ascii=ascii_only) for text, seed in rows]
    content = "\n".join(values) if lines else f"[{','.join(values)}]"
    path = write("jsonl" if lines else "json", content.encode())
    expected = [Prompt(text.strip(EDGES), seed) for text, seed in rows if text.strip()]
    if expected:
        assert read_prompts(path) == expected
    else:
        assert read_or_refused(path) is None
