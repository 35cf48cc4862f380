"""The two towers of a base: the text encoder under training, its frozen reference, and the partner's vision tower."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_erase import bases, components, digests, formats, provenance
from sd_erase.bases import Base, TextEncoder
from sd_erase.concepts import Concept, common_nouns
from sd_erase.errors import UserError
from sd_erase.formats import prefixed
from sd_erase.hub import folder_of, loading
from sd_erase.rundir import RunDir, fingerprint, replacing
from sd_erase.weights import load_named

if TYPE_CHECKING:
    import torch

SAME = 0.99  # cosine of pooled states above which the base does not tell two phrases apart
SAME_ENCODER = 5e-3  # relative difference that storing one of two encoders in half precision explains


@dataclass
class Towers:
    """A base's text encoder beside its frozen copy, and the CLIP partner where one is at hand.

    `clip` shares its text tower with `text`: training one trains the other. Both are None-safe: without a partner only
    objectives on hidden states can be used.
    """

    base: Base
    encoder: TextEncoder  # which of the base's
    tokenizer: Any
    text: Any  # the student CLIPTextModel
    frozen_text: Any  # the teacher, in eval mode and without gradients
    projection: Any  # None, or of the pooled state, frozen, where the denoiser reads that too
    clip: Any  # None, or the CLIPModel whose text_model is `text`
    frozen_clip: Any  # None, or the CLIPModel whose text_model is `frozen_text`
    image_processor: Any  # None without a partner
    notes: tuple[str, ...] = ()  # what a user should know of them

    @functools.cached_property
    def stamp(self) -> str:
        """A digest of the frozen encoder's weights, which never change."""
        return weights_stamp(self.frozen_text.state_dict())

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden layers that the denoiser reads."""
        return self.encoder.layers

    def tokens(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids [captions, 77], padded and cut as the pipeline does."""
        length = min(self.tokenizer.model_max_length, self.text.config.max_position_embeddings)
        return self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(self.text.device)

    def end_of(self, ids: torch.Tensor, behind: int = 3) -> int:
        """How many positions hold the longest caption and some padding: the mask is causal, what stands before a cut is the same without the rest.

        Args:
            ids: [captions, positions].
            behind: positions of padding.
        """
        return min(int((ids == self.tokenizer.eos_token_id).int().argmax(1).max()) + 1 + behind, ids.shape[1])


