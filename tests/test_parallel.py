"""Several processes that do one command: two of them on CPUs (gloo) against one."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sd_erase import launch, parallel, sharding
from sd_erase.cli import main
from sd_erase.clip import encode
from sd_erase.erasure.losses import retention
from sd_erase.erasure.pseudo_words import replaced
from sd_erase.errors import UserError
from sd_erase.fitting import Fit
from sd_erase.rundir import RunDir, read_jsonl

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
two_cores = pytest.mark.skipif(parallel.cores() < 2, reason="two processes want two cores")
TRAIN = (
    "--concept", "bicycle", "--device", "cpu", "--max-forget", "30", "--max-retain", "40", "--steps", "4", "--batch-size", "5",
    "--validate-every", "1", "--objective",
)  # fmt: skip


def command(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sd_erase", *map(str, arguments)],
        env={**ENVIRONMENT, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_alone(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run_by_two(*arguments: object) -> Any:
    process = command(*arguments, "--processes", 2, "--json")
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return json.loads(output)


# --- shares ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 4])
def test_shares_make_the_whole_in_its_order(monkeypatch: pytest.MonkeyPatch, count: int, size: int, block: int) -> None:
    shares = []
    monkeypatch.setattr(parallel._group, "size", size)
    for rank in range(size):
        monkeypatch.setattr(parallel._group, "rank", rank)
        shares.append(parallel.share(range(count), block))
    assert parallel.in_order(shares, block) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= block


def _descend() -> list[torch.Tensor]:
    """Two steps of a small encoder and a projection behind it, on a contrastive loss and on embeddings that an attack moves."""
    generator = torch.Generator().manual_seed(0)
    encoder, projection, moved = (
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 5), (5, 4), (7, 6))
    )
    images = torch.nn.functional.normalize(torch.randn((7, 4), generator=generator), dim=-1)
    optimizer = torch.optim.SGD([encoder, projection, moved], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    fit = Fit([encoder, projection], optimizer, schedule, Path(), 100, dict, lambda groups: None, 1e9)
    losses = []

    def loss_of(_: int) -> torch.Tensor:
        with sharding.sharing():
            (states,) = sharding.by_rows(lambda rows: [torch.tanh(rows @ encoder)], moved)
        texts = torch.nn.functional.normalize(states @ projection, dim=-1)
        loss = retention(images, texts, torch.tensor(3.0)) + states.sub(states.mean(0)).square().mean()
        losses.append(loss.detach())
        return loss

    for step in range(2):
        fit._descend(loss_of(step), optimizer)
    return [torch.stack(losses), *(value.detach() for value in (encoder, projection, moved)), _attack()]


def _attack() -> torch.Tensor:
    """The gradient at embeddings that stand in two of three captions of a small text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    text = CLIPTextModel(config).eval().requires_grad_(False)
    values = torch.randn(3, 16).requires_grad_(True)
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 2, 2], [0, 4, 2, 2, 2]])
    with sharding.sharing(), replaced(text, [0, 0, 2], [1, 3, 1], values):
        (states, before), pooled = encode(text, ids, (-1, -2))
    (gradient,) = torch.autograd.grad(states.square().mean() + before[0].sum() + (pooled[0] * pooled[2]).sum(), values)
    return gradient


def _by_several(number: int, variables: dict[str, str], queue: Any) -> None:
    os.environ.update(variables)
    with parallel.together():
        found = [value.tolist() for value in _descend()]
        chosen = parallel.agreed(lambda: f"chosen by {parallel.rank()}")
        queue.put((number, found, chosen, parallel.gathered(number)))


