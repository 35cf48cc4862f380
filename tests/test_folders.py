"""Nothing that sd-erase did not make is deleted or overwritten, and one process at a time writes to what is ours."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from sd_erase import folders, stages
from sd_erase.bases import resolve
from sd_erase.captions import open_dataset
from sd_erase.cli import explain_os_error, main
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export.job import check_space
from sd_erase.folders import LOCK, MARK, TEMPORARY, claim, is_locked, locked, publishing, replacing, staging, sweep
from sd_erase.pairs import Pair, read_pairs, write_pairs
from sd_erase.provenance import is_running, read_run, recorded
from sd_erase.rundir import RunDir, fingerprint, write_json_atomic, write_jsonl_atomic, write_text_atomic

failing: list[str] = []


def stage_of(name: str) -> Any:
    def stage(config: RunConfig, run: RunDir, progress: Any = None) -> dict[str, Any]:
        if name in failing:
            (run.data / "images").mkdir(parents=True)
            if "missing" in failing:
                write_jsonl_atomic(run.missing, [{"image": "a.jpg"}])
                raise UserError(f"3 of 4 images are missing: see {run.missing}.")
            raise UserError("Concept 'bicyle' is named by no caption: pass another one.")
        return run.complete(name, "inputs", {"counts": {}, "reasons": {}})

    return stage


harvest, train, report = map(stage_of, ("harvest", "train", "report"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with stages that only write their manifests."""
    failing.clear()
    names = {name: f"{__name__}:{name}" for name in ("harvest", "train", "report")}
    monkeypatch.setattr(stages, "STAGES", {**stages.STAGES, **names})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is not ours stays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [".", "thesis", "outputs"])
@pytest.mark.parametrize("concept", ["bicyle", "("])
def test_a_folder_with_other_files_is_no_run_whatever_fails(work: Path, run: str, concept: str) -> None:
    failing.append("harvest")
    for folder in (work, work / "thesis", work / "outputs" / "bicycle-pocket-0001"):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "chapter.tex").write_text("three years")
    before = contents(work)
    for command in ("train", "harvest", "demo"):
        result = invoke(command, "--concept", concept, "--run", run)
        assert result.exit_code == 2
        assert "no run and holds other files" in result.stderr and "--run" in result.stderr
    assert contents(work) == before


def test_a_failed_harvest_removes_only_what_it_made(work: Path) -> None:
    failing.append("harvest")
    (work / "empty").mkdir()
    assert invoke("train", "--concept", "dog", "--run", "empty").exit_code == 2
    assert list((work / "empty").iterdir()) == []  # it was there before
    assert invoke("train", "--concept", "dog", "--run", "new/run").exit_code == 2
    assert list((work / "new").iterdir()) == []
    assert invoke("train", "--concept", "dog").exit_code == 2
    assert list((work / "outputs").iterdir()) == []


def test_what_a_user_puts_beside_a_harvest_that_fails_stays(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig, run: RunDir, progress: Any = None) -> None:
        (run.path / "notes.txt").write_text("mine")
        raise UserError("no")

    monkeypatch.setattr(sys.modules[__name__], "harvest", fail)
    assert invoke("train", "--concept", "dog", "--run", "run").exit_code == 2
    assert contents(work / "run") == {"notes.txt": b"mine"}


def test_the_list_of_missing_images_that_a_sentence_names_is_there(work: Path) -> None:
    failing.extend(["harvest", "missing"])
    result = invoke("train", "--concept", "dog")
    assert result.exit_code == 2
    assert Path(result.stderr.split("see ")[1].strip().rstrip(".")).is_file()
    failing.clear()
    assert invoke("train", "--concept", "dog").exit_code == 0
    assert [path.name for path in (work / "outputs").iterdir()] == ["dog-pocket-0001"]


def test_a_run_without_a_mark_is_known_by_its_record(work: Path) -> None:
    assert invoke("train", "--concept", "dog", "--run", "run").exit_code == 0
    (work / "run" / MARK).unlink()
    (work / "run" / "notes.txt").write_text("mine")
    assert invoke("report", "--run", "run").exit_code == 0
    assert (folders.mark_of(work / "run") or {})["kind"] == "run"
    assert (work / "run" / "notes.txt").read_text() == "mine"


