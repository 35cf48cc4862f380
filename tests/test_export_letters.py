"""What exported files hold and what inspecting says, to the letter, on files of a few numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import replaced
from safetensors.torch import load_file, save_file

from sd_erase import __version__, components, fingerprints, formats
from sd_erase.bases import ROWS, resolve
from sd_erase.config import RunConfig
from sd_erase.errors import UserError
from sd_erase.export import compare, diffusers, integrity, metadata, modelspec, numbers, statement
from sd_erase.export.encoders import examine, position_id_problems
from sd_erase.export.job import Job, check_space, file_name, rounded, save
from sd_erase.export.metadata import inspect_file
from sd_erase.export.text_encoder import export, vision_name
from sd_erase.formats import Header, read_header
from sd_erase.lora import add_lora
from sd_erase.rundir import RunDir

LAYER = "text_model.encoder.layers.0"


def told(function: Callable[..., object], *values: object, **settings: object) -> str:
    """What the refusal says."""
    with pytest.raises(UserError) as error:
        function(*values, **settings)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a safetensors file."""

    def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, name: str = "x.safetensors") -> Path:
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return written


def encoder(width: int = 4, layers: int = 1, words: int = 5, positions: int = 3) -> dict[str, torch.Tensor]:
    """A CLIP text encoder under Hugging Face's names, of ones."""
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (words, width),
        "text_model.embeddings.position_embedding.weight": (positions, width),
    }
    for layer in range(layers):
        start = f"text_model.encoder.layers.{layer}"
        shapes |= {f"{start}.self_attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
        shapes |= {f"{start}.self_attn.{part}_proj.bias": (width,) for part in ("q", "k", "v", "out")}
        shapes |= {f"{start}.mlp.fc1.weight": (2 * width, width), f"{start}.mlp.fc1.bias": (2 * width,)}
        shapes |= {f"{start}.mlp.fc2.weight": (width, 2 * width), f"{start}.mlp.fc2.bias": (width,)}
        shapes |= {f"{start}.layer_norm{number}.{kind}": (width,) for number in (1, 2) for kind in ("weight", "bias")}
    shapes |= {f"text_model.final_layer_norm.{kind}": (width,) for kind in ("weight", "bias")}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


# --- what is written ----------------------------------------------------------------------------------------------------------


def test_the_manifest_and_the_header_of_an_encoders_file(settings: RunConfig, run: RunDir) -> None:
    manifest = export(settings, run)
    (entry,) = manifest["files"]
    path = run.export / "bicycle-pocket-text_encoder-fp16.safetensors"
    content, header = path.read_bytes(), read_header(path)
    data = hashlib.sha256(content[header.start :]).hexdigest()
    assert 0 < entry.pop("difference") < 0.02
    assert entry == {
        "path": str(path),
        "encoder": "text_encoder",
        "tensors": 36,
        "bytes": len(content),
        "dtype": "float16",
        "sha256": hashlib.sha256(content).hexdigest(),
        "data_sha256": data,
    }
    base = components.text_encoder_state(ROWS["pocket"], ROWS["pocket"].encoders[0])
    advice = "the pocket model is for learning and testing: its encoder fits no checkpoint of theirs"
    assert manifest["programs"] == [{"programs": "other programs", "advice": advice, "works": False}]
    assert (manifest["stage"], manifest["warnings"]) == ("export-comfyui", [])
    assert list(manifest["from"]["encoder"]) == ["encoder/text_encoder/config.json", "encoder/text_encoder/model.safetensors"]
    assert header.metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/text-encoder",
        "modelspec.implementation": "https://github.com/huggingface/transformers",
        "modelspec.title": "pocket text_encoder without bicycle",
        "modelspec.description": "CLIP text encoder from which sd-erase erased bicycle (objective sd).",
        "modelspec.author": "sd-erase",
        "modelspec.date": Job.of(settings, run).date,
        "modelspec.hash_sha256": f"0x{data}",
        "sd_erase.version": __version__,
        "sd_erase.concept": "bicycle",
        "sd_erase.anchor": '{"bicycle": "something"}',
        "sd_erase.objective": "sd",
        "sd_erase.base": "pocket",
        "sd_erase.run": run.name,
        "sd_erase.base_print": json.dumps({"text_encoder": fingerprints.written(base)}),
        "sd_erase.programs": f"Not for other programs: {advice}",
        "sd_erase.encoder": "text_encoder",
        "sd_erase.content_sha256": integrity.stored_content(header),
    }


def test_what_inspecting_says_of_it(settings: RunConfig, run: RunDir) -> None:
    path = Path(export(settings, run)["files"][0]["path"])
    found = inspect_file(path)
    assert found.pop("metadata") == read_header(path).metadata
    assert found == {
        "file": str(path),
        "kind": "CLIP text encoder of width 16",
        "tensors": 36,
        "parameters": 6736,
        "bytes": path.stat().st_size,
        "dtypes": ["F16"],
        "layers": 2,
        "rank": None,
        "concept": "bicycle",
        "anchor": '{"bicycle": "something"}',
        "objective": "sd",
        "base": "pocket",
        "run": run.name,
        "sd_erase": __version__,
        "hash": "matches",
        "notes": ["text_model.embeddings.token_embedding.weight has 64 words, not CLIP's 49408"],
        "problems": [],
    }


def test_the_model_card_to_the_letter(settings: RunConfig, run: RunDir) -> None:
    job = Job.of(settings, run)
    assert (
        diffusers.model_card(job)
        == f"""\
---
license: other
license_name: {job.base.licence}
library_name: diffusers
tags: [concept-erasure, machine-unlearning, stable-diffusion]
---

# {job.base.title} without bicycle

The text encoder of pocket, from which sd-erase {__version__} erased:

- **bicycle**: bicycle, bicycles, bike; in its place "something"

## How

Objective `sd`, 40 steps, seed 0, ended {job.date}, run `{run.name}`. The denoiser and the autoencoder are unchanged.

## Measured

No figures of this encoder are known (no images were drawn yet): run `sd-erase generate`, then `sd-erase evaluate`, then export again.

## Use

```python
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

dtype = torch.float16
pipe = StableDiffusionPipeline.from_pretrained(
    "BASE_MODEL",
    text_encoder=CLIPTextModel.from_pretrained("THIS_FOLDER", subfolder="text_encoder", torch_dtype=dtype),
    torch_dtype=dtype,
)
```

## Limits

- The denoiser still knows the concept: another text encoder, or a trained embedding (textual inversion), brings it back. \
This protects what is published or hosted, not a file in the hands of somebody who wants to undo it.
- Words and paraphrases that were neither listed nor tried may still lead to the concept.
- What was not measured above is not known.

## Licence

The base model's licence governs this derivative too: {job.base.licence}.
"""
    )
    pipeline = diffusers.model_card(Job.of(replaced(settings, "export", pipeline=True, dtype="float32"), run))
    assert pipeline.partition("## Use\n")[2].partition("## Limits")[0] == (
        "\n```python\nimport torch\nfrom diffusers import StableDiffusionPipeline\n\ndtype = torch.float32\n"
        'pipe = StableDiffusionPipeline.from_pretrained("THIS_FOLDER", torch_dtype=dtype)\n```\n\n'
    )


