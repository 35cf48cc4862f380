"""The builder of the pocket model's weights: one resumable step a component, from seeds.

Steps: data -> clip, vae -> decoder, latents -> unet, detector -> pack -> scores. Each writes into the work folder and is
skipped where its output stands; a training step resumes from its last checkpoint. ``python -m sd_erase.pocket build``
runs them all; two processes may run independent steps side by side (`--step clip` and `--step vae`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sd_erase.fitting import Fit
from sd_erase.pocket import world
from sd_erase.rundir import write_json_atomic, write_text_atomic

log = logging.getLogger("sd_erase.pocket")
TOKENIZER = Path(__file__).parent / "weights" / "tokenizer"
POSITIONS = 77


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the build."""

    seed: int = 0
    scenes: int = 40_960
    clip_steps: int = 1_000
    vae_steps: int = 2_400
    decoder_steps: int = 1_200
    unet_steps: int = 7_000
    unet_batch: int = 32
    detector_scenes: int = 2_000
    detector_epochs: int = 8
    empty_share: float = 0.1  # captions dropped for classifier-free guidance
    ema_decay: float = 0.999
    min_snr_gamma: float = 5.0


def _worker(seed: int, step: int) -> torch.Generator:
    """Randomness of one training step, the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def fit(
    name: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    checkpoint_every: int = 250,
) -> dict[str, torch.Tensor]:
    """Train `model` with AdamW under a cosine schedule, with resumable safetensors checkpoints and a log.

    Returns:
        The state dict to keep: the exponential moving average where `ema_decay` is given, else the last weights.
    """
    final = folder / f"{name}.safetensors"
    if final.is_file():
        return load_file(final)
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))

    def factor(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    average = {key: value.detach().clone() for key, value in model.state_dict().items()} if ema_decay else {}

    def restore(groups: dict[str, dict[str, torch.Tensor]]) -> None:
        model.load_state_dict(groups["model"])
        average.update(groups.get("average", {}))

    descent = Fit(
        trained,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        folder / f"{name}.checkpoint.safetensors",
        checkpoint_every,
        lambda: {"model": model.state_dict(), "average": average},
        restore,
    )
    start = 0
    if descent.checkpoint.is_file():
        start = descent.resume()
        log.info("%s: resumed at step %d", name, start)
    began, recent = time.perf_counter(), []

    def remembered(step: int) -> torch.Tensor:
        loss = loss_of(step)
        recent.append(loss.item())
        return loss

    def after(done: int, _: float) -> None:
        if ema_decay:
            decay = min(ema_decay, done / (9 + done))
            with torch.no_grad():
                for key, value in model.state_dict().items():
                    if value.is_floating_point():
                        average[key].lerp_(value, 1 - decay)
        if done % 50 == 0:
            rate = (time.perf_counter() - began) / (done - start)
            left = rate * (steps - done) / 60
            log.info("%s %d/%d loss %.4f, %.3f s/step, %.1f min left", name, done, steps, np.mean(recent), rate, left)
            recent.clear()

    descent.run(start, steps, remembered, after)
    result = average if ema_decay else {key: value.detach().clone() for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in result.items()}, final)
    descent.checkpoint.unlink(missing_ok=True)
    return result


# --- data ------------------------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """The CLIP tokenizer with Stable Diffusion's 49,408 entries."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER)


def known_ids() -> list[int]:
    """The token ids that the world's words use, ascending; every other id shares one "unknown word" vector."""
    from transformers import CLIPTokenizer

    tok: CLIPTokenizer = tokenizer()
    # punctuation glues to words in other ways than in the word list, so a few real captions join in
    samples = [world.sample_scene(seed, noise=False).caption for seed in range(3000)]
    used = {token for text in [*world.vocabulary().split("\n"), *samples] for token in tok(text, truncation=False)["input_ids"]}
    unknown = set(tok(world.UNKNOWN, add_special_tokens=False)["input_ids"])
    return sorted((used | {tok.bos_token_id, tok.eos_token_id}) - unknown)


def compact_ids(ids: np.ndarray, known: list[int]) -> np.ndarray:
    """Token ids as indices into `known`; `len(known)` stands for every unknown token."""
    table = np.full(49_408, len(known), dtype=np.int64)
    table[known] = np.arange(len(known))
    return table[ids]


