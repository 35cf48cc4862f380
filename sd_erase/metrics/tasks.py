"""CLIP's own tasks: zero-shot prediction and retrieval by class names, and retrieval of images and captions.

Each function returns one hit (0 or 1) an item, so that a caller can average over forget and retain sets apart. Embeddings are
normalised, [items, dimensions].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sd_erase.captions import cifar100
from sd_erase.errors import unknown_choice

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers

BATCH = 128  # inputs of a tower, rows of a similarity matrix
# by name; "cifar100" and "imagenet" are CLIP's own (openai/CLIP, data/prompts.md; open_clip/zero_shot_metadata.py)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "cifar100": tuple(
        f"a {quality}photo of {article} {size}{{}}."
        for article in ("a", "the")
        for quality, size in (
            ("", ""), ("blurry ", ""), ("black and white ", ""), ("low contrast ", ""), ("high contrast ", ""), ("bad ", ""),
            ("good ", ""), ("", "small "), ("", "big "),
        )
    ),
    "imagenet": (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
        "art of the {}.", "a photo of the small {}.",
    ),
    # of the sentences that the pocket model was trained on, which knows few other words
    "pocket": ("a photo of a {}", "a picture of a {}", "an image of a {}", "a close up of a {}", "there is a {}", "here is a {}"),
    "data": cifar100.TEMPLATES,
}  # fmt: skip


def templates(name: str) -> tuple[str, ...]:
    """The prompt templates of a name; an unknown one raises `UserError`."""
    if name not in TEMPLATES:
        raise unknown_choice("Prompt templates", name, TEMPLATES)
    return TEMPLATES[name]


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def embed_texts(towers: Towers, captions: Sequence[str]) -> torch.Tensor:
    """The student's normalised embeddings of `captions` [captions, dimensions]."""
    import torch

    from sd_erase.clip import encode, text_embeddings

    parts = []
    with torch.no_grad():
        for batch in _batches(captions):
            ids = towers.tokens(batch)
            ids = ids[:, : towers.end_of(ids)]  # the pooled state stands at end-of-text
            parts.append(text_embeddings(towers.clip, encode(towers.text, ids, (-1,))[1]))
    return torch.cat(parts)


def embed_images(towers: Towers, paths: Sequence[str]) -> torch.Tensor:
    """The student's normalised embeddings of the images at `paths` [images, dimensions]."""
    import torch

    from sd_erase.clip import image_embeddings, read_pixels

    parts = []
    with torch.no_grad():
        for batch in _batches(paths):
            parts.append(image_embeddings(towers.clip, read_pixels(towers.image_processor, batch).to(towers.text.device)))
    return torch.cat(parts)


def class_embeddings(texts: torch.Tensor, count: int) -> torch.Tensor:
    """The zero-shot classifier of CLIP and open_clip: the mean over a class's templates, normalised again.

    Args:
        texts: normalised embeddings [classes x templates, dimensions], the templates of a class together.
        count: templates.

    Returns:
        [classes, dimensions].
    """
    from torch.nn.functional import normalize

    return normalize(texts.reshape(-1, count, texts.shape[-1]).mean(1), dim=-1)


def zero_shot_prediction(images: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the class embedding most similar to an image is that of its own class (top-1 of all classes).

    Args:
        images: [images, dimensions].
        classes: of `class_embeddings`.
        labels: the class of each image [images].

    Returns:
        Hits [images].
    """
    return ((images @ classes.T).argmax(-1) == labels).float()


def zero_shot_text_retrieval(
    images: torch.Tensor, texts: torch.Tensor, text_labels: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Whether the single text most similar to an image names its class.

    The pool is every class name in every template, each text for itself: "given an image, CLIP retrieves the most relevant text from
    a predefined set of class names" (CLIPErase, section 5.1). It differs from `zero_shot_prediction` in that nothing is averaged.

    Args:
        images: [images, dimensions].
        texts: [texts, dimensions].
        text_labels: the class that each text names [texts].
        labels: the class of each image [images].

    Returns:
        Hits [images].
    """
    return (text_labels[(images @ texts.T).argmax(-1)] == labels).float()


def pool_retrieval(
    queries: torch.Tensor, candidates: torch.Tensor, same: torch.Tensor, size: int, generator: torch.Generator
) -> torch.Tensor:
    """Whether a query's own partner is the most similar of a pool of `size` pairs, drawn at random without replacement.

    What open-domain pairs, which have no classes, allow in place of zero-shot prediction (queries are images) and retrieval (queries
    are texts). By chance, 1 / size is right.

    Args:
        queries, candidates: [pairs, dimensions] of matching pairs.
        same: a number for each pair [pairs]; pairs of one number have the same caption, and count as each other's partner.
        size: pairs in a pool; the last pool is filled up with pairs of other pools.
        generator: of the draw.

    Returns:
        Hits [pairs].
    """
    import torch

    order = torch.randperm(len(queries), generator=generator).to(queries.device)
    hits = torch.zeros(len(queries), device=queries.device)
    for start in range(0, len(order), size):
        pool = order[start : start + size]
        if len(pool) < size:
            pool = torch.cat([pool, order[: min(size - len(pool), start)]])
        best = (queries[pool] @ candidates[pool].T).argmax(-1)
        own = len(order[start : start + size])
        hits[pool[:own]] = (same[pool[best]] == same[pool])[:own].float()
    return hits


def first_ranks(
    queries: torch.Tensor, gallery: torch.Tensor, query_keys: torch.Tensor, gallery_keys: torch.Tensor
) -> torch.Tensor:
    """The place (from 0) of the first gallery item with a query's key when the gallery is sorted by similarity; ties keep its order."""
    import torch

    ranks = []
    for start in range(0, len(queries), BATCH):
        rows = slice(start, start + BATCH)
        order = (queries[rows] @ gallery.T).argsort(dim=-1, descending=True, stable=True)
        ranks.append((gallery_keys[order] == query_keys[rows, None]).float().argmax(-1))
    return torch.cat(ranks)


def recall_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """Hits at `k` of the ranks of `first_ranks`.

    Karpathy's protocol (Karpathy and Fei-Fei 2015, arXiv:1412.2306): the gallery of image retrieval is all test images, and a caption
    hits when its image is among the first k; the gallery of text retrieval is all captions of all test images, and an image hits when
    any of its five captions is. Forget and retain queries search the same gallery.
    """
    return (ranks < k).float()


def numbered(values: Sequence[Any]) -> torch.Tensor:
    """Equal values as equal whole numbers [values]."""
    import torch

    count = itertools.count()
    table: dict[Any, int] = {}
    return torch.tensor([table[value] if value in table else table.setdefault(value, next(count)) for value in values])