def test_a_card_names_what_is_spared_and_how_it_was_trained(settings: RunConfig, run: RunDir) -> None:
    concepts = [
        {"name": "bicycle", "words": ["bicycle"], "spared": ["bicycle lane", "{red|blue} bicycle", "bicycle + {ball}", "exercise bicycle"]},
        {"name": "dog", "words": ["dog", "dogs"]},
    ]  # fmt: skip
    job = Job.of(settings, run)
    run.concepts.write_text(json.dumps(concepts))
    card = diffusers.model_card(
        Job(job.config, job.run, job.base, job.encoders, {**job.trained, "lora_rank": 4, "steps": 7}, job.progress, job.links)
    )
    assert '- **bicycle**: bicycle; in its place "something"; spared: bicycle lane, exercise bicycle\n' in card
    assert "- **dog**: dog, dogs; in its place nothing\n" in card
    assert "Objective `sd`, 7 steps, seed 0, ended " in card and f"`{run.name}`, LoRA of rank 4. The denoiser" in card


@pytest.mark.parametrize(
    ("concepts", "name"),
    [
        (("bicycle",), "bicycle"),
        (("Hot Dog", "caf\u00e9/bar"), "hot_dog-caf\u00e9_bar"),
        (("x" * 70,), "x" * 60),
        (("a" * 29, "b" * 30), f"{'a' * 29}-{'b' * 30}"),  # sixty bytes
        (("a" * 30, "b" * 30), f"{'a' * 30}-and_1_more"),
        (("a" * 20, "b" * 20, "c" * 20, "d"), f"{'a' * 20}-{'b' * 20}-and_2_more"),
    ],
)
def test_the_concepts_as_part_of_a_files_name(run: RunDir, concepts: tuple[str, ...], name: str) -> None:
    config = RunConfig(concepts=concepts)
    job = Job(config, run, resolve("pocket"), (), {}, None, None)  # type: ignore[arg-type]
    assert (job.concept_name, job.stem, job.concept) == (name, f"{name}-pocket", ", ".join(concepts))
    assert job.objective == config.train.objective
    own = Job(RunConfig(concept_file="here/My Card.yaml"), run, resolve("pocket"), (), {"objective": "z"}, None, None)  # type: ignore[arg-type]
    assert (own.concept_name, own.concept, own.objective) == ("my_card", "My Card", "z")


def test_a_part_of_a_files_name_is_cut_between_letters() -> None:
    assert file_name("-_.A b\u00e9.", 60) == "a_b\u00e9" and file_name("???", 60) == "x"
    assert file_name("ab\u00e9\u00e9", 5) == "ab\u00e9" and file_name("ab-cd", 3) == "ab"


def test_where_a_file_may_be_written(settings: RunConfig, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(**values: Any) -> Job:
        return Job.of(replaced(settings, "export", **values), run)

    (tmp_path / "text").write_text("")
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "else.safetensors").write_bytes(b"x")
    assert job().target("a.safetensors") == run.export / "a.safetensors"
    assert job(output=str(tmp_path / "there")).target("a.safetensors") == tmp_path / "there" / "a.safetensors"
    assert job(output=str(tmp_path / "b.safetensors")).target("a") == tmp_path / "b.safetensors"
    assert job(output=str(tmp_path / "dir.safetensors")).target("a") == tmp_path / "dir.safetensors" / "a"
    output = f"Output {tmp_path}"
    says = f"{output}/text is neither a folder nor a .safetensors file: pass one of these with --output."
    assert told(job(output=str(tmp_path / "text")).folder) == says
    says = f"{output}/dir.safetensors is a folder of that name: pass another file with --output."
    assert told(job().check_target, tmp_path / "dir.safetensors") == says
    says = (
        f"{output}/else.safetensors exists and was not written by sd-erase, or was changed since: remove it, pass another file with "
        "--output, or pass --force to replace it."
    )
    assert told(job().check_target, tmp_path / "else.safetensors") == says
    job(force=True).check_target(tmp_path / "else.safetensors")
    says = f"Output {run.pairs} is one of the files of run {run}, which stay as they are: pass another --output."
    assert told(job(force=True).check_place, run.pairs) == says
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3_000_000}))
    check_space(tmp_path / "new" / "er", 3_000_000 - 2**20)
    assert (tmp_path / "new" / "er").is_dir()
    says = f"no space left on {tmp_path} (2 MB needed, 3 MB free): free some, or pass another folder with --output."
    assert told(check_space, tmp_path, 3_000_000 - 2**20 + 1) == says
    says = f"{output}/text/er cannot be written (Not a directory): pass another folder with --output."
    assert told(check_space, tmp_path / "text" / "er", 0) == says


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    assert rounded("x", torch.ones(2, 3).T, "bfloat16").is_contiguous()
    says = "Tensor x does not fit float16 or is not finite: pass --dtype float32."
    assert told(rounded, "x", torch.tensor([1.0, 1e6]), "float16") == says
    tensors = {"b": torch.ones(2, dtype=torch.float16), "a": torch.zeros(3, 1, dtype=torch.float16)}
    digest = save(tmp_path / "x", {name: (lambda name=name: tensors[name]) for name in tensors}, "float16", {"k": "v"})
    header = read_header(tmp_path / "x")
    assert digest == integrity.data_sha256(header) and header.metadata["k"] == "v"
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.tensors.items()} == {
        "b": ("F16", [2]),
        "a": ("F16", [3, 1]),
    }
    other = iter(range(9))
    with pytest.raises(RuntimeError, match="x does not hold the tensors that were written: the disk or its driver is at fault"):
        save(tmp_path / "x", {"a": lambda: torch.full((1,), next(other)).half()}, "float16", {})


@pytest.mark.parametrize(("width", "name"), [(768, "vit-l"), (1024, "vit-h"), (1280, "vit-g"), (16, "")])
def test_what_clip_calls_an_encoder(width: int, name: str) -> None:
    assert vision_name(width) == name