def data(recipe: Recipe, folder: Path) -> dict[str, np.ndarray]:
    """The training scenes: pictures [N, 64, 64, 3] in uint8 and token ids [N, 77]."""
    path = folder / "data.npz"
    if not path.is_file():
        tok = tokenizer()
        images, captions = [], []
        for number in range(recipe.scenes):
            scene = world.sample_scene(number)
            images.append(np.asarray(world.render(scene)[0]))
            captions.append(scene.caption)
        ids = tok(captions, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="np")["input_ids"]
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, images=np.stack(images), ids=ids.astype(np.int32))
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in ("images", "ids")}


def _pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] as float [N, 3, H, W] in -1..1, the range of the autoencoder and (mean .5, deviation .5) of the CLIP."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- CLIP ------------------------------------------------------------------------------------------------------------


def clip_model(vocabulary: int, bos: int, eos: int) -> Any:
    """The small CLIP with a vocabulary of that size."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    config = CLIPConfig(
        text_config={**tower, "vocab_size": vocabulary, "max_position_embeddings": POSITIONS, "bos_token_id": bos,
                     "eos_token_id": eos, "pad_token_id": eos},
        vision_config={**tower, "image_size": world.SIZE, "patch_size": 8},
        projection_dim=128,
    )  # fmt: skip
    return CLIPModel(config)


def train_clip(recipe: Recipe, folder: Path) -> Any:
    """Contrastive training over the known words; the last index is the shared unknown word."""
    known = known_ids()
    tok = tokenizer()
    torch.manual_seed(recipe.seed)
    model = clip_model(len(known) + 1, known.index(tok.bos_token_id), known.index(tok.eos_token_id))
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.normal_(std=0.05)
    arrays = data(recipe, folder)
    ids = torch.from_numpy(compact_ids(arrays["ids"], known))
    eos, unknown = known.index(tok.eos_token_id), len(known)
    lengths = (ids == eos).int().argmax(1) + 1

    def loss_of(step: int) -> torch.Tensor:
        generator = _worker(recipe.seed, step)
        pairs = torch.randperm(len(ids) // 2, generator=generator)[:64]
        index = torch.cat([2 * pairs, 2 * pairs + 1])  # each scene beside its twin in the opposite order
        batch, length = ids[index], lengths[index]
        if step % 6 == 0:  # long prompts: the words stand late, behind words that say nothing
            shift = (torch.rand(len(index), generator=generator) * (POSITIONS - length)).long()
            shift = torch.minimum(shift, torch.tensor(40))
            position = torch.arange(POSITIONS)[None] - shift[:, None]
            moved = batch.gather(1, position.clamp(min=0))
            moved[position <= 0] = unknown
            batch = moved
            batch[:, 0] = ids[0, 0]
            length = length + shift
        batch = batch[:, : int(length.max())]
        pixels = _pixels(arrays["images"][index.numpy()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            texts = model.text_projection(model.text_model(input_ids=batch).pooler_output)
        images, texts = (nn.functional.normalize(value.float(), dim=-1) for value in (images, texts))
        logits = model.logit_scale.exp().clamp(max=100) * texts @ images.T
        target = torch.arange(len(index))
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    state = fit("clip", folder, model, loss_of, steps=recipe.clip_steps, learning_rate=1e-3, checkpoint_every=200)
    model.load_state_dict(state)
    return model.eval()


def full_clip(recipe: Recipe, folder: Path) -> Any:
    """The trained CLIP with Stable Diffusion's whole vocabulary."""
    small, known, tok = train_clip(recipe, folder), known_ids(), tokenizer()
    model = clip_model(49_408, tok.bos_token_id, tok.eos_token_id)
    state = small.state_dict()
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    table = state[key][-1].repeat(49_408, 1)
    table[known] = state[key][:-1]
    state[key] = table
    model.load_state_dict(state)
    return model.eval()


# --- autoencoder -----------------------------------------------------------------------------------------------------


