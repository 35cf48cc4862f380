"""Whatever stands in a file from a stranger, its reader gives a result or one sentence: generated inputs.

Few by default; ``SD_ERASE_EXAMPLES=100000 pytest tests/test_properties_of_readers.py`` tries as many of each.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from safetensors.torch import save

pytest.importorskip("hypothesis", reason="needs sd-erase[dev]")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sd_erase.comparison import Recipe as Comparison  # noqa: E402
from sd_erase.comparison import read_recipe as read_comparison  # noqa: E402
from sd_erase.concepts.cards import own_card, read_yaml  # noqa: E402
from sd_erase.config import RunConfig, load, to_dict  # noqa: E402
from sd_erase.detection import Card, read_card  # noqa: E402
from sd_erase.errors import UserError  # noqa: E402
from sd_erase.export.metadata import inspect_file  # noqa: E402
from sd_erase.formats import CONTENT, ENCODER_CONTENT, HASH  # noqa: E402
from sd_erase.headers import BITS, read_header  # noqa: E402
from sd_erase.reproduce import Recipe as Experiment  # noqa: E402
from sd_erase.reproduce import read_recipe as read_experiment  # noqa: E402

# --- safetensors headers ------------------------------------------------------------------------------------------------------

GOOD = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, {"format": "pt", "title": "ünï"})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(BITS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(BITS)) | json_values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(0, 64) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=4)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Bytes of any kind, a valid file with some bytes changed, or a header of the right kind with wrong values."""
    kind = draw(st.sampled_from(("bytes", "changed", "header")))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "changed":
        content = bytearray(GOOD)
        for place, value in draw(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4)):
            content[place] = value
        return bytes(content[: draw(st.integers(0, len(GOOD)) | st.just(len(GOOD)))])
    text = json.dumps(draw(headers), ensure_ascii=draw(st.booleans())).encode("utf-8", "replace")
    return len(text).to_bytes(8, "little") + text + bytes(draw(st.integers(0, 64)))


@given(files())
def test_any_file_is_read_or_refused_as_safetensors_does(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    found = safetensors.deserialize(content)  # never taken where the library refuses
    assert {name: list(header.shape(name)) for name in header.tensors} == {name: entry["shape"] for name, entry in found}


# --- inspect ------------------------------------------------------------------------------------------------------------------

LAYER = "text_model.encoder.layers.0."
PARTS = [
    "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight", "text_model.embeddings.position_ids",
    f"{LAYER}self_attn.q_proj.weight", f"{LAYER}mlp.fc1.weight", f"{LAYER}mlp.fc1.bias", f"{LAYER}layer_norm1.weight",
    "text_model.encoder.layers.99999999999.mlp.fc1.bias", "text_model.final_layer_norm.weight", "text_projection.weight", "text_projection",
    "encoder.layers.0.mlp.fc1.weight", "final_layer_norm.weight", "transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight",
    "token_embedding.weight", "visual.proj", "vision_model.x", "down_blocks.0.x", "decoder.x", "encoder.block.0.x", "double_blocks.0.x",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_te1_x.diff", "lora_te1_x.diff_b", "lora_unet_x.dora_scale", "x.alpha",
    "text_encoder.x.lora_A.weight", "text_encoder.x.lora_B.default.weight", "x.SCB", "x.quant_state.y", "x.weight_scale", "scaled_fp8",
]  # fmt: skip
PREFIXES = ["", "", "", "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer.",
            "conditioner.embedders.1.model.", "model.diffusion_model.", "first_stage_model."]  # fmt: skip
METADATA = [
    HASH,
    CONTENT,
    ENCODER_CONTENT,
    "sd_erase.version",
    "sd_erase.concept",
    "sd_erase.anchor",
    "sd_erase.encoder",
    "format",
    "x",
]


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """A valid file of tensors with the names that `inspect` knows, of any types, shapes and numbers."""
    header: dict[str, Any] = {"__metadata__": draw(st.dictionaries(st.sampled_from(METADATA), st.text(max_size=80), max_size=4))}
    numbers = b""
    names = draw(st.lists(st.tuples(st.sampled_from(PREFIXES), st.sampled_from(PARTS)).map("".join), max_size=10, unique=True))
    for name in names:
        shape, dtype = draw(st.lists(st.integers(0, 4) | st.just(16), max_size=4)), draw(st.sampled_from(sorted(BITS)))
        shape = shape if math.prod(shape) * BITS[dtype] % 8 == 0 else [8, *shape]
        size = math.prod(shape) * BITS[dtype] // 8
        part = draw(st.binary(min_size=1, max_size=8))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(numbers), len(numbers) + size]}
        numbers += (part * (size // len(part) + 1))[:size]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


@given(models() | files())
def test_any_file_is_inspected_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "inspected.safetensors"
    path.write_bytes(content)
    try:
        found = inspect_file(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert found["kind"] and json.dumps(found) and all(isinstance(text, str) for text in (*found["notes"], *found["problems"]))


# --- YAML: settings, recipes, concept and detector cards ----------------------------------------------------------------------

KEYS = [
    *(field.name for kind in (RunConfig, Card, Comparison, Experiment) for field in dataclasses.fields(kind)),
    *(field.name for section in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(kind := section.default_factory)
      for field in dataclasses.fields(kind)),
    "name", "words", "synonyms", "spared", "anchor", "neighbours", "labels", "templates", "kind", "train.steps", "named", "<<",
]  # fmt: skip
yaml_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=3)
    | st.sampled_from(["object", "yolo", "sd", "a photo of a {}", "apple", "{a|b} c", "bat + {bird}", "1:30", "017", "=", "~", "<<"])
)  # fmt: skip
yaml_values = st.recursive(
    yaml_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | yaml_scalars, inner, max_size=5),
    max_leaves=15,
)
PIECES = ["a: ", "- ", "&a ", "*a", "? ", ": ", "[", "]", "{", "}", ",", "\n", "  ", "'", '"', "|", ">", "#", "!!str ", "!!int ", "!", "%",
          "---\n", "<<", "1", "x", "\t", "\x00", "\x85", "\ufeff", "name: ", "concepts: ", "methods: ", "title: "]  # fmt: skip
yaml_texts = (
    yaml_values.map(lambda value: yaml.safe_dump(value, allow_unicode=True))
    | st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join)
    | st.binary(max_size=60).map(lambda content: content.decode("utf-8", "replace"))
)


def read_settings(path: Path) -> None:
    to_dict(load(path))


def read_own_card(path: Path) -> None:
    own_card(read_yaml(path), f"Concept file {path}")


@pytest.mark.parametrize(
    "reader", [read_settings, read_own_card, read_card, read_comparison, read_experiment], ids=lambda reader: reader.__name__
)
def test_any_yaml_is_read_or_refused(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"{reader.__name__}.yaml"

    @given(yaml_texts)
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="replace", newline="")
        try:
            reader(path)
        except UserError as error:
            assert len(str(error)) < 5000

    check()
