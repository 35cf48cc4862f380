"""The paper's experiments at full size: CLIP ViT-L/14 from its configuration, with random weights, on real photos.

pytest -m "slow and realdata" tests/test_reproduce_full_size.py -s  # 4 GB of disk, 8 GB of memory, four minutes
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from sd_erase.clip import read_pixels
from sd_erase.metrics.relevance import relevance
from sd_erase.metrics.tasks import embed_texts
from sd_erase.pocket.build import tokenizer
from sd_erase.provenance import peak_memory_mb
from sd_erase.reproduce import Recipe, tables
from sd_erase.reproduce.bench import Bench

FLICKR8K = Path(os.environ.get("SD_ERASE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "flickr8k"
METHOD = {
    "train.objective": "paper", "train.steps": 3, "train.batch_size": 4, "train.validate_every": 3,
    "harvest.max_forget": 8, "harvest.max_retain": 12,
}  # fmt: skip


def large_clip(folder: Path) -> Path:
    """A ViT-L/14 of random weights as a folder that `--base` takes; half precision on disk."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    }
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768,
        "patch_size": 14, "image_size": 224,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="flickr8k is not at hand")
def test_a_large_clip_trains_and_is_measured_on_real_photos(tmp_path: Path) -> None:
    source, data = str(large_clip(tmp_path / "ViT-L-14")), [f"flickr8k:{FLICKR8K}"]
    photos = [str(path) for path in sorted((FLICKR8K / "images").glob("*.jpg"))[:2]]
    bench = Bench(tmp_path / "out", source, data, "cpu")
    started = time.perf_counter()
    tables.retrieval(Recipe("the original", {"captions": ["dog"]}, sizes={"test": 8}), bench)
    print(f"\nretrieval, 8 images with 5 captions: {time.perf_counter() - started:.0f} s; peak {peak_memory_mb():.0f} MB")
    towers, started = bench.original(), time.perf_counter()
    maps = relevance(towers.clip, read_pixels(towers.image_processor, photos), embed_texts(towers, ["a photo of a dog"] * 2))
    print(f"heat maps: {(time.perf_counter() - started) / 2:.1f} s an image; peak {peak_memory_mb():.0f} MB")
    assert maps.shape == (2, 16, 16)
    del towers
    bench = Bench(tmp_path / "out", source, data, "cpu")  # as a resumed command: the original is measured, and not in memory
    found = tables.retrieval(Recipe("both", {"captions": ["dog"]}, {"CLIPErase": METHOD}, sizes={"test": 8}), bench)
    assert {row["method"] for row in found.rows} == {"CLIP", "CLIPErase"}
    run = bench.run(METHOD, "dog", 0, "captions").require("train", "train")
    print(f"training: {run['samples_per_second']} pairs a second, {run['seconds']} s in all")
    assert run["steps"] == 3
    print(f"peak {peak_memory_mb():.0f} MB")
    assert peak_memory_mb() < 7500