def test_modelspecs_fields() -> None:
    fields = modelspec.modelspec("T", "D", resolve("sd21"), "", "")
    assert fields == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": modelspec.architecture(resolve("sd21")),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "T",
        "modelspec.description": "D",
        "modelspec.author": "sd-erase",
    }
    assert (
        modelspec.modelspec("T", "D", resolve("sdxl"), "lora", "2020")["modelspec.architecture"]
        == "stable-diffusion-xl-v1-base/lora"
    )
    assert [modelspec.kohya_version(resolve(name)) for name in ("sd15", "sdxl")] == ["sd_v1", "sdxl_base_v1-0"]


# --- formats ------------------------------------------------------------------------------------------------------------------


def test_names_in_each_layout() -> None:
    keys = formats.text_encoder_keys(1)
    assert keys == set(encoder())
    assert formats.text_encoder_keys(0, projection=True) - formats.text_encoder_keys(0) == {"text_projection.weight"}
    assert formats.linear_modules(2)[:7] == [
        *(f"{LAYER}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        f"{LAYER}.mlp.fc1",
        f"{LAYER}.mlp.fc2",
        "text_model.encoder.layers.1.self_attn.q_proj",
    ]
    (place,), first = formats.PLACES["sd1"], formats.PLACES["sdxl"][0]
    assert formats.lora_name(f"{LAYER}.mlp.fc1", place) == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert formats.lora_name("a.b", first) == "lora_te1_a_b"
    assert formats.stored_names(["text_model.a", "text_model.b"], ["p.a"], "p.", False) == {
        "p.a": ("text_model.a",),
        "p.text_model.b": ("text_model.b",),
    }
    assert formats.count_layers(["x.layers.3.y", "resblocks.11.z", "layers.x"]) == 12
    assert formats.count_layers(["layers.999999999.x"]) == 1000 and formats.count_layers(["x"]) == 0
    state = formats.prefixed(
        {
            "a": torch.ones(2, 3).T,
            "text_model.b": torch.ones(1),
            "text_projection.weight": torch.ones(1),
            "x.position_ids": torch.ones(1),
        }
    )
    assert set(state) == {"text_model.a", "text_model.b", "text_projection.weight"} and state["text_model.a"].is_contiguous()
    assert formats.encoder_names(["a", "cond_stage_model.transformer.x", "cond_stage_model.y"]) == [
        "cond_stage_model.transformer.x"
    ]
    assert formats.encoder_names(["a", "b"]) == []


def test_the_bytes_of_a_written_file(tmp_path: Path) -> None:
    name = "cond_stage_model.transformer.x"
    tensors = {"b": b"\x01\x02\x03\x04", name: b"\x05\x06"}
    entries = {"b": {"dtype": "F16", "shape": (2, 1), "size": 4}, name: {"dtype": "F16", "shape": (1,), "size": 2}}
    digest = formats.write_tensors(tmp_path / "x", entries, {"a": "z"}, lambda name: [tensors[name][:1], tensors[name][1:]])
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    hashes = {key: hashlib.sha256(value).hexdigest() for key, value in tensors.items()}
    rows = [["b", "F16", [2, 1], hashes["b"]], [name, "F16", [1], hashes[name]]]
    assert content[8 + length :] == b"\x01\x02\x03\x04\x05\x06" and length % 8 == 0 and b": " not in content
    assert digest == hashlib.sha256(content[8 + length :]).hexdigest()
    assert header == {
        "__metadata__": {
            "a": "z",
            "modelspec.hash_sha256": f"0x{digest}",
            "sd_erase.content_sha256": hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest(),
            "sd_erase.encoder_sha256": hashlib.sha256(json.dumps(rows[1:], separators=(",", ":")).encode()).hexdigest(),
        },
        "b": {"dtype": "F16", "shape": [2, 1], "data_offsets": [0, 4]},
        name: {"dtype": "F16", "shape": [1], "data_offsets": [4, 6]},
    }
    assert list(header) == ["__metadata__", "b", name]
    assert formats.content_sha256(entries, dict(reversed(hashes.items()))) == header["__metadata__"]["sd_erase.content_sha256"]


# --- the numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinities_are_counted_in_each_type(file: Callable[..., Path], dtype: torch.dtype) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.5, -math.nan]).to(dtype)
    finite = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny], dtype=torch.float64)
    found = numbers.scan(
        read_header(
            file({"a": values, "b": (-torch.zeros(2, 1)).to(dtype), "c": finite.to(dtype), "d": torch.zeros(0, 2, dtype=dtype)})
        )
    )
    assert found == {
        "a": numbers.Numbers(8, 2, 2, False),
        "b": numbers.Numbers(2, 0, 0, True),
        "c": numbers.Numbers(3, 0, 0, False),
        "d": numbers.Numbers(0, 0, 0, True),
    }


def test_nan_is_counted_in_the_types_without_infinities(file: Callable[..., Path]) -> None:
    import safetensors.torch

    if torch.float8_e4m3fnuz not in safetensors.torch._SIZE:
        pytest.skip("this version of safetensors saves no float8_e4m3fnuz")
    values = torch.tensor([0x7F, 0xFF, 0x80, 0, 1], dtype=torch.uint8)
    path = file(
        {
            "a": values.clone().view(torch.float8_e4m3fn),
            "b": values.clone().view(torch.float8_e4m3fnuz),
            "c": values,
            "z": torch.zeros(4, dtype=torch.int32),
        }
    )
    found = numbers.scan(read_header(path))
    assert {name: each.not_a_number for name, each in found.items()} == {"a": 2, "b": 1, "c": 0, "z": 0}
    assert {name: each.is_zero for name, each in found.items()} == {"a": False, "b": False, "c": False, "z": True}


def test_numbers_are_read_block_by_block(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "BLOCK", 16)
    values = torch.zeros(11)
    values[[3, 4, 10]] = torch.tensor([math.nan, math.inf, math.nan])
    found = numbers.scan(read_header(file({"a": torch.zeros(7), "b": values})))
    assert found == {"a": numbers.Numbers(7, 0, 0, True), "b": numbers.Numbers(11, 2, 1, False)}


def test_what_is_said_of_numbers() -> None:
    found = {
        "a": numbers.Numbers(9, 2, 0, False),
        "b": numbers.Numbers(4, 1, 3, False),
        "c": numbers.Numbers(1, 0, 0, True),
        "d": numbers.Numbers(0, 0, 0, True),
    }
    advice = "images will be black or noise; download it again, or get another file."
    assert numbers.not_finite(found) == [
        f"2 of 4 tensors hold NaN, first a (2 of its 9 numbers): {advice}",
        f"1 of 4 tensors hold infinite numbers, first b (3 of its 4 numbers): {advice}",
    ]
    assert numbers.not_finite({"c": found["c"]}) == []
    assert numbers.all_zero(found, ["x", "d", "b", "c", "c"]) == [
        "2 of its weights are all zero, first c: what it should hold is lost."
    ]
    assert numbers.all_zero(found, ["a", "d"]) == []


