from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from sd_erase.config import SECTIONS, RunConfig, TrainConfig, dump, from_dict, load, override
from sd_erase.errors import UserError
from sd_erase.schema import plain_type, walk


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(concepts=("teddy bear", "élan"), anchor="", train=TrainConfig(weights={"retain": 2.0}, learning_rate=1e-4))
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conceptz": ["a"]}, "did you mean 'concepts'"),
        ({"train": {"step": 3}}, "did you mean 'steps'"),
        ({"train": {"steps": "many"}}, "train.steps is .*: pass a whole number from 0 to 10000000"),
        ({"train": {"steps": 1.5}}, "train.steps is .*: pass a whole number from 0 to 10000000"),
        ({"train": {"steps": True}}, "train.steps is .*: pass a whole number from 0 to 10000000"),
        ({"train": 3}, "Setting train is 3: pass a mapping"),
        ({"train": {"weights": [1]}}, r"train.weights is \[1\]: pass a mapping"),
        ({"concepts": 3}, "concepts is 3: pass a list"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(values)


@pytest.mark.parametrize(
    ("dotted", "value", "words"),
    [
        ("train.batch_size", 0, "1 to 65536"),
        ("train.lora_rank", -4, "0 to 65536"),
        ("train.learning_rate", float("nan"), "a number from 0 to 100"),
        ("train.learning_rate", float("inf"), "a number from 0 to 100"),
        ("train.weights", {"redirect": float("nan")}, "train.weights.redirect is nan"),
        ("train.objective", "robbust", "did you mean 'robust'"),
        ("harvest.train_share", 1.0, "above 0 and below 1"),
        ("generate.height", 100, "a multiple of 8"),
        ("generate.guidance", -7.5, "-1 or a number from 0"),
        ("generate.scheduler", "heun", "one of auto, ddim"),
        ("evaluate.confidence", 0.0, "-1 or a number above 0 and below 1"),
        ("evaluate.image_size", 100, "a multiple of 32"),
        ("attack.tokens", 76, "from 1 to 75"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("seed", 2**32 - 1, "pass at most 4294967288"),  # the eighth image's seed
        pytest.param("seed", 10**5000, "a number of thousands of digits", id="digits"),
        ("device", "cuda:", "cuda:N"),
        ("base", "", "1 to 4096 characters"),
        ("base", "a\0b", "1 to 4096 characters"),
        ("concepts", ["\udcff"], "1 to 20000 characters"),
        ("anchor", "x" * 301, "at most 300 characters"),
        ("export.dtype", "int8", "one of float16"),
        ("export.pipeline", "yes", "true or false"),
    ],
)
def test_what_no_stage_could_use_is_refused_from_everywhere(tmp_path: Path, dotted: str, value: Any, words: str) -> None:
    *section, name = dotted.split(".")
    values = {section[0]: {name: value}} if section else {name: value}
    with pytest.raises(UserError) as nested:
        from_dict(values)
    with pytest.raises(UserError) as dotted_too:
        override(RunConfig(), {dotted: value})
    kind = SECTIONS[section[0]] if section else RunConfig
    with pytest.raises(UserError) as python:
        kind(**{name: tuple(value) if isinstance(value, list) else value})
    assert words in str(nested.value) and dotted in str(nested.value)
    assert str(nested.value) == str(dotted_too.value) == str(python.value)


def test_all_that_is_wrong_is_one_sentence() -> None:
    with pytest.raises(UserError) as error:
        from_dict({"train": {"batch_size": 0, "stepz": 1}, "seed": -1})
    assert (
        str(error.value).startswith("3 settings cannot be used: ") and str(error.value).count(".") == 3
    )  # two names and the end
    assert all(name in str(error.value) for name in ("train.batch_size", "train.stepz", "seed"))


def test_every_number_has_ends_and_every_setting_a_rule() -> None:
    for dotted, hint, rule in walk(RunConfig):
        if plain_type(hint)[1] in (int, float):
            assert math.isfinite(rule.low) and math.isfinite(rule.high), dotted
    for kind in (RunConfig, *SECTIONS.values()):
        assert all("rule" in one.metadata or one.name in SECTIONS for one in dataclasses.fields(kind))


def test_numbers_that_yaml_reads_as_text_and_lone_strings_are_accepted() -> None:
    config = from_dict({"concepts": "bicycle", "train": {"learning_rate": "1e-4", "weight_decay": 1}})
    assert config.concepts == ("bicycle",)
    assert config.train.learning_rate == 1e-4
    assert config.train.weight_decay == 1.0


def test_override_changes_only_what_is_named_and_merges_weights() -> None:
    config = override(RunConfig(train=TrainConfig(weights={"a": 1.0, "b": 2.0})), {"train.weights": {"b": 3.0}, "seed": 7})
    assert config.train.weights == {"a": 1.0, "b": 3.0}
    assert (config.seed, config.train.steps) == (7, 0)


@pytest.mark.parametrize("text", ["a: [", "\xff: 1"])
def test_what_is_no_yaml_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not YAML"):
        load(path)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "other.yaml")


def test_a_concept_that_is_named_twice_is_one() -> None:
    assert RunConfig(concepts=("apple", "bicycle", "apple")).concepts == ("apple", "bicycle")