def encode(text: Any, ids: torch.Tensor, layers: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states that a denoiser reads, and the pooled end-of-text state.

    Args:
        text: a CLIPTextModel.
        ids: [batch, positions].
        layers: -1 is the last layer behind the final norm, -2 the one before it without the norm.

    Returns:
        One [batch, positions, width] tensor a layer, and the pooled state [batch, width] before the projection.
    """
    from sd_erase import sharding

    def compute(ids: torch.Tensor) -> list[torch.Tensor]:
        output = text(input_ids=ids, output_hidden_states=True)
        states = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
        return [*states, output.pooler_output]

    *states, pooled = sharding.by_rows(compute, ids)
    return states, pooled


def save_text_encoder(text: Any, folder: Path, metadata: dict[str, str], projection: Any | None = None) -> None:
    """Write ``model.safetensors`` (prefixed keys) and ``config.json`` into `folder`, the weights through a rename.

    Args:
        projection: of the pooled state, where it belongs to the encoder.
    """
    own = {} if projection is None else {"text_projection.weight": projection.weight}
    with replacing(folder / "model.safetensors") as temporary:
        formats.save_tensors(temporary, prefixed(text.state_dict() | own), {"format": "pt", **metadata})
        text.config.save_pretrained(folder)


def load_state(path: Path) -> dict[str, Any]:
    """The tensors of a file that a stage wrote; a missing or damaged one raises `UserError`."""
    if not path.is_file():
        raise UserError(f"File {path} does not exist: run the stage that writes it again.")
    return formats.read_tensors(path)


def save_clip(clip: Any, path: Path) -> None:
    """Write a whole CLIP (both towers, both projections) to `path`, through a rename."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in clip.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def load_erased_towers(base: Base, run: RunDir, device: Any) -> Towers:
    """The towers of `base` with the student as `run` trained it; the frozen ones are the original.

    Raises:
        UserError: the run is not trained, or the base has no CLIP partner at hand.
    """
    run.require("train", "train")
    towers = load_towers(base, device, need_images=True)
    if run.clip.is_file():
        load_named(towers.clip, load_state(run.clip), "erased CLIP", run.clip)
    else:
        file = run.encoder / base.encoders[0].name / "model.safetensors"
        load_named(towers.text, load_state(file), "erased text encoder", file)
    return towers


def _load_partner(base: Base, text: Any) -> tuple[Any, Any]:
    """The CLIP partner with `text` as its text tower, and its image processor."""
    from transformers import CLIPImageProcessor

    folder = Path(base.clip_partner) / "clip"
    if folder.is_dir():  # the pocket pack: the text tower is stored once, in text_encoder/
        return components.clip_partner(folder, text), CLIPImageProcessor.from_pretrained(folder)
    clip = components.clip_model(base.clip_partner)
    with loading(base.clip_partner):
        return clip, CLIPImageProcessor.from_pretrained(folder_of(base.clip_partner))


def difference_from_partner(partner: Any, text: Any) -> float:
    """How far a base's text encoder is from its CLIP partner's text tower: the largest relative difference of a tensor, in L2.

    SD 2.x has one layer fewer than its partner, whose last one is left out, as are the rows of tokens that were added to the base.

    Raises:
        UserError: the partner has fewer layers, or other widths.
    """
    theirs, largest = prefixed(partner.state_dict()), 0.0
    for key, value in prefixed(text.state_dict()).items():
        if key not in theirs or theirs[key].shape[1:] != value.shape[1:] or len(value) < len(theirs[key]):
            shape = tuple(theirs[key].shape) if key in theirs else "none"
            raise UserError(
                f"The CLIP partner does not fit the base's text encoder ({key}: {shape} where the base has {tuple(value.shape)}): pass the "
                "CLIP model that the base belongs to with --clip."
            )
        expected = theirs[key].float()
        apart = (value[: len(expected)].float() - expected).norm() / expected.norm().clamp_min(1e-12)
        largest = max(largest, float(apart))
    return largest


def _text_encoder(base: Base, encoder: TextEncoder) -> tuple[Any, Any, Any]:
    """A base's text encoder in float32 (a CLIPTextModel), its projection where the denoiser reads it, and its tokenizer."""
    model, tokenizer = components.encoder_with_tokenizer(base, encoder)
    return (model.text_model, model.text_projection, tokenizer) if encoder.pooled else (model, None, tokenizer)


def _image_text_model(base: Base) -> tuple[Any, Any, Any]:
    """A CLIPModel, or a BLIP in its shape, in float32, with its tokenizer and image processor."""
    from transformers import CLIPImageProcessor, CLIPTokenizerFast

    if base.family == "blip":
        from sd_erase import blip

        return blip.load(base.source)
    clip = components.clip_model(base.source)
    folder = folder_of(base.source)
    with loading(base.source):
        return clip, CLIPTokenizerFast.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)


@functools.lru_cache(maxsize=8)  # a comparison asks for each of its runs
def check_encoders(base: Base) -> None:
    """Load the base's text encoders, and let them go: what cannot be read is said before a harvest of hours.

    Raises:
        UserError: one cannot be loaded: a tensor is missing, unknown, of another shape or no number.
    """
    if base.family in bases.IMAGE_TEXT:
        _image_text_model(base)
        return
    for encoder in base.encoders:
        _text_encoder(base, encoder)


def _fine_tuned(base: Base, apart: float) -> list[str]:
    """What a user should know of a text encoder that is not its CLIP partner's; see `difference_from_partner`."""
    if apart <= SAME_ENCODER:
        return []
    return [
        f"The text encoder of {base.name} differs from its CLIP partner's ({base.clip_partner}) by {100 * apart:.2g} % of its weights, as "
        "a fine-tune's does: its own encoder is what is trained."
    ]