def test_a_config_of_another_program_makes_no_run(work: Path) -> None:
    (work / "site").mkdir()
    (work / "site" / "config.yaml").write_text("concepts: [dog]\n")
    (work / "site" / "run.json").write_text('{"scripts": {}}')
    before = contents(work)
    for command in ("train", "report"):
        assert "no run and holds other files" in invoke(command, "--run", "site").stderr
    assert contents(work) == before


def test_settings_alone_in_a_folder_begin_a_run(work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "config.yaml").write_text("concepts: [dog]\n")
    assert invoke("train", "--run", "mine").exit_code == 0
    failing.append("train")
    (work / "mine" / "manifests" / "train.json").unlink()
    assert invoke("train", "--run", "mine").exit_code == 2
    assert "dog" in (work / "mine" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "arguments",
    [("compare", "pocket-default"), ("reproduce", "table2"), ("sweep", "--concept", "apple", "--over", "train.steps=1,2")],
)
def test_commands_of_many_runs_take_no_folder_of_others(work: Path, arguments: tuple[str, ...]) -> None:
    for name in ("comparison.md", "sweep.md", "runs/table2.md"):
        (work / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "docs" / name).write_text("mine")
    before = contents(work)
    result = invoke(*arguments, "--output", "docs")
    assert result.exit_code == 2 and "sd-erase did not make" in result.stderr
    assert contents(work) == before
    invoke("train", "--concept", "dog", "--run", "run")
    assert "another command's (run)" in invoke(*arguments, "--output", "run").stderr


def test_scenes_are_rendered_into_no_folder_of_others(work: Path) -> None:
    (work / "flickr30k-images").mkdir()
    (work / "flickr30k-images" / "1000092795.jpg").write_text("a photograph")
    with pytest.raises(UserError, match="holds other files"):
        next(open_dataset(f"pocket:{work}", resolve("pocket"), work / "run"))
    assert len(contents(work)) == 1


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a harvest from a small data set of text in the working folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"caption": f"a bicycle beside {number} houses"} for number in range(40)]
    rows += [{"caption": f"a dog and {number} cats"} for number in range(40)]
    write_jsonl_atomic(tmp_path / "captions.jsonl", rows)
    return ["harvest", "--concept", "bicycle", "--dataset", "jsonl:captions.jsonl", "--max-forget", "20", "-n", "5", "--json"]


