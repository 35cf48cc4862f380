"""The paper's experiments on a bench small enough for a test: real trainings of two steps."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from sd_erase import catalog, resources, yamlfile
from sd_erase.cli import main
from sd_erase.errors import UserError
from sd_erase.pairs import read_pairs
from sd_erase.reproduce import Experiment, Recipe, names, pictures, read_recipe, render, reproduce, tables
from sd_erase.reproduce import bench as benches
from sd_erase.reproduce import sweep as sweeps
from sd_erase.reproduce.bench import Bench
from sd_erase.reproduce.differences import differences
from sd_erase.reproduce.sweep import Axis, pareto, points, read_axis, sweep

TINY = {"train.steps": 2, "train.batch_size": 4, "train.validate_every": 2}
FAST = [item for name, value in TINY.items() for item in ("--set", f"{name}={value}")]

OWN_METHOD = '''
from sd_erase.erasure.pairwise import Pairwise


class Hinge(Pairwise):
    """A forget pair may be no more similar than 0.1; the retain pairs stay as similar as they were."""

    default_weights = {"hinge": 1.0, "stay": 1.0}

    def losses(self, towers, batch):
        found = self.embed(towers, batch)
        similarity = (found.forget_images * found.forget_texts).sum(-1)
        return {
            "hinge": (similarity - 0.1).clamp(min=0).mean(),
            "stay": 1 - (found.retain_images * found.retain_texts).sum(-1).mean(),
        }
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture
def bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One folder for all tests: what one has trained the next one finds."""
    monkeypatch.setattr(benches, "CLASS_SCENES", {"train": 4, "validation": 2, "test": 3})
    monkeypatch.setattr(benches, "CAPTION_SCENES", {"train": 60, "validation": 40, "test": 60})
    return Bench(folder, device="cpu")


