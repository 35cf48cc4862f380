"""Every command, killed at many moments and run again, ends as if nothing had happened: bit for bit, with nothing left behind.

    SD_ERASE_KILLS=200 pytest -m slow tests/test_kills.py          # all kills, in about 25 minutes of two cores with -n 2
    SD_ERASE_KILL_SEED=7 SD_ERASE_KILLS=60 pytest -m slow tests/test_kills.py -k "export or merge"

A series begins with a copy of what the earlier commands left. The command is started and killed (SIGKILL) up to `SERIES` times, half of
them at any time and half where a file has just changed, and then runs to its end. What it leaves is compared with what a run leaves that
was not killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sd_erase.folders import LOCK, TEMPORARY

pytestmark = pytest.mark.slow

SERIES = 4  # kills before a command may run to its end
# a process as a user's, with fewer scenes and methods
DRIVER = """
import sys
from sd_erase.captions import pocket
pocket.render.__defaults__ = (150, *pocket.render.__defaults__[1:])
if sys.argv[1] in ("reproduce", "sweep"):
    import dataclasses
    import sd_erase.reproduce as library
    from sd_erase.reproduce import bench
    bench.CLASS_SCENES = {"train": 4, "validation": 2, "test": 3}
    read = library.read_recipe
    def read_less(*arguments):
        recipe = read(*arguments)
        return dataclasses.replace(
            recipe, concepts={"classes": ["apple"]}, methods={"ga": recipe.methods["CLIP+GA"]}, sizes={"steps": 2}
        )
    library.read_recipe = read_less
from sd_erase.cli import main
main(sys.argv[1:])
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
RECIPE = """
concepts: [bicycle]
methods: {fast: {train.objective: fast}, token: {train.objective: token}}
images: {named: 1}
settings: {generate.prompts: [prompts.txt], generate.steps: 3, device: cpu}
"""
TINY = [item for name in ("steps=2", "batch_size=4", "validate_every=1") for item in ("--set", f"train.{name}")]
ON_RUN = ["--run", "run", "--device", "cpu"]


@dataclass(frozen=True)
class Case:
    """One command line and what it begins from."""

    name: str
    before: str  # a key of `STATES`
    arguments: tuple[str, ...]


def case(name: str, before: str, *arguments: str) -> Case:
    return Case(name, before, arguments)


TRAIN = ("--objective", "sd", "--steps", "30", "--batch-size", "8", "--validate-every", "5")
CASES = (
    case("harvest", "empty", "harvest", "--concept", "bicycle", "--write-prompts", "held-out.txt", "-n", "5", "--max-forget", "9", "--device", "cpu"),
    case("train", "harvested", "train", *ON_RUN, *TRAIN),
    case("train-lora", "harvested", "train", *ON_RUN, *TRAIN, "--lora-rank", "4"),
    case("generate", "trained", "generate", *ON_RUN, "--prompts", "prompts.txt", "--images-per-prompt", "6", "--steps", "3", "--batch-size", "2"),
    case("evaluate", "drawn", "evaluate", *ON_RUN),
    case("attack", "drawn", "attack", *ON_RUN, "--steps", "2", "--candidates", "2", "--images-per-prompt", "1"),
    case("export-comfyui", "evaluated", "export", *ON_RUN, "--output", "out/encoder.safetensors"),
    case("export-a1111", "evaluated", "export", *ON_RUN, "--to", "a1111", "--checkpoint", "checkpoint.safetensors", "--output", "out"),
    case("export-lora", "trained-lora", "export", *ON_RUN, "--to", "lora", "--output", "out"),
    case("export-lora-diff", "trained-lora", "export", *ON_RUN, "--to", "lora-diff"),
    case("export-diffusers", "evaluated", "export", *ON_RUN, "--to", "diffusers"),
    case("export-pipeline", "evaluated", "export", *ON_RUN, "--to", "diffusers", "--pipeline", "--output", "out/model"),
    case("report", "evaluated", "report", *ON_RUN),
    case("merge", "two", "merge", "run", "other"),
    case("compare", "scenes", "compare", "recipe.yaml", "--output", "both"),
    case("reproduce", "empty", "reproduce", "table2", "--output", "bench", "--device", "cpu", *TINY),
    case("reproduce-cost", "empty", "reproduce", "cost", "--output", "bench", "--device", "cpu", *TINY),
    case("sweep", "empty", "sweep", "--concept", "apple", "--output", "bench", "--device", "cpu", "--over", "train.learning_rate=1e-5,1e-4",
         "--set", "train.objective=ga", *TINY),
    case("demo", "empty", "demo", "--device", "cpu", "--train-steps", "20", "--prompts", "prompts.txt", "--images-per-prompt", "1"),
)  # fmt: skip
KILLS = int(os.environ.get("SD_ERASE_KILLS", len(CASES)))
SEED = int(os.environ.get("SD_ERASE_KILL_SEED", 0))


