"""Deliberate mistakes, through the real command line: one sentence, exit code 2, no traceback, nothing written.

The wrong values come from each option's type, whatever options there are: a new flag is tested by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from sd_erase import catalog, stages
from sd_erase.cli import Change, main
from sd_erase.config import RunConfig, dump
from sd_erase.flags import Checked, FilePath, TermWeight
from sd_erase.rundir import RunDir
from sd_erase.schema import Rule, walk

LONG = "x" * 20_000
NOT_TEXT = "\udcff"  # a byte of an argument that is no UTF-8
NUMBERS = ["many", "", " ", "nan", "-inf", "inf", "1e400", "-99999999999", "9" * 25, "9" * 5000]
TEXTS = ["", " ", NOT_TEXT, "\x1b[31m", LONG]
# what a command needs beside the mistake
NEEDS = {
    "harvest": ["--concept", "bicycle"],
    "train": ["--concept", "bicycle"],
    "demo": ["--concept", "bicycle"],
    "compare": ["pocket-default"],
    "reproduce": ["table2"],
    "sweep": ["--concept", "apple", "--over", "train.steps=1,2"],
    "merge": ["outputs/made", "outputs/made"],
    "inspect": ["made.safetensors"],
}
BLANK = {dotted.replace(".", "__") for dotted, _, rule in walk(RunConfig) if rule.blank}  # "" says "none", or the default


def wrong_values(option: click.Parameter) -> list[str]:
    """What no option of this type can be."""
    kind = option.type
    if isinstance(kind, TermWeight):
        return ["", "=", "=1", "redirect", "redirect=", "redirect=nan", "redirect=-1", "redirect=1e400", "redirct=1", LONG]
    if isinstance(kind, Change):
        return [
            "",
            "=",
            "train.steps",
            "train.stepz=3",
            "train.steps=.nan",
            "train.steps=-1",
            "a.b.c=1",
            "train=3",
            "seed=[",
            "seed=" + "9" * 5000,
        ]
    if option.name == "over":
        return ["", "=", "train.steps", "train.stepz=1,2", "train.learning_rate=nan..1", "train.learning_rate=1..0.1", "train.steps=-1,2",
                "train.learning_rate=nan,1", "train.steps.x=1", "seed=1,2", "train.steps=1,,2"]  # fmt: skip
    if isinstance(kind, Checked) and kind.kind in (int, float):
        return NUMBERS + (["1.5"] if kind.kind is int else [])
    if isinstance(kind, Checked) and kind.choices:
        return [*TEXTS, "nonsense"]
    return TEXTS[2:] if option.name in BLANK else TEXTS


def every_option() -> Iterator[Any]:
    """(command, option) without repeating options that many commands share."""
    seen = set()
    for name, command in sorted(main.commands.items()):
        for option in command.params:
            shared = (option.name, tuple(option.opts), type(option.type))
            if name == "reproduce" and option.name == "experiments":
                continue
            if shared not in seen and not getattr(option, "is_flag", False):
                seen.add(shared)
                yield pytest.param(name, option, id=f"{name} {option.opts[0]}")


def no_stage(*_: Any, **__: Any) -> None:
    pytest.fail("a stage ran in spite of a wrong setting")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run that looks trained; no stage can run."""
    monkeypatch.setattr(stages, "STAGES", dict.fromkeys(stages.STAGES, f"{__name__}:no_stage"))
    for name in catalog.EXPORTS:
        monkeypatch.setitem(catalog.EXPORTS, name, f"{__name__}:no_stage")
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "outputs" / "made")
    with run.writing({"config.yaml": dump(RunConfig(concepts=("bicycle",), device="cpu"))}):
        run.complete("train", "made up", {"anchor": {"bicycle": "object"}})
    (tmp_path / "made.safetensors").write_bytes(b"")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def check_refusal(arguments: list[str], folder: Path, *words: str) -> None:
    """The command ends in one sentence that a user can act on, and leaves everything as it was."""
    before = contents(folder)
    result = invoke(*arguments)
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(said) == 1, (
        arguments[-1][:80],
        result.exit_code,
        result.stderr[:500],
        result.stdout[:200],
    )
    assert said == result.stderr.splitlines()[-1:] and "Traceback" not in result.stderr and not result.stdout
    assert len(said[0]) < 1500 and said[0].rstrip().endswith((".", ")")), said[0]
    assert all(word in said[0] for word in words), said[0]
    assert all(character.isprintable() for character in said[0])
    assert contents(folder) == before


