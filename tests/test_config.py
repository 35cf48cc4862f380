from __future__ import annotations

from pathlib import Path

import pytest

from sd_erase.config import RunConfig, TrainConfig, dump, from_dict, load, override
from sd_erase.errors import UserError


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
        ({"train": {"steps": "many"}}, "train.steps must be of type int"),
        ({"train": {"steps": 1.5}}, "train.steps must be of type int"),
        ({"train": {"steps": True}}, "train.steps must be of type int"),
        ({"train": 3}, "train must be a mapping"),
        ({"train": {"weights": [1]}}, "train.weights must be a mapping"),
        ({"concepts": 3}, "concepts must be a list"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(values)


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
