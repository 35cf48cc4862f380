"""The small CLIP: a text and a vision tower, trained contrastively on a world's scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd_erase.pocket.corpus import POSITIONS, compact_ids, data, known_ids, pixels, tokenizer
from sd_erase.pocket.fit import fit, generator_of
from sd_erase.pocket.recipe import Recipe
from sd_erase.pocket.worlds import WORLDS, World


def clip_model(vocabulary: int, bos: int, eos: int, world: World = WORLDS["pocket"]) -> Any:
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
        vision_config={**tower, "image_size": world.size, "patch_size": world.patch},
        projection_dim=128,
    )  # fmt: skip
    return CLIPModel(config)


def train_clip(recipe: Recipe, folder: Path) -> Any:
    """Contrastive training over the known words; the last index is the shared unknown word."""
    world = WORLDS[recipe.world]
    known = known_ids(world)
    tok = tokenizer()
    torch.manual_seed(recipe.seed)
    model = clip_model(len(known) + 1, known.index(tok.bos_token_id), known.index(tok.eos_token_id), world)
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.normal_(std=0.05)
    arrays = data(recipe, folder)
    ids = torch.from_numpy(compact_ids(arrays["ids"], known))
    eos, unknown = known.index(tok.eos_token_id), len(known)
    lengths = (ids == eos).int().argmax(1) + 1

    def loss_of(step: int) -> torch.Tensor:
        generator = generator_of(recipe.seed, step)
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
        picture = pixels(arrays["images"][index.numpy()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = model.visual_projection(model.vision_model(pixel_values=picture).pooler_output)
            texts = model.text_projection(model.text_model(input_ids=batch).pooler_output)
        images, texts = (nn.functional.normalize(value.float(), dim=-1) for value in (images, texts))
        logits = model.logit_scale.exp().clamp(max=100) * texts @ images.T
        target = torch.arange(len(index))
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    state = fit("clip", folder, model, loss_of, steps=recipe.clip_steps, learning_rate=1e-3, checkpoint_every=200,
                minutes=recipe.minutes)  # fmt: skip
    model.load_state_dict(state)
    return model.eval()


def full_clip(recipe: Recipe, folder: Path) -> Any:
    """The trained CLIP with Stable Diffusion's whole vocabulary."""
    world = WORLDS[recipe.world]
    small, known, tok = train_clip(recipe, folder), known_ids(world), tokenizer()
    model = clip_model(49_408, tok.bos_token_id, tok.eos_token_id, world)
    state = small.state_dict()
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    table = state[key][-1].repeat(49_408, 1)
    table[known] = state[key][:-1]
    state[key] = table
    model.load_state_dict(state)
    return model.eval()