def load_towers(
    base: Base, device: Any, *, need_images: bool, encoder: TextEncoder | None = None, share_vision: bool = False
) -> Towers:
    """One of the base's text encoders twice (student and frozen) in float32, with the CLIP partner around each.

    Args:
        need_images: whether a missing partner is an error; else the towers come without one.
        encoder: which of the base's; None is the first. The others have no partner.
        share_vision: whether both partners have one vision tower, of ViT-L/14 1.2 GB; for those who change neither's.

    Raises:
        UserError: the base or (if needed) its partner cannot be loaded or does not fit.
    """
    import copy

    encoder = encoder or base.encoders[0]
    clip = processor = None
    notes = [*base.notes] if encoder == base.encoders[0] else []
    if base.family in bases.IMAGE_TEXT:
        clip, tokenizer, processor = _image_text_model(base)
        text, projection = clip.text_model, None
    else:
        text, projection, tokenizer = _text_encoder(base, encoder)
        notes += components.added_tokens(text.config.vocab_size)
    text.eval()
    if clip is None and encoder == base.encoders[0]:
        try:
            clip, processor = _load_partner(base, text)
            notes += _fine_tuned(base, difference_from_partner(clip.text_model, text))
        except UserError:  # where it is not needed, what is at hand may belong to another model
            if need_images:
                raise
            clip = processor = None
    if clip is not None:
        clip.text_model = text
    shared = {id(clip.vision_model): clip.vision_model} if clip is not None and share_vision else {}
    frozen_clip = copy.deepcopy(clip, shared)
    frozen_text = frozen_clip.text_model if frozen_clip is not None else copy.deepcopy(text)
    for module in (clip, frozen_clip, text, frozen_text, projection):
        if module is not None:
            module.requires_grad_(False).eval().to(device)
    return Towers(base, encoder, tokenizer, text, frozen_text, projection, clip, frozen_clip, processor, tuple(notes))


def text_embeddings(clip: Any, pooled: torch.Tensor) -> torch.Tensor:
    """Normalised text embeddings [batch, projection] of pooled states."""
    import torch

    return torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)


