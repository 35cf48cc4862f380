"""``--objective advunlearn``: AdvUnlearn's adversarial loop on the text encoder. A published comparator.

Defensive Unlearning with Adversarial Training (Zhang et al. 2024, arXiv:2405.15234): a bi-level problem. Below, a soft token before the
concept's prompt c makes the frozen denoiser predict what it predicted for c by the original encoder. Above, all of the text
encoder trains so that under the attacked prompt the prediction is ESD's target (away from c), plus the retain captions' predictions
staying as they were. The paper is not at hand: written from its abstract and from the settings that its repository states (one
token, Adam, 30 attack steps of 1e-3 from a random word at every step, retain batch 5 with weight 0.3, rate 1e-5, 1,000 steps of
which the first fifth without attack). Ours: the pocket's rate; 300 steps of 10 attack steps, at one image for all of them; the
attack's rate relative to the size of CLIP-L's token embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase.clip import encode
from sd_erase.erasure.peers.denoising import Denoiser, predicted, read_states
from sd_erase.erasure.peers.esd import STRENGTH
from sd_erase.erasure.peers.peer import Peer, training
from sd_erase.erasure.pseudo_words import embedding, replaced, vocabulary

if TYPE_CHECKING:
    import random

    import torch

    from sd_erase.clip import Towers
    from sd_erase.erasure.method import Batch

WARM_UP = 60  # steps without attack
ATTACK_STEPS = 10
ATTACK_RATE = 0.075  # of the root mean square of the token embeddings: 1e-3 of CLIP-L's
RETAINED = 5  # captions a step


class AdvUnlearn(Peer):
    """The terms ``erase``, under attack, and ``retain``."""

    needs_denoiser = True
    default_steps = 300
    default_learning_rate = 1e-4
    published_learning_rate = 1e-5
    default_weights = {"erase": 1.0, "retain": 0.3}

    def chosen(self, towers: Towers) -> list[Any]:
        """All weights of the text encoder."""
        import torch

        self.denoiser = Denoiser(towers)
        self.table = embedding(towers.frozen_text).weight.detach()
        self.words = vocabulary(towers.tokenizer, self.table)
        self.scale = float(self.table[self.words].square().mean().sqrt())
        self.done = torch.zeros((), dtype=torch.long)  # steps
        return training(list(towers.text.parameters()))

    def state(self) -> dict[str, torch.Tensor]:
        """How many steps were taken."""
        return {"done": self.done}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        self.done = state["done"].cpu()

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """One image of one plain prompt, attacked behind the warm-up, and one of each retain caption at a step of its own."""
        import torch
        from torch.nn.functional import mse_loss

        rng, unet = batch.random, self.denoiser.unet
        prompt = rng.choice(self.plain).caption
        kept = [pair.caption for pair in rng.sample(batch.retain, min(RETAINED, len(batch.retain)))]
        with torch.no_grad():
            original = read_states(towers.frozen_text, towers, ["", prompt, *kept])
        empty, states, of_kept = original[:1], original[1:2], original[2:]
        latents, step = self.denoiser.partly_drawn(unet, states, empty, rng)
        target = self.denoiser.away(latents, step, states, empty, STRENGTH)
        attack = None
        if int(self.done) >= WARM_UP:
            attack = self._attacked(towers, prompt, latents, step, states, rng)
        if batch.split == "train":
            self.done += 1
        erased = predicted(unet, latents, step, self._read(towers, prompt, attack))
        latents, step = self.denoiser.partly_drawn(unet, of_kept, empty, rng)
        with torch.no_grad():
            wanted = predicted(unet, latents, step, of_kept)
        found = predicted(unet, latents, step, read_states(towers.text, towers, kept))
        return {"erase": mse_loss(erased, target), "retain": mse_loss(found, wanted)}

    def _read(self, towers: Towers, prompt: str, attack: torch.Tensor | None) -> torch.Tensor:
        """The student's states [1, positions, width] of `prompt`, behind the soft token `attack` [1, width] where there is one."""
        if attack is None:
            return read_states(towers.text, towers, [prompt])
        ids = towers.tokens([prompt])
        ids = ids[:, [0, 0, *range(1, ids.shape[1] - 1)]]  # any token, whose embedding is replaced, behind the begin of text
        with replaced(towers.text, [0], [1], attack):
            return encode(towers.text, ids, towers.layers[:1])[0][0]

    def _attacked(
        self, towers: Towers, prompt: str, latents: torch.Tensor, step: torch.Tensor, states: torch.Tensor, rng: random.Random
    ) -> torch.Tensor:
        """The soft token [1, width] behind which the prediction comes nearest to that for the original's `states`."""
        import torch
        from torch.nn.functional import mse_loss

        with torch.no_grad():
            goal = predicted(self.denoiser.unet, latents, step, states)
        token = self.table[[rng.choice(self.words)]].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([token], lr=ATTACK_RATE * self.scale)
        for _ in range(ATTACK_STEPS):
            with torch.enable_grad():
                error = mse_loss(predicted(self.denoiser.unet, latents, step, self._read(towers, prompt, token)), goal)
            (token.grad,) = torch.autograd.grad(error, [token])
            optimizer.step()
        return token.detach()
