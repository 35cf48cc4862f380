"""Prompt files: every format by its own rules, nothing dropped in silence, one sentence for what cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sd_erase import resources
from sd_erase.errors import UserError
from sd_erase.prompts import MAX_PROMPT, Prompt, is_text, read_prompt_files, read_prompts

CONTROLS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # what str.splitlines, but no format of ours, takes for the end of a line
REAL = Path(__file__).parents[2] / "shared" / "data" / "prompts"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path)]


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_prompts_have_comments_and_blank_lines_and_these_are_counted(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "mine.txt", "\ufeff# my list\n\n  a dog #1 on a chair  \r\na café\n"))
    assert prompts == [Prompt("a dog #1 on a chair"), Prompt("a café")]
    assert prompts.skipped == {"comments": 1, "blank lines": 1} and prompts.notes == ()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_a_prompt(end: str, tmp_path: Path) -> None:
    wanted = [f"a bicycle{control}in a park" for control in CONTROLS]
    assert texts(write(tmp_path / "a.txt", end.join(wanted))) == wanted


def test_prompts_that_may_have_been_meant_behind_a_hash_are_named(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "a.txt", "# a list\n#sunset with a bicycle\na dog\n# a cat\n"))
    assert prompts == [Prompt("a dog")] and prompts.skipped == {"comments": 3}
    assert "2 lines that start with #" in prompts.notes[0] and "line 2, '#sunset with a bicycle'" in prompts.notes[0]


@pytest.mark.parametrize("line", ["a bicycle --w 512 --d 42", "--prompt a bicycle", "a bicycle --ar 3:2"])
def test_options_of_other_programs_are_said_to_be_read_as_words(line: str, tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "a.txt", f"{line}\na dog -- in the rain\n"))
    assert len(prompts) == 2 and "1 prompts hold options behind `--`" in prompts.notes[0]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("case_number,prompt,evaluation_seed\n0,a dog,1\n", ".csv"),
        ("prompt;seed\na dog;1\n", ".csv"),
        ("prompt\na dog\n", ".csv"),
        ('{"prompt": "a dog"}\n{"prompt": "a cat"}\n', ".jsonl"),
        ('["a dog", "a cat"]\n', ".json"),
        ('{\n  "prompts": ["a dog"]\n}\n', ".json"),
    ],
)
def test_a_table_or_json_named_txt_is_not_drawn_as_prompts(content: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a.txt, line 1, .*name the file \\{name}"):
        read_prompts(write(tmp_path / "a.txt", content))


def test_prompts_with_brackets_and_commas_are_prompts(tmp_path: Path) -> None:
    wanted = ["[bicycle:car:0.5] in a park", "{red|blue} bicycle", "a prompt, a bicycle", "(bicycle:1.3), dog"]
    assert texts(write(tmp_path / "a.txt", "\n".join(wanted))) == wanted


# --- tables ----------------------------------------------------------------------------------------------------------


def test_csv_prompts_of_other_projects_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "esd.csv", ',case_number,prompt,evaluation_seed\n0,0,"A field, with trees",2219\n1,1,A dog,\n2,2,,7\n'
    )
    prompts = read_prompts(path)
    assert prompts == [Prompt("A field, with trees", 2219), Prompt("A dog", None)]
    assert (
        prompts.skipped == {"rows without a prompt": 1}
        and "1 row without a prompt skipped (the first is line 4)" in prompts.notes[0]
    )
    assert read_prompts(write(path, "case_num,source,prompt\n1,coco,a photo of chair\n")) == [Prompt("a photo of chair")]


def test_control_characters_and_line_ends_belong_to_a_cell(tmp_path: Path) -> None:
    rows = [f"a bicycle{control}in a park" for control in CONTROLS] + ["two\nlines", "two\r\nlines", 'a "dog"']
    content = "prompt,seed\n" + "".join('"{}",{}\n'.format(row.replace('"', '""'), number) for number, row in enumerate(rows))
    assert read_prompts(write(tmp_path / "a.csv", content)) == [Prompt(row, number) for number, row in enumerate(rows)]
    unquoted = "prompt,case_number,evaluation_seed\nan old bicycle \x1e by the sea,0,82\na dog,1,83\n"
    assert read_prompts(write(tmp_path / "b.csv", unquoted)) == [
        Prompt("an old bicycle \x1e by the sea", 82),
        Prompt("a dog", 83),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("head", ["", "sep=D\n", "\n"])
def test_the_header_tells_what_divides_the_cells(delimiter: str, suffix: str, head: str, tmp_path: Path) -> None:
    content = head + "Prompt Dsd_seed\n" + '"a dogD a cat"D 7\nan appleD\n'
    path = write(tmp_path / f"a{suffix}", content.replace("D", delimiter))
    assert read_prompts(path) == [Prompt(f"a dog{delimiter} a cat", 7), Prompt("an apple")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "0,own,a photo of a bicycle, a dog\n",
            "line 2, has 4 cells, the header names 3: put a prompt that holds a comma into double",
        ),
        ("0,own,a dog\n\n1,own,a cat,and\n", "line 4, has 4 cells"),
        ("0,own\n", "line 2, has 2 cells, the header names 3: add what is missing"),
        ('0,own,"a dog\nand a cat"\nof a dog\n', "line 4, has 1 cell"),
        ('0,own,"a dog\n', "no valid CSV"),
        ('0,own,"a dog" and a cat\n', "line 2, is no valid CSV"),
        (f"0,own,{'x' * 200_000}\n", "line 2, is no valid CSV"),
        (f"0,own,{'x' * (MAX_PROMPT + 1)}\n", "line 2, holds a prompt of 10,001 characters"),
    ],
)
def test_a_row_that_is_not_as_its_header_says_is_refused_with_its_line(rows: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / "a.csv", "case_num,source,prompt\n" + rows))


def test_empty_cells_behind_the_columns_are_no_fault(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.csv", "prompt,seed,\na dog,3\na cat,4,,,\n")) == [
        Prompt("a dog", 3),
        Prompt("a cat", 4),
    ]


@pytest.mark.parametrize(
    ("cell", "seed"),
    [
        ("4068.0", 4068),
        (" 12 ", 12),
        ("+3", 3),
        ("1.5e3", 1500),
        ("1e+16", 10**16),
        ("0", 0),
        (str(2**63 - 1), 2**63 - 1),
        ("", None),
    ],
)
def test_whole_floats_are_seeds(cell: str, seed: int | None, tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "a.csv", f"prompt,evaluation_seed\na dog,{cell}\n")) == [Prompt("a dog", seed)]


@pytest.mark.parametrize("cell", ["abc", "-1", "4.5", str(2**63), "nan", "inf", "1e999", "1_000", "0x10", "\u0664", "1e-3"])
def test_what_is_no_whole_number_is_no_seed(cell: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3, has the seed"):
        read_prompts(write(tmp_path / "a.csv", f"prompt,seed\na cat,1\na dog,{cell}\n"))


def test_i2ps_names_are_known_and_what_is_not_used_is_said(tmp_path: Path) -> None:
    header = '"prompt","categories","hard","sd_seed","sd_guidance_scale","sd_image_width","sd_image_height"\n'
    prompts = read_prompts(write(tmp_path / "i2p.csv", header + '"a bicycle","x",0,1234567890,7,512,768\n'))
    assert prompts == [Prompt("a bicycle", 1234567890)]
    assert len(prompts.notes) == 1 and "sd_guidance_scale, sd_image_width, sd_image_height are not read" in prompts.notes[0]


def test_of_two_columns_of_seeds_the_one_that_is_used_is_named(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "a.csv", "prompt,sd_seed,evaluation_seed\na dog,1,2\n"))
    assert prompts == [Prompt("a dog", 2)] and "the seeds of evaluation_seed are used" in prompts.notes[0]


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_json_prompts_are_read(name: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a bicycle", "seed": 3},
        {"Prompt": "a\u2028dog", "evaluation_seed": 4.0},
        "a cat",
        {"prompt": None},
        {"prompt": " "},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = {"a.jsonl": "\n\n".join(lines), "a.json": f"[{','.join(lines)}]", "b.json": f'{{"prompts": [{",".join(lines)}]}}'}[
        name
    ]
    prompts = read_prompts(write(tmp_path / name, content))
    assert prompts == [Prompt("a bicycle", 3), Prompt("a\u2028dog", 4), Prompt("a cat")]
    assert prompts.skipped["rows without a prompt"] == 2 and "2 rows without a prompt" in prompts.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2, is no JSON"),
        ("a.jsonl", '{"text": "a"}\n', "line 1, has no 'prompt' \\(it has text\\)"),
        ("a.jsonl", '{"prompt": 5}\n', "no text"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "a key twice"),
        ("a.jsonl", '{"prompt": "a", "Prompt": "b"}\n', "a key twice"),
        ("a.jsonl", '{"prompt": "a", "seed": true}\n', "the seed 'True'"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}\n', "the seed '-1'"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "half a character"),
        ("a.jsonl", "9" * 5000, "line 1"),
        ("a.jsonl", '{"a\\nb": "a"}\n', "it has a\\\\nb\\)"),
        ("a.json", '{"a\\nb": 1}', "an object with a\\\\nb\\)"),
        ("a.json", '{"style": {"van gogh": 1}}', "an object with style"),
        ("a.json", '"a dog"', "no list"),
        ("a.json", '["a dog", ["a cat"]]', "entry 2, holds a prompt that is no text"),
        ("a.json", "[" * 99_999, "nested too deeply"),
        ("a.json", "[]", "holds no prompt"),
    ],
)
def test_bad_json_is_one_sentence(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"# nothing\n\n", "holds no prompt \\(1 comments, 1 blank lines\\)"),
        ("a.txt", "a dog\n".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.csv", "prompt\na dog\n".encode("utf-16-be"), "NUL"),
        ("a.txt", "a dog\na café\n".encode("latin-1"), "line 2, is not UTF-8 text"),
        ("a.txt", b"a dog\na\0cat\n", "line 2, holds a NUL"),
        ("a.csv", b"text,seed\na dog,1\n", "no column 'prompt' \\(its first row names 'text', 'seed'\\)"),
        ("a.csv", b"prompt,Prompt\na,b\n", "'prompt' twice"),
        ("a.csv", b"prompt\n", "holds no prompt"),
        ("a.yaml", b"- a dog\n", "of no kind that is read \\(.yaml\\)"),
        ("a.xlsx", b"PK\x03\x04", "of no kind"),
        ("a.txt", b"x" * (MAX_PROMPT + 1), "line 1, holds a prompt of 10,001 characters"),
    ],
)
def test_bad_prompts_files_are_one_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_bundled_files_are_found_by_name_and_own_files_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resources.find("detectors", "pocket") == resources.packaged_folder("detectors") / "pocket.yaml"
    assert resources.find("detectors", "detectors/pocket.yaml").read_text().startswith("#")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "apple.txt").write_text("mine\n")
    assert read_prompts("apple") == read_prompts("prompts/apple.txt") == [Prompt("mine")]
    (tmp_path / "apple").mkdir()  # a folder of that name is no list
    assert read_prompts("apple") == [Prompt("mine")]


@pytest.mark.parametrize("name", ["nowhere.txt", "a photo of a dog " * 40, "a\0b", "~nobody-of-that-name/a.txt"])
def test_what_is_no_file_is_said_in_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match="does not exist: pass the path of a file, or one of: apple"):
        read_prompts(name)


@pytest.mark.parametrize("name", ["", ".", "/", "~"])
def test_a_folder_is_said_to_be_one(name: str) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(name)


def test_a_pipe_is_refused_since_it_can_be_read_only_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/stdin", "/dev/null"):
        with pytest.raises(UserError, match="no regular file"):
            read_prompts(path)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.prompts", "a.csv", "a.json", "a.md", "a.yaml", "a.gz"])
def test_what_is_written_one_a_line_is_read_back(name: str, tmp_path: Path) -> None:
    """What --write-prompts asks before it writes."""
    path = write(tmp_path / name, "a dog\na cat\n")
    if is_text(path):
        assert read_prompts(path) == [Prompt("a dog"), Prompt("a cat")]
    else:
        with pytest.raises(UserError):
            read_prompts(path)


def test_several_files_are_read_in_order_and_repeated_prompts_are_kept_and_said(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "# head\na dog\na cat\n")
    second = write(tmp_path / "b.csv", "prompt,seed,guidance\na dog,3,7\na dog,,\na dog,4,2\n")
    prompts, rows, notes = read_prompt_files([first, second])
    assert prompts == [Prompt("a dog"), Prompt("a cat"), Prompt("a dog", 3), Prompt("a dog"), Prompt("a dog", 4)]
    assert rows == [
        {"file": str(first), "prompts": 2, "skipped": {"comments": 1}},
        {"file": str(second), "prompts": 3, "skipped": {}},
    ]
    assert len(notes) == 2 and "guidance are not read" in notes[0] and notes[1].startswith("1 of 5 prompts repeat another one")
    assert len(read_prompt_files([first, first])[0]) == 4


@pytest.mark.realdata
def test_all_published_lists_are_read_as_csv_reads_them() -> None:
    import csv

    if not REAL.is_dir():
        pytest.skip(f"no real data at {REAL}")
    tables, lists = sorted(REAL.rglob("*.csv")), sorted(REAL.rglob("*.txt"))
    assert len(tables) >= 7 and len(lists) >= 29
    for path in tables:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.DictReader(stream) if row["prompt"].strip()]
        seeds = [int(row["evaluation_seed"]) if row.get("evaluation_seed") else None for row in rows]
        assert read_prompts(path) == [Prompt(row["prompt"].strip(), seed) for row, seed in zip(rows, seeds, strict=True)]
    for path in lists:
        assert texts(path) == [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
