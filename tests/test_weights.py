"""Loading is strict for every component of every source: what a file lacks, or has too much, is told by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from erased import erased_run
from ldm import checkpoint
from narrow import SMALL, build, narrow
from safetensors.torch import load_file, save_file

from sd_erase import bases, components, formats, mismatch, weights
from sd_erase.errors import UserError
from sd_erase.formats import read_header

TEXT, UNET, VAE = "text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
State = dict[str, torch.Tensor]

VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A narrow Stable Diffusion 1.5 in a diffusers folder ("model") and in one file ("one.safetensors"), beside its configuration."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("original")
        pipeline = build(narrow("sd15", folder, patch))
    pipeline.save_pretrained(folder / "model")
    save_file(checkpoint(pipeline), folder / "one.safetensors")
    return folder, pipeline


@pytest.fixture
def model(original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both."""
    shutil.copytree(original[0] / "model", tmp_path / "model")
    (tmp_path / "one.safetensors").hardlink_to(original[0] / "one.safetensors")
    monkeypatch.setattr(bases, "CONFIGURATIONS", original[0] / "configs")
    return tmp_path


def rewrite(path: Path, change: Callable[[State], State]) -> None:
    state = {key: value.clone() for key, value in load_file(path).items()}
    path.unlink()
    save_file({key: value.contiguous() for key, value in change(state).items()}, path, {"format": "pt"})


def without(pattern: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not re.search(pattern, key)}


def renamed(pattern: str, new: str) -> Callable[[State], State]:
    return lambda state: {re.sub(pattern, new, key): value for key, value in state.items()}


def cut(pattern: str) -> Callable[[State], State]:
    return lambda state: {key: value[..., :-1] if re.search(pattern, key) else value for key, value in state.items()}


def typed(pattern: str, dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {key: value.to(dtype) if re.search(pattern, key) else value for key, value in state.items()}


ADAPTED = {"q_proj.lora_A.default.weight": torch.zeros(4, 32), "q_proj.lora_B.default.weight": torch.zeros(32, 4)}


def with_lora(state: State) -> State:
    """As peft leaves an encoder."""
    state = renamed(r"q_proj\.(weight|bias)", r"q_proj.base_layer.\1")(state)
    prefix = next(key for key in state if "layers.0" in key and "q_proj" in key).partition("q_proj")[0]
    return state | {prefix + key: value for key, value in ADAPTED.items()}


FAULTS = [
    (TEXT, with_lora, ["text_encoder", "base_layer", "saved with a LoRA attached", "merge"]),
    (TEXT, without(r"layers\.1\."), ["text_encoder", "16 of its tensors are missing, first encoder.layers.1"]),
    (TEXT, without("final_layer_norm"), ["2 of its tensors are missing", "final_layer_norm"]),
    (TEXT, cut("fc1.weight"), ["2 have another shape", "64 x 31 in place of 64 x 32"]),
    (TEXT, lambda state: state | {"surprise": torch.zeros(1)}, ["1 do not belong to it, first surprise"]),
    (TEXT, lambda state: {**state, **{f"{next(iter(state))}.absmax": torch.zeros(1)}}, ["quantised"]),
    (TEXT, typed("fc1.weight", torch.int8), ["2 tensors as I8", "quantised"]),
    (TEXT, lambda state: {key: value * float("nan") if "fc2.bias" in key else value for key, value in state.items()}, ["NaN or infinite"]),
    (TEXT, lambda state: {f"module.{key}" if "layers" in key else key: value for key, value in state.items()}, ["DataParallel"]),
    (UNET, without("mid_block"), ["denoiser (UNet)", "tensors are missing, first mid_block"]),
    (UNET, with_lora_unet := (lambda state: state | {"mid_block.attentions.0.proj_in.lora_A.default.weight": torch.zeros(1)}), ["LoRA"]),
    (UNET, cut("conv_in.weight"), ["1 have another shape, first conv_in.weight"]),
    (VAE, without("^decoder"), ["autoencoder (VAE)", "tensors are missing, first decoder."]),
]  # fmt: skip


@pytest.mark.parametrize(("part", "change", "words"), FAULTS)
def test_a_folder_whose_tensors_do_not_fit_is_refused_by_name(
    part: str, change: Callable[[State], State], words: list[str], model: Path
) -> None:
    rewrite(model / "model" / f"{part}.safetensors", change)
    base = bases.resolve(str(model / "model"))
    with pytest.raises(UserError) as refusal:
        if part == TEXT:
            components.text_encoder(base, base.encoders[0])
        else:
            components.load_pipeline(base)
    assert all(word in str(refusal.value) for word in [*words, str(model / "model")]), refusal.value
    assert "truncated" not in str(refusal.value)


IN_ONE_FILE = [
    (renamed(r"layers\.0\.self_attn\.q_proj\.", "layers.0.self_attn.q_proj.base_layer."), ["text encoder", "saved with a LoRA attached"]),
    (without(r"text_model\.encoder\.layers\.1\."), ["text_encoder", "missing, first encoder.layers.1"]),
    (without("middle_block"), ["denoiser (UNet)", "missing, first mid_block"]),
    (without(r"input_blocks\.4\."), ["denoiser (UNet)", "missing"]),
    (without(r"first_stage_model\.decoder\.mid"), ["autoencoder (VAE)", "missing, first decoder.mid_block"]),
    (lambda state: state | {"model.diffusion_model.extra.weight": torch.zeros(1)}, ["denoiser", "1 do not belong to it, first extra.weight"]),
    (cut("first_stage_model.quant_conv.bias"), ["autoencoder", "another shape, first first_stage_model.quant_conv.bias with 7 in place of 8"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), IN_ONE_FILE)
def test_a_checkpoint_whose_tensors_do_not_fit_is_refused_by_name(
    change: Callable[[State], State], words: list[str], model: Path
) -> None:
    rewrite(model / "one.safetensors", change)
    with pytest.raises(UserError) as refusal:
        components.load_pipeline(bases.resolve(str(model / "one.safetensors")))
    assert all(word in str(refusal.value) for word in words), refusal.value


def same(first: Any, second: Any) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key].float(), theirs[key].float()) for key in ours)