# --- commands ----------------------------------------------------------------------------------------------------------------


def start(folder: Path, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    """A command under way in `folder`, in a process group of its own."""
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments], cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip


def run(folder: Path, *arguments: str) -> None:
    """A command to its end."""
    process = start(folder, arguments)
    try:
        code = process.wait(timeout=1800)
    finally:
        end_group(process)
    log = (folder.parent / f"{folder.name}.log").read_text(errors="replace")
    assert code == 0, f"sd-erase {' '.join(arguments)} ended with {code}:\n{log[-3000:]}"


def end_group(process: subprocess.Popen[str]) -> None:
    """End what a command may have left running (the trainings of `reproduce cost` have processes of their own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def marks(folder: Path) -> set[tuple[str, int, int]]:
    """What changes in `folder` when a file is written."""
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            found.add((os.path.join(place, name), status.st_mtime_ns, status.st_size))
    return found


@dataclass
class Course:
    """How long a command takes, and how often a look at its files finds a change."""

    seconds: float
    changes: int


def watched(folder: Path, arguments: tuple[str, ...]) -> Course:
    """Run a command to its end and look at its files all the while."""
    process, began, known, changes = start(folder, arguments), time.monotonic(), marks(folder), 0
    while process.poll() is None:
        time.sleep(0.01)
        found = marks(folder)
        changes, known = changes + (found != known), found
    seconds = time.monotonic() - began
    log = (folder.parent / f"{folder.name}.log").read_text(errors="replace")
    assert process.returncode == 0, f"sd-erase {' '.join(arguments)} ended with {process.returncode}:\n{log[-3000:]}"
    return Course(seconds, changes)


def killed(folder: Path, arguments: tuple[str, ...], course: Course, rng: random.Random) -> bool:
    """Start a command and kill it, at any time or at one of its changes of files; whether it was still running."""
    at_change = rng.random() < 0.5 and course.changes
    limit = rng.randint(1, max(1, course.changes)) if at_change else rng.uniform(0.2, course.seconds)
    process, began, known, changes = start(folder, arguments), time.monotonic(), marks(folder), 0
    while process.poll() is None:
        if at_change:
            found = marks(folder)
            changes, known = changes + (found != known), found
            time.sleep(0.002)
        else:
            time.sleep(min(0.01, limit / 10))
        if (changes if at_change else time.monotonic() - began) >= limit:
            process.kill()
            break
    process.wait()
    if process.returncode == -signal.SIGKILL:
        return True
    assert process.returncode == 0, (folder.parent / f"{folder.name}.log").read_text(errors="replace")[-3000:]
    return False


# --- what a command leaves ---------------------------------------------------------------------------------------------------

# times, and the hashes of what holds some: "seal" and "inputs" of a row that says how long it took, "kept" of the manifests
TIMES = {
    "seconds", "peak_memory_mb", "samples_per_second", "drawn", "reused", "completed", "sha256", "bytes", "modelspec.date", "difference",
    "modelspec.hash_sha256", "seal", "inputs", "kept",
}  # fmt: skip
HASHED = re.compile(
    r".*\.(jsonl?|md|html|safetensors)"
)  # the digests that manifests keep; what the files hold is compared itself
RECORDS = re.compile(r"(run|report)\.json|report\.html|cost\.(md|json)|\.sd-erase.*|.*\.token")  # times throughout, or no result


def _is_time(key: str, item: Any) -> bool:
    return key in TIMES or (isinstance(item, str) and HASHED.fullmatch(key) is not None)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not _is_time(key, item)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def content(path: Path, folder: Path) -> Any:
    """What a file holds, without the times in it and the name of the folder."""
    if RECORDS.fullmatch(path.name):
        return None
    data = path.read_bytes().replace(str(folder).encode(), b"")
    if path.suffix == ".json":
        return without_times(json.loads(data))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in data.splitlines()]
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        return without_times(json.loads(data[8 : 8 + length])), data[8 + length :]
    if path.name in ("comparison.md", "attack.md", "README.md"):  # the last column, or a sentence, is a time
        return re.sub(r"[\d.]+ (\|\n|s a prompt)|ended \S+", "", data.decode())
    return data


def left(folder: Path) -> dict[str, Any]:
    return {path.relative_to(folder).as_posix(): content(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()}


# --- states ------------------------------------------------------------------------------------------------------------------


def empty(folder: Path, root: Path) -> None:
    (folder / "prompts.txt").write_text("A bicycle beside a dog in a park.\nA cat sits by a bicycle.\n")


def harvested(folder: Path, root: Path) -> None:
    run(folder, "harvest", "--concept", "bicycle", *ON_RUN)


def trained(folder: Path, root: Path) -> None:
    run(folder, "train", *ON_RUN, "--fast")


def drawn(folder: Path, root: Path) -> None:
    run(folder, "generate", *ON_RUN, "--prompts", "prompts.txt", "--images-per-prompt", "2", "--steps", "6")


def evaluated(folder: Path, root: Path) -> None:
    import safetensors.torch
    from ldm import checkpoint

    from sd_erase.bases import resolve
    from sd_erase.components import load_pipeline

    run(folder, "evaluate", *ON_RUN)
    tensors = checkpoint(load_pipeline(resolve("pocket")))
    safetensors.torch.save_file(tensors, folder / "checkpoint.safetensors", {"format": "pt"})


def trained_lora(folder: Path, root: Path) -> None:
    run(folder, "train", *ON_RUN, *TRAIN, "--lora-rank", "4")


def two(folder: Path, root: Path) -> None:
    run(folder, "train", "--concept", "elephant", "--run", "other", "--device", "cpu", "--fast")


def scenes(folder: Path, root: Path) -> None:
    shutil.copytree(state("harvested", root) / "run" / "data", folder / "scenes")
    (folder / "both").mkdir()
    (folder / "scenes").rename(folder / "both" / "scenes")
    (folder / "recipe.yaml").write_text(RECIPE)


# name -> what it begins from, and how it is made
STATES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "empty": ("", empty),
    "harvested": ("empty", harvested),
    "trained": ("harvested", trained),
    "trained-lora": ("harvested", trained_lora),
    "drawn": ("trained", drawn),
    "evaluated": ("drawn", evaluated),
    "two": ("trained", two),
    "scenes": ("empty", scenes),
}


def state(name: str, root: Path) -> Path:
    """The folder of a state, made when it is first asked for."""
    folder = root / "states" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".making")):  # the workers of one call share what SD_ERASE_KILL_STATES names
        if not folder.is_dir():
            before, make = STATES[name]
            begun = folder.with_suffix(".begun")
            shutil.rmtree(begun, ignore_errors=True)  # of a call that was ended
            if before:
                shutil.copytree(state(before, root), begun)
            else:
                begun.mkdir()
            make(begun, root)
            begun.rename(folder)
    return folder


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of it goes; what the commands begin from is kept in SD_ERASE_KILL_STATES, where that names a folder."""
    folder = tmp_path_factory.mktemp("kills")
    if kept := os.environ.get("SD_ERASE_KILL_STATES"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        (folder / "states").symlink_to(Path(kept).absolute())
    return folder


@dataclass
class Unkilled:
    """A command that was left alone: how it went and what it left."""

    before: Path
    course: Course
    left: dict[str, Any]


UNKILLED: dict[str, Unkilled] = {}


def unkilled(chosen: Case, root: Path) -> Unkilled:
    """The command run once to its end."""
    if chosen.name not in UNKILLED:
        before = state(chosen.before, root)
        folder = copied(before, root / chosen.name / "work")
        course = watched(folder, chosen.arguments)
        UNKILLED[chosen.name] = Unkilled(before, course, left(folder))
        shutil.rmtree(folder)
    return UNKILLED[chosen.name]


def check_same(expected: dict[str, Any], found: dict[str, Any], what: str) -> None:
    """Fail where two results differ, or one has more files."""
    names = {name for name in expected.keys() ^ found.keys() if Path(name).name != LOCK}
    assert not names, f"only one of the two has {sorted(names)[:5]} ({what})"
    differing = [name for name in expected if name in found and expected[name] != found[name]]
    assert not differing, f"{differing[:5]} differ ({what})"
    assert not [name for name in found if f"/{TEMPORARY}" in f"/{name}"]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[each.name for each in CASES])