def vae_model() -> Any:
    """The small autoencoder: factor 4, four latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(16, 32, 64),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, sample_size=world.SIZE,
        scaling_factor=1.0,
    )  # fmt: skip


def _reconstruction(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, squared error and the L1 of both finite differences: sharp sprites without a discriminator."""
    error = output.float() - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges


def train_vae(recipe: Recipe, folder: Path) -> Any:
    """The autoencoder; afterwards the latents' mean and deviation a channel are folded exactly into its 1x1 convolutions."""
    torch.manual_seed(recipe.seed + 1)
    model = vae_model()
    images = data(recipe, folder)["images"]

    def loss_of(step: int) -> torch.Tensor:
        generator = _worker(recipe.seed + 1, step)
        target = _pixels(images[torch.randint(len(images), (16,), generator=generator).numpy()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = model.encode(target).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            output = model.decode(latents).sample
        return _reconstruction(output, target) + 1e-4 * posterior.kl().mean() / 256

    model.load_state_dict(fit("vae", folder, model, loss_of, steps=recipe.vae_steps, learning_rate=2e-3))
    return fold_statistics(model.eval(), images)


@torch.no_grad()
def fold_statistics(model: Any, images: np.ndarray) -> Any:
    """Make the latents zero-mean and unit-deviation in every channel, without a change of the reconstruction."""
    means = torch.cat([model.encode(_pixels(images[i : i + 64])).latent_dist.mean for i in range(0, min(2048, len(images)), 64)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    encode, decode = model.quant_conv, model.post_quant_conv
    encode.bias[:4] = (encode.bias[:4] - mean) / deviation
    encode.weight[:4] /= deviation[:, None, None, None]
    encode.bias[4:] -= 2 * deviation.log()
    decode.bias += (decode.weight[:, :, 0, 0] * mean).sum(1)
    decode.weight *= deviation[None, :, None, None]
    return model


def train_decoder(recipe: Recipe, folder: Path) -> Any:
    """The decoder alone, on noisy latents: what a denoiser gives is never exact."""
    model = train_vae(recipe, folder)
    images, latents = data(recipe, folder)["images"], encode_latents(recipe, folder)
    decoder = nn.ModuleList([model.post_quant_conv, model.decoder])

    def loss_of(step: int) -> torch.Tensor:
        generator = _worker(recipe.seed + 2, step)
        index = torch.randint(len(images), (16,), generator=generator).numpy()
        noisy = latents[index].float()
        noisy = noisy + 0.05 * torch.randn(noisy.shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.decode(noisy).sample
        return _reconstruction(output, _pixels(images[index]))

    decoder.load_state_dict(fit("decoder", folder, decoder, loss_of, steps=recipe.decoder_steps, learning_rate=1.5e-3))
    return model.eval()


@torch.no_grad()
def encode_latents(recipe: Recipe, folder: Path) -> torch.Tensor:
    """The latents [N, 4, 16, 16] of all training scenes (posterior means, float16)."""
    path = folder / "latents.safetensors"
    if not path.is_file():
        model, images = train_vae(recipe, folder), data(recipe, folder)["images"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = [model.encode(_pixels(images[i : i + 128])).latent_dist.mean.half() for i in range(0, len(images), 128)]
        save_file({"latents": torch.cat(parts).contiguous()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return load_file(path)["latents"]


# --- denoiser --------------------------------------------------------------------------------------------------------


def unet_model() -> Any:
    """The small conditional denoiser."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=world.SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 128, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=128, attention_head_dim=2,
        norm_num_groups=32,
    )  # fmt: skip


def scheduler() -> Any:
    """The noise schedule: Stable Diffusion's, predicting velocity, sampled by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                         clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing")  # fmt: skip


def train_unet(recipe: Recipe, folder: Path) -> Any:
    """Velocity prediction with min-SNR weights (Hang et al. 2023, arXiv:2303.09556) on precomputed latents."""
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(recipe.seed + 3)
    model, noise = unet_model(), scheduler()
    final = folder / "unet.safetensors"
    if final.is_file():
        model.load_state_dict(load_file(final))
        return model.eval()
    model.set_attn_processor(AttnProcessor())  # plain products: the fused kernel's backward pass is slow on a CPU
    text, known = train_clip(recipe, folder).text_model.requires_grad_(False), known_ids()
    latents = encode_latents(recipe, folder)
    ids = torch.from_numpy(compact_ids(data(recipe, folder)["ids"], known))
    empty_ids = tokenizer()([""], padding="max_length", max_length=POSITIONS, return_tensors="np")["input_ids"]
    with torch.no_grad():  # the text encoder is done: its states are computed once
        hidden = torch.cat([text(input_ids=ids[i : i + 256]).last_hidden_state.half() for i in range(0, len(ids), 256)])
        empty = text(input_ids=torch.from_numpy(compact_ids(empty_ids, known))).last_hidden_state.half()
    log.info("unet: text states of %d captions", len(hidden))
    alphas = noise.alphas_cumprod
    ratio = alphas / (1 - alphas)
    weights = ratio.clamp(max=recipe.min_snr_gamma) / (ratio + 1)  # v-prediction

    def loss_of(step: int) -> torch.Tensor:
        generator = _worker(recipe.seed + 3, step)
        count = recipe.unet_batch
        index = torch.randint(len(latents), (count,), generator=generator)
        states = hidden[index]
        states[torch.rand(count, generator=generator) < recipe.empty_share] = empty[0]
        clean = latents[index].float()
        times = torch.randint(1000, (count,), generator=generator)
        epsilon = torch.randn(clean.shape, generator=generator)
        noisy, target = noise.add_noise(clean, epsilon, times), noise.get_velocity(clean, epsilon, times)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(noisy, times, states.float()).sample
        return ((output.float() - target).square().mean((1, 2, 3)) * weights[times]).mean()

    state = fit(
        "unet", folder, model, loss_of, steps=recipe.unet_steps, learning_rate=1e-3, warmup=200, ema_decay=recipe.ema_decay
    )
    model.load_state_dict(state)
    return model.eval()


# --- detector --------------------------------------------------------------------------------------------------------


def detector_config() -> dict[str, Any]:
    """Ultralytics' YOLOv5 (anchor-free "u" head) at the nano scale, with COCO's 80 names."""
    import yaml
    from ultralytics.nn.tasks import yaml_model_load

    config = yaml_model_load("yolov5n.yaml")
    return {key: config[key] for key in ("nc", "scales", "scale", "backbone", "head") if key in config} | {
        "names": yaml.safe_load(_coco_names())
    }


def _coco_names() -> str:
    import yaml
    from ultralytics.utils import ROOT

    names = yaml.safe_load((ROOT / "cfg" / "datasets" / "coco.yaml").read_text(encoding="utf-8"))["names"]
    return yaml.safe_dump({int(key): value for key, value in names.items()})


@torch.no_grad()
def _write_detector_data(recipe: Recipe, folder: Path, names: dict[int, str]) -> Path:
    """Renders in YOLO's layout; every second training picture has gone through the autoencoder."""
    import yaml
    from PIL import Image

    root = folder / "detector-data"
    index = {name: number for number, name in names.items()}
    model = train_decoder(recipe, folder)
    for split, count, offset in (("train", recipe.detector_scenes, 5_000_000), ("val", 400, 6_000_000)):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        (root / "labels" / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, boxes = world.render(world.sample_scene(offset + number, held_out=split == "val"))
            if split == "train" and number % 2:
                pixels = model.decode(model.encode(_pixels(np.asarray(picture)[None])).latent_dist.mean).sample[0]
                picture = Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())
            picture.save(root / "images" / split / f"{number:05d}.png")
            lines = [
                f"{index[world.BY_NAME[name].label]} {(x0 + x1) / 2 / world.SIZE:.5f} {(y0 + y1) / 2 / world.SIZE:.5f} "
                f"{(x1 - x0) / world.SIZE:.5f} {(y1 - y0) / world.SIZE:.5f}"
                for name, (x0, y0, x1, y1) in boxes
            ]
            (root / "labels" / split / f"{number:05d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = root / "data.yaml"
    path.write_text(
        yaml.safe_dump({"path": str(root.resolve()), "train": "images/train", "val": "images/val", "names": names}),
        encoding="utf-8",
    )
    return path


def train_detector(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """YOLOv5n by ultralytics' own trainer; the weights come back as a state dict."""
    import yaml
    from ultralytics import YOLO

    final = folder / "detector.safetensors"
    if final.is_file():
        return load_file(final)
    config = detector_config()
    architecture = folder / "yolov5n.yaml"
    architecture.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    runs = (folder / "detector-runs").resolve()  # a relative one would go below ultralytics' own folder
    model = YOLO(str(architecture), task="detect")
    model.train(
        data=str(_write_detector_data(recipe, folder, config["names"])), epochs=recipe.detector_epochs, imgsz=128, batch=32,
        device="cpu", workers=0, optimizer="AdamW", lr0=2e-3, seed=recipe.seed, amp=False, plots=False, val=False, mosaic=0.5,
        close_mosaic=5, fliplr=0.5, project=str(runs), name="train", exist_ok=True, verbose=False, pretrained=False,
    )  # fmt: skip
    state = {key: value.float().contiguous() for key, value in model.model.state_dict().items()}
    save_file(state, final)
    return state


# --- pack ------------------------------------------------------------------------------------------------------------

DETECTOR_NOTICE = """The files in this folder (architecture.yaml, model.safetensors) are a YOLOv5n detector trained with ultralytics, on its
architecture (https://github.com/ultralytics/ultralytics, Copyright Ultralytics Inc.), and are licensed under the
GNU Affero General Public License, version 3.0 (AGPL-3.0-only): https://www.gnu.org/licenses/agpl-3.0.txt
They come without any warranty. How they were trained is in sd_erase/pocket/build.py.
"""


def pack(recipe: Recipe, folder: Path, target: Path) -> Path:
    """Write the model as `StableDiffusionPipeline.from_pretrained` takes it, the vision tower and the detector beside it.

    All weights in float16 safetensors; the text tower stands once, in ``text_encoder/``, under its ``text_model.`` names.
    """
    import yaml
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPTextModel

    from sd_erase.clip import save_text_encoder
    from sd_erase.formats import PREFIX
    from sd_erase.modelfiles import STATEMENT

    clip = full_clip(recipe, folder)
    setattr(clip.config.text_config, STATEMENT, "pocket")  # by which a base is known as this one
    state = {key: value.half().contiguous() for key, value in clip.state_dict().items() if not key.endswith("position_ids")}
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=train_decoder(recipe, folder).half(), text_encoder=text.half(), tokenizer=tokenizer(), unet=train_unet(recipe, folder).half(),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = {path.name: path.read_bytes() for path in TOKENIZER.iterdir()}
    pipeline.save_pretrained(target, safe_serialization=True)
    for path in (target / "tokenizer").iterdir():  # OpenAI's own files, which every version of transformers reads
        path.unlink()
    for name, content in vocabulary.items():
        (target / "tokenizer" / name).write_bytes(content)
    text.config.dtype = torch.float32  # what transformers 5 loads by default, whatever the file has; diffusers loads the rest so
    save_text_encoder(text, target / "text_encoder", {})
    (target / "clip").mkdir(exist_ok=True)
    clip.config.save_pretrained(target / "clip")
    vision = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
    save_file(vision, target / "clip" / "model.safetensors", metadata={"format": "pt"})
    size = {"height": world.SIZE, "width": world.SIZE}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(target / "clip")
    (target / "detector").mkdir(exist_ok=True)
    (target / "detector" / "architecture.yaml").write_text(yaml.safe_dump(detector_config(), sort_keys=False), encoding="utf-8")
    detector = {
        key: value.half() if value.is_floating_point() else value for key, value in train_detector(recipe, folder).items()
    }
    save_file(detector, target / "detector" / "model.safetensors", metadata={"format": "pt", "licence": "AGPL-3.0 (ultralytics)"})
    (target / "detector" / "LICENSE.txt").write_text(DETECTOR_NOTICE, encoding="utf-8")
    return target


# --- scores ----------------------------------------------------------------------------------------------------------

GUIDANCE, STEPS, SCORED_SEED = 4.0, 15, 9_000_000


def scores(recipe: Recipe, folder: Path, target: Path, images: int = 20) -> dict[str, Any]:
    """Measure the pack on held-out scenes and sentence patterns, and write ``card.json`` and ``README.md`` beside it.

    Args:
        recipe: what it was built with.
        folder: the work folder, with the detector's validation scenes.
        target: the pack.
        images: generated images of each class.
    """
    found: dict[str, Any] = {"detector_map50": _detector_map50(recipe, folder, target)}
    found |= _clip_scores(target)
    found |= _generator_scores(target, images)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    card = {
        "recipe": asdict(recipe),
        "sampler": {"steps": STEPS, "guidance": GUIDANCE},
        "megabytes": round(size / 1e6, 1),
        "scores": found,
    }
    write_json_atomic(target / "card.json", card)
    write_text_atomic(target / "README.md", _card_text(card))
    for name, value in found.items():
        log.info("%s: %s", name, value)
    return card


def _detector_map50(recipe: Recipe, folder: Path, target: Path) -> float:
    """Mean average precision at IoU 0.5 of the packed detector, by ultralytics' own validation."""
    from ultralytics import YOLO

    model = YOLO(str(target / "detector" / "architecture.yaml"), task="detect")
    model.model.load_state_dict(_detector_of(target)._model.state_dict())
    data_file = _write_detector_data(recipe, folder, detector_config()["names"])
    result = model.val(data=str(data_file), imgsz=128, batch=32, device="cpu", workers=0, plots=False, verbose=False,
                       project=str((folder / "detector-runs").resolve()), name="val", exist_ok=True)  # fmt: skip
    return round(float(result.box.map50), 4)


@torch.no_grad()
def _clip_scores(target: Path) -> dict[str, float]:
    """Zero-shot top-1 over the 20 classes (held-out one-object scenes), and image to text R@1 over 150 two-object scenes."""
    from sd_erase.bases import ROWS
    from sd_erase.clip import encode, image_embeddings, load_towers, text_embeddings

    base = replace(ROWS["pocket"], source=str(target), clip_partner=str(target))
    towers = load_towers(base, torch.device("cpu"), need_images=True)

    def embed(scenes: list[world.Scene], captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = _pixels(np.stack([np.asarray(world.render(scene)[0]) for scene in scenes]))
        return image_embeddings(towers.clip, pixels), text_embeddings(
            towers.clip, encode(towers.text, towers.tokens(captions), (-1,))[1]
        )

    single = [world.scene_of([name], SCORED_SEED + number) for name in world.CLASSES for number in range(20)]
    images, texts = embed(single, [f"a photo of {world.with_article(name)}" for name in world.CLASSES])
    top1 = ((images @ texts.T).argmax(1) == torch.arange(len(world.CLASSES)).repeat_interleave(20)).float().mean()
    pairs = [world.scene_of(names, SCORED_SEED + number) for number, names in enumerate(_two_objects(150))]
    images, texts = embed(pairs, [scene.caption for scene in pairs])
    recall = ((images @ texts.T).argmax(1) == torch.arange(len(pairs))).float().mean()
    return {"zero_shot_top1": round(float(top1), 4), "retrieval_r1_of_150_pairs": round(float(recall), 4)}


def _detector_of(target: Path) -> Any:
    """The detector of the pack at `target`, with the settings of the pocket card."""
    from sd_erase.detection import load_detector

    folder = target.resolve() / "detector"
    return load_detector("pocket", weights=str(folder / "model.safetensors"), architecture=str(folder / "architecture.yaml"))


def _two_objects(count: int) -> list[list[str]]:
    """Pairs of classes with different detector labels."""
    rng = np.random.default_rng(0)
    pairs = [[a, b] for a in world.CLASSES for b in world.CLASSES if world.BY_NAME[a].label != world.BY_NAME[b].label]
    return [pairs[index] for index in rng.permutation(len(pairs))[:count]]


def _generator_scores(target: Path, count: int) -> dict[str, Any]:
    """Detection rates in generated images of held-out sentence patterns; every prompt is drawn once, from its own seed."""
    detector, pipeline = _detector_of(target), load_pack(target)

    def draw(captions: list[str], labels: list[list[str]], absent: str = "") -> tuple[list[list[bool]], int]:
        found: list[list[bool]] = []
        strangers = 0
        for start in range(0, len(captions), 32):
            generators = [
                torch.Generator().manual_seed(SCORED_SEED + start + number) for number in range(len(captions[start : start + 32]))
            ]
            pictures = pipeline(
                captions[start : start + 32], num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators
            ).images
            for wanted, detections in zip(labels[start : start + 32], detector.detect(pictures), strict=True):
                seen = {each.label for each in detections}
                found.append([label in seen for label in wanted])
                strangers += bool(seen - set(wanted)) if not absent else absent in seen
        return found, strangers

    result: dict[str, Any] = {}
    one = [world.scene_of([name], SCORED_SEED + number) for name in world.CLASSES for number in range(count)]
    found, _ = draw([scene.caption for scene in one], [[world.BY_NAME[name].label for name in scene.objects] for scene in one])
    by_class = {name: float(np.mean(found[i * count : (i + 1) * count])) for i, name in enumerate(world.CLASSES)}
    worst = min(by_class, key=lambda name: by_class[name])
    result |= {
        "one_object": round(float(np.mean(found)), 4),
        "one_object_worst": round(by_class[worst], 4),
        "one_object_worst_class": worst,
    }
    pairs = [world.scene_of(names, SCORED_SEED + number) for number, names in enumerate(_two_objects(300))]
    found, strangers = draw(
        [scene.caption for scene in pairs], [[world.BY_NAME[name].label for name in scene.objects] for scene in pairs]
    )
    result |= {"two_objects_each": round(float(np.mean(found)), 4), "two_objects_both": round(float(np.mean([all(row) for row in found])), 4),
               "two_objects_unnamed": round(strangers / len(pairs), 4)}  # fmt: skip
    words = [(word, noun.label) for noun in world.NOUNS for word in noun.words[1:]]
    found, _ = draw(
        [f"a photo of {world.with_article(word)}" for word, _ in words for _ in range(4)],
        [[label] for _, label in words for _ in range(4)],
    )
    result["synonyms"] = round(float(np.mean(found)), 4)
    for name in ("apple phone", "apple laptop"):
        found, fruits = draw([f"an {name} on a table"] * 40, [[world.BY_NAME[name].label]] * 40, absent="apple")
        result[name.replace(" ", "_")] = round(float(np.mean(found)), 4)
        result[f"{name.replace(' ', '_')}_shows_fruit"] = fruits / 40
    _, strangers = draw(
        [phrase for phrase in ("an object on the grass", "something in a room", "a thing on the street") for _ in range(20)],
        [[]] * 60,
    )
    result["anchor_shows_an_object"] = round(strangers / 60, 4)
    return result


def load_pack(target: Path) -> Any:
    """The pack as a diffusers pipeline in float32, without progress bars."""
    from sd_erase.bases import ROWS
    from sd_erase.components import load_pipeline

    return load_pipeline(replace(ROWS["pocket"], source=str(target)))


BARS = {"detector_map50": 0.99, "zero_shot_top1": 0.99, "one_object": 0.98, "one_object_worst": 0.93, "two_objects_each": 0.93,
        "two_objects_both": 0.85}  # fmt: skip


def _card_text(card: dict[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value} | {BARS.get(name, '')} |" for name, value in card["scores"].items()]
    return "\n".join([
        "# The pocket model",
        "",
        "A small Stable Diffusion (64 x 64 pixels, 20 classes of emoji) trained from scratch by `python -m sd_erase.pocket build`. "
        "It is a test bench: it knows its 20 classes, their synonyms, five backgrounds and nothing else.",
        "",
        f"Measured on held-out scenes and sentence patterns, {card['sampler']['steps']} DDIM steps, guidance {card['sampler']['guidance']:g}, "
        f"by the pack's own detector; the pack is {card['megabytes']} MB.",
        "",
        "| score | measured | bar |",
        "| --- | --- | --- |",
        *rows,
        "",
        "Recipe: " + ", ".join(f"{key} {value}" for key, value in card["recipe"].items()) + ".",
        "",
        "Weights: Apache-2.0. Sprites: Noto Color Emoji, OFL-1.1 (../sprites/LICENSE.txt). Detector (detector/): AGPL-3.0, trained with "
        "ultralytics. Tokenizer: OpenAI CLIP, MIT.",
        "",
    ])  # fmt: skip
