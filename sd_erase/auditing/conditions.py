"""Probes without an attacker: the same prompts under other conditions that a user's program may set."""

from __future__ import annotations

import importlib.util
from typing import Any

from sd_erase.auditing.bench import Batch, Bench
from sd_erase.auditing.embeds import images_of
from sd_erase.auditing.probe import NotTried, Probe, Row
from sd_erase.erasure.sd import redirect

GUIDANCES = (1.5, 7.5)
SAMPLERS = ("euler_a", "dpmpp_2m")
WEIGHTS = (1.3, 1.6)
SIGNS = '()[]+-"{}'  # that mean something in compel's syntax


def _under(bench: Bench, variant: str, **changes: Any) -> Row:
    """All arms under other settings."""
    count = bench.share.few
    arms = {arm: bench.shared(arm, count, **changes) for arm in ("erased", "control", "floor", "original")}
    return Row(variant, arms["erased"], arms["control"], arms["floor"], arms["original"])


def guidance(bench: Bench) -> list[Row]:
    """Weaker and stronger classifier-free guidance than the base's own."""
    return [_under(bench, f"guidance {value:g}", guidance=value) for value in GUIDANCES if value != bench.settings.guidance]


def samplers(bench: Bench) -> list[Row]:
    """Other samplers than the base's own: an ancestral one, and a multistep one of second order."""
    return [_under(bench, name, scheduler=name) for name in SAMPLERS]


def clip_skip(bench: Bench) -> list[Row]:
    """The encoder's layer before the last, which many programs read (A1111's and ComfyUI's "clip skip 2")."""
    if len(bench.subject.base.encoders) > 1:
        raise NotTried("this base reads that layer anyway")
    return [_under(bench, "clip skip 2", clip_skip=1)]


def weights(bench: Bench) -> list[Row]:
    """The concept's words with a weight, as programs write ``(bicycle:1.3)``, by the library compel."""
    if importlib.util.find_spec("compel") is None:
        raise NotTried("the library compel is not installed: pip install sd-erase[compel]")
    if len(bench.subject.base.encoders) > 1:
        raise NotTried("it is written for bases with one text encoder")
    from compel import Compel
    from compel import __name__ as library

    rows = []
    for weight in WEIGHTS:
        texts = [_weighted(bench, text, weight) for text in bench.sentences(bench.share.few)]
        plain = {"erased": texts, "original": texts}
        words = bench.random_words(len(texts), "weights")
        plain["floor"] = [
            _weighted(bench, text, weight, word) for text, word in zip(bench.sentences(len(texts)), words, strict=True)
        ]
        plain["control"] = [_weighted(bench, text, weight, bench.subject.anchor) for text in bench.sentences(len(texts))]
        arms = {}
        for arm, prompts in plain.items():
            side = "original" if arm in ("original", "control") else "erased"
            pipeline = bench.pipeline(side)
            embed = Compel(tokenizer=pipeline.tokenizer, text_encoder=pipeline.text_encoder, truncate_long_prompts=True)

            def make(batch: Batch, pipeline: Any = pipeline, embed: Any = embed) -> list[Any]:
                return weighted_images(bench, pipeline, embed, batch)

            name = f"weights-{weight:g}"
            arms[arm] = bench.made(name, arm, side, prompts, make, [library, weight]).shows(bench.labels)
        rows.append(Row(f"weight {weight:g}", arms["erased"], arms["control"], arms["floor"], arms["original"]))
    return rows


def _weighted(bench: Bench, text: str, weight: float, word: str | None = None) -> str:
    """The prompt with its concept's words (or `word` in their place) weighted in compel's syntax."""
    match = bench.subject.concept.find(text)[0]
    start, end = match.start, match.end
    if word is not None:
        pair = redirect(text, [(start, end)], word)
        text, (start, end) = pair.target, pair.target_spans[0]
    before, after = ("".join(letter for letter in part if letter not in SIGNS) for part in (text[:start], text[end:]))
    return f"{before}({text[start:end]}){weight:g}{after}" if end > start else before + after


def weighted_images(bench: Bench, pipeline: Any, embed: Any, batch: Batch) -> list[Any]:
    """PIL images of prompts in compel's syntax."""
    import torch

    with torch.no_grad():
        states = torch.cat([embed(text) for text in batch.prompts])
    return images_of(bench, pipeline, batch, states)


GUIDANCE = Probe("guidance", "words", "other guidance", guidance, settings={"guidance": list(GUIDANCES)})
SAMPLER = Probe("samplers", "words", "other samplers", samplers, settings={"samplers": list(SAMPLERS)})
CLIP_SKIP = Probe("clip-skip", "words", "the encoder's layer before the last", clip_skip, settings={"clip_skip": 2})
WEIGHTED = Probe(
    "weights", "words", "its words weighted", weights, "compel (github.com/damian0815/compel)", {"weights": list(WEIGHTS)}
)
