"""A run directory as the stages leave it, made without training anything."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test asks the hub, nor waits for one that does not answer

with contextlib.suppress(ImportError):  # generated inputs: tests that need them skip without it
    import hypothesis

    hypothesis.settings.register_profile(
        "sd-erase",
        max_examples=int(os.environ.get("SD_ERASE_EXAMPLES", 50)),
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("sd-erase")

from sd_erase import chain, digests
from sd_erase.config import GenerateConfig, HarvestConfig, RunConfig, TrainConfig, dump
from sd_erase.metrics.rates import ImagePair, detection_rates, surplus, surplus_p_values
from sd_erase.rundir import RunDir, read_jsonl, write_json_atomic, write_jsonl_atomic


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes of the pocket world as a data set, to read from."""
    from sd_erase.captions.pocket import render

    folder = tmp_path_factory.mktemp("scenes")
    render(folder, scenes=150)
    return folder


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> tuple[RunConfig, RunDir]:
    """A few pairs of the bicycle, for two steps of any objective."""
    from sd_erase.pairs import harvest

    config = RunConfig(
        concepts=("bicycle",),
        device="cpu",
        harvest=HarvestConfig(dataset=f"pocket:{scenes}", max_forget=24, max_retain=36),
        train=TrainConfig(steps=2, batch_size=6, validate_every=2),
    )
    run = RunDir(tmp_path_factory.mktemp("harvested") / "run")
    run.path.mkdir()
    harvest(config, run)
    return config, run


def finish(run: RunDir, stage: str, inputs: str, result: dict[str, Any], base: str = "pocket") -> dict[str, Any]:
    """Complete `stage` as the stage does: bound by content to what it read and made."""
    links = chain.Chain(run, RunConfig(base=base))
    return run.complete(stage, inputs, {**result, "from": links.reads(stage), "made": links.makes(stage)})


def made_as_it_is(run: RunDir, stage: str, base: str = "pocket") -> None:
    """Let `stage` have read and made what lies in `run` now, which a test changed."""
    manifest = run.read_manifest(stage) or {}
    finish(
        run,
        stage,
        str(manifest.get("inputs")),
        {key: value for key, value in manifest.items() if key not in ("from", "made")},
        base,
    )


def finish_images(run: RunDir, inputs: str = "g") -> None:
    """Complete the stage "generate" with the images that lie in the run, whose index gets their digests."""
    rows = list(read_jsonl(run.images / "index.jsonl"))
    for row in rows:
        sides = {side: row[side] for side in ("original", "erased") if row[side]}
        row["sha256"] = {side: digests.of_file(run.images / name) for side, name in sides.items()}
    write_jsonl_atomic(run.images / "index.jsonl", rows)
    finish(run, "generate", inputs, {"images": 2 * len(rows), "seconds": 3.0})


@pytest.fixture
def settings() -> RunConfig:
    return RunConfig(concepts=("bicycle",), device="cpu", generate=GenerateConfig(prompts=("prompts/bicycle.txt",)))


@pytest.fixture
def run(tmp_path: Path, settings: RunConfig) -> RunDir:
    """A run whose harvest and train stages are complete, with a small random encoder of the pocket model's kind."""
    run = RunDir.create(tmp_path / "outputs", "bicycle", "pocket")
    run.config.write_text(dump(settings), encoding="utf-8")
    concept = {"name": "bicycle", "kind": "object", "words": ["bicycle", "bicycles"], "synonyms": ["bike"], "labels": ["bicycle"]}
    write_json_atomic(run.concepts, [concept])
    write_jsonl_atomic(run.pairs, [])
    finish(run, "harvest", "h", {"counts": {"forget": {"train": 2}, "retain": {"train": 3}}})
    write_encoder(run.encoder / "text_encoder")
    rows = [
        {"step": step, "split": split, "loss": 2.0 / step + 0.1, "terms": {"forget": 1.0 / step, "retain": 1.0 / step + 0.1},
         "learning_rate": 1e-4, "samples_per_second": 50.0}
        for step in range(1, 41) for split in (("train", "validation") if step % 10 == 0 else ("train",))
    ]  # fmt: skip
    write_jsonl_atomic(run.metrics, rows)
    anchor = {"bicycle": "something"}
    finish(run, "train", "t", {"objective": "sd", "steps": 40, "seconds": 12.0, "best_step": 30, "anchor": anchor})
    return run


def write_encoder(folder: Path) -> None:
    """A CLIP text encoder with two layers, in transformers' layout with ``text_model.`` names."""
    import safetensors.torch
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=62, eos_token_id=63, projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPTextModel(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def with_images(run: RunDir) -> RunDir:
    """The same run with four image pairs."""
    from PIL import Image

    rows = []
    for index, prompt in enumerate(["a bicycle next to a dog", "a bike and a <cat> & a bus"]):
        for seed in (0, 1):
            row = {"prompt_index": index, "prompt": prompt, "seed": seed}
            for role, colour in (("original", (200, 30, 30)), ("erased", (30, 120, 200))):
                name = f"{role}/{index:04d}-seed{seed}.png"
                (run.images / role).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64), colour).save(run.images / name)
                row[role] = name
            rows.append(row)
    write_jsonl_atomic(run.images / "index.jsonl", rows)
    finish_images(run)
    return run


@pytest.fixture
def evaluated(with_images: RunDir) -> RunDir:
    """The same run with detections and their evaluation: the bicycle is gone, a fifth of the cats went with it."""
    run = with_images
    index = list(read_jsonl(run.images / "index.jsonl"))
    box = {"score": 0.9, "box": [8.0, 8.0, 40.0, 40.0]}
    for side, labels in (("original", ["bicycle", "dog"]), ("erased", ["dog"])):
        rows = [{"image": row[side], "detections": [{"label": label, **box} for label in labels]} for row in index]
        write_jsonl_atomic(run.detections / f"{side}.jsonl", rows)
    pairs = [
        ImagePair(
            number,
            frozenset({"bicycle"}),
            {"cat": frozenset({"cat"})},
            Counter(["bicycle"] * (number < 98) + ["cat"]),
            Counter(["bicycle"] * (number < 2) + ["cat"] * (number >= 20) + ["bus"] * (number < 7)),
        )
        for number in range(100)
    ]
    targets = {"bicycle": frozenset({"bicycle"})}
    result = {
        "concepts": ["bicycle"],
        "prompts": 50,
        "images": 100,
        "rows": detection_rates(pairs, targets),
        "surplus": {side: surplus(pairs, side, targets) for side in ("original", "erased")},
        "surplus_p": surplus_p_values(pairs, targets),
        "per_prompt": [],
        "warnings": ["The detector has no label for kite: named by prompts but not counted."],
        "detector": {
            "name": "pocket",
            "weights": "model.safetensors",
            "weights_sha256": 64 * "0",
            "image_size": 128,
            "confidence": 0.25,
        },
        "base": "pocket",
    }
    write_json_atomic(run.report / "evaluation.json", result)
    finish(run, "evaluate", "e", result)
    return run


def replaced(settings: RunConfig, section: str, **values: object) -> RunConfig:
    """`settings` with values of one section replaced."""
    return dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **values)})


def last_json(text: str) -> dict:
    """The only line of `text`, as JSON."""
    (line,) = text.strip().splitlines()
    return json.loads(line)