@pytest.mark.parametrize("name", catalog.EXPERIMENTS)
def test_every_recipe_reads_and_shows_the_papers_rows_under_our_columns(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.title and (recipe.methods or recipe.sizes)
    text = render(
        {
            "id": name, "title": recipe.title, "base": "pocket", "rows": [], "columns": list({key: 0 for row in recipe.paper for key in row}),
            "paper": list(recipe.paper), "figures": [], "notes": [], "differs": [],
        }
    )  # fmt: skip
    assert not recipe.paper or "As the paper prints it" in text


def test_all_stands_for_every_experiment() -> None:
    assert names(["all"]) == list(catalog.EXPERIMENTS)
    assert names(["table3", "table2", "table3"]) == ["table3", "table2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: {}", "title"), ("title: x\ncolour: red", "at most"), ("title: x\nseeds: 3", "seeds must be a list"),
        ("title: x\nmethods: {a: {train.stepps: 3}}", "stepps"), ("title: [", "no YAML|not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_recipe(str(tmp_path / "own.yaml"))


def test_changes_go_before_a_methods_own_settings() -> None:
    recipe = read_recipe("table2", {"train.learning_rate": 1e-5, "sizes.test": 7}, ["sd_erase.erasure.sd:StableDiffusionErasure"])
    assert recipe.settings["train.learning_rate"] == 1e-5 and recipe.sizes["test"] == 7
    assert all("train.learning_rate" not in settings for settings in recipe.methods.values())
    assert recipe.methods["sd_erase.erasure.sd:StableDiffusionErasure"] == {
        "train.objective": "sd_erase.erasure.sd:StableDiffusionErasure"
    }
    assert read_recipe("table2", concepts=["dog"]).concepts == {"classes": ["dog"], "captions": ["dog"]}


def test_where_it_differs_is_computed_from_what_was_measured() -> None:
    paper = (
        {"data": "CIFAR-100", "method": "GA", "forget %": 4.0, "retain %": 90.0},
        {"data": "Flickr30K", "method": "GA", "forget %": 50.0},
    )
    rows = [
        {"data": "classes", "method": "GA", "forget %": 30.0, "retain %": 91.0},
        {"data": "classes", "method": "mine", "forget %": 0.0},
    ]
    count, only = differences(rows, paper)
    assert count.startswith("1 of 2 figures") and only == "classes, GA, forget %: 30.0 here, 4.0 in the paper."
    assert differences(rows[1:], paper) == []
    assert all(
        "differs" not in yamlfile.read(path, "Recipe") for path in resources.packaged_folder("recipes").glob("reproduce/*.yaml")
    )


@pytest.mark.parametrize(
    ("dotted", "said"),
    [("generate.steps", "has no effect"), ("base", "pass --base"), ("sizes.tset", "did you mean 'test'"), ("train.objective", "--method"),
     ("harvest.dataset", "--dataset"), ("train.stepz", "did you mean")],
)  # fmt: skip
def test_a_setting_is_applied_or_refused_by_name(dotted: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_recipe("table2", {dotted: 3})


def test_the_splits_share_no_image_and_forget_and_retain_are_apart(bench: Bench) -> None:
    for side, concept in (("classes", "apple"), ("captions", "woman")):
        found = bench.pairs(bench.harvested(concept, side), concept, side)
        images = {split: {pair.image for name in ("forget", "retain") for pair in found[name, split]} for split in
                  ("train", "validation", "test")}  # fmt: skip
        assert all(images.values())
        assert not images["train"] & images["test"] and not images["validation"] & images["test"]
        assert not images["train"] & images["validation"]
        forget, retain = ({pair.image for pair in found[name, "test"]} for name in ("forget", "retain"))
        assert forget and retain and not forget & retain
    assert len(bench.classes()) == 20
    assert len(found["forget", "test"]) == 5 * len(forget)  # every caption of a forgotten image


def test_what_a_run_saw_is_never_in_its_test_set(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On data without a test split, whatever the run's seed and harvest settings; and on data whose test split repeats other images."""
    rows = benches.render_scenes("classes", tmp_path, bench.progress)
    listing = tmp_path / "metadata.jsonl"
    measured: set[str] = set()

    def hits(_: Any, pairs: Any, *__: Any) -> Any:
        measured.update(pair.image for pair in pairs)
        return np.ones(len(pairs)), np.ones(len(pairs))

    monkeypatch.setattr(tables, "_class_hits", hits)

    def seen_and_tested(rows: list[dict[str, Any]], seed: int, settings: dict[str, Any]) -> tuple[set[str], set[str]]:
        listing.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        mine = Bench(tmp_path / "bench", device="cpu")
        mine.specs["classes"] = f"jsonl:{listing}"
        run = mine.harvested("apple", "classes", seed, settings)
        monkeypatch.setattr(mine, "run", lambda *_: run)  # nothing is trained: the pairs are what counts
        monkeypatch.setattr(mine, "measured", lambda run, name, inputs, measure: measure(None))
        measured.clear()
        tables.zero_shot_of(mine, settings, "apple", seed, "classes", Recipe("x", settings=settings))
        return {str(pair.image) for pair in read_pairs(run)}, set(measured)

    unsplit = [{key: value for key, value in row.items() if key != "split"} for row in rows]
    for seed in (0, 3):
        seen, tested = seen_and_tested(unsplit, seed, {"harvest.max_forget": 5, "harvest.max_retain": 60 + seed})
        assert seen and tested and not seen & tested, seed
    split = [row | {"split": "test" if number % 3 == 0 else "train"} for number, row in enumerate(rows)]
    seen, tested = seen_and_tested([*split, *(row | {"split": "train"} for row in split[::6])], 0, {})
    assert seen and tested and not seen & tested
    with pytest.raises(UserError, match="leaves no test image of the forget set of 'apple'"):
        seen_and_tested(unsplit, 0, {})


def test_zero_shot_is_measured_once_and_the_pocket_model_knows_its_classes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("x", {"classes": ["apple"]}, {"GA": {"train.objective": "ga"}}, settings={"train.towers": "both", **TINY})
    found = tables.zero_shot(recipe, bench)
    original, erased = found.rows
    assert original["prediction, retain %"] > 90 and set(tables.ZERO_SHOT) <= set(erased)
    trained = sorted((bench.folder / "bench" / "runs").glob("*"))
    assert len(trained) == 1 and not (trained[0] / "checkpoints").exists()
    shutil.copytree(
        trained[0] / "encoder", trained[0] / "checkpoints"
    )  # as a process leaves them that is killed behind the training

    def fail(*_: Any) -> None:
        raise AssertionError("trained or measured again")

    with monkeypatch.context() as patched:
        patched.setattr(benches, "run_stage", fail)
        patched.setattr(bench, "towers", fail)
        assert tables.zero_shot(recipe, bench).rows == found.rows
    assert not (trained[0] / "checkpoints").exists()
    (kept,) = (trained[0] / "measures").glob("*.json")
    kept.write_text(re.sub(r'(retain %": )[\d.]+', r"\g<1>99.9", kept.read_text()))  # somebody edited the figures
    assert tables.zero_shot(recipe, bench).rows == found.rows
    with (trained[0] / "encoder" / "text_encoder" / "model.safetensors").open("r+b") as file:  # or the encoder
        file.seek(-3, 2)
        file.write(b"\x40")
    monkeypatch.setattr(benches, "run_stage", fail)
    with pytest.raises(AssertionError, match="trained or measured again"):
        tables.zero_shot(recipe, bench)


def test_a_training_for_its_cost_alone_runs_where_there_is_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(benches.subprocess, "run", run)
    bench.run_alone({"train.objective": "ga", **TINY}, "apple")
    assert [command[3] for command in started] == ["train"]


def test_retrieval_searches_all_test_images(bench: Bench) -> None:
    recipe = Recipe("x", {"captions": ["apple"]}, {})
    rows = {row["task"]: row for row in tables.retrieval(recipe, bench).rows}
    assert rows.keys() == {"image retrieval", "text retrieval"}
    for row in rows.values():
        assert row["R@1, retain %"] <= row["R@5, retain %"] <= row["R@10, retain %"]
        assert row["R@10, retain %"] > 50


def test_variance_is_over_the_classes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"apple": 10.0, "dog": 20.0}
    monkeypatch.setattr(
        tables,
        "zero_shot_of",
        lambda bench, settings, concepts, seed, *_: dict.fromkeys(tables.ZERO_SHOT, values[concepts] + seed),
    )
    recipe = Recipe("x", {"classes": ["apple", "dog"]}, {"m": {}}, seeds=(0, 2))
    rows = {row["class"]: row for row in tables.variance(recipe, bench).rows}
    assert rows["apple"]["prediction, forget %"] == 11 and rows["apple"]["prediction, forget %"[:-2] + ", seeds"] == "10.0–12.0"
    assert rows["mean"]["prediction, forget %"] == 16 and rows["variance"]["prediction, forget %"] == 50


def test_the_proportion_plot_starts_at_the_original(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(bench: Bench, settings: Any, concepts: str, *_: Any) -> dict[str, float]:
        seen.append((settings is None, concepts))
        return dict.fromkeys(tables.ZERO_SHOT, 50.0)

    monkeypatch.setattr(tables, "zero_shot_of", measured)
    bench.experiment_folder = bench.folder / "figure3"
    found = tables.proportion(Recipe("x", {"classes": ["apple", "apple + dog"]}, {"GA": {}}), bench)
    assert [row["share %"] for row in found.rows if row["method"] == "GA"] == [0, 5, 10]
    assert (True, "apple + dog") in seen
    assert found.figures[0].read_text(encoding="utf-8").count("forgotten classes") == 2
    assert found.figures[0].with_suffix(".png").is_file()


def test_cells_and_missing_columns() -> None:
    found = Experiment(["a", "b", "c"], [{"a": "x", "b": 1.234}, {"a": "y"}])
    text = render({**vars(found), "id": "x", "title": "T", "base": "pocket", "paper": [], "differs": []})
    assert "| a | b |\n" in text and "| x | 1.23 |" in text and "| y | – |" in text


def test_a_sweep_reads_lists_and_ranges() -> None:
    assert read_axis("train.learning_rate=1e-4,3e-4") == Axis("train.learning_rate", (1e-4, 3e-4))
    assert read_axis("train.steps=20,40") == Axis("train.steps", (20, 40))
    assert read_axis("train.objective=ga,kl").values == ("ga", "kl")
    axis = read_axis("train.learning_rate=1e-5..1e-3")
    assert all(1e-5 <= point["train.learning_rate"] <= 1e-3 for point in points([axis], 5))
    with pytest.raises(UserError, match="--random"):
        points([axis], 0)
    drawn = {point["train.steps"] for point in points([read_axis("train.steps=10..12")], 40)}
    assert drawn == {10, 11, 12} and all(isinstance(steps, int) for steps in drawn)
    with pytest.raises(UserError, match=r"train.steps=0.2..0.8 holds no whole number"):
        points([read_axis("train.steps=0.2..0.8")], 1)
    for wrong in ("train.steps", "=1", "a=3..1", "a=x..y", "a="):
        with pytest.raises(UserError, match="--over"):
            read_axis(wrong)


def test_a_sweep_takes_the_grid_or_some_of_it() -> None:
    axes = [Axis("a", (1, 2)), Axis("b", (3, 4))]
    assert points(axes, 0) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert len(points(axes, 3)) == 3 and points(axes, 3) == points(axes, 3)


def test_the_front_is_what_nothing_beats() -> None:
    rows = [{"forgetting": f, "retention": r} for f, r in ((100, 50), (90, 90), (90, 80), (0, 100), (100, 40))]
    assert pareto(rows) == [True, True, False, True, False]


def test_a_sweep_runs_and_refuses_an_unknown_setting_before_training(bench: Bench) -> None:
    with pytest.raises(UserError, match="stepps"):
        sweep(bench, "apple", "classes", {}, [Axis("train.stepps", (1,))])
    found = sweep(bench, "apple", "classes", {"train.objective": "ga", **TINY}, [Axis("train.learning_rate", (1e-4, 3e-3))])
    assert len(found["rows"]) == 2 and any(row["pareto"] for row in found["rows"])
    assert not found["notes"] and "validation set" not in found["rows"][0]  # all on the same pairs
    assert "original" in (bench.folder / "sweep.md").read_text(encoding="utf-8") and (bench.folder / "sweep.svg").is_file()


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("trained or measured again")


def test_a_sweep_given_again_does_nothing_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["sweep", "--concept", "apple", "--set", "train.objective=ga", *FAST, "--over", "train.learning_rate=1e-4,3e-3", "--output",
             str(bench.folder), "--device", "cpu"]  # fmt: skip
    first = CliRunner().invoke(main, asked)
    assert first.exit_code == 0, first.output
    with monkeypatch.context() as patched:
        patched.setattr(benches, "run_stage", fail)
        patched.setattr(sweeps, "zero_shot_of", fail)
        again = CliRunner().invoke(main, asked)
        assert again.exit_code == 0 and "nothing was done again" in again.stderr and again.stdout == first.stdout
        for changed in (("--random", "1"), ("--exact",)):
            other = CliRunner().invoke(main, [*asked, *changed])
            assert isinstance(other.exception, AssertionError)
    page = bench.folder / "sweep.md"
    kept = page.read_text(encoding="utf-8")
    page.write_text(kept.replace("apple", "pear"), encoding="utf-8")  # somebody edited the table
    mended = CliRunner().invoke(main, asked)
    assert mended.exit_code == 0 and "nothing was done" not in mended.stderr and page.read_text(encoding="utf-8") == kept


def test_points_that_are_judged_on_other_images_are_said_to_be(bench: Bench) -> None:
    found = sweep(bench, "apple", "classes", {"train.objective": "ga", **TINY}, [Axis("harvest.max_retain", (20, 40))])
    (note,) = found["notes"]
    assert "because harvest.max_retain decides which there are" in note and note in (bench.folder / "sweep.md").read_text("utf-8")
    assert (
        len({row["validation set"] for row in (*found["rows"], found["original"])}) == 3
    )  # the original has the default's number
    assert all(row["pareto"] for row in found["rows"])  # each is alone on its set
    assert "| validation set |" in (bench.folder / "sweep.md").read_text(encoding="utf-8")


def test_a_figure_given_again_is_not_drawn_again_and_its_text_follows_what_is_set(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figure 6 and its notes; figure 5's come from the same function."""
    asked = ["reproduce", "figure6", "--output", str(bench.folder), "--device", "cpu", *FAST]
    page = bench.folder / "figure6" / "figure6.md"
    first = CliRunner().invoke(main, asked)
    assert first.exit_code == 0 and "nothing was done" not in first.stderr, first.output
    text = page.read_text(encoding="utf-8")
    assert "Method CLIPErase, both towers, apple;" in text and "towers both" in text
    with monkeypatch.context() as patched:
        patched.setattr(benches, "run_stage", fail)
        patched.setattr(pictures, "project", fail)
        again = CliRunner().invoke(main, asked)
        assert again.exit_code == 0 and "nothing was done again" in again.stderr and again.stdout == first.stdout
    result = CliRunner().invoke(main, [*asked, "--set", "train.towers=text", "--set", "sizes.images=2"])
    assert result.exit_code == 0 and "nothing was done" not in result.stderr, result.output
    text = page.read_text(encoding="utf-8")
    assert "Method CLIPErase, text tower, apple; 20 test images" in text and "both towers" not in text
    (run,) = (run for run in (bench.folder / "bench" / "runs").glob("*apple-paper*") if (run / "manifests" / "train.json").is_file()
              and "towers: text" in (run / "config.yaml").read_text())  # fmt: skip
    with (run / "encoder" / "text_encoder" / "model.safetensors").open(
        "r+b"
    ) as file:  # an encoder that changed is no finished one
        file.seek(-3, 2)
        file.write(b"\x40")
    mended = CliRunner().invoke(main, [*asked, "--set", "train.towers=text", "--set", "sizes.images=2"])
    assert mended.exit_code == 0 and "nothing was done" not in mended.stderr
    text = page.read_text(encoding="utf-8")
    assert "Method CLIPErase, text tower" in text


def test_what_was_chosen_on_the_pocket_is_not_said_of_other_data(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.EXPERIMENTS, "table2", f"{__name__}:nothing")
    assert any("Each learning rate is the better of two" in note for note in reproduce("table2", bench)["notes"])
    bench.specs["captions"] = f"jsonl:{bench.folder / 'bench' / 'data' / 'captions' / 'metadata.jsonl'}"
    assert not any("Each learning rate" in note for note in reproduce("table2", bench)["notes"])


def nothing(recipe: Recipe, bench: Bench) -> Experiment:
    for side in recipe.concepts:
        bench.dataset(side)
    return Experiment(["data"], [{"data": "classes"}])


def test_a_method_in_one_file_trains_and_stands_in_the_table(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guide docs/add-a-method.md, step by step."""
    guide = Path(__file__).parent.parent / "docs" / "add-a-method.md"
    assert OWN_METHOD.strip() in guide.read_text(encoding="utf-8")
    (tmp_path / "my_method.py").write_text(OWN_METHOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--concept", "apple", "--objective", "my_method:Hinge", "--dataset", bench.dataset("classes"), "--device", "cpu"]
    result = CliRunner().invoke(main, ["train", *arguments, "--steps", "2", "--batch-size", "4", "--towers", "both"])
    assert result.exit_code == 0, result.output
    assert "my_method:Hinge" in result.output

    asked = [
        "reproduce",
        "table4",
        "--output",
        str(bench.folder),
        "--method",
        "my_method:Hinge",
        "--device",
        "cpu",
        *FAST,
        "--json",
    ]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    (experiment,) = json.loads(result.stdout.splitlines()[-1])["experiments"]
    assert [row["method"] for row in experiment["rows"]][-1] == "my_method:Hinge"
    assert "my_method:Hinge" in (bench.folder / "table4" / "table4.md").read_text(encoding="utf-8")


def test_an_unknown_experiment_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["reproduce", "table99", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "table9" in result.output


def test_cost_is_that_of_a_process_of_its_own(bench: Bench) -> None:
    recipe = Recipe("x", {"classes": ["apple"]}, {"GA": {"train.objective": "ga"}}, settings=TINY, sizes={"steps": 2})
    found = tables.cost(recipe, bench)
    (row,) = found.rows
    assert "that of 2 steps with 2 validations;" in found.notes[0]
    assert row["pairs an epoch"] > 10 and row["s an epoch"] == pytest.approx(row["pairs an epoch"] / row["pairs a s"])
    assert row["peak memory, MB"] > 100 and row["device"] == "cpu"
    # what is set for the whole table stands in its text
    short = tables.cost(dataclasses.replace(recipe, sizes={}, settings={**TINY, "train.steps": 1}), bench)
    assert "that of 1 steps with 2 validations;" in short.notes[0]
    with pytest.raises(UserError, match="nosuchbase"):
        Bench(bench.folder, base="nosuchbase")
