"""What ComfyUI's nodes do, on a stand-in for ComfyUI's CLIP object; with ComfyUI's own code where SD_ERASE_COMFYUI names its folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_api import Small, states

import sd_erase
from sd_erase import bases, comfyui, fingerprints, formats
from sd_erase.errors import UserError

NODES = Path(__file__).parents[1] / "integrations" / "comfyui"


class Clip:
    """The three methods that are asked of ``comfy.sd.CLIP``, with its names; patches are added up as ComfyUI does."""

    def __init__(self, encoders: dict[str, Any], others: tuple[str, ...] = ()):
        self.weights = {
            f"{name}.transformer.{key}": value.detach()
            for name, encoder in encoders.items()
            for key, value in formats.prefixed(encoder.state_dict()).items()
        } | dict.fromkeys(others, torch.zeros(2))
        self.patches: dict[str, list[Any]] = {}

    def clone(self) -> Clip:
        new = copy.copy(self)
        new.patches = {key: list(value) for key, value in self.patches.items()}
        return new

    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        known = [key for key in patches if key in self.weights]
        for key in known:
            self.patches.setdefault(key, []).append((strength_patch, patches[key]))
        return known

    def get_key_patches(self) -> dict[str, Any]:
        return {key: [(value, lambda a, **_: a), *self.patches.get(key, ())] for key, value in self.weights.items()}

    def state(self, name: str) -> dict[str, Any]:
        """The patched weights of one encoder."""
        prefix = f"{name}.transformer."
        found = {key.removeprefix(prefix): value.clone() for key, value in self.weights.items() if key.startswith(prefix)}
        for key, patches in self.patches.items():
            for strength, (value,) in patches:
                found[key.removeprefix(prefix)] += strength * value
        return found


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = sd_erase.load_pocket()
    states(pipeline)
    return pipeline


@pytest.fixture(scope="module")
def changed(pipe: Any) -> sd_erase.Erasure[Any]:
    return sd_erase.erase(pipe, "bicycle", method=f"{Small.__module__}:Small", progress=False)


@pytest.fixture(scope="module")
def files(changed: sd_erase.Erasure[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        form: changed.save(folder / form, form, dtype="float32", rank=1 if form == "lora" else 0)
        for form in ("comfyui", "forge", "lora", "lora-diff")
    }


def same(own: dict[str, Any], encoder: Any, weight: float = 1.0, other: Any = None) -> bool:
    """Whether weights are those of `encoder`, or part of the way from `other`."""
    expected = formats.prefixed(encoder.state_dict())
    start = formats.prefixed((other or encoder).state_dict())
    return all(torch.allclose(own[key], start[key] + weight * (expected[key] - start[key]), atol=1e-5) for key in expected)


@pytest.mark.parametrize("form", ["comfyui", "forge", "lora", "lora-diff"])
def test_every_file_goes_onto_the_connected_encoder_as_far_as_asked(
    pipe: Any, changed: sd_erase.Erasure[Any], files: dict[str, Path], form: str
) -> None:
    clip = Clip({"clip_l": pipe.text_encoder})
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
    clip.add_patches({key: (torch.ones(512),)}, 0.5)  # somebody's LoRA, which stays
    new, about = comfyui.load(clip, files[form], 1.0)
    (strength, (value,)), *others = new.patches.pop(key)
    assert strength == 0.5 and torch.equal(value, torch.ones(512)) and not others
    assert same(new.state("clip_l"), changed.model.text_encoder)
    assert set(clip.patches) == {key} and "bicycle" in about and "WARNING" not in about
    half, about = comfyui.load(Clip({"clip_l": pipe.text_encoder}), files[form], 0.5)
    assert same(half.state("clip_l"), changed.model.text_encoder, 0.5, pipe.text_encoder)
    assert "strength: 0.5" in about and "from: pocket, objective" in about


def test_another_base_is_warned_of_and_another_architecture_refused(pipe: Any, files: dict[str, Path]) -> None:
    tuned = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    _, about = comfyui.load(Clip({"clip_l": tuned}), files["lora"])
    assert "WARNING: The connected text_encoder is not the pocket that the file was made from" in about
    _, about = comfyui.load(Clip({"clip_l": copy.deepcopy(pipe.text_encoder).half()}), files["lora-diff"])
    assert "WARNING" not in about  # rounding is no other base
    with pytest.raises(UserError, match="holds a text_encoder, and the connected CLIP has text_encoder_2"):
        comfyui.load(Clip({"clip_g": pipe.text_encoder}), files["comfyui"])
    with pytest.raises(UserError, match="quantised"):
        comfyui.load(Clip({"clip_l": copy.deepcopy(pipe.text_encoder).to(torch.float8_e4m3fn)}), files["comfyui"])
    with pytest.raises(UserError, match="no CLIP text encoder"):
        comfyui.load(Clip({"t5xxl": pipe.text_encoder}), files["comfyui"])


def test_what_a_file_states_is_shown_and_a_strangers_refused(pipe: Any, files: dict[str, Path], tmp_path: Path) -> None:
    figures = {"bicycle": {"original": [48, 50], "erased": [0, 50]}}
    header = formats.read_header(files["comfyui"])
    tensors = formats.read_tensors(files["comfyui"])
    told = {**header.metadata, "sd_erase.figures": json.dumps(figures)}
    formats.save_tensors(tmp_path / "told.safetensors", tensors, told)
    _, about = comfyui.load(
        Clip({"clip_l": pipe.text_encoder}, ("t5xxl.transformer.shared.weight",)), tmp_path / "told.safetensors"
    )
    assert "measured: bicycle: original 48 of 50 images, erased 0 of 50 images" in about
    assert "WARNING: The erasure is partial: this model reads t5xxl too" in about
    formats.save_tensors(tmp_path / "bare.safetensors", tensors, {"format": "pt"})
    with pytest.raises(UserError, match="does not say what was erased"):
        comfyui.load(Clip({"clip_l": pipe.text_encoder}), tmp_path / "bare.safetensors")
    assert comfyui.is_ours(files["lora"]) and not comfyui.is_ours(tmp_path / "bare.safetensors")
    assert not comfyui.is_ours(tmp_path / "none.safetensors")
    formats.save_tensors(tmp_path / "odd.safetensors", tensors, {**told, "sd_erase.base_print": '{"text_encoder": "?"}'})
    assert "is damaged" in comfyui.load(Clip({"clip_l": pipe.text_encoder}), tmp_path / "odd.safetensors")[1]


def test_a_mark_of_a_base_tells_rounding_from_training(pipe: Any) -> None:
    own = formats.prefixed(pipe.text_encoder.state_dict())
    text = fingerprints.written(own)
    assert len(fingerprints.sample(own)) == 8 * 4 and fingerprints.difference(text, own) < fingerprints.SAME
    scaled = {key: 1.02 * value for key, value in own.items()}
    assert fingerprints.difference(text, scaled) == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_a_concept_goes_from_the_connected_clip_alone(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "configs" / "sd15"
    shutil.copytree(bases.POCKET_FOLDER / "text_encoder", own / "text_encoder")
    monkeypatch.setattr(bases, "CONFIGURATIONS", own.parent)
    clip = Clip({"clip_l": pipe.text_encoder})
    with torch.inference_mode():  # as ComfyUI runs a node
        new, about = comfyui.erase(clip, "bicycle", anchor="kite", keep="motorcycle")
    assert not clip.patches and "bicycle → kite" in about
    erased = copy.deepcopy(pipe.text_encoder)
    erased.load_state_dict({key.removeprefix("text_model."): value for key, value in new.state("clip_l").items()})

    def apart(first: Any, prompt: str, second: Any, other: str) -> float:
        one, two = (
            states(type("P", (), {"tokenizer": pipe.tokenizer, "text_encoder": each}), text)
            for each, text in ((first, prompt), (second, other))
        )
        return float((one - two).norm() / two.norm())

    assert apart(erased, "a bicycle next to a dog", pipe.text_encoder, "a kite next to a dog") < 0.5 * apart(
        pipe.text_encoder, "a bicycle next to a dog", pipe.text_encoder, "a kite next to a dog"
    )
    assert (
        apart(erased, "a dog on the grass", pipe.text_encoder, "a dog on the grass") < 0.2
    )  # 0.15 measured: the closed form keeps least well


def load_nodes(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> Any:
    """The nodes' package as ComfyUI imports it, with a stand-in for its `folder_paths`."""

    class Paths:
        @staticmethod
        def get_filename_list(kind: str) -> list[str]:
            return sorted(path.name for path in folders[kind].glob("*")) if kind in folders else []

        @staticmethod
        def get_full_path(kind: str, name: str) -> str:
            return str(folders[kind] / name)

        get_full_path_or_raise = get_full_path

    monkeypatch.setitem(sys.modules, "folder_paths", Paths)
    spec = importlib.util.spec_from_file_location(
        "sd_erase_nodes", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sd_erase_nodes", module)
    spec.loader.exec_module(module)
    return module


def test_the_nodes_list_our_files_and_hand_on(
    pipe: Any, changed: sd_erase.Erasure[Any], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(files["lora"], tmp_path / "ours.safetensors")
    formats.save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"format": "pt"})
    module = load_nodes(monkeypatch, {"loras": tmp_path})
    node = module.NODE_CLASS_MAPPINGS["SdEraseLoad"]
    assert node.INPUT_TYPES()["required"]["file"] == (["loras/ours.safetensors"],)
    found = getattr(node(), node.FUNCTION)(Clip({"clip_l": pipe.text_encoder}), "loras/ours.safetensors", 1.0)
    clip, about = found["result"]
    assert same(clip.state("clip_l"), changed.model.text_encoder) and found["ui"] == {"text": [about]}
    before = node.IS_CHANGED(file="loras/ours.safetensors")
    os.utime(tmp_path / "ours.safetensors", (1, 1))
    assert node.IS_CHANGED(file="loras/ours.safetensors") != before
    for other in module.NODE_CLASS_MAPPINGS.values():
        assert set(other.INPUT_TYPES()["required"]) == set(other.__dict__[other.FUNCTION].__annotations__) - {"return"}
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()


@pytest.mark.slow
@pytest.mark.skipif("SD_ERASE_COMFYUI" not in os.environ, reason="SD_ERASE_COMFYUI names no checkout of ComfyUI")
def test_comfyuis_own_code_draws_the_same_states_from_the_nodes() -> None:
    """At full size with random weights, in a process of its own: ComfyUI's modules have names such as `utils`."""
    script = Path(__file__).parent / "in_comfyui.py"
    result = subprocess.run(
        [sys.executable, str(script), os.environ["SD_ERASE_COMFYUI"]], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