@pytest.mark.parametrize(("command", "option"), every_option())
def test_a_wrong_value_is_one_sentence_about_its_flag(command: str, option: click.Parameter, folder: Path) -> None:
    for value in wrong_values(option):
        given = [argument for argument in NEEDS.get(command, ())]
        if isinstance(option, click.Argument):
            check_refusal([command, value], folder)
            continue
        if option.opts[0] in given:  # the mistake goes where the right value was
            place = given.index(option.opts[0])
            del given[place : place + 2]
        # a phrase that is too long is named itself: it may as well stand in a card
        named = "characters" if value == LONG and option.name in ("concepts", "harvest__exclude") else option.opts[0]
        check_refusal([command, *given, option.opts[0], value], folder, named)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate --clip-skip 4", "--clip-skip is 4 and the text encoder has 4 layers: pass 0 to 3"),
        ("generate --height 100", "multiple of 8"),
        ("generate --seed 4294967295", "--seed is 4294967295"),
        ("generate --device cuda:99", "cuda:99"),
        ("generate --prompts nowhere.txt", "nowhere.txt"),
        ("attack --prompts nowhere.txt", "nowhere.txt"),
        ("evaluate --detector nowhere", "nowhere"),
        ("train --concept bicycle --lora-rank 129", "--lora-rank is 129 and the text encoder 128 wide: pass 1 to 128"),
        ("train --concept bicycle --lora-rank 4 --fast", "does not train"),
        ("train --concept bicycle --lora-rank 4 --towers both", "text tower only"),
        ("train --concept bicycle --fast --learning-rate 1e-3", "--learning-rate has no effect"),
        ("train --concept bicycle --precision fp16 --device cpu", "--precision is fp16"),
        ("train --concept bicycle --weight redirct=3", "did you mean 'redirect'"),
        ("train --concept bicycle --objective nowhere:Method", "nowhere"),
        ("train --concept bicycle --dataset flickr:captions", "did you mean 'flickr"),
        ("train --concept bicycle --objective paper --base sdxl", "--objective wants a CLIP with a vision tower"),
        ("train --concept bicycle --batch-size 0 --lora-rank -4 --seed x", "3 settings"),
        ("train --concept bicycle --base nowhere", "nowhere"),
        ("demo --concept apple --device cuda:99", "cuda:99"),
        ("demo --concept unicorn", "no label that detector"),
        ("export --rank 8", "--rank has no effect on an export to comfyui"),
        ("export --pipeline", "--pipeline has no effect"),
        ("export --to lora --rank 129", "128 wide"),
        ("export --to a1111 --checkpoint nowhere.safetensors", "nowhere.safetensors"),
        ("export --run nowhere", "no config.yaml"),
        ("compare nowhere", "nowhere"),
        ("reproduce table99", "table99"),
        ("reproduce table2 --device cuda:99", "cuda:99"),
        ("reproduce figure6 --method ga", "--method has no effect on figure6"),
        ("reproduce figure4 --concept apple", "--concept has no effect on figure4"),
        ("reproduce cost --concept apple --concept dog", "A second --concept has no effect on cost"),
        ("reproduce table2 --set sizes.shown=3", "shown"),
        ("reproduce figure1 --set sizes.prompts=3", "figure1 reads a mapping"),
        ("reproduce table2 --set sizes.test=0", "sizes.test is 0"),
        ("reproduce table2 --set kind=style", "--set kind is not how"),
        ("reproduce table2 --set device=cpu", "pass --device"),
        ('reproduce table4 --set train.weights={"retention":1}', "the same"),
        ("reproduce table4 --set train.weights.retention=1", "the same"),
        ("reproduce table4 --dataset flickr30k:nowhere", "table4 reads no captions"),
        ("reproduce table2 --dataset cifar100:nowhere", "nowhere"),
        ("reproduce table2 --method nowhere:Method", "nowhere"),
        ("reproduce table2 --concept (", "("),
        ("sweep --concept apple --over train.learning_rate=1e-5..1e-3", "--random"),
        ("sweep --concept apple --over train.steps=1,2 --device cuda:99", "cuda:99"),
        ("sweep --concept apple --over train.steps=1,2 --set sizes.test=3", "no effect on a sweep"),
        ("sweep --concept apple --over train.steps=1,2 --dataset flickr30k:nowhere", "reads no captions"),
        ("merge outputs/made", "two or more"),
        ("inspect nowhere.safetensors", "does not exist"),
    ],
)
def test_what_the_model_or_the_machine_cannot_do_is_said_before_any_work(arguments: str, words: str, folder: Path) -> None:
    check_refusal(arguments.split(), folder, words)


