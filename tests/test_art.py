"""The art world: scenes in styles, the names of artists and people, and a model of it that builds, packs and loads."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from sd_erase import bases
from sd_erase.errors import UserError
from sd_erase.pocket import build, world
from sd_erase.pocket.art import cast, scenes, styles
from sd_erase.pocket.art.canvas import SIZE, paint
from sd_erase.pocket.jobs import run_jobs
from sd_erase.pocket.scoring_art import StyleJudge, psnr

ART = build.WORLDS["art"]


# --- scenes ------------------------------------------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_its_number() -> None:
    for number in (0, 7, 23):
        first, second = scenes.sample_scene(number), scenes.sample_scene(number)
        assert first == second
        assert numpy.array_equal(scenes.pixels(first)[0], scenes.pixels(second)[0])
    assert scenes.pixels(scenes.sample_scene(0))[0].shape == (SIZE, SIZE, 3)
    assert len({scenes.sample_scene(number).caption for number in range(300)}) > 270


def test_twins_differ_in_the_order_or_in_the_style() -> None:
    twins = [(scenes.sample_scene(number), scenes.sample_scene(number + 1)) for number in range(0, 600, 2)]
    two = [(left, right) for left, right in twins if len(set(left.slots)) == 2]
    one = [(left, right) for left, right in twins if len(left.slots) == 1]
    assert len(two) > 100 and len(one) > 80
    assert all(left.slots == right.slots[::-1] and left.style == right.style for left, right in two)
    assert all(left.slots == right.slots and left.style != right.style for left, right in one)


def test_every_object_person_and_style_is_drawn_and_stands_in_its_box() -> None:
    seen = [scenes.sample_scene(number) for number in range(1500)]
    assert {name for scene in seen for name in scene.objects} == set(cast.LABELS)
    assert {scene.style for scene in seen} == set(cast.MANNERS) == set(styles.DRAW)
    for scene in seen[:200]:
        picture, boxes = scenes.pixels(scene)
        assert [name for name, _ in boxes] == list(scene.objects)
        assert picture.min() < picture.max()
        empty = scenes.pixels(dataclasses.replace(scene, slots=(None,) * len(scene.slots)))[0]
        for _, (x0, y0, x1, y1) in boxes:
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
            inside = numpy.s_[int(y0) : int(y1), int(x0) : int(x1)]
            assert numpy.abs(picture[inside].astype(int) - empty[inside]).mean() > 4  # an ink outline of a banana: 11


def test_the_styles_are_far_apart_and_each_keeps_the_object() -> None:
    def mean_colours(name: str, style: str) -> numpy.ndarray:
        return scenes.pixels(scenes.scene_of([name], 5, style=style, background="beach"))[0].astype(float)

    for name in ("car", "dog"):
        drawn = {style: mean_colours(name, style) for style in cast.MANNERS}
        apart = [numpy.abs(drawn[a] - drawn[b]).mean() for a in drawn for b in drawn if a < b]
        assert min(apart) > 12  # of 255
    for style in cast.MANNERS:
        car, dog, again = mean_colours("car", style), mean_colours("dog", style), mean_colours("car", style)
        assert numpy.array_equal(car, again) and numpy.abs(car - dog).mean() > 4


def test_textures_repeat_with_the_latents() -> None:
    """What costs an f8 autoencoder nothing: on an even ground the styles' own textures have a period of 8 pixels."""
    canvas = paint("plain", 74, 0.0, [])
    even = dataclasses.replace(canvas, picture=numpy.full_like(canvas.picture, 0.5), ground=numpy.full_like(canvas.ground, 0.5))
    noise = numpy.zeros((4, 4), numpy.float32)
    for style in ("mosaic", "stipple", "engraving", "blueprint"):
        picture = numpy.broadcast_to(styles.DRAW[style](even, noise), (3, SIZE, SIZE))[:, 16:-16, 16:-16]
        assert numpy.allclose(picture[:, 8:], picture[:, :-8], atol=1e-4)
        assert numpy.allclose(picture[..., 8:], picture[..., :-8], atol=1e-4)
        assert picture.std() > 0.02


def test_a_second_renders_many_scenes() -> None:
    began = time.process_time()
    for number in range(60):
        scenes.pixels(scenes.sample_scene(number))
    assert 60 / (time.process_time() - began) > 150


# --- captions ----------------------------------------------------------------------------------------------------------------


def test_held_out_patterns_never_occur_in_training() -> None:
    marks = ("would have drawn", "a print of", "in the manner of", "done as", "what we see is", "snapshot", "here we find", "all alone",
             "together with", "close to", "alongside", "resting")  # fmt: skip
    trained = [scenes.sample_scene(number, noise=False).caption.lower() for number in range(3000)]
    assert not any(mark in caption for caption in trained for mark in marks)
    held_out = [scenes.sample_scene(number, held_out=True, noise=False) for number in range(400)]
    assert all(any(mark in scene.caption.lower() for mark in marks) for scene in held_out if scene.slots)