def shards(path: Path) -> None:
    """A file in two, as the libraries write large ones."""
    state = load_file(path)
    names = sorted(state)
    for number, half in enumerate((names[::2], names[1::2]), 1):
        save_file({key: state[key] for key in half}, path.with_name(f"{path.stem}-{number:05}-of-00002.safetensors"))
    index = {"weight_map": {}}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()


READABLE = {
    "position_ids": lambda state: state | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    "of a whole CLIP": lambda state: state | {"text_projection.weight": torch.eye(32), "logit_scale": torch.tensor(4.6)},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "with the prefix": lambda state: {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()},
    "without the prefix": lambda state: {key.removeprefix("text_model."): value for key, value in state.items()},
}


@pytest.mark.parametrize("form", READABLE)
def test_what_is_unambiguous_is_read(form: str, model: Path, original: Any) -> None:
    rewrite(model / "model" / f"{TEXT}.safetensors", READABLE[form])
    base = bases.resolve(str(model / "model"))
    assert same(components.text_encoder(base, base.encoders[0]), original[1].text_encoder)


def test_old_names_of_the_autoencoder_are_read(model: Path, original: Any) -> None:
    def old(state: State) -> State:
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
        return state

    rewrite(model / "model" / f"{VAE}.safetensors", old)
    assert same(components.diffusers_part(bases.resolve(str(model / "model")), "vae", torch.float32), original[1].vae)


def test_a_folder_with_a_variant_or_with_shards_only_is_read(model: Path, original: Any) -> None:
    for part, kind in ((TEXT, "fp16"), (VAE, "fp16"), (UNET, "")):
        path = model / "model" / f"{part}.safetensors"
        if kind:
            path.rename(path.with_name(f"{path.stem}.{kind}.safetensors"))
        else:
            shards(path)
    loaded = components.load_pipeline(bases.resolve(str(model / "model")))
    assert all(same(getattr(loaded, part), getattr(original[1], part)) for part in ("text_encoder", "unet", "vae"))
    (model / "model" / f"{UNET}-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"unet of .* lacks shard 1 of 2 \(diffusion_pytorch_model-00002-of-00002.safetensors is there\)"
    ):
        components.load_pipeline(bases.resolve(str(model / "model")))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], None),
        (["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors", "model.bf16.safetensors"], 2),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.non_ema.safetensors"], ["model.non_ema.safetensors"]),
        (["model.ema.safetensors", "model.non_ema.safetensors"], "several variants (ema, non_ema)"),
        (["pytorch_model.bin", "config.json"], "weights that are pickles (pytorch_model.bin)"),
        (["config.json", "model_other.safetensors"], "has no model.safetensors"),
    ],
)  # fmt: skip
def test_which_files_hold_a_component(names: list[str], chosen: list[str] | str | int | None) -> None:
    if isinstance(chosen, str):
        with pytest.raises(UserError, match=re.escape(chosen)):
            weights.choose_files(names, "model", "text_encoder of X")
    elif isinstance(chosen, list):
        assert weights.choose_files(names, "model", "text_encoder of X") == chosen
    else:
        assert weights.choose_files(names, "model", "text_encoder of X") == sorted(names)[:2]


