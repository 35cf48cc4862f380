"""Input embeddings that the frozen encoder reads as a concept, whatever their name: synonyms that nobody listed.

Found by gradient descent from many random starts (words of the vocabulary, moved by noise), as textual inversion finds one (Gal et al.
2023, arXiv:2208.01618), but against the text encoder's own hidden states, so that no image and no denoiser is needed. An erasure
that is trained on the listed words alone may key on those; one that is trained on what the encoder takes for the concept cannot.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sd_erase.rundir import fingerprint

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers

COUNT = 64  # pseudo-words of a concept
TOKENS = 3  # of each; where the word that it replaces has fewer, the first ones are used
STEPS = 40
RATE = 0.15  # of Adam, relative to the root mean square of the token embeddings
CLOSE = 0.15  # relative squared error of the hidden states below which a pseudo-word is taken for the concept


def embedding(text: Any) -> Any:
    """The token embedding of a CLIPTextModel."""
    return getattr(text, "text_model", text).embeddings.token_embedding


def vocabulary(tokenizer: Any, embedding: torch.Tensor) -> list[int]:
    """Ids of the tokens that stand for words: whole ones of letters, which are typed as they are read.

    Tokens that share one embedding vector with others (words that the pocket model does not know) tell nothing apart: the
    first of them stands for all.

    Args:
        tokenizer: a CLIP tokenizer.
        embedding: [tokens, width], the text encoder's input embeddings.
    """
    rows = embedding.detach().float().cpu().numpy() + 0.0  # -0.0 is 0.0
    first: dict[bytes, int] = {}
    for token in _words(_Content(tokenizer), len(embedding)):
        first.setdefault(rows[token].tobytes(), token)
    return list(first.values())


class _Content:
    """A tokenizer that is another one's equal where both give the same tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)  # none of transformers 4's slow tokenizers, as in a pipeline
        content = backend.to_str() if backend is not None else tuple(sorted(tokenizer.get_vocab().items()))
        self._key = (content, tuple(tokenizer.all_special_ids))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=2)  # seconds, which every concept, encoder and the adversary would take again
def _words(content: _Content, count: int) -> list[int]:
    """Those of the first `count` ids that stand for whole words of letters, which are typed as they are read."""
    tokenizer = content.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[token] for token in range(count)])
    words = [token for token, text in enumerate(texts) if token not in special and text.strip().isalpha()]
    typed = tokenizer([texts[token].strip() for token in words], add_special_tokens=False, verbose=False).input_ids
    return [token for token, ids in zip(words, typed, strict=True) if ids == [token]]


@contextmanager
def replaced(text: Any, rows: Sequence[int], positions: Sequence[int], values: torch.Tensor | None) -> Iterator[None]:
    """Give the text encoder other input embeddings for a while.

    Args:
        text: a CLIPTextModel.
        rows: of the batch.
        positions: in each of those rows.
        values: the embeddings there, [len(rows), width]; gradients flow to them.
    """
    import torch

    from sd_erase import sharding

    if values is None or not len(rows):
        yield
        return

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        first, end = sharding.rows_at_work(len(output))
        own = [place for place, row in enumerate(rows) if first <= row < end]  # all of them, where no other process has some
        chosen = ([rows[place] - first for place in own], [positions[place] for place in own])
        where = tuple(torch.tensor(part, dtype=torch.long, device=output.device) for part in chosen)
        there = sharding.copied(values)
        return output.index_put(where, (there if len(own) == len(rows) else there[own]).to(output.dtype))

    handle = embedding(text).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


_FOUND: dict[str, torch.Tensor] = {}  # of this process: a comparison's methods and seeds would search the same ones anew


def find(towers: Towers, captions: Sequence[str], spans: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    """Pseudo-words for the concept that `captions` name; of the same weights, captions and seed they are searched once a process.

    Args:
        towers: whose frozen text encoder is asked.
        captions: plain captions with one use of the concept each.
        spans: the token positions of that use, of each caption.
        seed: of the starts.

    Returns:
        [n, TOKENS, width]: those of `COUNT` starts that came `CLOSE`, at least a quarter of them (the closest).
    """
    from sd_erase import sharding

    device = towers.frozen_text.device
    key = fingerprint(towers.stamp, towers.layers, captions, spans, seed, str(device))
    if key not in _FOUND:
        # in whole by every process of a training: which of them come close is a choice that another rounding could change
        with sharding.sharing(False):
            _FOUND[key] = _search(towers, captions, spans, seed).cpu()
    return _FOUND[key].to(device, copy=True)


def _search(towers: Towers, captions: Sequence[str], spans: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    import torch

    from sd_erase.clip import encode

    rng = random.Random(seed)
    table = embedding(towers.frozen_text).weight.detach()
    words = torch.tensor(vocabulary(towers.tokenizer, table), device=table.device)
    scale = table[words].square().mean().sqrt()
    starts = torch.tensor([[rng.randrange(len(words)) for _ in range(TOKENS)] for _ in range(COUNT)])
    noise = torch.randn((COUNT, TOKENS, table.shape[1]), generator=torch.Generator().manual_seed(seed))
    found = (table[words[starts.to(words.device)]] + 0.5 * scale * noise.to(table.device)).requires_grad_(True)
    ids = towers.tokens(captions)
    ids = ids[:, : towers.end_of(ids)]
    with torch.no_grad():
        wanted, _ = encode(towers.frozen_text, ids, towers.layers)
    spread = [states.sub(states.mean((0, 1))).square().mean() for states in wanted]
    optimizer = torch.optim.Adam([found], lr=RATE * float(scale))
    errors = torch.zeros(COUNT)
    for step in range(STEPS + 1):
        chosen = [rng.randrange(len(captions)) for _ in range(COUNT)]
        places = [
            (row, position, min(order, TOKENS - 1))
            for row, caption in enumerate(chosen)
            for order, position in enumerate(spans[caption])
        ]
        rows, positions, parts = (list(part) for part in zip(*places, strict=True))
        with torch.enable_grad(), replaced(towers.frozen_text, rows, positions, found[rows, parts]):
            states, _ = encode(towers.frozen_text, ids[chosen], towers.layers)
            errors = torch.stack(
                [
                    (state - want[chosen]).square().mean((1, 2)) / one
                    for state, want, one in zip(states, wanted, spread, strict=True)
                ]
            ).mean(0)
            if step < STEPS:
                optimizer.zero_grad()
                errors.sum().backward()
                optimizer.step()
    order = errors.detach().argsort()
    close = max(COUNT // 4, int((errors < CLOSE).sum()))
    return found.detach()[order[:close]]
