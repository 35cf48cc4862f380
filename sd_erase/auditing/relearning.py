"""Relearning: a few steps of LoRA on a few images of the concept, and how soon it is back.

Erased knowledge that lies dormant comes back sooner than new knowledge is learnt (MemoRa, arXiv:2510.03263). The control is the same
training of the original on the anchor's caption, for which the concept's images are new; only what comes back sooner than there counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sd_erase.auditing.bench import Batch, Bench
from sd_erase.auditing.embeds import images_of
from sd_erase.auditing.inversion import BATCH, NOISE, Examples
from sd_erase.auditing.probe import Probe, Row
from sd_erase.auditing.subject import distance
from sd_erase.clip import encode

if TYPE_CHECKING:
    import torch

STEPS = (5, 20, 60)
RANK, RATE = 4, 1e-2
TARGETS = {"text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"], "unet": ["to_q", "to_k", "to_v", "to_out.0"]}


def relearning(bench: Bench) -> list[Row]:
    """LoRA on the part of the model that the erasure changed."""
    bench.one_encoder()
    part = "unet" if distance(bench.original.unet.state_dict(), bench.erased.unet.state_dict()) else "text_encoder"
    texts = bench.sentences(bench.share.few)
    steps = tuple(max(1, round(step * min(1.0, bench.share.effort))) for step in STEPS)
    learnt: dict[str, tuple[Any, list[str], Callable[[str], str]]] = {
        "erased": (bench.erased, texts, lambda text: text),
        "original": (bench.original, bench.anchored(texts), lambda text: bench.with_word(text, bench.subject.anchor)),
    }
    found: dict[tuple[str, int], list[bool]] = {}
    images = len(bench.shown)
    for side, (pipeline, prompts, caption) in learnt.items():
        model = copy.copy(pipeline)
        setattr(model, part, _with_lora(getattr(pipeline, part), part))
        examples, done = Examples(bench, caption), 0
        for step in steps:
            _train(bench, model, part, examples, step - done, f"relearning, {side}")
            done = step

            def make(batch: Batch, model: Any = model) -> list[Any]:
                return images_of(bench, model, batch, _states(bench, model, batch.prompts))

            found[side, step] = bench.made(f"relearning-{step}", side, side, prompts, make, [part, steps, images]).shows(
                bench.labels
            )
    return [
        Row(
            f"{step} steps on {images} images", found["erased", step], found["original", step], bench.shared("floor", len(texts)),
            found["original", steps[-1]], f"the original, taught the images under the anchor's caption for {steps[-1]} steps,", relative=True,
            baseline=bench.shared("control", len(texts)),
        )
        for step in steps
    ]  # fmt: skip


def _with_lora(module: Any, part: str) -> Any:
    """A copy of the module with a LoRA to train."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)  # the factors' start
    found = copy.deepcopy(module).requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS[part]), found)


def _states(bench: Bench, model: Any, texts: Sequence[str]) -> torch.Tensor:
    states: torch.Tensor = encode(model.text_encoder, bench.towers.tokens(texts), (-1,))[0][0]
    return states


def _train(bench: Bench, model: Any, part: str, examples: Examples, steps: int, name: str) -> None:
    """`steps` more of Adam on the denoising loss of the examples."""
    import torch

    optimizer = torch.optim.Adam([each for each in getattr(model, part).parameters() if each.requires_grad], lr=RATE)
    with bench.named(name)("", steps) as task, torch.enable_grad():
        for _ in range(steps):
            texts, noisy, times, target = examples.batch(model.scheduler)
            optimizer.zero_grad()
            (model.unet(noisy, times, _states(bench, model, texts)).sample - target).square().mean().backward()
            optimizer.step()
            task.advance()


RELEARNING = Probe(
    "relearning",
    "wordless",
    "taught again by LoRA on a few images",
    relearning,
    "MemoRa, arXiv:2510.03263",
    {"steps": list(STEPS), "rank": RANK, "rate": RATE, "images a step": BATCH, "noise": list(NOISE)},
)
