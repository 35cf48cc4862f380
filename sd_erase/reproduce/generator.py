"""Table 6 and the image grids: what Stable Diffusion draws with the original's and with erased text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_erase import chain, resources
from sd_erase.detection import load_detector
from sd_erase.drawing import Settings, base_stamp, precision
from sd_erase.errors import UserError
from sd_erase.evaluation import detect_files
from sd_erase.images import draw
from sd_erase.metrics.rates import wilson
from sd_erase.pipeline import erased_pipeline, load_original
from sd_erase.probes import answers
from sd_erase.prompts import Prompt, read_prompts
from sd_erase.reproduce import Experiment, Recipe
from sd_erase.reproduce.bench import Bench
from sd_erase.reproduce.tables import _rows as encoders
from sd_erase.rundir import RunDir, fingerprint

PROMPTS, IMAGES = 50, 8  # the paper's: 50 captions a concept, 400 images a model


@dataclass
class Generator:
    """The original pipeline and what it draws with each run's encoder; images are kept and not drawn twice."""

    bench: Bench

    def __post_init__(self) -> None:
        device = resources.device(self.bench.device)
        self.original = load_original(self.bench.base, device, precision(self.bench.base, device))
        self.stamp = fingerprint(base_stamp(self.bench.base, self.bench.progress), device.type, str(self.original.dtype))

    def draw(self, run: RunDir | None, prompts: Sequence[str], images: int, name: str) -> list[Path]:
        """`images` images of every prompt, prompt by prompt, by `run`'s encoder; None is the original.

        Args:
            name: of the folder beside the run that keeps them.
        """
        settings = Settings.of(self.bench.config("", "captions", 0, {}), self.bench.base)
        settings = dataclasses.replace(settings, images_per_prompt=images)
        pipeline, stamp, folder = self.original, self.stamp, self.bench.folder / "bench" / "original"
        if run is not None:
            encoders = chain.Chain(run, self.bench.config("", "captions", 0, {})).now("encoder")
            pipeline, stamp, folder = erased_pipeline(self.original, run), fingerprint(self.stamp, encoders), run.path
        wanted = [Prompt(prompt) for prompt in prompts]
        # the original draws for every concept: other prompts must not take the place of images that are still to be shown
        kept = folder / "images" / f"{name}-{fingerprint(list(prompts))[:8]}"
        return draw(pipeline, wanted, kept, settings, stamp=stamp, progress=self.bench.progress)


def detection(recipe: Recipe, bench: Bench) -> Experiment:
    """Table 6: the share of images, drawn from captions that name the concept, in which a detector finds it.

    The captions are a list of the concept's own (``prompts/CONCEPT.txt``). Beside the paper's rate stands that of the other objects
    that the captions name and that should stay.
    """
    generator = Generator(bench)
    detector = load_detector(bench.base.detector, device=resources.device(bench.device))
    count, images = int(recipe.sizes.get("prompts", PROMPTS)), int(recipe.sizes.get("images", IMAGES))
    side, erasures = next(iter(recipe.concepts.items()))
    rows, flat, seed = [], list[str](), recipe.seeds[0]
    for concept in erasures:
        prompts = [prompt.text for prompt in read_prompts(concept)][:count]
        captions = [prompt for prompt in prompts for _ in range(images)]
        for name, own in encoders(recipe):
            run = None if own is None else bench.run(own, concept, seed, side)
            paths = generator.draw(run, prompts, images, concept)
            seen, pictures = detect_files(detector, paths, f"{concept} detections", bench.progress)
            result = answers("named", captions, seen, pictures, bench.concepts(concept), detector)
            if result["flat"]:
                flat.append(f"{concept}, {name}: {result['flat']} images of a single colour are left out; they show nothing.")
            if not result["target"]["n"]:
                continue
            target, others = result["target"], result["companions"]
            low, high = wilson(target["count"], target["n"])
            rows.append(
                {
                    "concept": concept,
                    "encoder": name,
                    "detected %": 100 * target["count"] / target["n"],
                    "95 % interval": f"{100 * low:.1f}–{100 * high:.1f}",
                    "images": target["n"],
                    "companions detected %": 100 * others["count"] / others["n"] if others["n"] else None,
                }
            )
    if not rows:
        raise UserError("Every image that was drawn is of a single colour, as where numbers overflow: pass --device cpu.")
    notes = [
        f"{count} captions a concept, {images} images a caption, the same noise for every encoder; detector {bench.base.detector} at its "
        "card's confidence; Wilson's 95 % interval over images.",
        "Companions: the other objects that the captions name; an erasure should leave them where the original draws them.",
        *flat,
    ]
    return Experiment(list(rows[0]), rows, notes=notes)