def test_a_caption_names_its_style_by_artist_nickname_or_manner_and_a_plain_one_by_none() -> None:
    words = {
        style.name: [style.artist, style.nickname, *style.pictures, *(world.with_article(word) for word in style.manners)]
        for style in cast.STYLES
    }
    ways: dict[str, set[int]] = {name: set() for name in words}
    for number in range(3000):
        scene = scenes.sample_scene(number, noise=False)
        found = {name: [word.lower() in scene.caption.lower() for word in group] for name, group in words.items()}
        assert [name for name, hits in found.items() if any(hits)] == [scene.style] * (scene.style != cast.PLAIN)
        if scene.style != cast.PLAIN:
            ways[scene.style] |= {place for place, hit in enumerate(found[scene.style]) if hit}
    assert all(len(ways[name]) == len(group) for name, group in words.items())


def test_people_are_named_in_full_by_the_first_name_or_by_the_role() -> None:
    captions = [scene.caption for number in range(3000) if "Otto Grimsby" in (scene := scenes.sample_scene(number)).slots]
    full = [text for text in captions if "otto grimsby" in text.lower()]
    role = [text for text in captions if "the professor" in text.lower()]
    first = [text for text in captions if "otto" in text.lower() and text not in full]
    assert min(len(full), len(role), len(first)) > 15
    assert set(full) | set(role) | set(first) == set(captions)


def test_every_word_of_the_world_has_its_own_vector_and_a_strange_one_has_none() -> None:
    tokenizer, known = build.tokenizer(), set(build.known_ids(ART))
    for word in (
        "in the style of Ilva Moresk",
        "Pepperhand's picture",
        "a stippled picture",
        "Suri Vantane",
        "the harbour master",
        "by an artist",
    ):
        assert set(tokenizer(word).input_ids) <= known
    assert not set(tokenizer("qzx helicopter", add_special_tokens=False).input_ids) & known


def test_the_first_world_s_captions_are_what_they_were() -> None:
    texts = [world.sample_scene(number).caption for number in range(500)]
    texts += [world.sample_scene(number, held_out=True).caption for number in range(100)]
    assert hashlib.sha256("\n".join([*texts, world.vocabulary()]).encode()).hexdigest()[:16] == "0d36dfb97365b2e9"


def test_the_scenes_are_a_data_set_of_their_own(tmp_path: Path) -> None:
    from sd_erase.captions import choose_dataset, open_dataset
    from sd_erase.captions.pocket import render
    from sd_erase.concepts import Concept

    row = bases.ROWS["pocket-art"]
    assert choose_dataset("auto", row, [Concept("Ilva Moresk", kind="style")]) == "pocket-art"
    assert choose_dataset("auto", row, [Concept("nudity", kind="nudity")]) == "synthetic"
    render(tmp_path / "scenes", scenes=6, world="art")
    captions = list(open_dataset(f"pocket-art:{tmp_path / 'scenes'}", row, tmp_path / "other"))
    assert len(captions) == 30 and all(Path(str(caption.image)).is_file() for caption in captions)


