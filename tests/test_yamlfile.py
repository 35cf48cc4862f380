"""The one reader of YAML: what people pass on to each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from sd_erase import cli, config, flags, yamlfile
from sd_erase.comparison import read_recipe
from sd_erase.concepts.cards import read_yaml
from sd_erase.detection import read_card
from sd_erase.errors import UserError
from sd_erase.reproduce import read_recipe as read_experiment

LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "line 6: it has more than 100000 values"),
        (MERGES, "values"),
        ("a: &a [*a]", "line 1: the alias a stands within"),
        ("[" * 100_000, "nest"),
        ("{a: " * 40 + "1" + "}" * 40, "nested"),
        ("- " * 50 + "1", "nested"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' stands twice, in line 1 too"),
        ("settings:\n  steps: 1\n  steps: 2", "line 3: 'steps' stands twice, in line 2 too"),
        ("day: 2024-05-01", "line 1: '2024-05-01' is a date"),
        ("day: 2024-05-01 10:00:00", "is a date"),
        ("day: 2024-13-45", "is a date"),
        ("seed: 017", "'017' is an octal number"),
        ("time: 1:30", "'1:30' is a number in base sixty"),
        ("time: 1:30.5", "base sixty"),
        ("rate: .nan", "no finite number"),
        ("rate: -.inf", "no finite number"),
        ("rate: 1.0e+999", "no finite number"),
        ("seed: " + "9" * 5000, "that nothing here needs"),
        ("? [a, b]\n: 1", "is no key"),
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: !!timestamp x", "tag"),
        ("a: !!int x", "tag"),
        ("a: ! x", "tag"),
        ("a: *b", "undefined alias"),
        ("a: [1", "line"),
        ("a: \x1b[31m", "not"),
        ("a: 1\n---\nb: 2", "document"),
    ],
)
def test_what_is_refused_names_its_line(text: str, words: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match="^Recipe x is not YAML") as caught:
        yamlfile.parse(text, "Recipe x")
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - start < 3


def test_words_that_look_like_something_else_stay_words() -> None:
    assert yamlfile.parse("[yes, no, on, off, No, y, trueblood, =, 0o17, 1e-4, true, False, null, 12, 0x1f, 1.5, '017', \"2024-05-01\"]", "x") == [
        "yes", "no", "on", "off", "No", "y", "trueblood", "=", "0o17", "1e-4", True, False, None, 12, 31, 1.5, "017", "2024-05-01",
    ]  # fmt: skip
    assert yamlfile.parse("base: &b {steps: 1}\na: {<<: *b, rank: 2}\nb: !!str 1", "x")["a"] == {"steps": 1, "rank": 2}
    assert yamlfile.parse("", "x") is None


def test_a_file_that_is_too_large_or_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for content, words in ((b"a: " + b"x" * 1_000_000, "more than 1 MB"), (b"a: caf\xe9", "save it as UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            yamlfile.read(path, "Recipe")
    with pytest.raises(UserError, match="cannot be read .*Is a directory"):
        yamlfile.read(tmp_path, "Recipe")
    path.write_text("a: ü", encoding="utf-8-sig")
    assert yamlfile.read(path, "Recipe") == {"a": "ü"}


READERS: dict[str, Any] = {
    "settings": config.load, "the command line's settings": flags.read_config_file, "comparison": read_recipe, "experiment": read_experiment,
    "concept card": read_yaml, "detector card": read_card,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", [LAUGHS, "name: x\nname: y", "name: 2024-05-01"], ids=["laughs", "twice", "date"])
def test_every_place_that_reads_yaml_reads_it_so(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.yaml is not YAML \(line"):
        READERS[name](tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("value", "words"), [("[1", "train.steps is not YAML"), ("2024-05-01", "is a date"), ("&a [*a]", "alias")]
)
def test_a_value_of_the_command_line_is_read_so(value: str, words: str) -> None:
    result = CliRunner().invoke(cli.main, ["reproduce", "table2", "--set", f"train.steps={value}"])
    assert result.exit_code == 2 and words in result.output


CARD = {
    "name": "mine",
    "kind": "yolo",
    "weights": "w.safetensors",
    "image_size": 64,
    "confidence": 0.25,
    "iou": 0.45,
    "licence": "-",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": ["a"]}, "weights must be a text"),
        ({"name": 5}, "name must be a text"),
        ({"architecture": {"a": 1}}, "architecture must be a text"),
        ({"names": "apple"}, "names must be a list"),
        ({"names": [1, 2]}, "names must be a list"),
        ({"labels": ["a", "b"]}, "labels must map"),
        ({"labels": {"a": 1}}, "labels must map"),
        ({"image_size": 2**40}, "from 32 to 4096"),
        ({"image_size": True}, "from 32 to 4096"),
        ({"confidence": "0.5"}, "not between 0 and 1"),
        ({"weights": ""}, "weights must be a text"),
        ({"x" * 100_000: 1}, "is unknown"),
    ],
)
def test_a_detector_card_of_wrong_types_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**CARD, **changes}), encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_card(tmp_path / "x.yaml")
    assert len(str(caught.value)) < 1000