def test_a_killed_command_run_again_ends_as_one_that_was_not_killed(number: int, root: Path) -> None:
    chosen, done, series = CASES[number], 0, 0
    wanted = KILLS // len(CASES) + (number < KILLS % len(CASES))
    rng = random.Random(f"{SEED} {chosen.name}")
    alone = unkilled(chosen, root)
    while done < wanted:
        series += 1
        work = copied(alone.before, root / chosen.name / "work")  # one place for all: a data set's is in the pairs
        goal = min(SERIES, wanted - done)
        for _ in range(3 * goal):  # what is done already is not done again, so a later start may end before its kill
            if goal and killed(work, chosen.arguments, alone.course, rng):
                done, goal = done + 1, goal - 1
        run(work, *chosen.arguments)
        check_same(alone.left, left(work), f"series {series} of {chosen.name}, seed {SEED}")
        shutil.rmtree(work)
    print(
        f"{chosen.name}: {done} kills in {series} series; {alone.course.seconds:.1f} s, {alone.course.changes} changes unkilled"
    )


@pytest.mark.parametrize("number", range(len(CASES)), ids=[each.name for each in CASES])
def test_of_two_at_once_one_works_and_the_other_says_so(number: int, root: Path) -> None:
    chosen = CASES[number]
    alone = unkilled(chosen, root)
    work = copied(alone.before, root / chosen.name / "work")
    both = [start(work, chosen.arguments) for _ in range(2)]
    codes = sorted(process.wait(timeout=1800) for process in both)
    for process in both:
        end_group(process)
    log = (work.parent / "work.log").read_text(errors="replace")
    assert codes in ([0, 0], [0, 2]), log[-3000:]  # both: the second began when the first had ended, and had nothing to do
    assert codes == [0, 0] or ("by another sd-erase process" in log and "Traceback" not in log), log[-3000:]
    check_same(alone.left, left(work), f"two of {chosen.name} at once")
    shutil.rmtree(work)


