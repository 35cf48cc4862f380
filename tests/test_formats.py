"""Names and bytes of the files of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd_erase.formats import (
    HASH,
    checkpoint_family,
    joined,
    parted,
    raw_bytes,
    read_header,
    save_tensors,
    stored_names,
    text_encoder_keys,
    write_tensors,
)


def test_open_clip_keeps_query_key_and_value_as_one_tensor() -> None:
    names = stored_names(text_encoder_keys(1, projection=True), [], "p.", True)
    layer = "text_model.encoder.layers.0.self_attn."
    assert names["p.transformer.resblocks.0.attn.in_proj_weight"] == tuple(f"{layer}{letter}_proj.weight" for letter in "qkv")
    assert names["p.transformer.resblocks.0.mlp.c_proj.bias"] == ("text_model.encoder.layers.0.mlp.fc2.bias",)
    assert {"p.positional_embedding", "p.token_embedding.weight", "p.ln_final.bias", "p.text_projection"} < set(names)
    assert len(names) == 12 + 5


def test_joining_and_parting_are_inverse() -> None:
    parts = [torch.full((2, 3), float(value)) for value in range(3)]
    whole = joined("x.attn.in_proj_weight", parts)
    assert whole.shape == (6, 3) and whole[2:4].eq(1).all()
    assert all(
        torch.equal(part, parts[i]) for i, part in enumerate(parted("x.attn.in_proj_weight", ("0", "1", "2"), whole).values())
    )
    projection = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(joined("text_projection", [projection]), projection.T)
    assert torch.equal(parted("text_projection", ("k",), projection.T)["k"], projection)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["cond_stage_model.transformer.text_model.x"], "sd1"),
        (["cond_stage_model.model.x"], "sd2"),
        (["conditioner.embedders.0.transformer.text_model.x", "conditioner.embedders.1.model.x"], "sdxl"),
        (["conditioner.embedders.0.model.x"], None),  # SDXL's refiner
        (["model.diffusion_model.x"], None),
    ],
)
def test_a_checkpoint_is_known_by_its_last_encoder(names: list[str], family: str | None) -> None:
    assert checkpoint_family(names) == family


def test_a_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    import hashlib

    tensors = {"b": torch.randn(3, 5).half(), "a": torch.tensor(2.0), "c": torch.zeros(0, 4, dtype=torch.bfloat16)}
    codes = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
    entries = {
        name: {"dtype": codes[value.dtype], "shape": value.shape, "size": value.numel() * value.element_size()}
        for name, value in tensors.items()
    }
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, entries, {"format": "pt", "title": "ünïcode"}, lambda name: [raw_bytes(tensors[name])])
    found, header = load_file(path), read_header(path)
    assert list(header.tensors) == ["b", "a", "c"] and all(torch.equal(found[name], value) for name, value in tensors.items())
    assert header.start % 8 == 0 and header.metadata["title"] == "ünïcode"
    assert header.metadata[HASH] == f"0x{digest}" == "0x" + hashlib.sha256(path.read_bytes()[header.start :]).hexdigest()
    json.dumps(header.metadata)


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    """safetensors writes the metadata in another order at every call: two equal trainings had encoders of two hashes."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.float16)}
    about = {
        "sd_erase.concept": 'a "bicycle"\n\t\x01',
        "sd_erase.anchor": "étang \\ 自転車",
        "format": "pt",
        "x": "",
        "sd_erase.base": "pocket",
    }
    for number in range(8):
        save_tensors(tmp_path / f"{number}", tensors, dict(sorted(about.items(), key=lambda item: hash((item, number)))))
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1
    found = load_file(tmp_path / "0")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert read_header(tmp_path / "0").metadata == about