def test_prompts_are_written_over_no_other_file(captions: list[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    before = contents(tmp_path)
    result = invoke(*captions, "--write-prompts", "thesis.txt")
    assert result.exit_code == 2 and "pass --force" in result.stderr
    for name in ("captions.jsonl", "captions.csv", ".", "/dev/null"):
        assert invoke(*captions, "--write-prompts", name, "--force").exit_code == 2
    assert contents(tmp_path) == before and not (tmp_path / "outputs").exists()
    assert invoke(*captions, "--write-prompts", "thesis.txt", "--force").exit_code == 0
    assert len((tmp_path / "thesis.txt").read_text().splitlines()) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl", "outputs", "thesis.txt"]


def test_prompts_never_hit_the_run_s_files_and_replace_their_own_only_unchanged(captions: list[str], tmp_path: Path) -> None:
    run = ["--run", "run", "--write-prompts"]
    assert invoke(*captions, *run, "held.txt").exit_code == 0
    before = contents(tmp_path)
    for name in (
        "run/pairs.jsonl",
        "run/config.yaml",
        "run/data/x.txt",
        "run/manifests/harvest.json",
        "run/.sd-erase.json",
        "run",
    ):
        assert invoke(*captions, *run, name, "--force").exit_code == 2
    assert contents(tmp_path) == before
    assert invoke(*captions, *run, "held.txt").exit_code == 0  # its own, as it was written
    assert invoke(*captions, *run, "run/held.txt").exit_code == 0
    edited = (tmp_path / "held.txt").read_text() + "a bicycle of mine\n"
    (tmp_path / "held.txt").write_text(edited)
    assert "pass --force" in invoke(*captions, *run, "held.txt").stderr
    assert (tmp_path / "held.txt").read_text() == edited


def test_no_file_of_a_data_set_in_a_folder_is_hit(captions: list[str], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("bicycle", "dog"):
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name}\n")
    before = contents(tmp_path)
    asked = ["harvest", "--concept", "bicycle", "--dataset", "folder:photos", "--force", "--write-prompts"]
    for name in ("photos/bicycle.txt", "photos/new.txt"):
        assert "belongs to the data set" in invoke(*asked, name).stderr
    assert contents(tmp_path) == before


def test_the_pocket_s_own_commands_take_no_folder_of_others(tmp_path: Path) -> None:
    from sd_erase.pocket.__main__ import main as pocket

    for name in ("flickr30k/results_20130124.token", "flickr30k/flickr30k-images/1000092795.jpg", "clip/tokenizer/vocab.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1000092795.jpg#0\tTwo young guys")
    before = contents(tmp_path)
    work = ["--work", str(tmp_path / "work")]
    for arguments in (["render", str(tmp_path / "flickr30k")], ["build", "--target", str(tmp_path / "clip"), *work],
                      ["build", "--work", str(tmp_path / "clip")]):  # fmt: skip
        result = CliRunner().invoke(pocket, arguments)
        assert result.exit_code == 1 and "pass a new or an empty" in result.output
    assert {name: text for name, text in contents(tmp_path).items() if not name.startswith("work/")} == before
    (tmp_path / "flickr30k" / "results_20130124.token").unlink()
    assert CliRunner().invoke(pocket, ["render", str(tmp_path / "flickr30k")]).exit_code == 1
    for _ in range(2):
        assert CliRunner().invoke(pocket, ["render", str(tmp_path / "scenes"), "--scenes", "2"]).exit_code == 0


def test_another_concept_does_not_train_away_what_a_run_erased(work: Path) -> None:
    assert invoke("train", "--concept", "dog", "--run", "run").exit_code == 0
    before = contents(work)
    result = invoke("train", "--concept", "cat", "--run", "run")
    assert result.exit_code == 2 and "Run run has erased dog" in result.stderr
    assert contents(work) == before
    assert invoke("train", "--run", "run", "--steps", "3").exit_code == 0


# --- how a file and a folder get their names ----------------------------------------------------------------------------------


def test_a_new_run_has_its_name_only_when_its_settings_are_there(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        assert invoke("train", "--concept", "dog").exit_code == 130
    assert list((work / "outputs").iterdir()) == []
    taken = work / "outputs" / "dog-pocket-0001"
    run = RunDir.next(work / "outputs", "dog", "pocket")
    taken.mkdir()  # by somebody, in the meantime
    with run.writing({"config.yaml": "seed: 1\n"}):
        assert run.name == "dog-pocket-0002"
    assert sorted(path.name for path in run.path.iterdir()) == [MARK, LOCK, "config.yaml"]
    assert list(taken.iterdir()) == []


def test_files_and_folders_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "a.txt", "a")
        with publishing(tmp_path / "b.txt") as temporary:
            temporary.write_text("b")
        run = RunDir(tmp_path / "run")
        with run.writing({"config.yaml": ""}):
            pass
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a.txt", tmp_path / "b.txt", run.config)} == {0o640}
    assert run.path.stat().st_mode & 0o777 == 0o750


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.writing({"config.yaml": ""}):
        pass
    ours = [
        f"images/original/{TEMPORARY}0123456789abcdef.png", f"{TEMPORARY}0123456789abcdef.json", ".run.json.k3_d8x2a",
        "checkpoints/.last.safetensors.tmp", "images/.0007-seed42.png.a1b2c3d4", f"export/{TEMPORARY}88/{LOCK}", f"export/{TEMPORARY}88/x",
        f"cache/{TEMPORARY}77/part", f"checkpoints/{TEMPORARY}0123456789abcdef/.tmpX1y2Z3",
    ]  # fmt: skip
    theirs = [".notes.markdown", ".env", "images/.hidden.png", ".run.json.backup", "my.tmp", "checkpoints/.other.safetensors.tmp"]
    for name in ours + theirs:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x")
    nested = RunDir(run.path / "inner")
    with nested.writing():
        (nested.path / f"{TEMPORARY}00.json").write_text("of a process that works on it")
    with run.writing():
        left = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    kept = {f"cache/{TEMPORARY}77/part"}  # a folder of another name without a lock is not known to be ours
    assert left == {*theirs, *kept, LOCK, MARK, "config.yaml", *(f"inner/{name}" for name in (LOCK, MARK, f"{TEMPORARY}00.json"))}


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for how in (replacing, publishing):
        with pytest.raises(OSError, match="full"), how(tmp_path / "a") as temporary:
            temporary.write_text("ne")
            raise OSError("full")
        assert contents(tmp_path) == {"a": b"old"} and len(list(tmp_path.iterdir())) == 1


def test_a_run_may_be_moved_and_copied(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "before")
    with run.writing({"config.yaml": "concepts: [dog]\n"}):
        images = [run.data / "flickr30k-images" / "1.jpg", tmp_path / "photos" / "2.jpg"]
        for image in images:
            image.parent.mkdir(parents=True)
            image.write_bytes(b"")
        pairs = [Pair(image.name, str(image), "a dog", "forget", "train", "dog", ((2, 5),), "word: dog") for image in images]
        write_pairs(run, pairs)
        assert read_pairs(run) == pairs
        rows = [{**vars(pair), "spans": [[2, 5]]} for pair in pairs]
        run.reopen("harvest")
    shutil.copytree(run.path, tmp_path / "copy")
    run.path.rename(tmp_path / "after")
    for name in ("copy", "after"):
        moved = RunDir(tmp_path / name)
        for stored in ("as it is", "as the version before wrote it"):
            if stored != "as it is":
                write_jsonl_atomic(moved.pairs, rows)
            assert [pair.image for pair in read_pairs(moved)] == [str(moved.data / "flickr30k-images" / "1.jpg"), str(images[1])]
        assert not is_running(moved)
        with moved.writing():
            assert moved.name == name
    assert len({fingerprint(tmp_path / name / "pairs.jsonl") for name in ("copy", "after")}) == 1


def test_a_comparison_may_be_moved_with_its_data_and_one_of_its_runs_copied_out(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    claim(folder, "comparison", ())
    run, image = RunDir(folder / "runs" / "dog" / "fast-seed0"), folder / "scenes" / "images" / "1.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    with run.writing({"config.yaml": "concepts: [dog]\n"}):
        write_pairs(run, [Pair("1.jpg", str(image), "a dog", "forget", "train", "dog", ((2, 5),), "word: dog")])
    shutil.copytree(run.path, tmp_path / "copy")
    assert [pair.image for pair in read_pairs(RunDir(tmp_path / "copy"))] == [str(image)]
    folder.rename(tmp_path / "after")
    moved = tmp_path / "after" / run.path.relative_to(folder)
    assert [pair.image for pair in read_pairs(RunDir(moved))] == [str(tmp_path / "after" / image.relative_to(folder))]
    assert [pair.image for pair in read_pairs(RunDir(tmp_path / "copy"))] == [str(image)]  # which is gone, and said to be


# --- one writer --------------------------------------------------------------------------------------------------------------


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed its first line."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stdout.readline()
            yield running
        finally:
            running.kill()


def holding(place: str) -> str:
    return f"import time; from pathlib import Path; from sd_erase.folders import *\nwith {place}: print('held', flush=True); time.sleep(60)"


def test_a_second_process_gets_one_sentence_at_once_and_a_killed_one_holds_nothing(work: Path) -> None:
    assert invoke("train", "--concept", "dog").exit_code == 0
    run = RunDir.latest(work / "outputs", "train")
    before = contents(run.path)
    with process(holding(f"locked(Path({str(run.path)!r}))")) as other:
        assert is_running(run)
        for arguments in (("report",), ("report", "--run", run), ("train", "--concept", "dog", "--run", run)):
            started = time.monotonic()
            result = invoke(*arguments)
            assert result.exit_code == 2 and "being worked on by another sd-erase process" in result.stderr
            assert result.stderr.count("\n") == 1 and time.monotonic() - started < 5
        assert contents(run.path) == before
        other.kill()
        other.wait()
        assert not is_running(run)
        assert invoke("report").exit_code == 0


def test_a_command_whose_run_another_process_makes_says_so(work: Path) -> None:
    failing.append("train")
    assert invoke("train", "--concept", "dog").exit_code == 2
    failing.clear()
    with process(holding(f"locked(Path({str(work / 'outputs' / 'dog-pocket-0001')!r}))")):
        result = invoke("train", "--concept", "dog")
        assert result.exit_code == 2 and "has these settings and is being worked on" in result.stderr
        assert invoke("train", "--concept", "cat").exit_code == 0  # other settings, another run
    assert invoke("train", "--concept", "dog").exit_code == 0


def test_of_two_processes_that_begin_at_once_one_makes_the_run(tmp_path: Path) -> None:
    run = RunDir.next(tmp_path, "dog", "pocket")
    other = f"RunDir.next({str(tmp_path)!r}, 'dog', 'pocket').writing({{'config.yaml': 'seed: 1'}})"
    with process("from sd_erase.rundir import RunDir; " + holding(other)):
        with pytest.raises(UserError, match="is being worked on by another"), run.writing({"config.yaml": "seed: 1"}):
            pass
        with run.writing({"config.yaml": "seed: 2"}):
            assert run.name == "dog-pocket-0002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dog-pocket-0001", "dog-pocket-0002"]


def test_this_process_may_ask_for_a_lock_again_and_a_killed_one_s_staging_goes(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path):
            assert is_locked(tmp_path) is False
        with process(holding(f"staging(Path({str(tmp_path)!r}))")) as other:
            (place,) = tmp_path.glob(f"{TEMPORARY}*")
            sweep(tmp_path)
            assert place.is_dir()  # at work
            other.kill()
            other.wait()
            with staging(tmp_path):
                assert not place.exists()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_two_comparisons_work_on_different_concepts_of_one_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_erase.comparison._compare", lambda recipe, folder, progress, done: {"concepts": recipe.concepts})
    monkeypatch.setattr("sd_erase.comparison.render", lambda result: "done")
    for concepts in ("apple", "dog"):
        (work / f"{concepts}.yaml").write_text(f"concepts: [{concepts}]\nmethods: {{fast: {{train.objective: fast}}}}\n")
    assert invoke("compare", "apple.yaml", "--output", "both").exit_code == 0
    with process(holding(f"locked(Path({str(work / 'both' / 'original' / 'apple')!r}))")):
        assert "Concept 'apple' of both is being worked on" in invoke("compare", "apple.yaml", "--output", "both").stderr
        assert invoke("compare", "dog.yaml", "--output", "both").exit_code == 0


# --- processes ---------------------------------------------------------------------------------------------------------------


def test_a_process_is_told_by_its_start_and_not_by_its_number_alone(tmp_path: Path) -> None:
    """A container that is started again gives the new process the old one's number."""
    run = RunDir(tmp_path)
    with process("import time; print(1, flush=True); time.sleep(60)") as other:
        with recorded(run, "train", RunConfig()):
            record = read_run(run)
        record |= {"status": "running", "pid": other.pid, "process_started": psutil.Process(other.pid).create_time()}
        write_json_atomic(run.run, record)
        assert is_running(run)
        write_json_atomic(run.run, {**record, "process_started": record["process_started"] - 60})
        assert not is_running(run)
        write_json_atomic(run.run, {key: value for key, value in record.items() if key != "process_started"})
        assert not is_running(run)
        write_json_atomic(run.run, {**record, "host": "elsewhere"})
        assert not is_running(run)
    assert record["pid"] != os.getpid()
    write_json_atomic(run.run, record)
    assert not is_running(run)


STAND_IN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores them, and so would we
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from sd_erase import stages
from sd_erase.cli import main
def harvest(config, run, progress):
    print("begun", file=sys.__stdout__, flush=True)
    time.sleep(60)
sys.modules["stand_in"] = sys.modules["__main__"]
stages.STAGES["harvest"] = "stand_in:harvest"
main(["harvest", "--concept", "dog"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_as_ctrl_c_does(work: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", STAND_IN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "begun\n"
        running.send_signal(number)
        _, stderr = running.communicate(timeout=30)
    assert running.returncode == code
    assert stderr.splitlines()[1:] == ["", "Interrupted; run the same command again to resume."]
    run = RunDir(work / "outputs" / "dog-pocket-0001")
    record = json.loads(run.run.read_text())
    assert record["status"] == record["stages"]["harvest"]["status"] == "interrupted"
    assert invoke("harvest", "--concept", "dog", "--json").exit_code == 0
    assert [path.name for path in (work / "outputs").iterdir()] == [run.name]


def test_a_sentence_names_no_folder_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as place:
        inside = place / "new" / "text_encoder"
        assert TEMPORARY in str(inside) and folders.lasting(inside) == tmp_path / "out"
        full = OSError(errno.ENOSPC, "No space left on device", str(inside / "model.safetensors"))
        assert explain_os_error(full) == f"no space left on {tmp_path / 'out'}: free some, then run the same command again."
        job = pytest.raises(UserError, check_space, inside, 10**18)
        assert f"no space left on {tmp_path / 'out'} (" in str(job.value)
    assert folders.lasting(tmp_path / "a" / "b.json") == tmp_path / "a" / "b.json"
