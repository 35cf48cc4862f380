"""Harvest: the right captions on the right side, the same ones every time, and an error where there is nothing to erase."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sd_erase import concepts as concepts_module
from sd_erase import pairs as module
from sd_erase.concepts import read_concepts
from sd_erase.config import HarvestConfig, RunConfig
from sd_erase.errors import UserError
from sd_erase.pairs import Pair, harvest, image_fault, read_pairs
from sd_erase.rundir import RunDir, read_jsonl

REAL = Path(__file__).parents[2] / "shared" / "data"
Rows = list[dict[str, Any]]


def jsonl(folder: Path, rows: Rows) -> str:
    """The data set's specification after `rows` are written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return f"jsonl:{folder / 'm.jsonl'}"


def settings(dataset: str, *concepts: str, seed: int = 0, **harvest: Any) -> RunConfig:
    return RunConfig(concepts=concepts, base="sd15", seed=seed, harvest=HarvestConfig(dataset=dataset, **harvest))


def harvested(folder: Path, dataset: str, *concepts: str, **values: Any) -> tuple[list[Pair], dict[str, Any], RunDir]:
    """The pairs and the manifest of a new run in `folder`."""
    run = RunDir(folder)
    manifest = harvest(settings(dataset, *concepts, **values), run)
    return read_pairs(run), manifest, run


def world(count: int = 200) -> Rows:
    """Captions of `count` images, five each, in which every fifth image shows a bicycle; an image is known by its key."""
    rng = random.Random(1)
    things = ("dog", "cat", "bench", "bus", "car", "kite", "motorcycle", "motorcycle helmet", "sofa", "red hat")
    rows = []
    for number in range(count):
        for line in range(5):
            words = f"A {rng.choice(('small', 'big', 'old'))} {rng.choice(things)} stands beside a {rng.choice(things)} number {number} {line}."
            if number % 5 == 0 and line < 2:
                words = f"A {rng.choice(('man', 'woman'))} with a {rng.choice(('bicycle', 'bike', 'mountain bike'))} number {number} {line}."
            rows.append({"key": f"{number}.jpg", "caption": words})
    return rows


def of_set(pairs: list[Pair], name: str) -> list[Pair]:
    return [pair for pair in pairs if pair.set == name]


def images(pairs: list[Pair]) -> set[str]:
    return {pair.key.rpartition("#")[0] for pair in pairs}


def text_rows(*texts: str) -> Rows:
    """One caption an image."""
    return [{"key": f"{number}.jpg", "caption": text} for number, text in enumerate(texts)]


FILLER = text_rows(*(f"A dog runs over field {number}." for number in range(20)))


def test_two_harvests_are_the_same_to_the_byte(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, world())
    _, _, first = harvested(tmp_path / "a", dataset, "bicycle", max_forget=20, max_retain=60)
    _, _, second = harvested(tmp_path / "b", dataset, "bicycle", max_forget=20, max_retain=60)
    assert first.pairs.read_bytes() == second.pairs.read_bytes()
    assert first.concepts.read_bytes() == second.concepts.read_bytes()


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    rows = [
        {"key": f"{number}.jpg", "caption": f"A {thing} number {number}."} for number in range(90) for thing in ("dog", "bike")
    ]
    rows = [row for number, row in enumerate(rows) if number % 3]
    shuffled = random.Random(3).sample(rows, len(rows))
    sides = []
    for name, order in (("a", rows), ("b", shuffled)):
        pairs, _, _ = harvested(tmp_path / name / "run", jsonl(tmp_path / name, order), "bicycle", max_forget=10, max_retain=15)
        sides.append([(pair.caption, pair.set, pair.split, pair.spans) for pair in pairs])
    assert sides[0] == sides[1]


def test_another_seed_takes_other_captions(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, world())
    taken = [
        {pair.key for pair in harvested(tmp_path / str(seed), dataset, "bicycle", seed=seed, max_forget=20, max_retain=60)[0]}
        for seed in (0, 1)
    ]
    assert taken[0] != taken[1]