def size_of(folder: Path) -> int:
    """Bytes that a folder's files take on a disk of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[each.name for each in CASES])
def test_a_full_disk_is_a_sentence_and_room_on_it_is_all_that_the_command_wants(number: int, root: Path) -> None:
    """On disks with room for none, a quarter, half and most of what the command writes (needs the right to mount a tmpfs)."""
    chosen = CASES[number]
    alone = unkilled(chosen, root)
    work = copied(alone.before, root / chosen.name / "work")
    begun = size_of(work)
    run(work, *chosen.arguments)
    written = size_of(work) - begun
    shutil.rmtree(work)
    work.mkdir()
    for share in (0.0, 0.25, 0.5, 0.8):
        log = work.parent / "work.log"
        log.unlink(missing_ok=True)
        size = begun + 65_536 + round(share * written)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(work)], capture_output=True).returncode:
            pytest.skip("no right to mount a tmpfs")
        try:
            shutil.copytree(alone.before, work, dirs_exist_ok=True)
            process = start(work, chosen.arguments)
            code = process.wait(timeout=1800)
            end_group(process)
            said = log.read_text(errors="replace")
            assert code in (0, 2) and "Traceback" not in said, f"{share} of {chosen.name}: {code}\n{said[-3000:]}"
            assert code == 0 or "no space left" in said, f"{share} of {chosen.name}\n{said[-3000:]}"
            if share == 0.0:
                assert code == 2 or written < 65_536, f"{chosen.name} fits: nothing was tried"
            subprocess.run(["mount", "-o", "remount,size=1g", str(work)], check=True)
            run(work, *chosen.arguments)
            check_same(alone.left, left(work), f"a full disk, {share} of {chosen.name}")
        finally:
            subprocess.run(["umount", "-l", str(work)], check=True)
    work.rmdir()


def test_moved_and_copied_runs_go_on(root: Path) -> None:
    """The run that the others are made from, in another place, without the first one and without its hidden files."""
    source = copied(state("evaluated", root), root / "moved" / "work")
    (source / "run").rename(source / "elsewhere")
    for name in (".sd-erase.json", LOCK):
        (source / "elsewhere" / name).unlink()
    shutil.copytree(source / "elsewhere", source / "copy")
    for name in ("elsewhere", "copy"):
        on_run = ("--run", name, "--device", "cpu")
        before = (source / name / "encoder" / "text_encoder" / "model.safetensors").read_bytes()
        run(source, "evaluate", *on_run)
        run(source, "export", *on_run, "--output", f"{name}.safetensors")
        run(source, "report", *on_run)
        assert before == (source / name / "encoder" / "text_encoder" / "model.safetensors").read_bytes()
        run(
            source, "train", *on_run, "--objective", "paper", "--steps", "2", "--batch-size", "4"
        )  # reads the images of the pairs
    assert content(source / "elsewhere.safetensors", source)[1] == content(source / "copy.safetensors", source)[1]