def test_more_token_rows_are_kept_and_said(model: Path) -> None:
    folder = model / "model"
    rewrite(folder / f"{TEXT}.safetensors", lambda state: {
        key: torch.cat([value, value[:2]]) if "token_embedding" in key else value for key, value in state.items()
    })  # fmt: skip
    from sd_erase.clip import load_towers

    towers = load_towers(bases.resolve(str(folder)), torch.device("cpu"), need_images=False)
    assert towers.text.get_input_embeddings().weight.shape[0] == 49_410
    assert any("49,410 token rows, 2 more than CLIP's" in note and "--to diffusers" in note for note in towers.notes)


def test_a_tokenizer_that_does_not_say_its_length_cuts_at_the_encoders(model: Path) -> None:
    path = model / "model" / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("model_max_length")
    path.write_text(json.dumps(settings))
    base = bases.resolve(str(model / "model"))
    assert components.tokenizer(base, base.encoders[0]).model_max_length == 77
    pipeline = components.load_pipeline(base)
    images = pipeline(["a dog " * 100], num_inference_steps=1, height=64, width=64, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_a_tokenizer_with_tokens_of_its_own_is_refused(model: Path) -> None:
    from transformers import CLIPTokenizer

    place = model / "model" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["<my-dog>", "<my-cat>"])
    tokenizer.save_pretrained(place)
    base = bases.resolve(str(model / "model"))
    with pytest.raises(UserError, match="tokenizer of .* has 49,410 tokens, its text_encoder rows for 49,408"):
        components.encoder_with_tokenizer(base, base.encoders[0])


def test_a_partner_of_another_model_is_no_error_where_none_is_needed(model: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from sd_erase.clip import load_towers

    text = {**SMALL["sd15"]["text_encoder"], "num_hidden_layers": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)).save_pretrained(model / "clip")
    CLIPImageProcessor().save_pretrained(model / "clip")
    base = dataclasses.replace(bases.resolve(str(model / "model")), clip_partner=str(model / "clip"))
    assert load_towers(base, torch.device("cpu"), need_images=False).clip is None
    with pytest.raises(UserError, match="does not fit the base's text encoder .*--clip"):
        load_towers(base, torch.device("cpu"), need_images=True)


MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def test_a_checkpoint_without_an_autoencoder_is_erased_and_exported_with_its_marks(model: Path) -> None:
    from sd_erase import catalog
    from sd_erase.images import generate

    def change(state: State) -> State:
        return without("first_stage_model")(state) | MARKS

    source = str(model / "one.safetensors")
    rewrite(model / "one.safetensors", change)
    settings, run = erased_run(model, bases.resolve(source), source)
    for kind in ("a1111", "comfyui", "lora"):
        export = dataclasses.replace(settings.export, to=kind, output=str(model / kind))
        catalog.resolve(catalog.EXPORTS, kind, "")(dataclasses.replace(settings, export=export), run)
    (written,) = (model / "a1111").glob("*.safetensors")
    assert (
        read_header(written).shape("v_pred") == (0,)
        and read_header(written).tensors.keys() == read_header(Path(source)).tensors.keys()
    )
    with pytest.raises(UserError, match=r"holds no autoencoder \(a NoVAE file\), so it draws no images"):
        generate(dataclasses.replace(settings, generate=dataclasses.replace(settings.generate, prompts=("bicycle",))), run)


def test_exports_of_an_encoder_with_added_tokens_say_who_cannot_load_them(model: Path) -> None:
    from sd_erase import catalog

    def add(state: State) -> State:
        return {key: torch.cat([value, value[:2]]) if "token_embedding" in key else value for key, value in state.items()}

    source = str(model / "one.safetensors")
    rewrite(model / "one.safetensors", add)
    settings, run = erased_run(model, bases.resolve(source), source)
    for kind in ("a1111", "comfyui"):
        export = dataclasses.replace(settings.export, to=kind, output=str(model / kind))
        result = catalog.resolve(catalog.EXPORTS, kind, "")(dataclasses.replace(settings, export=export), run)
        assert any("49,410 token rows" in warning and "--to lora" in warning for warning in result["warnings"]), result[
            "warnings"
        ]