def test_an_image_that_any_caption_says_shows_the_concept_retains_nothing(tmp_path: Path) -> None:
    rows = world()
    pairs, manifest, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle", max_forget=0, max_retain=0)
    showing = {f"{number}.jpg" for number in range(0, 200, 5)}
    forget, retain = of_set(pairs, "forget"), of_set(pairs, "retain")
    assert images(forget) == showing
    assert images(retain) == {row["key"] for row in rows} - showing
    assert len(forget) == 2 * len(showing) and len(retain) == 5 * 160  # of a shown image, what does not name it is in neither
    assert manifest["statistics"]["images_forgotten"] == len(showing)
    assert manifest["statistics"]["captions_of_forgotten_images"] == 5 * len(showing)


def test_lines_about_one_image_file_are_one_image_whatever_their_keys(tmp_path: Path) -> None:
    rows = [
        {"key": "x", "image": "1.jpg", "caption": "A bicycle."},
        {"key": "y", "image": "./1.jpg", "caption": "A cat on a wall."},
    ]
    picture(tmp_path / "1.jpg")
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows + FILLER), "bicycle")
    assert "A cat on a wall." not in {pair.caption for pair in pairs}
    assert {pair.caption for pair in of_set(pairs, "forget")} == {"A bicycle."}


def test_no_image_stands_in_both_splits(tmp_path: Path) -> None:
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, world()), "bicycle", max_forget=0, max_retain=0)
    train = [pair for pair in pairs if pair.split == "train"]
    validation = [pair for pair in pairs if pair.split == "validation"]
    assert train and validation and images(train).isdisjoint(images(validation))


@pytest.mark.parametrize("share", [0.7, 0.5, 0.9])
def test_the_share_of_the_images_that_trains_is_as_set(share: float, tmp_path: Path) -> None:
    pairs, manifest, _ = harvested(
        tmp_path / "run", jsonl(tmp_path, world()), "bicycle", max_forget=0, max_retain=0, train_share=share
    )
    for name, number in (("forget", 40), ("retain", 160)):
        group = of_set(pairs, name)
        assert len(images([pair for pair in group if pair.split == "train"])) == round(share * number)
        assert len(images(group)) == number
        assert manifest["counts"][name] == {
            split: sum(pair.split == split for pair in group) for split in ("train", "validation")
        }


def test_even_two_images_give_both_splits(tmp_path: Path) -> None:
    rows = text_rows("A bicycle.", "Another bicycle.", "A dog.", "Another dog.")
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle")
    assert sorted((pair.set, pair.split) for pair in pairs) == [
        ("forget", "train"), ("forget", "validation"), ("retain", "train"), ("retain", "validation"),
    ]  # fmt: skip


def test_spared_senses_are_retained_and_said_to_be(tmp_path: Path) -> None:
    rows = text_rows("A ripe apple.", "An apple beside an Apple laptop.", "A man with an apple laptop.", "An orange.", "A dog.")
    pairs, manifest, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "apple")
    assert {(pair.caption, pair.set, pair.reason.lower()) for pair in pairs} == {
        ("A ripe apple.", "forget", "word: apple"),
        ("An apple beside an Apple laptop.", "forget", "word: apple"),
        ("A man with an apple laptop.", "retain", "spared sense: apple laptop"),
        ("An orange.", "retain", "neighbour: orange"),
        ("A dog.", "retain", "names: dog"),
    }
    assert manifest["reasons"]["retain"]["spared sense: apple laptop"] == 1


def test_spans_mark_every_use_of_the_words_and_no_spared_one(tmp_path: Path) -> None:
    rows = text_rows("An apple laptop, Apples and a red apple.") + FILLER
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "apple")
    (pair,) = of_set(pairs, "forget")
    assert [pair.caption[start:end] for start, end in pair.spans] == ["Apples", "red apple"]
    assert all(pair.spans == () and pair.concept is None for pair in of_set(pairs, "retain"))