def header_of(types: dict[str, str], path: str = "x") -> Header:
    entries = {name: {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 0]} for name, dtype in types.items()}
    return Header(path=Path(path), tensors=entries, metadata={}, start=0)


def test_what_is_said_of_quantised_weights() -> None:
    plain = header_of({"a": "F16", "b": "I8", "c": "I8", "d": "F8_E4M3"})
    assert numbers.quantised(plain, ["a", "b", "c", "d", "x"]) == (
        ["1 of its weights are fp8 (F8_E4M3), with some three digits: erase from a file of float16 or float32"],
        [
            "2 of its weights are int8 (I8) and no scales stand beside them: it was quantised, and programs would take those for the "
            "weights; get the file in float16 or float32."
        ],
    )
    made = header_of(
        {"a.weight": "U8", "a.weight.absmax": "F32", "b.weight": "F8_E4M3", "b.scale_weight": "F32", "c.quant_state.x": "U8"}
    )
    by = ", in the form of ComfyUI and bitsandbytes"
    assert numbers.quantised(made, ["a.weight", "b.weight"]) == (
        [
            f"quantised: 1 of its weights are uint8{by}; programs that do not know that form load wrong numbers",
            f"1 of its weights are fp8 (F8_E4M3){by}, with some three digits: erase from a file of float16 or float32",
        ],
        [],
    )
    assert numbers.quantised(plain, ["a"]) == ([], [])
    assert numbers.companions(["a", "b.SCB", "c._scale", "d.g_idx", "e.zero_point", "scaled_fp8", "f.quant_state.bnb"]) == {
        "b.SCB": "bitsandbytes",
        "c._scale": "optimum-quanto",
        "d.g_idx": "GPTQ or AWQ",
        "e.zero_point": "SDNQ",
        "scaled_fp8": "ComfyUI",
        "f.quant_state.bnb": "bitsandbytes",
    }


# --- text encoders ------------------------------------------------------------------------------------------------------------


def examined(path: Path, prefix: str = "", open_clip: bool = False, projection: bool = False) -> Any:
    header = read_header(path)
    return examine(header, numbers.scan(header), prefix, open_clip, projection)


WORDS = "text_model.embeddings.token_embedding.weight has 5 words, not CLIP's 49408"
POSITIONS = "text_model.embeddings.position_embedding.weight has 3 positions, not CLIP's 77"


def test_a_sound_encoder_has_no_problems(file: Callable[..., Path]) -> None:
    found = examined(file({**encoder(layers=2), "logit_scale": torch.ones(()), "odd": torch.ones(1), "a.SCB": torch.ones(1)}))
    assert (found.width, found.layers, found.foreign, found.problems) == (4, 2, ["odd"], [])
    assert sorted(found.notes) == sorted([WORDS, POSITIONS])


def test_what_is_wrong_with_an_encoder_is_said(file: Callable[..., Path]) -> None:
    state = encoder(layers=2)
    del state[f"{LAYER}.mlp.fc1.bias"], state[f"{LAYER}.layer_norm1.bias"]
    state[f"{LAYER}.self_attn.q_proj.weight"] = torch.ones(4, 3)
    state[f"{LAYER}.mlp.fc2.weight"] = torch.ones(4, 7)
    state[f"{LAYER}.mlp.fc2.bias"] = torch.ones(1, 4)
    state[f"{LAYER}.self_attn.k_proj.weight"] = torch.zeros(4, 4)
    found = examined(file(state))
    assert found.problems == [
        f"2 tensors of the encoder are missing, first {LAYER}.layer_norm1.bias.",
        f"3 tensors of the encoder have a wrong shape, first {LAYER}.mlp.fc2.bias [1, 4] in place of [4].",
        f"1 of its weights are all zero, first {LAYER}.self_attn.k_proj.weight: what it should hold is lost.",
    ]
    assert examined(file({"text_model.x": torch.ones(1)})).width == 0


def test_a_vocabulary_or_positions_of_another_size_are_said(file: Callable[..., Path]) -> None:
    (more,) = [note for note in examined(file(encoder(words=49410, positions=77))).notes]
    assert more == (
        "its vocabulary has 2 rows more than CLIP's 49408 (tokens that were added): ComfyUI, A1111 and Forge refuse it or ignore them"
    )
    assert examined(file(encoder(words=49408, positions=77))).notes == []
    found = examined(file(encoder(width=128, positions=78)))
    assert sorted(found.problems) == [
        "text_model.embeddings.position_embedding.weight has 78 positions, not CLIP's 77: no program can load it.",
        f"{WORDS}: no program can load it.",
    ]
    assert found.notes == []


def test_openclips_joined_tensors_have_their_own_shapes(file: Callable[..., Path]) -> None:
    keys = formats.stored_names({*encoder(), "text_projection.weight"}, (), "p.", True)
    state = {**encoder(), "text_projection.weight": torch.ones(6, 4)}
    stored = {name: formats.joined(name, [state[key] for key in parts]) for name, parts in keys.items()}
    found = examined(file(stored), "p.", True, True)
    assert (found.width, found.layers, found.foreign, found.problems) == (4, 1, [], [])
    assert stored["p.transformer.resblocks.0.attn.in_proj_weight"].shape == (12, 4) and stored["p.text_projection"].shape == (
        4,
        6,
    )
    turned = examined(file({**stored, "p.text_projection": torch.ones(6, 4)}), "p.", True, True)
    assert turned.problems == ["1 tensors of the encoder have a wrong shape, first p.text_projection [6, 4] in place of [4, 4]."]
    joined = examined(file({**stored, "p.transformer.resblocks.0.attn.in_proj_bias": torch.ones(4)}), "p.", True, True)
    assert "attn.in_proj_bias [4] in place of [12]." in joined.problems[0]


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        (torch.arange(3)[None], ""),
        (torch.arange(3.0), ""),
        (torch.arange(4)[None], "has 4 positions"),
        (torch.tensor([0, 1, 1]), "is not 0 to 2"),
        (torch.zeros(0, dtype=torch.int64), "is not 0 to 0"),
        (torch.arange(3)[None, None], "is I64 of shape [1, 1, 3]"),
        (torch.arange(4097), "is I64 of shape [4097]"),
        (torch.arange(4096), "has 4096 positions"),
    ],
)
def test_position_ids_that_merges_left_broken_are_said(file: Callable[..., Path], ids: torch.Tensor, fault: str) -> None:
    header = read_header(file({**encoder(), "text_model.embeddings.position_ids": ids, "other.embeddings.position_ids": ids + 1}))
    says = (
        f"text_model.embeddings.position_ids of x.safetensors {fault}, as some merges leave it: programs that read it see prompts "
        "scrambled; repair the file."
    )
    assert position_id_problems(header, "text_model.") == ([says] if fault else [])


