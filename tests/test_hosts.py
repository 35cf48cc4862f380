"""`load_erased` on pipelines as people have them: LoRAs attached, tokens added, quantised, offloaded; and on ComfyUI's files."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from erased import erased_run
from test_export_formats import export

import sd_erase
from sd_erase import bases, formats, hosts
from sd_erase.components import load_pipeline
from sd_erase.errors import UserError
from sd_erase.rundir import RunDir

POCKET = bases.ROWS["pocket"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run and its exports; and a LoRA of another change, as of a style."""
    folder = tmp_path_factory.mktemp("hosts")
    settings, run = erased_run(folder, POCKET, "pocket")
    found = {"run": run.path}
    for to in ("comfyui", "lora"):
        found[to] = Path(export(settings, run, to, dtype="float32")["files"][0]["path"])
    generator = torch.Generator().manual_seed(7)
    tensors = safetensors.torch.load_file(found["lora"])
    other = {
        name: value if name.endswith("alpha") else 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in tensors.items()
    }
    found["style"] = folder / "style.safetensors"
    safetensors.torch.save_file(other, found["style"], {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def shared() -> Any:
    return load_pipeline(POCKET)


@pytest.fixture
def pipeline(shared: Any) -> Any:
    return fresh(shared)


def fresh(shared: Any) -> Any:
    """The pocket model's pipeline with a text encoder, a tokenizer and a scheduler that a test may change."""
    own = {name: copy.deepcopy(shared.components[name]) for name in ("text_encoder", "tokenizer", "scheduler")}
    made = type(shared)(**{**shared.components, **own}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    states(made)  # sets the tokenizer's padding
    return made


def states(pipeline: Any, prompt: str = "a bicycle next to a dog") -> torch.Tensor:
    with torch.inference_mode():
        ids = pipeline.tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids).last_hidden_state


def state_hash(pipeline: Any) -> str:
    """Of everything that a pipeline holds: tensors, tokens, settings."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            for key, value in part.state_dict().items():
                digest.update(f"{name}.{key}".encode() + formats.raw_bytes(value))
            digest.update(str([type(module) for module in part.modules()]).encode())
        elif name.startswith("tokenizer"):
            digest.update(part.backend_tokenizer.to_str().encode() + str(part.init_kwargs).encode())
        elif name == "scheduler":
            digest.update(json.dumps(dict(part.config), sort_keys=True).encode() + str(part.timesteps).encode())
    digest.update(str(pipeline.config).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("source", ["run", "lora"])
def test_a_lora_that_is_attached_stays_attached(files: dict[str, Path], shared: Any, pipeline: Any, source: str) -> None:
    """peft renames every layer that it changes (base_layer); the erased weights go below the LoRA."""
    expected = sd_erase.load_erased(pipeline, files["run"])
    expected.load_lora_weights(files["style"].parent, weight_name=files["style"].name)
    pipeline.load_lora_weights(files["style"].parent, weight_name=files["style"].name)
    before = state_hash(pipeline)
    erased = sd_erase.load_erased(pipeline, files[source])
    assert torch.allclose(states(erased), states(expected), atol=1e-5)
    assert not torch.allclose(states(erased), states(pipeline), atol=1e-2)
    erased.unload_lora_weights()
    assert torch.allclose(states(erased), states(sd_erase.load_erased(fresh(shared), files["run"])), atol=1e-5)
    assert state_hash(pipeline) == before


def test_a_fused_lora_is_refused_with_what_to_do(files: dict[str, Path], pipeline: Any) -> None:
    pipeline.load_lora_weights(files["style"].parent, weight_name=files["style"].name)
    pipeline.fuse_lora(components=["text_encoder"])
    with pytest.raises(UserError, match=r"A LoRA is fused into the text_encoder .* call unfuse_lora\(\)"):
        sd_erase.load_erased(pipeline, files["run"])
    pipeline.unfuse_lora(components=["text_encoder"])
    sd_erase.load_erased(pipeline, files["run"])


@pytest.mark.parametrize("source", ["comfyui", "lora"])
def test_a_token_of_textual_inversion_stays(files: dict[str, Path], pipeline: Any, source: str) -> None:
    plain = sd_erase.load_erased(pipeline, files["run"])
    token = torch.randn(128, generator=torch.Generator().manual_seed(3))
    pipeline.load_textual_inversion(token, token="<my-cat>")
    before = state_hash(pipeline)
    erased = sd_erase.load_erased(pipeline, files[source])
    assert torch.equal(erased.text_encoder.get_input_embeddings().weight[49408], token)
    assert torch.allclose(states(erased), states(plain), atol=1e-5)
    assert torch.isfinite(states(erased, "a <my-cat> on a bicycle")).all()
    assert state_hash(pipeline) == before


def test_tokens_that_the_pipeline_lacks_are_refused(files: dict[str, Path], pipeline: Any, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(files["comfyui"])
    name = "text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(2, 128)])
    safetensors.torch.save_file(tensors, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="has 49410 token embeddings, 2 more than this pipeline"):
        sd_erase.load_erased(pipeline, tmp_path / "more.safetensors")


def test_the_source_stays_as_it_is(files: dict[str, Path], pipeline: Any) -> None:
    """Whatever is done to the result: tokens added to it, LoRAs, another schedule, images drawn."""
    before = state_hash(pipeline)
    erased = sd_erase.load_erased(pipeline, files["run"])
    erased.load_textual_inversion(torch.randn(128), token="<my-cat>")
    erased.load_lora_weights(files["style"].parent, weight_name=files["style"].name)
    erased("a <my-cat>", num_inference_steps=2, height=64, width=64, output_type="np")
    assert len(pipeline.tokenizer) == 49408 and len(erased.tokenizer) == 49409
    assert erased.unet is pipeline.unet and erased.vae is pipeline.vae
    assert state_hash(pipeline) == before
    erased.tokenizer.add_tokens(["<another>"])
    erased.scheduler.set_timesteps(7)
    assert state_hash(pipeline) == before


class Packed(torch.nn.Parameter):
    """As bitsandbytes' Params4bit and Int8Params."""


class QLinear(torch.nn.Linear):
    """As optimum-quanto's and sdnq's layers."""


def quantised(encoder: Any, how: str) -> str:
    """Make the encoder as a quantiser leaves it; the words by which the error names it."""
    layer = next(module for name, module in encoder.named_modules() if name.endswith("layers.1.mlp.fc1"))
    if how == "settings":
        encoder.config.quantization_config = {"quant_method": "bitsandbytes"}
        return "bitsandbytes"
    if how == "parameter":
        layer.weight = Packed(layer.weight.data)
        return "Packed"
    if how == "int8":
        layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
        return "int8"
    if how == "float8":
        layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        return "float8_e4m3fn"
    layer.__class__ = QLinear
    return "QLinear"


@pytest.mark.parametrize("how", ["settings", "parameter", "int8", "float8", "layer"])
def test_a_quantised_encoder_is_refused_with_what_to_do(files: dict[str, Path], pipeline: Any, how: str) -> None:
    """A LoRA on an int8 encoder gave nearly the original, without a word."""
    words = quantised(pipeline.text_encoder, how)
    with pytest.raises(UserError, match=f"is quantised .*{words}.* call load_erased on the pipeline before it is quantised"):
        sd_erase.load_erased(pipeline, files["lora"])


@pytest.mark.parametrize("sequential", [False, True])
def test_an_offloaded_encoder_is_refused_with_what_to_do(files: dict[str, Path], pipeline: Any, sequential: bool) -> None:
    """Offloaded weights lie elsewhere: those put into the module would be dropped, and the original used."""
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    if sequential:
        cpu_offload(pipeline.text_encoder, torch.device("cpu"))
    else:
        add_hook_to_module(pipeline.text_encoder, ModelHook())
    with pytest.raises(
        UserError, match=r"text_encoder of this pipeline is offloaded .* call load_erased on the pipeline before that"
    ):
        sd_erase.load_erased(pipeline, files["run"])


def test_a_compiled_encoder_is_read_through_its_wrapper(files: dict[str, Path], pipeline: Any) -> None:
    expected = states(sd_erase.load_erased(pipeline, files["run"]))
    pipeline.text_encoder = torch.compile(pipeline.text_encoder)  # compiles when it is called, which it is not
    assert torch.equal(states(sd_erase.load_erased(pipeline, files["run"])), expected)


@pytest.mark.parametrize("prefix", ["", "text_encoders.clip_l.transformer."])
def test_what_comfyui_saves_of_our_file_is_read(files: dict[str, Path], pipeline: Any, tmp_path: Path, prefix: str) -> None:
    """CLIPSave adds the projection that our file does not have, as the identity, and a logit scale; no header is left."""
    tensors = {f"{prefix}{name}": value for name, value in safetensors.torch.load_file(files["comfyui"]).items()}
    tensors |= {f"{prefix}text_projection.weight": torch.eye(128), f"{prefix}logit_scale": torch.tensor(4.6)}
    safetensors.torch.save_file(tensors, tmp_path / "saved.safetensors", {"format": "pt"})
    erased = sd_erase.load_erased(pipeline, tmp_path / "saved.safetensors")
    assert torch.equal(states(erased), states(sd_erase.load_erased(pipeline, files["run"])))


@pytest.mark.parametrize("moved", [False, True])
def test_what_comfyuis_lorasave_writes_is_read(files: dict[str, Path], pipeline: Any, tmp_path: Path, moved: bool) -> None:
    """It names every layer, those that stayed as they were too, and the projection that our encoders do not have."""
    place = "text_encoders.clip_l.transformer."
    tensors = {f"{place}text_projection.{part}.weight": torch.zeros(4, 4) for part in ("lora_up", "lora_down")}
    tensors[f"{place}text_projection.lora_down.weight"] += 0.1
    tensors[f"{place}text_projection.lora_up.weight"] += 0.1 * moved
    tensors |= {f"{place}text_model.final_layer_norm.{part}": torch.zeros(128) for part in ("diff", "diff_b")}
    for name, value in safetensors.torch.load_file(files["lora"]).items():
        layer, _, part = name.partition(".")
        if part != "alpha":
            dotted = layer.removeprefix("lora_te_text_model_encoder_layers_").partition("_")
            module = next(each for each in formats.LINEARS if each.replace(".", "_") == dotted[2])
            tensors[f"{place}text_model.encoder.layers.{dotted[0]}.{module}.{part}"] = value
    safetensors.torch.save_file(tensors, tmp_path / "extracted.safetensors")
    if moved:  # a change of what is not there is not dropped
        with pytest.raises(UserError, match="text_projection"):
            sd_erase.load_erased(pipeline, tmp_path / "extracted.safetensors")
        return
    erased = sd_erase.load_erased(pipeline, tmp_path / "extracted.safetensors")
    assert torch.allclose(states(erased), states(sd_erase.load_erased(pipeline, files["run"])), atol=1e-5)


@pytest.mark.parametrize("given", ["none", "identity", "own"])
def test_the_projection_of_sd3s_encoder_is_not_replaced_by_a_filler(given: str) -> None:
    """Its pooled output is projected: a CLIP-L file's missing projection, or ComfyUI's identity, must not take its place."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16
    )
    torch.manual_seed(0)
    encoder = CLIPTextModelWithProjection(config)
    state = {name: value + 1 for name, value in hosts.own_state(encoder).items()}
    if given != "own":
        del state["text_projection.weight"]
    if given == "identity":
        state["text_projection.weight"] = torch.eye(16)
    changed = hosts.with_weights(encoder, state, Path("x")).state_dict()
    expected = encoder.text_projection.weight + (given == "own")
    assert torch.equal(changed["text_projection.weight"], expected)
    assert torch.equal(hosts.own_state(hosts.with_weights(encoder, state, Path("x")))[hosts.ROWS], state[hosts.ROWS])


def test_names_that_no_encoder_has_are_told(pipeline: Any) -> None:
    state = hosts.own_state(pipeline.text_encoder)
    state["text_model.encoder.layers.0.self_attn.extra.weight"] = torch.zeros(1)
    del state["text_model.final_layer_norm.bias"]
    with pytest.raises(UserError, match="1 of its tensors are missing, first text_model.final_layer_norm.bias; 1 do not belong"):
        hosts.with_weights(pipeline.text_encoder, state, Path("mine"))
    pipeline.text_encoder.register_parameter("strange", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match="of the pipeline cannot be loaded, 1 do not belong to it, first strange"):
        hosts.own_names(pipeline.text_encoder)


def test_the_run_is_untouched(files: dict[str, Path]) -> None:
    assert (RunDir(files["run"]).encoder / "text_encoder" / "model.safetensors").is_file()


def test_a_copied_tokenizer_reads_and_writes_words_as_the_first_does() -> None:
    from transformers import AutoTokenizer

    from sd_erase.bases import POCKET_FOLDER
    from sd_erase.erasure.pseudo_words import _Content, _words

    tokenizer = AutoTokenizer.from_pretrained(POCKET_FOLDER / "tokenizer")
    copy = hosts.copied(tokenizer)
    ids = tokenizer("a photo of a dog").input_ids
    assert copy is not tokenizer and copy("a photo of a dog").input_ids == ids
    assert copy.decode(ids) == tokenizer.decode(ids) and "</w>" not in copy.decode(ids)
    assert (
        _words.__wrapped__(_Content(copy), 3000) == _words.__wrapped__(_Content(tokenizer), 3000) != []
    )  # what the search for words is made of