@pytest.mark.parametrize(
    ("concept", "named", "unnamed"),
    [
        ("car", "A CAR.", ("A carrot.", "A scarf.", "A cart full of cargo.", "Scars.", "car_wash")),
        ("bus", "Two buses.", ("A busy man.", "A bush.", "Business.", "An ambush.")),
        ("cat", "A cat!", ("Cattle.", "A catalog.", "Location.", "Scattered leaves.")),
        ("bat", "A fruit bat.", ("A bathtub.", "An acrobat.", "Combat boots.", "A battery.")),
    ],
)
def test_a_word_inside_a_word_is_never_a_use(concept: str, named: str, unnamed: tuple[str, ...], tmp_path: Path) -> None:
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, text_rows(named, *unnamed)), concept)
    assert {pair.caption for pair in of_set(pairs, "forget")} == {named}
    assert {pair.caption for pair in of_set(pairs, "retain")} == set(unnamed)


def test_the_limits_hold_and_neighbours_and_spared_senses_have_their_places(tmp_path: Path) -> None:
    rows = text_rows(
        *(f"An apple number {number}." for number in range(60)),
        *(f"An apple laptop number {number}." for number in range(60)),
        *(f"A banana number {number}." for number in range(60)),
        *(f"A truck number {number}." for number in range(300)),
        *(f"A zebra number {number}." for number in range(6)),
    )
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "apple", max_forget=30, max_retain=50)
    retain = of_set(pairs, "retain")
    assert len(of_set(pairs, "forget")) == 30 and len(retain) == 50
    assert sum(pair.reason.startswith("spared") for pair in retain) == round(50 * module.SPARED_SHARE)
    assert sum(pair.reason.startswith("neighbour") for pair in retain) == round(50 * module.NEIGHBOUR_SHARE)
    assert sum("zebra" in pair.caption for pair in retain) == 6  # a rare object is not drowned by a common one


@pytest.mark.parametrize(("forget", "retain"), [(1, 1), (2, 2), (3, 1), (1, 4)])
@pytest.mark.parametrize("own_splits", [False, True])
def test_a_limit_of_one_or_two_is_no_limit_of_zero(own_splits: bool, forget: int, retain: int, tmp_path: Path) -> None:
    rows = text_rows(*(f"{text} {n}." for n in range(20) for text in ("An apple", "An apple laptop", "A banana", "A truck")))
    if own_splits:
        rows = [{**row, "split": "val" if number % 5 == 0 else "train"} for number, row in enumerate(rows)]
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "apple", max_forget=forget, max_retain=retain)
    assert (len(of_set(pairs, "forget")), len(of_set(pairs, "retain"))) == (forget, retain)


def test_a_limit_of_zero_keeps_all_and_repeated_captions_of_an_image_once(tmp_path: Path) -> None:
    rows = [
        *text_rows("A bicycle.", "A dog."),
        *text_rows("a Bicycle!", "A dog", "A bicycle."),
        {"key": "3.jpg", "caption": "A cat."},
    ]
    pairs, manifest, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle", max_forget=0, max_retain=0)
    assert sorted((pair.key.rpartition("#")[0], pair.caption) for pair in pairs) == [
        ("0.jpg", "A bicycle."), ("1.jpg", "A dog."), ("2.jpg", "A bicycle."), ("3.jpg", "A cat."),
    ]  # fmt: skip
    assert manifest["statistics"]["duplicates"] == 2


def test_captions_that_differ_go_before_repeated_ones(tmp_path: Path) -> None:
    rows = text_rows(*(30 * ["A bicycle."]), *(f"A bicycle number {number}." for number in range(9))) + [
        {"key": "d.jpg", "caption": "A dog."}
    ]
    pairs, _, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle", max_forget=10)
    assert len({pair.caption for pair in of_set(pairs, "forget")}) == 10


