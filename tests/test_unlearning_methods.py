"""The unlearning methods that CLIPErase is compared with: their losses by hand, and real steps on the pocket model."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from sd_erase import bases, catalog
from sd_erase.clip import image_embeddings, load_erased_towers, load_towers
from sd_erase.config import RunConfig
from sd_erase.erasure import pairwise, stage
from sd_erase.erasure.losses import prediction_divergence
from sd_erase.erasure.method import Batch
from sd_erase.erasure.pairwise import Embedded
from sd_erase.errors import UserError
from sd_erase.pairs import read_pairs
from sd_erase.rundir import RunDir, read_jsonl

SCALE = 2.0
# logits 2 * [[1, 0], [0, 1]] and 2 * [[1, .6], [0, .8]]: rows are images, columns texts
FORGET, RETAIN_TEXTS = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
OF_FORGET = math.log(1 + math.exp(-2.0))
OF_RETAIN = (
    math.log(1 + math.exp(1.2 - 2.0)) + math.log(1 + math.exp(0.0 - 1.6))
    + math.log(1 + math.exp(0.0 - 2.0)) + math.log(1 + math.exp(1.2 - 1.6))
) / 4  # fmt: skip


@pytest.fixture
def towers() -> Any:
    return SimpleNamespace(clip=SimpleNamespace(logit_scale=torch.tensor(math.log(SCALE))))


def batch(**values: Any) -> Batch:
    rest = dict.fromkeys(("forget_images", "retain_images", "forget_pixels", "retain_pixels"))
    return Batch([], [], **{**rest, "random": random.Random(0), **values})


def losses(objective: str, towers: Any, monkeypatch: pytest.MonkeyPatch, **values: Any) -> dict[str, float]:
    kind = catalog.resolve(catalog.METHODS, objective, "Objective")
    monkeypatch.setattr(kind, "embed", lambda self, towers, batch: Embedded(FORGET, FORGET, torch.eye(2), RETAIN_TEXTS))
    found = kind().losses(towers, batch(**values))
    assert found.keys() == kind.default_weights.keys()
    return {name: term.item() for name, term in found.items()}


def test_gradient_ascent_is_the_negative_contrastive_loss(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert losses("ga", towers, monkeypatch) == pytest.approx({"ascent": -OF_FORGET})


def test_gradient_difference_descends_on_the_retain_pairs(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert losses("graddiff", towers, monkeypatch) == pytest.approx({"ascent": -OF_FORGET, "retention": OF_RETAIN})


def test_fine_tuning_does_not_see_the_forget_pairs(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert losses("finetune", towers, monkeypatch) == pytest.approx({"retention": OF_RETAIN})


def test_kl_minimisation_compares_with_the_originals_predictions(towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sd_erase.erasure.kl as module

    monkeypatch.setattr(module, "embed_captions", lambda towers, pairs, frozen: torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    # the original's logits are [[2, 2], [0, 0]]: images cannot tell the texts apart, texts the images very well
    found = losses("kl", towers, monkeypatch, retain_images=torch.eye(2))

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def softmax(*logits: float) -> list[float]:
        total = sum(math.exp(value) for value in logits)
        return [math.exp(value) / total for value in logits]

    rows = kl([0.5, 0.5], softmax(2.0, 1.2)) + kl([0.5, 0.5], softmax(0.0, 1.6))
    columns = kl(softmax(2.0, 0.0), softmax(2.0, 0.0)) + kl(softmax(2.0, 0.0), softmax(1.2, 1.6))
    assert found == pytest.approx({"ascent": -OF_FORGET, "divergence": (rows / 2 + columns / 2) / 2})


def test_the_divergence_is_zero_from_the_original_to_itself() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert prediction_divergence(logits, logits).item() == pytest.approx(0.0, abs=1e-7)


def test_the_noise_of_emmn_raises_and_lowers_the_originals_error(harvested: tuple[RunConfig, RunDir]) -> None:
    towers = load_towers(bases.resolve("pocket"), torch.device("cpu"), need_images=True)
    pairs = read_pairs(harvested[1])
    method = catalog.resolve(catalog.METHODS, "emmn", "Objective")()
    forget, retain = ([pair for pair in pairs if pair.set == name][:6] for name in ("forget", "retain"))
    texts = pairwise.embed_captions(towers, [*forget, *retain], frozen=True)

    def errors(noise: torch.Tensor) -> torch.Tensor:
        logits = towers.frozen_clip.logit_scale.exp() * image_embeddings(towers.frozen_clip, noise) @ texts.T
        return cross_entropy(logits, torch.arange(len(texts)), reduction="none").detach()

    before = errors(torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(5)))
    noise = method.noise(towers, texts, 6, 5)
    after = errors(noise)
    assert after[:6].mean() > before[:6].mean() and after[6:].mean() < before[6:].mean()
    with torch.no_grad():  # as a validation calls it
        found = method.losses(towers, dataclasses.replace(batch(), forget=forget, retain=retain))
    assert all(math.isfinite(term) for term in found.values()) and found["impair"] > found["repair"]


@pytest.mark.parametrize(
    ("objective", "both"), [("ga", True), ("graddiff", False), ("kl", True), ("emmn", True), ("emmn", False), ("finetune", False)]
)
def test_it_trains_and_is_found_again(
    objective: str, both: bool, harvested: tuple[RunConfig, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    config, source = harvested
    shutil.copytree(source.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    train = dataclasses.replace(config.train, objective=objective, towers="both" if both else "text")
    found = stage.train(dataclasses.replace(config, train=train), run)
    assert found["best_step"] == 2
    assert {row["step"] for row in read_jsonl(run.metrics)} == {0, 1, 2}
    towers = load_erased_towers(bases.resolve("pocket"), run, torch.device("cpu"))

    def moved(name: str) -> bool:
        before, after = getattr(towers.frozen_clip, name).state_dict(), getattr(towers.clip, name).state_dict()
        return any(not torch.equal(before[key], after[key]) for key in before)

    assert moved("text_model")
    assert moved("vision_model") == moved("text_projection") == both


def test_an_objective_of_ones_own_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no_such_module:Method.*cannot be imported"):
        catalog.resolve(catalog.METHODS, "no_such_module:Method", "Objective")
    with pytest.raises(UserError, match="graddiff"):
        catalog.resolve(catalog.METHODS, "graddif", "Objective")