def test_gradients_of_shared_rows_are_those_of_one_process(tmp_path: Path) -> None:
    """Seven rows among two: a contrastive loss, a variance over the batch, a weight behind the gathering, and moved inputs.

    And embeddings put into captions, of whose three one process has two and the other one.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = [
        context.Process(target=_by_several, args=(number, launch.environment(number, 2, tmp_path / "meeting"), queue))
        for number in range(2)
    ]
    for process in started:
        process.start()
    results = sorted(queue.get(timeout=900) for _ in started)
    for process in started:
        process.join()
    expected = _descend()
    assert expected[0][1] < expected[0][0]
    for _, found, chosen, numbers in results:
        assert chosen == "chosen by 0" and numbers == [0, 1]
        for own, wanted in zip(found, expected, strict=True):
            assert torch.allclose(torch.tensor(own), wanted, atol=1e-6)
    assert results[0][1] == results[1][1]  # to the bit


# --- the commands ------------------------------------------------------------------------------------------------------------


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children()
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> RunDir:
    """A run that one process harvested and trained."""
    run = RunDir(tmp_path_factory.mktemp("one") / "run")
    run_alone("train", *TRAIN, "paper", "--dataset", f"pocket:{scenes}", "--run", run)
    return run


def losses(run: RunDir) -> list[tuple[int, str, float]]:
    return [(row["step"], row["split"], row["loss"]) for row in read_jsonl(run.metrics)]


@two_cores
def test_two_processes_train_as_one_and_a_killed_one_costs_nothing(one: RunDir, scenes: Path, tmp_path: Path) -> None:
    """Two processes begin, one of them is killed, one process goes on."""
    run = RunDir(tmp_path / "run")
    arguments = ("train", *TRAIN, "paper", "--dataset", f"pocket:{scenes}", "--run", run)
    process = command(*arguments, "--processes", 2)
    last = run.checkpoints / "last.safetensors"
    while not last.is_file() and process.poll() is None:
        time.sleep(0.02)
    workers(process)[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 2 and errors.count("Error:") == 1 and "Traceback" not in errors
    assert "Process 1 of 2 was ended by SIGKILL" in errors and "run the same command again" in errors
    begun = losses(run)
    assert begun and begun[-1][1] == "validation" and begun[-1][0] >= 1
    run.reopen("train")  # where the kill came behind the last step
    run_alone(*arguments)
    assert losses(run)[: len(begun)] == begun  # nothing was done twice
    for found, expected in zip(losses(run), losses(one), strict=True):
        assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], rel=1e-5)


@two_cores
@pytest.mark.slow
@pytest.mark.parametrize("objective", [("robust",), ("paper", "--towers", "both"), ("emmn",), ("sd", "--lora-rank", "4")])
def test_two_processes_train_every_kind_of_objective_as_one(objective: tuple[str, ...], scenes: Path, tmp_path: Path) -> None:
    """To the end. The default attacks besides: embeddings and words, found alike by both."""
    runs = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    for run, train in zip(runs, (run_alone, run_by_two), strict=True):
        train("train", *TRAIN, *objective, "--dataset", f"pocket:{scenes}", "--run", run)
    for found, expected in zip(losses(runs[1]), losses(runs[0]), strict=True):
        assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], rel=1e-5)


@pytest.fixture(scope="module")
def drawn(one: RunDir, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir, tuple[object, ...]]:
    """Two copies of a run in folders of one name; in the first, one process has drawn and counted."""
    root = tmp_path_factory.mktemp("drawn")
    prompts = root / "prompts.txt"
    prompts.write_text("a bicycle beside a dog\nan apple on a chair\na red bicycle\n", encoding="utf-8")
    flags = ("--device", "cpu", "--prompts", prompts, "--images-per-prompt", 6, "--steps", 2)
    runs = [RunDir(root / name / "run") for name in ("one", "two")]
    for run in runs:
        shutil.copytree(one.path, run.path)
    run_alone("generate", "--run", runs[0], *flags, "--batch-size", 32)
    return runs[0], runs[1], flags


@two_cores
def test_two_processes_draw_the_same_to_the_bit(drawn: tuple[RunDir, RunDir, tuple[object, ...]]) -> None:
    alone, shared, flags = drawn
    result = run_by_two("generate", "--run", shared, *flags, "--batch-size", 3)
    assert result["drawn"] == 36
    for path in sorted(alone.images.rglob("*-seed*.png")):
        with Image.open(path) as image, Image.open(shared.images / path.relative_to(alone.images)) as other:
            assert image.tobytes() == other.tobytes()
    (shared.images / "erased" / "0001-seed3.png").unlink()
    assert run_alone("generate", "--run", shared, *flags)["drawn"] == 1  # one process goes on where two were


@two_cores
@pytest.mark.slow
def test_two_processes_detect_and_count_the_same(drawn: tuple[RunDir, RunDir, tuple[object, ...]]) -> None:
    alone, shared, flags = drawn
    run_alone("generate", "--run", shared, *flags)
    run_alone("evaluate", "--run", alone, "--device", "cpu")
    run_by_two("evaluate", "--run", shared, "--device", "cpu")
    for name in ("original.jsonl", "erased.jsonl"):
        assert (shared.detections / name).read_text() == (alone.detections / name).read_text()
    assert json.loads((shared.report / "evaluation.json").read_text()) == json.loads(
        (alone.report / "evaluation.json").read_text()
    )


@two_cores
@pytest.mark.slow
def test_two_processes_attack_as_one(drawn: tuple[RunDir, RunDir, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared, _ = drawn
    flags = ("--device", "cpu", "--steps", 2, "--candidates", 2, "--images-per-prompt", 2)
    prompts = alone.path.parent / "attacked.txt"
    prompts.write_text(
        "".join(f"a bicycle beside {what}\n" for what in ("a dog", "a cat", "a bus", "an apple")), encoding="utf-8"
    )
    run_alone("attack", "--run", alone, "--prompts", prompts, *flags)
    run_by_two("attack", "--run", shared, "--prompts", prompts, *flags)

    def rows(run: RunDir) -> list[dict[str, Any]]:
        volatile = ("seconds", "seal", "inputs")
        files = (run.attacks / "prefix.jsonl", run.attacks / "control" / "prefix.jsonl")
        return [{key: row[key] for key in row if key not in volatile} for file in files for row in read_jsonl(file)]

    assert rows(shared) == rows(alone)


# --- what must stop it -------------------------------------------------------------------------------------------------------


def test_more_processes_than_devices_are_refused_before_any_is_started(tmp_path: Path) -> None:
    for device, what in (("cpu", f"{parallel.cores()} core"), ("cuda", "graphics card"), ("mps", "1 mps device")):
        if device == "cuda" and torch.cuda.device_count() > 1:
            continue
        flags = ["train", "--concept", "bicycle", "--processes", "999", "--device", device, "--output-root", str(tmp_path)]
        result = CliRunner().invoke(main, flags)
        assert result.exit_code == 2 and what in result.output and result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_processes_under_another_launcher_are_counted_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["train", "--concept", "bicycle", "--processes", "2"])
    assert result.exit_code == 2 and "no other launcher" in result.output


@two_cores
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    process = command("train", "--concept", "bycicle", "--device", "cpu", "--processes", 2, "--output-root", tmp_path)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 2 and errors.count("Error:") == 1 and "did you mean bicycle" in errors
    assert not list(tmp_path.iterdir())


def test_processes_with_other_settings_are_refused(tmp_path: Path) -> None:
    """As torchrun starts them on two machines where somebody changed one command."""
    base = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", parallel.OURS: str(tmp_path / "meeting")}
    started = [
        command("train", "--concept", "bicycle", "--device", "cpu", "--steps", 3 + rank, "--output-root", tmp_path / "out",
                **base, RANK=str(rank))
        for rank in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "".join(ended).count("Error:") == 1 and "Process 1" in "".join(ended) and "'4' for --steps" in "".join(ended)
    assert not (tmp_path / "out").exists()


def test_a_process_that_ends_between_two_looks_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        """A process that runs at the first look and has ended by the next."""

        exitcode, sentinel = 0, object()

        def __init__(self) -> None:
            self.looks = iter([True])

        def is_alive(self) -> bool:
            return next(self.looks, False)

    waited: list[list[Any]] = []
    monkeypatch.setattr(multiprocessing.connection, "wait", lambda sentinels: waited.append(list(sentinels)))
    launch._wait([Ended()])
    assert waited and all(waited)  # `wait` of nothing never comes back


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([2, parallel.ENDED], 2),
        ([parallel.ENDED, 2], 2),
        ([-signal.SIGTERM, 2], 2),
        ([130, 130], 130),
        ([parallel.ENDED, -signal.SIGKILL], "Process 1 of 2 was ended by SIGKILL"),
        ([1, parallel.ENDED], "Process 0 of 2 ended with exit code 1"),
    ],
)
def test_the_launcher_speaks_where_no_process_did(codes: list[int], expected: int | str) -> None:
    if isinstance(expected, int):
        assert launch.explain(codes) == expected
    else:
        with pytest.raises(UserError, match=expected):
            launch.explain(codes)
