"""`sd-erase inspect` says what is wrong with the numbers, shapes and types of a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sd_erase import bases, cli
from sd_erase.export.metadata import inspect_file
from sd_erase.export.numbers import scan
from sd_erase.formats import linear_modules, read_header

Tensors = dict[str, torch.Tensor]
LAYER = "text_model.encoder.layers.1."
IDS = "text_model.embeddings.position_ids"


def encoder(width: int = 16, words: int = 64, positions: int = 77) -> Tensors:
    """A text encoder's tensors under the names that programs read; two layers, random weights, biases of zero."""
    torch.manual_seed(0)
    tensors = {
        "text_model.embeddings.token_embedding.weight": torch.randn(words, width),
        "text_model.embeddings.position_embedding.weight": torch.randn(positions, width),
    }
    for module in linear_modules(2):
        out, into = (
            (4 * width, width) if module.endswith("fc1") else (width, 4 * width) if module.endswith("fc2") else (width, width)
        )
        tensors |= {f"{module}.weight": torch.randn(out, into), f"{module}.bias": torch.zeros(out)}
    for norm in (
        *(f"text_model.encoder.layers.{i}.layer_norm{j}" for i in (0, 1) for j in (1, 2)),
        "text_model.final_layer_norm",
    ):
        tensors |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    return tensors


def put(name: str, value: float, index: int = 3) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].flatten()[index] = value

    return change


def cast(dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}

    return change


def replace(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def zero(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, torch.zeros_like(tensors[name]))


BAD: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("NaN", put(f"{LAYER}mlp.fc1.weight", float("nan")), f"1 of 36 tensors hold NaN, first {LAYER}mlp.fc1.weight (1 of its 1024 numbers)"),
    ("infinity", put(f"{LAYER}mlp.fc2.bias", float("-inf")), f"1 of 36 tensors hold infinite numbers, first {LAYER}mlp.fc2.bias (1 of its 16"),
    ("zero matrix", zero(f"{LAYER}self_attn.q_proj.weight"), f"1 of its weights are all zero, first {LAYER}self_attn.q_proj.weight"),
    ("zero norm", zero("text_model.final_layer_norm.weight"), "1 of its weights are all zero"),
    ("int8", cast(torch.int8), "36 of its weights are int8 (I8) and no scales stand beside them"),
    ("uint8", cast(torch.uint8), "uint8 (U8)"),
    ("transposed", replace(f"{LAYER}mlp.fc1.weight", torch.ones(16, 64)), f"first {LAYER}mlp.fc1.weight [16, 64] in place of [64, 16]"),
    ("scalar", replace(f"{LAYER}mlp.fc1.weight", torch.tensor(1.0)), "[] in place of [64, 16]"),
    ("empty", replace(f"{LAYER}self_attn.q_proj.weight", torch.ones(0, 16)), "[0, 16] in place of [16, 16]"),
    ("wide words", replace("text_model.embeddings.token_embedding.weight", torch.ones(64, 17)), "[64, 17] in place of [64, 16]"),
    ("missing", lambda tensors: tensors.pop(f"{LAYER}mlp.fc1.bias"), "1 tensors of the encoder are missing"),
    ("rounded ids", replace(IDS, torch.arange(77).clamp(max=70)[None]), "position_ids of x.safetensors is not 0 to 76"),
    ("few ids", replace(IDS, torch.arange(50)[None]), "has 50 positions"),
    ("many ids", replace(IDS, torch.zeros(1, 9000)), "is F32 of shape [1, 9000]"),
    ("NaN ids", replace(IDS, torch.full((1, 77), float("nan"))), "tensors hold NaN"),
    ("a layer too far", replace("text_model.encoder.layers.99999999.mlp.fc1.bias", torch.zeros(64)), "tensors of the encoder are missing"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_damaged_encoder_is_not_called_intact(tmp_path: Path, change: Callable[[Tensors], None], words: str) -> None:
    tensors = encoder()
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    start = time.process_time()
    result = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "x.safetensors")])
    assert result.exit_code == 2 and "is damaged: " in result.output, result.output
    assert any(words in problem for problem in inspect_file(tmp_path / "x.safetensors")["problems"]), result.output
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_type_of_floats_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in encoder().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert found["problems"] == [] and any("fp8" in note for note in found["notes"]) == (dtype.itemsize == 1)
    name = f"{LAYER}mlp.fc1.weight"
    values = tensors[name].float().flatten()
    values[[0, 5]] = float("nan")
    values[[1, 2, 3]] = torch.tensor([float("inf"), float("-inf"), float("inf")])
    tensors[name] = values.to(dtype).reshape(64, 16)
    save_file(tensors, tmp_path / "x.safetensors")
    numbers = scan(read_header(tmp_path / "x.safetensors"))[name]
    expected = tensors[name].float()
    assert (numbers.not_a_number, numbers.infinite) == (int(expected.isnan().sum()), int(expected.isinf().sum()))
    assert numbers.not_a_number >= 2 and not numbers.is_zero and numbers.size == 1024
    assert scan(read_header(tmp_path / "x.safetensors"))[f"{LAYER}mlp.fc1.bias"].is_zero