def image_embeddings(clip: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised image embeddings [batch, projection] of pixels [batch, 3, height, width]."""
    import torch

    from sd_erase import sharding

    (pooled,) = sharding.by_rows(lambda rows: [clip.vision_model(pixel_values=rows).pooler_output], pixels)
    return torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def read_pixels(processor: Any, paths: Sequence[str]) -> torch.Tensor:
    """The images of `paths` as the vision tower takes them."""
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return processor(images=images, return_tensors="pt").pixel_values


def cached_image_embeddings(
    towers: Towers, paths: Sequence[str], cache: Path, advance: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """The frozen vision tower's embedding of every path, computed once and kept in `cache`.

    They are known again by content: the images', the vision tower's, and how the images are prepared for it.
    """
    import torch
    from safetensors.torch import save_file

    wanted = sorted(set(paths))
    inputs = fingerprint([digests.of_file(Path(path)) for path in wanted], vision_stamp(towers))
    table = _read_table(cache, inputs)
    if table is not None:
        advance(len(wanted))
    else:
        parts = []
        for start in range(0, len(wanted), 64):
            chunk = wanted[start : start + 64]
            with torch.no_grad():
                pixels = read_pixels(towers.image_processor, chunk).to(towers.text.device)
                parts.append(image_embeddings(towers.frozen_clip, pixels).cpu())
            advance(len(chunk))
        table = torch.cat(parts).contiguous()
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as temporary:
            save_file({"embeddings": table}, temporary, {"inputs": inputs})
    return dict(zip(wanted, table, strict=True))


def vision_stamp(towers: Towers) -> str:
    """A digest of all that makes an image's embedding what it is beside the image: weights in memory, preparation, library."""
    state = towers.frozen_clip.state_dict()
    vision = {name: tensor for name, tensor in state.items() if name.startswith(("vision_model.", "visual_projection."))}
    return fingerprint(weights_stamp(vision), towers.image_processor.to_dict(), provenance.version_of("transformers"))


def weights_stamp(state: Mapping[str, torch.Tensor]) -> str:
    """A digest of the names, types, shapes and numbers of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(formats.raw_bytes(tensor.cpu()))
    return digest.hexdigest()


def _read_table(cache: Path, inputs: str) -> torch.Tensor | None:
    """The embeddings of a cache made of these inputs; a damaged cache is none."""
    try:
        if formats.read_header(cache).metadata.get("inputs") != inputs:
            return None
        return load_state(cache)["embeddings"]
    except (UserError, OSError, KeyError):
        return None


NEIGHBOURS = 8
POOLED = 64  # captions at once


def caption_of(phrase: str, kind: str = "object") -> str:
    """The plainest caption that names `phrase`."""
    if kind == "style":
        return f"a painting in the style of {phrase}"
    if kind == "person" or re.match(r"(an?|the)\s", phrase):  # a user's --anchor may bring its own article
        return f"a photo of {phrase}"
    if kind == "nudity":  # a word for how somebody is, not a thing
        return f"a photo of a {phrase} person"
    return f"a photo of {'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def nearness(towers: Towers, phrase: str, others: Sequence[str], kind: str) -> list[float]:
    """How near the frozen CLIP holds `phrase` to each of `others`: cosines of the (projected) end-of-text states."""
    import torch

    with torch.no_grad():
        pooled = _pooled(towers, [caption_of(each, kind) for each in (phrase, *others)])
        if towers.frozen_clip is not None:
            pooled = towers.frozen_clip.text_projection(pooled)
        return torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:]).tolist()


def choose_anchor(towers: Towers, concept: Concept) -> str:
    """The base's broader word that CLIP holds nearest to the concept."""
    words = [word for word in towers.base.anchors if not any(concept.scan(word))]
    near = nearness(towers, concept.name, words, concept.kind)
    return words[near.index(max(near))]


def choose_neighbours(towers: Towers, concept: Concept, anchor: str) -> tuple[str, ...]:
    """The common nouns that CLIP holds nearest to the concept, of those that it tells apart from it."""
    nouns = [noun for noun in common_nouns() if noun != anchor and not any(concept.scan(noun))]
    near = zip(nearness(towers, concept.name, nouns, concept.kind), nouns, strict=True)
    return tuple(noun for cosine, noun in sorted(near, reverse=True) if cosine < SAME)[:NEIGHBOURS]


def pooled_phrases(towers: Towers, phrases: Sequence[str]) -> torch.Tensor:
    """Normalised end-of-text states [phrases, width] that the frozen encoder gives the plainest caption of each phrase."""
    import torch

    return torch.nn.functional.normalize(_pooled(towers, [caption_of(phrase) for phrase in phrases]), dim=-1)


# by encoder and caption, of this process: harvest, anchors, neighbours and cards ask for the same phrases
_STATES: dict[tuple[str, str], torch.Tensor] = {}


def _pooled(towers: Towers, captions: Sequence[str]) -> torch.Tensor:
    """The frozen encoder's end-of-text states [captions, width], before the projection; the mask is causal, so no padding is needed."""
    import torch

    missing = sorted({caption for caption in captions if (towers.stamp, caption) not in _STATES}, key=lambda one: (len(one), one))
    with torch.no_grad():
        for start in range(0, len(missing), POOLED):  # short ones beside short ones
            part = missing[start : start + POOLED]
            ids = towers.tokens(part)
            states = encode(towers.frozen_text, ids[:, : towers.end_of(ids, 0)], (-1,))[1]
            _STATES.update(((towers.stamp, caption), state) for caption, state in zip(part, states.cpu(), strict=True))
    return torch.stack([_STATES[towers.stamp, caption] for caption in captions]).to(towers.frozen_text.device)


def told_apart(towers: Towers, phrases: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Those of `phrases` that the base does not read as a word of `concepts`: it cannot keep one and lose the other."""
    if not phrases:
        return []
    own = pooled_phrases(towers, [phrase for concept in concepts for phrase in concept.phrases])
    nearest = (pooled_phrases(towers, phrases) @ own.T).max(-1).values
    return [phrase for phrase, cosine in zip(phrases, nearest.tolist(), strict=True) if cosine < SAME]