def test_an_inpainting_model_is_a_pipeline_of_its_own(original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = original[0] / "configs" / "sd15" / "unet" / "config.json"
    settings = json.loads(place.read_text())
    monkeypatch.setattr(bases, "CONFIGURATIONS", original[0] / "configs")
    place.write_text(json.dumps(settings | {"in_channels": 9}))
    try:
        pipeline = build(original[0] / "configs" / "sd15")
    finally:
        place.write_text(json.dumps(settings))
    pipeline.save_pretrained(tmp_path / "model")
    save_file(checkpoint(pipeline), tmp_path / "one.safetensors")
    for source in (tmp_path / "model", tmp_path / "one.safetensors"):
        base = bases.resolve(str(source))
        with pytest.raises(UserError, match="is an inpainting model"):
            components.load_pipeline(base)
        loaded = components.load_pipeline(base, draws=False)
        assert type(loaded).__name__ == "StableDiffusionInpaintPipeline" and same(loaded.unet, pipeline.unet)


def test_of_a_hub_id_only_the_files_of_the_component_are_fetched(
    model: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    names = [str(path.relative_to(model / "model")) for path in (model / "model").rglob("*") if path.is_file()]
    place = model / "hub" / "models--me--mine"
    snapshot = place / "snapshots" / ("0" * 40)
    for name in names:
        if not name.endswith(".safetensors"):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / "model" / name, snapshot / name)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    fetched = []

    def fetch(identifier: str, name: str, revision: str) -> str:
        assert (identifier, revision) == ("me/mine", "0" * 40)
        fetched.append(name)
        shutil.copyfile(model / "model" / name, snapshot / name)
        return str(snapshot / name)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(model / "hub"))
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda identifier, revision: [*names, "text_encoder/model.fp16.safetensors"]
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    base = bases.resolve("me/mine")
    for _ in range(2):
        assert same(components.text_encoder(base, base.encoders[0]), original[1].text_encoder)
    assert fetched == [f"{TEXT}.safetensors"]


def test_an_erased_encoder_that_does_not_fit_is_refused(model: Path) -> None:
    from sd_erase.pipeline import load_erased

    pipeline = components.load_pipeline(bases.resolve(str(model / "model")))
    state = formats.prefixed(pipeline.text_encoder.state_dict())
    for change, words in (
        (with_lora, "LoRA attached"),
        (without(r"layers\.1\."), "missing"),
        (cut("fc1.weight"), "another shape"),
    ):
        file = model / "erased.safetensors"
        save_file({key: value.contiguous() for key, value in change(state).items()}, file)
        with pytest.raises(UserError, match=words):
            load_erased(pipeline, file)
    save_file(state | {"text_projection.weight": torch.eye(32)}, file)  # as ComfyUI's CLIPSave writes it
    assert same(load_erased(pipeline, file).text_encoder, pipeline.text_encoder)


def test_a_clip_partner_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = SMALL["sd15"]["text_encoder"]
    model = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 64}, vision_config=VISION, projection_dim=32))
    model.save_pretrained(tmp_path)
    assert same(components.clip_model(str(tmp_path)), model)
    for change, words in ((without("visual_projection"), "1 of its tensors are missing, first visual_projection.weight"),
                          (without("vision_model.encoder"), "tensors are missing, first vision_model.encoder"),
                          (lambda state: state | {"vision_model.extra": torch.zeros(1)}, "do not belong to it")):  # fmt: skip
        model.save_pretrained(tmp_path)
        rewrite(tmp_path / "model.safetensors", change)
        with pytest.raises(UserError, match=words):
            components.clip_model(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        components.clip_model(str(tmp_path))


def test_a_blip_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

    from sd_erase import blip

    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    config = BlipConfig(
        text_config={**tower, "vocab_size": 64, "encoder_hidden_size": 32}, vision_config=vision, image_text_hidden_size=32
    )
    model = BlipForImageTextRetrieval(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    BlipImageProcessor().save_pretrained(tmp_path)
    assert same(blip.load(str(tmp_path))[0].text_projection, model.text_proj)
    rewrite(tmp_path / "model.safetensors", without("text_proj"))
    with pytest.raises(UserError, match="BLIP of .* 2 of its tensors are missing, first text_proj.bias"):
        blip.load(str(tmp_path))


def test_every_extra_and_origin_is_reached() -> None:
    extras = ["embeddings.position_ids", "text_model.embeddings.position_ids", "text_projection", "text_projection.weight", "logit_scale",
              "attn_mask", "visual_projection.weight", "vision_model.x", "visual.x", "loss.discriminator.x"]  # fmt: skip
    assert all(mismatch.is_extra(name) for name in extras)
    assert not any(
        mismatch.is_extra(name) for name in ("encoder.layers.0.x", "position_ids_2", "text_projection.bias", "my.logit_scale")
    )
    told = {"a.base_layer.weight": "LoRA", "a.SCB": "quantised", "a.weight_orig": "pruning", "a.parametrizations.weight.original0": "parametrisation",
            "module.a": "DataParallel", "a": "nothing is made up"}  # fmt: skip
    for name, word in told.items():
        assert word in str(mismatch.mismatch("text encoder", "file", unknown=[name]))