def test_good_encoders_stay_intact(tmp_path: Path) -> None:
    found = inspect_file(bases.POCKET_FOLDER / "text_encoder" / "model.safetensors")
    assert found["problems"] == [] and found["kind"] == "CLIP text encoder of the pocket model's size"
    ids = {IDS: torch.arange(77)[None]}
    for tensors in (
        encoder(),
        encoder() | ids,
        encoder() | {IDS: ids[IDS].float()},
        {k.removeprefix("text_model."): v for k, v in encoder().items()},
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        assert inspect_file(tmp_path / "x.safetensors")["problems"] == []


@pytest.mark.parametrize(
    ("words", "positions", "problem", "note"),
    [(64, 77, "has 64 words, not CLIP's 49408", ""), (49408, 20, "has 20 positions, not CLIP's 77", ""),
     (49410, 77, "", "2 rows more than CLIP's 49408"), (49408, 77, "", "")],
)  # fmt: skip
def test_a_known_encoders_rows_are_counted(tmp_path: Path, words: int, positions: int, problem: str, note: str) -> None:
    save_file({k: v.half() for k, v in encoder(128, words, positions).items()}, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert [problem in text for text in found["problems"]] == [True] * bool(problem)
    assert any(note in text for text in found["notes"]) or not note


def test_a_quantised_encoder_is_named_by_its_maker(tmp_path: Path) -> None:
    for beside, maker in (("scale", "SDNQ"), ("SCB", "bitsandbytes"), ("weight_scale", "ComfyUI"), ("_scale", "optimum-quanto")):
        tensors = encoder()
        for module in linear_modules(2):
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"].to(torch.int8)
            tensors[f"{module}.{beside}"] = torch.ones(1)
        save_file(tensors, tmp_path / "x.safetensors")
        found = inspect_file(tmp_path / "x.safetensors")
        assert found["problems"] == [] and any(
            f"12 of its weights are int8, in the form of {maker}" in note for note in found["notes"]
        )


LORA = "lora_te_text_model_encoder_layers_0_mlp_fc1."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_up.weight": torch.ones(8, 3)}, "lora_up.weight [8, 3] on [2, 8]"),
        ({"alpha": torch.ones(4)}, "alpha [4]"),
        ({"lora_up.weight": torch.zeros(8, 2)}, "all 1 changes in it are zero: it does nothing"),
        ({"lora_down.weight": torch.full((2, 8), float("nan"))}, "hold NaN"),
        ({"lora_up.weight": torch.ones(8, 2).to(torch.int8)}, "int8 (I8)"),
        ({"alpha": torch.tensor(float("inf"))}, "infinite"),
    ],
)
def test_a_damaged_lora_is_named(tmp_path: Path, changes: Tensors, words: str) -> None:
    good = {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8), "alpha": torch.tensor(2.0)}
    for parts, problem in ((good, ""), ({**good, **changes}, words)):
        save_file({LORA + part: tensor.clone() for part, tensor in parts.items()}, tmp_path / "x.safetensors")
        found = inspect_file(tmp_path / "x.safetensors")["problems"]
        assert [problem in text for text in found] == [True] * bool(problem), found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.diffusion_model.out.2.weight": torch.full((4, 4), float("nan"))}, "1 of 39 tensors hold NaN, first model.diffusion_model"),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(4, 4)}, "all zero, first first_stage_model.decoder.conv_in.weight"),
        ({f"cond_stage_model.transformer.{IDS}": torch.arange(77).float().clamp(max=75)[None]}, "is not 0 to 76"),
        ({f"cond_stage_model.transformer.{LAYER}mlp.fc1.weight": torch.ones(3, 5)}, "[3, 5] in place of [64, 16]"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4).to(torch.int8)}, "1 of its weights are int8"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named(tmp_path: Path, change: Tensors, words: str) -> None:
    good = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in encoder().items()} | {
        f"cond_stage_model.transformer.{IDS}": torch.arange(77)[None],
        "model.diffusion_model.out.2.weight": torch.ones(4, 4),
        "first_stage_model.decoder.conv_in.weight": torch.ones(4, 4),
    }
    for tensors, problem in ((good, ""), ({**good, **change}, words)):
        save_file(tensors, tmp_path / "x.safetensors")
        found = inspect_file(tmp_path / "x.safetensors")["problems"]
        assert [problem in text for text in found] == [True] * bool(problem), found


CHILD = """
import resource, sys
from pathlib import Path
from sd_erase.export.metadata import inspect_file
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
found = inspect_file(Path(sys.argv[1]))
print(found["problems"])
sys.exit(not any("all zero" in problem for problem in found["problems"]))
"""


@pytest.mark.slow
def test_a_file_of_gigabytes_needs_no_gigabytes(tmp_path: Path) -> None:
    size = 3 << 30  # of zeros, which no disk holds
    header = json.dumps({"down_blocks.0.weight": {"dtype": "F16", "shape": [size // 8, 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "x.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + size)
    result = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "x.safetensors")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
