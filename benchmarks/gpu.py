"""What a card does (see ``gpu.sh``): a table of seconds, rates and peak memory, each part with a limit of its own.

A part that passes its limit is stopped and said to be over it; one that fails is told with its error's last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from benchmarks.trees import ROOT, Place

SMALL = bool(os.environ.get("SMALL"))
DEVICE = "cpu" if SMALL else "cuda"
CONCEPTS = [line for line in (Path(__file__).parent / "concepts.txt").read_text().splitlines() if line]
BATCHES = (2,) if SMALL else (8, 16)
IMAGES, STEPS, SIDE = (4, 2, 64) if SMALL else (32, 25, 512)
Row = tuple[str, str]


def train(place: Place, name: str, limit: float, *given: str) -> tuple[str, Path]:
    """What `sd-erase train` took, and its encoder's file."""
    run = place.folder / name
    base = "pocket" if SMALL else str(place.base("sd1"))
    limit = 1200 if SMALL else limit
    command = [
        sys.executable,
        "-m",
        "sd_erase",
        "train",
        "--device",
        DEVICE,
        "--run",
        str(run),
        "--data",
        "synthetic",
        "--base",
        base,
    ]
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    file = run / "encoder" / "text_encoder" / "model.safetensors"
    try:
        done = subprocess.run([*command, *given], env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s, stopped", file
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['nothing said'])[-1][:200]}", file
    seconds, made = time.perf_counter() - began, json.loads((run / "manifests" / "train.json").read_text())
    return f"{seconds:.1f} s, training {made['seconds']} s, peak {made['peak_memory_mb']} MB", file


def trainings(place: Place) -> Iterator[Row]:
    few = ("--concept", "bicycle", "--steps", "2" if SMALL else "10", "--validate-every", "5")
    whole = few if SMALL else few[:2]
    yield "default, with its harvest (bar: 15 s, 4.6 GiB)", train(place, "default", 100, *whole)[0]
    (said, one), (again, two) = (train(place, name, 30, *few) for name in ("one", "two"))
    there = one.is_file() and two.is_file()
    same = ("equal bit for bit" if one.read_bytes() == two.read_bytes() else "different") if there else f"{said}; {again}"
    yield f"the same {few[3]} steps twice", same
    yield "--fast, one concept (bar: 2 s)", train(place, "fast", 30, "--fast", "--concept", "bicycle")[0]
    names = [part for name in CONCEPTS[: 2 if SMALL else 100] for part in ("--concept", name)]
    yield f"--fast, {len(names) // 2} concepts (bar: 10 s)", train(place, "many", 60, "--fast", *names)[0]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], times: int) -> float:
    """The mean of `times` calls, behind two that warm up."""
    for _ in range(2):
        work()
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - began) / times * 1e3


def captions() -> Iterator[Row]:
    """Forward and backward of a text encoder alone, for the main batch and for an attack's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if SMALL:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(**size)).to(DEVICE)
    for count, length in ((89, 77), (16, 24)):
        ids = torch.randint(1000, 40000, (count, length), device=DEVICE)

        def step(ids: torch.Tensor = ids) -> None:
            model(ids).last_hidden_state.square().mean().backward()
            model.zero_grad()

        said = []
        for name, tf32, dtype in (("float32", False, None), ("TF32", True, None), ("bfloat16", True, torch.bfloat16)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype is not None):
                said.append(f"{name} {milliseconds(step, 2 if SMALL else 10):.1f}")
        torch.backends.cuda.matmul.allow_tf32 = False
        yield f"step of {count} captions, {length} tokens (ms)", ", ".join(said)


def pipeline() -> object:
    """SD 1.5 with random weights in half precision; the pocket model where small."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from sd_erase import bases
    from sd_erase.components import load_pipeline

    if SMALL:
        return load_pipeline(bases.resolve("pocket"))
    folder = bases.CONFIGURATIONS / "sd15"
    config = {name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    with torch.device(DEVICE):
        unet = diffusers.UNet2DConditionModel.from_config(config["unet"])
        vae = diffusers.AutoencoderKL.from_config(config["vae"])
        text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
    made = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer"),
        scheduler=diffusers.DDIMScheduler.from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text())),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(DEVICE, torch.float16)  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def drawing(folder: Path) -> Iterator[Row]:
    """Images a second, PNGs written: the loop of a diffusers user at each batch, then ours at its best one."""
    from sd_erase.drawing import Batches, Job, Settings, save_png

    pipe = pipeline()
    jobs = [Job(number, f"a photo of a bicycle beside {number // 2} dogs", number) for number in range(IMAGES)]

    def plain(size: int) -> None:
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            drawn = pipe(
                [job.prompt for job in part], num_inference_steps=STEPS, guidance_scale=7.5, height=SIDE, width=SIDE,
                generator=[torch.Generator().manual_seed(job.seed) for job in part],
            ).images  # fmt: skip
            for job, image in zip(part, drawn, strict=True):
                image.save(folder / job.file_name)

    def ours(size: int) -> None:
        settings = Settings(0, 1, STEPS, 7.5, SIDE, SIDE, batch_size=size)
        Batches(size).write(pipe, jobs, settings, lambda job, image: save_png(image, folder / job.file_name, {}), lambda _: None)

    def rate(work: Callable[[int], None], size: int) -> float:
        synchronize()
        began = time.perf_counter()
        work(size)
        synchronize()
        return len(jobs) / (time.perf_counter() - began)

    pipe(["warm"] * 2, num_inference_steps=2, height=SIDE, width=SIDE)
    rates = {size: rate(plain, size) for size in BATCHES}
    best = max(rates, key=lambda size: rates[size])
    yield (
        f"plain loop, {SIDE} px, {STEPS} steps (images a second)",
        ", ".join(f"{one:.2f} at {size}" for size, one in rates.items()),
    )
    own = rate(ours, best)
    yield "ours (bar: 1.5 times)", f"{own:.2f} at {best}: {own / rates[best]:.2f} times"
    if not SMALL:  # whose compilation takes longer than all else here
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet.compile()
        began = time.perf_counter()
        pipe(["warm"] * best, num_inference_steps=2, height=SIDE, width=SIDE)
        warm, compiled = time.perf_counter() - began, rate(plain, best)
        yield "plain loop, compiled, channels-last", f"{compiled:.2f} at {best}, behind {warm:.0f} s of compiling"
    if DEVICE == "cuda":
        yield "drawing's peak memory", f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MB"


def main() -> None:
    """Print the table, row by row; exit code 1 where a part failed."""
    click.echo(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU, tiny settings'}")
    click.echo("| what | seen |\n| --- | --- |")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in (lambda: trainings(Place(folder, 0)), captions, lambda: drawing(folder)):
            try:
                for what, seen in part():
                    click.echo(f"| {what} | {seen} |")
                    failed |= "failed: " in seen
            except Exception as error:  # the other parts are wanted all the same
                click.echo(f"| {type(error).__name__} | {str(error)[:300]} |")
                failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