# --- inspecting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "kind", "notes", "problems"),
    [
        ({"lora_te_a.lora_up.weight": (2, 3), "lora_te_a.lora_down.weight": (3, 5), "lora_unet_b.alpha": (), "lora_unet_b.diff": (2, 2)},
         "Exact change of weights (.diff) that changes the text encoder",
         ["2 modules in kohya's naming, 1 of them of a text encoder"], []),
        ({"unet.a.lora_A.weight": (3, 5), "unet.a.lora_B.weight": (2, 3), "unet.b.lora_A.default.weight": (3, 5)},
         "LoRA without a text encoder part",
         ["2 modules in diffusers' naming, 0 of them of a text encoder"], ["unet.b has lora_A.weight without its other half."]),
        ({"lora_te_encoder_x.lora_up.weight": (2, 3), "lora_te_encoder_x.lora_down.weight": (4, 5), "lora_te_encoder_x.alpha": (2,), "lora_te_c.alpha": (), "lora_te_c.diff_b": (3,)},
         "LoRA that changes the text encoder",
         ["2 modules in kohya's naming, 2 of them of a text encoder"],
         ["lora_te_c has alpha and diff_b alone, for which A1111 rejects the whole file.",
          "2 of its tensors have a wrong shape, first lora_te_encoder_x.alpha [2].",
          "its names lack text_model_, so no program applies them to the text encoder."]),
        ({"lora_te_a.lora_up.weight": (2,), "lora_te_a.lora_down.weight": (2, 3)}, "LoRA that changes the text encoder",
         ["1 modules in kohya's naming, 1 of them of a text encoder"],
         ["1 of its tensors have a wrong shape, first lora_te_a.lora_up.weight [2] on [2, 3]."]),
        ({"down_blocks.0.x": (2, 2)}, "UNet (diffusers)", [], []),
        ({"first_stage_model.decoder.x": (2, 2)}, "autoencoder", [], []),
        ({"decoder.x": (2, 2)}, "autoencoder", [], []),
        ({"encoder.block.0.x": (2, 2)}, "T5 text encoder", [], []),
        ({"x.shared.weight": (2, 2)}, "T5 text encoder", [], []),
        ({"model.double_blocks.0.x": (2, 2)}, "diffusion transformer (FLUX.1, Stable Diffusion 3)", [], []),
        ({"x": (2, 2), "y_ids": (2, 2)}, "unknown", [], []),
        ({"transformer.resblocks.0.x": (2, 2), "visual.x": (2, 2)}, "CLIP model with both towers in OpenCLIP's layout", [], []),
        ({"model.diffusion_model.x": (2, 2)}, "checkpoint without a text encoder", [], []),
        ({"conditioner.embedders.0.model.x": (2, 2)}, "checkpoint of another kind", [], []),
    ],
)  # fmt: skip
def test_foreign_files_are_told_apart(
    file: Callable[..., Path], tensors: dict[str, tuple[int, ...]], kind: str, notes: list[str], problems: list[str]
) -> None:
    found = inspect_file(file({name: torch.ones(shape) for name, shape in tensors.items()}))
    lost = "it states no erasure: whether a concept was erased from it, this file does not tell"
    assert (found["kind"], found["problems"]) == (kind, problems)
    assert [note for note in found["notes"] if note != lost] == notes
    assert (lost in found["notes"]) == ("text encoder" in kind.partition(" without ")[0])
    assert (found["hash"], found["concept"], found["sd_erase"], found["dtypes"]) == ("absent", None, None, ["F32"])


def test_a_loras_rank_alphas_and_zeros(file: Callable[..., Path]) -> None:
    pair = {"lora_te_text_model_a.lora_up.weight": torch.ones(2, 3), "lora_te_text_model_a.lora_down.weight": torch.ones(3, 5)}
    assert inspect_file(file(pair))["rank"] == 3
    assert inspect_file(file({"lora_te_text_model_a.diff": torch.ones(2, 3)}))["rank"] is None
    other = {"lora_te_text_model_b.lora_up.weight": torch.ones(2, 4), "lora_te_text_model_b.lora_down.weight": torch.ones(4, 5)}
    alphas = {"lora_te_text_model_a.alpha": torch.tensor(3.0), "lora_te_text_model_b.alpha": torch.tensor([4.0])}
    found = inspect_file(file({**pair, **other, **alphas}))
    assert found["rank"] == 4 and found["notes"][1] == "its alphas differ from layer to layer, which diffusers mis-scales"
    alphas["lora_te_text_model_b.alpha"] = torch.tensor([3.0])
    assert not any("alphas" in note for note in inspect_file(file({**pair, **other, **alphas}))["notes"])
    zero = {**pair, "lora_te_text_model_a.lora_up.weight": torch.zeros(2, 3), "lora_te_text_model_a.diff_b": torch.zeros(2)}
    assert inspect_file(file(zero))["problems"] == ["all 2 changes in it are zero: it does nothing."]
    assert inspect_file(file({**zero, "lora_te_text_model_a.diff_b": torch.ones(2)}))["problems"] == []


