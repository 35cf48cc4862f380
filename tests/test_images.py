"""Images: the same noise whatever the batch, nothing drawn twice, and prompts files as people write them."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from sd_erase import bases, drawing, images
from sd_erase.catalog import SCHEDULERS
from sd_erase.config import GenerateConfig, RunConfig
from sd_erase.errors import UserError
from sd_erase.images import Settings, generate_pairs, overlong_prompts
from sd_erase.prompts import Prompt
from sd_erase.rundir import RunDir, read_jsonl

PROMPTS = [Prompt("a bicycle next to a dog"), Prompt("an apple on a chair"), Prompt("a bus", seed=77)]
QUICK = Settings(seed=5, images_per_prompt=2, steps=3, guidance=3.0, height=64, width=64, batch_size=4)
STAMPS = {"original": "o", "erased": "e"}


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A Stable Diffusion with random weights and a second one that shares all but its text encoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bases.POCKET_FOLDER / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoders = [CLIPTextModel(config).eval() for _ in range(2)]
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        ).eval()  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction", steps_offset=1)
    pipelines = [
        StableDiffusionPipeline(
            vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=copy.deepcopy(scheduler),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
        for encoder in encoders
    ]  # fmt: skip
    for made in pipelines:
        made.set_progress_bar_config(disable=True)
    return pipelines[0], pipelines[1]


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are drawn from now on."""
    sizes: list[int] = []
    draw = drawing._draw

    def count(pipeline: Any, jobs: Any, *rest: Any) -> Any:
        sizes.append(len(jobs))
        return draw(pipeline, jobs, *rest)

    monkeypatch.setattr(drawing, "_draw", count)
    return sizes