YAML = {
    "train: {batch_size: 0}": "train.batch_size of mine.yaml is 0",
    "train: {steps: many, batch_size: 0}\nseed: -1": "3 settings",
    "train: {learning_rate: .nan}": "nan",
    "train: {learning_rate: .inf}": "inf",
    "train: {lora_rank: -4}": "-4",
    "train: {lora_rank: 129}": "129",
    "train: {stepz: 4}": "did you mean 'train.steps'",
    "train: 3": "pass a mapping",
    "train: {weights: {redirct: 1}}": "did you mean 'redirect'",
    "train: {weights: [1]}": "pass a mapping",
    "harvest: {train_share: 1}": "above 0 and below 1",
    "harvest: {exclude: 3}": "pass a list",
    "device: cuda:99": "cuda:99",
    "seed: " + "9" * 5000: "a number that nothing here needs",
    "harvest: {exclude: [bicycle, 3]}": "harvest.exclude of mine.yaml is 3",
    "base: ''": "base of mine.yaml is ''",
    'base: "a\\0b"': "base of mine.yaml is",
    "export: {pipeline: 'yes'}": "true or false",
    "- a list": "pass a mapping",
    "just words": "pass a mapping",
    "a: [": "is not YAML",
    "kind: objekt": "did you mean 'object'",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_a_file_of_settings_is_checked_as_flags_are(text: str, folder: Path) -> None:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    check_refusal(["train", "--concept", "bicycle", "--config", "mine.yaml"], folder, YAML[text])


def test_the_boundary_itself_is_accepted() -> None:
    """The rules refuse nothing that works: both ends of every range, and every choice."""
    for dotted, hint, rule in walk(RunConfig):
        for value in (rule.low, rule.high, *rule.choices, *rule.also):
            if isinstance(value, float) and abs(value) == float("inf"):
                continue
            expected = not (rule.open_ends and value in (rule.low, rule.high))
            assert rule.accepts(value) is expected, (dotted, hint, value)
    with contextlib.suppress(AttributeError):
        assert Rule(low=0, high=1).accepts(True)


def test_paths_that_the_system_refuses_are_one_sentence(folder: Path) -> None:
    for arguments in (["train", "--concept", "bicycle", "--output-root", "y" * 300], ["generate", "--run", "y" * 300],
                      ["train", "--concept", "bicycle", "--base", "y" * 300], ["inspect", "y" * 300],
                      ["train", "--concept", "bicycle", "--config", "y" * 300], ["generate", "--prompts", "y" * 300]):  # fmt: skip
        check_refusal(arguments, folder)


def test_all_path_options_refuse_what_no_path_can_be() -> None:
    for command in main.commands.values():
        for option in command.params:
            assert not (isinstance(option.type, click.Path) and not isinstance(option.type, FilePath)), option.name
            assert not isinstance(option.type, click.IntRange | click.FloatRange), "ranges stand in config.py"
