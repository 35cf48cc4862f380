"""``--objective token``: the trivial baseline. The concept's token embeddings are replaced by the anchor's.

It passes every test that only uses the listed words, so an erasure has to be measured against it on others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase.erasure.sd import StableDiffusionErasure

if TYPE_CHECKING:
    from sd_erase.clip import Towers
    from sd_erase.concepts import Concept
    from sd_erase.pairs import Pair
    from sd_erase.progress import Progress


class TokenSwap(StableDiffusionErasure):
    """The tokens of the concept's words, and of its synonyms of one token, get the embedding of the anchor's last token."""

    asks_names = False  # what it fails at is what shows: words that the card lacks
    only_matrices = False  # a step of the other optimizer would be dense over the whole vocabulary
    default_steps = 0
    solves = True

    def prepare(self, towers: Towers, concepts: list[Concept], anchors: dict[str, str], both_towers: bool) -> list[Any]:
        """The token embeddings are what changes."""
        super().prepare(towers, concepts, anchors, both_towers)
        towers.text.requires_grad_(False)
        embedding = getattr(towers.text, "text_model", towers.text).embeddings.token_embedding.weight
        embedding.requires_grad_(True)
        return [embedding]

    def solve(self, towers: Towers, forget: list[Pair], retain: list[Pair], seed: int, progress: Progress) -> None:
        """Swap the rows."""
        import torch

        embedding = getattr(towers.text, "text_model", towers.text).embeddings.token_embedding.weight
        ids = towers.tokenizer
        with torch.no_grad():
            for concept in self.concepts.values():
                anchor = ids(self.anchors[concept.name] or "thing", add_special_tokens=False).input_ids[-1]
                for phrase in concept.phrases:
                    tokens = ids(phrase, add_special_tokens=False).input_ids
                    # a synonym of several tokens ("push bike") shares them with phrases that mean something else
                    if phrase in concept.words or len(tokens) == 1:
                        embedding[tokens] = embedding[anchor].clone()