def test_what_a_checkpoint_lacks_is_said(file: Callable[..., Path]) -> None:
    place = "cond_stage_model.transformer."
    own = {place + name: value for name, value in encoder().items()}
    found = inspect_file(file({**own, place + "odd": torch.ones(1)}))
    assert (found["kind"], found["layers"], found["problems"]) == ("checkpoint (Stable Diffusion 1.x)", 1, [])
    assert found["notes"][2:] == [
        f"1 tensors do not belong to its text encoder, first {place}odd",
        "it holds no UNet",
        "it holds no autoencoder",
        "it states no erasure: whether a concept was erased from it, this file does not tell",
    ]
    parts = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
        "first_stage_model.encoder.x": torch.ones(1),
    }
    assert inspect_file(file({**own, **parts}))["notes"][2:-1] == [
        "its UNet has 1 tensors, that of Stable Diffusion 1.x 686: it is distilled, changed or incomplete",
        "its autoencoder has 1 tensors of 248: it is incomplete",
    ]
    parts["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 4, 3, 3)
    found = inspect_file(file({**own, **parts}))
    assert found["notes"][2:-1] == []
    assert found["problems"] == [
        "1 of its weights are all zero, first model.diffusion_model.input_blocks.0.0.weight: what it should hold is lost."
    ]


def test_what_is_said_of_an_encoders_own_file(file: Callable[..., Path]) -> None:
    state = encoder(words=49408, positions=77)
    found = inspect_file(file({**state, "odd": torch.ones(1), "text_model.embeddings.position_ids": torch.arange(77)}))
    assert (found["kind"], found["layers"]) == ("CLIP text encoder of width 4", 1)
    assert found["problems"] == ["1 tensors do not belong to a text encoder, first odd."]
    assert found["notes"][0] == "holds position_ids, which some programs refuse"
    bare = inspect_file(file({name.removeprefix("text_model."): value for name, value in state.items()}))
    assert bare["kind"] == "CLIP text encoder without the prefix text_model." and bare["problems"] == []
    assert (
        bare["notes"][0]
        == "its names lack the prefix text_model., so ComfyUI would load nothing from it: export it with sd-erase"
    )
    keys = formats.stored_names(set(state), (), "", True)
    stored = {name: formats.joined(name, [state[key] for key in parts]) for name, parts in keys.items()}
    assert inspect_file(file(stored))["kind"] == "CLIP text encoder of width 4 in OpenCLIP's layout"
    both = inspect_file(file({**state, "vision_model.x": torch.ones(1)}))
    assert (both["kind"], both["layers"], both["problems"]) == ("CLIP model with both towers", 1, [])


# --- hashes and statements ----------------------------------------------------------------------------------------------------


def test_what_is_said_of_hashes(file: Callable[..., Path]) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(1)}
    assert integrity.check(read_header(file(tensors))) == integrity.Integrity("absent")
    digest = integrity.data_sha256(read_header(file(tensors)))
    assert integrity.check(read_header(file(tensors, {formats.HASH: f"0X{digest.upper()}"}))) == integrity.Integrity("matches")
    stale = (
        f"{formats.HASH} is not that of its numbers in their order: a program changed them, or their order, and kept the header"
    )
    assert integrity.check(read_header(file(tensors, {formats.HASH: "0x1"}))) == integrity.Integrity("does not match", (stale,))
    damaged = (
        "its numbers do not have the hash that its header states: they were changed, damaged, or saved again in another order; "
        "export or download it again."
    )
    ours = {formats.HASH: "0x1", "sd_erase.version": "0.1.0"}
    assert integrity.check(read_header(file(tensors, ours))) == integrity.Integrity("does not match", (), (damaged,))
    merged = (
        "its numbers are not those that sd-erase exported: it was merged, converted or damaged since, so what its header says of an "
        "erasure does not hold for it; export or download it again."
    )
    assert integrity.check(read_header(file(tensors, {formats.CONTENT: "1"}))) == integrity.Integrity(
        "does not match", (), (merged,)
    )
    again = "saved again by another program, in another order: the numbers are those that were exported"
    content = integrity.stored_content(read_header(file(tensors)))
    assert integrity.check(read_header(file(tensors, {formats.CONTENT: content}))) == integrity.Integrity("matches", (again,))
    checkpoint = {"cond_stage_model.transformer.x": torch.ones(2), "first_stage_model.y": torch.ones(1)}
    own = integrity.stored_content(read_header(file(checkpoint)), ["cond_stage_model.transformer.x"])
    beside = (
        "tensors beside the text encoder are not those that were exported (damaged, or changed by another program, such as another "
        "VAE); the text encoder is."
    )
    found = integrity.check(read_header(file(checkpoint, {formats.CONTENT: "1", formats.ENCODER_CONTENT: own})))
    assert found == integrity.Integrity("does not match", (), (beside,))
    found = integrity.check(read_header(file(checkpoint, {formats.CONTENT: "1", formats.ENCODER_CONTENT: "1"})))
    assert found == integrity.Integrity("does not match", (), (merged,))


def test_the_order_of_the_first_versions_loras() -> None:
    start = "lora_te_text_model_encoder_layers"
    names = [
        f"{start}_0_self_attn_q_proj.lora_up.weight",
        f"{start}_0_self_attn_q_proj.lora_down.weight",
        f"{start}_0_self_attn_q_proj.alpha",
        f"{start}_0_mlp_fc2.diff",
        f"{start}_0_mlp_fc2.diff_b",
        f"{start}_2_mlp_fc1.alpha",
        f"{start}_10_self_attn_k_proj.alpha",
        "lora_te_text_model_encoder_layers_x.alpha",
        "z",
    ]
    types = dict.fromkeys(sorted(names), "F16")
    assert integrity._former_order(header_of(types)) == names
    assert integrity._former_order(header_of(dict.fromkeys(reversed(names), "F16"))) == names


@pytest.mark.parametrize(
    ("metadata", "more"),
    [
        ({"prompt": "{}"}, "; it was saved by ComfyUI, and such programs drop the statement of their sources"),
        ({"lora_adapter_metadata": "{}"}, "; it was saved by diffusers, and such programs drop the statement of their sources"),
        ({"modelspec.merged_from": "b without x, a Without y, , c"},
         "; it was merged by kohya's sd-scripts, and such programs drop the statement of their sources"
         "; made from 'a Without y', 'b without x', whose share in it nobody states: measure it"),
        ({"sd_merge_recipe": '{"a": "m without x", "b": {"n": "m without x", "o": 3}}', "sd_merge_models": '[{"name": "p without y"}, 3]'},
         "; it was merged by A1111, Forge or SD.Next, and such programs drop the statement of their sources"
         "; made from 'm without x', 'p without y', whose share in it nobody states: measure it"),
        ({"modelspec.merged_from": ", ".join(f"{number} without x" for number in range(7))},
         "; it was merged by kohya's sd-scripts, and such programs drop the statement of their sources; made from "
         + ", ".join(f"'{number} without x'" for number in range(5)) + ", whose share in it nobody states: measure it"),
    ],
)  # fmt: skip
def test_a_lost_statement_to_the_letter(metadata: dict[str, str], more: str) -> None:
    note = "it states no erasure: whether a concept was erased from it, this file does not tell"
    assert statement.lost_statement({}, True) == [note]
    assert statement.lost_statement(metadata, True) == [note + more]
    (own,) = statement.lost_statement({**metadata, "sd_erase.concept": "bicycle"}, True)
    assert own == "it is the encoder of a run, which has no hash to check: `sd-erase export` makes files that have one"
    assert (
        statement.lost_statement(metadata, False) == statement.lost_statement({**metadata, "sd_erase.version": "1"}, True) == []
    )


# --- adding a LoRA ------------------------------------------------------------------------------------------------------------

MODULE = f"{LAYER}.mlp.fc1"
FLAT = MODULE.replace(".", "_")


def pair(name: str, kind: str = "lora_up.weight lora_down.weight", rank: int = 2) -> dict[str, torch.Tensor]:
    up, down = kind.split()
    return {f"{name}.{up}": torch.full((8, rank), 3.0), f"{name}.{down}": torch.ones(rank, 4)}


