"""Other image-text models of the pocket world, trained on demand in minutes: patch sizes of its CLIP, and a small BLIP.

Each is a folder in transformers' own layout, which `--base` takes, built in a cache folder and never part of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from sd_erase.bases import ROWS
from sd_erase.blip import BlipAsClip
from sd_erase.clip import image_embeddings, load_towers, text_embeddings
from sd_erase.modelfiles import STATEMENT, read_json
from sd_erase.pocket import world
from sd_erase.pocket.corpus import POSITIONS, compact_ids, data, known_ids, pixels, tokenizer
from sd_erase.pocket.fit import fit, generator_of
from sd_erase.pocket.recipe import Recipe
from sd_erase.rundir import write_json_atomic

SCENES = 8192  # of the training distribution
BATCH = 64  # scenes a step
PATCH_STEPS, BLIP_STEPS = 200, 200


def patch_clip(patch: int, folder: Path, steps: int = PATCH_STEPS) -> Path:
    """The pocket CLIP with another patch size, in ``folder/patchN``.

    The vision tower starts from the shipped one, its patch kernel and position embeddings resized (Beyer et al. 2023,
    arXiv:2212.08013), and is trained contrastively against the shipped text tower, which stays (Zhai et al. 2022, arXiv:2111.07991).

    Args:
        patch: pixels, a divisor of 64; the shipped model's is 8.
    """
    from transformers import CLIPModel

    target = folder / f"patch{patch}"
    if (target / "config.json").is_file():
        return _stated(target)
    towers = load_towers(ROWS["pocket"], "cpu", need_images=True)
    config = towers.clip.config
    own, config.vision_config.patch_size = config.vision_config.patch_size, patch
    model = CLIPModel(config).float()  # the configuration names the half precision of the shipped file
    state = towers.frozen_clip.state_dict()
    names = [f"vision_model.embeddings.{part}_embedding.weight" for part in ("patch", "position")]
    kernel, positions = (state[name] for name in names)
    rows, own_rows = world.SIZE // patch, world.SIZE // own
    state[names[0]] = interpolate(kernel, size=patch, mode="bicubic") * (own / patch) ** 2
    grid = positions[1:].T.reshape(1, -1, own_rows, own_rows)
    grid = interpolate(grid, size=rows, mode="bicubic").flatten(2)[0].T
    state[names[1]] = torch.cat([positions[:1], grid])
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    model.load_state_dict(state)
    if patch != own:
        arrays = _scenes(folder)
        with torch.no_grad():
            texts = _text_embeddings(model, arrays["ids"])
        trained = nn.ModuleList([model.vision_model, model.visual_projection])

        def loss_of(step: int) -> torch.Tensor:
            index = _twins(step, len(texts))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model.vision_model(pixel_values=pixels(arrays["images"][index.numpy()]))
                images = model.visual_projection(output.pooler_output)
            return _contrast(normalize(images.float(), dim=-1), texts[index], model.logit_scale.exp().detach())

        model.requires_grad_(False)
        trained.requires_grad_(True)
        trained.load_state_dict(_fitted(f"patch{patch}", folder, trained, loss_of, steps, 5e-4))
    return _store(model, target)


def blip(folder: Path, steps: int = BLIP_STEPS) -> Path:
    """A small BlipForImageTextRetrieval, trained on the pocket scenes, in ``folder/blip``.

    The vision encoder starts from the shipped CLIP's, which lacks nothing of BLIP's but has a norm more, the word embeddings from its
    too; the text encoder is new. Its contrastive loss alone is trained (BLIP's ITC), each encoder against the other modality's
    embeddings of the shipped CLIP. The matching head stays as it was initialised.
    """
    from transformers import BlipConfig, BlipForImageTextRetrieval

    target = folder / "blip"
    if (target / "config.json").is_file():
        return _stated(target)
    tok, known = tokenizer(), known_ids()

    def build(vocabulary: int, bos: int, eos: int) -> Any:
        tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        text = {"num_hidden_layers": 3, "vocab_size": vocabulary, "bos_token_id": bos, "eos_token_id": eos, "sep_token_id": eos, "pad_token_id": eos,
                "max_position_embeddings": POSITIONS, "encoder_hidden_size": 128, "projection_dim": 128}  # fmt: skip
        vision = {
            "image_size": world.SIZE,
            "patch_size": 8,
            "projection_dim": 128,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
        return BlipForImageTextRetrieval(
            BlipConfig(
                text_config={**tower, **text}, vision_config={**tower, **vision}, image_text_hidden_size=128, projection_dim=128
            )
        )

    arrays, teacher = _scenes(folder), load_towers(ROWS["pocket"], "cpu", need_images=True).clip
    with torch.no_grad():
        their_texts = _text_embeddings(teacher, arrays["ids"])
        their_images = torch.cat([image_embeddings(teacher, pixels(some)) for some in np.array_split(arrays["images"], 64)])
    ids = torch.from_numpy(compact_ids(arrays["ids"], known))  # the words that the world knows; all others share one vector
    eos = known.index(tok.eos_token_id)
    lengths = (ids == eos).int().argmax(1) + 1
    torch.manual_seed(0)
    small = build(len(known) + 1, known.index(tok.bos_token_id), eos)
    small.vision_model.load_state_dict(_as_blip_vision(teacher.vision_model.state_dict(), small.vision_model.state_dict()))
    small.text_encoder.embeddings.word_embeddings.weight.data = teacher.text_model.embeddings.token_embedding.weight[
        [*known, tok(world.UNKNOWN).input_ids[1]]
    ].clone()
    small.vision_proj.weight.data = teacher.visual_projection.weight.data.clone()
    model = BlipAsClip(small)

    def loss_of(step: int) -> torch.Tensor:
        index = _twins(step, len(ids))
        batch = ids[index][:, : int(lengths[index].max())]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = model.visual_projection(model.vision_model(pixels(arrays["images"][index.numpy()])).pooler_output)
            texts = model.text_projection(model.text_model(batch).pooler_output)
        images, texts = (normalize(value.float(), dim=-1) for value in (images, texts))
        scale = teacher.logit_scale.exp()
        return _contrast(images, their_texts[index], scale) + _contrast(their_images[index], texts, scale)

    model.load_state_dict(_fitted("blip", folder, model, loss_of, steps, 1e-3))
    full = build(49_408, tok.bos_token_id, tok.eos_token_id)
    state = small.state_dict()
    (key,) = (key for key in state if key.endswith("word_embeddings.weight"))
    table = state[key][-1].repeat(49_408, 1)
    table[known] = state[key][:-1]
    full.load_state_dict({**state, key: table})
    return _store(full, target)


def _scenes(folder: Path) -> dict[str, np.ndarray]:
    """Pictures and token ids of the training scenes; see `corpus.data`."""
    folder.mkdir(parents=True, exist_ok=True)
    return data(Recipe(scenes=SCENES), folder)


def _twins(step: int, count: int) -> torch.Tensor:
    """The scenes of one step, each beside its twin in the opposite order."""
    pairs = torch.randperm(count // 2, generator=generator_of(11, step))[: BATCH // 2]
    return torch.cat([2 * pairs, 2 * pairs + 1])


def _as_blip_vision(clip: dict[str, torch.Tensor], blip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP vision tower's weights under the names of BLIP's; what CLIP does not have stays as in `blip`."""
    result = dict(blip)
    for key in blip:
        own = key.replace("self_attn.projection", "self_attn.out_proj").replace("position_embedding", "position_embedding.weight")
        if "qkv" in key:
            result[key] = torch.cat([clip[key.replace("qkv", f"{part}_proj")] for part in "qkv"])
        elif own in clip:
            result[key] = clip[own].reshape(blip[key].shape)
    return result


def _text_embeddings(clip: Any, ids: np.ndarray) -> torch.Tensor:
    """A CLIPModel's normalised text embeddings of token ids [texts, positions]."""
    every = torch.from_numpy(ids).long()
    every = every[:, : int((every == every[0, -1]).int().argmax(1).max()) + 1]  # the longest caption with its end of text
    return torch.cat([text_embeddings(clip, clip.text_model(input_ids=some).pooler_output) for some in every.split(256)])


def _contrast(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric contrastive loss."""
    logits = scale * texts @ images.T
    target = torch.arange(len(logits))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _fitted(name: str, folder: Path, model: nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, rate: float) -> Any:
    return fit(name, folder, model, loss_of, steps=steps, learning_rate=rate, warmup=steps // 10, checkpoint_every=100)


def _store(model: Any, target: Path) -> Path:
    """The model with the pocket's tokenizer and image preparation; the configuration, by which it is known, comes last."""
    from transformers import BlipImageProcessor, CLIPImageProcessor

    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    config = (target / "config.json").read_text(encoding="utf-8")
    (target / "config.json").unlink()
    tokenizer().save_pretrained(target)
    options = {"size": {"height": world.SIZE, "width": world.SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if model.config.model_type == "blip":
        BlipImageProcessor(**options).save_pretrained(target)
    else:
        CLIPImageProcessor(**options, crop_size=options["size"]).save_pretrained(target)
    (target / "config.json").write_text(config, encoding="utf-8")
    return _stated(target)


def _stated(target: Path) -> Path:
    """The model with the statement that it is the pocket's in its configuration, which those of earlier versions lack."""
    config = read_json(target / "config.json")
    if config["text_config"].get(STATEMENT) != "pocket":
        config["text_config"][STATEMENT] = "pocket"
        write_json_atomic(target / "config.json", config)
    return target
