"""What a model is, its own files say: family, size, prediction, steps and guidance, and what is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import SMALL
from safetensors.torch import save_file

from sd_erase import bases, digests, hub, modelfiles
from sd_erase.drawing import base_stamp
from sd_erase.errors import UserError

ROW = bases.ROWS["sd15"]


def folder(path: Path, name: str, **changes: dict[str, Any]) -> Path:
    """The small files of a published model: our full configuration "sd15", "sd21" or "sdxl" with `changes` to a component's."""
    for source in (bases.CONFIGURATIONS / name).rglob("*.json"):
        part = source.parent.name if source.name != "model_index.json" else "index"
        target = path / source.relative_to(bases.CONFIGURATIONS / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**json.loads(source.read_text()), **changes.get(part, {})}))
    return path


EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "trailing"}
ANCESTRAL = {**EULER, "_class_name": "EulerAncestralDiscreteScheduler"}
PUBLISHED = {
    # name of the folder, our configuration, changes -> family, resolution, prediction, steps, guidance
    "v1-5": ("sd15", {}, ("sd1", 512, "epsilon", 30, 7.5)),
    "my-xl-look": ("sd15", {}, ("sd1", 512, "epsilon", 30, 7.5)),
    "pocket": ("sd15", {}, ("sd1", 512, "epsilon", 30, 7.5)),
    "stable-diffusion-2-1": ("sd21", {}, ("sd2", 768, "v_prediction", 30, 7.5)),
    "stable-diffusion-2-1-base": ("sd21", {"unet": {"sample_size": 64}, "scheduler": {"prediction_type": "epsilon"}}, ("sd2", 512, "epsilon", 30, 7.5)),
    "sd-turbo": ("sd21", {"unet": {"sample_size": 64}, "scheduler": EULER}, ("sd2", 512, "epsilon", 4, 0.0)),
    "plain": ("sdxl", {}, ("sdxl", 1024, "epsilon", 30, 5.0)),
    "sdxl-turbo": ("sdxl", {"unet": {"sample_size": 64}, "scheduler": ANCESTRAL}, ("sdxl", 512, "epsilon", 4, 0.0)),
    "vpred-xl": ("sdxl", {"scheduler": {**EULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
                 ("sdxl", 1024, "v_prediction", 30, 5.0)),
    "lcm": ("sd15", {"unet": {"time_cond_proj_dim": 256, "sample_size": 96}, "index": {"_class_name": "LatentConsistencyModelPipeline"}},
            ("sd1", 768, "epsilon", 4, 8.5)),
    "lcm-merged": ("sd15", {"scheduler": {"_class_name": "LCMScheduler"}}, ("sd1", 512, "epsilon", 4, 1.0)),
    "img2img": ("sd15", {"index": {"_class_name": "StableDiffusionImg2ImgPipeline"}}, ("sd1", 512, "epsilon", 30, 7.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_is_what_its_files_say(name: str, tmp_path: Path) -> None:
    configuration, changes, expected = PUBLISHED[name]
    base = bases.resolve(str(folder(tmp_path / name, configuration, **changes)))
    assert (base.family, base.resolution, base.prediction, base.steps, base.guidance) == expected
    assert not base.pocket and base.learning_rate_scale == ROW.learning_rate_scale and base.detector == ROW.detector
    assert base.encoders == bases.ROWS[{"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[expected[0]]].encoders
    assert ("a distilled model's" in base.about) == (expected[3] == 4)
    assert ("no file states these" in base.about) == (expected[3] != 4)
    bases.check_draws(base)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: other\nlicense_name: sai-nc-community\n---\n# A model", "sai-nc-community"),
        ("---\nlicense: openrail++\ntags: [x]\n---\n", "openrail++"),
        ("---\nlicense: other\n---\n", "its maker's; that of Stable Diffusion 1.5 is CreativeML OpenRAIL-M"),
        ("# license: mit", "its maker's; that of Stable Diffusion 1.5 is CreativeML OpenRAIL-M"),
    ],
)
def test_a_licence_is_the_one_that_its_maker_states(text: str, licence: str, tmp_path: Path) -> None:
    (folder(tmp_path, "sd15") / "README.md").write_text(text)
    assert bases.resolve(str(tmp_path)).licence == licence


def index(**parts: list[str] | str | None) -> dict[str, Any]:
    return {"index": {name: value if isinstance(value, (list, str)) else [None, None] for name, value in parts.items()}}


T5, CHATGLM = ["transformers", "T5EncoderModel"], ["kolors", "ChatGLMModel"]
OTHER = {
    "Kolors": ("sdxl", index(_class_name="KolorsPipeline", text_encoder=CHATGLM, text_encoder_2=None), "ChatGLM"),
    "ChatGLM by its part": ("sdxl", index(text_encoder=CHATGLM, text_encoder_2=None), "its text encoder is a ChatGLMModel"),
    "refiner": ("sdxl", index(_class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=None), "the refiner of Stable Diffusion XL"),
    "upscaler": ("sd21", index(_class_name="StableDiffusionUpscalePipeline"), "an upscaler"),
    "upscaler by its channels": ("sd21", {"unet": {"in_channels": 7}}, "an upscaler"),
    "InstructPix2Pix": ("sd15", index(_class_name="StableDiffusionInstructPix2PixPipeline"), "InstructPix2Pix"),
    "InstructPix2Pix by its channels": ("sd15", {"unet": {"in_channels": 8}}, "InstructPix2Pix"),
    "depth": ("sd21", {"unet": {"in_channels": 5}}, "depth map"),
    "SD 3": ("sd15", index(_class_name="StableDiffusion3Pipeline", unet=None, transformer=["diffusers", "SD3Transformer2DModel"]), "Stable Diffusion 3"),
    "FLUX": ("sd15", index(_class_name="FluxPipeline", unet=None, text_encoder_2=T5), "FLUX"),
    "PixArt": ("sd15", index(_class_name="PixArtAlphaPipeline", unet=None, text_encoder=T5), "not CLIP"),
    "IF": ("sd15", index(_class_name="IFPipeline", text_encoder=T5), "T5"),
    "T5 by its part": ("sd15", index(text_encoder=T5), "its text encoder is a T5EncoderModel"),
    "video": ("sd15", index(_class_name="TextToVideoSDPipeline", unet=["diffusers", "UNet3DConditionModel"]), "a video model"),
    "a 3D denoiser by its part": ("sd15", index(unet=["diffusers", "UNet3DConditionModel"]), "its denoiser is a UNet3DConditionModel"),
    "unCLIP": ("sd21", index(_class_name="StableUnCLIPPipeline"), "image embeddings"),
    "class embeddings": ("sd21", {"unet": {"class_embed_type": "projection"}}, "class embeddings"),
    "ONNX": ("sd15", index(_class_name="OnnxStableDiffusionPipeline", text_encoder=["diffusers", "OnnxRuntimeModel"]), "another runtime"),
    "unconditional": ("sd15", index(_class_name="DDPMPipeline", text_encoder=None, unet=["diffusers", "UNet2DModel"]), "it has no text encoder"),
    "another language model": ("sd15", {"text_encoder": {"model_type": "bert"}}, "whose text encoder is a bert"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_another_model_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    configuration, changes, words = OTHER[name]
    with pytest.raises(UserError) as refusal:
        bases.resolve(str(folder(tmp_path / "xl", configuration, **changes)))
    assert words in str(refusal.value) and "which is not supported: pass a model of" in str(refusal.value), refusal.value


def test_parts_of_two_models_are_no_model(tmp_path: Path) -> None:
    folder(tmp_path, "sd15", text_encoder={"hidden_size": 1024})
    with pytest.raises(UserError, match="its denoiser reads 768 numbers a token .* its text encoders give 1024"):
        bases.resolve(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_damaged_configuration_is_named(content: str, tmp_path: Path) -> None:
    path = folder(tmp_path, "sd15") / "unet" / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match="unet/config.json"):
        bases.resolve(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="has no unet/config.json: restore the whole folder"):
        bases.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": "{}"}, "a LoRA alone"),
        ({"explora.safetensors": ""}, "pass that file's own path"),
        ({"config.json": '{"_class_name": "ControlNetModel"}'}, "a ControlNet alone"),
        ({"config.json": '{"_class_name": "UNet2DConditionModel"}'}, "a denoiser alone"),
        ({"config.json": '{"model_type": "clip_text_model"}'}, "a text encoder alone"),
        ({"learned_embeds.safetensors": ""}, "a textual inversion alone"),
        ({"dream.safetensors": ""}, "pass that file's own path"),
    ],
)
def test_a_folder_of_one_part_is_named(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"is a folder without model_index.json .*{words}"):
        bases.resolve(str(tmp_path))


def test_a_folder_of_a_lora_is_known_by_its_tensors(tmp_path: Path) -> None:
    save_file({"text_encoder.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"is a folder without model_index.json \(a LoRA alone\)"):
        bases.resolve(str(tmp_path))


def test_an_inpainting_folder_trains_and_says_why_it_draws_nothing(tmp_path: Path) -> None:
    base = bases.resolve(
        str(folder(tmp_path / "a", "sd15", unet={"in_channels": 9}, index={"_class_name": "StableDiffusionInpaintPipeline"}))
    )
    assert base.family == "sd1"
    with pytest.raises(UserError, match="an inpainting model .*train and export from it"):
        bases.check_draws(base)
    # an inpainting pipeline around an ordinary denoiser draws
    bases.check_draws(bases.resolve(str(folder(tmp_path / "b", "sd15", index={"_class_name": "StableDiffusionInpaintPipeline"}))))
    with pytest.raises(UserError, match="has no autoencoder"):
        bases.check_draws(bases.resolve(str(folder(tmp_path / "c", "sd15", **index(vae=None)))))


def test_the_pocket_is_known_by_its_statement(tmp_path: Path) -> None:
    base = bases.resolve(
        str(
            folder(
                tmp_path / "x",
                "sd15",
                text_encoder={"sd_erase_base": "pocket", "hidden_size": 128},
                unet={"cross_attention_dim": 128, "sample_size": 16},
                vae={"block_out_channels": [1, 2, 3]},
            )
        )
    )
    assert (base.pocket, base.detector, base.resolution, base.learning_rate_scale) == (True, "pocket", 64, 1.0)
    narrow = folder(tmp_path / "y", "sd15", text_encoder={"hidden_size": 128}, unet={"cross_attention_dim": 128})
    assert not bases.resolve(str(narrow)).pocket
    (tmp_path / "clip").mkdir()
    for text, is_pocket in (({"hidden_size": 128}, False), ({"hidden_size": 128, "sd_erase_base": "pocket"}, True)):
        (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text}))
        assert bases.resolve(str(tmp_path / "clip")).pocket is is_pocket
    shipped = json.loads((bases.POCKET_FOLDER / "clip" / "config.json").read_text())
    assert shipped["text_config"][modelfiles.STATEMENT] == "pocket"


def test_the_pocket_without_its_statement_is_known_by_its_sizes(tmp_path: Path) -> None:
    """As earlier versions exported it: with an SD 1.x encoder's learning rate and detector it would train to nothing."""
    for path in bases.POCKET_FOLDER.rglob("*.json"):
        target = tmp_path / "old" / path.relative_to(bases.POCKET_FOLDER)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    text = tmp_path / "old" / "text_encoder" / "config.json"
    text.write_text(json.dumps({k: v for k, v in json.loads(text.read_text()).items() if k != modelfiles.STATEMENT}))
    base, row = bases.resolve(str(tmp_path / "old")), bases.ROWS["pocket"]
    assert base.pocket and (base.detector, base.steps, base.learning_rate_scale) == (row.detector, row.steps, 1.0)
    assert base.notes == (f"{tmp_path / 'old'} does not state what it is; by its sizes it is the pocket model.",)
    assert bases.resolve(str(bases.POCKET_FOLDER)).notes == ()
    text.write_text(json.dumps({**json.loads(text.read_text()), "num_hidden_layers": 5}))
    assert not bases.resolve(str(tmp_path / "old")).pocket


# --- one-file checkpoints ---------------------------------------------------------------------------------------------------

U, CLIP_L, CLIP_H = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
BIAS = f"{U}output_blocks.11.1.transformer_blocks.0.norm1.bias"
PARTS = {f"{U}input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3), "first_stage_model.decoder.conv_in.weight": torch.zeros(1)}
SD1 = {**PARTS, f"{CLIP_L}encoder.layers.0.mlp.fc1.weight": torch.zeros(1)}
SD2 = {**PARTS, f"{CLIP_H}transformer.resblocks.0.ln_1.weight": torch.zeros(1)}
XL = {
    **PARTS,
    "conditioner.embedders.0.transformer.text_model.x": torch.zeros(1),
    "conditioner.embedders.1.model.x": torch.zeros(1),
}
MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def one_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bases.Base:
    save_file({name: value.clone() for name, value in tensors.items()}, path / "my-xl.safetensors", metadata)
    return bases.resolve(str(path / "my-xl.safetensors"))


STATED = [
    (SD1, {}, ("sd1", 512, "epsilon", True, False)),
    (SD1, {"modelspec.resolution": "768x768"}, ("sd1", 768, "epsilon", True, False)),
    (SD1, {"modelspec.resolution": "768x512"}, ("sd1", 512, "epsilon", True, False)),
    (SD1 | MARKS, {}, ("sd1", 512, "v_prediction", True, True)),
    (SD2, {}, ("sd2", 512, "epsilon", False, False)),
    (SD2 | {BIAS: torch.linspace(-1, 1, 320)}, {}, ("sd2", 768, "v_prediction", False, False)),
    (SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("sd2", 768, "v_prediction", True, False)),
    (SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v", "sd_erase.version": "0.1"}, ("sd2", 512, "epsilon", False, False)),
    (SD2 | {BIAS: torch.linspace(-1, 1, 320)}, {"modelspec.prediction_type": "epsilon"}, ("sd2", 512, "epsilon", True, False)),
    (XL, {}, ("sdxl", 1024, "epsilon", True, False)),
    (XL | MARKS, {}, ("sdxl", 1024, "v_prediction", True, True)),
    (XL, {"modelspec.predict_key": "v", "modelspec.resolution": "512x512"}, ("sdxl", 512, "v_prediction", True, False)),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "metadata", "expected"), STATED)
def test_a_checkpoint_is_what_its_tensors_and_metadata_say(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    base = one_file(tmp_path, tensors, metadata or None)
    assert (base.family, base.resolution, base.prediction, base.prediction_is_sure, base.zero_snr) == expected
    bases.check_draws(base)


def test_the_settings_beside_a_checkpoint_are_read(tmp_path: Path) -> None:
    beside = tmp_path / "my-xl.yaml"
    beside.write_text('model:\n  params:\n    parameterization: "v"\n')
    assert one_file(tmp_path, SD1).prediction == "v_prediction"
    beside.write_text('model:\n  params:\n    parameterization: "eps"\n')
    base = one_file(tmp_path, SD2 | {BIAS: torch.linspace(-1, 1, 320)})
    assert (base.prediction, base.resolution, base.prediction_is_sure) == ("epsilon", 512, True)


@pytest.mark.parametrize(
    ("tensors", "metadata", "text", "is_another"),
    [
        (SD1, {}, 'parameterization: "v"', True),
        (SD1, {}, "parameterization: eps", False),  # as the file alone is
        (SD1, {}, "target: ldm.models.diffusion.ddpm.LatentDiffusion", False),
        (SD1 | MARKS, {}, "parameterization: eps", False),  # the file's own statement wins
        (SD2, {}, 'parameterization: "v"', True),
        (SD2 | {BIAS: torch.linspace(-1, 1, 320)}, {}, "parameterization: eps", True),
        (XL, {"modelspec.prediction_type": "epsilon"}, 'parameterization: "v"', False),
    ],
)
def test_settings_that_come_beside_a_checkpoint_make_another_model_of_it(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], text: str, is_another: bool, tmp_path: Path
) -> None:
    """Images drawn before and after are of two models although the checkpoint is the same; where nothing changes, they are of one."""
    before = one_file(tmp_path, tensors, metadata or None)
    contents, text_only, stamp = digests.of_base(before), digests.of_base(before, text_only=True), base_stamp(before)
    (tmp_path / "my-xl.yaml").write_text(f"model:\n  params:\n    {text}\n")
    after = bases.resolve(before.source)
    assert (after.prediction != before.prediction) == is_another == (base_stamp(after) != stamp)
    assert digests.difference(contents or {}, digests.of_base(after) or {}) == ("the .yaml beside it" if is_another else "")
    assert digests.of_base(after, text_only=True) == text_only  # which the encoders do not depend on


def test_the_scheduler_of_a_checkpoint_follows_its_marks(tmp_path: Path) -> None:
    from sd_erase import components

    found = components.scheduler(one_file(tmp_path, XL | MARKS))
    config = found.config
    assert type(found).__name__ == "EulerDiscreteScheduler" and config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing"
    found.set_timesteps(10)
    assert int(found.timesteps[0]) == 999 and float(found.alphas_cumprod[-1]) < 1e-6
    found = components.scheduler(one_file(tmp_path, SD1 | MARKS))
    assert type(found).__name__ == "DDIMScheduler" and float(found.alphas_cumprod[-1]) < 1e-6
    plain = components.scheduler(one_file(tmp_path, SD1))
    assert type(plain).__name__ == "PNDMScheduler" and plain.config.prediction_type == "epsilon"


WITHOUT = [
    ({name: value for name, value in SD1.items() if "first_stage" not in name}, "holds no autoencoder (a NoVAE file)"),
    ({name: value for name, value in SD1.items() if U not in name}, "holds no denoiser"),
    (SD1 | {f"{U}input_blocks.0.0.weight": torch.zeros(4, 9, 3, 3)}, "is an inpainting model"),
    (XL | {"edm_vpred.sigma_max": torch.ones(1)}, "is an EDM model"),
]


@pytest.mark.parametrize(("tensors", "words"), WITHOUT)
def test_a_checkpoint_that_lacks_a_part_says_which(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    base = one_file(tmp_path, tensors)
    with pytest.raises(UserError) as refusal:
        bases.check_draws(base)
    assert words in str(refusal.value) and "train and export from it" in str(refusal.value)


OTHER_FILES = [
    ({**PARTS, "conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)}, "the refiner"),
    ({f"{U}joint_blocks.0.x": torch.zeros(1)}, "Stable Diffusion 3"),
    ({f"{U}double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "FLUX"),
    ({"text_encoders.t5xxl.transformer.x": torch.zeros(1)}, "a model with a T5"),
    (SD1 | {f"{U}input_blocks.1.1.time_stack.x": torch.zeros(1)}, "a video model"),
    (SD1 | {f"{U}input_blocks.0.0.weight": torch.zeros(4, 8, 3, 3)}, "InstructPix2Pix"),
    (SD2 | {f"{U}input_blocks.0.0.weight": torch.zeros(4, 7, 3, 3)}, "an upscaler"),
    (SD2 | {f"{U}label_emb.0.0.weight": torch.zeros(1)}, "class or image embeddings"),
    ({"lora_unet_x.lora_up.weight": torch.zeros(1, 1)}, "a LoRA alone"),
    ({"control_model.input_blocks.0.0.weight": torch.zeros(1)}, "a ControlNet alone"),
    ({"emb_params": torch.zeros(1)}, "a textual inversion alone"),
    ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(1)}, "a text encoder alone"),
    (PARTS, "a denoiser alone"),
    ({"decoder.conv_in.weight": torch.zeros(1)}, "an autoencoder alone"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), OTHER_FILES)
def test_another_file_is_named_in_one_sentence(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        one_file(tmp_path, tensors)
    assert words in str(refusal.value) and "which is not supported: pass a model of" in str(refusal.value), refusal.value


def test_tensors_of_no_part_are_said(tmp_path: Path) -> None:
    extra = {
        "model_ema.decay": torch.zeros(1),
        "betas": torch.zeros(1),
        "sqrt_recip_alphas_cumprod": torch.zeros(1),
        "logvar": torch.zeros(1),
    }
    assert one_file(tmp_path, SD1 | extra).notes == ()
    (note,) = one_file(tmp_path, SD1 | extra | {"lora_te_x.alpha": torch.ones(1), "my.weight": torch.ones(1)}).notes
    assert "2 tensors of my-xl.safetensors belong to no part" in note and "first lora_te_x.alpha" in note


# --- hub ids ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, identifier: str, name: str, **changes: dict[str, Any]) -> Path:
    """A model as the hub's library keeps it."""
    place = cache / f"models--{identifier.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return folder(place / "snapshots" / ("0" * 40), name, **changes)


def test_a_hub_id_is_what_its_files_say_and_not_its_name(cache: Path) -> None:
    cached(cache, "me/anime-xl-2-1", "sd15")
    base = bases.resolve("me/anime-xl-2-1")
    assert (base.name, base.source, base.family, base.resolution) == ("anime-xl-2-1", "me/anime-xl-2-1", "sd1", 512)
    cached(cache, "me/plain", "sdxl", unet={"sample_size": 64}, scheduler=ANCESTRAL)
    base = bases.resolve("me/plain")
    assert (base.family, base.resolution, base.steps, base.guidance) == ("sdxl", 512, 4, 0.0)


def test_a_row_that_its_files_contradict_loses(cache: Path) -> None:
    assert bases.resolve("sd21") == bases.ROWS["sd21"]
    cached(cache, bases.ROWS["sd21"].source, "sd21", unet={"sample_size": 64}, scheduler={"prediction_type": "epsilon"})
    base = bases.resolve("sd21")
    assert (base.name, base.resolution, base.prediction, base.licence) == ("sd21", 512, "epsilon", bases.ROWS["sd21"].licence)


def test_a_hub_id_that_is_not_there_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(
        UserError, match=r"me/there-is-none cannot be fetched from the hub \(HF_HUB_OFFLINE is set\): pass a local"
    ):
        bases.resolve("me/there-is-none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_fault", lambda *_: "ConnectError")
    with pytest.raises(UserError, match=r"me/there-is-none cannot be fetched from the hub \(ConnectError\)"):
        bases.resolve("me/there-is-none")


def test_the_narrow_models_of_the_tests_are_what_they_say(tmp_path: Path) -> None:
    for name in SMALL:
        base = bases.resolve(str(folder(tmp_path / name, name, **SMALL[name], vae={"block_out_channels": [32] * 4})))
        assert (base.family, base.resolution) == ({"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[name], 64)
