"""Deliberate mistakes, through the real command line: one sentence, exit code 2, no traceback, nothing written.

The wrong values come from each option's type, whatever options there are: a new flag is tested by itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from sd_erase import bases, catalog, stages
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
    "audit": ["made.safetensors"],
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
    for name, values in {
        "bert": {"model_type": "bert"},
        "wide": {"model_type": "clip", "text_config": {"hidden_size": 768}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def check_refusal(arguments: list[str], folder: Path, *words: str) -> str:
    """The command ends in one sentence that a user can act on, and leaves everything as it was; returns what it said."""
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
    assert len(said[0]) < 1500 and said[0].rstrip().endswith((".", ")", "?")), said[0]
    assert all(word in said[0] for word in words), said[0]
    assert all(character.isprintable() for character in said[0])
    assert contents(folder) == before
    return result.stderr


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
        ("train --concept bicycle --clip nowhere", "--clip is no folder, and no name of the hub: pass the CLIP model"),
        ("train --concept bicycle --clip outputs", "--clip (outputs) has no config.json"),
        ("train --concept bicycle --clip bert", "--clip (bert) is no CLIP but 'bert'"),
        ("train --concept bicycle --clip wide", "--clip (wide) is 768 wide and the base's text encoder 128"),
        ("sweep --concept apple --over train.steps=0.2..0.8 --random 2", "train.steps=0.2..0.8 holds no whole number: widen it"),
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
        ("reproduce figure1 --set sizes.prompts=3", "figure1 cannot read: pass a mapping"),
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
        ("inspect wide", "wide is a folder"),
        ("train --concept bicycle --config wide", "wide is a folder"),
        ("train --concept-file wide", "wide is a folder"),
        ("export --run outputs/made --to a1111 --checkpoint wide", "which is a folder"),
        ("train --concept bicycle --base wide/x.safetensors", "does not exist"),
        ("train --concept bicycle --objective paper --fast", "--objective and --fast decide the same"),
        ("train --concept bicycle --fast --no-robust", "--fast and --no-robust decide the same"),
        ("train --concept bicycle --dataset pocket --data synthetic", "--dataset is given 2 times: pass it once"),
        ("train --concept bicycle --steps 3 --steps 4", "--steps is given 2 times"),
        ("export --run outputs/made --output mine.ckpt", "pass mine.safetensors"),
    ],
)
def test_what_the_model_or_the_machine_cannot_do_is_said_before_any_work(arguments: str, words: str, folder: Path) -> None:
    check_refusal(arguments.split(), folder, words)


def test_a_base_whose_encoder_lacks_a_tensor_is_refused_before_the_harvest(folder: Path) -> None:
    encoder = "cond_stage_model.transformer.text_model."
    shapes = {
        f"{encoder}embeddings.token_embedding.weight": (49408, 8),
        f"{encoder}embeddings.position_embedding.weight": (77, 8),
        f"{encoder}encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
    }
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "short.safetensors")
    check_refusal(["train", "--concept", "bicycle", "--base", "short.safetensors"], folder, "17 of its tensors are missing")
    source = bases.POCKET_FOLDER
    shutil.copytree(source, folder / "base", ignore=shutil.ignore_patterns("clip"))
    file = folder / "base" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if ".layers.2.mlp" not in name}
    file.unlink()
    save_file(kept, file, {"format": "pt"})
    check_refusal(["demo", "--base", "base"], folder, "layers.2.mlp")


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


# --- three hundred mistakes -----------------------------------------------------------------------------------------

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415478da63f8cfc00000030101003d8b4f6d0000000049454e44ae426082"
)
FLAGS_AND_ORDER = [
    # what no command has, or has in another place
    "trian --concept bicycle", "train --concpt bicycle", "train --fast=yes --concept bicycle", "train bicycle", "train --concept",
    "train --concept bicycle --new --run outputs/made", "train", "harvest", "train --objective paper", "demo bicycle",
    "train --concept bicycle --config nowhere.yaml", "train --concept bicycle --clip-skip 2", "train --concept bicycle --towers vision",
    "harvest --concept bicycle --steps 3", "generate --concept bicycle", "evaluate --prompts bicycle", "report --steps 3", "merge",
    "merge outputs/made nowhere", "merge outputs/made outputs/made --new", "compare", "compare pocket-default pocket-many",
    "compare pocket-default --seed 3", "compare pocket-defualt", "compare .", "reproduce", "reproduce table1", "reproduce all table99",
    "reproduce table2 --seed 3", "reproduce table2 --over train.steps=1", "sweep", "sweep --concept apple", "sweep --over train.steps=1",
    "sweep --concept apple --over train.steps=1,2 --random 0", "inspect", "inspect .", "inspect outputs", "inspect a b", "export comfyui",
    "export --to comfy", "export --to a1111 --rank 3", "export --to lora --pipeline", "export --to lora --checkpoint x.safetensors",
    # in the wrong order, or on what is no run
    "generate --run nowhere", "evaluate --run nowhere", "attack --run nowhere", "report --run nowhere", "generate --output-root nowhere",
    "evaluate --output-root nowhere", "report --output-root nowhere", "export --output-root nowhere", "attack --output-root nowhere",
    "generate --run other", "train --concept bicycle --run other", "harvest --concept bicycle --run other", "merge other other",
    "merge outputs/made other", "train --concept apple --run outputs/made", "train --concept bicycle --run made.safetensors",
    "train --concept bicycle --output-root made.safetensors", "merge outputs/made outputs/bare",
    # names of concepts
    "train --concept bycicle", "train --concept bike", "train --concept sofa", "train --concept ?!", "train --concept a|b",
    "train --concept {a}", "train --concept bicycle --kind vehicle", "train --concept bicycle --anchor bike",
    "train --concept bicycle --anchor a,b", "train --concept bicycle --anchor ?!", "train --concept bicycle --exclude ?!",
    "train --concept a*", "train --concept 'a bicycle'", "train --concept brocolli", "train --concept-file nowhere.yaml",
    "train --concept-file .", "sweep --concept bycicle --over train.steps=1,2", "reproduce table2 --concept bycicle",
    "reproduce table2 --concept sofa", "demo --concept bycicle", "harvest --concept elefant", "train --concept 'apple, bycicle'",
    # data, models and detectors
    "train --concept bicycle --dataset nowhere",
    "train --concept bicycle --base sd16", "train --concept bicycle --base nowhere.safetensors", "train --concept bicycle --base other",
    "train --concept bicycle --base made.safetensors", "train --concept bicycle --base nowhere/", "train --concept bicycle --base ./nowhere",
    "evaluate --detector nowhere.yaml", "evaluate --detector other/nothing.yaml",
    "train --concept bicycle --objective rubost", "train --concept bicycle --objective nowhere:Method",
    "train --concept bicycle --objective math:sqrt", "train --concept bicycle --weight preserv=1", "generate --prompts apples.txt",
    "generate --prompts appel", "generate --prompts .", "attack --prompts nowhere", "generate --scheduler euller",
    # settings of tables, by dotted name
    "reproduce table2 --set train.stepps=3", "reproduce table2 --set train.steps=many", "reproduce table2 --set train.steps=-1",
    "reproduce table2 --set harvest.train_share=1", "reproduce table2 --set sizes.test=many", "reproduce table2 --set sizes.tset=3",
    "reproduce table2 --set generate.steps=3", "reproduce table2 --set export.to=lora", "reproduce table2 --set base=sd15",
    "reproduce table2 --set concepts=apple", "reproduce table2 --set harvest.dataset=pocket", "reproduce table2 --set exact=true",
    "reproduce table2 --set train.objective=ga", "reproduce table2 --set seed=3", "reproduce table2 --set anchor=thing",
    "reproduce figure1 --concept apple", "reproduce figure5 --method ga", "reproduce table7 --method ga", "reproduce table2 --dataset nowhere",
    "reproduce table3 --dataset cifar100:other", "reproduce table2 --set train.lora_rank=129", "reproduce table2 --base nowhere",
    "sweep --concept apple --over train.lora_rank=4,129", "sweep --concept apple --over train.steps=1,-2",
    "sweep --concept apple --over train.objective=ga,gaa", "sweep --concept apple --over train.towers=text,vision",
    "sweep --concept apple --over base=sd15,pocket", "sweep --concept apple --over seed=1,2", "sweep --concept apple --over generate.steps=1,2",
    "sweep --concept apple --over sizes.test=1,2", "sweep --concept apple --over train.steps=1,2 --set train.batch_size=0",
    "sweep --concept apple --over train.steps=1,2 --set exact=true", "sweep --concept apple --over train.steps=1,2 --data images",
    "sweep --concept apple --over train.steps=10..100 --random 2", "sweep --concept apple --over harvest.max_retain=1,-1",
]  # fmt: skip
CARDS = [
    "", "just words", "- 3", "kind: object", "name: '!!'", "name: [a]", "name: x\nwrods: [y]", "name: x\nkind: objct",
    "name: x\nsynonyms: [true]", "name: x\nsynonyms: ['--']", "name: x\nsynonyms: {a: b}", "name: x\nspared: ['{a|b x']",
    "name: x\nspared: ['x +']", "name: x\nspared: ['+ y']", "name: x\nspared: ['x unless']", "name: x\nspared: ['x unless y unless z']",
    "name: x\ntemplates: ['a photo']", "name: x\ntemplates: ['a {name}']", "name: [x", "name: 2020-13-45", b"name: caf\xe9",
    "name: !!python/object/apply:os.system ['true']", "name: x\nspared: [x, xs]", "name: x\nneighbours: [x]", "name: x\nanchor: x",
    "- {name: a}\n- {name: a}", "name: x\nname: y", "name: x\nsynonyms: a\n  b\n  c", "name: a, b", "name: a|b", "name: 3",
    "name: x\nlabels: [3]", "name: x\nkind: 3", "name: x\nanchor: [a]", "name: x\nanchor: a, b", "a: &a [*a]", "name: x\nsynonyms: [" + "y, " * 6000 + "z]",
    "name: " + "x" * 300, "name: x\nlabels: [" + "y" * 300 + "]", "name: x\ntemplates: [3]", "[]", "{}", "- []", "- - a",
    "name: x\nspared: [['a']]", "\t", "%", "---\n---\n", "name: x\n---\nname: y",
]  # fmt: skip
LISTS = ["bycicle\n", "sofa\n", "?!\n", "a|b\n", "apple\napple\n", b"\xff\xfe\n", "\n\n", "# only a remark\n", "x" * 300 + "\n"]
RECIPES = [
    "", "[]", "concepts: [apple]", "methods: {a: }", "concepts: [apple]\nmethods: {a: }\nmore: 1", "concepts: 3\nmethods: {a: }",
    "concepts: []\nmethods: {a: }", "concepts: [3]\nmethods: {a: }", "concepts: [apple, apple]\nmethods: {a: }", "concepts: [apple]\nmethods: {}",
    "concepts: [apple]\nmethods: []", "concepts: [apple]\nmethods: {a: 3}", "concepts: [apple]\nmethods: {a: {train.stepps: 3}}",
    "concepts: [apple]\nmethods: {a: {train.steps: -3}}", "concepts: [apple]\nmethods: {a: , b: {train.batch_size: 0}}",
    "concepts: [apple]\nmethods: {a: , b: {train.lora_rank: 129}}", "concepts: [apple]\nmethods: {a: , b: {train.objective: sdd}}",
    "concepts: [apple]\nmethods: {a: , b: {train.objective: fast, train.lora_rank: 4}}", "concepts: [apple]\nmethods: {a: {seed: 3}}",
    "concepts: [apple]\nmethods: {a: {base: sd15}}", "concepts: [apple]\nmethods: {a: {generate.steps: 3}}",
    "concepts: [apple]\nmethods: {a: {concepts: [dog]}}", "concepts: [apple]\nmethods: {a: }\nseeds: [many]", "concepts: [apple]\nmethods: {a: }\nseeds: []",
    "concepts: [apple]\nmethods: {a: }\nseeds: [0, 0]", "concepts: [apple]\nmethods: {a: }\nseeds: [-1]", "concepts: [apple]\nmethods: {a: }\nseeds: {a: 1}",
    "concepts: [apple]\nmethods: {a: }\nseeds: [4294967296]", "concepts: [apple]\nmethods: {a: }\nimages: {named: 0}",
    "concepts: [apple]\nmethods: {a: }\nimages: {nmed: 1}", "concepts: [apple]\nmethods: {a: }\nimages: 3",
    "concepts: [apple]\nmethods: {a: }\nimages: {named: 1, senses: -1}", "concepts: [apple]\nmethods: {a: }\nprompts: -1",
    "concepts: [apple]\nmethods: {a: }\nprompts: many", "concepts: [apple]\nmethods: {a: }\nattacked: 1.5", "concepts: [apple]\nmethods: {a: }\ntitle: 3",
    "concepts: [apple]\nmethods: {a: }\nsettings: [a]", "concepts: [apple]\nmethods: {a: }\nsettings: {seed: 1}",
    "concepts: [apple]\nmethods: {a: }\nsettings: {generate.images_per_prompt: 1}", "concepts: [apple]\nmethods: {a: }\nsettings: {export.to: lora}",
    "concepts: [apple]\nmethods: {a: }\nsettings: {evaluate.trust_pickle: true}", "concepts: [apple]\nmethods: {a: }\nsettings: {evaluate.detector: nowhere}",
    "concepts: [apple]\nmethods: {a: }\nsettings: {generate.prompts: [nowhere.txt]}", "concepts: [apple]\nmethods: {a: }\nsettings: {generate.clip_skip: 9}",
    "concepts: [apple]\nmethods: {a: }\nsettings: {base: nowhere}", "concepts: [apple]\nmethods: {a: }\nsettings: {device: 'cuda:99'}",
    "concepts: [bycicle]\nmethods: {a: }", "concepts: [apple, sofa]\nmethods: {a: }", "concepts: ['apple + ?!']\nmethods: {a: }",
    "concepts: [apple]\nmethods: {'a b': , 'a-b': }", "concepts: [unicorn]\nmethods: {a: }", "concepts: [apple\n", b"\xff\xfe",
]  # fmt: skip
# name -> contents
PROMPT_FILES: list[tuple[str, str | bytes]] = [
    ("empty.txt", ""), ("remarks.txt", "# a\n# b\n"), ("latin.txt", b"caf\xe9\n"), ("utf16.txt", "a bicycle\n".encode("utf-16")),
    ("nul.txt", "a\0b\n"), ("picture.png", PNG), ("page.pdf", b"%PDF-1.4"), ("list.json", "{"), ("numbers.json", "[1, 2]"),
    ("object.json", '{"a": 1}'), ("rows.jsonl", '{"prompt": "a"}\n{"prompt": \n'), ("rows2.jsonl", '{"text": 3}\n'),
    ("cells.csv", "seed,notes\n1,x\n"), ("open.csv", 'prompt\n"a bicycle\n'), ("cells.tsv", "id\tnotes\n1\tx\n"), ("nothing.csv", "prompt\n"),
    ("nothing.json", "[]"), ("blank.txt", " \n\t\n"), ("long.txt", "x" * 2_000_000),
]  # fmt: skip
# reader -> files
CAPTIONS: list[tuple[str, dict[str, str | bytes]]] = [
    *((spec, {}) for spec in ("jsonl", "folder:", "synthetic:x", "pocket:made.safetensors", "coco:nowhere", "jsonl:nowhere.jsonl")),
    ("jsonl:x.jsonl", {"x.jsonl": ""}), ("jsonl:x.jsonl", {"x.jsonl": "{"}), ("jsonl:x.jsonl", {"x.jsonl": "[1]\n"}),
    ("jsonl:x.jsonl", {"x.jsonl": '{"image": "a.png"}\n'}), ("jsonl:x.jsonl", {"x.jsonl": '{"image": "../a.png", "caption": "a bicycle"}\n'}),
    ("jsonl:x.jsonl", {"x.jsonl": '{"image": "/etc/a.png", "caption": "a bicycle"}\n'}), ("jsonl:x.jsonl", {"x.jsonl": '{"image": 3, "caption": "a bicycle"}\n'}),
    ("jsonl:x.jsonl", {"x.jsonl": '{"caption": 3}\n'}), ("jsonl:x.jsonl", {"x.jsonl": '{"caption": "a dog"}\n'}),
    ("jsonl:x.jsonl", {"x.jsonl": b'{"caption": "caf\xe9"}\n'}),
    ("jsonl:x.jsonl", {"x.jsonl": '{"caption": "a bicycle"}\n'.encode("utf-16")}), ("jsonl:x.jsonl", {"x.jsonl": '{"caption": "a bicycle"}\n'}),
    ("folder:f", {"f/a.txt": ""}), ("folder:f", {"f/a.png": PNG}), ("folder:f", {"f/a.txt": "a bicycle"}), ("folder:f", {"f/a.png": PNG, "f/a.txt": b"\xff\xfe"}),
    ("folder:f", {"f/a.png": PNG, "f/a.txt": "a dog"}), ("folder:f", {"f/notes.md": "x"}),
    ("folder:f", {"f/metadata.csv": "file_name,text\n"}), ("folder:f", {"f/metadata.csv": "a,b\n1,2\n"}), ("folder:f", {"f/metadata.jsonl": "{\n"}),
    ("folder:f", {"f/a.parquet": b"PAR1"}), ("folder:f", {"f/meta_cap.json": "{"}), ("folder:f", {"f/meta_cap.json": "[1]"}),
    ("folder:f", {"f/shard.tar": b"x" * 600}), ("folder:f", {"f/captions.csv": "caption\n"}), ("folder:x.zip", {"x.zip": b"PK\3\4"}),
    ("coco:x.json", {"x.json": "{"}), ("coco:x.json", {"x.json": "{}"}), ("coco:x.json", {"x.json": '{"images": [], "annotations": []}'}),
    ("coco:x.json", {"x.json": '{"images": [3], "annotations": []}'}), ("coco:x.json", {"x.json": '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}'}),
    ("coco:x.json", {"x.json": '{"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": [{"image_id": 1, "id": 1, "caption": "a bicycle"}]}'}),
    ("coco:c", {"c/notes.txt": "x"}), ("flickr30k:x.csv", {"x.csv": ""}), ("flickr30k:x.csv", {"x.csv": "a,b\n"}), ("flickr30k:x.token", {"x.token": "no tab\n"}),
    ("flickr30k:x.token", {"x.token": "a.jpg#0\tA dog\n"}), ("flickr30k:x.token.gz", {"x.token.gz": b"\x1f\x8b\x08"}), ("flickr30k:d", {"d/readme.md": "x"}),
    ("flickr8k:d", {"d/readme.md": "x"}), ("cc12m:x.tsv", {"x.tsv": "one\n"}), ("cc12m:x.tsv", {"x.tsv": "a.jpg\tA dog\n"}),
    ("cifar100:d", {"d/meta": b"x"}), ("cifar100:d", {"d/readme.md": "x"}), ("cifar100:x.parquet", {"x.parquet": b"PAR1"}),
    ("jsonl:x.csv", {"x.csv": 'image,caption\na.png,"a bicycle\n'}), ("jsonl:x.parquet", {"x.parquet": b""}), ("jsonl:x.json", {"x.json": "[" * 3000}),
]  # fmt: skip


def header(*tensors: tuple[str, str, list[int]], **metadata: str) -> bytes:
    """A safetensors file of zeros."""
    sizes, place, rows = {"F16": 2, "F32": 4, "I8": 1}, 0, {}
    for name, kind, shape in tensors:
        size = sizes[kind] * math.prod(shape)
        rows[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps({**rows, **({"__metadata__": metadata} if metadata else {})}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(place)


EMBEDDING = "text_model.embeddings.token_embedding.weight"
CHECKPOINTS: list[bytes] = [
    b"", b"x", b"x" * 100, b"\xff" * 16, PNG, b"PK\3\4" + bytes(100), b"\x80\x02}q\x00.", (10).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]", header(("a", "F32", [2])), header(("a", "F32", [2]))[:-3], header(("a", "F32", [2])) + b"x", header((EMBEDDING, "F32", [4, 8])),
    header((EMBEDDING, "I8", [4, 8])),
    header(("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "F16", [4, 2])), header(("conditioner.embedders.0.transformer." + EMBEDDING, "F16", [4, 8])),
    header(("single_blocks.0.linear1.weight", "F16", [4, 4])), header(("first_stage_model.encoder.conv_in.weight", "F16", [4, 3, 3, 3])),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html><html>", b"GGUF" + bytes(60),
]  # fmt: skip
INDEX = '{"_class_name": "%s", "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"]}'
FOLDERS: list[dict[str, str | bytes]] = [
    {"m/readme.md": "x"}, {"m/model_index.json": "{"}, {"m/model_index.json": "[]"}, {"m/model_index.json": "{}"}, {"m/model_index.json": INDEX % "StableDiffusionPipeline"},
    {"m/model_index.json": INDEX % "FluxPipeline"}, {"m/model_index.json": INDEX % "StableDiffusion3Pipeline"}, {"m/model_index.json": INDEX % "KolorsPipeline"},
    {"m/config.json": "{"}, {"m/config.json": '{"model_type": "t5"}'}, {"m/pytorch_model.bin": b"\x80\x02"},
    {"m/model.safetensors": header(("a", "F32", [2]))}, {"m/text_encoder/config.json": "{}"}, {"m/unet/config.json": "{}"},
]  # fmt: skip
SETTINGS = [*YAML, "train: {precision: fp32}", "train: {objective: 3}", "train: [1]", "generate: {height: 100}", "generate: {prompts: 3}",
            "generate: {scheduler: euller}", "attack: {tokens: 76}", "evaluate: {confidence: 1}", "evaluate: {trust_pickle: true}", "export: {to: comfy}",
            "concept_file: [a]", "anchor: [a]", "exact: 'no'", "seed: 1.5", "seed: true", "steps: 3", "Train: {steps: 3}", "harvest: {max_forget: -1}",
            "train: {steps: 1, steps: 2}", "train: {weights: {redirect: -1}}", "train: {weights: {redirect: many}}"]  # fmt: skip
DETECTOR_CARDS = ["", "3", "kind: yolo", "kind: yola\nweights: a.pt", "kind: yolo\nweights: 3", "kind: yolo\nweights: a.pt\nconfidence: 2",
                  "kind: yolo\nweights: a.pt\nimage_size: 33", "kind: yolo\nweights: a.pt\nnames: 3", "kind: yolo\nweights: a.pt\nlabels: [a]",
                  "kind: yolo\nweights: a.pt\nmore: 1", "kind: [", "kind: onnx\nweights: nowhere.onnx\nnames: [a]"]  # fmt: skip

Mistake = tuple[list[str], dict[str, str | bytes]]
TRAIN = ["train", "--concept", "bicycle"]
MISTAKES: dict[str, list[Mistake]] = {
    "flags": [(shlex.split(line), {}) for line in FLAGS_AND_ORDER],
    "settings": [([*TRAIN, "--config", "mine.yaml"], {"mine.yaml": text}) for text in SETTINGS],
    "cards": [(["train", "--concept-file", "mine.yaml"], {"mine.yaml": text}) for text in CARDS],
    "lists": [(["train", "--concept-file", "mine.txt"], {"mine.txt": text}) for text in LISTS],
    "recipes": [(["compare", "mine.yaml"], {"mine.yaml": text}) for text in RECIPES],
    "prompts": [(["generate", "--prompts", name], {name: text}) for name, text in PROMPT_FILES],
    "captions": [(["harvest", "--concept", "bicycle", "--dataset", spec], files) for spec, files in CAPTIONS],
    "checkpoints": [([*TRAIN, "--base", "x.safetensors"], {"x.safetensors": data}) for data in CHECKPOINTS],
    "inspected": [(["inspect", "x.safetensors"], {"x.safetensors": data}) for data in CHECKPOINTS[:8] + CHECKPOINTS[9:10] + CHECKPOINTS[11:13]],
    "folders": [([*TRAIN, "--base", "m"], files) for files in FOLDERS],
    "detectors": [(["evaluate", "--detector", "mine.yaml"], {"mine.yaml": text}) for text in DETECTOR_CARDS],
}  # fmt: skip
SLOW = ("flags", "captions", "recipes", "settings", "checkpoints", "cards")  # most of the seconds
VERB = (
    r"\b(pass|run|write|install|remove|choose|save|add|give|leave|name|rename|free|wait|use|try|merge|train|download|put|quote|erase|restore|"
    r"fetch|unpack|convert|double|check|correct|keep|spare|move|close|expected|list|begin|mend|shorten|copy|read)\b"
)
THING = r"--\w|MODULE:CLASS|train\.\*|recipe|`|\.\w+|\d|\b(file|folder|card|list|number|text|word|name|model|mapping|phrase|label|line|caption|prompt|settings|it|one|them|there|set|true|form)s?\b"


def says_what_to_do(stderr: str) -> bool:
    """Whether a sentence holds a verb of a remedy and what it is to be done to; click's own ones point to the command's help."""
    said = stderr.splitlines()[-1]
    return bool(re.search(f"(?i){VERB}.*?({THING})", said.rpartition(": ")[2])) or bool(
        re.search(f"(?i){VERB}.*?({THING})", said) or "Try 'sd-erase " in stderr or "Try 'main " in stderr
    )


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in MISTAKES])
def test_three_hundred_mistakes_are_a_sentence_with_its_remedy(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "captions":  # which only the harvest itself reads
        monkeypatch.setattr(stages, "STAGES", {**stages.STAGES, "harvest": "sd_erase.pairs:harvest"})
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    bad = []
    for arguments, files in MISTAKES[kind]:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        try:
            stderr = check_refusal(arguments, folder)
            assert says_what_to_do(stderr), stderr
        except (Exception, pytest.fail.Exception) as error:  # a traceback is one more that is wrong
            bad.append((arguments, [str(data)[:100] for data in files.values()], str(error)))
        for name in files:
            (folder / name).unlink()
    assert not bad, "\n".join(map(str, bad))


def test_there_are_three_hundred() -> None:
    listed = {(*map(str, arguments), *map(str, files.items())) for group in MISTAKES.values() for arguments, files in group}
    assert len(listed) == sum(map(len, MISTAKES.values())) >= 300  # and above all of the options' wrong values
