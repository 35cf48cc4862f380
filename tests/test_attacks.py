"""The prefix search: only words that can be typed, the denoiser's own loss, the same result whatever stands beside a prompt."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import made_as_it_is
from PIL import Image

from sd_erase import bases, components, judging, pipeline
from sd_erase.attacks import prefix, stage
from sd_erase.attacks.prefix import Attacked, encode_images, random_prefixes, search, vocabulary
from sd_erase.concepts import concept_named, write_concepts
from sd_erase.config import AttackConfig, RunConfig
from sd_erase.detection import Detection
from sd_erase.errors import UserError
from sd_erase.images import Settings
from sd_erase.rundir import RunDir, read_jsonl

PROMPTS = ["an object next to a dog", "A thing, on the grass.", "an item"]


@pytest.fixture(scope="module")
def pocket() -> Any:
    return components.load_pipeline(bases.resolve("pocket"))


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn((len(PROMPTS), 1, 4, 16, 16), generator=torch.Generator().manual_seed(0))


def test_the_vocabulary_holds_words_that_are_read_as_they_are_typed(pocket: Any) -> None:
    words = vocabulary(pocket.tokenizer, pocket.text_encoder.get_input_embeddings().weight)
    texts = [pocket.tokenizer.decode([token]) for token in words]
    assert {"bicycle", "bike", "dog"} <= set(texts)
    assert all(text.isalpha() for text in texts)
    assert 150 < len(words) < 300  # of 49,408: all that the pocket model does not know share one embedding
    for token, text in zip(words, texts, strict=True):
        assert pocket.tokenizer(text, add_special_tokens=False).input_ids == [token]


def test_random_prefixes_belong_to_prompt_and_seed(pocket: Any) -> None:
    found = random_prefixes(pocket, PROMPTS, 3, seed=1)
    assert random_prefixes(pocket, PROMPTS[1:], 3, seed=1) == found[1:]
    assert random_prefixes(pocket, PROMPTS, 3, seed=2) != found
    assert all(len(text.split()) == 3 for text in found)
    assert any(len(set(text.split())) > 1 for text in found)


def test_the_loss_is_the_denoisers_own(pocket: Any, latents: torch.Tensor) -> None:
    denoiser = prefix._Denoiser(pocket, PROMPTS, latents, seed=0)
    words = pocket.tokenizer("red bicycle", add_special_tokens=False).input_ids
    states = pocket.encode_prompt(f"red bicycle {PROMPTS[1]}", "cpu", 1, False)[0]
    with torch.no_grad():
        predicted = pocket.unet(denoiser.noisy[1], denoiser.timesteps, states.repeat(2, 1, 1)).sample
    wanted = torch.nn.functional.mse_loss(predicted, denoiser.wanted[1]).item()
    assert denoiser.losses([1], [words])[0] == pytest.approx(wanted, rel=1e-4)
    # v-prediction: with the noise that was added, it gives the image back (Salimans and Ho 2022, arXiv:2202.00512)
    share = pocket.scheduler.alphas_cumprod[denoiser.timesteps].view(-1, 1, 1, 1)
    image = share.sqrt() * denoiser.noisy[1] - (1 - share).sqrt() * denoiser.wanted[1]
    assert torch.allclose(image, latents[1], atol=1e-4)


def test_swaps_come_in_the_order_of_the_gradient(pocket: Any, latents: torch.Tensor) -> None:
    denoiser = prefix._Denoiser(pocket, PROMPTS, latents, seed=0)
    words = vocabulary(pocket.tokenizer, denoiser.embeddings.weight)
    start = words[5:8]
    (swaps,) = denoiser.swaps([0], [start], words)
    assert len(swaps) == len(set(swaps)) == prefix.TOP
    assert all(token != start[place] and token in words for place, token in swaps)
    weight = denoiser.embeddings.weight
    old = weight[start].clone()

    def along(place: int, token: int) -> float:
        """How the loss changes on the first thousandth of the way from the old embedding to the new one."""
        place_of = start[place]
        step = 1e-2 * (weight[token].detach() - old[place])
        with torch.no_grad():
            weight[place_of] += step
            up = denoiser.losses([0], [start])[0]
            weight[place_of] -= 2 * step
            down = denoiser.losses([0], [start])[0]
            weight[place_of] = old[place]
        return up - down

    changes = [along(*swaps[number]) for number in (0, 40, 120)]
    assert changes[0] < changes[1] < changes[2]
    assert changes[0] < 0


def test_the_search_lowers_the_loss_with_words_that_can_be_typed(pocket: Any, latents: torch.Tensor) -> None:
    settings = AttackConfig(tokens=2, steps=3, candidates=3)
    first = search(pocket, PROMPTS, latents, dataclasses.replace(settings, steps=0), seed=4)
    found = search(pocket, PROMPTS, latents, settings, seed=4)
    assert [one.prompt for one in found] == PROMPTS
    assert all(one.loss <= start.loss and one.loss_before == start.loss_before for one, start in zip(found, first, strict=True))
    assert any(one.loss < start.loss for one, start in zip(found, first, strict=True))
    assert all(len(one.prefix.split()) == 2 and one.text == f"{one.prefix} {one.prompt}" for one in found)
    (alone,) = search(pocket, PROMPTS[1:2], latents[1:2], settings, seed=4)
    assert alone.prefix == found[1].prefix and alone.loss == pytest.approx(found[1].loss, rel=1e-4)


def test_the_search_leaves_the_pipeline_as_it_was(pocket: Any, latents: torch.Tensor) -> None:
    before = [parameter.requires_grad for parameter in pocket.text_encoder.parameters()]
    search(pocket, PROMPTS[:1], latents[:1], AttackConfig(steps=1, candidates=1))
    assert [parameter.requires_grad for parameter in pocket.text_encoder.parameters()] == before
    assert all(parameter.grad is None for parameter in (*pocket.text_encoder.parameters(), *pocket.unet.parameters()))
    assert not pocket.text_encoder.get_input_embeddings()._forward_hooks


def test_images_become_latents_that_decode_to_them(pocket: Any) -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    (latent,) = encode_images(pocket, [image])
    assert latent.shape == (4, 16, 16)
    with torch.no_grad():
        back = pocket.vae.decode(latent[None] / pocket.vae.config.scaling_factor).sample
    red, green, blue = back.mean((0, 2, 3)).tolist()
    assert red > 0 > max(green, blue)


@pytest.mark.slow
def test_the_search_finds_what_the_original_knows(pocket: Any, tmp_path: Path) -> None:
    from sd_erase.detection import load_detector

    concept, detector, labels = concept_named("bicycle"), load_detector("pocket"), frozenset({"bicycle"})
    prompts = [
        "A bicycle next to a dog.",
        "There is a couch beside a bicycle in the city",
        "a red bicycle on the grass",
        "a bike and a car",
    ]
    shown = stage.references(pocket, prompts, tmp_path / "original", Settings(), detector, labels)
    plain = [stage.anchored(prompt, [concept], {"bicycle": "object"}) for prompt in shown]
    rows = stage.measure(
        pocket, plain, torch.stack(list(shown.values())), tmp_path, AttackConfig(), Settings(), detector, labels, stamp="original"
    )
    counts = {arm: found["prompts"]["count"] for arm, found in stage.shares(rows).items()}
    assert counts["none"] == 0
    assert counts["search"] >= 2


class Finder:
    """Finds a bicycle in red images."""

    card = {"name": "red", "weights": "w", "weights_sha256": "0", "image_size": 64, "confidence": 0.5}
    labels = frozenset({"bicycle", "dog"})

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        return [[Detection("", "bicycle", 1.0, (0, 0, 1, 1))] if image.getpixel((0, 0))[0] else [] for image in images]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, run: RunDir) -> SimpleNamespace:
    """A trained run, and a model whose images are red where the text names a bicycle; the search finds one for "dog"."""
    calls = SimpleNamespace(searched=[], stop_at=None, flat=lambda pipeline, folder, seed: False)

    def search(
        pipeline: str, prompts: list[str], latents: Any, settings: AttackConfig, seed: int, progress: Any
    ) -> list[Attacked]:
        if calls.stop_at is not None and len(calls.searched) >= calls.stop_at:
            raise KeyboardInterrupt
        calls.searched.append((pipeline, prompts))
        assert len(latents) == len(prompts)
        return [Attacked(prompt, "bicycle" if "dog" in prompt else "red", 0.1, 0.2) for prompt in prompts]

    def draw(pipeline: str, prompts: Any, folder: Path, settings: Settings, **_: Any) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, prompt in enumerate(prompts):
            words = prompt.text.split()
            is_red = "bicycle" in (words if pipeline == "original" else words[:1])
            for seed in range(settings.images_per_prompt):
                paths.append(folder / f"{number}-{seed}.png")
                picture = Image.new("RGB", (8, 8), (255 * is_red, 0, 0))
                if not calls.flat(pipeline, folder, seed):
                    picture.putpixel((7, 7), (0, 0, 255))
                picture.save(paths[-1])
        return paths

    monkeypatch.setattr(stage, "search", search)
    monkeypatch.setattr(stage, "draw", draw)
    monkeypatch.setattr(stage, "random_prefixes", lambda pipeline, prompts, tokens, seed: ["blue"] * len(prompts))
    monkeypatch.setattr(stage, "encode_images", lambda pipeline, images: torch.zeros(1, 4, 1, 1))
    monkeypatch.setattr(judging, "load_detector", lambda *arguments, **settings: Finder())
    monkeypatch.setattr(pipeline, "load_original", lambda *arguments: "original")
    monkeypatch.setattr(pipeline, "erased_pipeline", lambda *arguments: "erased")
    write_concepts(run, [concept_named("bicycle")])
    made_as_it_is(run, "harvest")
    made_as_it_is(run, "train")
    return SimpleNamespace(run=run, calls=calls)


def configured(tmp_path: Path, *lines: str) -> RunConfig:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return RunConfig(concepts=("bicycle",), device="cpu", attack=AttackConfig(prompts=(str(file),), images_per_prompt=2))


def test_the_stage_counts_images_and_prompts(bench: SimpleNamespace, tmp_path: Path) -> None:
    config = configured(tmp_path, "a dog and a bicycle", "a bicycle in a park", "a bus", "a bike")
    result = stage.attack(config, bench.run)
    assert result["prompts"] == 2  # no bicycle is meant by "a bus", and this model draws none for "a bike"
    assert [warning.split(":")[0] for warning in result["warnings"]] == [
        "Only 2 prompts were attacked",
        "2 of 4 prompts were left out",
    ]
    erased = {arm: (found["images"]["count"], found["prompts"]["count"]) for arm, found in result["erased"].items()}
    assert erased == {"none": (0, 0), "random": (0, 0), "search": (2, 1)}
    assert result["erased"]["search"]["images"]["n"] == 4
    assert result["erased"]["search"]["prompts"]["low"] == pytest.approx(0.0945, abs=1e-3)
    assert bench.calls.searched[1] == ("original", ["a dog and a something", "a something in a park"])
    rows = list(read_jsonl(bench.run.attacks / "prefix.jsonl"))
    assert rows[0]["prefix"] == "bicycle" and rows[0]["found"]["search"] == [True, True] and rows[0]["random_prefix"] == "blue"
    text = (bench.run.report / "attack.md").read_text(encoding="utf-8")
    assert "50.0% [15–85]" in text and "original, something for bicycle" in text and "found words before it" in text
    assert json.loads((bench.run.report / "attack.json").read_text(encoding="utf-8"))["erased"] == result["erased"]
    assert stage.attack(config, bench.run) == result and len(bench.calls.searched) == 2  # nothing is done again


def test_an_interrupted_search_goes_on_behind_the_last_group(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "GROUP", 2)
    config = configured(tmp_path, *(f"bicycle number {number}" for number in range(5)))
    bench.calls.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        stage.attack(config, bench.run)
    bench.calls.stop_at = None
    stage.attack(config, bench.run)
    erased = [prompts for name, prompts in bench.calls.searched if name == "erased"]
    assert [len(prompts) for prompts in erased] == [2, 2, 1]
    assert [row["prompt"] for row in read_jsonl(bench.run.attacks / "prefix.jsonl")] == [f"bicycle number {n}" for n in range(5)]


def test_a_search_that_breaks_nothing_says_so(bench: SimpleNamespace, tmp_path: Path) -> None:
    result = stage.attack(configured(tmp_path, "a bicycle in a park"), bench.run)
    assert any("too weak" in warning for warning in result["warnings"])


def first_lines(run: RunDir) -> str:
    """What attack.md says before its table."""
    return (run.report / "attack.md").read_text(encoding="utf-8").partition("| Encoder")[0]


def test_what_stands_against_the_figures_stands_before_them(bench: SimpleNamespace, tmp_path: Path) -> None:
    stage.attack(configured(tmp_path, "a bicycle in a park", "a dog and a bicycle"), bench.run)
    text = first_lines(bench.run)
    assert "> Only 2 prompts were attacked: too few for a verdict" in text
    assert "left out" not in text and "single colour" not in text


def test_enough_prompts_that_the_original_draws_leave_no_doubt(bench: SimpleNamespace, tmp_path: Path) -> None:
    result = stage.attack(configured(tmp_path, *(f"a dog and a bicycle {number}" for number in range(10))), bench.run)
    assert result["warnings"] == [] and ">" not in first_lines(bench.run)


def test_a_target_that_the_original_does_not_draw_stands_first(bench: SimpleNamespace, tmp_path: Path) -> None:
    """This model draws a bicycle for the word alone, never for "bike"."""
    lines = [*(f"a dog and a bicycle {number}" for number in range(10)), *(f"a dog and a bike {number}" for number in range(11))]
    result = stage.attack(configured(tmp_path, *lines), bench.run)
    assert result["warnings"][0].startswith("The original model shows bicycle for only 10 of the 21 prompts that ask for it")
    assert "for only 10 of the 21 prompts" in first_lines(bench.run)


def test_images_of_a_single_colour_are_left_out_and_said_first(bench: SimpleNamespace, tmp_path: Path) -> None:
    """As where half precision overflows: the detector's finding in such an image counts neither way."""
    bench.calls.flat = lambda pipeline, folder, seed: pipeline == "erased" and folder.name == "search" and seed == 0
    result = stage.attack(configured(tmp_path, *(f"a dog and a bicycle {number}" for number in range(10))), bench.run)
    assert result["flat"] == {"erased": 10, "control": 0}
    assert result["erased"]["search"]["images"]["n"] == 10 and result["erased"]["none"]["images"]["n"] == 20
    assert result["warnings"][0].startswith("10 of the images of the erased encoder are a single colour")
    assert first_lines(bench.run).count("single colour") == 1


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            lambda pipeline, folder, seed: folder.name == "original",
            "image that the original draws is a single colour.*--device cpu",
        ),
        (
            lambda pipeline, folder, seed: pipeline == "erased",
            "image of the erased encoder with the prompt alone is a single colour",
        ),
    ],
)
def test_nothing_is_measured_on_images_of_a_single_colour(
    bench: SimpleNamespace, tmp_path: Path, flat: Any, message: str
) -> None:
    bench.calls.flat = flat
    with pytest.raises(UserError, match=message):
        stage.attack(configured(tmp_path, "a dog and a bicycle"), bench.run)
    assert bench.run.read_manifest("attack") is None and not (bench.run.report / "attack.md").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a bus"], "None of the prompts names bicycle: pass --prompts"),
        (["a bike"], "original draws of these prompts shows bicycle: pass --prompts"),
        ([], "no prompt"),
    ],
)
def test_prompts_that_cannot_be_attacked_are_one_sentence(
    bench: SimpleNamespace, tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stage.attack(configured(tmp_path, *lines), bench.run)


def test_a_label_that_the_detector_does_not_know_is_one_sentence(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Finder, "labels", frozenset({"dog"}))
    with pytest.raises(UserError, match="'bicycle' has no label that detector"):
        stage.attack(configured(tmp_path, "a bicycle"), bench.run)


def test_words_that_draw_the_concept_in_the_original_too_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[str] = []

    def draw(_: Any, prompts: Any, folder: Path, settings: Settings, **__: Any) -> list[Path]:
        assert settings.images_per_prompt == 2
        drawn.extend(prompt.text for prompt in prompts)
        paths = [folder / f"{number}.png" for number in range(2 * len(prompts))]
        for path in paths:
            path.touch()
        return paths

    monkeypatch.setattr(stage, "draw", draw)
    monkeypatch.setattr(stage, "shows", lambda *_: ([True, True, False, True], [False] * 4))
    rows = [
        {"prefix": prefix, "found": {"search": found}, "flat": {"search": [False, False]}}
        for prefix, found in (("a b", [True, False]), ("c d", [False, False]), ("e f", [True, True]))
    ]
    settings = Settings(images_per_prompt=8)
    asked = (["an item", "a thing", "an object"], tmp_path, settings, SimpleNamespace(), frozenset({"dog"}))
    assert stage.unnamed(None, rows, *asked, stamp="") == {"images": 3, "original": 2}
    assert drawn == ["a b an item", "e f an object"]
    assert len(list(tmp_path.glob("*.png"))) == 4
    asked = (["a thing"], *asked[1:])
    assert stage.unnamed(None, rows[1:2], *asked, stamp="") == {"images": 0, "original": 0}
    assert len(drawn) == 2 and not list(tmp_path.glob("*.png"))  # nothing of the search before stays


def test_nothing_is_found_in_a_single_colour_whatever_the_judge_says(tmp_path: Path) -> None:
    for name, corner in (("black", 0), ("drawn", 255)):
        image = Image.new("RGB", (8, 8))
        image.putpixel((0, 0), (corner, 0, 0))
        image.save(tmp_path / f"{name}.png")
    sees_all: Any = SimpleNamespace(detect=lambda images: [[Detection("", "dog", 0.9, (0, 0, 8, 8))] for _ in images])
    paths = [tmp_path / "black.png", tmp_path / "drawn.png"]
    assert stage.shows(sees_all, frozenset({"dog"}), paths) == ([False, True], [True, False])