def test_pairs_are_written_with_index_metadata_and_contact_sheet(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    about = {"erased": {"encoder": "erased: bicycle", "base": "pocket"}}
    result = generate_pairs(*tiny, PROMPTS, tmp_path, QUICK, stamps=STAMPS, about=about)
    rows = list(read_jsonl(tmp_path / "index.jsonl"))
    assert [(row["prompt_index"], row["seed"]) for row in rows] == [(0, 5), (0, 6), (1, 5), (1, 6), (2, 77), (2, 78)]
    assert rows[4]["original"] == "original/0002-seed77.png" and rows[4]["prompt"] == "a bus"
    assert result["images"] == 12 and result["drawn"] == 12 and result["warnings"] == []
    with Image.open(tmp_path / rows[4]["erased"]) as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "a bus" and image.text["seed"] == "77" and image.text["encoder"] == "erased: bicycle"
        assert image.text["steps"] == "3" and image.text["guidance"] == "3.0" and image.text["scheduler"] == "DDIMScheduler"
    assert all((pixels(tmp_path / row["original"]) != pixels(tmp_path / row["erased"])).any() for row in rows)
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.width > 3 * 170 and sheet.height > 2 * 170
    assert not list(tmp_path.rglob(".*"))  # no temporary file is left


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_an_image_depends_neither_on_its_batch_nor_on_the_threads(tiny: tuple[Any, Any], tmp_path: Path, scheduler: str) -> None:
    threads = torch.get_num_threads()
    try:
        for size, count in ((1, 1), (4, 2), (6, 1)):
            torch.set_num_threads(count)
            settings = Settings(**{**vars(QUICK), "batch_size": size, "scheduler": scheduler})
            generate_pairs(tiny[0], None, PROMPTS, tmp_path / str(size), settings)
    finally:
        torch.set_num_threads(threads)
    for row in read_jsonl(tmp_path / "1" / "index.jsonl"):
        assert row["erased"] is None
        for other in ("4", "6"):
            assert (pixels(tmp_path / "1" / row["original"]) == pixels(tmp_path / other / row["original"])).all()


def test_the_same_encoder_gives_the_same_images(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    settings = Settings(**{**vars(QUICK), "scheduler": "euler_a"})
    generate_pairs(tiny[0], copy.copy(tiny[0]), PROMPTS[:1], tmp_path, settings)
    for row in read_jsonl(tmp_path / "index.jsonl"):
        assert (pixels(tmp_path / row["original"]) == pixels(tmp_path / row["erased"])).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws(tiny: tuple[Any, Any], tmp_path: Path, scheduler: str) -> None:
    settings = Settings(**{**vars(QUICK), "images_per_prompt": 1, "scheduler": scheduler})
    result = generate_pairs(tiny[0], None, PROMPTS[:1], tmp_path, settings)
    expected = SCHEDULERS[scheduler]
    assert type(tiny[0].scheduler).__name__ == "DDIMScheduler"  # the caller's pipeline keeps its own
    assert expected is None or result["scheduler"] == expected
    assert pixels(tmp_path / "original" / "0000-seed5.png").std() > 0


@pytest.mark.parametrize(
    "change", [{"clip_skip": 1}, {"negative_prompt": "a dog"}, {"guidance": 1.0}, {"steps": 4}, {"width": 72}, {"height": 72}]
)
def test_every_setting_changes_the_image(tiny: tuple[Any, Any], tmp_path: Path, change: dict[str, Any]) -> None:
    found = []
    for name, extra in (("plain", {}), ("changed", change)):
        settings = Settings(**{**vars(QUICK), "images_per_prompt": 1, **extra})
        generate_pairs(tiny[0], None, PROMPTS[:1], tmp_path / name, settings)
        found.append(pixels(tmp_path / name / "original" / "0000-seed5.png"))
    assert found[0].shape != found[1].shape or (found[0] != found[1]).any()


def test_clip_skip_reads_the_layer_before_the_last(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    pipe = tiny[0]
    before = set(pipe.text_encoder.state_dict())
    settings = Settings(**{**vars(QUICK), "images_per_prompt": 1, "clip_skip": 1})
    generate_pairs(pipe, None, PROMPTS[:1], tmp_path, settings)
    assert set(pipe.text_encoder.state_dict()) == before
    ids = pipe.tokenizer([PROMPTS[0].text], padding="max_length", max_length=77, return_tensors="pt").input_ids
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    with torch.no_grad():
        states = encoder.final_layer_norm(pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2])
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
        many = drawing.FILLED  # as many at once as a CPU computes: one alone is another matrix product
        expected = pipe(prompt_embeds=states.repeat(many, 1, 1), negative_prompt=[""] * many, num_inference_steps=3, guidance_scale=3.0,
                        latents=noise.repeat(many, 1, 1, 1), height=64, width=64).images[0]  # fmt: skip
    assert (pixels(tmp_path / "original" / "0000-seed5.png") == numpy.asarray(expected).astype(int)).all()


def test_only_what_is_missing_is_drawn(tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_pairs(*tiny, PROMPTS, tmp_path, QUICK, stamps=STAMPS)
    sizes = counted(monkeypatch)
    (tmp_path / "erased" / "0001-seed6.png").unlink()
    (tmp_path / "original" / "0000-seed5.png").write_bytes(b"\x89PNG half an image")
    assert generate_pairs(*tiny, PROMPTS, tmp_path, QUICK, stamps=STAMPS)["drawn"] == 2
    assert sizes == [1, 1]
    # a new encoder: the original's images stay
    assert generate_pairs(*tiny, PROMPTS, tmp_path, QUICK, stamps={**STAMPS, "erased": "e2"})["drawn"] == 6
    # more steps: all are drawn again; another batch size: none
    more = Settings(**{**vars(QUICK), "steps": 4})
    assert generate_pairs(*tiny, PROMPTS, tmp_path, more, stamps=STAMPS)["drawn"] == 12
    assert generate_pairs(*tiny, PROMPTS, tmp_path, Settings(**{**vars(more), "batch_size": 1}), stamps=STAMPS)["drawn"] == 0


def test_an_interruption_leaves_whole_images(tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = drawing._draw

    begun: list[int] = []

    def stop(pipeline: Any, jobs: Any, *rest: Any) -> Any:
        begun.append(len(jobs))
        if len(begun) == 2:
            raise KeyboardInterrupt
        return draw(pipeline, jobs, *rest)

    monkeypatch.setattr(drawing, "_draw", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(*tiny, PROMPTS, tmp_path, QUICK, stamps=STAMPS)
    assert not (tmp_path / "index.jsonl").exists()
    monkeypatch.setattr(drawing, "_draw", draw)
    assert generate_pairs(*tiny, PROMPTS, tmp_path, QUICK, stamps=STAMPS)["reused"] == 4


def test_full_memory_halves_the_batch(tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    draw = drawing._draw

    def small(pipeline: Any, jobs: Any, *rest: Any) -> Any:
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return draw(pipeline, jobs, *rest)

    monkeypatch.setattr(drawing, "_draw", small)
    result = generate_pairs(*tiny, PROMPTS, tmp_path, Settings(**{**vars(QUICK), "batch_size": 6}))
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1] + [1] * 6 and result["batch_size"] == 1
    monkeypatch.setattr(drawing, "_draw", lambda *_: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory")))
    with pytest.raises(UserError, match="One image of 64 x 64 pixels does not fit"):
        generate_pairs(tiny[0], None, PROMPTS, tmp_path / "none", QUICK)
    monkeypatch.setattr(drawing, "_draw", lambda *_: (_ for _ in ()).throw(RuntimeError("a true mistake")))
    with pytest.raises(RuntimeError, match="a true mistake"):
        generate_pairs(tiny[0], None, PROMPTS, tmp_path / "none", QUICK)


def test_a_prompt_is_encoded_once_and_alone_for_all_of_its_seeds(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    encoded: list[tuple[int, ...]] = []
    hook = tiny[0].text_encoder.register_forward_hook(lambda module, given, output: encoded.append(output[0].shape))
    settings = Settings(**{**vars(QUICK), "images_per_prompt": 3, "batch_size": 2, "steps": 1})
    generate_pairs(tiny[0], None, PROMPTS, tmp_path, settings)
    hook.remove()
    assert encoded == [(1, 77, 16)] * 4  # three prompts and the empty one, in five batches


def test_keys_and_values_of_the_text_are_computed_once_and_change_nothing(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny[0].unet
    layers = [m.to_k for m in unet.modules() if type(m).__name__ == "Attention" and m.is_cross_attention]
    counts: list[int] = []
    linear = torch.nn.functional.linear

    def multiply(states: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.extend(1 for layer in layers if weight is layer.weight)
        return linear(states, weight, *rest)

    states, more = torch.randn(2, 77, 16), torch.randn(2, 77, 16)
    noise = [torch.randn(2, 4, 16, 16) for _ in range(3)]
    with torch.no_grad():
        expected = [unet(one, 500, states).sample for one in noise]
        monkeypatch.setattr(torch.nn.functional, "linear", multiply)
        with drawing.kept_keys(unet):
            found = [unet(one, 500, states).sample for one in noise]
            other = unet(noise[0], 500, more).sample
        monkeypatch.undo()
        assert all(torch.equal(one, same) for one, same in zip(found, expected, strict=True))
        assert torch.equal(other, unet(noise[0], 500, more).sample)  # other states are read, not the first ones
    assert len(counts) == 2 * len(layers)  # once for each of the two states, in four calls
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_a_failure_to_save_is_told_and_costs_no_other_image(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = images.save_png

    def full(image: Any, path: Path, text: dict[str, str]) -> None:
        if path.name == "0000-seed6.png":
            raise OSError("No space left on device")
        save(image, path, text)

    monkeypatch.setattr(images, "save_png", full)
    with pytest.raises(OSError, match="No space left"):
        generate_pairs(tiny[0], None, PROMPTS, tmp_path, QUICK, stamps=STAMPS)
    assert not (tmp_path / "index.jsonl").exists() and not list(tmp_path.rglob(".*"))
    assert len(list((tmp_path / "original").glob("*.png"))) >= 3


def test_long_prompts_are_named_with_the_words_that_are_cut(tiny: tuple[Any, Any]) -> None:
    fits = Prompt(" ".join(["dog"] * 75))
    long = Prompt(" ".join(["dog"] * 75 + ["purple", "elephant"]))
    warnings = overlong_prompts(tiny[0].tokenizer, [fits, long])
    assert len(warnings) == 1
    assert "Prompt 2" in warnings[0] and "79 tokens" in warnings[0] and "'purple elephant'" in warnings[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 60}, "generate.height is 60: pass a multiple of 8"),
        ({"width": -64}, "generate.width is -64"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"steps": -1}, "generate.steps is -1"),
        ({"images_per_prompt": 0}, "generate.images_per_prompt is 0"),
        ({"clip_skip": -1}, "clip_skip"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings.of(RunConfig(generate=GenerateConfig(**changes)), bases.resolve("pocket"))
    with pytest.raises(UserError, match=message):
        Settings(**changes)


def test_settings_take_the_bases_defaults() -> None:
    base = bases.resolve("sd15")
    settings = Settings.of(RunConfig(seed=3), base)
    assert (settings.height, settings.steps, settings.guidance, settings.batch_size, settings.seed) == (512, 30, 7.5, 4, 3)
    assert Settings.of(RunConfig(generate=GenerateConfig(guidance=0.0, height=256)), base).guidance == 0.0


@pytest.fixture
def trained(tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, RunDir]:
    """A run with a (fake) encoder, and the tiny pipelines in place of the base's."""
    run = RunDir(tmp_path / "run")
    (run.encoder / "text_encoder").mkdir(parents=True)
    (run.encoder / "text_encoder" / "model.safetensors").write_bytes(b"weights")
    run.complete("train", "t", {})
    (tmp_path / "two.txt").write_text("a bicycle next to a dog\nan apple\n")
    loaders = SimpleNamespace(load_original=lambda base, device, dtype: tiny[0], erased_pipeline=lambda original, run: tiny[1])
    monkeypatch.setitem(sys.modules, "sd_erase.pipeline", loaders)
    settings = GenerateConfig(prompts=(str(tmp_path / "two.txt"),), images_per_prompt=1, steps=2)
    return RunConfig(concepts=("bicycle",), device="cpu", generate=settings), run


def test_a_finished_stage_is_done_again_only_when_its_inputs_change(
    trained: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = trained
    first = images.generate(config, run)
    assert first["drawn"] == 4 and first["attention"] == "PyTorch SDPA" and first["device"] == "cpu" and first["prompts"] == 2
    assert run.read_manifest("generate") == first and (run.path / first["contact"]).is_file()
    with Image.open(run.images / "erased" / "0000-seed0.png") as image:
        assert image.text["encoder"].startswith("erased: bicycle (run, ") and image.text["base"] == "pocket"
    sizes = counted(monkeypatch)
    assert images.generate(config, run) == first and sizes == []
    (run.encoder / "text_encoder" / "model.safetensors").write_bytes(b"other weights")
    second = images.generate(config, run)
    assert second["drawn"] == 2 and second["reused"] == 2 and second["inputs"] != first["inputs"]
    (run.images / "original" / "0001-seed0.png").unlink()
    assert images.generate(config, run)["drawn"] == 1


def test_a_base_that_cannot_be_loaded_does_not_cost_the_images_that_are_done(
    trained: tuple[RunConfig, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = trained
    first = images.generate(config, run)

    def refuse(*_: Any) -> None:
        raise UserError("truncated")

    monkeypatch.setitem(sys.modules, "sd_erase.pipeline", SimpleNamespace(load_original=refuse, erased_pipeline=refuse))
    with pytest.raises(UserError, match="truncated"):
        images.generate(RunConfig(**{**vars(config), "seed": 1}), run)
    assert run.read_manifest("generate") == first


def test_a_run_without_an_encoder_can_draw_the_original_alone(trained: tuple[RunConfig, RunDir]) -> None:
    config, run = trained
    run.reopen("train")
    with pytest.raises(UserError, match="sd-erase train"):
        images.generate(config, run)
    assert images.generate(config, run, original_only=True)["images"] == 2
    assert all(row["erased"] is None for row in read_jsonl(run.images / "index.jsonl"))


def test_xformers_is_used_only_where_a_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    fake = SimpleNamespace(
        device=torch.device("cuda"), unet=SimpleNamespace(dtype=torch.float16),
        enable_xformers_memory_efficient_attention=lambda: enabled.append(True),
    )  # fmt: skip
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: "a query")

    def broken(*_: Any) -> None:
        raise NotImplementedError("no kernel for this card")

    def working(*_: Any) -> None:
        return None

    for call, said in ((broken, "PyTorch SDPA (xformers: NotImplementedError)"), (working, "xformers")):
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=call))
        assert images.enable_fast_attention(fake) == said
    assert enabled == [True]


def test_the_index_is_json_lines(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    generate_pairs(tiny[0], None, [Prompt("un café – 自転車")], tmp_path, Settings(**{**vars(QUICK), "images_per_prompt": 1}))
    (line,) = (tmp_path / "index.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"] == "un café – 自転車"
    with Image.open(tmp_path / "original" / "0000-seed5.png") as image:
        assert image.text["prompt"] == "un café – 自転車"