def test_several_concepts_each_have_their_pairs_and_a_shared_caption_is_one_pair(tmp_path: Path) -> None:
    rows = text_rows(
        *(f"A bicycle number {number}." for number in range(30)), "A bicycle next to a clock.", "A clock.", "A dog.", "A cat."
    )
    pairs, manifest, run = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle", "clock")
    shared = [pair for pair in pairs if pair.caption == "A bicycle next to a clock."]
    assert [(pair.concept, [pair.caption[start:end] for start, end in pair.spans]) for pair in shared] == [
        ("clock", ["bicycle", "clock"])  # the rarer concept needs it more
    ]
    assert manifest["captions_naming"] == {"bicycle": 31, "clock": 2}
    assert manifest["counts"]["by_concept"]["clock"] == {"train": 1, "validation": 1}
    assert [concept.name for concept in read_concepts(run)] == ["bicycle", "clock"]


def test_the_data_sets_own_splits_are_kept_and_its_test_split_is_neither_forgotten_nor_retained(tmp_path: Path) -> None:
    rows = [
        {"key": f"{split}{number}.jpg", "split": split, "caption": f"A {thing} number {number} {split}."}
        for split in ("train", "val", "test")
        for thing in ("bicycle", "dog")
        for number in range(thing == "dog", 40, 2)
    ]
    rows.append({"key": "test0.jpg", "split": "test", "caption": "A cat of the test split."})
    rows.append({"key": "odd.jpg", "split": "test", "caption": "A bicycle of the test split."})
    rows.append({"key": "odd.jpg", "split": "train", "caption": "The image of it."})
    pairs, manifest, _ = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle", max_forget=10, max_retain=10)
    assert manifest["splits"] == "the data set's own"
    assert all(pair.key.startswith({"train": "train", "validation": "val"}[pair.split]) for pair in pairs)
    assert manifest["counts"]["forget"] == {"train": 7, "validation": 3}
    assert manifest["statistics"]["held_out"] == 42
    assert "The image of it." not in {pair.caption for pair in pairs}  # a test caption says what the image shows


# --- images ----------------------------------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return path


def truncated(path: Path) -> None:
    path.write_bytes(picture(path, (64, 64)).read_bytes()[:-40])


