"""Every export at the models' full size, from random weights: what is asserted, and (pytest -s) a table of what was measured.

SD 1.5's checkpoint takes 2 GB of disk, SD 2.1's 2.6 GB, SDXL's 7 GB, and the erased encoders up to 3.3 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from erased import erased_run
from ldm import _unet_name, _vae_name, encoders

from sd_erase import bases, components, formats
from sd_erase.components import build_text_encoder
from sd_erase.export.compare import largest_difference
from sd_erase.lora import add_lora

pytestmark = pytest.mark.slow
RANK = 8
PROMPTS = {
    "empty": "",
    "short": "a bicycle",
    "long": "a photo of a red bicycle next to a large brown dog and a small white cat in front of an old house " * 4,
    "weighted": "a (bicycle:1.4) next to a dog",
}
MEMORY_GB = 7.0


def write_checkpoint(name: str, path: Path) -> None:
    """A one-file checkpoint in half precision: the encoders as initialised, all else random, written tensor by tensor."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = bases.CONFIGURATIONS / name
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    attends = unet.config.up_block_types[0] == "CrossAttnUpBlock2D"
    shapes = {f"model.diffusion_model.{_unet_name(key, attends)}": value.shape for key, value in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        stored = _vae_name(key, 4)
        is_attention = ".attn_1." in stored and value.ndim == 2
        shapes[f"first_stage_model.{stored}"] = (*value.shape, 1, 1) if is_attention else value.shape
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        parts = {"text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))}
        if name == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
    finally:
        torch.set_default_dtype(torch.float32)
    text = encoders(SimpleNamespace(**parts))
    codes = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    entries = {
        name: {"dtype": codes[value.dtype], "shape": value.shape, "size": value.numel() * value.element_size()}
        for name, value in text.items()
    }
    entries |= {name: {"dtype": "F16", "shape": shape, "size": 2 * torch.Size(shape).numel()} for name, shape in shapes.items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.02).half()

    def chunks(name: str) -> Any:
        if name in text:
            return [formats.raw_bytes(text[name])]
        count = torch.Size(shapes[name]).numel()
        return (formats.raw_bytes(noise[: min(len(noise), count - start)]) for start in range(0, count, len(noise)))

    formats.write_tensors(path, entries, {"format": "pt"}, chunks)


def export(run: Path, *arguments: object) -> dict[str, Any]:
    """`sd-erase export` in a process of its own: seconds, processor seconds, and peak memory in MB (mapped files included)."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "sd_erase", "export", "--run", run, "--json", *arguments]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, (status, errors)
    result = json.loads(output)
    busy = usage.ru_utime + usage.ru_stime
    return {**result, "seconds": time.perf_counter() - began, "busy": busy, "memory": usage.ru_maxrss / 1024}


def states(folder: Path, state: dict[str, Any], encoder: bases.TextEncoder, tokenizer: Any) -> dict[str, list[torch.Tensor]]:
    """Hidden states -1 and -2 (and the pooled output) of every kind of prompt.

    Weights are applied to the states as ComfyUI does: from those of the empty prompt on.
    """
    model, found = build_text_encoder(folder, state, encoder.pooled), {}
    for kind, prompt in PROMPTS.items():
        weight = 1.4 if kind == "weighted" else 1.0
        text = prompt.replace("(bicycle:1.4)", "bicycle")
        with torch.inference_mode():
            ids = [tokenizer([each], padding="max_length", truncation=True, return_tensors="pt").input_ids for each in (text, "")]
            output, empty = (model(input_ids=each, output_hidden_states=True) for each in ids)
        found[kind] = []
        for layer in (-1, -2):
            value, zero = (each.last_hidden_state if layer == -1 else each.hidden_states[layer] for each in (output, empty))
            weights = torch.ones(1, value.shape[1], 1)
            weights[:, 2] = weight
            found[kind].append(zero + (value - zero) * weights)
        if encoder.pooled:
            found[kind].append(output.text_embeds)
    return found


def check(run: Any, base: bases.Base, read: Any) -> float:
    """The largest relative difference of what was exported from the erased encoders, over all kinds of prompts."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer")
    worst = 0.0
    for encoder in base.encoders:
        folder = run.encoder / encoder.name
        keys = formats.read_header(folder / "model.safetensors").tensors
        expected = states(folder, formats.read_tensors(folder / "model.safetensors", keys), encoder, tokenizer)
        state = read(encoder)
        found = states(folder, {key: state[key] for key in keys}, encoder, tokenizer)
        worst = max(worst, *(largest_difference(expected[kind], found[kind]) for kind in PROMPTS))
    return worst


def test_every_export_at_full_size(tmp_path: Path) -> None:
    wanted = os.environ.get("SD_ERASE_FULL_SIZE", "sd15 sd21 sdxl").split()
    print(
        f"\n{'base':5} {'format':10} {'tensors':>8} {'changed':>8} {'MB':>7} {'seconds':>8} {'CPU s':>6} {'peak MB':>8} {'difference':>11}"
    )
    for name in wanted:
        measure(name, tmp_path)


def measure(name: str, folder: Path) -> None:
    source = folder / f"{name}.safetensors"
    write_checkpoint(name, source)
    base = bases.resolve(str(source))
    _, run = erased_run(folder, base, str(source), rank=RANK)
    before = source.stat()

    def originals() -> dict[str, Any]:
        return {encoder.name: components.text_encoder_state(base, encoder) for encoder in base.encoders}

    for to in ("comfyui", "a1111", "lora", "lora-diff", "diffusers"):
        result = export(run.path, "--to", to, *(["--rank", RANK] if to == "lora" else []))
        paths = [Path(file["path"]) for file in result["files"]]
        if to in ("lora", "lora-diff"):
            difference = check(run, base, lambda encoder, path=paths[0]: add_lora(originals(), path)[encoder.name])
        elif to == "a1111":
            difference = check(run, base, lambda encoder, path=paths[0]: formats.read_encoders(path)[encoder.name])
        else:
            by_name = dict(zip([encoder.name for encoder in base.encoders], paths, strict=True))
            difference = check(
                run, base, lambda encoder, by_name=by_name: next(iter(formats.read_encoders(by_name[encoder.name]).values()))
            )
        (tensors, changed) = (sum(file.get(key, 0) for file in result["files"]) for key in ("tensors", "changed"))
        size = sum(path.stat().st_size for path in paths) / 1e6
        print(
            f"{name:5} {to:10} {tensors:8} {changed or '':>8} {size:7.0f} {result['seconds']:8.1f} {result['busy']:6.1f} {result['memory']:8.0f} "
            f"{difference:11.1e}",
            flush=True,
        )
        assert difference <= 1e-3
        assert result["memory"] <= 1024 * MEMORY_GB
        if to == "a1111":
            assert changed == expected_changes(base, run)
            assert (source.stat().st_mtime_ns, source.stat().st_size) == (before.st_mtime_ns, before.st_size)
        for path in paths:
            path.unlink()
    for path in (source, *run.encoder.glob("*/model.safetensors")):
        path.unlink()


def expected_changes(base: bases.Base, run: Any) -> int:
    """The linear layers of the encoders; query, key and value are one tensor in OpenCLIP's layout."""
    layers = {
        folder.name: json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        for folder in run.encoder.iterdir()
        if folder.is_dir()
    }
    return sum(layers[place.encoder] * (4 if place.open_clip else 6) for place in formats.PLACES[base.family])