def added(path: Path, component: str = "text_encoder") -> float:
    """The change of the layer's weight, which is one everywhere."""
    state = encoder()
    changed = add_lora({component: state}, path)[component]
    assert all(torch.equal(changed[name], state[name]) for name in state if not name.startswith(f"{MODULE}."))
    assert torch.equal(state[f"{MODULE}.weight"], torch.ones(8, 4))  # the original stays
    change = changed[f"{MODULE}.weight"] - 1
    assert (change == change[0, 0]).all() and change.dtype == torch.float32
    return float(change[0, 0])


@pytest.mark.parametrize(
    "name",
    [f"lora_te_{FLAT}", f"text_encoder.{MODULE}", f"text_encoder.{MODULE.removeprefix('text_model.')}",
     f"text_encoders.clip_l.transformer.{MODULE}", f"text_encoders.clip_h.transformer.{MODULE}"],
)  # fmt: skip
def test_a_lora_is_scaled_by_alpha_over_rank(file: Callable[..., Path], name: str) -> None:
    assert added(file(pair(name))) == 6  # 2 x 3 x 1, where nothing else is stated
    assert added(file({**pair(name), f"{name}.alpha": torch.tensor(1.0)})) == 3
    assert added(file({**pair(name, rank=4), f"{name}.alpha": torch.tensor(8.0)})) == 24
    assert added(file({f"{name}.diff": torch.full((8, 4), 5.0)})) == 5


def test_scales_that_settings_state(file: Callable[..., Path], tmp_path: Path) -> None:
    kind = "lora_B.weight lora_A.weight"
    own = pair(f"text_encoder.{MODULE}", kind)
    stated = json.dumps({"text_encoder.lora_alpha": 1, "unet.lora_alpha": 9})
    assert added(file(own, {"lora_adapter_metadata": stated})) == 3
    assert added(file(own, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 9})})) == 6
    dora = json.dumps({"text_encoder.use_dora": True})
    path = tmp_path / "x.safetensors"
    says = f"File {path} is a LoRA with use_dora, which is not read: merge it, and pass the merged model."
    assert told(added, file(own, {"lora_adapter_metadata": dora})) == says
    unreadable = told(added, file(own, {"lora_adapter_metadata": "[3]"}))
    assert unreadable.startswith(f"File {path} has an unreadable lora_adapter_metadata (") and unreadable.endswith(
        "): save it again."
    )
    peft = file(pair(f"base_model.model.{MODULE}", kind))
    says = (
        f"File {path} is a LoRA of peft, whose scale stands in adapter_config.json beside it, which cannot be read "
        "(FileNotFoundError): pass the file in its folder."
    )
    assert told(added, peft) == says
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    assert added(peft) == 12


def test_names_of_two_encoders(file: Callable[..., Path]) -> None:
    states = {"text_encoder": encoder(), "text_encoder_2": encoder()}
    tensors = {
        f"lora_te1_{FLAT}.diff": torch.full((8, 4), 1.0),
        f"text_encoders.clip_g.transformer.{MODULE}.diff": torch.full((8, 4), 2.0),
        f"lora_te2_{FLAT}.diff_b": torch.full((8,), 3.0),
    }
    changed = add_lora(states, file(tensors))
    assert [float(changed[name][f"{MODULE}.weight"][0, 0]) for name in states] == [2, 3]
    assert [float(changed[name][f"{MODULE}.bias"][0]) for name in states] == [1, 4]
    foreign = told(add_lora, states, file({f"lora_te_{FLAT}.diff": torch.ones(8, 4)}))
    assert f"1 of its tensors belong to none of its layers, first lora_te_{FLAT}.diff" in foreign


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"lora_te_{FLAT}.dora_scale": (8,)},
         f" is a DoRA, which rescales every weight that it changes (lora_te_{FLAT}.dora_scale), which is not read: merge it where it was "
         "made, and pass the merged model."),
        ({"lora_te_x.hada_w1_a": (2,), "a": (1,)},
         " is a LoHa (lora_te_x.hada_w1_a), which is not read: merge it where it was made, and pass the merged model."),
        ({"lora_unet_a.diff": (2,), "lora_unet_b.diff": (2,)},
         " does not fit the text encoder: it is a LoRA of the denoiser alone, it changes none of its layers; pass an export of "
         "sd-erase."),
        ({f"lora_te_{FLAT}.diff": (8, 4), "lora_unet_b.diff": (2,), "lora_unet_c.diff": (2,)},
         " is a LoRA that changes the denoiser too (2 tensors, first lora_unet_b.diff), which would be lost here: load it with the "
         "pipeline's own load_lora_weights()."),
        ({"b": (1,), "a": (1,)},
         " does not fit the text encoder: 2 of its tensors belong to none of its layers, first a: pass a LoRA of this very base, in the "
         "names of kohya, diffusers, peft or ComfyUI."),
        ({f"lora_te_{FLAT}.lora_up.weight": (8, 2)},
         f" does not fit the text encoder: 1 of its tensors belong to none of its layers, first lora_te_{FLAT}.lora_up.weight: pass a "
         "LoRA of this very base, in the names of kohya, diffusers, peft or ComfyUI."),
        ({f"lora_te_{FLAT}.alpha": ()},
         f" does not fit the text encoder: 1 of its tensors belong to none of its layers, first lora_te_{FLAT}.alpha: pass a "
         "LoRA of this very base, in the names of kohya, diffusers, peft or ComfyUI."),
    ],
)  # fmt: skip
def test_a_lora_is_refused_in_this_sentence(file: Callable[..., Path], tensors: dict[str, tuple[int, ...]], says: str) -> None:
    path = file({name: torch.ones(shape) for name, shape in tensors.items()})
    assert told(add_lora, {"text_encoder": encoder()}, path) == f"File {path}{says}"


