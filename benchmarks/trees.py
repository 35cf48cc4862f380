"""The commit that we are compared with, checked out and installed, and models of full size with random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measured import Result

COMMIT = "c2dbe0e"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Place:
    """Where a benchmark works."""

    folder: Path
    steps: int  # 0: as many as a user's

    def other(self) -> Path:
        """The other commit, installed into a folder of its own without its dependencies, which are ours."""
        target = self.folder / f"sd-erase-{COMMIT}"
        if not target.is_dir():
            source = self.folder / "source"
            shutil.rmtree(source, ignore_errors=True)
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
            subprocess.run(["git", "-C", str(source), "checkout", "--quiet", COMMIT], check=True)
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*install, "--target", str(self.folder / "installing"), str(source)], check=True)
            (self.folder / "installing").rename(target)
            shutil.rmtree(source)
        return target

    def command(self, tree: Path, *arguments: str) -> Result:
        """`sd-erase` of a tree with these arguments, in a process and a working folder of its own."""
        return timed([sys.executable, "-m", "sd_erase", *arguments], tree, self.work())

    def work(self) -> Path:
        """An empty working folder."""
        work = self.folder / "run"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def trained(self, tree: Path, *arguments: str) -> Result:
        """`sd-erase train` in a run that is made for it."""
        return self.command(tree, "train", "--device", "cpu", "--run", "run", *arguments)

    def base(self, family: str) -> Path:
        """A diffusers folder with random text encoders of SD 1.x or SDXL, all that a training reads."""
        return self._made(f"random-{family}", lambda path: _write_base(family, path))

    def matrices(self) -> Path:
        """A file with random keys' and values' matrices of SD 1.5's sixteen cross-attentions, float32."""
        return self._made("random-matrices.safetensors", _write_matrices)

    def clip(self) -> Path:
        """A folder with a CLIP ViT-L/14 of random weights, its tokenizer and its image processor."""
        return self._made("random-clip", _write_clip)

    def _made(self, name: str, write: Callable[[Path], None]) -> Path:
        """What `write` makes, whole, in a call of this or of an earlier command."""
        path = self.folder / name
        if not path.exists():
            write(path.with_suffix(".begun"))
            path.with_suffix(".begun").rename(path)
        return path


def timed(command: list[str], tree: Path, work: Path) -> Result:
    """Wall-clock seconds and peak memory of a process that imports `sd_erase` from `tree`.

    Raises:
        RuntimeError: it failed; its last words are told.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(work / 'log').read_text(errors='replace')[-2000:]}")
    return Result(seconds, usage.ru_maxrss / 1024)


def _write_matrices(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    widths = 5 * [320] + 5 * [640] + 6 * [1280]  # of the blocks down, up and in the middle
    save_file(
        {
            f"{number}.{kind}": torch.randn(width, 768) / 768**0.5
            for number, width in enumerate(widths)
            for kind in ("to_k", "to_v")
        },
        path,
    )


def _write_clip(folder: Path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from sd_erase.bases import POCKET_FOLDER

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    shutil.copytree(POCKET_FOLDER / "tokenizer", folder, dirs_exist_ok=True)


def _write_base(family: str, folder: Path) -> None:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sd_erase.bases import POCKET_FOLDER

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    large = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    huge = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    parts = {"text_encoder": CLIPTextModel(large)}
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    unet = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 64, "cross_attention_dim": 768}
    if family == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(huge)
        index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        unet |= {"sample_size": 128, "cross_attention_dim": 2048, "addition_embed_type": "text_time"}
    for number, (name, model) in enumerate(parts.items()):
        model.save_pretrained(folder / name)
        tokenizer = "tokenizer" + ("_2" if number else "")
        shutil.copytree(POCKET_FOLDER / "tokenizer", folder / tokenizer)
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    for name, values in {
        "unet": unet,
        "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
        "vae": {"_class_name": "AutoencoderKL"},
    }.items():
        index[name] = ["diffusers", values["_class_name"]]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")).write_text(json.dumps(values))
    (folder / "model_index.json").write_text(json.dumps(index))
