"""``--objective hirm``: HiRM's edit of the text encoder's first layer. A published comparator.

High-level Representation Misdirection (Lee, Kim and Hwang, ICLR 2026, arXiv:2602.19631): the attention and MLP of CLIP's first layer
train so that what the last layer's attention gives for the concept's name comes to lie at a random direction of fixed length (its
variant HiRM-R); nothing is retained. The paper's equations are not at hand: written from its abstract and the description of a public
reimplementation. The direction's length, the steps and both rates are ours, and so is what several words do: they are rows of one
batch with one direction (the paper averages weights over concepts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_erase.erasure.peers.peer import Peer, layers_of, training

if TYPE_CHECKING:
    import torch

    from sd_erase.clip import Towers
    from sd_erase.erasure.method import Batch

LENGTH = 20.0  # of the direction, over all positions


class HiRM(Peer):
    """The term ``misdirection``."""

    default_steps = 50
    default_learning_rate = 1e-3
    published_learning_rate = 1e-5
    default_weights = {"misdirection": 1.0}

    def chosen(self, towers: Towers) -> list[Any]:
        """The first layer's attention and MLP."""
        self.direction = direction(towers.text.config, towers.text.device)
        return training(parameters(towers.text))

    def losses(self, towers: Towers, batch: Batch) -> dict[str, torch.Tensor]:
        """The mean squared distance from the direction, over a batch of plain captions."""
        from torch.nn.functional import mse_loss

        size = max(1, len(batch.forget))
        chosen = self.plain if len(self.plain) <= size else batch.random.sample(self.plain, size)
        given = last_attention(towers.text, towers.tokens([item.caption for item in chosen]))
        return {"misdirection": mse_loss(given, self.direction.expand_as(given))}


def parameters(text: Any) -> list[Any]:
    """Of a CLIPTextModel's first layer the attention's and the MLP's, without the norms."""
    first = layers_of(text)[0]
    return [*first.self_attn.parameters(), *first.mlp.parameters()]


def direction(config: Any, device: Any = None) -> torch.Tensor:
    """[1, positions, width] of length `LENGTH`, uniform numbers from one seed."""
    import torch

    shape = (1, config.max_position_embeddings, config.hidden_size)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return (drawn / drawn.norm() * LENGTH).to(device)


def last_attention(text: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the last layer's attention adds to the states, [captions, positions, width]."""
    given: list[torch.Tensor] = []
    hook = layers_of(text)[-1].self_attn.out_proj.register_forward_hook(lambda module, read, output: given.append(output))
    try:
        text(input_ids=ids)
    finally:
        hook.remove()
    return given[0]