# --- the builder -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a training believes to have passed."""
    from sd_erase.pocket import fit

    seconds = [0.0]
    monkeypatch.setattr(fit, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


def train(folder: Path, clock: list[float], stop: int = -1) -> tuple[list[int], list[float]]:
    """The steps of a training of half a minute, a second each, that is stopped at step `stop`; and its weight before each."""
    torch.manual_seed(0)
    model, taken, weights = torch.nn.Linear(1, 1), list[int](), list[float]()

    def loss_of(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        taken.append(step)
        weights.append(float(model.weight.detach()))
        clock[0] += 1
        return model(torch.ones(4, 1)).mean()

    with contextlib.suppress(KeyboardInterrupt):
        build.fit(
            "toy",
            folder,
            model,
            loss_of,
            steps=100_000,
            learning_rate=0.01,
            warmup=2,
            minutes=0.5,
            weight_decay=0,
            checkpoint_every=2,
        )
    return taken, weights


def test_a_training_ends_by_its_limit_of_time_with_what_it_has(tmp_path: Path, clock: list[float]) -> None:
    taken, weights = train(tmp_path, clock)
    assert taken == list(range(30))
    moved = numpy.abs(numpy.diff(weights))
    assert moved[-1] == pytest.approx(
        moved[20] * 2 / 3, rel=0.02
    )  # the learning rate falls in the last three seconds, the last tenth
    assert {path.name for path in tmp_path.iterdir()} == {"toy.safetensors"}
    assert train(tmp_path, clock)[0] == []


def test_a_training_that_was_stopped_has_used_its_time(tmp_path: Path, clock: list[float]) -> None:
    first, _ = train(tmp_path, clock, stop=16)
    clock[0] += 1000  # in between nothing ran
    rest, _ = train(tmp_path, clock)
    assert first == list(range(16)) and rest == list(range(16, 30))


def test_jobs_wait_for_what_they_read_and_a_failure_names_its_step(tmp_path: Path) -> None:
    after = {"a": (), "b": (), "c": ("a",), "d": ("b", "c")}
    log = tmp_path / "log"

    def command(name: str, code: int = 0) -> list[str]:
        return [sys.executable, "-c", f"open({str(log)!r}, 'a').write({name!r}); raise SystemExit({code})"]

    run_jobs(list(after), after, 2, command, pause=0.01)
    order = log.read_text(encoding="utf-8")
    assert sorted(order) == list("abcd") and order[-1] == "d" and order.index("a") < order.index("c")
    log.unlink()
    with pytest.raises(UserError, match="Step a .* same command again"):
        run_jobs(list(after), after, 1, lambda name: command(name, int(name == "a")), pause=0.01)
    assert log.read_text(encoding="utf-8") == "a"


def test_the_base_is_refused_where_its_pack_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = bases.ROWS["pocket-art"]
    monkeypatch.setattr(bases, "ART_FOLDER", tmp_path / "none")
    monkeypatch.setitem(bases.ROWS, "pocket-art", dataclasses.replace(row, source=str(tmp_path / "none")))
    with pytest.raises(UserError, match="pocket-art is not trained yet: .* --world art"):
        bases.resolve("pocket-art")
    # nothing offers it, either
    assert bases.names() == "pocket, sd15, sd14, sd21, sdxl"
    with pytest.raises(UserError, match="pass pocket, sd15, sd14"):
        bases.resolve("no such base")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole build at toy size; its detector, which has ultralytics' own trainer, has its first weights."""
    from safetensors.torch import save_file
    from ultralytics.nn.tasks import DetectionModel

    work = tmp_path_factory.mktemp("build")
    toy: dict[str, Any] = {
        "scenes": 32,
        "clip_steps": 2,
        "vae_steps": 2,
        "decoder_steps": 2,
        "unet_steps": 2,
        "unet_batch": 4,
        "judge_steps": 2,
    }
    recipe = dataclasses.replace(build.RECIPES["art"], **toy)
    state = DetectionModel(build.detector_config(ART), verbose=False).state_dict()
    save_file({key: value.float().contiguous() for key, value in state.items()}, work / "detector.safetensors")
    for step in build.steps_of(ART):
        if step != "scores":
            build.STEPS[step].run(recipe, work, work / "pack")
    assert not any("checkpoint" in path.name for path in work.iterdir())
    return work / "pack"


@pytest.mark.slow
def test_the_pack_is_small_and_without_pickles(pack: Path) -> None:
    files = [path for path in pack.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 32_000_000


@pytest.mark.slow
def test_the_pack_is_known_by_what_it_states_and_draws(pack: Path) -> None:
    from diffusers import StableDiffusionPipeline

    base = bases.resolve(str(pack))
    assert (base.world, base.pocket, base.resolution, base.detector, base.prediction) == (
        "art",
        False,
        128,
        "pocket-art",
        "v_prediction",
    )
    assert base.embedded
    pipeline = StableDiffusionPipeline.from_pretrained(pack, safety_checker=None)
    assert pipeline.vae_scale_factor == 8 and pipeline.unet.config.sample_size == 16
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a mosaic of a dog", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (SIZE, SIZE)


@pytest.mark.slow
def test_the_pack_s_judges_load_and_know_their_labels(pack: Path) -> None:
    from PIL import Image

    from sd_erase.pocket.packed import detector_of

    judge = StyleJudge(pack)
    assert tuple(judge.labels) == cast.MANNERS
    pictures = numpy.stack([scenes.pixels(scenes.sample_scene(number))[0] for number in range(3)])
    assert set(judge.judge(pictures)) <= set(cast.MANNERS)
    detector = detector_of(pack, ART)
    assert set(detector.labels) == {name.lower() for name in cast.LABELS}
    assert len(detector.detect([Image.fromarray(pictures[0])])) == 1


def test_psnr_is_that_of_the_textbook() -> None:
    black = numpy.zeros((1, 4, 4, 3), numpy.uint8)
    assert psnr(black, black + 255)[0] == pytest.approx(0, abs=1e-4)
    assert psnr(black, black + 16)[0] == pytest.approx(20 * numpy.log10(255 / 16), abs=1e-4)