def no_image(path: Path) -> None:
    path.write_text("not an image", encoding="utf-8")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def far_too_large(path: Path) -> None:
    """A PNG whose header says 40,000 by 40,000 pixels: to decode it would take gigabytes."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    end = b"IEND"
    chunks = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (header, end)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("make", "fault"),
    [(truncated, "corrupt"), (no_image, "corrupt"), (nothing, "corrupt"), (far_too_large, "too large"), (Path.mkdir, "missing")],
)
def test_images_that_cannot_be_used_are_told_apart(make: Callable[[Path], None], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "1.jpg"
    make(path)
    assert (image_fault(str(path)) or "").startswith(fault)
    assert image_fault(str(tmp_path / "none.jpg")) == "missing"
    assert image_fault(str(picture(tmp_path / "good.jpg"))) is None
    assert image_fault(str(tmp_path / (300 * "x"))) == "missing"


def with_images(folder: Path, broken: dict[int, Callable[[Path], object]], count: int = 60) -> str:
    """A data set of `count` images, a bicycle on every third; those of `broken` are made by its functions."""
    rows = []
    for number in range(count):
        rows.append({"image": f"i/{number:02d}.jpg", "caption": f"A {'bike' if number % 3 == 0 else 'dog'} number {number}."})
        (broken.get(number) or picture)(folder / "i" / f"{number:02d}.jpg")
    return jsonl(folder, rows)


def absent(path: Path) -> None:
    """An image that was never downloaded."""


def test_missing_and_corrupt_images_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    dataset = with_images(tmp_path, {3: absent, 10: truncated})
    pairs, manifest, run = harvested(tmp_path / "run", dataset, "bicycle", max_forget=0, max_retain=0)
    assert manifest["missing"] == {"checked": 60, "missing": 1, "corrupt": 1, "file": "missing.jsonl"}
    rows = list(read_jsonl(run.path / "missing.jsonl"))
    assert [(Path(row["image"]).name, row["fault"].split(":")[0]) for row in rows] == [
        ("03.jpg", "missing"),
        ("10.jpg", "corrupt"),
    ]
    assert rows[0]["key"] == "i/03.jpg#4"
    assert len(pairs) == 58 and all(Path(pair.image or "").is_file() for pair in pairs)


def test_missing_images_are_replaced_as_far_as_there_are_others(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    dataset = with_images(tmp_path, {number: absent for number in (0, 9, 20, 31)})
    pairs, _, _ = harvested(tmp_path / "run", dataset, "bicycle", max_forget=15, max_retain=30, max_missing_share=0.5)
    assert (len(of_set(pairs, "forget")), len(of_set(pairs, "retain"))) == (15, 30)


def test_too_many_missing_images_are_an_error_that_names_the_list(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    dataset = with_images(tmp_path, {number: absent for number in range(0, 60, 10)})
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"6 of 60 images .* more than harvest.max_missing_share 5%.*missing\.jsonl"):
        harvest(settings(dataset, "bicycle", max_forget=0, max_retain=0), run)
    assert len(list(read_jsonl(run.path / "missing.jsonl"))) == 6
    assert run.read_manifest("harvest") is None  # the stage is not done
    with_images(tmp_path, {})
    assert harvest(settings(dataset, "bicycle"), run)["missing"]["file"] is None
    assert not (run.path / "missing.jsonl").exists()


def test_images_inside_an_archive_are_taken_out_only_for_the_pairs(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    content = picture(tmp_path / "one.jpg").read_bytes()
    rows = [
        {
            "image": {"bytes": content},
            "filename": f"{number}.jpg",
            "caption": [f"A {'bike' if number % 4 == 0 else 'dog'} {number}."],
        }
        for number in range(200)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    pairs, manifest, run = harvested(
        tmp_path / "run", f"flickr30k:{tmp_path / 'train-0.parquet'}", "bicycle", max_forget=5, max_retain=10
    )
    assert len(pairs) == 15 and manifest["missing"]["missing"] == 0
    assert all(Path(pair.image or "").read_bytes() == content for pair in pairs)
    assert len(list(run.data.rglob("*.jpg"))) < 100


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_captions_that_no_pair_contains(tmp_path: Path) -> None:
    rows = [*world(), {"key": "x.jpg", "caption": "#1 bicycle", "split": None}]  # would be a comment in a file of prompts
    pairs, _, run = harvested(tmp_path / "run", jsonl(tmp_path, rows), "bicycle", max_forget=20, max_retain=20)
    config = settings(jsonl(tmp_path, rows), "bicycle")
    result = module.write_prompts(config, run, tmp_path / "prompts" / "bicycle.txt", 15)
    assert result == {"prompts": 15, "made": 0, "prompts_file": str(tmp_path / "prompts" / "bicycle.txt"), "warnings": []}
    first, *lines = (tmp_path / "prompts" / "bicycle.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# bicycle: 15 held-out captions of jsonl:") and len(set(lines)) == 15
    image_of = {row["caption"]: row["key"] for row in rows}
    assert {image_of[line] for line in lines}.isdisjoint(images(pairs))
    assert all("bicycle" in line or "bike" in line for line in lines) and not any(line.startswith("#") for line in lines)
    again = module.write_prompts(config, run, tmp_path / "again.txt", 15)
    assert (tmp_path / "again.txt").read_text(encoding="utf-8").splitlines()[1:] == lines and again["prompts"] == 15
    many = module.write_prompts(config, run, tmp_path / "many.txt", 500)
    assert many["prompts"] == 500 and many["warnings"][0].startswith(f"{many['made']} of the 500 prompts were made")


def test_prompts_come_from_the_test_split_first_and_from_each_concept(tmp_path: Path) -> None:
    rows = [
        {"key": f"{number}.jpg", "caption": f"A {thing} number {number}.", "split": split}
        for number, (thing, split) in enumerate(
            (thing, split)
            for thing in ("bike", "dog", "cup")
            for split in ("train", "val", "test")
            for _ in range(12 if split != "test" else 3)
        )
    ]
    dataset = jsonl(tmp_path, rows)
    _, _, run = harvested(tmp_path / "run", dataset, "bicycle", "dog", max_forget=10, max_retain=10)
    module.write_prompts(settings(dataset, "bicycle", "dog"), run, tmp_path / "p.txt", 6)
    lines = (tmp_path / "p.txt").read_text(encoding="utf-8").splitlines()[1:]
    split_of = {row["caption"]: row["split"] for row in rows}
    assert [split_of[line] for line in lines] == ["test"] * 6 and sum("bike" in line for line in lines) == 3


def test_where_no_caption_is_left_for_prompts_they_are_made(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, [*text_rows("A bike.", "Two bikes."), *({"key": f"f{n}", **row} for n, row in enumerate(FILLER))])
    pairs, _, run = harvested(tmp_path / "run", dataset, "bicycle")
    result = module.write_prompts(settings(dataset, "bicycle"), run, tmp_path / "p.txt", 5)
    assert (result["prompts"], result["made"]) == (5, 5) and "a lower --max-forget leaves more" in result["warnings"][0]
    first, *lines = (tmp_path / "p.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# bicycle: 0 held-out captions of jsonl:") and "5 made from the card's words" in first
    assert len(set(lines)) == 5 and not set(lines) & {pair.caption for pair in pairs}
    (concept,) = read_concepts(run)
    assert all(concept.find(line) for line in lines)


# --- what is refused, and what is not done twice ---------------------------------------------------------------------


def test_an_unknown_concept_lists_the_nearest_words_of_the_data_set(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, text_rows("A bicycle by a wall.", "Two bicycles.", "A dog."))
    with pytest.raises(UserError, match="'bycicle' is named by no caption .* nearest words it has are bicycle, bicycles"):
        harvest(dataclasses.replace(settings(dataset, "bycicle"), exact=True), RunDir(tmp_path / "run"))
    with pytest.raises(UserError, match="it has no word like it"):
        harvest(settings(dataset, "xylophone"), RunDir(tmp_path / "run"))


def test_a_concept_named_only_in_spared_senses_is_told_so(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path, text_rows("An apple laptop.", "A dog."))
    with pytest.raises(UserError, match="apart from senses that its card spares"):
        harvest(settings(dataset, "apple"), RunDir(tmp_path / "run"))


def test_a_concept_named_only_in_the_test_split_is_not_offered_from_there(tmp_path: Path) -> None:
    rows = [{"key": "1.jpg", "caption": "A widget.", "split": "test"}, {"key": "2.jpg", "caption": "A dog.", "split": "train"}]
    with pytest.raises(UserError, match="it has no word like it") as error:
        harvest(settings(jsonl(tmp_path, rows), "widget"), RunDir(tmp_path / "run"))
    assert "spares" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (text_rows("A bicycle.", "A bike."), "nothing is left to retain"),
        ([{"image": "none.jpg", "caption": "A bike."}, *FILLER], "1 of 1 images"),
    ],
)
def test_a_data_set_that_lacks_one_side_is_refused(rows: Rows, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        harvest(settings(jsonl(tmp_path, rows), "bicycle"), RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"max_forget": -1}, "max_forget"),
        ({"max_retain": -1}, "max_retain"),
        ({"train_share": 0.0}, "train_share"),
        ({"train_share": 1.0}, "train_share"),
        ({"train_share": float("nan")}, "train_share"),
        ({"max_missing_share": 1.5}, "max_missing_share"),
    ],
)
def test_limits_out_of_range_are_refused_by_name(values: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        harvest(settings(jsonl(tmp_path, FILLER), "dog", **values), RunDir(tmp_path / "run"))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows whenever the data set is opened."""
    opened: list[str] = []
    original = module.open_dataset

    def open_dataset(spec: str, *arguments: Any, **options: Any) -> Any:
        opened.append(spec)
        return original(spec, *arguments, **options)

    monkeypatch.setattr(module, "open_dataset", open_dataset)
    return opened


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_finished_harvest_is_repeated_only_when_its_inputs_change(
    whole_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = counted(monkeypatch)
    dataset = jsonl(tmp_path / "data", world(40))
    config = settings(f"jsonl:{tmp_path / 'data'}" if whole_folder else dataset, "bicycle")
    run = RunDir(tmp_path / "run")
    first = harvest(config, run)
    count = len(opened)
    assert harvest(config, run) == first and len(opened) == count
    harvest(dataclasses.replace(config, seed=1), run)
    assert len(opened) > count
    count = len(opened)
    jsonl(tmp_path / "data", world(45))  # the folder itself keeps its time when a file in it is rewritten
    assert harvest(dataclasses.replace(config, seed=1), run)["statistics"]["captions"] == 225
    assert len(opened) > count
    run.pairs.unlink()
    harvest(dataclasses.replace(config, seed=1), run)
    assert run.pairs.is_file()


def test_an_edited_caption_in_a_folder_below_is_harvested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = counted(monkeypatch)
    for number in range(8):
        picture(tmp_path / "data" / "below" / f"{number}.png")
        text = tmp_path / "data" / "below" / f"{number}.caption"
        text.write_text(f"a {'bicycle' if number < 4 else 'dog'} {number}", encoding="utf-8")
    config, run = settings(f"folder:{tmp_path / 'data'}", "bicycle"), RunDir(tmp_path / "run")
    assert harvest(config, run)["captions_naming"] == {"bicycle": 4}
    count, stamp = len(opened), text.stat()
    text.write_text("a bike 7", encoding="utf-8")
    harvest(config, run)
    assert len(opened) > count
    text.write_text("a cow 71", encoding="utf-8")
    os.utime(text, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert harvest(config, run)["captions_naming"] == {"bicycle": 4}


def test_what_is_skipped_is_counted_in_the_manifest_and_said(tmp_path: Path) -> None:
    rows = world(40)
    rows[7]["caption"] = None
    dataset = jsonl(tmp_path, rows)
    _, manifest, _ = harvested(tmp_path / "run", dataset, "bicycle")
    assert manifest["skipped"] == {"null captions": 1} and manifest["statistics"]["captions"] == 199
    assert manifest["warnings"] == [f"Of {dataset} were skipped: null captions (1, at line 8)."]


def test_pairs_are_read_back_as_they_were_and_damage_is_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="run `sd-erase harvest --run .* first"):
        read_pairs(run)
    pairs, _, _ = harvested(run.path, jsonl(tmp_path, world(40)), "bicycle")
    assert [json.loads(line)["key"] for line in run.pairs.read_text(encoding="utf-8").splitlines()] == [
        pair.key for pair in pairs
    ]
    good = run.pairs.read_text(encoding="utf-8")
    for damage in (good[:-20], "3\n", "[1]\n", '{"key": "x"}\n', good.replace('"spans": [', '"spans": [[1], ', 1)):
        run.pairs.write_text(damage, encoding="utf-8")
        with pytest.raises(UserError, match="is damaged"):
            read_pairs(run)


def test_the_manifest_shows_a_sample_of_both_sides_with_reasons(tmp_path: Path) -> None:
    _, manifest, run = harvested(tmp_path / "run", jsonl(tmp_path, world()), "bicycle")
    assert set(manifest["sample"]) == {"forget", "retain"}
    for name, rows in manifest["sample"].items():
        assert len(rows) == module.SAMPLE_SIZE
        assert all(row["reason"] and bool(row["concept"]) == (name == "forget") for row in rows)
    assert run.read_manifest("harvest") == manifest
    assert manifest["statistics"]["captions"] == 1000


@pytest.mark.realdata
def test_flickr30k_is_harvested_within_twenty_seconds(tmp_path: Path) -> None:
    path = REAL / "flickr30k" / "results_20130124_train_val.token.gz"
    if not path.is_file():
        pytest.skip(f"no real data at {path}")
    started = time.monotonic()
    pairs, manifest, _ = harvested(tmp_path / "run", f"flickr30k:{path}", "bicycle")
    seconds = time.monotonic() - started
    assert manifest["statistics"]["captions"] == 150_260
    assert manifest["captions_naming"]["bicycle"] > 2000
    assert (len(of_set(pairs, "forget")), len(of_set(pairs, "retain"))) == (300, 900)
    assert 200 <= manifest["counts"]["forget"]["train"] <= 220  # 70 % of the images, of which few have two of the captions
    word = re.compile(r"(?i)\b(?:bi)?cycles?\b|\bbikes?\b|\bpush ?bikes?\b|\bbmxs?\b|\btandems?\b|\bten speeds?\b")
    assert all(word.search(pair.caption) for pair in of_set(pairs, "forget"))
    assert all(not re.search(r"(?i)\bbicycles?\b", pair.caption) or "spared" in pair.reason for pair in of_set(pairs, "retain"))
    assert seconds < 20


class _Memory:
    """A progress that notes the process's resident memory, in MB, every `every` captions."""

    def __init__(self, every: int):
        self.every, self.seen, self.notes = every, 0, [0.0]

    @contextlib.contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[_Memory]:
        yield self

    def advance(self, steps: int = 1) -> None:
        import psutil

        self.seen += steps
        if self.seen >= len(self.notes) * self.every:
            self.notes.append(psutil.Process().memory_info().rss / 2**20)


def _conceptual_captions(rows: int) -> Iterator[tuple[str, str]]:
    """Addresses and captions in the manner of CC12M, no two alike; one in 160 names a bicycle."""
    rng = random.Random(5)
    things = [*concepts_module.all_cards(), "landscape", "sunset", "house", "portrait", "illustration"]
    places = ("on a white background", "at the market", "in the old town", "during the festival", "by the river", "at night")
    for number in range(rows):
        first, second = rng.choice(things), rng.choice(things)
        yield f"https://example.org/{number:08d}.jpg", f"{first} and {second} {rng.choice(places)} , photo {number}"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rows"), [("tsv", 1_000_000), ("shards", 100_000)])
def test_a_long_stream_is_harvested_in_flat_memory(
    shape: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A generated sample in CC12M's two shapes; each harvest reads it twice. Prints rows a second and the memory at ten points."""
    if shape == "tsv":
        with (tmp_path / "cc12m.tsv").open("w", encoding="utf-8") as stream:
            stream.writelines(f"{url}\t{caption}\n" for url, caption in _conceptual_captions(rows))
    else:
        pytest.importorskip("webdataset")
        for shard, samples in itertools.groupby(enumerate(_conceptual_captions(rows)), lambda item: item[0] // 10_000):
            with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as archive:
                for number, (_, caption) in samples:
                    for suffix, content in (("jpg", b"\xff\xd8" + bytes(2000)), ("txt", caption.encode())):
                        member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    memory = _Memory(rows // 5)
    dataset = f"cc12m:{tmp_path}"
    started = time.monotonic()
    if shape == "tsv":
        manifest = harvest(settings(dataset, "bicycle"), RunDir(tmp_path / "run"), memory)
        assert manifest["statistics"]["captions"] == rows
    else:  # what stands in for photos here does not open: the two passes over the text are what is measured
        with pytest.raises(UserError, match="missing or corrupt"):
            harvest(settings(dataset, "bicycle"), RunDir(tmp_path / "run"), memory)
    seconds = time.monotonic() - started
    notes = memory.notes[1:11]
    with capsys.disabled():
        print(
            f"\n{shape}: {rows:,} rows twice in {seconds:.1f} s, {2 * rows / seconds:,.0f} rows a second; MB", *map(round, notes)
        )
    assert notes[4] - notes[0] < 15  # the first pass holds the captions to forget and 8 bytes an image
    assert notes[9] - notes[5] < 120  # the second fills its samples, at most some 1,100 captions of each stratum
    if shape == "tsv":
        assert notes[9] - notes[7] < 15  # and then stays
