"""The benchmarks: what is compared, and with which bar."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.measured import Benchmark, Program, Result
from benchmarks.trees import COMMIT, ROOT, Place, timed


def _both(arguments: Callable[[Place], list[str]]) -> Callable[[Place], tuple[Program, Program]]:
    """A training of ours and the same one of the other commit."""

    def prepare(place: Place) -> tuple[Program, Program]:
        given, other = arguments(place), place.other()
        return (
            Program("ours", lambda: place.trained(ROOT, *given)),
            Program(COMMIT, lambda: place.trained(other, *given)),
        )

    return prepare


def _steps(place: Place) -> list[str]:
    return ["--steps", str(place.steps)] if place.steps else []


def _pairs_a_second(arguments: Callable[[Place], list[str]]) -> Callable[[Place], tuple[Program, Program]]:
    """The same, judged by the training alone: seconds for the pairs that its manifest counts."""

    def prepare(place: Place) -> tuple[Program, Program]:
        given, other = arguments(place), place.other()

        def run(tree: Path) -> Result:
            whole = place.trained(tree, *given)
            rate = json.loads((place.folder / "run" / "run" / "manifests" / "train.json").read_text())["samples_per_second"]
            return dataclasses.replace(whole, seconds=1.0, work=rate)

        return Program("ours", lambda: run(ROOT)), Program(COMMIT, lambda: run(other))

    return prepare


def _hundred(place: Place) -> tuple[Program, Program]:
    """A hundred concepts against one."""
    names = [line for line in (Path(__file__).parent / "concepts.txt").read_text().splitlines() if line]
    given = ["--fast", "--data", "synthetic", "--base", str(place.base("sd1"))]
    many = [argument for name in names for argument in ("--concept", name)]
    return (
        Program("100 concepts", lambda: place.trained(ROOT, *many, *given)),
        Program("one concept", lambda: place.trained(ROOT, "--concept", names[0], *given)),
    )


def _drawing(place: Place) -> tuple[Program, Program]:
    """Both encoders' images of the same prompts: `generate` against the loop that a user of diffusers would write."""
    script = str(Path(__file__).parent / "plain_drawing.py")
    place.trained(ROOT, "--concept", "bicycle", "--fast")
    made = place.folder / "drawn"
    if not made.is_dir():
        (place.folder / "run").rename(made)

    def run(which: str) -> Result:
        found = timed([sys.executable, script, which], ROOT, made)
        return dataclasses.replace(found, seconds=float((made / "seconds").read_text()))

    return Program("ours", lambda: run("ours")), Program("plain diffusers", lambda: run("plain"))


def _paper(place: Place) -> tuple[Program, Program]:
    """The paper's objective on the text tower, its images' embeddings kept, against the paper's loop; both by seconds a pair."""
    script, clip = str(Path(__file__).parent / "paper_loop.py"), str(place.clip())
    given = ["--concept", "bicycle", "--dataset", "pocket:scenes", "--base", str(place.base("sd1")), "--clip", clip]
    given += ["--objective", "paper", "--steps", str(place.steps or 4), "--max-forget", "64", "--max-retain", "64"]

    def ours() -> Result:
        whole = place.trained(ROOT, *given)
        made = place.folder / "run" / "run"
        rate = json.loads((made / "manifests" / "train.json").read_text())["samples_per_second"]
        return dataclasses.replace(whole, seconds=1 / rate)

    def paper() -> Result:
        work = place.folder / "run"
        # sixteen images of ViT-L/14 in float32 want 27 GB; a pair costs the same in a smaller batch
        found = timed([sys.executable, script, clip, "run", "4", "2"], ROOT, work)
        return dataclasses.replace(found, seconds=float((work / "seconds").read_text()))

    return Program("ours", ours), Program("the paper's loop", paper)  # which reads the pairs that ours left


def _edit(script: str, *given: str) -> Callable[[Place], tuple[Program, Program]]:
    """`train --fast` against another edit of the same base, whole commands."""

    def prepare(place: Place) -> tuple[Program, Program]:
        base = place.base("sd1")
        paths = [str(place.matrices())] if script == "uce" else []
        command = [sys.executable, str(Path(__file__).parent / f"{script}.py"), str(base), *paths, "bicycle", *given]
        ours = ["--concept", "bicycle", "--fast", "--data", "synthetic", "--base", str(base)]
        return (
            Program("ours", lambda: place.trained(ROOT, *ours)),
            Program(script.upper(), lambda: timed(command, ROOT, place.work())),
        )

    return prepare


BENCHMARKS = {
    "pocket-default": Benchmark(
        f"the default on the pocket model, whole command, against {COMMIT}",
        0.33,
        _both(lambda place: ["--concept", "bicycle", *_steps(place)]),
    ),
    "large-default": Benchmark(
        f"the default on ViT-L/14, pairs a second, against {COMMIT}",
        1 / 3,
        _pairs_a_second(
            lambda place: [
                "--concept",
                "bicycle",
                "--data",
                "synthetic",
                "--base",
                str(place.base("sd1")),
                "--steps",
                str(place.steps or 4),
            ]
        ),
    ),
    "fast": Benchmark(
        f"`train --fast --data synthetic` on ViT-L/14, whole command, against {COMMIT}",
        0.15,
        _both(lambda place: ["--concept", "bicycle", "--fast", "--data", "synthetic", "--base", str(place.base("sd1"))]),
    ),
    "fast-sdxl": Benchmark(
        f"the same on SDXL's two encoders, against {COMMIT}",
        0.25,
        _both(lambda place: ["--concept", "bicycle", "--fast", "--data", "synthetic", "--base", str(place.base("sdxl"))]),
    ),
    "hundred": Benchmark("100 concepts by `--fast` on ViT-L/14, against one", 5.0, _hundred),
    "paper": Benchmark("seconds a pair of the paper's objective on ViT-L/14, against the paper's loop", 0.05, _paper),
    "drawing": Benchmark("images of the pocket model by both encoders, against a plain loop of diffusers", 0.5, _drawing),
    "uce": Benchmark(
        "`train --fast` on ViT-L/14, whole command, against UCE's solve of SD 1.5's keys and values", 1.0, _edit("uce", "vehicle")
    ),
    "hirm": Benchmark("the same, against HiRM's first layer in 50 steps", 1.0, _edit("hirm", "50")),
}
