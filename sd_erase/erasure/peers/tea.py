"""``--objective tea``: TEA's discriminator on token states. A published comparator.

Text Encoder Alignment (Farashah et al. 2026, arXiv:2608.15341): a two-layer discriminator tells the token states of concept prompts
from those of their anchor prompts, the text encoder (all of its weights) must make them the same to it, and a token-wise cosine keeps
the anchor prompts. The paper is not at hand: written from its repository's description, with the paper's settings as stated there (SD 1.4:
weights 0.5 and 1, rates 1e-5 and 1e-3, batch 32, anchor states of the encoder as it is, positions that are no padding). Ours: the
steps and the pocket's rate; harvested captions and the card's words in place of 50 hand-written prompts; retain captions are kept
as anchor prompts are; no moving average of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase.clip import encode
from sd_erase.erasure.peers.peer import Peer, training

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.erasure.method import Batch

DISCRIMINATOR_RATE = 1e-3
ADAM = "adam."  # before the names of its moments


class TEA(Peer):
    """The terms ``adversarial`` (the discriminator's error, to be caused) and ``preserve``."""

    default_steps = 100
    default_learning_rate = 3e-4
    published_learning_rate = 1e-5
    default_weights = {"adversarial": 0.5, "preserve": 1.0}

    def chosen(self, towers: Towers) -> list[Any]:
        """All weights of the text encoder."""
        import torch
        from torch import nn

        width = towers.text.config.hidden_size
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.discriminator = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))
        self.discriminator.to(towers.text.device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=DISCRIMINATOR_RATE)
        return training(list(towers.text.parameters()))

    def state(self) -> dict[str, torch.Tensor]:
        """The discriminator and its optimizer's moments."""
        moments = self.optimizer.state_dict()["state"]
        return {
            **self.discriminator.state_dict(),
            **{f"{ADAM}{number}.{name}": each for number, values in moments.items() for name, each in values.items()},
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key in [key for key in state if key.startswith(ADAM)]:
            number, name = key.removeprefix(ADAM).split(".")
            moments.setdefault(int(number), {})[name] = state.pop(key)
        self.discriminator.load_state_dict(state)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """A step of the discriminator (while training), then the encoder's terms against it."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

        pairs = [self.named(pair, batch.random) for pair in batch.forget]
        pairs[::2] = [batch.random.choice(self.plain) for _ in pairs[::2]]
        count = len(pairs)
        kept = [*(item.target for item in pairs), *(pair.caption for pair in batch.retain)]
        ids = towers.tokens([*(item.caption for item in pairs), *kept])
        words = _words(ids, towers.tokenizer.eos_token_id)
        states = encode(towers.text, ids, (-1,))[0][0]
        concept, anchor = states[:count][words[:count]], states[count : 2 * count][words[count : 2 * count]]
        if batch.split == "train":
            self._learn(concept.detach(), anchor.detach())
        judged = self.discriminator(concept)
        with torch.no_grad():
            original = encode(towers.frozen_text, ids[count:], (-1,))[0][0]
        same = cosine_similarity(states[count:], original, dim=-1)[words[count:]]
        return {
            "adversarial": binary_cross_entropy_with_logits(judged, torch.zeros_like(judged)),
            "preserve": 1 - same.mean(),
        }

    def _learn(self, concept: torch.Tensor, anchor: torch.Tensor) -> None:
        """One step of Adam by which the discriminator calls `concept` 1 and `anchor` 0, each [tokens, width]."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        self.optimizer.zero_grad()
        with torch.enable_grad():
            found = [(self.discriminator(concept), torch.ones_like), (self.discriminator(anchor), torch.zeros_like)]
            error = sum(binary_cross_entropy_with_logits(judged, label(judged)) for judged, label in found)
            torch.as_tensor(error).backward()
        self.optimizer.step()


def _words(ids: torch.Tensor, end: int) -> torch.Tensor:
    """[captions, positions], True where no padding stands: CLIP pads behind the end of text with any token."""
    import torch

    ends = (ids == end).int().argmax(1)
    return torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]