def test_a_change_of_another_shape_is_refused_and_one_by_zero_left_out(file: Callable[..., Path]) -> None:
    path = file({f"lora_te_{FLAT}.diff": torch.ones(8, 3)})
    says = f"LoRA {path} does not fit the text encoder: lora_te_{FLAT}.diff changes (8, 3) numbers of (8, 4): pass its base."
    assert told(add_lora, {"text_encoder": encoder()}, path) == says
    norm = {f"lora_te_{FLAT}.diff": torch.ones(8, 4), "lora_te_text_model_final_layer_norm_x.diff": torch.zeros(4)}
    assert added(file(norm)) == 1  # as ComfyUI's LoraSave writes
    pairs = {
        **pair(f"lora_te_{FLAT}"),
        "lora_unet_x.lora_up.weight": torch.zeros(2, 2),
        "lora_unet_x.lora_down.weight": torch.ones(2, 2),
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    assert added(file(pairs)) == 6
    mixed = {**pairs, "lora_unet_x.diff_b": torch.ones(2)}
    assert "changes the denoiser too (4 tensors" in told(add_lora, {"text_encoder": encoder()}, file(mixed))


def test_a_file_keeps_what_was_saved(file: Callable[..., Path], tmp_path: Path) -> None:
    formats.save_tensors(tmp_path / "y.safetensors", {"b": torch.ones(2)}, {"z": "1", "a": "2"})
    assert read_header(tmp_path / "y.safetensors").metadata == {"a": "2", "z": "1"}
    assert torch.equal(load_file(tmp_path / "y.safetensors")["b"], torch.ones(2))


# --- what only other files' tests had looked at -----------------------------------------------------------------------------------


def test_the_prompts_that_encoders_are_compared_on() -> None:
    ids = compare.prompts(SimpleNamespace(max_position_embeddings=77, vocab_size=1000))
    assert (ids != 999).sum(1).tolist() == [1 + words for words in (0, 1, 2, 4, 8, 16, 38, 74, 75)]
    assert (ids[:, 0] == 998).all() and ids.shape == (9, 77)


def test_only_stable_diffusion_2_with_velocity_is_called_so() -> None:
    pocket = resolve("pocket")
    kinds = {
        ("sd1", "v_prediction"): ("stable-diffusion-v1", "sd_v1"),
        ("sd2", "epsilon"): ("stable-diffusion-v2-512", "sd_v2"),
        ("sd2", "v_prediction"): ("stable-diffusion-v2-768-v", "sd_v2_v"),
    }
    for (family, prediction), names in kinds.items():
        base = dataclasses.replace(pocket, family=family, prediction=prediction)
        assert (modelspec.architecture(base), modelspec.kohya_version(base)) == names


def test_types_that_torch_lacks_are_refused_by_name(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    assert told(formats.read_tensors, path).startswith(f"File {path} has numbers of the type F8_E8M0 (a), which is quantised")


@pytest.mark.parametrize(
    ("name", "component"), [("clip_l", "text_encoder"), ("clip_h", "text_encoder"), ("clip_g", "text_encoder_2")]
)
@pytest.mark.parametrize("projection", [False, True])
def test_encoders_under_comfyuis_names(file: Callable[..., Path], name: str, component: str, projection: bool) -> None:
    own = encoder() | ({"text_projection.weight": torch.ones(4, 4)} if projection else {})
    for prefix in (f"text_encoders.{name}.transformer.", f"{name}.transformer."):
        found = formats.read_encoders(file({prefix + key: value for key, value in own.items()}))
        assert {key: set(state) for key, state in found.items()} == {component: set(own)}


def test_an_openclip_files_projection_is_read_where_it_has_one(file: Callable[..., Path]) -> None:
    for projection in (False, True):
        keys = formats.text_encoder_keys(1, projection)
        state = {key: value for key, value in (encoder() | {"text_projection.weight": torch.ones(4, 4)}).items() if key in keys}
        stored = {}
        for name, parts in formats.stored_names(keys, ["transformer.resblocks.0.ln_1.weight"], "", True).items():
            stored[name] = formats.joined(name, [state[part] for part in parts])
        (found,) = formats.read_encoders(file(stored)).values()
        assert found.keys() == keys


def test_all_zeros_of_an_openclip_model_are_said(file: Callable[..., Path]) -> None:
    found = inspect_file(file({"transformer.resblocks.0.x": torch.zeros(2, 2), "visual.proj": torch.ones(2, 2)}))
    assert found["kind"] == "CLIP model with both towers in OpenCLIP's layout"
    assert found["problems"] == ["1 of its weights are all zero, first transformer.resblocks.0.x: what it should hold is lost."]


def test_ranks_and_whole_numbers_of_diffusers_loras(file: Callable[..., Path]) -> None:
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = {
        f"{name}.lora.up.weight": torch.ones(4, 2),
        f"{name}.lora.down.weight": torch.ones(2, 4),
        f"{name}.alpha": torch.tensor([2], dtype=torch.int32),  # one number, and no quantised weight
    }
    found = inspect_file(file(tensors))
    assert (found["rank"], found["problems"]) == (2, [])


def test_settings_of_peft_that_are_not_read_are_named(file: Callable[..., Path]) -> None:
    own = pair(f"text_encoder.{MODULE}", "lora_B.weight lora_A.weight")
    for name in ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out", "modules_to_save"):
        path = file(own, {"lora_adapter_metadata": json.dumps({f"text_encoder.{name}": ["x"]})})
        assert f"is a LoRA with {name}, which is not read" in told(added, path)


def test_an_autoencoder_of_all_its_tensors_is_complete() -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for count, notes in ((248, []), (247, ["its autoencoder has 247 tensors of 248: it is incomplete"])):
        header = header_of(
            {first: "F16", **{f"model.diffusion_model.{number}": "F16" for number in range(685)}}
            | {f"first_stage_model.decoder.{number}": "F16" for number in range(count)}
        )
        header.tensors[first]["shape"] = [320, 4, 3, 3]
        assert metadata._parts(header, "sd1") == notes


def test_reading_numbers_tells_every_megabyte(file: Callable[..., Path]) -> None:
    told_of: list[Any] = []

    class Task:
        def advance(self, amount: int = 1) -> None:
            told_of.append(amount)

    @contextmanager
    def progress(title: str, total: int | None) -> Iterator[Task]:
        told_of.append((title, total))
        yield Task()

    path = file({"a": torch.ones(700_000), "b": torch.ones(300_000)})
    inspect_file(path, progress)
    assert told_of[0] == ("reading the numbers (MB)", 4) and sum(told_of[1:]) == 4 and min(told_of[1:]) >= 0


def test_what_inspecting_says_of_nothing_and_of_half_an_encoder(file: Callable[..., Path]) -> None:
    assert inspect_file(file({}))["problems"] == ["It holds no tensor: export or download it again."]
    lacking = encoder()
    del lacking["text_model.final_layer_norm.bias"]
    path = file(lacking)
    assert told(formats.read_encoders, path) == (
        f"The text encoder of {path} cannot be loaded, 1 of its tensors are missing, first text_model.final_layer_norm.bias: pass a "
        "complete model (nothing is made up for what does not fit)."
    )
    strange = file(encoder() | {"text_model.x": torch.ones(1)})
    assert "first text_model.x" in told(formats.read_encoders, strange)


def test_the_keys_of_an_encoder() -> None:
    assert formats.text_encoder_keys(1) == set(encoder())
    assert formats.text_encoder_keys(1, True) == {*encoder(), "text_projection.weight"}
    assert formats.parted("x", ("a", "b"), torch.arange(4)).keys() == {"a", "b"}
